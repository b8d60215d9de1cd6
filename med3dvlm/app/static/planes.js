/* One plane of the scan on a canvas: spacing-true, with crosshair, orientation letters and a slider. */

import { PLANES } from "./volume.js";

const COLOURS = { axial: "#ff6b5e", coronal: "#52c77a", sagittal: "#f2c14e" };
const GAP = 9; // pixels left free around the crosshair's centre, so that it hides nothing

const MARKUP = (name) => `
  <header>
    <i class="swatch" style="background:${COLOURS[name]}"></i><h2></h2><output></output>
    <button type="button" class="enlarge quiet" title="Enlarge (double click)"></button>
  </header>
  <div class="stage">
    <canvas tabindex="0" role="img"></canvas>
    ${["left", "right", "top", "bottom"].map((side) => `<b class="letter ${side}"></b>`).join("")}
  </div>
  <input type="range" min="1" max="1" value="1" disabled>`;

export class PlaneView {
  /* handlers: move(voxel) for a new crosshair, step(plane, slices), window(dx, dy) for a drag of the grey scale,
     enlarge(plane), active(plane). */
  constructor(section, name, handlers) {
    this.name = name;
    this.plane = PLANES[name];
    this.handlers = handlers;
    section.innerHTML = MARKUP(name);
    const find = (selector) => section.querySelector(selector);
    this.title = find("h2");
    this.output = find("output");
    this.stage = find(".stage");
    this.canvas = find("canvas");
    this.slider = find("input");
    this.enlarge = find(".enlarge");
    this.letters = [...section.querySelectorAll(".letter")];
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  listen() {
    const { canvas, handlers, name } = this;
    this.slider.addEventListener("input", () => {
      handlers.active(name);
      const voxel = [...this.voxel];
      voxel[this.plane.along] = Number(this.slider.value) - 1;
      handlers.move(voxel);
    });
    this.enlarge.addEventListener("click", () => handlers.enlarge(name));
    canvas.addEventListener("dblclick", () => handlers.enlarge(name));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("focus", () => handlers.active(name));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      handlers.active(name);
      handlers.step(name, Math.sign(event.deltaY));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.scan) return;
      handlers.active(name);
      canvas.setPointerCapture(event.pointerId);
      this.drag = event.button === 2 || event.shiftKey ? "window" : "cross";
      if (this.drag === "cross") this.point(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (this.drag === "cross") this.point(event);
      else if (this.drag === "window") handlers.window(event.movementX, event.movementY);
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (this.drag = null));
  }

  /* Moves the crosshair to where the pointer is. */
  point(event) {
    const { left, top, width, height } = this.frame;
    const box = this.canvas.getBoundingClientRect();
    const { across, down } = this.plane;
    const place = (fraction, axis) => {
      const count = this.scan.size[axis];
      return Math.min(count - 1, Math.max(0, Math.floor(fraction * count)));
    };
    const voxel = [...this.voxel];
    voxel[across] = place((event.clientX - box.left - left) / width, across);
    voxel[down] = place((event.clientY - box.top - top) / height, down);
    this.handlers.move(voxel);
  }

  /* oriented: whether the anatomy is known; letters that would be guesses are not drawn. */
  show(scan, oriented) {
    this.scan = scan;
    this.image = null;
    const name = this.plane.names[oriented ? 0 : 1];
    this.title.textContent = name;
    this.slider.max = scan.size[this.plane.along];
    this.slider.disabled = false;
    this.slider.setAttribute("aria-label", `${name}: slice`);
    this.canvas.setAttribute("aria-label", `${name} plane`);
    this.enlarge.setAttribute("aria-label", `Enlarge the ${name.toLowerCase()} plane`);
    this.letters.forEach((element, side) => (element.textContent = oriented ? this.plane.letters[side] : ""));
  }

  update(voxel, table) {
    const index = voxel[this.plane.along];
    if (!this.image || this.index !== index || this.table !== table) {
      this.image = this.scan.plane(this.name, index, table);
      this.index = index;
      this.table = table;
    }
    this.voxel = voxel;
    const count = this.scan.size[this.plane.along];
    this.output.textContent = `${index + 1} / ${count}`;
    this.slider.value = index + 1;
    this.slider.setAttribute("aria-valuetext", `${index + 1} of ${count}`);
    this.draw();
  }

  /* Where the plane lies on the canvas, in CSS pixels: as large as fits, true to the spacing. */
  fit(stageWidth, stageHeight) {
    const { across, down } = this.plane;
    const wide = this.scan.size[across] * this.scan.spacing[across];
    const high = this.scan.size[down] * this.scan.spacing[down];
    const scale = Math.min(stageWidth / wide, stageHeight / high);
    const width = wide * scale, height = high * scale;
    return { left: (stageWidth - width) / 2, top: (stageHeight - height) / 2, width, height };
  }

  draw() {
    const { clientWidth, clientHeight } = this.stage;
    if (!this.image || !clientWidth || !clientHeight) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    this.frame = this.fit(clientWidth, clientHeight);
    this.paint(context, this.frame);
    this.cross(context, this.frame);
    const { left, top, width, height } = this.frame;
    const [l, r, t, b] = this.letters.map((element) => element.style);
    l.left = `${left + 6}px`;
    r.right = `${clientWidth - left - width + 6}px`;
    t.top = `${top + 4}px`;
    b.bottom = `${clientHeight - top - height + 4}px`;
  }

  paint(context, { left, top, width, height }) {
    const pixels = document.createElement("canvas");
    pixels.width = this.image.width;
    pixels.height = this.image.height;
    pixels.getContext("2d").putImageData(this.image, 0, 0);
    context.imageSmoothingQuality = "high";
    context.drawImage(pixels, left, top, width, height);
  }

  /* Each line has the colour of the plane that it stands for. */
  cross(context, { left, top, width, height }) {
    const { across, down } = this.plane;
    const colour = (axis) => COLOURS[Object.keys(PLANES).find((name) => PLANES[name].along === axis)];
    const x = left + ((this.voxel[across] + 0.5) / this.scan.size[across]) * width;
    const y = top + ((this.voxel[down] + 0.5) / this.scan.size[down]) * height;
    const line = (style, ...points) => {
      context.strokeStyle = style;
      context.beginPath();
      for (const [fromX, fromY, toX, toY] of points) {
        context.moveTo(fromX, fromY);
        context.lineTo(toX, toY);
      }
      context.stroke();
    };
    context.globalAlpha = 0.75;
    line(colour(across), [x, top, x, Math.max(top, y - GAP)], [x, Math.min(top + height, y + GAP), x, top + height]);
    line(colour(down), [left, y, Math.max(left, x - GAP), y], [Math.min(left + width, x + GAP), y, left + width, y]);
    context.globalAlpha = 1;
  }

  /* A PNG of the plane as it is shown, as a data URL: 512 pixels along its longer side. */
  picture() {
    const frame = this.fit(512, 512);
    const canvas = document.createElement("canvas");
    canvas.width = Math.round(frame.width);
    canvas.height = Math.round(frame.height);
    const whole = { ...frame, left: 0, top: 0 };
    const context = canvas.getContext("2d");
    this.paint(context, whole);
    this.cross(context, whole);
    return canvas.toDataURL("image/png");
  }
}
