"""What an earlier run left: results that are finished, and temporary files of writing that was interrupted."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.volume import prepared_header


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed run left in a folder; no other process works in it."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def is_finished(target: Path, sources: Iterable[Path], config: PreprocessConfig, dtype: str) -> bool:
    """Whether `target` was prepared in this way after the last change of `sources`, files or folders.

    Writing is atomic, so that the header stands for the file.
    """
    try:
        made = target.stat().st_mtime_ns
        if max(path.stat().st_mtime_ns for source in sources for path in _everything(source)) > made:
            return False
    except OSError:
        return False
    return prepared_header(target) == {"shape": config.size, "dtype": dtype, "preparation": config.name}


def _everything(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            yield from (Path(folder, name) for name in (*folders, *names))
