/* The viewer: three linked planes and a rendered volume of the opened scan, with one crosshair and one grey scale.

   Python gives `props.value` = {session, limit, examples, number, scan, error, remedies} (see `med3dvlm.app.page`);
   what the viewer asks Python for, `Opening` does. Everything shown as text is set as text, never as HTML. */

import { Opening } from "./opening.js";
import { PlaneView } from "./planes.js";
import { Rendering } from "./rendering.js";
import { PLANES, fetchScan } from "./volume.js";
import { presetsOf } from "./windows.js";

const HELP = [
  "Mouse: click or drag for the crosshair, wheel through the slices, right button for window and level; Ctrl and wheel " +
    "to zoom, Shift and drag to move the zoomed plane, double click to enlarge it",
  "Keys: arrows through the slices of the plane used last (with Shift by 10), W the next window, + and - to zoom, 0 to " +
    "show all of it, Escape for all views",
];

export class Viewer {
  constructor(element, trigger) {
    this.element = element;
    this.find = (selector) => element.querySelector(selector);
    this.opening = new Opening(element, trigger);
    const handlers = {
      move: (voxel) => this.move(voxel),
      step: (plane, slices) => this.step(plane, slices),
      window: (moved) => this.dragWindow(moved),
      enlarge: (plane) => this.toggle(plane),
      active: (plane) => this.activate(plane),
    };
    this.planes = Object.keys(PLANES).map((name) => new PlaneView(this.find(`[data-view=${name}]`), name, handlers));
    this.rendering = new Rendering(this.find("[data-view=volume]"));
    this.listen();
    this.activate("axial");
    this.focus(matchMedia("(max-width: 900px)").matches ? "axial" : "");
  }

  listen() {
    const { find, element } = this;
    find(".source").addEventListener("change", (event) => this.show(event.target.value));
    find(".preset").addEventListener("change", (event) => this.preset(event.target.value));
    for (const name of [".level", ".width"]) find(name).addEventListener("change", () => this.typedWindow());
    for (const tab of element.querySelectorAll(".tabs button")) {
      tab.addEventListener("click", () => this.focus(tab.dataset.focus));
    }
    find("[data-view=volume] .enlarge").addEventListener("click", () => this.toggle("volume"));
    document.addEventListener("keydown", (event) => this.key(event));
  }

  /* ---------------------------------------------------------------- the scan */

  /* What Python has to say. */
  receive(value) {
    if (!value) return;
    this.state = value;
    this.opening.receive(value);
    if (!value.scan || value.scan.number === this.number) return;
    this.number = value.scan.number;
    this.scans = {};
    this.tell(value.scan);
    this.find(".source input").checked = true;
    for (const plane of this.planes) plane.zoom.reset();
    this.show("scan");
  }

  tell(scan) {
    this.find(".facts .name").textContent = scan.name;
    this.find(".facts .about").textContent = scan.about;
    const notes = this.find(".notes");
    notes.hidden = false;
    notes.open = false;
    notes.classList.toggle("warned", scan.warnings.length > 0);
    const count = scan.warnings.length;
    notes.querySelector("summary").textContent = count ? `${count} warning${count > 1 ? "s" : ""}` : "About";
    const items = [...scan.warnings, `Preprocessing: ${scan.preprocessing}`, ...HELP].map((text) => {
      const item = document.createElement("li");
      item.textContent = text;
      return item;
    });
    notes.querySelector("ul").replaceChildren(...items);
  }

  /* which: "scan", or "model" for the tensor that the model gets. */
  async show(which) {
    const { scan } = this.state;
    try {
      this.opening.busy("Fetching the scan");
      this.scans[which] ??= await fetchScan(`med3dvlm/volume/${this.state.session}/${which}?${scan.number}`);
    } catch (error) {
      return this.opening.error(error.message);
    } finally {
      this.opening.busy("");
    }
    if (this.number !== scan.number) return; // another scan was opened meanwhile
    this.which = which;
    this.scan = this.scans[which];
    this.element.classList.add("shown");
    for (const part of [".source", ".window", ".tabs"]) this.find(part).hidden = false;
    for (const plane of this.planes) plane.show(this.scan, scan.oriented);
    this.offerPresets(which === "scan" && scan.ct);
    this.scan.voxel ??= this.scan.middle();
    this.move(this.scan.voxel);
    this.drawVolume();
  }

  /* ---------------------------------------------------------------- crosshair and grey scale */

