"""Tables as people hand them over: CSV, TSV, Excel, JSON lines. All cells are text; what is not clear is an error."""

import csv
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from med3dvlm.data.sources.base import SourceError

TABLE_ENDINGS = (".csv", ".tsv", ".xlsx", ".jsonl", ".json")
DELIMITERS = ",;\t"  # Excel writes semicolons where a comma is the decimal mark


def read_table(path: Path, required: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """The rows of a `.csv`, `.tsv`, `.xlsx`, `.jsonl` or `.json` (list) table, without those that are all empty.

    Cells are text without spaces around it, "" where they are empty, missing, null or NaN. Line breaks stay.
    Raises SourceError: not readable, quotes or cells that don't fit, or without a required column; the message lists
    the columns that are there.
    """
    try:
        rows, found = _rows(path)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8, or as .xlsx") from error
    except (OSError, ValueError, csv.Error) as error:
        raise SourceError(f"{path}: cannot be read as a table ({error})") from error
    missing = [name for name in required if name not in found]
    if missing:
        what = f"the column{'s' * (len(missing) > 1)} {', '.join(missing)}"
        raise SourceError(f"{path}: lacks {what}; it has {', '.join(found) or 'none'}")
    return [row for row in rows if any(row.values())]


def find_columns(
    path: Path, rows: list[dict], usual: dict[str, tuple[str, ...]], named: dict[str, str], needed: tuple[str, ...]
) -> dict[str, str]:
    """What a table may say -> the column that says it.

    usual: key -> names by which it goes, best first; case, spaces and punctuation make no difference. named: as the
    user says: a key, or one of its usual names -> column. needed: keys that must be there.
    Raises SourceError, with the columns that are there.
    """
    found = list(dict.fromkeys(column for row in rows for column in row))
    known = {_plain(name): key for key, names in usual.items() for name in (key, *names)}
    unknown = sorted(name for name in named if _plain(name) not in known)
    if unknown:
        raise SourceError(f"--columns: {', '.join(unknown)} is none of {', '.join(usual)}")
    named = {known[_plain(name)]: column for name, column in named.items()}
    by_name = {_plain(column): column for column in reversed(found)}
    usually = {key: next((by_name[n] for n in map(_plain, names) if n in by_name), "") for key, names in usual.items()}
    columns = {key: column for key, column in usually.items() if column} | named
    lacking = [column for column in named.values() if column not in found]
    lacking += [f"{key} (or {', '.join(name for name in usual[key] if name != key)})" for key in needed
                if key not in columns]  # fmt: skip
    if lacking:
        have = ", ".join(found) or "none"
        raise SourceError(f"{path}: lacks the column {', '.join(lacking)}; it has {have}. Name another with --columns")
    return columns


def _plain(name: str) -> str:
    """A name as it is compared: PatientID, patient_id and Patient ID are the same."""
    return "".join(character for character in name.casefold() if character.isalnum())


def _rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return _csv_rows(path)
    values = _excel_values(path) if ending == ".xlsx" else _json_values(path, ending == ".jsonl")
    rows = []
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ValueError(f"row {number}: expected an object with names and values")
        rows.append({str(key).strip(): _cell(cell, f"row {number}, {key}") for key, cell in value.items()})
    return rows, list(dict.fromkeys(key for row in rows for key in row))


def _csv_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        delimiter = max(DELIMITERS, key=file.readline().count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)  # a stray quote must not swallow rows
        try:
            names = _once(name.strip() for name in next(reader, []))
            rows = []
            for cells in reader:
                if any(cells[len(names) :]):
                    raise ValueError(f"more cells than columns; texts with {delimiter!r} in them need quotes")
                cells += [""] * (len(names) - len(cells))
                rows.append({name: _cell(cell, name) for name, cell in zip(names, cells, strict=False) if name})
        except (csv.Error, ValueError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            raise ValueError(f"line {reader.line_num}: {error}") from error
    return rows, [name for name in names if name]


def _once(names: Iterable[str]) -> list[str]:
    names = list(names)
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"there are two columns {', '.join(twice)}")
    return names


def _json_values(path: Path, lines: bool) -> list:
    text = path.read_text(encoding="utf-8-sig")
    if lines:
        return list(_json_lines(text))
    values = json.loads(text)
    if not isinstance(values, list):
        raise ValueError("expected a list of objects")
    return values


def _json_lines(text: str) -> Iterator:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split within strings, too
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _excel_values(path: Path) -> list[dict]:
    import pandas

    try:
        return pandas.read_excel(path, dtype=str, na_filter=False).to_dict("records")
    except ImportError as error:
        raise SourceError(f"{path}: reading .xlsx needs `pip install openpyxl`; or save the table as .csv") from error
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error


def _cell(value, where: str) -> str:
    """A cell as text. Raises ValueError for a list or an object."""
    if isinstance(value, (list, dict)):
        raise ValueError(f"{where}: expected a text or a number, found a {type(value).__name__}")
    if isinstance(value, float) and value.is_integer():  # as pandas writes whole numbers beside missing ones
        value = int(value)
    text = "" if value is None else str(value).strip()
    return "" if text.lower() == "nan" else text
