"""A chat in the terminal."""

import argparse
import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from med3dvlm.data.files import write_bytes
from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.data.volume import reading_options
from med3dvlm.demo.output import CommandError, record_of, writing
from med3dvlm.demo.terminal import BOLD, DIM, Terminal, readable, sentence, short_name, typed_path
from med3dvlm.inference import BAD_INPUT, NOTICE, Answer, Med3DVLM

HELP = """/image PATH   look at another scan; the conversation starts over
/report       describe the scan
/reset        forget the turns so far (they are still saved)
/save FILE    write the conversation: .json, or text with any other ending
/help         this list
/quit         leave (or Ctrl-D); Ctrl-C stops an answer, and leaves where nothing is being answered
Everything else is a question."""
NO_SCAN = "No scan yet: /image PATH names one."


class Conversation:
    """Reads questions and commands until the end of input. Ctrl-C stops an answer; at the prompt it ends everything."""

    def __init__(self, model: Med3DVLM, args: argparse.Namespace, terminal: Terminal):
        self.args, self.terminal = args, terminal
        self.over = False
        self.image: str | None = args.image_path
        self.chat = model.chat(self.image, remember=args.remember, **reading_options(args))
        self.said: list[tuple[str | None, str, Answer]] = []  # image, question, answer; over all scans
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.look_at,
            "/report": self.report,
            "/reset": self.reset,
            "/save": self.save,
            "/help": self.help,
            "/quit": self.quit,
            "/exit": self.quit,
        }

    def run(self) -> list[Answer]:
        """Talk; returns the answers."""
        try:
            import readline  # noqa: F401  line editing and history of input()
        except ImportError:  # not on every system
            pass
        self.terminal.line(NOTICE, BOLD)
        self.describe_scan()
        while not self.over:
            try:
                line = input("> ").strip()
            except EOFError:
                self.terminal.line("")
                break
            if line:
                self.respond(line)
        return [answer for *_, answer in self.said]

    def respond(self, line: str) -> None:
        """One line: a command or a question. What is wrong with it is said, and the conversation goes on."""
        name, _, rest = line.partition(" ")
        try:
            if not line.startswith("/"):
                self.ask(readable(line), "vqa")
            elif name.lower() in self.commands:
                self.commands[name.lower()](rest.strip())
            else:
                similar = get_close_matches(name.lower(), self.commands, 1)
                meant = f"did you mean {similar[0]}? " if similar else ""
                self.terminal.line(f"{name} is no command; {meant}/help lists them")
        except KeyboardInterrupt:
            self.terminal.line("\nstopped")
        except (*BAD_INPUT, CommandError, OSError) as error:
            self.terminal.line(f"error: {sentence(error)}")

    def ask(self, question: str, kind: str) -> None:
        if self.chat.seen is None:
            self.terminal.line(NO_SCAN)
            return
        stream = self.chat.stream(question, kind, self.args.max_new_tokens, sampling=self.args.sampling)
        try:
            answer = self.terminal.pieces(stream)
        except KeyboardInterrupt:
            answer = stream.answer
        self.terminal.facts(answer)
        self.said.append((self.image, question, answer))

    def look_at(self, name: str) -> None:
        if not name:
            self.terminal.line("error: /image needs the path of a scan")
            return
        path = typed_path(name)
        self.chat.set_image(path, **reading_options(self.args))
        self.image = path
        self.describe_scan()

    def describe_scan(self) -> None:
        if self.chat.seen is None:
            self.terminal.line(f"{NO_SCAN} /help lists the commands.", DIM)
            return
        volume = self.chat.seen.volume
        size, spacing = "x".join(map(str, volume.array.shape)), " x ".join(f"{mm:.2f}" for mm in volume.spacing)
        self.terminal.line(f"{short_name(self.image)}: {size} voxels of {spacing} mm. /help lists the commands.", DIM)
        for warning in self.chat.seen.warnings:
            self.terminal.line(f"warning: {warning}")

    def report(self, _: str) -> None:
        self.ask(CAPTION_PROMPTS[0], "caption")

    def reset(self, _: str) -> None:
        self.chat.reset()
        self.terminal.line("The conversation starts over.", DIM)

    def help(self, _: str) -> None:
        self.terminal.line(HELP)

    def quit(self, _: str) -> None:
        self.over = True

    def save(self, name: str) -> None:
        """Write what was said, whole or not at all; never over a file that is there."""
        path = Path(typed_path(name))
        if not name or path.exists():
            self.terminal.line(f"error: {path} exists, name another file" if name else "error: /save needs a file name")
            return
        records = [record_of(*turn) for turn in self.said]
        text = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
        if path.suffix.lower() != ".json":
            turns = (f"{image}\n> {question}\n{answer.text}\n" for image, question, answer in self.said)
            text = f"{NOTICE}\n\n" + "\n".join(turns)
        with writing(path):
            write_bytes(path, text.encode("utf-8", "replace"))
        self.terminal.line(f"{len(records)} turns written to {path}", DIM)
