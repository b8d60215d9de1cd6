/* Opens scans: files chosen or dropped, folders, examples, another series or volume of the same files. Says what is
   under way, what went wrong, and what could be done about it. */

import { droppedFiles, upload } from "./upload.js";

export class Opening {
  /* trigger(event, data) asks Python: "upload" {batch}, "select" {example}, "input" {list, option}. */
  constructor(element, trigger) {
    this.element = element;
    this.trigger = trigger;
    this.find = (selector) => element.querySelector(selector);
    this.batch = 0;
    this.begun = new Promise((resolve) => (this.begin = resolve)); // files may be chosen before the session is there
    this.listen();
  }

  listen() {
    const { find, element } = this;
    const files = find(".files");
    for (const button of element.querySelectorAll(".open")) {
      button.addEventListener("click", () => {
        files.webkitdirectory = "folder" in button.dataset;
        files.click();
      });
    }
    const chosen = () => {
      if (files.files.length) this.upload([...files.files].map((file) => [file.webkitRelativePath || file.name, file]));
      files.value = "";
      files.webkitdirectory = false;
    };
    files.addEventListener("change", chosen);
    chosen(); // somebody may have been faster than this module
    for (const type of ["dragover", "drop", "dragleave"]) {
      document.addEventListener(type, (event) => {
        event.preventDefault(); // a browser would leave the page for a file dropped beside
        element.classList.toggle("dragged", type === "dragover");
        if (type === "drop") this.drop(event.dataTransfer);
      });
    }
    find(".cancel").addEventListener("click", () => this.sending?.abort());
    find(".problem .close").addEventListener("click", () => this.error(""));
  }

  /* What Python has to say. */
  receive(value) {
    this.session = value.session;
    this.limit = value.limit;
    this.begin();
    this.busy("");
    this.error(value.error, value.remedies);
    this.offerExamples(value.examples);
    if (value.scan) this.offerLists(value.scan.lists);
  }

  async drop(transfer) {
    if (!transfer.types.includes("Files")) return;
    try {
      this.upload(await droppedFiles(transfer));
    } catch (error) {
      this.error(`What was dropped could not be read (${error.message}). Zip it and open the zip.`);
    }
  }

  /* files: pairs of the path inside what was chosen, and the file. */
  async upload(files) {
    this.sending?.abort();
    const sending = (this.sending = new AbortController());
    const batch = ++this.batch;
    this.error("");
    try {
      this.busy("Sending", 0);
      await this.begun;
      const url = `med3dvlm/upload/${this.session}/${batch}`;
      await upload(files, url, this.limit, (part) => this.busy("Sending", part), sending.signal);
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
    box.append(...names.map((name, example) => button(name, () => this.ask("select", { example }))));
  }

  /* lists: what of the files is shown, and what else could be: {name, labels, chosen}. */
  offerLists(lists) {
    const labelled = lists.map(({ name, labels, chosen }, list) => {
      const select = menu(name, labels, chosen);
      select.addEventListener("change", () => this.ask("input", { list, option: select.selectedIndex }));
      const label = document.createElement("label");
      label.append(name, select);
      return label;
    });
    this.find(".lists").replaceChildren(...labelled);
  }

  /* text "": there is nothing to say. remedies: what could be done, to choose from. */
  error(text, remedies = []) {
    this.find(".problem").hidden = !text;
    this.find(".error").textContent = text;
    const choose = (option) => this.ask("input", { list: null, option });
    const select = menu("What to open", remedies, 0);
    const several = [select, button("Open", () => choose(select.selectedIndex))];
    const shown = remedies.length > 1 ? several : remedies.map((label) => button(label, () => choose(0)));
    this.find(".remedies").replaceChildren(...shown);
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
}

function button(text, click) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", click);
  return element;
}

function menu(name, labels, chosen) {
  const select = document.createElement("select");
  select.ariaLabel = name;
  select.append(...labels.map((label) => new Option(label)));
  select.selectedIndex = chosen;
  return select;
}
