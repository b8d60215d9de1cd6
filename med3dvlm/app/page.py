"""What is on the page, and what happens when somebody uses it.

The viewer and the conversation are drawn by our own JavaScript (`static/`) inside two `gr.HTML` components; Python
gives them values, they give back events. Texts travel as data and are set as text, so neither a file name nor a
question nor an answer is ever rendered as HTML or Markdown.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import gradio as gr

from med3dvlm.app.opening import Example, open_scan, remedies
from med3dvlm.app.sessions import Choices, Session, Sessions
from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.inference import NOTICE, Answer, Med3DVLM, QuestionError, Sampling, VolumeError

STATIC = Path(__file__).parent / "static"
TEMPLATES = {
    "Report": CAPTION_PROMPTS[0],
    "Plane": "Which plane is shown?",
    "Phase": "Which contrast phase is shown?",
    "Organ": "Which organ is abnormal?",
    "Abnormality": "What kind of lesion is present?",
    "Location": "Where is the lesion?",
}
LONGEST = "Longest answer, in tokens"
HOW = "A real model: sh scripts/quickstart.sh, or --model_name_or_path."
FAILED = "That went wrong on our side; the terminal in which the app runs says what. Try again, or another scan."
UPDATES_PER_SECOND = 20
HEADER = """<h1>Med3DVLM</h1><p class="model">{{value.model}}</p><p class="random">{{value.random}}</p>
<p class="research">{{value.notice}}</p>"""


def _mount(script: str) -> str:
    """JavaScript that starts one of our modules in the component's element."""
    url = f"new URL('med3dvlm/static/{script}', document.baseURI)"
    return f"import({url}).then((module) => module.mount({{ element, props, trigger, watch }}));"


