"""What is printed, and where: answers to standard output, the rest to standard error, colours on a terminal only."""

import json
import os
import re
import sys
from pathlib import Path

from med3dvlm.inference import NOTICE, Answer, AnswerStream

RESEARCH_ONLY = "For research only."
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line feeds
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
        print(json.dumps(record, ensure_ascii=False), flush=True)


def record_of(image: str | None, question: str, answer: Answer) -> dict:
    """Everything about an answer, as JSON holds it."""
    return {
        "image": image,
        "question": question,
        "answer": answer.text,
        "tokens": answer.tokens,
        "seconds": round(answer.seconds, 3),
        "finished": answer.finished,
        "probabilities": answer.probabilities,
        "warnings": list(answer.warnings),
        "preprocessing": answer.preprocessing,
        "notice": NOTICE,
    }


def printable(text: str) -> str:
    """The text without control characters: file names and answers could hold what steers a terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def short_name(path: str | None) -> str:
    return Path(path).name if path else "no scan"
