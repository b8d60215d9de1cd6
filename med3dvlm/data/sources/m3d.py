"""A raw M3D-Cap tree: `{ct_case,ct_quizze}/<id>/<series>/<n>.png` and `<id>/text.txt`, with or without M3D_Cap.json."""

import os
from pathlib import Path

from med3dvlm.data.manifest import CAPTION_MANIFEST
from med3dvlm.data.sources.base import Case, Collection, SourceError, SourceOptions

SPLIT_FOLDERS = ("ct_case", "ct_quizze")


def raw_root(root: Path) -> Path:
    """The folder that holds `ct_case` and `ct_quizze`: the data set's repository has it one level down."""
    nested = not any((root / name).is_dir() for name in SPLIT_FOLDERS) and (root / "M3D_Cap").is_dir()
    return root / "M3D_Cap" if nested else root


def recognise(root: Path) -> bool:
    return any((raw_root(root) / name).is_dir() for name in SPLIT_FOLDERS)


def read(root: Path, options: SourceOptions) -> Collection:
    """Raises SourceError where there is no case. A case under both folders keeps to one split."""
    raw = raw_root(root)
    cases = [
        Case(f"{split}/{name}", raw=raw / split / name, text_file=raw / split / name / "text.txt", group=name)
        for split in SPLIT_FOLDERS
        if (raw / split).is_dir()
        for name in sorted(entry.name for entry in os.scandir(raw / split) if entry.is_dir())
    ]
    if not cases:
        raise SourceError(
            f"{root} holds no case: expected {' or '.join(SPLIT_FOLDERS)}, with one folder a case in it "
            "(unpack archives first)"
        )
    manifests = [path for path in (raw / CAPTION_MANIFEST, root / CAPTION_MANIFEST) if path.is_file()]
    return Collection("m3d", root, cases, manifest=manifests[0] if manifests else None)
