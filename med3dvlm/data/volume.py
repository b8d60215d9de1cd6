"""Read any volume file into one canonical array. The only reader of the project.

Axis order is always `[D, H, W]`. Canonically D runs from superior to inferior, H from anterior to posterior and W from
the patient's right to left, whatever order the file uses. What carries no anatomy (prepared files, slice folders,
NumPy arrays) keeps the order of the file.

NIfTI is read with nibabel on purpose: SimpleITK 2.5 returns the voxels of `x.nii` for `x.nii.gz` when both exist.
"""

import gzip
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from med3dvlm.data.files import write_bytes

PREPARED_MARK = b"med3dvlm prepared"
SLICE_SUFFIXES = (".png", ".jpeg", ".jpg")
CANONICAL_AXES = ("I", "P", "L")  # where D, H and W point to
ORIENTATIONS = ("canonical", "stored")


class VolumeError(ValueError):
    """A volume that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class Volume:
    """One volume in memory.

    array: float32 `[D, H, W]`.
    spacing: voxel size in mm along D, H, W; ones where the file has none.
    path: where it was read from.
    orientation: "canonical" (reoriented by the affine) or "stored" (order of the file).
    prepared: the values are already the output of the preparation, within 0..1.
    warnings: sentences a user should see, for example slices that were left out.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    path: str = ""
    orientation: str = "stored"
    prepared: bool = False
    warnings: tuple[str, ...] = ()


def load_volume(path, orientation: str = "canonical") -> Volume:
    """Read a NIfTI file (`.nii`, `.nii.gz`), a NumPy file (`.npy`) or a folder of PNG / JPEG slices.

    Args:
        path: file or folder.
        orientation: "canonical" turns the axes as the module says; "stored" keeps the order of the file, which for
            NIfTI is `[k, j, i]`. Prepared files, slice folders and NumPy arrays are always read as stored.
    Raises:
        VolumeError: missing, unknown, corrupt, not three-dimensional, empty, or with values that are not finite.
        ValueError: unknown `orientation`.
    """
    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation must be one of {', '.join(ORIENTATIONS)}, not {orientation!r}")
    path = Path(path)
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder")
    name = path.name.lower()
    if path.is_dir():
        return _read_slices(path)
    if name.endswith((".nii", ".nii.gz")):
        return _read_nifti(path, orientation)
    if name.endswith(".npy"):
        return _read_numpy(path)
    raise VolumeError(f"{path}: unknown format; known are .nii, .nii.gz, .npy and folders of .png or .jpeg slices")


def write_prepared(path, array: np.ndarray, dtype: str = "float32") -> None:
    """Write a prepared volume as compressed NIfTI, atomically.

    array: float32 `[D, H, W]` within 0..1. As uint8 the 256 steps are stored with a slope of 1/255, so that every
    reader gets values within 0..1 again. The header equals the published one (unit spacing, LPS axes), plus our mark.
    """
    slope = 1.0
    if dtype == "uint8":
        slope, array = 1 / 255, np.rint(array * 255).astype(np.uint8)
    elif dtype != "float32":
        raise ValueError(f"dtype must be float32 or uint8, not {dtype!r}")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    image = nib.Nifti1Image(array.T, affine)  # [D, H, W] -> [i, j, k]
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(slope, 0)
    image.header["descrip"] = PREPARED_MARK + b" v1: published min-max, crop, resize"
    # The fastest level: prepared volumes are read far more often than they are sent anywhere.
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


@contextmanager
def _reading(path: Path):
    """Turn whatever a decoder raises about a broken file into one error that names the file."""
    try:
        yield
    except VolumeError:
        raise
    except Exception as error:  # decoders raise errors of a dozen types for corrupt input
        raise VolumeError(f"{path}: cannot be read ({type(error).__name__}: {error}); is the file complete?") from error


