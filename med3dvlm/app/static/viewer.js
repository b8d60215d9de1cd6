/* The viewer: opens scans, shows them in three linked planes and as a rendered volume, keeps crosshair and window.

   Python gives `props.value` = {session, limit, examples, number, scan, error} (see `med3dvlm.app.page`); the viewer
   answers with the events "upload" {batch}, "select" {example} and "input" {series}. Everything shown as text is set
   as text, never as HTML. */

import { PlaneView } from "./planes.js";
import { Rendering } from "./rendering.js";
import { droppedFiles, upload } from "./upload.js";
import { PLANES, fetchScan } from "./volume.js";
import { presetsOf } from "./windows.js";

const KEYS =
  "Keys: arrows move through the slices of the plane used last (with Shift by 10), W changes the window, Escape shows " +
  "all views. Right mouse button: drag for window and level.";

export class Viewer {
  constructor(element, trigger) {
    this.element = element;
    this.trigger = trigger;
    this.find = (selector) => element.querySelector(selector);
    this.active = "axial";
    this.batch = 0;
    this.begun = new Promise((resolve) => (this.begin = resolve)); // files may be chosen before the session is there
    const handlers = {
      move: (voxel) => this.move(voxel),
      step: (plane, slices) => this.step(plane, slices),
      window: (dx, dy) => this.dragWindow(dx, dy),
      enlarge: (plane) => this.toggle(plane),
      active: (plane) => (this.active = plane),
    };
    this.planes = Object.keys(PLANES).map((name) => new PlaneView(this.find(`[data-view=${name}]`), name, handlers));
    this.rendering = new Rendering(this.find("[data-view=volume]"));
    this.listen();
    this.focus(matchMedia("(max-width: 900px)").matches ? "axial" : "");
  }

  listen() {
    const { find, element } = this;
    const files = find(".files");
    for (const button of element.querySelectorAll(".open")) button.addEventListener("click", () => files.click());
    const chosen = () => {
      if (files.files.length) this.upload([...files.files]);
      files.value = "";
    };
    files.addEventListener("change", chosen);
    chosen(); // somebody may have been faster than this module
    for (const type of ["dragover", "drop", "dragleave"]) {
      document.addEventListener(type, (event) => {
        event.preventDefault(); // a browser would leave the page for a file dropped beside
        element.classList.toggle("dragged", type === "dragover");
        if (type === "drop") droppedFiles(event.dataTransfer).then((dropped) => dropped.length && this.upload(dropped));
      });
    }
    find(".cancel").addEventListener("click", () => this.sending?.abort());
    find(".series select").addEventListener("change", (event) => this.ask("input", { series: event.target.value }));
    find(".source").addEventListener("change", (event) => this.show(event.target.value));
    find(".preset").addEventListener("change", (event) => this.preset(event.target.value));
    for (const name of [".level", ".width"]) find(name).addEventListener("change", () => this.typedWindow());
    for (const tab of element.querySelectorAll(".tabs button")) {
      tab.addEventListener("click", () => this.focus(tab.dataset.focus));
    }
    find("[data-view=volume] .enlarge").addEventListener("click", () => this.toggle("volume"));
    document.addEventListener("keydown", (event) => this.key(event));
  }

  /* ---------------------------------------------------------------- scans in and out */

  /* What Python has to say. */
  receive(value) {
    if (!value) return;
    this.state = value;
    this.begin();
    this.busy("");
    this.error(value.error);
    this.offerExamples(value.examples);
    if (!value.scan || value.scan.number === this.number) return;
    this.number = value.scan.number;
    this.scans = {};
    this.offerSeries(value.scan);
    this.tell(value.scan);
    this.find(".source input").checked = true;
    this.show("scan");
  }

  async upload(files) {
    this.sending?.abort();
    const sending = (this.sending = new AbortController());
    const batch = ++this.batch;
    this.error("");
    try {
      this.busy("Sending", 0);
      await this.begun;
      const url = `med3dvlm/upload/${this.state.session}/${batch}`;
      await upload(files, url, this.state.limit, (part) => this.busy("Sending", part), sending.signal);
      this.ask("upload", { batch });
    } catch (error) {
      if (this.sending !== sending) return; // another upload has taken over
      this.busy("");
      this.error(error.name === "AbortError" ? "" : error.message);
    }
  }

  /* Asks Python to open something; it answers through `receive`. */
  ask(event, data) {
    this.error("");
    this.busy("Reading the scan");
    this.trigger(event, data);
  }

  offerExamples(names) {
    const box = this.find(".examples");
    if (!names.length || !box.hidden) return;
    box.hidden = false;
    names.forEach((name, example) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.addEventListener("click", () => this.ask("select", { example }));
      box.append(button);
    });
  }

  offerSeries(scan) {
    const select = this.find(".series select");
    this.find(".series").hidden = scan.series.length < 2;
    select.replaceChildren(...scan.series.map(({ value, label }) => new Option(label, value, false, value === scan.chosen)));
  }

  tell(scan) {
    this.find(".facts .name").textContent = scan.name;
    this.find(".facts .about").textContent = scan.about;
    const notes = this.find(".notes");
    notes.hidden = false;
    notes.classList.toggle("warned", scan.warnings.length > 0);
    const count = scan.warnings.length;
    notes.querySelector("summary").textContent = count ? `${count} warning${count > 1 ? "s" : ""}` : "About";
    const items = [...scan.warnings, `Preprocessing: ${scan.preprocessing}`, KEYS].map((text) => {
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
      this.busy("Fetching the scan");
      this.scans[which] ??= await fetchScan(`med3dvlm/volume/${this.state.session}/${which}?${scan.number}`);
    } catch (error) {
      return this.error(error.message);
    } finally {
      this.busy("");
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

  dragWindow(dx, dy) {
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
    this.rendering.window(level, width);
  }

  /* ---------------------------------------------------------------- layout and keyboard */

  /* view: the one that fills the viewer, or "" for all. */
  focus(view) {
    this.element.dataset.focus = view;
    if (view in PLANES) this.active = view;
    for (const tab of this.element.querySelectorAll(".tabs button")) {
      tab.setAttribute("aria-pressed", tab.dataset.focus === view);
    }
    this.drawVolume();
  }

  toggle(view) {
    this.focus(this.element.dataset.focus === view ? "" : view);
  }

  drawVolume() {
    if (this.scan) this.rendering.show(this.scan, this.scan.voxel, this.level, this.width);
  }

  key(event) {
    const typing = event.target.matches("textarea, select, input:not([type=range]):not([type=radio]), [contenteditable]");
    if (!this.scan || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const slices = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (slices && !event.target.matches("input, [role=slider], summary")) {
      event.preventDefault();
      this.step(this.active, slices * (event.shiftKey ? 10 : 1));
    } else if (event.key.toLowerCase() === "w") {
      const names = Object.keys(this.presets);
      const next = names.indexOf(this.find(".preset").value) + (event.shiftKey ? names.length - 1 : 1);
      this.preset(names[next % names.length]);
    } else if (event.key === "Escape") {
      this.focus("");
    }
  }

  /* ---------------------------------------------------------------- messages */

  error(text) {
    this.find(".error").hidden = !text;
    this.find(".error").textContent = text || "";
  }

  /* text "": nothing is under way. part: how much of it is done, where that is known. */
  busy(text, part) {
    const box = this.find(".busy");
    box.hidden = !text;
    box.querySelector("p").textContent = text;
    box.querySelector(".cancel").hidden = part === undefined;
    const bar = box.querySelector("progress");
    if (part === undefined) bar.removeAttribute("value");
    else bar.value = part;
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
