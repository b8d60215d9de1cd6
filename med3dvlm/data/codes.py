"""Volumes as codes: one byte a voxel, 0..255 for 0..1. A quarter of float32, and what a device can convert by itself.

The fast way to the images of a data set that was prepared with `--dtype uint8`; everything else takes the usual way
through `load_volume` and `preprocess` and gives the same values (see `med3dvlm.data.augment.to_unit`).
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from isal import igzip

from med3dvlm.data.preprocess import PreprocessConfig, preprocess
from med3dvlm.data.volume import PREPARED_MARK, VolumeError, load_volume

LARGEST = 255
HEADER_BYTES = 352  # of a NIfTI-1 file: 348 and four that say that there are no extensions
# sizeof_hdr, dim[8], datatype, vox_offset, scl_slope, scl_inter, descrip, magic
_HEADER = struct.Struct("<i36x8h14xh36xfff28x80s116x4s4x")


def to_codes(image: np.ndarray) -> np.ndarray:
    """Nearest codes of values within 0..1, any shape; off by at most 1/510, and exact for what came from codes."""
    return np.rint(image * np.float32(LARGEST)).astype(np.uint8)


def read_codes(path, size: tuple[int, int, int]) -> np.ndarray | None:
    """The codes `[D, H, W]` of a `.nii.gz` file that was prepared as uint8 with this size; None for any other file.

    Inflates the file and nothing else. A file whose header cannot be read is "any other", for `load_volume` to judge.
    Raises VolumeError where the voxels are damaged, or more or fewer than the header says.
    """
    if not str(path).lower().endswith(".nii.gz") or not Path(path).is_file():
        return None
    codes = np.empty(size, np.uint8)
    ours = False
    try:
        with igzip.open(path) as file:
            ours = _holds_codes(file.read(HEADER_BYTES), size)
            if not ours:
                return None
            complete = file.readinto(memoryview(codes).cast("B")) == codes.size and not file.read(1)
    except (OSError, EOFError, zlib.error) as error:
        if not ours:
            return None
        raise VolumeError(f"{path}: cannot be read ({error}); is the file complete? Prepare it again") from error
    if not complete:
        raise VolumeError(f"{path}: doesn't hold the {codes.size} voxels that its header names; prepare it again")
    return codes


def _holds_codes(header: bytes, size: tuple[int, int, int]) -> bool:
    """Whether a NIfTI header says: ours, uint8, this size, code 255 is 1."""
    if len(header) < HEADER_BYTES:
        return False
    sizeof, *dim, datatype, offset, slope, intercept, description, magic = _HEADER.unpack(header)
    return (
        (sizeof, magic, datatype, offset) == (348, b"n+1\0", 2, HEADER_BYTES)
        and (dim[0], *dim[3:0:-1]) == (3, *size)
        and abs(slope * LARGEST - 1) < 1e-6
        and intercept == 0
        and description.startswith(PREPARED_MARK)
    )


class FileImages:
    """Images straight from their files: codes where the file holds them, otherwise the pipeline's float32.

    Args:
        config: what a volume goes through that is not prepared or has another size.
    """

    def __init__(self, config: PreprocessConfig):
        self.config = config

    def __call__(self, path) -> torch.Tensor:
        """`[1, D, H, W]`: uint8 codes, or float32 within 0..1. Raises VolumeError for what cannot be used."""
        codes = read_codes(path, self.config.size)
        if codes is not None:
            return torch.from_numpy(codes)[None]
        return preprocess(load_volume(path, prepared_size=self.config.size), self.config)
