"""What every format reader takes and gives. Imports nothing of ours."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

PUBLISHED_SIZE = (128, 256, 256)  # D, H, W
MAX_VOXELS = 400_000_000  # 1500 slices of 512x512; 1.6 GB as float32
DEFLATE_LIMIT = 1032  # deflate expands no byte to more than this many
MAX_RATIO = 200  # scans shrink by less, however they are compressed; masks of moderate size may shrink by more
MEMORY_FREE = 1_500_000_000  # bytes that files of any ratio may take; with the program itself 2 GB are enough
NAN_RULES = ("error", "fill")
MOST_CHOICES = 1000  # that an error lists
PICK_FRAME = "name it (frame=N, --frame N on the command line)"


class VolumeError(ValueError):
    """A volume that cannot be used; the message, problem and hint, names the file and what to do.

    problem: the message without its hint. remedy: the option of `Reading` with which the file can be read: "frame",
    "resample" or "nan"; "" where there is none. choices: for "frame" a name of each volume, in order.
    """

    def __init__(self, problem: str, hint: str = "", *, remedy: str = "", choices: Sequence[str] = ()):
        super().__init__(f"{problem}; {hint}" if hint else problem)
        self.problem, self.remedy, self.choices = problem, remedy, tuple(choices)

    def renamed(self, old: str, new: str) -> "VolumeError":
        """The same error about another path."""
        error = VolumeError(str(self).replace(old, new), remedy=self.remedy, choices=self.choices)
        error.problem = self.problem.replace(old, new)
        return error


@dataclass(frozen=True)
class Reading:
    """The options of reading, the same for every format; each format uses those that mean something to it.

    series: DICOM series, by UID or by the number of `SeriesInfo`; None takes the largest one.
    frame: which volume of a four-dimensional file, from 0; None refuses such files.
    resample: irregular slice distances are interpolated to a uniform grid and a tilted gantry is sheared straight,
        instead of an error.
    nan: "error" refuses values that are not finite; "fill" replaces them by the smallest finite one.
    flip: letters out of "DHW"; these axes are reversed after everything else.
    max_voxels: volumes with more are refused before memory is taken.
    prepared_size: (D, H, W) at which a NIfTI file without our mark is taken for a prepared one, if its affine is the
        unit and its values lie within 0..1.
    scratch: folder for arrays that are too large for memory; None keeps everything in memory.
    """

    series: str | int | None = None
    frame: int | None = None
    resample: bool = False
    nan: str = "error"
    flip: str = ""
    max_voxels: int = MAX_VOXELS
    prepared_size: tuple[int, int, int] = PUBLISHED_SIZE
    scratch: Path | None = None

    def __post_init__(self):
        if self.nan not in NAN_RULES:
            raise ValueError(f"nan must be one of {', '.join(NAN_RULES)}, not {self.nan!r}")
        if set(self.flip) - set("DHW"):
            raise ValueError(f"flip must consist of the letters D, H and W, not {self.flip!r}")


@dataclass
class Decoded:
    """What a format reader found.

    array: `[k, j, i]` in the order of the file, any real numeric dtype, rescaling applied. It may be a view.
    affine: 4x4, (i, j, k, 1) -> mm, to the right, to the front, upwards (RAS+, as nibabel; DICOM and ITK have LPS:
        negate the first two rows). None where the format carries no anatomy: then the array is read as stored.
    spacing: mm along (k, j, i); only looked at where the affine is None or not usable.
    modality: "CT", "MR", "PT", or "" where the file does not say.
    units: "HU", or "" where the file does not say.
    prepared: what a prepared file records about its preparation; None for every other file.
    warnings: sentences a user should see. Never patient data.
    finite: whether no value can be NaN or infinite, as where integers are stored: nobody need look.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    modality: str = ""
    units: str = ""
    prepared: dict | None = None
    warnings: tuple[str, ...] = ()
    finite: bool = False


@dataclass(frozen=True)
class SeriesInfo:
    """One series of a DICOM folder. UID and description are those of the header, which may say anything.

    number: the header's SeriesNumber where those of all usable series are positive and differ, else 1, 2, ... in the
        order of the listing. None where there is none: a file that cannot be parsed, or one that is no volume.
    shape: `(slices, rows, columns)`; spacing: mm in the same order. usable: it can be read as a volume, else `reason`.
    damaged: a file that cannot be parsed, so that nobody knows what it was.
    """

    uid: str
    number: int | None
    modality: str
    slices: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    usable: bool
    reason: str = ""
    description: str = ""
    damaged: bool = False


@contextmanager
def decoding(path):
    """Turn whatever a decoder raises about a broken file into one `VolumeError` that names the file."""
    try:
        yield
    except VolumeError:
        raise
    except MemoryError as error:
        raise VolumeError(f"{path}: does not fit into memory") from error
    except Exception as error:  # decoders raise errors of a dozen types for corrupt input
        text = str(error).replace(str(path), "the file").split('"')[0]  # what ITK quotes are halves of paths
        reason = " ".join(text.split())[:300]
        raise VolumeError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}); is the file complete?"
        ) from error


def check_size(path, shape, max_voxels: int) -> None:
    """Refuse empty and oversized shapes; called with what a header declares, before memory is taken.

    Raises:
        VolumeError: an axis of length below 1, or more than `max_voxels` voxels.
    """
    shape = tuple(int(n) for n in shape)
    if any(n < 1 for n in shape):
        raise VolumeError(f"{path}: is empty, its shape is {shape}")
    if prod(shape) > max_voxels:
        raise VolumeError(
            f"{path}: declares {prod(shape):,} voxels {shape}, more than the {max_voxels:,} that are read "
            f"({4 * max_voxels / 1e9:.1f} GB in memory)",
            "raise max_voxels (--max_voxels) if the file is really that large",
        )


def check_ratio(path, shape, voxel_bytes: int, packed: int) -> None:
    """Refuse a compressed file that takes gigabytes, as it is and as float32, and is far smaller than a scan would be.

    packed: bytes of the file.
    Raises:
        VolumeError: more than `MEMORY_FREE` and than `MAX_RATIO` times `packed`.
    """
    needed = prod(int(n) for n in shape) * (voxel_bytes + 4)
    if needed > max(MEMORY_FREE, MAX_RATIO * packed):
        raise VolumeError(
            f"{path}: would take {needed / 1e9:.1f} GB, {needed // max(packed, 1):,} times its size; if it is sound, "
            "store it uncompressed"
        )


def pick_frame(path, frames: int, frame: int | None) -> int:
    """The index of the volume to read out of `frames`: the only one, or the one asked for.

    Raises:
        VolumeError: several and none asked for, or one that is not there.
    """
    if frame is None:
        if frames != 1:
            raise VolumeError(
                f"{path}: expected a volume with 3 axes, found {frames} volumes",
                f"extract one of them, or {PICK_FRAME}",
                remedy="frame",
                choices=[f"volume {n}" for n in range(min(frames, MOST_CHOICES))],
            )
        return 0
    if not 0 <= frame < frames:
        raise VolumeError(f"{path}: has no frame {frame}; they are numbered 0 to {frames - 1}")
    return frame
