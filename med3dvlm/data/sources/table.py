"""A list of volumes with reports, and of questions if there are any: CSV, TSV, XLSX, JSONL, or a JSON list.

One row a volume, or a question about a volume. Everything that is wrong with the list is said before anything is done.
"""

from collections import defaultdict
from pathlib import Path

from med3dvlm.data.sources.base import (
    CHOICES,
    Case,
    Collection,
    Item,
    Question,
    SourceError,
    SourceOptions,
    file_name,
    known_split,
    read_table,
)
from med3dvlm.data.sources.pseudonyms import Pseudonyms, pseudonyms
from med3dvlm.data.sources.volumes import stem

ENDINGS = (".csv", ".tsv", ".xlsx", ".jsonl", ".json")
# What a list may say -> the names under which it is looked for, case aside. `--columns` names others.
COLUMNS = {
    "image": ("image", "image path", "image_path", "path", "volume", "file"),
    "text": ("text", "report", "findings"),
    "split": ("split", "set"),
    "case": ("case", "case_id", "patient", "patient_id", "subject"),
    "question": ("question",),
    "question_type": ("question type", "question_type"),
    "answer": ("answer",),
    "answer_choice": ("answer choice", "answer_choice"),
    **{f"choice_{letter.lower()}": (f"choice {letter.lower()}", f"choice_{letter.lower()}") for letter in CHOICES},
}
SHOWN = 20  # problems in an error


def recognise(root: Path) -> bool:
    return root.is_file() and root.name.lower().endswith(ENDINGS)


def read(root: Path, options: SourceOptions) -> Collection:
    """root: the table; paths in it are absolute or relative to its folder.

    Raises SourceError that lists the problems: columns, missing files, unknown splits, one case in two splits, two
    volumes of one name, a volume with two reports, questions without an answer.
    """
    rows = read_table(root)
    columns = _columns(root, rows, options.columns)
    problems: list[str] = []
    volumes: dict[str, dict[str, str]] = {}  # image -> what its rows say
    rows = [{key: row.get(name, "").strip() for key, name in columns.items()} for row in rows]
    for number, cells in enumerate(rows, start=1):
        _check_row(f"row {number}", cells, root, volumes, problems)
    problems += _divided_cases(volumes)
    names = pseudonyms(options) if options.hash_ids else None
    cases, images = _cases(root, volumes, names, problems)
    collection = Collection("list", root.parent, cases)
    if "case" not in columns:
        collection.notes.append("no column names the patient: each image is taken for a patient of its own")
    for cells in rows:
        if cells.get("question") and cells["image"] in images:
            split = volumes[cells["image"]]["split"]
            collection.questions.setdefault(split, []).append(_question(cells, images[cells["image"]]))
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise SourceError(f"{root}: {len(problems)} problems:\n  " + "\n  ".join(problems[:SHOWN]) + more)
    if not cases:
        raise SourceError(f"{root}: lists no volume")
    return collection


def _columns(path: Path, rows: list[dict], named: dict[str, str]) -> dict[str, str]:
    """What a list may say -> the column that says it."""
    found = list(dict.fromkeys(key for row in rows for key in row))
    key_of = {name: key for key, names in COLUMNS.items() for name in names}
    named = {key_of.get(name, name): column for name, column in named.items()}
    unknown = sorted(set(named) - set(COLUMNS))
    if unknown:
        raise SourceError(f"--columns: {', '.join(unknown)} is none of {', '.join(COLUMNS)}")
    missing = [name for name in named.values() if name not in found]
    columns = {key: next((c for c in found if c.strip().lower() in names), None) for key, names in COLUMNS.items()}
    columns = {key: name for key, name in columns.items() if name is not None} | named
    if missing or "image" not in columns:
        wanted = ", ".join(missing) or f"image (or {', '.join(COLUMNS['image'][1:])})"
        raise SourceError(
            f"{path}: lacks the column {wanted}; it has {', '.join(found) or 'none'}. Name another with --columns"
        )
    return columns


def _check_row(where: str, cells: dict, root: Path, volumes: dict[str, dict], problems: list[str]) -> None:
    """Add what a row says to its volume, and what is wrong with it to the problems."""
    image = cells["image"]
    if not image:
        problems.append(f"{where}: names no image")
        return
    if image not in volumes:
        if not (root.parent / image).exists():
            problems.append(f"{where}: {image} does not exist")
        volumes[image] = {"text": "", "split": "", "case": "", "where": where}
    volume = volumes[image]
    try:
        cells = cells | {"split": known_split(cells["split"], where) if cells.get("split") else ""}
    except SourceError as error:
        problems.append(str(error))
        return
    for key in ("text", "split", "case"):
        if cells.get(key) and volume[key] and cells[key] != volume[key]:
            problems.append(f"{where}: {image} has another {key} than in {volume['where']}")
        volume[key] = volume[key] or cells.get(key, "")
    if cells.get("question"):
        choices = [cells.get(f"choice_{letter.lower()}", "") for letter in CHOICES]
        letter = cells.get("answer_choice", "")
        if not cells.get("answer"):
            problems.append(f"{where}: a question without an answer")
        elif any(choices) and (letter not in CHOICES or choices[CHOICES.index(letter)] != cells["answer"]):
            problems.append(f"{where}: answer_choice {letter!r} is not the choice {cells['answer']!r}")


def _divided_cases(volumes: dict[str, dict]) -> list[str]:
    """A case in two splits would let a model be tested on a patient that it learned from."""
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for volume in volumes.values():
        if volume["case"]:
            splits[volume["case"]].setdefault(volume["split"], volume["where"])
    return [
        f"{' and '.join(found.values())}: one case in the splits {' and '.join(split or 'none' for split in found)}"
        for found in splits.values()
        if len(found) > 1
    ]


def _cases(
    root: Path, volumes: dict[str, dict], names: Pseudonyms | None, problems: list[str]
) -> tuple[list[Case], dict[str, str]]:
    """The cases, and the result (without ending) of each image."""
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    texts: dict[str, set[str]] = defaultdict(set)
    for image, volume in volumes.items():
        group = volume["case"] or image
        together[group, volume["text"]].append(image)
        texts[group].add(volume["text"])
    cases, images, owners = [], {}, {}
    for (group, text), listed in together.items():
        first = volumes[listed[0]]
        folder = names("case", group) if names else file_name(first["case"] or stem(Path(group.replace("/", "_"))))
        if len(texts[group]) > 1:  # each report needs a folder
            folder += f"/{file_name(stem(Path(listed[0])))}" if not names else f"/{names('image', listed[0], 8)}"
        items = []
        for number, image in enumerate(listed, 1):
            name = f"volume_{number:03d}" if names else file_name(stem(Path(image)))
            if owners.setdefault(f"{folder}/{name}", image) != image:
                name = file_name(stem(Path(image.replace("/", "_"))))
            if owners.setdefault(f"{folder}/{name}", image) != image:
                problems.append(f"{volumes[image]['where']}: its result {folder}/{name} is also that of another row")
            images[image] = f"{folder}/{name}"
            items.append(Item(root.parent / image, name))
        cases.append(Case(folder, tuple(items), text=text or None, group=group, split=first["split"],
                          hidden=names is not None))  # fmt: skip
    return cases, images


def _question(cells: dict[str, str], image: str) -> Question:
    choices = tuple(cells.get(f"choice_{letter.lower()}", "") for letter in CHOICES)
    return Question(image, cells["question"], cells.get("answer", ""), cells.get("question_type", ""),
                    choices if any(choices) else (), cells.get("answer_choice", ""))  # fmt: skip
