"""The forms of input that preparation takes. Each has a module with `recognise(root)` and `read(root, options)`."""

from collections import Counter
from pathlib import Path

from med3dvlm.data.sources import amos_mm, ct_rate, m3d, table, volumes
from med3dvlm.data.sources.base import Collection, SourceError, SourceOptions

__all__ = ["SOURCES", "Collection", "SourceError", "SourceOptions", "collect", "recognise"]

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
        f"({', '.join(table.ENDINGS)}) or any volume (unpack archives first)"
    )


def collect(root: Path, kind: str, options: SourceOptions) -> Collection:
    """What an input holds; kind: a name of SOURCES, or "auto". Raises SourceError for what cannot be understood."""
    if not root.exists():
        raise SourceError(f"{root}: no such file or folder")
    collection = SOURCES[recognise(root) if kind == "auto" else kind].read(root, options)
    folders = Counter(case.folder for case in collection.cases)
    doubled = [folder for folder, count in folders.items() if count > 1]
    if doubled:
        raise SourceError(f"{root}: several cases would be written to {', '.join(doubled[:5])}; rename their folders")
    return collection
