"""Manifests: M3D_Cap.json (images and reports) and the M3D-VQA tables. Read, checked, renamed.

Layouts as published: the json maps split names to lists of `{"image": path, "text": path}`; a table has the columns
`Image Path, Question Type, Question, Choice A .. Choice D, Answer, Answer Choice`, of which the choices may be left
out. Paths are relative to the data root. Cells are text: "None" is an answer like any other, and only in a choice that
is not the right one does "NA" (or nothing) mean that there is none.
"""

import codecs
import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from med3dvlm.data.choices import CHOICE_LETTERS, read_choices
from med3dvlm.data.files import atomic_path, write_bytes

CAPTION_MANIFEST = "M3D_Cap.json"
PATIENTS_TABLE, LABELS_TABLE = "patients.csv", "labels.csv"  # beside it, where they are known
PATH_COLUMN = "Image Path"
REQUIRED_COLUMNS = (PATH_COLUMN, "Question Type", "Question", "Answer", "Answer Choice")
RAW_ENDING, PREPARED_ENDING = ".npy", ".nii.gz"


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names manifest, row and file."""


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """One image and the file with its report. `row` says where it stands, for example `test[3]`."""

    image: str
    text_path: str
    row: str
    manifest: str

    def read_text(self) -> str:
        """The report. Raises ManifestError where the file is missing or no text."""
        try:
            return Path(self.text_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(f"{self.where}: report {self.text_path} cannot be read ({error})") from error

    @property
    def where(self) -> str:
        return f"{self.manifest}, row {self.row}"

    @property
    def files(self) -> tuple[str, ...]:
        return self.image, self.text_path


@dataclass(frozen=True, slots=True)
class VQARecord:
    """One question about one image.

    choices: the texts of A to D, None where a choice is missing; empty where the table has no such columns.
    answer_choice: the letter of the right one, also where the table names it by its text; else what stands there.
    question_type: a number as published (1 plane, 2 phase, 3 organ, 4 abnormality, 5 location), else the text.
    """

    image: str
    question: str
    choices: tuple[str | None, ...]
    answer: str
    answer_choice: str
    question_type: int | str
    row: str
    manifest: str

    @property
    def where(self) -> str:
        return f"{self.manifest}, row {self.row}"

    @property
    def files(self) -> tuple[str, ...]:
        return (self.image,)

    @property
    def letters(self) -> list[str]:
        """The letters of the choices that there are."""
        return [letter for letter, text in zip(CHOICE_LETTERS, self.choices, strict=False) if text is not None]


def read_caption_manifest(path, data_root, split: str, check_files: bool = True) -> list[CaptionRecord]:
    """Read one split of an `M3D_Cap.json`.

    data_root: the folder that the paths in the manifest are relative to.
    check_files: look for every file now, rather than when it is its turn.
    Raises ManifestError: no manifest, not json, no such split, an entry without image or text, a file that is missing.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get(split), list):
        found = ", ".join(data) if isinstance(data, dict) else type(data).__name__
        raise ManifestError(f"{path}: expected a list under {split!r}, found {found or 'nothing'}")
    records = []
    for number, entry in enumerate(data[split]):
        row = f"{split}[{number}]"
        if not isinstance(entry, dict) or not {"image", "text"} <= entry.keys():
            raise ManifestError(f"{path}, row {row}: expected an object with image and text")
        image, text = (str(Path(data_root) / entry[key]) for key in ("image", "text"))
        records.append(CaptionRecord(image, text, row, str(path)))
    if check_files:
        check_files_exist(records)
    return records


def read_vqa_csv(path, data_root, check_files: bool = True) -> list[VQARecord]:
    """Read an M3D-VQA table (closed, open or yes / no). Arguments and errors as in `read_caption_manifest`."""
    records = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in REQUIRED_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                # Without a heading, the first line is a question about a patient.
                found = reader.fieldnames if len(missing) < len(REQUIRED_COLUMNS) else "none of them in its first line"
                raise ManifestError(f"{path}: lacks the columns {', '.join(missing)}; found {found}")
            for number, cells in enumerate(reader):
                # Rows count from 0, as the index column of the published tables does.
                records.append(_vqa_record(cells, f"{number} (line {reader.line_num})", path, data_root))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error
    if check_files:
        check_files_exist(records)
    return records


def _vqa_record(cells: dict, row: str, path, data_root) -> VQARecord:
    empty = [name for name in REQUIRED_COLUMNS if cells[name] is None]
    if empty:
        raise ManifestError(f"{path}, row {row}: ends before the column {empty[0]}")
    if any(cells.get(None, ())):  # empty ones are commas at the end of a line
        raise ManifestError(f"{path}, row {row}: more cells than columns; put texts with commas between quotes")
    texts = [cells[f"Choice {letter}"] for letter in CHOICE_LETTERS if f"Choice {letter}" in cells]
    choices, letter = read_choices(texts, cells["Answer"], cells["Answer Choice"].strip())
    question_type = cells["Question Type"]
    return VQARecord(
        image=str(Path(data_root) / cells[PATH_COLUMN]),
        question=cells["Question"],
        choices=choices,
        answer=cells["Answer"],
        answer_choice=letter,
        question_type=int(question_type) if question_type.isdecimal() else question_type,
        row=row,
        manifest=str(path),
    )


