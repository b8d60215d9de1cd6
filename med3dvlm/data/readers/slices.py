"""A folder of PNG or JPEG slices, as M3D has them. They carry no anatomy and are read as stored."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from med3dvlm.data.readers.base import MAX_VOXELS, Decoded, Reading, VolumeError, check_size, decoding, pick_frame
from med3dvlm.data.scratch import let_go, new_array

SLICE_SUFFIXES = (".png", ".jpeg", ".jpg")


def slice_files(folder) -> list[Path]:
    """The slices of a series in numeric order ("2.png" before "10.png")."""
    files = [f for f in Path(folder).iterdir() if f.suffix.lower() in SLICE_SUFFIXES and not f.name.startswith(".")]
    # Splitting at numbers alternates text and digits, so that keys compare text with text and number with number.
    return sorted(files, key=lambda f: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", f.stem)])


def read_slices(folder: Path, reading: Reading) -> Decoded:
    """Stack slices by the published rule: grey, divided by the largest code, only those of the most frequent shape.

    8-bit grey and colour become grey / 255; 16-bit grey keeps its depth and is divided by 65535.

    Raises:
        VolumeError: no slices, one that does not open, or more than `reading.max_voxels`.
    """
    files = slice_files(folder)
    if not files:
        raise VolumeError(f"{folder}: holds no slices ({', '.join(SLICE_SUFFIXES)})")
    pick_frame(folder, 1, reading.frame)
    shapes = [_shape(file) for file in files]
    shape = Counter(shapes).most_common(1)[0][0]
    left_out = len(files) - shapes.count(shape)
    check_size(folder, (shapes.count(shape), *shape), reading.max_voxels)
    array = new_array((shapes.count(shape), *shape), reading.scratch)  # [D, H, W]
    targets = iter(array)
    for file, found in zip(files, shapes, strict=True):
        codes = read_slice(file, reading.max_voxels)  # also where it is left out: it may be damaged
        if found == shape:
            np.divide(codes, np.float32(np.iinfo(codes.dtype).max), out=next(targets), dtype=np.float32)
            let_go(array)
    note = f"{left_out} of {len(files)} slices left out: their size is not the common {shape}"
    return Decoded(array, warnings=(note,) if left_out else ())


def _shape(file: Path) -> tuple[int, int]:
    """(H, W) of a slice, which is not decoded."""
    with decoding(file), Image.open(file) as image:
        return image.height, image.width


def read_slice(file: Path, max_voxels: int = MAX_VOXELS) -> np.ndarray:
    """One slice as `[H, W]` uint8, or uint16 for 16-bit grey.

    Raises:
        VolumeError: it does not open, or has more than `max_voxels` pixels.
    """
    with decoding(file), Image.open(file) as image:
        check_size(file, image.size, max_voxels)
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.uint16)
        if image.mode == "P":  # through RGBA, so that a transparent palette entry keeps its colour
            image = image.convert("RGBA")
        return np.asarray(image if image.mode == "L" else image.convert("L"))
