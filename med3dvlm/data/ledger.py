"""The ledger of a preparation: one line of JSON for each volume that was done, skipped or failed, with the reason.

Lines are only ever appended, each with one write. A run, and each shard of one, has a file of its own, which it locks:
a second run with the same ledger is refused. A line that a killed run left half-written is closed and ignored.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

PATTERN = "ledger*.jsonl"
DONE, SKIPPED, FAILED = STATUSES = ("done", "skipped", "failed")


class LedgerError(RuntimeError):
    """The ledger is in use; the message says where and what to do."""


@dataclass(frozen=True)
class Entry:
    """What became of one volume. It holds no report text and nothing of a DICOM header that identifies a person.

    case: folder of the case, relative to the output. volume: its prepared file, relative to the output; "" where the
    line is about the case itself. source: relative to the input; for DICOM the case and the series instead.
    status: one of STATUSES. seconds, bytes: of what was done. options: see `med3dvlm.data.work.Options.digest`.
    summary: of the intensities, for the profile of the training data (see `med3dvlm.data.profile`).
    notes: what a user should know of a volume that was done.
    """

    case: str
    volume: str
    source: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    bytes: int = 0
    options: str = ""
    summary: dict | None = None
    notes: tuple[str, ...] = ()


class Ledger:
    """Appends entries to a file, which it holds the lock of. Raises LedgerError where another run holds it."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab+", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise LedgerError(f"{self.path}: another preparation is writing it; wait for it, or end it") from error
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        size = self.path.stat().st_size
        if size:
            self.file.seek(size - 1)
            if self.file.read(1) != b"\n":
                self.file.write(b"\n")

    def add(self, entry: Entry) -> None:
        """Append one line. Raises OSError, for example where the disk is full."""
        values = {"time": datetime.now(UTC).isoformat(timespec="microseconds"), **asdict(entry)}
        line = json.dumps({key: value for key, value in values.items() if value not in ("", 0.0, None, ())})
        self.file.write(line.encode() + b"\n")

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@contextmanager
def locked(folder):
    """Wait until no other process holds the lock of a folder, and hold it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def ledger_name(shard: tuple[int, int] | None) -> str:
    """The file of a run, or of shard (i, n) of one."""
    return "ledger.jsonl" if shard is None else f"ledger-{shard[0]}of{shard[1]}.jsonl"


def read_ledgers(folder) -> dict[str, dict]:
    """The latest line about each volume, from all ledgers of an output folder: volume -> the fields of its `Entry`.

    What is known of when a volume was done (source, options, bytes, summary) stays known when it is skipped or fails
    later.
    """
    lines = [line for file in sorted(Path(folder).glob(PATTERN)) for line in _lines(file)]
    latest: dict[str, dict] = {}
    for line in sorted(lines, key=lambda line: line["time"]):
        before = latest.get(line["volume"], {})
        if line["status"] != DONE:
            line = {**before, **line, "source": before.get("source", line.get("source", ""))}
        latest[line["volume"]] = line
    return latest


def _lines(file: Path) -> Iterator[dict]:
    """The whole lines about volumes; a torn one is no JSON, or lacks the newline."""
    for text in file.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("volume") and {"time", "status", "case"} <= line.keys():
            yield line
