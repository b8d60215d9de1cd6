/* One plane of the scan on a canvas: spacing-true, with crosshair, orientation letters, a slider and zoom. */

import { listen } from "./gestures.js";
import { PLANES } from "./volume.js";
import { Zoom } from "./zoom.js";

const COLOURS = { axial: "#ff6b5e", coronal: "#52c77a", sagittal: "#f2c14e" };
const GAP = 9; // pixels left free around the crosshair's centre, so that it hides nothing
const LETTER = 24; // pixels that an orientation letter needs beside the plane
const EXPORTED = 512; // pixels along the longer side

const MARKUP = (name) => `
  <header>
    <i class="swatch" style="background:${COLOURS[name]}"></i><h2></h2><output></output>
    <button type="button" class="zoom quiet" title="Show all of the plane (key 0)" hidden></button>
    <button type="button" class="enlarge quiet" title="Enlarge (double click)"></button>
  </header>
  <div class="stage">
    <canvas tabindex="0" role="img"></canvas>
    ${["left", "right", "top", "bottom"].map((side) => `<b class="letter ${side}"></b>`).join("")}
  </div>
  <input type="range" min="1" max="1" value="1" disabled>`;

export class PlaneView {
  /* handlers: move(voxel) for a new crosshair, step(plane, slices), window([dx, dy]) for a drag of the grey scale,
     enlarge(plane), active(plane). */
  constructor(section, name, handlers) {
    this.name = name;
    this.plane = PLANES[name];
    this.handlers = handlers;
    this.zoom = new Zoom();
    section.innerHTML = MARKUP(name);
    const find = (selector) => section.querySelector(selector);
    this.title = find("h2");
    this.output = find("output");
    this.stage = find(".stage");
    this.canvas = find("canvas");
    this.slider = find("input");
    this.enlarge = find(".enlarge");
    this.zoomed = find(".zoom");
    this.letters = [...section.querySelectorAll(".letter")];
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  listen() {
    const { handlers, name } = this;
    this.slider.addEventListener("input", () => {
      handlers.active(name);
      this.moveTo({ [this.plane.along]: Number(this.slider.value) - 1 });
    });
    this.enlarge.addEventListener("click", () => handlers.enlarge(name));
    this.zoomed.addEventListener("click", () => this.showAll());
    listen(this.canvas, {
      active: () => handlers.active(name),
      step: (slices) => handlers.step(name, slices),
      enlarge: () => handlers.enlarge(name),
      window: handlers.window,
      point: (place) => this.point(place),
      pan: (moved) => this.pan(moved),
      zoom: (factor, place) => this.zoomBy(factor, place),
    });
  }

  /* changed: the new index along some axes. */
  moveTo(changed) {
    this.handlers.move(Object.assign([...this.voxel], changed));
  }

  /* Moves the crosshair to a place on the canvas. */
  point([x, y]) {
    const { left, top, width, height } = this.frame;
    const { across, down } = this.plane;
    const index = (fraction, axis) => {
      const count = this.scan.size[axis];
      return Math.min(count - 1, Math.max(0, Math.floor(fraction * count)));
    };
    this.moveTo({ [across]: index((x - left) / width, across), [down]: index((y - top) / height, down) });
  }

  /* place: what stays where it is; the middle of the stage where it is not given. */
  zoomBy(factor, place = [this.stage.clientWidth / 2, this.stage.clientHeight / 2]) {
    this.zoom.by(factor, place, this.frame);
    this.draw();
  }

  pan(moved) {
    this.zoom.pan(moved, this.frame);
    this.draw();
  }

  showAll() {
    this.zoom.reset();
    this.draw();
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

  /* [width, height] of the plane that fills a stage: as large as fits, true to the spacing. */
  fit(stageWidth, stageHeight) {
    const { across, down } = this.plane;
    const wide = this.scan.size[across] * this.scan.spacing[across];
    const high = this.scan.size[down] * this.scan.spacing[down];
    const scale = Math.min(stageWidth / wide, stageHeight / high);
    return [wide * scale, high * scale];
  }

  draw() {
    const { clientWidth, clientHeight } = this.stage;
    if (!this.image || !clientWidth || !clientHeight) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    this.frame = this.zoom.frame(this.fit(clientWidth, clientHeight), [clientWidth, clientHeight]);
    this.paint(context, this.frame);
    this.cross(context, this.frame);
    this.zoomed.hidden = this.zoom.factor === 1;
    this.zoomed.textContent = `${Math.round(this.zoom.factor * 100)} %`;
    this.letter(clientWidth, clientHeight);
  }

  /* The letters stand beside what is visible of the plane, or at its edges where there is no room beside it. */
  letter(stageWidth, stageHeight) {
    const { left, top, width, height } = this.frame;
    const beside = (room) => `${room < LETTER ? Math.max(0, room) + 4 : room - LETTER}px`;
    const [l, r, t, b] = this.letters.map((element) => element.style);
    l.left = beside(left);
    r.right = beside(stageWidth - left - width);
    t.top = beside(top);
    b.bottom = beside(stageHeight - top - height);
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

  /* A PNG of the whole plane with its crosshair and its letters around it, as a data URL. */
  picture() {
    const [width, height] = this.fit(EXPORTED, EXPORTED);
    const canvas = document.createElement("canvas");
    canvas.width = Math.round(width) + 2 * LETTER;
    canvas.height = Math.round(height) + 2 * LETTER;
    const context = canvas.getContext("2d"), whole = { left: LETTER, top: LETTER, width, height };
    context.fillRect(0, 0, canvas.width, canvas.height);
    this.paint(context, whole);
    this.cross(context, whole);
    const right = canvas.width - LETTER / 2, bottom = canvas.height - LETTER / 2;
    const middle = [canvas.width / 2, canvas.height / 2];
    const places = [[LETTER / 2, middle[1]], [right, middle[1]], [middle[0], LETTER / 2], [middle[0], bottom]];
    Object.assign(context, { fillStyle: "#fff", font: "600 15px sans-serif", textAlign: "center", textBaseline: "middle" });
    this.letters.forEach((element, side) => context.fillText(element.textContent, ...places[side]));
    return canvas.toDataURL("image/png");
  }
}
