"""The result file of many scans: rows are appended one by one, so that a killed run goes on where it was."""

import csv
import io
import json
import os
from collections import Counter
from pathlib import Path

from med3dvlm.data.files import write_bytes

COLUMNS = ("image", "question", "answer", "tokens", "finished", "probabilities", "warnings", "error", "notice")


class OutputError(ValueError):
    """A result file that cannot be continued; the message says why and what to do."""


class ResultFile:
    """Rows in `.jsonl` or `.csv`, each on disk before the next scan is looked at.

    Beside it stands `<name>.run.json` with what the rows depend on. A row that was cut off when a run was killed is
    removed, and its scan is done again.

    Attributes:
        done: how often each `(image, question)` stands in the file; failed: rows with an error.
    Raises:
        OutputError: the file is of another run, or of none.
    """

    def __init__(self, path, settings: dict):
        self.path = Path(path)
        self.is_csv = self.path.suffix.lower() == ".csv"
        self._check_settings(settings)
        rows = self._rows_so_far()
        self.done = Counter((row["image"], row["question"]) for row in rows)
        self.failed = sum(bool(row["error"]) for row in rows)
        self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115  open as long as the run
        if self.is_csv and not self.path.stat().st_size:
            self._write(_csv_line(COLUMNS))

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def append(self, row: dict) -> None:
        """Add a row with all of COLUMNS; it is on disk when this returns."""
        self.failed += bool(row["error"])
        self._write(_csv_line(_cell(row[name]) for name in COLUMNS) if self.is_csv else json_line(row))

    def _write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check_settings(self, settings: dict) -> None:
        beside = self.path.with_name(f"{self.path.name}.run.json")
        advice = "name another --output, or remove it"
        if not self.path.exists():
            write_bytes(beside, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
            return
        if not beside.is_file():
            raise OutputError(f"{self.path} is there and no {beside.name} beside it: not a run to go on with; {advice}")
        try:
            before = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{beside}: not readable ({error}); {advice}") from error
        other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        if other:
            raise OutputError(f"{self.path} comes from a run with another {', '.join(other)}; {advice}")

    def _rows_so_far(self) -> list[dict]:
        """The whole rows of the file; what follows them is cut off."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: _whole_lines(data, self.is_csv)]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        text = whole.decode("utf-8")
        if self.is_csv:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        try:
            return [json.loads(line) for line in text.splitlines()]
        except ValueError as error:
            raise OutputError(f"{self.path}: not readable as JSON lines ({error}); name another --output") from error


def json_line(row: dict) -> str:
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
