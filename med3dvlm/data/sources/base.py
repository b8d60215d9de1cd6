"""What every form of input becomes: cases, each with its volumes and its report, and tables of questions."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from med3dvlm.data.files import write_bytes
from med3dvlm.data.manifest import clean_report_text

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": "train", "training": "train", "tr": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "va": "validation", "dev": "validation",
    "test": "test", "testing": "test", "ts": "test",
}  # fmt: skip


class SourceError(ValueError):
    """An input that cannot be understood; the message says what was looked for, what was found and where."""


@dataclass(frozen=True)
class Item:
    """One volume, or one series of DICOM, or a zip, in which there may be several volumes.

    path: file or folder. name: of the prepared file, without ending. dicom: what it holds is found when it is opened.
    files: of the series. rescale: (slope, intercept) from stored values to HU, where the file itself lacks them.
    """

    path: Path
    name: str
    dicom: bool = False
    files: tuple[Path, ...] = ()
    rescale: tuple[float, float] | None = None


@dataclass(frozen=True)
class Case:
    """What shares a folder of the output and a report.

    folder: below the output. items: its volumes; those of a `raw` M3D folder are found when it is opened.
    text: the report. text_file: a report as downloaded, to be cleaned by the published rule.
    group: what must not be divided between splits, for example the patient. split: that of the source; "" for none.
    hidden: paths may name the patient: ledger and messages name the case instead.
    """

    folder: str
    items: tuple[Item, ...] = ()
    raw: Path | None = None
    text: str | None = None
    text_file: Path | None = None
    group: str = ""
    split: str = ""
    hidden: bool = False

    def report(self) -> str:
        """The text, "" where there is none. Raises OSError or UnicodeDecodeError where its file cannot be read."""
        if self.text is not None or self.text_file is None or not self.text_file.exists():
            return self.text or ""
        return clean_report_text(self.text_file.read_text(encoding="utf-8-sig"))

    def write_report(self, output: Path) -> bool:
        """Let `text.txt` below the output hold the report, or not be there; says whether there is one.

        Raises as `report`, and OSError where it cannot be written.
        """
        text, target = self.report().encode("utf-8"), output / self.folder / "text.txt"
        if not text:
            target.unlink(missing_ok=True)  # of an earlier run, when there was one
        elif not target.is_file() or target.read_bytes() != text:
            write_bytes(target, text)
        return bool(text)


@dataclass
class Question:
    """One row of an M3D-VQA table, about the volume `folder/name` of the output."""

    image: str
    question: str
    answer: str
    question_type: str = ""
    choices: tuple[str, ...] = ()
    answer_choice: str = ""


@dataclass
class Collection:
    """What was found in an input.

    kind: name of the form. root: what paths in the ledger are relative to. questions: by split.
    left_out: (file, reason). notes: sentences a user should see. manifest: an M3D_Cap.json to be brought along.
    labels: image, as in `Question` -> label -> 0 or 1. unmatched: (name, reason) of what belongs to nothing here.
    """

    kind: str
    root: Path
    cases: list[Case]
    questions: dict[str, list[Question]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manifest: Path | None = None
    labels: dict[str, dict[str, int]] = field(default_factory=dict)
    unmatched: list[tuple[str, str]] = field(default_factory=list)

    def add_unmatched(self, names: Iterable[str], what: str) -> None:
        """List names that belong to nothing here, and count them in a note. what: "reports have no volume here"."""
        names = sorted(names)
        if names:
            self.unmatched += [(name, what) for name in dict.fromkeys(names)]
            self.notes.append(f"{len(names)} {what}, such as {names[0]}")


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about an input.

    questions: a table, or folder of tables, of questions. reports: a table of reports by accession number.
    columns: name -> column in a list or table of reports. key_file: of the hashes that stand for patients.
    hash_ids: hash the names of cases even where the input is no DICOM. dry_run: write nothing.
    """

    questions: Path | None = None
    reports: Path | None = None
    columns: dict[str, str] = field(default_factory=dict)
    key_file: Path | None = None
    hash_ids: bool = False
    dry_run: bool = False


def known_split(name: str, where: str) -> str:
    """train, validation or test for the many ways in which they are written. Raises SourceError for anything else."""
    split = SPLIT_NAMES.get(name.strip().lower())
    if split is None:
        raise SourceError(f"{where}: unknown split {name!r}; known are {', '.join(SPLITS)}")
    return split


def draw_split(group: str, fractions: tuple[float, float, float]) -> str:
    """The split of a group: always the same, whatever else the data set holds, and evenly spread over the groups."""
    place = int.from_bytes(hashlib.sha256(as_bytes(f"split|{group}")).digest()[:8], "big") / 2**64
    train, validation, _ = fractions
    return "train" if place < train else "validation" if place < train + validation else "test"


def as_bytes(name: str) -> bytes:
    """A name as it is hashed; those of files need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def fold_name(name: str) -> str:
    """A name in ASCII, accents dropped, as the published preparation names its files."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")


def file_name(name: str) -> str:
    """A name that any file system takes: ASCII letters, digits and `._-`, anything else becomes `_`.

    Where letters would be lost (Chinese, say), a hash stands for them, so that different names stay different.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", fold_name(name)).strip("._")
    lost = (character for character in name if not fold_name(character))
    if any(character.isalnum() or not character.isprintable() for character in lost):
        plain = f"{plain}_{hashlib.sha256(as_bytes(name)).hexdigest()[:8]}".lstrip("_")
    return plain or "unnamed"
