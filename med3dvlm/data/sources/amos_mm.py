"""AMOS-MM: abdomen CT in `imagesTr` and `imagesVa`, with reports and questions in two JSON files."""

import json
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

REPORTS, QUESTIONS = "report_generation_train_val.json", "vqa_train_val.json"
# The later folder wins: amos_7008, amos_7312 and amos_7333 lie in both, and belong to validation.
FOLDERS = {"imagesTr": "train", "imagesVa": "validation"}


def recognise(root: Path) -> bool:
    return any((root / name).is_file() for name in (REPORTS, QUESTIONS)) and any((root / f).is_dir() for f in FOLDERS)


def read(root: Path, options: SourceOptions) -> Collection:
    """Raises SourceError: no volume, or a json file with other keys than expected."""
    volumes, left_out = {}, []
    for folder, split in FOLDERS.items():
        for path in sorted((root / folder).glob("*.nii.gz")):
            if path.name in volumes:
                other = volumes[path.name][0].relative_to(root)
                left_out.append((str(other), f"also in {folder}, to which it belongs"))
            volumes[path.name] = (path, split)
    if not volumes:
        raise SourceError(f"{root}: holds no volume in {' or '.join(FOLDERS)}")
    reports = {}
    for _, name, item in _items(root / REPORTS):
        reports[name] = _findings(item, root / REPORTS)
    cases = [
        Case(f"{split}/{name.removesuffix('.nii.gz')}", (Item(path, name.removesuffix(".nii.gz")),),
             text=reports.get(name), group=name, split=split)
        for name, (path, split) in sorted(volumes.items())
    ]  # fmt: skip
    collection = Collection("amos-mm", root, cases, left_out=left_out)
    images = {f"{case.items[0].name}.nii.gz": f"{case.folder}/{case.items[0].name}" for case in cases}
    collection.add_unmatched(set(reports) - set(volumes), "reports have no volume here")
    collection.add_unmatched((c.items[0].name for c in cases if not c.text), "volumes have no report")
    unmatched = []
    for split, name, item in _items(root / QUESTIONS):
        if name in images:
            collection.questions.setdefault(split, []).append(_question(item, images[name], root / QUESTIONS))
        else:
            unmatched.append(name)
    collection.add_unmatched(unmatched, "questions have no volume here")
    return collection


def _items(path: Path):
    """(split, file name, item) for all items of a file; nothing where it is not there."""
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from error
    lists = [key for key in ("training", "validation") if isinstance(data, dict) and isinstance(data.get(key), list)]
    if not lists:
        found = ", ".join(data) if isinstance(data, dict) else type(data).__name__
        raise SourceError(f"{path}: lacks the lists training and validation; it has {found}")
    for key in lists:
        for item in data[key]:
            if not isinstance(item, dict) or not isinstance(item.get("image"), str):
                found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
                raise SourceError(f"{path}: an item of {key} lacks image; it has {found}")
            name = Path(item["image"]).name
            yield known_split(key, str(path)), name if name.endswith(".nii.gz") else f"{name}.nii.gz", item


def _findings(item: dict, path: Path) -> str:
    """The findings: a text, or one for each region."""
    findings = item.get("findings")
    if isinstance(findings, dict):
        findings = " ".join(text.strip() for text in findings.values() if isinstance(text, str) and text.strip())
    if not isinstance(findings, str):
        raise SourceError(f"{path}, {item['image']}: lacks findings; it has {', '.join(item)}")
    return " ".join(findings.split())


def _question(item: dict, image: str, path: Path) -> Question:
    missing = [key for key in ("question", "answer") if not isinstance(item.get(key), str)]
    if missing:
        raise SourceError(f"{path}, {item['image']}: lacks {' and '.join(missing)}; it has {', '.join(item)}")
    options = item.get("options") or {}
    if not isinstance(options, dict) or not all(k in CHOICE_LETTERS and isinstance(v, str) for k, v in options.items()):
        raise SourceError(f"{path}, {item['image']}: expected options A to D, found {options!r:.80}")
    answer, letter = item["answer"].strip(), ""
    if options:
        letter = answer if answer in options else next((k for k, v in options.items() if v == answer), "")
        if not letter:
            raise SourceError(f"{path}, {item['image']}: the answer {answer!r} is none of the options")
        answer = options[letter]
    choices = tuple(options.get(key, "") for key in CHOICE_LETTERS) if options else ()
    return Question(image, item["question"].strip(), answer, str(item.get("type", "")), choices, letter)
