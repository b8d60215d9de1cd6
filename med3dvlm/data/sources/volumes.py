"""A tree of any volumes: files that `load_volume` reads, folders of slices, and DICOM as hospitals export it.

Where there is no list that says what belongs together, folders do: files in one folder are one case (with its
`text.txt`), files directly in the input, or with a report of their own (`<name>.txt`), are a case each, and everything
below one folder of the input is one patient. DICOM goes by its headers (see `med3dvlm.data.sources.dicom`); where there
is any, names of folders may be those of patients, and every case is named by a keyed hash.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from med3dvlm.data.sources.base import (
    SPLIT_NAMES,
    Case,
    Collection,
    Item,
    SourceError,
    SourceOptions,
    file_name,
)
from med3dvlm.data.sources.dicom import dicom_cases, holds_dicom
from med3dvlm.data.sources.pseudonyms import pseudonyms

ENDINGS = (
    ".nii.gz", ".nii", ".hdr.gz", ".hdr", ".img.gz", ".img", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy", ".npz", ".zip",
)  # fmt: skip
SLICES = (".png", ".jpeg", ".jpg")
OTHER = (  # files that are not opened to see whether they are DICOM
    ".txt", ".json", ".csv", ".md", ".xml", ".pdf", ".html", ".log", ".tsv", ".xlsx", ".raw", ".zraw", ".bval", ".bvec",
)  # fmt: skip


def recognise(root: Path) -> bool:
    return root.is_dir() and next(_found(root), None) is not None


def read(root: Path, options: SourceOptions) -> Collection:
    """Raises SourceError where there is no volume."""
    found = list(_found(root))
    if not found:
        raise SourceError(f"{root}: holds no volume ({', '.join(ENDINGS)}, DICOM, folders of {', '.join(SLICES)})")
    scans = [path for path, dicom in found if dicom]
    files = [path for path, dicom in found if not dicom]
    cases, notes = [], []
    if scans:
        options = replace(options, hash_ids=True)
        cases, notes = dicom_cases(scans, root, options)
        pictures = [path for path in files if path.is_dir()]  # of a viewer on the disc, say
        files = [path for path in files if not path.is_dir()]
        notes += [f"{len(pictures)} folders of pictures beside the DICOM files are left out"] if pictures else []
    if files:
        cases += _file_cases(files, _common_folder(root, files), options)
    return Collection("volumes", root, cases, notes=notes)


def stem(path: Path) -> str:
    """The name without its ending."""
    name = path.name
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "") if not path.is_dir() else ""
    return name[: len(name) - len(ending)]


def _found(root: Path) -> Iterator[tuple[Path, bool]]:
    """(path, whether it is a file or zip of DICOM), in order. A folder of slices is one thing."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        known = {name for name in names if name.lower().endswith(ENDINGS)}
        if sum(name.lower().endswith(SLICES) for name in names) > 1:
            yield Path(folder), False
        for name in names:
            if name in known:
                head, ending, gz = name.partition(".img")
                if not (ending and f"{head}.hdr{gz}" in known):  # otherwise the header stands for both
                    path = Path(folder, name)
                    yield path, path.suffix.lower() == ".zip" and holds_dicom(path)
            elif not name.lower().endswith(SLICES + OTHER) and _is_dicom(os.path.join(folder, name)):
                yield Path(folder, name), True


def _is_dicom(path: str) -> bool:
    from med3dvlm.data.readers.dicom_header import is_dicom_file

    return is_dicom_file(path)


def _common_folder(root: Path, paths: list[Path]) -> Path:
    """The deepest folder that holds everything, so that `input/images/<patient>` is as good as `input/<patient>`."""
    parents = [path.parent for path in paths]
    return Path(os.path.commonpath(parents)) if len(paths) > 1 else root


def _split_and_group(path: Path, top: Path) -> tuple[str, str]:
    """The split that the first folder names, if it does, and the folder of the patient."""
    parts = path.relative_to(top).parts
    split = SPLIT_NAMES.get(parts[0].lower(), "") if len(parts) > 1 else ""
    parts = parts[1:] if split else parts
    return split, parts[0] if len(parts) > 1 else stem(path)


def _file_cases(files: list[Path], top: Path, options: SourceOptions) -> list[Case]:
    together: dict[tuple[Path, Path | None], list[Path]] = defaultdict(list)
    for path in files:
        own = path.with_name(f"{stem(path)}.txt")
        parts = path.relative_to(top).parts
        alone = own.is_file() or len(parts) == 1 or (len(parts) == 2 and parts[0].lower() in SPLIT_NAMES)
        folder = path.with_name(stem(path)) if alone else path.parent
        together[folder, own if own.is_file() else path.parent / "text.txt"].append(path)
    names = pseudonyms(options) if options.hash_ids else None
    cases = []
    for (folder, text), paths in together.items():
        split, group = _split_and_group(paths[0], top)
        below = folder.relative_to(top).parts or (top.name,)
        target = names("case", str(folder)) if names else "/".join(file_name(part) for part in below)
        called = _distinct(paths, bool(names))
        items = tuple(Item(path, name) for path, name in zip(paths, called, strict=True))
        cases.append(Case(target, items, text_file=text, group=group, split=split, hidden=bool(names)))
    return cases


def _distinct(paths: list[Path], numbered: bool) -> list[str]:
    """Names for the volumes of a case; equal ones (a.nii.gz, a.nrrd) get the ending too."""
    if numbered:
        return [f"volume_{number:03d}" for number in range(1, len(paths) + 1)]
    names = [file_name(stem(path)) for path in paths]
    count = Counter(names)
    return [name if count[name] == 1 else file_name(path.name) for name, path in zip(names, paths, strict=True)]
