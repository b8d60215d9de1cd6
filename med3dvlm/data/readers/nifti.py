"""NIfTI 1 and 2 (`.nii`, `.nii.gz`, pairs of `.hdr` and `.img`), and the mark of prepared files.

Read with nibabel's headers and a stream of our own, never with SimpleITK: SimpleITK 2.5 returns the voxels of `x.nii`
for `x.nii.gz` when both exist. The stream stops at what the header declares, and each part of it goes straight to its
place in the canonical float32 array.
"""

import io
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from math import prod
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip

from med3dvlm.data.geometry import canonical_turn, empty_turned
from med3dvlm.data.readers.base import DEFLATE_LIMIT, Decoded, Reading, VolumeError, check_size, decoding, pick_frame
from med3dvlm.data.scratch import LIMIT, put

PREPARED_MARK = b"med3dvlm prepared"
PUBLISHED_WARNING = (
    "unit spacing, no position, the size of a prepared volume and values within 0..1: taken for one, read as stored"
)
CHUNK_BYTES = 4 << 20
HEADERS = {  # length and magic -> class
    (348, b"n+1"): nib.Nifti1Header, (348, b"ni1"): nib.nifti1.Nifti1PairHeader,
    (540, b"n+2"): nib.Nifti2Header, (540, b"ni2"): nib.nifti2.Nifti2PairHeader,
}  # fmt: skip
MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}


def read_nifti(path: Path, reading: Reading) -> Decoded:
    """Read one volume; a pair is read by either of its names.

    Raises:
        VolumeError: not NIfTI, truncated, four axes without `reading.frame`, not one real number a voxel, or larger
            than allowed or than the file can be.
    """
    header_path, data_path = _pair(path)
    with decoding(path):
        header = read_header(header_path)
        dtype = header.get_data_dtype()
        if dtype.kind not in "uif":
            raise VolumeError(f"{path}: expected one number a voxel, found {dtype}")
        shape, frame, frames = _volume_shape(path, header.get_data_shape(), reading)
        check_size(path, shape, reading.max_voxels)
        affine, spacing, warnings = _geometry(header, path)
        mark = prepared_mark(header)
        array = empty_turned(shape, None if mark else affine, reading.scratch)  # [k, j, i]
        volume_bytes = prod(shape) * dtype.itemsize
        start = header.get_data_offset() + frame * volume_bytes
        _check_length(path, data_path, start + volume_bytes)
        with _opened(data_path) as stream:
            stream.seek(start)
            _fill(array, stream, dtype, _scaling(header, mark))
            if frame == frames - 1:
                warnings += _rest(path, stream, max(CHUNK_BYTES, volume_bytes))
    if mark:
        return Decoded(array, affine, spacing, prepared=mark, finite=dtype.kind == "u")
    if _looks_published(array, affine, reading.prepared_size):
        return Decoded(array, affine, spacing, prepared={"preparation": ""}, warnings=(PUBLISHED_WARNING,))
    stored = header.get_slope_inter() in ((None, None), (1.0, 0.0))
    return Decoded(array, affine, spacing, warnings=warnings, finite=stored and dtype.kind in "ui")


def read_header(path: Path) -> nib.Nifti1Header:
    """The header of a NIfTI file, of either version and byte order.

    Raises:
        VolumeError: the file does not begin with one.
    """
    with decoding(path), _opened(path) as stream:
        data = stream.read(540)
        for order in ("little", "big"):
            length = int.from_bytes(data[:4], order)
            magic = data[4:7] if length == 540 else data[344:347]
            if (length, magic) in HEADERS:
                return HEADERS[length, magic].from_fileobj(io.BytesIO(data[:length]))
            if length == 348 and len(data) >= 348:
                raise VolumeError(f"{path}: is Analyze 7.5, which does not say where left is; convert it to NIfTI")
        raise VolumeError(f"{path}: cannot be read: it does not begin with a NIfTI header")


def prepared_mark(header) -> dict | None:
    """What a file of ours records about its preparation, `{"preparation": name}`; None for every other file."""
    text = header["descrip"].tobytes().rstrip(b"\0")
    if not text.startswith(PREPARED_MARK):
        return None
    match = re.fullmatch(rb" v2: ([ -~]+)", text[len(PREPARED_MARK) :])
    return {"preparation": match[1].decode() if match else "published"}  # the first version knew only one


def prepared_header(path) -> dict | None:
    """What the header of a prepared file of ours says, without reading its voxels; None for every other file.

    Returns `shape` (D, H, W), `dtype` as `write_prepared` was told, and `preparation`.
    """
    try:
        header = read_header(Path(path))
    except VolumeError:
        return None
    mark = prepared_mark(header)
    if mark is None:
        return None
    dtype = {"uint16": "float16"}.get(header.get_data_dtype().name, header.get_data_dtype().name)
    return {"shape": tuple(int(n) for n in header.get_data_shape()[::-1]), "dtype": dtype, **mark}


