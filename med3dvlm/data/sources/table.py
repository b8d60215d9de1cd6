"""A list of volumes with reports, and of questions if there are any: CSV, TSV, XLSX, JSONL, or a JSON list.

One row a volume, or a question about a volume. Everything that is wrong with the list is said before anything is done.
"""

import os
from collections import defaultdict
from pathlib import Path

from med3dvlm.data.manifest import CHOICE_LETTERS
from med3dvlm.data.sources.base import (
    Case,
    Collection,
    Item,
    Question,
    SourceError,
    SourceOptions,
    file_name,
    known_split,
)
from med3dvlm.data.sources.pseudonyms import Pseudonyms, pseudonyms
from med3dvlm.data.sources.spreadsheet import TABLE_ENDINGS, find_columns, read_table
from med3dvlm.data.sources.volumes import stem

# What a list may say -> the names under which it is looked for, best first: a patient goes before a case, as patients
# are what must not be divided. `--columns` names others.
COLUMNS = {
    "image": ("image", "image path", "path", "file", "file name", "file path", "volume"),
    "text": ("report", "text", "findings"),
    "split": ("split", "set"),
    "case": ("patient", "patient id", "subject", "subject id", "case", "case id"),
    "question": ("question",),
    "question_type": ("question type",),
    "answer": ("answer",),
    "answer_choice": ("answer choice",),
    **{f"choice_{letter.lower()}": (f"choice {letter.lower()}",) for letter in CHOICE_LETTERS},
}
NO_CHOICE = "NA"
SHOWN = 20  # problems in an error


def recognise(root: Path) -> bool:
    return root.is_file() and root.name.lower().endswith(TABLE_ENDINGS)


def read(root: Path, options: SourceOptions) -> Collection:
    """root: the table; paths in it are absolute or relative to its folder.

    Raises SourceError that lists the problems: columns, missing files, unknown splits, one case in two splits, two
    volumes of one name, a volume with two reports, questions without an answer.
    """
    table = read_table(root)
    if not table:
        raise SourceError(f"{root}: lists no volume")
    columns = find_columns(root, table, COLUMNS, options.columns, ("image",))
    problems: list[str] = []
    volumes: dict[str, dict[str, str]] = {}  # image -> what its rows say
    rows = [_cells({key: row.get(name, "") for key, name in columns.items()}, root.absolute().parent) for row in table]
    for number, cells in enumerate(rows, start=1):
        _check_row(f"row {number}", cells, root, volumes, problems)
    _refuse(root, problems + _divided_cases(volumes))
    names = pseudonyms(options) if options.hash_ids else None
    cases, images = _cases(root, volumes, names)
    collection = Collection("list", root.parent, cases)
    if "case" not in columns:
        collection.notes.append("no column names the patient: each image is taken for a patient of its own")
    unread = [name for name in dict.fromkeys(name for row in table for name in row) if name not in columns.values()]
    if unread:
        collection.notes.append(f"columns that are not read: {', '.join(unread)} (--columns gives them a meaning)")
    for cells in rows:
        if cells.get("question"):
            split = volumes[cells["image"]]["split"]
            collection.questions.setdefault(split, []).append(_question(cells, images[cells["image"]]))
    return collection


def _refuse(root: Path, problems: list[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise SourceError(f"{root}: {len(problems)} problems:\n  " + "\n  ".join(problems[:SHOWN]) + more)


def _cells(cells: dict[str, str], folder: Path) -> dict[str, str]:
    """A row in one spelling: a file has one name, a report one line, an answer its words and its letter."""
    cells["image"] = _one_name(cells["image"], folder)
    cells["text"] = " ".join(cells.get("text", "").split())
    texts = {letter: cells.get(f"choice_{letter.lower()}", "") for letter in CHOICE_LETTERS}
    texts = {letter: text for letter, text in texts.items() if text not in ("", NO_CHOICE)}
    letters = {text: letter for letter, text in reversed(texts.items())}
    answer, letter = cells.get("answer", ""), cells.get("answer_choice", "") if texts else ""
    if letter not in texts:  # missing, or the words of the choice
        letter = letters.get(letter, letter) or letters.get(answer, answer if answer in texts else "")
    if answer not in letters and answer in ("", letter):  # missing, or the letter
        answer = texts.get(letter, "")
    choices = {f"choice_{letter.lower()}": texts.get(letter, "") for letter in CHOICE_LETTERS}
    return cells | choices | {"answer": answer, "answer_choice": letter}


def _one_name(image: str, folder: Path) -> str:
    """One name for one file: relative to the list where it lies below it; Windows may have written it."""
    if not image:
        return ""
    if "\\" in image and not os.path.exists(folder / image):
        image = image.replace("\\", "/")
    path = Path(os.path.normpath(image))
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _check_row(where: str, cells: dict, root: Path, volumes: dict[str, dict], problems: list[str]) -> None:
    """Add what a row says to its volume, and what is wrong with it to the problems."""
    image = cells["image"]
    if not image:
        problems.append(f"{where}: names no image")
        return
    if image not in volumes:
        if not os.path.exists(root.parent / image):  # false, too, for what can't be a name
            problems.append(f"{where}: {image[:200]} does not exist")
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
    letter, answer = cells["answer_choice"], cells["answer"]
    if cells.get("question"):
        choices = [cells[f"choice_{letter.lower()}"] for letter in CHOICE_LETTERS]
        if not answer:
            problems.append(f"{where}: a question without an answer")
        elif any(choices) and (letter not in CHOICE_LETTERS or choices[CHOICE_LETTERS.index(letter)] != answer):
            problems.append(f"{where}: answer_choice {letter!r} is not the choice {answer!r}")
    elif answer:
        problems.append(f"{where}: an answer without a question")


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


def _cases(root: Path, volumes: dict[str, dict], names: Pseudonyms | None) -> tuple[list[Case], dict[str, str]]:
    """The cases, and the result (without ending) of each image. Raises SourceError where two would be one."""
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    texts: dict[str, set[str]] = defaultdict(set)
    for image, volume in volumes.items():
        group = volume["case"] or image
        together[group, volume["text"]].append(image)
        texts[group].add(volume["text"])
    cases, images, owners, problems = [], {}, {}, []
    for (group, text), listed in together.items():
        first = volumes[listed[0]]
        folder = names("case", group) if names else file_name(first["case"] or stem(Path(group.replace("/", "_"))))
        patient = folder if names else group
        if len(texts[group]) > 1:  # each report needs a folder
            folder += f"/{file_name(stem(Path(listed[0])))}" if not names else f"/{names('image', listed[0], 8)}"
        items = []
        for image in listed:
            name = names("image", image, 8) if names else file_name(stem(Path(image)))
            if owners.setdefault(f"{folder}/{name}", image) != image:
                name = file_name(stem(Path(image.replace("/", "_"))))
            if owners.setdefault(f"{folder}/{name}", image) != image:
                problems.append(f"{volumes[image]['where']}: its result {folder}/{name} is also that of another row")
            images[image] = f"{folder}/{name}"
            items.append(Item(root.parent / image, name))
        cases.append(Case(folder, tuple(items), text=text or None, group=patient, split=first["split"],
                          hidden=names is not None))  # fmt: skip
    _refuse(root, problems)
    return cases, images


def _question(cells: dict[str, str], image: str) -> Question:
    choices = tuple(cells[f"choice_{letter.lower()}"] for letter in CHOICE_LETTERS)
    return Question(image, cells["question"], cells["answer"], cells.get("question_type", "").removesuffix(".0"),
                    choices if any(choices) else (), cells["answer_choice"])  # fmt: skip
