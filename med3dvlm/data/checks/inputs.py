"""What there is to check: the manifest, the tables of questions, and the files that they name."""

import argparse
import csv
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from med3dvlm.data.checks.findings import Finding
from med3dvlm.data.manifest import (
    CAPTION_MANIFEST,
    LABELS_TABLE,
    PATH_COLUMN,
    PATIENTS_TABLE,
    ManifestError,
    VQARecord,
    read_caption_manifest,
    read_json,
    read_vqa_csv,
)
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.profile import PREPARATION_FILE, read_preparation
from med3dvlm.data.sources.base import SPLIT_NAMES

PREPARED_FOLDER, TABLES = "M3D_Cap_npy", "M3D_VQA_*.csv"


class NothingToCheck(ValueError):
    """Arguments that name no data set; the message says what was looked for and what to do."""


@dataclass
class Inputs:
    """A data set as its manifest and tables name it.

    root: the folder that paths are relative to. manifest: M3D_Cap.json, None where there are tables only.
    splits_of: image -> names of its splits, empty for one that only tables without a split in their name hold.
    text_of: image -> its report. questions: table -> its rows. patient_of: image -> patient, where that is known.
    labels: label -> number of volumes that have it. findings: about manifest and tables themselves.
    Images, reports and tables are named by their path relative to the root, where they lie below it.
    """

    root: Path
    manifest: Path | None
    splits_of: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    text_of: dict[str, str] = field(default_factory=dict)
    questions: dict[str, list[VQARecord]] = field(default_factory=dict)
    patient_of: dict[str, str] = field(default_factory=dict)
    labels: Counter = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def name(self, path) -> str:
        """How findings call a file."""
        path = Path(path)
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def add_manifest(self, path: Path, error: Exception | str) -> None:
        """A finding that the manifest or table at `path` can't be used; results say nothing of where the data lie."""
        detail = str(error).removeprefix(str(path)).lstrip(":, ").replace(str(path), self.name(path))
        self.findings.append(Finding("manifest", self.name(path), detail))

    def path(self, name: str) -> Path:
        return self.root / name

    def unnamed(self) -> int:
        """How many `.nii.gz` files beside the manifest neither it nor a table names; they are not checked."""
        files = self.manifest.parent.rglob("*.nii.gz") if self.manifest else ()
        return sum(self.name(path) not in self.splits_of for path in files)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what `find_inputs` is to find."""
    parser.add_argument("folder", metavar="DIR", help="prepared folder, or the data root that holds it and M3D-VQA")
    parser.add_argument("--manifest", help="M3D_Cap.json, where it is not in DIR or a folder of DIR")
    parser.add_argument("--tables", nargs="*", help="tables of questions, where they are not in DIR or M3D-VQA")
    parser.add_argument("--data_root", help="what paths are relative to (default: where the first images are found)")


def find_inputs(folder, manifest=None, tables=None, data_root=None) -> Inputs:
    """Find and read manifest and tables.

    folder: a prepared folder, or the data root that holds it and M3D-VQA. manifest, tables, data_root: instead of what
    is found there. Raises NothingToCheck.
    """
    folder = Path(folder)
    for path in (folder, *(Path(p) for p in (manifest, data_root, *(tables or ())) if p)):
        if not path.exists():
            raise NothingToCheck(f"{path}: no such file or folder")
    if not folder.is_dir():
        raise NothingToCheck(f"{folder} is a file: name the prepared folder, or the data root that holds it")
    folder = folder.absolute()  # "." has no parent to look into
    manifest = Path(manifest).absolute() if manifest else _find_manifest(folder)
    if tables is None:
        places = dict.fromkeys([folder, folder / "M3D-VQA", *([manifest.parent] if manifest else [])])
        if manifest and manifest.parent == folder:
            places[folder.parent / "M3D-VQA"] = None
        tables = [table for place in places for table in sorted(place.glob(TABLES))]
    if not manifest and not tables:
        raise NothingToCheck(
            f"{folder} holds no {CAPTION_MANIFEST} and no {TABLES}: name the prepared folder, the data root that holds "
            "it and M3D-VQA, or give --manifest or --tables"
        )
    root = Path(data_root).absolute() if data_root else _find_root(folder, manifest)
    inputs = Inputs(root, manifest)
    if manifest:
        _read_manifest(inputs)
    for table in tables:
        _read_table(inputs, Path(table).absolute())
    if manifest:
        _read_patients(inputs, manifest.parent)
        _read_labels(inputs, manifest.parent)
    if not inputs.splits_of and not inputs.findings:
        raise NothingToCheck(f"{manifest or folder} names no image: is the data set prepared?")
    return inputs


def preparation_of(inputs: Inputs) -> PreprocessConfig | None:
    """What preparation.json beside the manifest states; None without one. Raises NothingToCheck where it is damaged."""
    try:
        preparation = read_preparation(inputs.manifest.parent if inputs.manifest else inputs.root)
    except ValueError as error:
        raise NothingToCheck(str(error)) from error
    return preparation[0] if preparation else None


def _find_manifest(folder: Path) -> Path | None:
    if (folder / CAPTION_MANIFEST).is_file():
        return folder / CAPTION_MANIFEST
    found = sorted(folder.glob(f"*/{CAPTION_MANIFEST}"))
    prepared = [path for path in found if (path.parent / PREPARATION_FILE).is_file()]
    prepared = prepared or [path for path in found if path.parent.name == PREPARED_FOLDER] or found
    if len(prepared) > 1:
        listed = ", ".join(str(path) for path in prepared)
        raise NothingToCheck(f"{folder} holds several data sets ({listed}): name one of their folders")
    return prepared[0] if prepared else None


def _find_root(folder: Path, manifest: Path | None) -> Path:
    """The folder below which most of the first images of the manifest exist; the usual one where none does."""
    if manifest is None:
        return folder
    usual = manifest.parent.parent
    try:
        entries = [e for entries in read_json(manifest).values() for e in entries][:50]
        images = [entry["image"] for entry in entries]
        found = {root: sum((root / image).exists() for image in images) for root in (usual, manifest.parent, folder)}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return usual  # reading the manifest says what is wrong with it
    return max(found, key=found.get)


def _read_manifest(inputs: Inputs) -> None:
    try:
        data = read_json(inputs.manifest)
    except ManifestError as error:
        inputs.add_manifest(inputs.manifest, error)
        return
    if not isinstance(data, dict):
        inputs.add_manifest(inputs.manifest, f"expected an object, found {type(data).__name__}")
        return
    listed = Counter()
    for split in data:
        try:
            records = read_caption_manifest(inputs.manifest, inputs.root, split, check_files=False)
        except ManifestError as error:
            inputs.add_manifest(inputs.manifest, str(error).partition(", found ")[0])  # another file may say anything
            continue
        except TypeError:
            inputs.add_manifest(inputs.manifest, f"{split}: an entry whose image or text is not a path")
            continue
        for record in records:
            image = inputs.name(record.image)
            inputs.splits_of[image].add(SPLIT_NAMES.get(split, split))
            inputs.text_of[image] = inputs.name(record.text_path)
            listed[image, split] += 1
    for (image, split), times in listed.items():
        if times > 1:
            inputs.findings.append(Finding("image_repeated", image, f"listed {times} times in {split}"))


def _read_table(inputs: Inputs, path: Path) -> None:
    name = inputs.name(path)
    try:
        records = read_vqa_csv(path, inputs.root, check_files=False)
    except ManifestError as error:
        reason = str(error).partition("; found ")[0]  # with half a heading, those may be words of the first row
        inputs.add_manifest(path, reason)
        return
    inputs.questions[name] = records
    words = re.findall("[a-z]+", path.stem.lower())
    splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    for record in records:
        inputs.splits_of[inputs.name(record.image)] |= splits


def _read_patients(inputs: Inputs, folder: Path) -> None:
    """Whose the images are, by the folders of their cases."""
    rows = _rows(inputs, folder / PATIENTS_TABLE, "case", "patient")
    patients = {inputs.name(folder / row["case"]): row["patient"] for row in rows}
    for image in inputs.splits_of:
        patient = patients.get(Path(image).parent.as_posix())
        if patient:
            inputs.patient_of[image] = patient


def _read_labels(inputs: Inputs, folder: Path) -> None:
    """Count the labels; what is neither 0, 1 nor empty is a finding."""
    name = inputs.name(folder / LABELS_TABLE)
    for number, row in enumerate(_rows(inputs, folder / LABELS_TABLE, PATH_COLUMN)):
        wrong = [label for label, value in row.items() if label != PATH_COLUMN and value not in ("0", "1", "")]
        if wrong:
            inputs.findings.append(Finding("manifest", name, f"{wrong[0]}: expected 0, 1 or nothing", str(number)))
        inputs.labels.update(label for label, value in row.items() if value == "1")


def _rows(inputs: Inputs, path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a table beside the manifest; none where it is not there, and a finding where it cannot be read."""
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        inputs.add_manifest(path, f"cannot be read ({error})")
        return []
    if rows and not set(columns) <= rows[0].keys():
        inputs.add_manifest(path, f"lacks one of the columns {', '.join(columns)}")
        return []
    return rows