def _pair(path: Path) -> tuple[Path, Path]:
    """The files of header and voxels: one and the same, or the `.hdr` and the `.img` of a pair."""
    match = re.fullmatch(r"(.+)\.(hdr|img)(\.gz)?", path.name, re.IGNORECASE)
    if not match:
        return path, path
    ending = match[2]
    other = {"hdr": "img", "img": "hdr", "HDR": "IMG", "IMG": "HDR"}.get(ending, "img")
    partner = path.with_name(f"{match[1]}.{other}{match[3] or ''}")
    if not partner.exists():
        raise VolumeError(f"{path}: is half of a pair; {partner.name} is not beside it")
    return (path, partner) if ending.lower() == "hdr" else (partner, path)


def _opened(path: Path):
    return igzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _volume_shape(path: Path, shape: tuple, reading: Reading) -> tuple[tuple[int, int, int], int, int]:
    """`[k, j, i]` of one volume, the number of the one to read, and how many there are."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) < 3:
        raise VolumeError(f"{path}: expected a volume with 3 axes, found shape {shape}")
    if len(shape) > 4:
        raise VolumeError(f"{path}: expected one number a voxel, found {shape[4:]} of them (shape {shape})")
    frames = shape[3] if len(shape) == 4 else 1
    return tuple(int(n) for n in shape[2::-1]), pick_frame(path, frames, reading.frame), frames


def _geometry(header, path: Path) -> tuple[np.ndarray, tuple[float, float, float], tuple[str, ...]]:
    """The affine in mm, the voxel size of the header along (k, j, i), and what is doubtful about them."""
    scale = MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    affine = header.get_best_affine() * [[scale], [scale], [scale], [1.0]]
    spacing = tuple(scale * float(size) for size in header.get_zooms()[2::-1])
    codes = int(header["qform_code"]), int(header["sform_code"])
    if codes == (0, 0):
        text = f"{path.name} says nothing about its orientation (qform and sform are 0): left and right are guessed"
        return affine, spacing, (text,)
    if 0 not in codes:
        try:
            turns = canonical_turn(header.get_qform()), canonical_turn(header.get_sform())
        except ValueError:
            return affine, spacing, ("the quaternion of the qform is broken: the sform is used",)
        if None not in turns and turns[0].axes != turns[1].axes:
            text = f"qform ({turns[0].axes}) and sform ({turns[1].axes}) contradict each other: the sform is used"
            return affine, spacing, (text,)
    return affine, spacing, ()


def _check_length(path: Path, data_path: Path, declared: int) -> None:
    """Refuse a header that declares more bytes than the file can hold, before any memory is taken for them."""
    size = data_path.stat().st_size
    limit = size * DEFLATE_LIMIT if data_path.name.lower().endswith(".gz") else size
    if declared > limit:
        raise VolumeError(
            f"{path}: cannot be read: its header declares {declared:,} bytes, {data_path.name} has {size:,}; "
            f"is the file complete?"
        )


def _scaling(header, mark: dict | None) -> Callable[[np.ndarray], np.ndarray]:
    """How stored numbers become values."""
    dtype = header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    if mark and dtype.kind == "u":  # in float32, so that a conversion on a GPU gives the same bits
        factor = np.float32(1 / np.iinfo(dtype).max)
        return lambda codes: np.multiply(codes, factor, dtype=np.float32)
    if slope is None or (slope, inter) == (1.0, 0.0):
        return lambda codes: codes
    return lambda codes: codes * np.float64(slope) + np.float64(inter)


def _fill(array: np.ndarray, stream, dtype: np.dtype, scaling: Callable) -> None:
    """Read the voxels of `array` `[k, j, i]` from a stream, some slices at a time, while others are put in place."""
    chunk = CHUNK_BYTES if array.nbytes <= LIMIT else 4 * CHUNK_BYTES  # what lies on a disk is better not visited often
    slices = max(1, chunk // (dtype.itemsize * array[0].size))
    buffers = [np.empty((min(slices, len(array)), *array.shape[1:]), dtype) for _ in range(2)]

    def move(target, voxels):
        put(target, scaling(voxels))

    with ThreadPoolExecutor(max_workers=1) as mover:
        moved = None
        for number, first in enumerate(range(0, len(array), slices)):
            part = buffers[number % 2][: len(array) - first]
            target, done = memoryview(part.reshape(-1).view(np.uint8)), 0
            while done < len(target):
                count = stream.readinto(target[done:])
                if not count:
                    raise EOFError(f"it ends after {first} of {len(array)} slices")
                done += count
            if moved is not None:
                moved.result()
            moved = mover.submit(copy_context().run, move, array[first : first + len(part)], part)
        moved.result()


def _rest(path: Path, stream, limit: int) -> tuple[str, ...]:
    """Read to the end, which also compares the checksum of a compressed file, and say if something is there.

    Raises:
        VolumeError: more than `limit` bytes: a gzip bomb, or a header that belongs to another file.
    """
    count = 0
    while part := stream.read(CHUNK_BYTES):
        count += len(part)
        if count > limit:
            raise VolumeError(
                f"{path}: goes on for more than {limit:,} bytes behind the voxels that its header declares; "
                "is the header that of this file?"
            )
    return (
        () if not count else (f"the file goes on behind the voxels that its header declares: {count:,} bytes not used",)
    )


def _looks_published(array: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> bool:
    if array.shape != tuple(size) or not np.array_equal(np.abs(affine), np.eye(4)):
        return False
    return bool(array.min() >= 0 and array.max() <= 1)
