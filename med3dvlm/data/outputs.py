"""What a preparation leaves besides volumes and texts: manifest, tables of questions, what was done, and to what."""

import csv
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from med3dvlm.data.data_card import Written, draw_splits, split_rule, write_data_card
from med3dvlm.data.files import atomic_path, write_bytes
from med3dvlm.data.ledger import FAILED, read_ledgers
from med3dvlm.data.manifest import CAPTION_MANIFEST, CHOICE_LETTERS, LABELS_TABLE, PATIENTS_TABLE, REQUIRED_COLUMNS
from med3dvlm.data.profile import PUBLISHED_PROFILE, DataProfile, write_preparation
from med3dvlm.data.sources.base import SPLITS, Case, Collection, Question
from med3dvlm.data.volume import PREPARED_ERROR
from med3dvlm.data.work import Options

TABLE_NAMES = {"train": "train", "validation": "val", "test": "test"}
COLUMNS = (*REQUIRED_COLUMNS[:3], *(f"Choice {letter}" for letter in CHOICE_LETTERS), *REQUIRED_COLUMNS[3:])
VERSION = 1  # of what is said here in preparation.json
ROUNDING = 1e-6  # of float32 arithmetic, in a range of 1


def write_outputs(collection: Collection, options: Options, fractions: tuple[float, float, float]) -> list[str]:
    """Write manifests, `preparation.json` and `data_card.md` from what the ledgers say. Returns notes.

    fractions: of the splits train, validation and test, for cases that come without.
    """
    done: dict[str, list[dict]] = defaultdict(list)
    for volume, line in sorted(read_ledgers(options.output).items()):
        if line["status"] != FAILED and (options.output / volume).is_file():
            done[line["case"]].append(line)
    lines = [line for case in collection.cases for line in done[case.folder]]
    written = Written(options.output, draw_splits(collection, fractions))
    for line in lines:
        written.add(line["case"], line["volume"].removesuffix(".nii.gz"), line["volume"])
    notes = write_manifests(collection, written)
    profile = DataProfile.from_summaries(line["summary"] for line in lines if line.get("summary"))
    if collection.kind == "m3d" and lines and not profile.modalities:  # its pictures don't say, but all of M3D is CT
        profile = replace(profile, modalities=PUBLISHED_PROFILE.modalities)
    write_preparation(
        options.output,
        options.config,
        profile,
        version=VERSION,
        source=collection.kind,
        dtype=options.dtype,
        max_abs_error=PREPARED_ERROR[options.dtype] + ROUNDING,
        max_abs_error_meaning="largest difference from the float32 result, whose range is 0..1",
        reading=options.changed_reading,
        cases=len(written.volumes),
        volumes=len(lines),
        bytes=sum(line.get("bytes", 0) for line in lines),
        cases_by_split=dict(Counter(written.splits[case] for case in written.volumes)),
        split_by=split_rule(collection),
    )
    checks = (f"every volume was read whole; pipeline: {options.config}, stored as {options.dtype}",)
    write_data_card(collection, written, profile, fractions, checks, notes)
    return notes


def write_manifests(collection: Collection, written: Written) -> list[str]:
    """Write `M3D_Cap.json`, `M3D_VQA_*.csv`, and as far as there is something for them the tables of `_keep_table`.

    Volumes and texts are there already. Returns notes.
    """
    output, notes = written.output, []
    if collection.manifest is not None:
        _copy_manifest(collection.manifest, output / CAPTION_MANIFEST)
    else:
        notes += _write_manifest(collection.cases, written)
    notes += _write_questions(collection, written)
    images = {image: name for image, name in written.images.items() if image in collection.labels}
    labels = list(dict.fromkeys(label for image in images for label in collection.labels[image]))
    rows = [[name, *(collection.labels[i].get(label, "") for label in labels)] for i, name in images.items()]
    _keep_table(output / LABELS_TABLE, [REQUIRED_COLUMNS[0], *labels], rows)
    _keep_table(output / "unmatched.csv", ["name", "reason"], [*collection.unmatched, *collection.left_out])
    patients = [[case.folder, case.group] for case in collection.cases if case.group and case.folder in written.volumes]
    several = len({patient for _, patient in patients}) < len(patients)
    _keep_table(output / PATIENTS_TABLE, ["case", "patient"], patients if several else [])
    return notes


def _copy_manifest(source: Path, target: Path) -> None:
    """Bring the manifest along. A copy that is newer than it (renamed since, say) stays."""
    if not target.is_file() or target.stat().st_mtime_ns < source.stat().st_mtime_ns:
        write_bytes(target, source.read_bytes())


def _write_manifest(cases: list[Case], written: Written) -> list[str]:
    """One entry for every volume that has a report."""
    output = written.output
    manifest: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    without = 0
    for case in cases:
        volumes, text = written.volumes.get(case.folder, []), f"{case.folder}/text.txt"
        if not (output / text).is_file():
            without += len(volumes)
            continue
        manifest[written.splits[case.folder]] += [
            {"image": f"{output.name}/{volume}", "text": f"{output.name}/{text}"} for volume in volumes
        ]
    _write_if_changed(output / CAPTION_MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")
    notes = [f"{without} volumes have no report, and are not in {CAPTION_MANIFEST}"] if without else []
    empty = [split for split in SPLITS if not manifest[split]]
    return notes + ([f"{CAPTION_MANIFEST} has nothing under {' and '.join(empty)}"] if empty else [])


def _write_questions(collection: Collection, written: Written) -> list[str]:
    """Questions with choices to M3D_VQA_<split>.csv, the others to M3D_VQA_open_<split>.csv.

    Both tables of the train split are there even if they are empty, because fine-tuning reads them. Nothing is written
    for M3D, whose tables come with it.
    """
    if collection.kind == "m3d":
        return []
    kinds = {True: "M3D_VQA_{}.csv", False: "M3D_VQA_open_{}.csv"}  # whether there are choices
    tables: dict[str, list[list[str]]] = {
        kind.format(name): [] for kind in kinds.values() for name in TABLE_NAMES.values()
    }
    left_out = 0
    for split, questions in collection.questions.items():
        for question in questions:
            if question.image not in written.images:
                left_out += 1
                continue
            name = TABLE_NAMES[split or written.splits[written.cases[question.image]]]
            cells = _cells(question, written.images[question.image])
            tables[kinds[bool(question.choices)].format(name)].append(cells)
    for name, rows in tables.items():
        _keep_table(written.output / name, COLUMNS, rows, always=name.endswith("_train.csv"))
    return [f"{left_out} questions are left out: their volume is not prepared"] if left_out else []


def _keep_table(path: Path, heading: Sequence[str], rows: Sequence[Sequence], always: bool = False) -> None:
    """Let a table be there, or, where it would be empty, not: one of an earlier run may say what is no longer true."""
    if not rows and not always:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heading, *rows])
    _write_if_changed(path, text.getvalue())


def _cells(question: Question, image: str) -> list[str]:
    choices = [choice or "NA" for choice in question.choices] or ["NA"] * len(CHOICE_LETTERS)
    return [image, question.question_type, question.question, *choices, question.answer, question.answer_choice]


def _write_if_changed(path: Path, text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")  # names of folders need not be UTF-8
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def write_mapping(collection: Collection, path: Path) -> None:
    """Which case stands for which files: a CSV that only this user can read. It belongs to the key, not to the data."""
    with atomic_path(path, 0o600) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "source"])
        for case in collection.cases:
            writer.writerows([case.folder, os.path.relpath(item.path, collection.root)] for item in case.items)
