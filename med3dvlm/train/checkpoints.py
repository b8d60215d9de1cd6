"""The checkpoint folders of a run: which are whole, and which are of an older run that wrote into the same folder."""

from __future__ import annotations

from pathlib import Path

COMPLETE = "complete"  # written into a checkpoint folder last: an interrupted one is never continued from


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run that were written to their end, by their steps."""
    folders = [file.parent for file in Path(output_dir).glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))


def set_aside(output_dir: str | Path, continued: str | Path | None) -> list[Path]:
    """Take the mark from the complete checkpoints that don't belong to the run that starts now; returns their folders.

    Else 'auto' would later take one of them, of whatever seed and data, for one of this run. Nothing else is touched.

    Args:
        continued: the checkpoint that the run goes on from, None for a fresh start. Where it lies in `output_dir`, it
            and those of fewer steps are the run's own.
    """
    older = complete_checkpoints(output_dir)
    places = [folder.resolve() for folder in older]
    if continued is not None and Path(continued).resolve() in places:
        older = older[places.index(Path(continued).resolve()) + 1 :]
    for folder in older:
        (folder / COMPLETE).unlink()
    return older
