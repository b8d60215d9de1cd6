"""NumPy files (`.npy`, `.npz`), never unpickled. They carry no anatomy and are read as stored."""

import zipfile
from pathlib import Path

import numpy as np

from med3dvlm.data.readers.base import (
    DEFLATE_LIMIT,
    Decoded,
    Reading,
    VolumeError,
    check_ratio,
    check_size,
    decoding,
    pick_frame,
)


def read_npy(path: Path, reading: Reading) -> Decoded:
    """Read `[D, H, W]`, also with axes of length 1 around it, or `[N, D, H, W]` with `reading.frame`.

    Raises:
        VolumeError: damaged, pickled, not real numbers, another number of axes, or too large.
    """
    with decoding(path):
        with path.open("rb") as stream:
            size = path.stat().st_size
            _check_header(path, stream, size, size, reading)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return Decoded(_volume(path, array, reading))


def read_npz(path: Path, reading: Reading) -> Decoded:
    """Read the only array of a `.npz`, as `read_npy`.

    Raises:
        VolumeError: as `read_npy`, or several arrays; their names are listed.
    """
    with decoding(path), zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
        if len(members) != 1:
            names = ", ".join(m.filename.removesuffix(".npy") for m in members[:20]) or "none"
            raise VolumeError(f"{path}: must hold one array, it holds {len(members)}: {names}; save the volume alone")
        (member,) = members
        with archive.open(member) as stream:
            limit = min(member.file_size, member.compress_size * DEFLATE_LIMIT)
            _check_header(path, stream, limit, member.compress_size, reading)
        with archive.open(member) as stream:
            return Decoded(_volume(path, np.lib.format.read_array(stream, allow_pickle=False), reading))


def _check_header(path: Path, stream, limit: int, packed: int, reading: Reading) -> None:
    """Refuse what is no array of numbers, or declares more than allowed, than `limit` or than fits `packed` bytes."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise VolumeError(f"{path}: cannot be read: it holds pickled objects, which could run code")
    if dtype.kind not in "buif":
        raise VolumeError(f"{path}: expected one number a voxel, found an array of {dtype}")
    check_size(path, shape, reading.max_voxels)
    declared = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if declared > limit:
        raise VolumeError(
            f"{path}: cannot be read: its header declares {declared:,} bytes, it holds at most {limit:,}; "
            f"is the file complete?"
        )
    check_ratio(path, shape, dtype.itemsize, packed)


def _volume(path: Path, array: np.ndarray, reading: Reading) -> np.ndarray:
    """One volume `[D, H, W]` out of an array: without axes of length 1 at either end, or one of several."""
    shape = array.shape
    while array.ndim > 3 and array.shape[0] == 1:  # [1, D, H, W], as M3D stores its arrays
        array = array[0]
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 4:
        return array[pick_frame(path, len(array), reading.frame)]
    if array.ndim != 3:
        raise VolumeError(f"{path}: expected a volume with 3 axes, found shape {shape}; extract one volume first")
    pick_frame(path, 1, reading.frame)
    return array
