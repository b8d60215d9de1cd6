"""Read a DICOM series: a folder, one file, or one enhanced multi-frame file.

Slices are ordered by their positions along the normal of their planes, and the distance between slices is the distance
between positions: SliceThickness and SpacingBetweenSlices are never looked at. Values are rescaled slice by slice.
MONOCHROME1 changes how values are shown, not the values.
"""

from pathlib import Path

import numpy as np

from med3dvlm.data.geometry import GeometryError, empty_turned, resample_slices, shear_slices, slice_grid
from med3dvlm.data.readers.base import (
    MOST_CHOICES,
    PICK_FRAME,
    Decoded,
    Reading,
    SeriesInfo,
    VolumeError,
    check_size,
    pick_frame,
)
from med3dvlm.data.readers.dicom_header import is_dicom_file
from med3dvlm.data.readers.dicom_pixels import read_values, stored_planes
from med3dvlm.data.readers.dicom_planes import Plane
from med3dvlm.data.readers.dicom_series import SAME_PLACE, Found, Stack, describe, dicom_files, find_stacks, heights

MAX_DRIFT = 1.0  # pixels by which slices may lie beside the normal through the first one
LISTING = "list_series (--list-series) shows them all"
RESAMPLE = "give resample=True (--resample)"


def looks_like_dicom(path) -> bool:
    """Whether a file begins as DICOM does, or a folder holds such a file at any depth, whatever its name."""
    path = Path(path)
    return any(dicom_files(path)) if path.is_dir() else is_dicom_file(path)


def list_dicom_series(path) -> list[SeriesInfo]:
    """Every series of a folder (or that of a file), usable or not, with the numbers that `Reading.series` takes.

    A series with images of several sizes or orientations appears once for each. `description` is the header's
    SeriesDescription, which may hold what a hospital wrote there: show it, don't log it.
    Raises:
        VolumeError: nothing there is DICOM.
    """
    found = find_stacks(Path(path))
    listing = [describe(number, stack) for number, stack in zip(found.numbers, found.stacks, strict=True)]
    for name in found.broken:
        reason = f"{name} cannot be parsed"
        listing.append(SeriesInfo("", None, "", 1, (1, 0, 0), (1.0, 1.0, 1.0), False, reason, damaged=True))
    return listing


def read_dicom(path, reading: Reading) -> Decoded:
    """Read the largest series of a folder, the one that `reading.series` names, or that of a file.

    Returns float32 values `[slice, row, column]` (HU for CT) with the affine of the positions.
    Raises:
        VolumeError: no usable series; several volumes and no `reading.frame`; slices missing, uneven or tilted and no
            `reading.resample`; different slices at one position; pixels truncated or not decodable; too large.
    """
    path = Path(path)
    found = find_stacks(path)
    stack, warnings = _choose(path, found, reading.series)
    planes, copies = _without_copies(_pick_volume(path, stack, reading.frame))
    check_size(path, (len(planes), *planes[0].shape), reading.max_voxels)
    try:
        array, affine, changes = _assembled(path, planes, reading, found.damaged)
    except GeometryError as error:
        raise VolumeError(f"{path}: {error}") from error
    return Decoded(
        array,
        affine,
        modality=planes[0].modality,
        units=planes[0].units,
        warnings=warnings + copies + changes + _notes(planes),
    )


