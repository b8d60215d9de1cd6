"""Arrays that may be larger than the memory of a process: above a limit they lie in a file, mapped into memory.

The file has no name and is gone with the process, however that ends. What is written or read a part at a time, with
`slabs` and `put`, is let go of again, so that the process never holds more of such an array than a few parts; the
system keeps the rest in its cache or on the disk, as it likes.
"""

import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np

LIMIT = 512 * 2**20  # bytes of a float32 array in memory: 512 slices of 512x512
PART = 16 * 2**20  # bytes that are looked at in one go


def new_array(shape, folder=None) -> np.ndarray:
    """An unfilled float32 array; one of more than `LIMIT` bytes lies in a file in `folder`, if there is one.

    Raises:
        VolumeError: the disk has no room for it.
    """
    size = 4 * math.prod(int(n) for n in shape)
    if folder is None or size <= LIMIT:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and would be a crash later
        except OSError as error:
            from med3dvlm.data.readers.base import VolumeError  # the readers import this module

            free = shutil.disk_usage(folder).free
            raise VolumeError(
                f"{size / 1e9:.1f} GB of temporary space are needed in {folder}, and {free / 1e9:.1f} GB are free "
                f"({error.strerror}): make room"
            ) from error
        return np.ndarray(shape, np.float32, mmap.mmap(file.fileno(), size))


def let_go(array: np.ndarray) -> None:
    """Take what an array has mapped out of the memory of this process; its values stay. For other arrays, nothing."""
    mapped = _mapping(array)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def slabs(array: np.ndarray) -> Iterator[np.ndarray]:
    """Views of consecutive parts of an array along its first axis, each let go of when the next one is asked for."""
    step = max(1, PART // max(1, array[:1].nbytes))
    for first in range(0, len(array), step):
        yield array[first : first + step]
        let_go(array)


def put(target: np.ndarray, values: np.ndarray) -> None:
    """`target[...] = values`; where `target` lies in a file, in parts that are close together in it."""
    if _mapping(target) is None:
        target[...] = values
        return
    axis = int(np.argmax(np.abs(target.strides)))
    step = max(1, PART // max(1, abs(target.strides[axis])))
    target, values = np.moveaxis(target, axis, 0), np.moveaxis(np.broadcast_to(values, target.shape), axis, 0)
    for first in range(0, len(target), step):
        target[first : first + step] = values[first : first + step]
        let_go(target)


def _mapping(array) -> mmap.mmap | None:
    """The map that an array is a view of. None for one in memory, and for files that are only read."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None
