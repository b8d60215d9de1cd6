"""Answers for programs: one record an answer, and the result file of many scans, to which they are appended one by one,
so that a killed run goes on where it was.
"""

import csv
import fcntl
import io
import json
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from med3dvlm.data.files import write_bytes
from med3dvlm.inference import NOTICE, Answer

COLUMNS = ("image", "question", "answer", "tokens", "finished", "probabilities", "warnings", "preprocessing", "error",
           "notice")  # fmt: skip


class CommandError(ValueError):
    """A table or a result file that cannot be used, or flags that don't fit a model; the message says what to do."""


@contextmanager
def writing(path):
    """Raise CommandError where the block cannot write to the path."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from error


def record_of(image: str | None, question: str, answer: Answer | None = None, error: str | None = None) -> dict:
    """Everything about an answer, or what kept it from being given: COLUMNS and `seconds`, as JSON holds it."""
    record = dict.fromkeys((*COLUMNS, "seconds")) | {"image": image, "question": question, "error": error}
    if answer is not None:
        record |= {
            "answer": answer.text,
            "tokens": answer.tokens,
            "finished": answer.finished,
            "probabilities": answer.probabilities,
            "warnings": list(answer.warnings),
            "preprocessing": answer.preprocessing,
            "seconds": round(answer.seconds, 3),
        }
    return record | {"notice": NOTICE}


class ResultFile:
    """Rows in `.jsonl` or `.csv`, each on disk before the next scan is looked at.

    Beside it stands `<name>.run.json` with what the rows depend on. A row that was cut off when a run was killed is
    removed, and its scan is done again. The file is locked as long as it is open.

    Attributes:
        done: how often each `(image, question)` stands in the file; failed: how often with an error.
    Raises:
        CommandError: the file is of another run, of one that still goes on, or of none, or cannot be written.
    """

    def __init__(self, path, settings: dict):
        self.path = Path(path)
        self.is_csv = self.path.suffix.lower() == ".csv"
        self.done, self.failed = Counter(), Counter()
        if self.path.exists() and not self.path.is_file():  # opening a pipe would wait for a reader
            raise CommandError(f"{self.path} is no file: name another --output")
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115  open as long as the run
        try:
            self._lock()
            with writing(self.path):
                self._check_settings(settings)
                for row in self._rows_so_far():
                    self._count(row)
            if self.is_csv and not self.path.stat().st_size:
                self._write(_csv_line(COLUMNS))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def append(self, row: dict) -> None:
        """Add the COLUMNS of a row; it is on disk when this returns."""
        self._count(row)
        row = {name: row[name] for name in COLUMNS}  # not the seconds, which differ from run to run
        self._write(_csv_line(map(_cell, row.values())) if self.is_csv else json_line(row))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            advice = "wait for it, end it, or name another --output"
            raise CommandError(f"another run writes {self.path}: {advice}") from error

    def _count(self, row: dict) -> None:
        key = row["image"], row["question"]
        self.done[key] += 1
        self.failed[key] += bool(row["error"])

    def _write(self, line: str) -> None:
        with writing(self.path):
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def _check_settings(self, settings: dict) -> None:
        beside = self.path.with_name(f"{self.path.name}.run.json")
        advice = "name another --output, or remove it"
        if not self.path.stat().st_size:  # new, or a run was killed before its first row
            write_bytes(beside, (json.dumps(settings, indent=2) + "\n").encode("utf-8"))
            return
        if not beside.is_file():
            raise CommandError(f"{self.path} is there and no {beside.name} beside it: no run to go on with; {advice}")
        try:
            before = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CommandError(f"{beside}: not readable ({error}); {advice}") from error
        other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        if other:
            raise CommandError(f"{self.path} comes from a run with another {', '.join(other)}; {advice}")

    def _rows_so_far(self) -> list[dict]:
        """The whole rows of the file; what follows them is cut off."""
        data = self.path.read_bytes()
        whole = data[: _whole_lines(data, self.is_csv)]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        try:
            text = whole.decode("utf-8")
            if self.is_csv:
                rows = list(csv.DictReader(io.StringIO(text, newline="")))
            else:
                rows = [json.loads(line) for line in text.splitlines()]
        except (ValueError, csv.Error) as error:
            raise CommandError(f"{self.path}: not readable ({error}); name another --output") from error
        if not all(isinstance(row, dict) and set(COLUMNS) <= set(row) for row in rows):
            raise CommandError(f"{self.path}: lacks columns ({', '.join(COLUMNS)}); name another --output")
        return rows


def json_line(row: dict) -> str:
    """In ASCII, which every encoding and every line splitter takes as it is meant."""
    return json.dumps(row, ensure_ascii=True) + "\n"


def _csv_line(cells) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _cell(value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | bool) else value


def _whole_lines(data: bytes, is_csv: bool) -> int:
    """Where the last whole line ends. In CSV a line break inside quotes ends none."""
    end = quotes = position = 0
    for line in data.splitlines(keepends=True):
        position += len(line)
        quotes += line.count(b'"')
        if line.endswith(b"\n") and not (is_csv and quotes % 2):
            end = position
    return end
