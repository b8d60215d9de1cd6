"""Find DICOM files and sort their planes into series, stacks of one orientation, and volumes of one point in time."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from med3dvlm.data.geometry import slice_grid
from med3dvlm.data.readers.base import PICK_FRAME, SeriesInfo, VolumeError
from med3dvlm.data.readers.dicom_header import NO_PIXELS, VOLUME_TAGS, is_dicom_file
from med3dvlm.data.readers.dicom_planes import Plane, read_planes

NUMBER = re.compile(r"[-+]?\d{1,12}(\.\d*)?(e[-+]?\d{1,2})?", re.ASCII)
IMAGE_TYPES = ("ImageType", "FrameType")
IMAGE_WORDS = frozenset(  # of these two tags, as the standard and the vendors use them; anybody may add others
    "ORIGINAL DERIVED PRIMARY SECONDARY MIXED AXIAL CORONAL SAGITTAL OBLIQUE LOCALIZER SCOUT VOLUME MPR MIP MINIP MEAN "
    "PROJECTION RESAMPLED REFORMATTED AVERAGE SUBTRACTION ADDITION DIVISION NONE OTHER STATIC DYNAMIC GATED "
    "ATTENUATION EMISSION TRANSMISSION M P R I MAGNITUDE PHASE REAL IMAGINARY COMPLEX W F FF IP OP WATER FAT "
    "FAT_FRACTION IN_PHASE OUT_PHASE OPP_PHASE NORM ND DIS2D DIS3D MOSAIC FFE M_FFE P_FFE M_SE SE M_IR T1 T2 "
    "T2_STAR T1_MAP T2_MAP DIFFUSION ADC TRACEW TENSOR FA EADC ISOTROPIC ANISOTROPIC PERFUSION ANGIO TIME "
    "MONOENERGETIC IODINE VIRTUAL_NON_CONTRAST HU".split()
)
SAME_PLACE = 0.01  # mm between slices that lie at the same position
SAME_DIRECTION = 0.002  # difference of direction cosines within a stack


@dataclass(frozen=True)
class Volume:
    """Planes of one point in time, echo, ... in the order of their positions; `label` says which."""

    label: str
    planes: list[Plane]


@dataclass(frozen=True)
class Stack:
    """What the listing shows as one series: planes of one series with the same size, spacing and orientation."""

    reason: str
    volumes: list[Volume]

    @property
    def first(self) -> Plane:
        return self.volumes[0].planes[0]

    @property
    def slices(self) -> int:
        return max(len(volume.planes) for volume in self.volumes)


@dataclass(frozen=True)
class Found:
    """Stacks in the order of the listing, names of files that look like DICOM and cannot be parsed, and warnings."""

    stacks: list[Stack]
    broken: list[str]
    warnings: tuple[str, ...] = ()

    @property
    def numbers(self) -> list[int | None]:
        """The number of each stack: SeriesNumber if it tells all usable ones apart, else 1, 2, ..."""
        given = [stack.first.series_number for stack in self.stacks]
        usable = [number for number, stack in zip(given, self.stacks, strict=True) if not stack.reason]
        if min(usable, default=0) > 0 and len(set(usable)) == len(usable):
            return [number if number > 0 else None for number in given]
        return list(range(1, len(given) + 1))

    @property
    def damaged(self) -> str:
        """Which files cannot be parsed; empty if none."""
        more = f" and {len(self.broken) - 3} more" if len(self.broken) > 3 else ""
        return f"DICOM files that cannot be parsed: {', '.join(self.broken[:3])}{more}" if self.broken else ""


def dicom_files(folder: Path) -> Iterator[Path]:
    """All DICOM files below a folder, whatever their names."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from filter(is_dicom_file, (Path(root, name) for name in sorted(names)))


def find_stacks(path: Path) -> Found:
    """The stacks in a folder, or those of the series that a single file belongs to.

    One slice of a series stands for it: the files of the same series in its folder are read with it.
    Raises:
        VolumeError: nothing there is DICOM, or the single file cannot be parsed.
    """
    if path.is_dir():
        planes, broken = _read_all(dicom_files(path))
        if not planes and not broken:
            raise VolumeError(f"{path}: holds no DICOM files")
        return Found(sort_planes(planes), broken)
    planes = read_planes(path)
    if not planes:
        raise VolumeError(f"{path}: is a DICOMDIR, a table of contents; give the folder it lies in")
    first = planes[0]
    if first.reason or len(planes) > 1 or not first.series:
        return Found(sort_planes(planes), [])
    beside = [file for file in sorted(path.parent.iterdir()) if file != path and is_dicom_file(file)]
    others, broken = _read_all(beside)
    others = [plane for plane in others if plane.series == first.series and not plane.reason]
    stack = next(
        stack
        for stack in sort_planes([first, *others])
        if any(first is plane for volume in stack.volumes for plane in volume.planes)
    )
    count = sum(len(volume.planes) for volume in stack.volumes)
    note = f"{path.name} is one slice of a series; its {count} files in this folder were read"
    return Found([stack], broken, (note,) if count > 1 else ())


def _read_all(files: Iterable[Path]) -> tuple[list[Plane], list[str]]:
    planes, broken = [], []
    for file in files:
        try:
            planes += read_planes(file)
        except VolumeError:
            broken.append(file.name)  # reported with the series that is read, and in the listing
    slices = {plane.series for plane in planes if not plane.reason}
    cut = [plane for plane in planes if plane.reason == NO_PIXELS and plane.series in slices]  # among its slices
    return [plane for plane in planes if plane not in cut], broken + [plane.path.name for plane in cut]


