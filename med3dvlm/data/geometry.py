"""Which way a volume lies, and how it is turned: canonical axes, uneven slice distances, tilted stacks.

Arrays are `[k, j, i]` as files store them (i fastest). Affines map (i, j, k, 1) to mm, RAS+ as nibabel has them: x
grows to the patient's right, y to the front, z upwards.
"""

from dataclasses import dataclass

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt2axcodes, ornt_transform

from med3dvlm.data.scratch import let_go, new_array, slabs

CANONICAL_AXES = ("I", "P", "L")  # where D, H and W point to
OBLIQUE_DEGREES = 0.5  # smaller angles are not worth a warning
EVEN_SHARE, EVEN_MM = 0.02, 0.1  # slices within this share of the spacing, or this distance, of a uniform grid are even
MISSING_STEPS = 1.75  # a step of this many usual ones is a gap, also where thin slices keep it within EVEN_MM


class GeometryError(ValueError):
    """Slice positions that describe no volume."""


@dataclass(frozen=True)
class Turn:
    """How `[k, j, i]` becomes `[D, H, W]`.

    source: for D, H and W the axis of `[k, j, i]` that it is taken from.
    reverse: for D, H and W whether that axis runs the other way.
    spacing: mm along D, H, W. axes: directions of (i, j, k), for example "RAS".
    degrees: angle between the file's axes and the body's, the largest of the three.
    """

    source: tuple[int, int, int]
    reverse: tuple[bool, bool, bool]
    spacing: tuple[float, float, float]
    axes: str
    degrees: float

    def view(self, array: np.ndarray) -> np.ndarray:
        """`[k, j, i]` -> `[D, H, W]`, without a copy."""
        return array.transpose(self.source)[tuple(slice(None, None, -1 if r else 1) for r in self.reverse)]


def voxel_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """mm along (k, j, i)."""
    return tuple(float(size) for size in reversed(np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)))


def canonical_turn(affine: np.ndarray) -> Turn | None:
    """The turn to the nearest canonical axes: D to inferior, H to posterior, W to the patient's left.

    None where the affine is not finite or so flat that its axes span no volume.
    """
    affine = np.asarray(affine, dtype=np.float64)
    spacing = np.array(voxel_spacing(affine))  # k, j, i
    if not np.isfinite(affine).all() or not (spacing > 0).all():
        return None
    directions = affine[:3, :3] / spacing[::-1]  # columns: unit vectors of i, j, k
    if abs(np.linalg.det(directions)) < 1e-3:
        return None
    axes = io_orientation(affine)
    turn = ornt_transform(axes, axcodes2ornt(CANONICAL_AXES))  # row n: where file axis n (i, j, k) goes, and its sign
    from_ijk = np.argsort(turn[:, 0])
    aligned = np.abs(directions[axes[:, 0].astype(int), np.arange(3)])  # cosine of each axis with its nearest one
    return Turn(
        source=tuple(int(2 - axis) for axis in from_ijk),
        reverse=tuple(bool(turn[axis, 1] < 0) for axis in from_ijk),
        spacing=tuple(float(spacing[2 - axis]) for axis in from_ijk),
        axes="".join(ornt2axcodes(axes)),
        degrees=float(np.degrees(np.arccos(np.clip(aligned.min(), 0, 1)))),
    )


def empty_turned(shape: tuple[int, int, int], affine: np.ndarray | None, scratch=None) -> np.ndarray:
    """An unfilled float32 array `[k, j, i]` that lies in memory as `[D, H, W]`: what is decoded into it is turned.

    Without a usable affine it lies as `[k, j, i]`. scratch: folder for a large one, as in `new_array`.
    """
    turn = None if affine is None else canonical_turn(affine)
    if turn is None:
        return new_array(shape, scratch)
    array = new_array([shape[axis] for axis in turn.source], scratch)  # [D, H, W]
    array = array[tuple(slice(None, None, -1 if r else 1) for r in turn.reverse)]
    return array.transpose(np.argsort(turn.source))


