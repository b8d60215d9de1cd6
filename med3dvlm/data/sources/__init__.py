"""The forms of input that preparation takes. Each has a module with `recognise(root)` and `read(root, options)`."""

from collections import Counter, defaultdict
from pathlib import Path

from med3dvlm.data.sources import amos_mm, ct_rate, m3d, table, volumes
from med3dvlm.data.sources.base import Case, Collection, SourceError, SourceOptions
from med3dvlm.data.sources.spreadsheet import TABLE_ENDINGS

__all__ = ["SOURCES", "Collection", "SourceError", "SourceOptions", "collect", "recognise", "refuse_overwriting"]

# In the order in which they are tried: a tree of any volumes fits everything.
SOURCES = {"m3d": m3d, "ct-rate": ct_rate, "amos-mm": amos_mm, "list": table, "volumes": volumes}


def recognise(root: Path) -> str:
    """The name of the form. Raises SourceError where the input is missing or fits none."""
    if not root.exists():
        raise SourceError(f"{root}: no such file or folder")
    for name, source in SOURCES.items():
        if source.recognise(root):
            return name
    raise SourceError(
        f"{root}: holds neither {' or '.join(m3d.SPLIT_FOLDERS)} (M3D), nor CT-RATE, AMOS-MM, a list "
        f"({', '.join(TABLE_ENDINGS)}) or any volume (unpack archives first)"
    )


def collect(root: Path, kind: str, options: SourceOptions) -> Collection:
    """What an input holds; kind: a name of SOURCES, or "auto". Raises SourceError for what cannot be understood."""
    if not root.exists():
        raise SourceError(f"{root}: no such file or folder")
    kind = recognise(root) if kind == "auto" else kind
    _refuse_unused(kind, options)
    collection = SOURCES[kind].read(root, options)
    folders = Counter(case.folder for case in collection.cases)
    doubled = [folder for folder, count in folders.items() if count > 1]
    if doubled:
        raise SourceError(f"{root}: several cases would be written to {', '.join(doubled[:5])}; give them other names")
    refuse_leakage(collection)
    return collection


def _refuse_unused(kind: str, options: SourceOptions) -> None:
    """Raise SourceError for an option that this form of input has no use for: what it asks for would not happen."""
    uses = {
        "questions": ("ct-rate",), "reports": ("volumes",), "hash_ids": ("list", "volumes"),
        "columns": ("list", *(["volumes"] if options.reports else [])),
    }  # fmt: skip
    for name, kinds in uses.items():
        if getattr(options, name) and kind not in kinds:
            raise SourceError(f"--{name} is for the input forms {' and '.join(kinds)}, and this one is {kind}")


def refuse_overwriting(collection: Collection, output: Path) -> None:
    """Raise SourceError where results would replace files of the input, or be taken for input the next time."""
    output = output.resolve()
    inside = collection.kind == "volumes" and output.is_relative_to(collection.root.resolve())
    for case in collection.cases:
        folder = output / case.folder
        originals = [item.path for item in case.items] + [path for path in (case.raw, case.text_file) if path]
        originals = {path.parent.resolve() / path.name for path in originals}  # not where a link leads
        results = {folder, folder / "text.txt", *(folder / f"{item.name}.nii.gz" for item in case.items)}
        inside = inside or bool(originals & results)
    if inside:
        raise SourceError(f"{output}: lies in the input, and would be mixed up with it; choose another --output_dir")


def refuse_leakage(collection: Collection) -> None:
    """Leave out, with a note, questions of one split about cases of another, where one of the two is for training.

    Raises SourceError where a patient has cases in several splits, or one file belongs to two patients.
    """
    places: dict[str, dict[str, str]] = defaultdict(dict)  # patient -> split -> a case
    owners: dict[Path, Case] = {}
    for case in collection.cases:
        group = case.group or case.folder
        places[group].setdefault(case.split, case.folder)
        for item in case.items:  # DICOM goes by its headers; there, path is a folder of any number of patients
            owner = case if item.dicom else owners.setdefault(item.path.resolve(), case)
            if (owner.group or owner.folder) != group:
                what = f"{case.folder}/{item.name}" if case.hidden else item.path
                raise SourceError(f"{what}: belongs to two patients, of {owner.folder} and of {case.folder}")
    divided = [found for found in places.values() if len(found) > 1]
    if divided:
        example = " and ".join(f"{folder} ({split or 'no split'})" for split, folder in divided[0].items())
        raise SourceError(
            f"{collection.root}: {len(divided)} patients have cases in several splits, such as {example}: a model "
            "would be tested on whom it learned from. Give each patient one split, or rename folders of different ones"
        )
    training = {f"{c.folder}/{item.name}": c.split == "train" for c in collection.cases if c.split for item in c.items}
    for split, questions in collection.questions.items():
        fit = [q for q in questions if not split or training.get(q.image, split == "train") == (split == "train")]
        if len(fit) < len(questions):
            collection.notes.append(
                f"{len(questions) - len(fit)} questions of the {split} split are about cases of another: left out"
            )
            collection.questions[split] = fit