def _assembled(
    path: Path, planes: list[Plane], reading: Reading, damaged: str
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Values `[k, j, i]`, affine, and what was changed to make a uniform grid of the planes."""
    changes = ()
    drift = _drift(planes)
    tilted = np.abs(drift).max() > MAX_DRIFT
    grid = slice_grid(heights(planes)) if len(planes) > 1 else None
    if not reading.resample:
        _check_stack(path, planes, grid, drift if tilted else None, damaged)
    affine = _affine(planes[0], grid.spacing if grid else 1.0)
    array = empty_turned((len(planes), *planes[0].shape), affine, reading.scratch)  # [k, j, i]
    read_values(planes, array)
    if tilted:
        array, affine = _straightened(path, array, affine, drift, reading)
        changes += (f"sheared straight: the slices drift sideways by {np.abs(drift).max():.0f} pixels",)
    if grid and not grid.even:
        array, affine = _evened(path, array, affine, planes, reading)
        changes += (f"interpolated between slices up to {grid.gap:.4g} mm apart",)
    return array, affine, changes


def _choose(path: Path, found: Found, series) -> tuple[Stack, tuple[str, ...]]:
    """The stack to read, and what a user should know about the others."""
    usable = [stack for stack in found.stacks if not stack.reason]
    warnings = found.warnings + ((f"left out: {found.damaged}",) if found.damaged else ())
    numbered = list(zip(found.numbers, found.stacks, strict=True))
    if series is not None:
        named = [stack for stack in found.stacks if stack.first.series == str(series)]
        chosen = named or [stack for number, stack in numbered if str(number) == str(series)]
        if not chosen:
            numbers = [str(number) for number, _ in numbered if number is not None]
            shown = ", ".join(numbers[:20] + ["..."] * (len(numbers) > 20))
            raise VolumeError(f"{path}: has no such series; their numbers are {shown}; {LISTING}")
        if all(stack.reason for stack in chosen):
            raise VolumeError(f"{path}: the series asked for cannot be read as a volume: {chosen[0].reason}")
        usable = [stack for stack in chosen if not stack.reason]
    if not usable:
        reasons = "; ".join(filter(None, [*sorted({stack.reason for stack in found.stacks}), found.damaged]))
        raise VolumeError(f"{path}: holds no series that can be read as a volume ({reasons})")
    best = max(usable, key=lambda stack: stack.slices * stack.first.shape[0] * stack.first.shape[1])
    same = [stack for stack in usable if stack.first.series == best.first.series]
    if sum(2 * stack.slices >= best.slices for stack in same) > 1:
        sizes = ", ".join(f"{stack.slices} of {stack.first.shape[0]} x {stack.first.shape[1]}" for stack in same[:10])
        raise VolumeError(
            f"{path}: a series mixes images of several sizes, spacings or orientations ({sizes}); name one of them by "
            f"its number (series=N, --series N), {LISTING}"
        )
    if len(usable) > 1:
        number = next(number for number, stack in numbered if stack is best)
        warnings += (
            f"read series {number}, the largest of {len(usable)}; another can be chosen (--series, --list-series)",
        )
    for stack in found.stacks:
        if stack.reason and stack.first.series == best.first.series:
            warnings += (f"{stack.slices} images of the series left out: {stack.reason}",)
    return best, warnings


def _pick_volume(path: Path, stack: Stack, frame: int | None) -> list[Plane]:
    """The planes of the only volume, or of the one asked for."""
    volumes = stack.volumes
    if len(volumes) > 1 and frame is None:
        names = [f"{volume.label} ({len(volume.planes)} slices)" for volume in volumes]
        shown = [f"{n}: {name}" for n, name in enumerate(names[:20])]
        more = f"; and {len(volumes) - 20} more" if len(volumes) > 20 else ""
        raise VolumeError(
            f"{path}: holds {len(volumes)} volumes",
            f"{PICK_FRAME}: {'; '.join(shown)}{more}",
            remedy="frame",
            choices=names[:MOST_CHOICES],
        )
    return volumes[pick_frame(path, len(volumes), frame)].planes


def _without_copies(planes: list[Plane]) -> tuple[list[Plane], tuple[str, ...]]:
    """Drop planes that repeat the position and the pixels of another; `planes` are in the order of their positions."""
    at = heights(planes)
    kept, copies = [planes[0]], []
    for n in range(1, len(planes)):
        if at[n] - at[n - 1] > SAME_PLACE:
            kept.append(planes[n])
            continue
        (_, one), (_, other) = sorted(stored_planes([kept[-1], planes[n]]), key=lambda item: item[0])
        if not np.array_equal(one, other):
            raise VolumeError(
                f"{planes[n].path}: lies at the same position as {kept[-1].path.name} and shows something else; "
                "remove one, or put the two acquisitions into folders of their own"
            )
        copies.append(planes[n].path.name)
    return kept, (f"left out {len(copies)} copies of slices, the first is {copies[0]}",) if copies else ()


def _drift(planes: list[Plane]) -> np.ndarray:
    """How far each slice lies beside the normal through the first one: pixels `[2, k]` along rows and columns."""
    first = planes[0]
    offsets = np.array([plane.position for plane in planes]) - first.position  # [k, 3]
    sideways = first.along @ offsets.T  # mm along growing columns and growing rows
    return sideways[::-1] / np.array(first.spacing)[:, None]


def _check_stack(path: Path, planes: list[Plane], grid, drift: np.ndarray | None, damaged: str) -> None:
    """Refuse slices that lie unevenly or, where there is a `drift`, form a tilted stack.

    damaged: what to say about files that could be the missing ones.
    """
    if drift is not None:
        mm = np.linalg.norm(drift * np.array(planes[0].spacing)[:, None], axis=0)
        at = heights(planes) - heights(planes[:1])
        straight = np.abs(drift - np.outer(drift[:, -1], at / at[-1])).max() <= MAX_DRIFT
        degrees = np.degrees(np.arctan2(mm[-1], at[-1]))
        why = f"the gantry was tilted by {degrees:.1f} degrees: " if straight else ""
        raise VolumeError(
            f"{path}: {why}slices are shifted sideways by up to {mm.max():.1f} mm",
            f"{RESAMPLE} to shear them straight",
            remedy="resample",
        )
    if grid is not None and not grid.even:
        steps = np.diff(heights(planes))
        missing = int(np.sum(np.maximum(np.rint(steps / grid.spacing) - 1, 0)))
        between = " and ".join(plane.path.name for plane in planes[grid.gap_after : grid.gap_after + 2])
        seem = "1 slice seems" if missing == 1 else f"{missing} slices seem"
        lost = f"{seem} to be missing" if missing else "slice distances are uneven"
        raise VolumeError(
            f"{path}: {lost}: {grid.gap:.4g} mm between {between}, where {grid.spacing:.4g} mm is usual"
            f"{'; ' + damaged if damaged else ''}",
            f"find the slices, or {RESAMPLE} to interpolate",
            remedy="resample",
        )


def _affine(first: Plane, spacing: float) -> np.ndarray:
    """(column, row, slice, 1) -> mm, RAS+."""
    affine = np.eye(4)
    affine[:3, 0] = first.along[0] * first.spacing[1]
    affine[:3, 1] = first.along[1] * first.spacing[0]
    affine[:3, 2] = np.cross(*first.along) * spacing
    affine[:3, 3] = first.position
    affine[:2] *= -1  # DICOM's axes run to the left and to the back
    return affine


def _straightened(path: Path, array: np.ndarray, affine: np.ndarray, drift: np.ndarray, reading: Reading):
    """Undo the tilt; the result is larger by what the slices drift."""
    grown = np.ceil(np.ptp(drift, axis=1)) + 1
    check_size(path, (len(array), *(np.array(array.shape[1:]) + grown)), reading.max_voxels)
    array, (row, column) = shear_slices(array, *drift, reading.scratch)
    affine = affine.copy()
    affine[:3, 3] += affine[:3, 0] * column + affine[:3, 1] * row
    return array, affine


def _evened(path: Path, array: np.ndarray, affine: np.ndarray, planes: list[Plane], reading: Reading):
    """Interpolate to a uniform grid."""
    at = heights(planes)
    spacing = slice_grid(at).spacing
    check_size(path, (round((at[-1] - at[0]) / spacing) + 1, *array.shape[1:]), reading.max_voxels)
    array, spacing = resample_slices(array, at, scratch=reading.scratch)
    affine = affine.copy()
    affine[:3, 2] *= spacing / np.linalg.norm(affine[:3, 2])
    return array, affine


def _notes(planes: list[Plane]) -> tuple[str, ...]:
    """What the values and positions leave open."""
    first = planes[0]
    notes = ()
    if len(planes) == 1:
        notes += ("a single slice: its distance to others is unknown and taken as 1 mm",)
    if first.modality == "CT" and not first.units:
        notes += ("the file does not say that its values are HU",)
    if any(plane.inverse for plane in planes):
        notes += ("stored to be shown inverted (MONOCHROME1); the values are read as they are",)
    if len({plane.units for plane in planes}) > 1:
        notes += ("the slices have different units",)
    return notes