def sort_planes(planes: list[Plane]) -> list[Stack]:
    """Group planes into stacks, in the order of series number, series and first file."""
    series: dict[tuple, list[list[Plane]]] = {}
    for plane in planes:
        stacks = series.setdefault((plane.series_number, plane.series, plane.modality, plane.reason, plane.shape), [])
        fitting = next((stack for stack in stacks if _parallel(stack[0], plane)), None)
        if fitting is None:
            stacks.append([plane])
        else:
            fitting.append(plane)
    return [
        Stack(stack[0].reason, [Volume("", stack)] if stack[0].reason else split_volumes(stack))
        for _, stacks in sorted(series.items(), key=lambda item: item[0])
        for stack in stacks
    ]


def _parallel(one: Plane, other: Plane) -> bool:
    if one.reason:
        return True
    return bool(
        np.allclose(one.along, other.along, rtol=0, atol=SAME_DIRECTION)
        and np.allclose(one.spacing, other.spacing, rtol=1e-3, atol=0)
    )


def heights(planes: list[Plane]) -> np.ndarray:
    """mm along the normal of the first plane: cross product of the directions in which columns and rows grow."""
    return np.array([plane.position for plane in planes]) @ np.cross(*planes[0].along)


def split_volumes(planes: list[Plane]) -> list[Volume]:
    """Split a stack in which positions repeat, by the fewest header values that tell the repetitions apart.

    Where no value does, but each position comes equally often, the n-th of each (by InstanceNumber) makes volume n.
    Copies of one instance stay together; so do repetitions that nothing tells apart.
    """
    at = heights(planes)
    order = sorted(range(len(planes)), key=lambda n: (at[n], planes[n].number, str(planes[n].path)))
    planes = [planes[n] for n in order]
    places = np.concatenate([[0], np.cumsum(np.diff(at[order]) > SAME_PLACE)])  # number of the position of each plane
    images = {}  # instance -> index of its first copy
    for n, plane in enumerate(planes):
        images.setdefault((plane.instance, plane.index), n)
    unique = sorted(images.values())
    stacks = {planes[n].key[0] for n in unique}
    if len({places[n] for n in unique}) == len(unique) and len(stacks) == 1:
        return [Volume("", planes)]
    labels = _telling_apart(planes, places, unique) or _by_turns(planes, places, unique)
    if labels is None:
        return [Volume("", planes)]
    volumes: dict[tuple, list[Plane]] = {}
    for plane in planes:
        volumes.setdefault(labels[images[plane.instance, plane.index]], []).append(plane)
    return [Volume(_text(label), volumes[label]) for label in sorted(volumes, key=_in_order)]


def _telling_apart(planes: list[Plane], places, unique: list[int]) -> dict[int, tuple] | None:
    """A label for each index of `unique`, made of (tag, value) pairs, such that no place repeats within a label."""
    tags = range(len(VOLUME_TAGS))
    varying = [t for t in tags if len({planes[n].key[t] for n in unique}) > 1]
    best = None
    for count in (1, 2):
        for chosen in combinations(varying, count):
            labels = {n: tuple((VOLUME_TAGS[t], planes[n].key[t]) for t in chosen) for n in unique}
            seen = {(labels[n], places[n]) for n in unique}
            mixed = len({(labels[n], planes[n].key[0]) for n in unique}) > len(set(labels.values()))  # two StackIDs
            if len(seen) == len(unique) and not mixed:
                if best is None or len(set(labels.values())) < len(set(best.values())):
                    best = labels
        if best is not None:
            return best
    return None


def _by_turns(planes: list[Plane], places, unique: list[int]) -> dict[int, tuple] | None:
    turns: dict[int, list[int]] = {}
    for n in unique:  # sorted by place, then InstanceNumber
        turns.setdefault(places[n], []).append(n)
    numbers = {(places[n], planes[n].number) for n in unique}
    if len({len(turn) for turn in turns.values()}) > 1 or len(numbers) < len(unique):
        return None
    return {n: (("by InstanceNumber", str(index)),) for turn in turns.values() for index, n in enumerate(turn)}


def _text(label: tuple) -> str:
    """Numbers and known words of image types are shown; other texts could be anything that somebody typed."""
    shown = (
        (tag, _image_type(value) if tag in IMAGE_TYPES else value if NUMBER.fullmatch(value) else "")
        for tag, value in label
    )
    return ", ".join(f"{tag} {value}".rstrip() for tag, value in shown)


def _image_type(value: str) -> str:
    r"""ORIGINAL\PRIMARY\M, with "another image type" for all that is in no vocabulary."""
    words = re.findall(r"\w+", value)
    unknown = not IMAGE_WORDS.issuperset(words)
    return "\\".join([word for word in words if word in IMAGE_WORDS] + ["another image type"] * unknown)


def _in_order(label: tuple) -> list:
    """Numbers by size, before texts."""
    return [(0, float(value), "") if NUMBER.fullmatch(value) else (1, 0.0, value) for _, value in label]


def describe(number: int | None, stack: Stack) -> SeriesInfo:
    """The line of the listing for a stack."""
    first, grid, notes = stack.first, None, []
    if not stack.reason:
        at = heights(stack.volumes[0].planes)
        at = at[np.concatenate([[True], np.diff(at) > SAME_PLACE])]
        grid = slice_grid(at) if len(at) > 1 else None
    if len(stack.volumes) > 1:
        notes.append(f"{len(stack.volumes)} volumes; {PICK_FRAME}")
    if grid and not grid.even:
        notes.append("uneven slice distances; needs resample=True (--resample)")
    return SeriesInfo(
        uid=first.series,
        number=number,
        modality=first.modality,
        slices=stack.slices,
        shape=(stack.slices, *first.shape),
        spacing=(grid.spacing if grid else 1.0, *first.spacing),
        usable=not stack.reason,
        reason=stack.reason or "; ".join(notes),
        description=first.description,
    )
