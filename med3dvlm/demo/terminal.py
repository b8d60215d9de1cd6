"""What is printed, and where: answers to standard output, the rest to standard error, colours on a terminal only."""

import os
import re
import shlex
import sys
from pathlib import Path

from med3dvlm.demo.output import json_line
from med3dvlm.inference import Answer, AnswerStream

RESEARCH_ONLY = "For research only."
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tabs and line feeds, and what is no text
DIM, BOLD, PLAIN = "\033[2m", "\033[1m", "\033[0m"


class Terminal:
    """Prints for a person, or as JSON for a program."""

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self.colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def styled(self, text: str, style: str) -> str:
        return f"{style}{text}{PLAIN}" if self.colours else text

    def say(self, text: str) -> None:
        """A line that is no answer."""
        print(printable(text), file=sys.stderr, flush=True)

    def line(self, text: str, style: str = "") -> None:
        print(self.styled(printable(text), style) if style else printable(text), flush=True)

    def pieces(self, stream: AnswerStream) -> Answer:
        """Print an answer while it is generated. An interrupt stops it and goes on to the caller."""
        try:
            for piece in stream:
                print(printable(piece), end="", flush=True)
        finally:
            stream.stop()
            print(flush=True)
        return stream.answer

    def facts(self, answer: Answer) -> None:
        """What belongs to an answer: probabilities, numbers, and what it must not be used for."""
        for choice, probability in (answer.probabilities or {}).items():
            self.line(f"  {probability:.4f}  {choice}")
        cut = "" if answer.finished else ", cut off"
        self.line(f"{answer.tokens} tokens in {answer.seconds:.1f} s{cut}. {RESEARCH_ONLY}", DIM)

    def json(self, record: dict) -> None:
        print(json_line(record), end="", flush=True)


def printable(text: str) -> str:
    """The text without control characters: file names and answers could hold what steers a terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def readable(text: str) -> str:
    """Text of an argument or of standard input: as UTF-8, whatever the locale; bytes that are no text are replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def sentence(error: Exception) -> str:
    """What an error says to a user."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    return str(error)


def typed_path(text: str) -> str:
    """A path as it is typed or dropped into a terminal: without quotes around it, `~` is the home folder.

    Many terminals put backslashes before blanks. They are taken away where there is such a file only without them.
    """
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    path = os.path.expanduser(text)
    if "\\" in text and not os.path.exists(path):
        try:
            (text,) = shlex.split(text)
        except ValueError:  # not what a terminal writes
            return path
        if os.path.exists(unescaped := os.path.expanduser(text)):
            return unescaped
    return path


def short_name(path: str | None) -> str:
    return Path(path).name if path else "no scan"
