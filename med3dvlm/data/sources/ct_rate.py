"""CT-RATE: chest CT with reports, and the questions that 3D-RAD and CT-RATE itself ask about them.

The layout is that of docs/data.md. The splits keep their names; CT-RATE's `valid` is what others test on.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

from med3dvlm.data.manifest import CHOICE_LETTERS
from med3dvlm.data.sources.base import (
    Case,
    Collection,
    Item,
    Question,
    SourceError,
    SourceOptions,
    known_split,
)
from med3dvlm.data.sources.spreadsheet import read_table

VOLUME = re.compile(r"(?P<split>train|valid)_(?P<patient>[1-9][0-9]*)_(?P<scan>[a-z]+)_[1-9][0-9]*\.nii\.gz")
VOLUME_FOLDERS = ("train_fixed", "valid_fixed", "train", "valid")  # the corrected release goes first
TABLES = {"train": "train", "valid": "validation"}  # split -> how the names of its tables begin
EMPTY = "Not given."
RAD_COLUMNS = ("Task", "VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice")


def data_root(root: Path) -> Path:
    return root / "dataset" if (root / "dataset").is_dir() else root


def recognise(root: Path) -> bool:
    base = data_root(root)
    return any((base / name).is_dir() for name in ("radiology_text_reports", *VOLUME_FOLDERS[:2])) or any(
        VOLUME.fullmatch(path.name) for path in base.glob("train/*/*/*.nii.gz")
    )


def read(root: Path, options: SourceOptions) -> Collection:
    """Volumes below `dataset/{train,valid}[_fixed]`, with the reports, `no_chest` lists and metadata beside them.

    Raises SourceError: no volume, or a table without a column that is needed.
    """
    base = data_root(root)
    volumes, left_out = _volumes(base, root)
    if not volumes:
        folders = ", ".join(VOLUME_FOLDERS)
        raise SourceError(f"{base}: holds no CT-RATE volume (<split>_<patient>_<scan>_<n>.nii.gz below {folders})")
    reports = _reports(base)
    rescaling = {}
    if any(not _fixed(path, base) for path in volumes.values()):
        rescaling = _rescaling(base)
    cases: dict[tuple[str, str | None], list[Item]] = defaultdict(list)
    for name, path in sorted(volumes.items()):
        rescale = None
        if not _fixed(path, base):  # values of the first release are raw; the fixed one is in HU
            if name not in rescaling:
                left_out.append((_relative(path, root), "no RescaleSlope in the metadata: its values are not in HU"))
                continue
            rescale = rescaling[name]
        scan = name.rpartition("_")[0]
        cases[scan, reports.get(name)].append(Item(path, name.removesuffix(".nii.gz"), rescale=rescale))
    collection = Collection("ct-rate", root, _cases(cases), left_out=left_out)
    collection.add_unmatched(set(volumes) - set(reports), "volumes have no report")
    collection.add_unmatched(set(reports) - set(volumes), "reports have no volume here")
    images = {item.name: f"{case.folder}/{item.name}" for case in collection.cases for item in case.items}
    _add_questions(collection, images, base, options)
    _add_labels(collection, images, base)
    return collection


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _fixed(path: Path, base: Path) -> bool:
    return path.relative_to(base).parts[0].endswith("_fixed")


def _volumes(base: Path, root: Path) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """The file of each volume, and what is left out, with the reason."""
    lists = [base / "metadata" / f"no_chest_{split}.txt" for split in TABLES]
    lines = [line for file in lists if file.is_file() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    no_chest = {_file_name(line) for line in lines if line.strip()}
    volumes, left_out = {}, []
    for folder in VOLUME_FOLDERS:
        for path in sorted((base / folder).rglob("*.nii.gz")):
            if not VOLUME.fullmatch(path.name):
                left_out.append((_relative(path, root), "its name is none of CT-RATE"))
            elif path.name in no_chest:
                left_out.append((_relative(path, root), "no chest scan, by CT-RATE's list"))
            elif path.name in volumes:
                left_out.append((_relative(path, root), f"there twice: {volumes[path.name].relative_to(root)} is used"))
            else:
                volumes[path.name] = path
    return volumes, left_out


def _table(base: Path, folder: str, name: str) -> Path | None:
    found = [base / folder / f"{name}{ending}" for ending in (".csv", ".xlsx")]
    return next((path for path in found if path.is_file()), None)


def _reports(base: Path) -> dict[str, str]:
    """VolumeName -> findings, then the impression. "Not given." is empty."""
    reports = {}
    for name in TABLES.values():
        path = _table(base, "radiology_text_reports", f"{name}_reports")
        for row in read_table(path, ("VolumeName", "Findings_EN", "Impressions_EN")) if path else ():
            findings, impression = (
                "" if row[key] == EMPTY else " ".join(row[key].split()) for key in ("Findings_EN", "Impressions_EN")
            )
            text = f"{findings} Impression: {impression}" if impression else findings
            if text.strip():
                reports[_file_name(row["VolumeName"])] = text.strip()
    return reports


def _rescaling(base: Path) -> dict[str, tuple[float, float]]:
    rescaling = {}
    for name in TABLES.values():
        path = _table(base, "metadata", f"{name}_metadata")
        for row in read_table(path, ("VolumeName", "RescaleSlope", "RescaleIntercept")) if path else ():
            try:
                rescaling[_file_name(row["VolumeName"])] = float(row["RescaleSlope"]), float(row["RescaleIntercept"])
            except ValueError as error:
                raise SourceError(f"{path}, {row['VolumeName']}: {error}") from error
    return rescaling


def _cases(found: dict[tuple[str, str | None], list[Item]]) -> list[Case]:
    """One case a scan; reconstructions of a scan whose reports differ become cases of their own."""
    reports = Counter(scan for scan, _ in found)
    cases = []
    for (scan, text), items in found.items():
        split, patient, _ = scan.split("_")
        folder = scan if reports[scan] == 1 else items[0].name
        cases.append(Case(f"{split}/{split}_{patient}/{folder}", tuple(items), text=text,
                          group=f"{split}_{patient}", split=known_split(split, scan)))  # fmt: skip
    return cases


def _add_questions(collection: Collection, images: dict[str, str], base: Path, options: SourceOptions) -> None:
    """CT-RATE's own questions where they lie beside the volumes, and those that `--questions` names."""
    unmatched: list[str] = []
    others = sum(
        _own_questions(path, images, collection.questions, unmatched)
        for path in sorted((base / "vqa").glob("*_vqa.json"))
    )
    if others:
        collection.notes.append(f"{others} entries of CT-RATE's vqa name no image, or ask for no long or short answer")
    if options.questions is not None:
        tables = [options.questions] if options.questions.is_file() else sorted(options.questions.rglob("*.csv"))
        tables = [path for path in tables if path.name != "valid_path.csv"]
        if not tables:
            raise SourceError(f"{options.questions}: holds no table of questions (.csv)")
        for path in tables:
            _rad_questions(path, images, collection.questions, unmatched)
    collection.add_unmatched(unmatched, "questions have no volume here")


