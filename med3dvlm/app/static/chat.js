/* The conversation. `props.value` is a list of {role, text, state, notes, facts}; all of it is set as text. */

const EMPTY = "Ask about the scan, or take one of the templates below.";

class Message {
  constructor({ role }) {
    this.element = document.createElement("article");
    this.element.className = role;
    this.element.dataset.testid = role === "assistant" ? "bot" : "user";
    this.element.setAttribute("aria-label", { user: "Question", assistant: "Answer", note: "Note" }[role]);
    this.text = this.element.appendChild(document.createElement("p"));
    this.text.dir = "auto";
  }

  update(message) {
    this.text.textContent = message.text;
    this.element.className = message.role; // a place kept for an answer may become a note
    this.element.classList.toggle("streaming", message.state !== "done");
    if (message.role !== "assistant" || message.state !== "done") return;
    this.footer ??= this.element.appendChild(document.createElement("footer"));
    const facts = document.createElement("span");
    facts.textContent = message.facts;
    const lines = message.notes.map((note) => {
      const line = document.createElement("p");
      line.className = "note";
      line.textContent = note;
      return line;
    });
    this.footer.replaceChildren(...lines, facts, copyButton(message.text));
  }
}

function copyButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

class Conversation {
  constructor(log) {
    this.log = log;
    this.messages = [];
  }

  show(values) {
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
    if (values.length < this.messages.length || !this.messages.length) {
      this.messages = [];
      this.log.replaceChildren();
    }
    if (!values.length) {
      const hint = this.log.appendChild(document.createElement("p"));
      hint.className = "hint";
      hint.textContent = EMPTY;
    }
    values.forEach((value, index) => {
      if (index === this.messages.length) {
        this.messages.push(new Message(value));
        this.log.append(this.messages[index].element);
      }
      this.messages[index].update(value);
    });
    const last = values.at(-1);
    document.body.toggleAttribute("data-answering", Boolean(last) && last.state !== "done");
    if (atEnd || last?.state === "waiting") this.log.scrollTop = this.log.scrollHeight;
  }
}

/* Saves the conversation, with the planes as they are shown, as one file. */
async function save() {
  const viewer = window.med3dvlm;
  const answer = await fetch(`med3dvlm/export/${viewer.state.session}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(viewer.pictures()),
  });
  if (!answer.ok) return viewer.opening.error(await answer.text());
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = "med3dvlm-conversation.html";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

export function mount({ element, props, watch }) {
  const conversation = new Conversation(element.querySelector(".log"));
  watch("value", () => conversation.show(props.value ?? []));
  conversation.show(props.value ?? []);
  document.addEventListener("click", (event) => event.target.closest("#export") && save());
}