class Page:
    """The page and its events.

    Args:
        model: what answers.
        sessions: where the events find the session of the tab that they come from.
        name: of the model, as it is shown.
        random: a sentence, where the model has random weights; it is put to every answer. "" otherwise.
        examples: scans that are offered by name.
        limit: bytes that an upload may have.
    """

    def __init__(
        self, model: Med3DVLM, sessions: Sessions, name: str, random: str, examples: Sequence[Example], limit: int
    ):
        self.model, self.sessions, self.name, self.random = model, sessions, name, random
        self.examples, self.limit = examples, limit

    # ---------------------------------------------------------------- what is on it

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="Med3DVLM", fill_width=True) as page:
            model, random = (self.name, "") if not self.random else ("", f"{self.random} {HOW}")
            header = {"model": model, "random": random, "notice": NOTICE}
            gr.HTML(header, html_template=HEADER, elem_id="header", js_on_load=None, apply_default_css=False)
            with gr.Row(elem_id="main"):
                self.viewer = gr.HTML(
                    None,
                    html_template=(STATIC / "viewer.html").read_text(encoding="utf-8"),
                    js_on_load=_mount("viewer.js"),
                    elem_id="viewer",
                    apply_default_css=False,
                )
                with gr.Column(elem_id="side"):
                    self._conversation()
            self._connect(page)
        return page

    def _conversation(self) -> None:
        self.chat = gr.HTML(
            [],
            html_template='<div class="log" role="log" aria-label="Conversation" tabindex="0"></div>',
            js_on_load=_mount("chat.js"),
            elem_id="chat",
            apply_default_css=False,
        )
        with gr.Row(elem_id="templates"):
            self.templates = [gr.Button(label, size="sm") for label in TEMPLATES]
        self.question = gr.Textbox(
            label="Question",
            show_label=False,
            placeholder="Ask about the scan",
            lines=1,
            max_lines=4,
            elem_id="question",
        )
        with gr.Row(elem_id="actions"):
            self.ask = gr.Button("Ask", variant="primary", size="sm", elem_id="ask")
            self.stop = gr.Button("Stop", variant="stop", size="sm", elem_id="stop")
            self.reset = gr.Button("New conversation", size="sm", elem_id="reset")
            gr.Button("Export", size="sm", elem_id="export")  # static/chat.js saves the file
        context = self.model.context
        with gr.Accordion("Sampling", open=False, elem_id="sampling"):
            self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the likeliest word)")
            self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            self.tokens = gr.Slider(1, max(1, context // 2), max(1, min(256, context // 4)), step=1, label=LONGEST)
            self.seed = gr.Number(0, label="Seed", precision=0)

    # ---------------------------------------------------------------- who answers to what

    def _connect(self, page: gr.Blocks) -> None:
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        model = {"concurrency_id": "model", "concurrency_limit": 1}  # one answer at a time, the others wait
        page.load(self.begin, None, self.viewer, queue=False, **quiet)
        page.unload(self.end)
        for event, opens in (
            (self.viewer.upload, self.open_upload),
            (self.viewer.select, self.open_example),
            (self.viewer.input, self.open_choice),
        ):
            # "multiple": what is chosen while another scan is read comes next, instead of being dropped
            opening = event(
                opens, None, [self.viewer, self.chat], concurrency_limit=2, trigger_mode="multiple", **quiet
            )
            opening.failure(self.opening_failed, None, self.viewer, queue=False, **quiet)
        for button, text in zip(self.templates, TEMPLATES.values(), strict=True):
            button.click(None, None, self.question, js=f"() => {text!r}", **quiet)
        settings = [self.temperature, self.top_p, self.tokens, self.seed]
        asked = [self.ask.click, self.question.submit]
        taken = gr.on(asked, self.take, self.question, [self.question, self.chat], queue=False, **quiet)
        answered = taken.success(self.answer, settings, self.chat, **model, **quiet)
        answered.failure(self.answering_failed, None, self.chat, queue=False, **quiet)
        self.stop.click(self.halt, queue=False, **quiet)
        self.reset.click(self.forget, None, self.chat, queue=False, **quiet)

    def _session(self, request: gr.Request) -> Session:
        return self.sessions.of(request.session_hash)

    def begin(self, request: gr.Request) -> dict:
        return self._state(self._session(request))

    def end(self, request: gr.Request) -> None:
        self.sessions.end(request.session_hash)

    def _state(self, session: Session, error: str = "") -> dict:
        """What the viewer is told."""
        session.number += 1
        return {
            "session": session.token,
            "limit": self.limit,
            "examples": [example.name for example in self.examples],
            "scan": session.scan,
            "error": error,
            "remedies": session.refused.labels if session.refused else [],
            "number": session.number,
        }

    # ---------------------------------------------------------------- scans

    def open_upload(self, event: gr.EventData, request: gr.Request):
        session = self._session(request)
        return self._open(session, session.batch_folder(int(event.batch)))

    def open_example(self, event: gr.EventData, request: gr.Request):
        return self._open(self._session(request), self.examples[int(event.example)].path)

    def open_choice(self, event: gr.EventData, request: gr.Request):
        """Another series or volume of the files that are open, or a way to open those that were refused."""
        session = self._session(request)
        choices = session.refused if event.list is None else session.lists[int(event.list)]
        if choices is None:  # meanwhile something else was opened
            return self._state(session), session.shown()
        return self._open(session, choices.source, replace(choices, chosen=int(event.option)))

    def opening_failed(self, request: gr.Request) -> dict:
        """After an error that nobody has foreseen; Gradio prints it in the terminal."""
        return self._state(self._session(request), FAILED)

    def _open(self, session: Session, source: Path, choices: Choices | None = None):
        with session.opening:
            session.refused, text = None, ""
            uploaded = source.parent == session.uploads
            if uploaded:
                session.batch = int(source.name)
            try:
                open_scan(session, source, choices)
            except VolumeError as error:  # without the folders that lead to the files
                name = "the upload" if uploaded else source.name
                text = error.problem.replace(f"{source}/", "").replace(str(source), name)
                session.refused = remedies(error, source, choices)
            except QuestionError as error:
                text = str(error)
            finally:
                session.tidy()
        return self._state(session, text), session.shown()

    # ---------------------------------------------------------------- questions

    def take(self, question: str, request: gr.Request) -> tuple[str, list[dict]]:
        """A question was asked: show it at once, with a place for its answer. Returns the text box and the messages."""
        session = self._session(request)
        if session.answering:
            return question, session.shown(_note("One answer at a time: wait for it, or stop it."))
        if session.scan is None:
            return question, session.shown(_note("Open a scan first, then ask about it."))
        if not question.strip():
            return question, session.shown(_note("The question is empty: type one, or take a template."))
        session.stopped = False
        session.messages += [_message("user", question.strip()), _message("assistant", state="waiting")]
        return "", session.shown()

    def answer(self, temperature: float, top_p: float, tokens: float, seed: float, request: gr.Request) -> Iterator:
        """Answer the question that was taken, word by word."""
        session = self._session(request)
        messages = session.messages
        if not session.answering or session.stream is not None:
            yield gr.skip()  # nothing was taken; without it Gradio would empty the conversation
            return
        question, reply = messages[-2]["text"], messages[-1]
        kind = "caption" if question in CAPTION_PROMPTS else "vqa"
        try:
            if None in (temperature, top_p, tokens):  # emptied by hand
                raise ValueError('A field under "Sampling" is empty: fill it in.')
            sampling = Sampling(temperature, top_p, int(seed or 0))
            stream = session.chat.stream(question, kind, int(tokens), sampling=sampling)
        except ValueError as error:  # a question that doesn't fit, a seed beyond 64 bits
            reply.update(_note(str(error).replace("max_new_tokens", f'"{LONGEST}" under "Sampling"')))
            yield session.shown()
            return
        session.stream = stream
        if session.stopped:  # while it waited for its turn
            stream.stop()
        try:
            yield from self._stream(session, messages, reply)
        finally:  # also when the tab is closed
            stream.stop()
            session.stream = None
        reply.update(self._facts(stream.answer, sampling, session.stopped), state="done")
        yield session.shown()

    def _stream(self, session: Session, messages: list[dict], reply: dict) -> Iterator[list[dict]]:
        """Let the answer grow. Ends early when another scan has been opened meanwhile."""
        reply["state"], shown = "streaming", 0.0
        for piece in session.stream:
            reply["text"] += piece
            if session.messages is not messages:
                return
            if time.monotonic() - shown > 1 / UPDATES_PER_SECOND:
                shown = time.monotonic()
                yield session.shown()

    def _facts(self, answer: Answer, sampling: Sampling, stopped: bool) -> dict:
        """What stands below an answer."""
        notes = [self.random] if self.random else []
        if not answer.finished:
            notes.append("Stopped." if stopped else "Cut off: the largest number of tokens was reached.")
        how = "greedy"
        if sampling.temperature > 0:
            how = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, seed {sampling.seed}"
        warnings = {0: "", 1: " · 1 warning about the scan"}.get(
            len(answer.warnings), f" · {len(answer.warnings)} warnings about the scan"
        )
        seconds = f"{answer.seconds:.1f}" if answer.seconds >= 1 else f"{answer.seconds:.2f}"
        facts = f"Research only, not for diagnosis · {answer.tokens} tokens in {seconds} s · {how}{warnings}"
        return {"text": answer.text, "notes": notes, "facts": facts}

    def answering_failed(self, request: gr.Request) -> list[dict]:
        """As `opening_failed`. What was said until then gives way to the message."""
        session = self._session(request)
        if session.answering:
            session.messages[-1].update(_note(FAILED))
        return session.shown()

    def halt(self, request: gr.Request) -> None:
        self._session(request).stop()

    def forget(self, request: gr.Request) -> list[dict]:
        """Start the conversation over; the scan stays."""
        session = self._session(request)
        session.stop()
        session.messages = []
        session.chat.reset()
        return session.shown()


def _message(role: str, text: str = "", state: str = "done") -> dict:
    return {"role": role, "text": text, "state": state, "notes": [], "facts": ""}


def _note(text: str) -> dict:
    """What the app itself has to say."""
    return _message("note", text)