def _checked(array: np.ndarray, path: Path) -> np.ndarray:
    """Return `array` as contiguous float32 after the checks that every format shares."""
    if array.ndim != 3:
        raise VolumeError(f"{path}: expected a volume with 3 axes, found shape {array.shape}; extract one volume first")
    if array.size == 0:
        raise VolumeError(f"{path}: is empty, its shape is {array.shape}")
    array = np.ascontiguousarray(array, dtype=np.float32)
    # A sum is not finite as soon as one value is not; float64 because large float32 values could overflow it.
    with np.errstate(invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if not np.isfinite(total):
        raise VolumeError(f"{path}: holds values that are not finite (NaN or infinity); replace them first")
    return array


def _read_nifti(path: Path, orientation: str) -> Volume:
    with _reading(path):
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        kind = nib.Nifti2Image if data[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Image
        image = kind.from_bytes(data)
        if image.get_data_dtype().kind not in "buif":
            raise VolumeError(f"{path}: expected one number a voxel, found {image.get_data_dtype()}")
        while len(image.shape) > 3 and image.shape[-1] == 1:
            image = image.slicer[..., 0]
        if len(image.shape) == 3 and 0 not in image.shape:
            array = image.get_fdata(dtype=np.float32, caching="unchanged")  # [i, j, k]
        else:
            array = np.empty(image.shape, np.float32)  # refused below, without reading what may be huge
    array = _checked(array.T, path)  # [k, j, i]

    affine = image.affine
    prepared, warnings = _prepared_state(image.header, affine, array)
    if prepared or orientation == "stored":
        spacing = tuple(float(size) for size in reversed(image.header.get_zooms()[:3]))
        return Volume(array, spacing, str(path), "stored", prepared, warnings)

    if int(image.header["qform_code"]) == 0 and int(image.header["sform_code"]) == 0:
        warnings += (f"{path.name} says nothing about orientation (qform and sform are 0): left and right are guessed",)
    axes = io_orientation(affine)
    spacing = nib.affines.voxel_sizes(affine)
    if np.isnan(axes).any() or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise VolumeError(f"{path}: its affine is singular or not finite; read it with orientation='stored'")
    turn = ornt_transform(axes, axcodes2ornt(CANONICAL_AXES))  # where each of i, j, k goes
    array = np.ascontiguousarray(apply_orientation(array.T, turn))  # [i, j, k] -> [D, H, W]
    spacing = tuple(float(spacing[source]) for source in np.argsort(turn[:, 0]))
    return Volume(array, spacing, str(path), "canonical", False, warnings)


def _prepared_state(header, affine: np.ndarray, array: np.ndarray) -> tuple[bool, tuple[str, ...]]:
    """Say whether the file is prepared: ours by the mark, published ones by a unit affine and values within 0..1."""
    if bytes(header["descrip"].tobytes()).startswith(PREPARED_MARK):
        return True, ()
    unit = np.array_equal(np.abs(affine), np.eye(4))
    if unit and array.min() >= 0 and array.max() <= 1:
        return True, ("unit spacing, no position and values within 0..1: taken for a prepared volume, read as stored",)
    return False, ()


def _read_numpy(path: Path) -> Volume:
    with _reading(path):
        array = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "buif":
            raise VolumeError(f"{path}: expected an array of numbers, found {array.dtype}")
    if array.ndim == 4 and array.shape[0] == 1:  # [1, D, H, W], as M3D stores its arrays
        array = array[0]
    return Volume(_checked(array, path), path=str(path))


def slice_files(folder) -> list[Path]:
    """The slices of a series in numeric order ("2.png" before "10.png")."""
    files = [f for f in Path(folder).iterdir() if f.suffix.lower() in SLICE_SUFFIXES and not f.name.startswith(".")]
    # Splitting at numbers alternates text and digits, so that keys compare text with text and number with number.
    return sorted(files, key=lambda f: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", f.stem)])


def _read_slices(folder: Path) -> Volume:
    """Stack the slices of a folder by the published rule: 8-bit grey, divided by 255, only the most frequent shape."""
    files = slice_files(folder)
    if not files:
        raise VolumeError(f"{folder}: holds no slices ({', '.join(SLICE_SUFFIXES)})")
    slices = [_read_slice(file) for file in files]
    shape = Counter(s.shape for s in slices).most_common(1)[0][0]
    kept = [s for s in slices if s.shape == shape]
    warnings = ()
    if len(kept) < len(slices):
        left_out = len(slices) - len(kept)
        warnings = (f"{left_out} of {len(slices)} slices left out: their size is not the common {shape}",)
    array = np.stack(kept).astype(np.float32) / np.float32(255)  # [D, H, W]
    return Volume(_checked(array, folder), path=str(folder), warnings=warnings)


def _read_slice(file: Path) -> np.ndarray:
    with _reading(file), Image.open(file) as image:
        if image.mode == "P":  # through RGBA, so that a transparent palette entry keeps its colour
            image = image.convert("RGBA")
        return np.asarray(image if image.mode == "L" else image.convert("L"))  # [H, W] uint8