def _add_labels(collection: Collection, images: dict[str, str], base: Path) -> None:
    """The abnormalities that CT-RATE predicted from the reports, 0 or 1 for each volume."""
    unmatched = []
    for split in TABLES:
        path = _table(base, "multi_abnormality_labels", f"{split}_predicted_labels")
        for row in read_table(path, ("VolumeName",)) if path else ():
            name = _volume_name(row.pop("VolumeName"))
            if name not in images:
                unmatched.append(name)
                continue
            wrong = [f"{label} {value!r}" for label, value in row.items() if value not in ("0", "1", "0.0", "1.0")]
            if wrong:
                raise SourceError(f"{path}, {name}: expected 0 or 1, found {', '.join(wrong[:3])}")
            collection.labels[images[name]] = {label: int(float(value)) for label, value in row.items()}
    collection.add_unmatched(unmatched, "rows of labels have no volume here")


def _volume_name(text: str) -> str:
    """3D-RAD's `test_1_a_1.nii.gz` is CT-RATE's valid_1_a_1."""
    name = text.strip().rpartition("/")[2].removesuffix(".nii.gz").removesuffix(".npy")
    return re.sub(r"^test_", "valid_", name)


def _file_name(text: str) -> str:
    """A table may leave the ending out, or write a path."""
    return f"{_volume_name(text)}.nii.gz"


def _rad_questions(path: Path, images: dict[str, str], questions: dict, unmatched: list[str]) -> None:
    """The rows of a 3D-RAD table; "-" is a missing choice."""
    for row in read_table(path, RAD_COLUMNS):
        name = _volume_name(row["VolumeName"])
        if name not in images:
            unmatched.append(row["VolumeName"])
            continue
        choices = tuple(row.get(f"Choice {letter}", "-") for letter in CHOICE_LETTERS)
        choices = tuple("" if choice == "-" else choice for choice in choices)
        letter = row["AnswerChoice"]
        # What names no choice as the right one can only be asked in plain words.
        there = [other for other, text in zip(CHOICE_LETTERS, choices, strict=True) if text]
        closed = row["QuestionType"].lower().startswith("close") and letter in there
        questions.setdefault("train" if name.startswith("train_") else "test", []).append(
            Question(images[name], row["Question"], row["Answer"], row["Task"],
                     choices if closed else (), letter if closed else ""))  # fmt: skip


def _own_questions(path: Path, images: dict[str, str], questions: dict, unmatched: list[str]) -> int:
    """Questions of `*_vqa.json` that ask for an answer in words. Returns how many others there are."""
    try:
        read = json.loads(path.read_text(encoding="utf-8-sig"))
        talks = [
            ((talk.get("image") or "").strip(), [(turn["from"], turn["value"].strip()) for turn in turns])
            for talk in read
            for turns in [talk["conversations"]]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: expected a list of objects with image and conversations ({error!r})") from error
    split = "train" if path.name.startswith("train") else "validation"
    others = 0
    for image, turns in talks:
        name = _volume_name(image)
        for (asker, question), (_, answer) in zip(turns, turns[1:], strict=False):
            kind = re.search(r"<(long_answer|short_answer)>", question)
            if asker != "human":
                continue
            if not kind or not image:
                others += 1
                continue
            if name not in images:
                unmatched.append(image)
                continue
            text = " ".join(re.sub(r"<\w+>", " ", question).split())
            questions.setdefault(split, []).append(Question(images[name], text, answer, kind[1]))
    return others