def check_files_exist(records) -> None:
    """Raise ManifestError where a file of a record is missing: manifest, row and file of the first, and how many."""
    found: dict[str, bool] = {}  # many questions share an image
    missing = []
    for record in records:
        for file in record.files:
            if file not in found:
                found[file] = Path(file).is_file()
            if not found[file]:
                missing.append((record, file))
    if missing:
        record, file = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ManifestError(f"{record.where}: {file} does not exist{more}{missing_hint(file)}")


def check_closed(records) -> None:
    """Raise ManifestError where questions have no choices, or an `Answer Choice` that is not the letter of one.

    Such a question would be asked without choices, and no answer to it could be right.
    """
    wrong = [record for record in records if record.answer_choice not in record.letters]
    if wrong:
        first, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        chosen = first.answer_choice  # of a row with a comma too many, a piece of a report
        shown = repr(chosen) if len(chosen) <= 2 else f"(a text of {len(chosen)} characters)"
        raise ManifestError(
            f"{first.where}: Answer Choice {shown} is none of its choices "
            f"({', '.join(first.letters) or 'it has none'}){more}; a closed table needs choices and the bare letter of "
            "the right one; a table of open questions is read by the LoRA stage as --vqa_yn_data_train_path (then "
            "--vqa_data_train_path may be a table with a heading only), and evaluated without --close_ended"
        )


def missing_hint(file: str) -> str:
    """What may help where `file` is missing."""
    if file.endswith(RAW_ENDING) and Path(file.removesuffix(RAW_ENDING) + PREPARED_ENDING).is_file():
        return f"; the {PREPARED_ENDING} file does: run utls/rename_csv.py on the manifest"
    return ""


def clean_report_text(text: str) -> str:
    """Take the findings out of a case's `text.txt`, as published.

    The text after the first "study_findings:" (to the end, or all of it), on one line. With fewer than 5 characters
    in it, spaces not counted, the text after the first "discussion:"; with fewer than 5 again, the whole text.
    """
    for key in ("study_findings:", "discussion:"):
        findings = _one_line(text.partition(key)[2] if key in text else text)
        if len(findings.replace(" ", "")) >= 5:
            return findings
    return _one_line(text)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").strip()


def rename_manifest(path) -> int:
    """Let the image paths of a manifest (`.csv` or `.json`) end in `.nii.gz` instead of `.npy`.

    Only paths are changed, no other text; the file is replaced atomically, and a second run changes nothing. The file
    as it was before the first change is kept beside it, as `<name>.bak`.
    Returns the number of changed paths. Raises ManifestError where the file is no manifest.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return _rename_csv(path)
    if path.suffix.lower() == ".json":
        return _rename_json(path)
    raise ManifestError(f"{path}: expected a .csv or .json manifest")


def image_paths(path) -> list[str]:
    """The image path of every row of a manifest (`.csv` or `.json`), as it stands there; empty where it is none.

    Raises ManifestError where the file cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        data = read_json(path)
        lists = data.values() if isinstance(data, dict) else ()
        entries = [entry for entries in lists if isinstance(entries, list) for entry in entries]
        return [entry["image"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("image"), str)]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [row[PATH_COLUMN] for row in csv.DictReader(file) if row.get(PATH_COLUMN)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error


def _keep_backup(path: Path) -> None:
    backup = path.with_name(f"{path.name}.bak")
    if not backup.exists():
        with atomic_path(backup) as temporary:
            shutil.copyfile(path, temporary)


def _renamed(image: str) -> str:
    return image.removesuffix(RAW_ENDING) + PREPARED_ENDING if image.endswith(RAW_ENDING) else image


def _rename_csv(path: Path) -> int:
    try:
        with open(path, "rb") as source:
            encoding = "utf-8-sig" if source.read(3) == codecs.BOM_UTF8 else "utf-8"
        with open(path, encoding=encoding, newline="") as source:
            first = source.readline()
            source.seek(0)
            reader = csv.reader(source)
            names = next(reader, [])
            if PATH_COLUMN not in names:
                raise ManifestError(f"{path}: lacks the column {PATH_COLUMN!r}; found {names}")
            column = names.index(PATH_COLUMN)
            changed = sum(len(cells) > column and cells[column] != _renamed(cells[column]) for cells in reader)
            if changed:  # otherwise the file stays as it is, to the byte
                _keep_backup(path)
                source.seek(0)
                with atomic_path(path) as temporary, open(temporary, "w", encoding=encoding, newline="") as target:
                    writer = csv.writer(target, lineterminator="\r\n" if first.endswith("\r\n") else "\n")
                    for cells in csv.reader(source):
                        cells[column:column + 1] = map(_renamed, cells[column:column + 1])
                        writer.writerow(cells)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be renamed ({error})") from error
    return changed


def _rename_json(path: Path) -> int:
    data = read_json(path)
    if not isinstance(data, dict):
        raise ManifestError(f"{path}: expected an object with one list a split, found {type(data).__name__}")
    changed = 0
    for entries in data.values():
        for entry in entries if isinstance(entries, list) else ():
            image = entry.get("image") if isinstance(entry, dict) else None
            if isinstance(image, str) and image != _renamed(image):
                entry["image"] = _renamed(image)
                changed += 1
    if changed:
        try:
            _keep_backup(path)
            write_bytes(path, json.dumps(data, ensure_ascii=False, indent=2).encode("utf-8"))
        except OSError as error:
            raise ManifestError(f"{path}: cannot be renamed ({error})") from error
    return changed


def read_json(path):
    """The content of a json file. Raises ManifestError where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error
