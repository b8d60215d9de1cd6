"""The volumes of a case: which there are, and what a reader is shown of them."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from med3dvlm.data.readers import BESIDE_SLICES, ENDINGS
from med3dvlm.data.sources.base import Case, Item, fold_name
from med3dvlm.data.sources.volumes import stem
from med3dvlm.data.volume import SLICE_SUFFIXES


def find_items(case: Case) -> Iterator[tuple[Item, str]]:
    """The volumes of a case, each with what is wrong with it, or ""."""
    yield from ((item, "") for item in case.items)
    if case.raw is None:
        return
    names: dict[str, str] = {}
    for path in sorted(Path(entry.path) for entry in os.scandir(case.raw) if _is_raw_series(entry)):
        name = fold_name(stem(path))
        if not name or name in names:
            clash = f"{name!r}, as that of {names[name]!r}" if name else "empty"
            yield Item(path, name), f"its name in ASCII is {clash}; rename the folder"
        else:
            names[name] = path.name
            yield Item(path, name), ""


def _is_raw_series(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".") and (entry.is_dir() or entry.name.lower().endswith(ENDINGS))


@contextmanager
def gathered(files: Sequence[Path]) -> Iterator[Path]:
    """A temporary folder with a numbered link to each file: a series by itself, wherever its files lie."""
    with tempfile.TemporaryDirectory(prefix="med3dvlm-") as folder:
        for number, file in enumerate(files, 1):
            os.symlink(file.absolute(), Path(folder, f"{number:06d}"))
        yield Path(folder)


def only_slices(path: Path) -> bool:
    """Whether a folder holds slices and nothing that could be another volume."""
    if not path.is_dir():
        return False
    names = [entry.name.lower() for entry in os.scandir(path) if not entry.name.startswith(".")]
    return any(name.endswith(SLICE_SUFFIXES) for name in names) and all(
        name.endswith(SLICE_SUFFIXES + BESIDE_SLICES) for name in names
    )