  move(voxel) {
    this.scan.voxel = voxel;
    for (const plane of this.planes) plane.update(voxel, this.table);
    this.rendering.move(voxel);
    const value = this.scan.value(voxel);
    const unit = this.which === "scan" ? this.state.scan.units : "";
    const digits = this.presets["Full range"][1] > 20 ? 0 : 3;
    const place = voxel.map((index) => index + 1).join(", ");
    this.find(".readout").textContent = `Crosshair ${place} · value ${value.toFixed(digits)} ${unit}`;
  }

  step(plane, slices) {
    if (!this.scan) return;
    const { along } = PLANES[plane];
    const voxel = [...this.scan.voxel];
    voxel[along] = Math.min(this.scan.size[along] - 1, Math.max(0, voxel[along] + slices));
    this.move(voxel);
  }

  offerPresets(hounsfield) {
    const own = this.which === "model" ? { "As it is": [0.5, 1] } : {};
    this.presets = { ...own, ...presetsOf(this.scan, hounsfield) };
    const select = this.find(".preset");
    select.replaceChildren(...[...Object.keys(this.presets), "Own"].map((name) => new Option(name, name)));
    select.lastChild.hidden = true;
    this.preset(Object.keys(this.presets)[0]);
  }

  preset(name) {
    if (!this.presets[name]) return;
    this.find(".preset").value = name;
    this.window(...this.presets[name]);
  }

  typedWindow() {
    const [level, width] = [".level", ".width"].map((name) => this.find(name).valueAsNumber);
    if (!Number.isFinite(level) || !(width > 0)) return this.window(this.level, this.width);
    this.find(".preset").value = "Own";
    this.window(level, width);
  }

  dragWindow([dx, dy]) {
    const step = this.presets["Full range"][1] / 1000;
    this.find(".preset").value = "Own";
    this.window(this.level - dy * step, Math.max(step, this.width + dx * step));
  }

  window(level, width) {
    this.level = level;
    this.width = width;
    const digits = this.presets["Full range"][1] > 20 ? 0 : 3;
    this.find(".level").value = level.toFixed(digits);
    this.find(".width").value = width.toFixed(digits);
    this.table = this.scan.greyTable(level, width);
    if (this.scan.voxel) this.move(this.scan.voxel);
    this.rendering.window(level - width / 2, level + width / 2);
  }

  /* ---------------------------------------------------------------- layout and keyboard */

  /* view: the one that fills the viewer, or "" for all. */
  focus(view) {
    this.element.dataset.focus = view;
    if (view in PLANES) this.activate(view);
    for (const tab of this.element.querySelectorAll(".tabs button")) {
      tab.setAttribute("aria-pressed", tab.dataset.focus === view);
    }
    this.drawVolume();
  }

  /* The plane that the keys act on. */
  activate(plane) {
    this.element.dataset.active = plane;
  }

  toggle(view) {
    this.focus(this.element.dataset.focus === view ? "" : view);
  }

  drawVolume() {
    if (this.scan) this.rendering.show(this.scan);
  }

  key(event) {
    const typing = event.target.matches("textarea, select, input:not([type=range]):not([type=radio]), [contenteditable]");
    if (!this.scan || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const { active } = this.element.dataset;
    const plane = this.planes.find(({ name }) => name === active);
    const slices = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    const zoom = { "+": 1.25, "=": 1.25, "-": 0.8 }[event.key];
    if (slices && !event.target.matches("input, [role=slider], summary")) {
      event.preventDefault();
      this.step(active, slices * (event.shiftKey ? 10 : 1));
    } else if (event.key.toLowerCase() === "w") {
      const names = Object.keys(this.presets);
      const next = names.indexOf(this.find(".preset").value) + (event.shiftKey ? names.length - 1 : 1);
      this.preset(names[next % names.length]);
    } else if (zoom) {
      plane.zoomBy(zoom);
    } else if (event.key === "0") {
      for (const each of this.planes) each.showAll();
    } else if (event.key === "Escape") {
      this.find(".notes").open = false;
      this.opening.error("");
      this.focus("");
    }
  }

  /* For the export: the planes as they are shown now. */
  pictures() {
    if (!this.scan) return [];
    return this.planes.map((plane) => ({
      title: `${plane.title.textContent}, ${plane.output.textContent}`,
      data: plane.picture(),
    }));
  }
}

export function mount({ element, props, trigger, watch }) {
  const viewer = new Viewer(element.querySelector(".viewer"), trigger);
  window.med3dvlm = viewer; // the conversation asks it for pictures
  watch("value", () => viewer.receive(props.value));
  viewer.receive(props.value);
}
