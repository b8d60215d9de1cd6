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

from med3dvlm.data.readers import ENDINGS, SLICE_SUFFIXES, header_of
from med3dvlm.data.readers.dicom_header import is_dicom_file
from med3dvlm.data.sources.base import (
    SPLIT_NAMES,
    Case,
    Collection,
    Item,
    SourceError,
    SourceOptions,
    file_name,
)
from med3dvlm.data.sources.dicom import dicom_cases, first_folder, holds_dicom
from med3dvlm.data.sources.pseudonyms import pseudonyms

OTHER = (  # files that are not opened to see whether they are DICOM
    ".txt", ".json", ".csv", ".md", ".xml", ".pdf", ".html", ".log", ".tsv", ".xlsx", ".raw", ".zraw", ".bval", ".bvec",
)  # fmt: skip


def recognise(root: Path) -> bool:
    return root.is_dir() and next(_found(root), None) is not None


def read(root: Path, options: SourceOptions) -> Collection:
    """Raises SourceError where there is no volume."""
    found = list(_found(root))
    if not found:
        known = f"{', '.join(ENDINGS)}, DICOM, folders of {', '.join(SLICE_SUFFIXES)}"
        raise SourceError(f"{root}: holds no volume ({known})")
    scans = [path for path, dicom in found if dicom]
    files = [path for path, dicom in found if not dicom]
    if options.reports and not scans:
        raise SourceError(f"{root}: holds no DICOM, whose accession numbers --reports goes by; list the files instead")
    cases, notes = [], []
    if scans:
        options = replace(options, hash_ids=True)
        cases, notes = dicom_cases(scans, root, options)
        pictures = [path for path in files if path.is_dir()]  # of a viewer on the disc, say
        files = [path for path in files if not path.is_dir()]
        notes += [f"{len(pictures)} folders of pictures beside the DICOM files are left out"] if pictures else []
    if files:
        top = _top(root, files)
        if top != root:
            notes.append("all volumes lie below one folder: what lies in it is taken for patients, each by itself")
        cases += _file_cases(files, root, top, _patients(cases, root), options)
    return Collection("volumes", root, cases, notes=notes)


def stem(path: Path) -> str:
    """The name without its ending."""
    name = path.name
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "") if not path.is_dir() else ""
    return name[: len(name) - len(ending)]


def _found(root: Path) -> Iterator[tuple[Path, bool]]:
    """(path, whether it is a file or zip of DICOM), in order. A folder of slices is one thing.

    Links to folders are followed, but no folder is read twice.
    """
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        known = {name for name in names if name.lower().endswith(ENDINGS)}
        if sum(name.lower().endswith(SLICE_SUFFIXES) for name in names) > 1:
            yield Path(folder), False
        for name in names:
            if name in known:
                path = Path(folder, name)
                header = header_of(path)
                if header is None or header.name not in known:  # otherwise the header stands for both
                    yield path, path.suffix.lower() == ".zip" and holds_dicom(path)
            elif not name.lower().endswith(SLICE_SUFFIXES + OTHER) and is_dicom_file(os.path.join(folder, name)):
                yield Path(folder, name), True


def _top(root: Path, paths: list[Path]) -> Path:
    """The folder of the patients: the deepest that holds everything, as `input/images/<patient>` is quite usual.

    Not one with a report, which is a case, nor one that is named like a split.
    """
    top = root
    common = os.path.commonpath([path.parent for path in paths]) if len(paths) > 1 else root
    for part in Path(common).relative_to(root).parts:
        if part.lower() in SPLIT_NAMES or (top / part / "text.txt").is_file():
            break
        top = top / part
    return top


def _patients(cases: list[Case], root: Path) -> dict[str, str]:
    """First folder -> patient, where DICOM in it is of one: other files beside it are that patient's, too."""
    found: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        for item in case.items:
            for file in item.files or (item.path,):
                found[first_folder(file, root)[1]].add(case.group)
    return {folder: groups.pop() for folder, groups in found.items() if folder and len(groups) == 1}


def _file_cases(
    files: list[Path], root: Path, top: Path, patients: dict[str, str], options: SourceOptions
) -> list[Case]:
    """The cases of files that are no DICOM. patients: first folder below the root -> patient, as far as it is known."""
    together: dict[tuple[Path, Path | None], list[Path]] = defaultdict(list)
    for path in files:
        own = path / "text.txt" if path.is_dir() else path.with_name(f"{stem(path)}.txt")
        parts = path.relative_to(top).parts
        alone = own.is_file() or len(parts) == 1 or (len(parts) == 2 and parts[0].lower() in SPLIT_NAMES)
        folder = path.with_name(stem(path)) if alone else path.parent
        together[folder, own if own.is_file() else path.parent / "text.txt"].append(path)
    names = pseudonyms(options) if options.hash_ids else None
    cases = []
    for (folder, text), paths in together.items():
        split, group = first_folder(paths[0], top)
        group = group or stem(paths[0])
        if names:
            target = names("case", str(folder.relative_to(root)))
            called = [names("image", str(path.relative_to(root)), 8) for path in paths]
            group = patients.get(first_folder(paths[0], root)[1]) or names("patient", group)
        else:
            target = "/".join(file_name(part) for part in folder.relative_to(top).parts or (top.name,))
            called = _distinct(paths)
        items = tuple(Item(path, name) for path, name in zip(paths, called, strict=True))
        cases.append(Case(target, items, text_file=text, group=group, split=split, hidden=bool(names)))
    return cases


def _distinct(paths: list[Path]) -> list[str]:
    """Names for the volumes of a case; equal ones (a.nii.gz, a.nrrd) get the ending too."""
    names = [file_name(stem(path)) for path in paths]
    count = Counter(names)
    return [name if count[name] == 1 else file_name(path.name) for name, path in zip(names, paths, strict=True)]