def linear_taps(count: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each position of an axis is interpolated from when `count` voxels become `size`: two positions, and the
    weight of the second. Half-pixel centres.

    Positions are rounded as torch rounds them: a float32 scale, one rounding for the product and the difference.
    """
    scale = np.float64(np.float32(count) / np.float32(size))
    position = np.maximum(scale * (np.arange(size) + 0.5) - 0.5, 0).astype(np.float32)
    first = position.astype(np.int64)
    return first, np.minimum(first + 1, count - 1), position - first.astype(np.float32)


@dataclass(frozen=True)
class Grid:
    """How well slice positions fit a uniform grid.

    even: all within 2% of the spacing, or 0.1 mm, of a uniform grid, and no slice is missing.
    spacing: mm, the mean of the steps if even, else their median. deviation: mm, the largest from that grid.
    gap: mm, the widest step; `gap_after`: the number of the slice before it.
    """

    even: bool
    spacing: float
    deviation: float
    gap: float
    gap_after: int


def slice_grid(positions) -> Grid:
    """Compare increasing slice positions in mm with a uniform grid.

    Raises:
        GeometryError: fewer than two, not finite, or not strictly increasing.
    """
    positions = np.asarray(positions, dtype=np.float64)
    steps = np.diff(positions)
    if len(steps) == 0 or not np.isfinite(positions).all() or not (steps > 0).all():
        raise GeometryError("slice positions must be finite and strictly increasing, two or more")
    mean, usual = (positions[-1] - positions[0]) / len(steps), float(np.median(steps))
    tolerance = max(EVEN_SHARE * mean, EVEN_MM)
    deviation = _misfit(positions, tolerance)
    widest = int(np.argmax(steps))
    even = deviation <= tolerance + 1e-6 and steps[widest] < MISSING_STEPS * usual
    return Grid(bool(even), float(mean if even else usual), deviation, float(steps[widest]), widest)


def _misfit(positions: np.ndarray, tolerance: float) -> float:
    """The largest distance of increasing positions from a uniform grid.

    Where three quarters of the slices lie on one grid, it is that one: a grid that fits all as well as can be would
    meet a slice out of place halfway. Otherwise it is the grid for which the distance is smallest.
    """
    numbers, lag = np.arange(len(positions)), max(1, len(positions) // 4)
    left = positions - np.median((positions[lag:] - positions[:-lag]) / lag) * numbers
    distances = np.abs(left - np.median(left))
    if np.mean(distances <= tolerance / 5) >= 3 / 4:
        return float(distances.max())
    # For a given spacing the best offset halves the range of what is left, and that range is convex in the spacing.
    low, high = np.diff(positions).min(), np.diff(positions).max()
    for _ in range(50):
        spacing = (low + high) / 2
        left = positions - spacing * numbers
        low, high = (spacing, high) if left.argmax() > left.argmin() else (low, spacing)
    return float(np.ptp(left)) / 2


def resample_slices(
    array: np.ndarray, positions, spacing: float | None = None, scratch=None
) -> tuple[np.ndarray, float]:
    """Interpolate slices linearly to a uniform grid from the first position to the last.

    array: `[k, j, i]`, whose slices lie at increasing `positions` (mm). spacing: of the result, mm; by default that of
    most slices, adjusted so that a whole number of steps fits. scratch: folder for a large result.
    Returns float32 `[K, j, i]` and the spacing it has.
    Raises:
        GeometryError: as `slice_grid`.
    """
    positions = np.asarray(positions, dtype=np.float64)
    length = positions[-1] - positions[0]
    steps = max(1, round(length / (spacing or slice_grid(positions).spacing)))
    spacing = length / steps
    at = np.interp(positions[0] + spacing * np.arange(steps + 1), positions, np.arange(len(positions)))
    result = new_array((steps + 1, *array.shape[1:]), scratch)
    for target, index in enumerate(at):
        result[target] = _between(array, index)
        let_go(array)
        let_go(result)
    return result, float(spacing)


def shear_slices(array: np.ndarray, rows, columns, scratch=None) -> tuple[np.ndarray, tuple[int, int]]:
    """Straighten a stack whose slices are shifted within their planes, as a tilted gantry leaves it.

    array: `[k, j, i]`. rows, columns: by how many voxels the origin of each slice lies further along j and along i than
    that of a straight stack (any reals, one a slice). What no slice covers gets the smallest value. scratch: folder for
    a large result.
    Returns float32 `[k, J, I]`, large enough to hold every slice, and (row, column) of its first voxel in the frame
    that `rows` and `columns` are counted in.
    """
    rows, columns = np.asarray(rows, np.float64), np.asarray(columns, np.float64)
    first = int(np.floor(rows.min() + 1e-6)), int(np.floor(columns.min() + 1e-6))
    last = int(np.ceil(rows.max() - 1e-6)), int(np.ceil(columns.max() - 1e-6))
    height, width = (array.shape[axis + 1] + last[axis] - first[axis] for axis in (0, 1))
    fill = min(float(part.min()) for part in slabs(array))
    result = new_array((array.shape[0], height, width), scratch)
    for k, plane in enumerate(array):
        plane = _shifted(plane.astype(np.float32), rows[k] - first[0], height, fill)  # [J, i]
        result[k] = _shifted(plane.T, columns[k] - first[1], width, fill).T  # [J, I]
        let_go(array)
        let_go(result)
    return result, first


def _between(array: np.ndarray, index: float) -> np.ndarray:
    """The plane at a fractional index along the first axis."""
    low = min(int(np.floor(index)), array.shape[0] - 1)
    share = np.float32(index - low)
    plane = array[low].astype(np.float32)
    return plane if share < 1e-6 else plane + share * (array[low + 1].astype(np.float32) - plane)


def _shifted(plane: np.ndarray, shift: float, length: int, fill: float) -> np.ndarray:
    """Move `[n, m]` by a fractional `shift` >= 0 along n into `[length, m]`; what it leaves free is `fill`."""
    index = np.arange(length) - shift  # where in the old plane each new row lies
    low = np.floor(index + 1e-6).astype(int)
    share = np.clip(index - low, 0, None).astype(np.float32)[:, None]
    padded = np.full((plane.shape[0] + 2, plane.shape[1]), fill, np.float32)
    padded[1:-1] = plane
    below = padded[np.clip(low + 1, 0, len(padded) - 1)]
    above = padded[np.clip(low + 2, 0, len(padded) - 1)]
    return below + share * (above - below)
