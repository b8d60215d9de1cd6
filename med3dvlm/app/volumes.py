"""Scans as the browser gets them: uncompressed NIfTI of 16-bit integers, which its own code and NiiVue both read."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from med3dvlm.data.files import write_bytes

MAX_VOXELS = 64 * 2**20  # 128 MB; a browser holds it twice, and as a texture
INT16 = np.iinfo(np.int16)


def thinned(array: np.ndarray, spacing: Sequence[float], limit: int = MAX_VOXELS) -> tuple[np.ndarray, tuple]:
    """Leave out every second plane, always along the finest axis, until at most `limit` voxels are left.

    array: `[D, H, W]`; spacing: mm in the same order. Returns both as they are after it.
    """
    spacing = list(spacing)
    while array.size > limit:
        axis = min(range(3), key=lambda a: (array.shape[a] == 1, spacing[a]))
        array = array[tuple(slice(None, None, 2 if a == axis else 1) for a in range(3))]
        spacing[axis] *= 2
    return array, tuple(spacing)


def as_int16(array: np.ndarray) -> tuple[np.ndarray, float, float]:
    """16-bit integers, slope and intercept. Whole numbers that fit, such as Hounsfield units, stay as they are."""
    low, high = float(array.min()), float(array.max())
    if INT16.min <= low and high <= INT16.max and all(np.array_equal(plane, np.rint(plane)) for plane in array):
        return array.astype(np.int16), 1.0, 0.0
    slope = (high - low) / (INT16.max - INT16.min) or 1.0
    intercept = low - INT16.min * slope
    stored = np.empty(array.shape, np.int16)
    for index, plane in enumerate(array):  # plane by plane: the difference of large arrays takes as much memory again
        stored[index] = np.rint((plane.astype(np.float64) - intercept) / slope)
    return stored, slope, intercept


def write_for_browser(path: Path, array: np.ndarray, spacing: Sequence[float]) -> bool:
    """Write a volume `[D, H, W]` (spacing in mm in the same order); returns whether planes had to be left out.

    The affine is that of the canonical order: D to inferior, H to posterior, W to the patient's left.
    """
    shown, spacing = thinned(array, spacing)
    stored, slope, intercept = as_int16(shown)
    affine = np.diag([-spacing[2], -spacing[1], -spacing[0], 1.0])
    image = nib.Nifti1Image(stored.T, affine)  # [D, H, W] -> [i, j, k]
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0)
    image.header.set_slope_inter(slope, intercept)
    write_bytes(path, image.to_bytes())
    return shown.size < array.size
