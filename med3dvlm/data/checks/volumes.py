"""Checks of one prepared volume: does it open, does it hold an image, are its slices in order."""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from med3dvlm.data.checks.findings import Finding
from med3dvlm.data.codes import read_codes
from med3dvlm.data.manifest import missing_hint
from med3dvlm.data.preprocess import preprocess
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.readers.base import PUBLISHED_SIZE
from med3dvlm.data.volume import VolumeError, load_volume

BLOCKS = 8  # a fingerprint has this many along each axis
TOLERANCE = 1e-4  # around 0..1
_DARK, _FEWEST = 0.05, 1 / 200  # near-empty: so few voxels are brighter
_FEW_SLICES = 16  # too few to judge their order
_LAGS = 16
_ALIKE, _RISE, _EVERY_QUARTER = 0.3, 0.03, 0.008  # correlations, see `out_of_order`


@dataclass(frozen=True)
class VolumeFacts:
    """What is known of a volume after it was read.

    shape: (D, H, W), None where it does not open. mean: of its values. filled: share of voxels brighter than 5%.
    fingerprint: float16 `[8, 8, 8]`, means of blocks; None where there is no image.
    """

    findings: tuple[Finding, ...]
    shape: tuple[int, int, int] | None = None
    mean: float = 0.0
    filled: float = 0.0
    fingerprint: np.ndarray | None = None


@dataclass(frozen=True)
class Reader:
    """Reads volumes as training sees them.

    size: (D, H, W) of prepared volumes. config: what links to original files go through, as `med3dvlm.data.convert`
    leaves them; None: nothing.
    """

    size: tuple[int, int, int] = PUBLISHED_SIZE
    config: PreprocessConfig | None = None

    def __call__(self, path: Path) -> np.ndarray:
        """`[D, H, W]`: uint8 codes, or float32 as stored. Raises VolumeError."""
        codes = read_codes(path, self.size)
        if codes is not None:
            return codes
        volume = load_volume(path, prepared_size=self.size)
        if self.config is None or volume.prepared or not path.is_symlink():
            return volume.array
        return preprocess(volume, self.config)[0].numpy()


def check_volume(path: Path, name: str, read: Reader) -> VolumeFacts:
    """Read a volume and look for everything that one volume alone can show. name: what findings call it."""
    if not path.exists():
        return VolumeFacts((Finding("missing_image", name, missing_hint(str(path)).removeprefix("; ")),))
    try:
        array = read(path)
    except VolumeError as error:
        return VolumeFacts((Finding("unreadable_image", name, str(error)),))
    findings = []
    scale = 255 if array.dtype == np.uint8 else 1
    low, high = float(array.min()) / scale, float(array.max()) / scale
    filled = float(np.count_nonzero(array > _DARK * scale)) / array.size
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        findings.append(Finding("range", name, f"{low:.4g} .. {high:.4g}"))
    facts = {"shape": array.shape, "mean": float(array.mean(dtype=np.float64)) / scale, "filled": filled}
    if low == high:
        return VolumeFacts((*findings, Finding("constant", name, f"{low:.4g} everywhere")), **facts)
    if filled < _FEWEST:
        findings.append(Finding("near_empty", name, f"{filled:.2%} of the voxels"))
    repeated = repeated_slices(array)
    if repeated:
        findings.append(Finding("slices_repeated", name, f"{repeated} of {len(array)} slices"))
    if out_of_order(array):
        findings.append(Finding("slice_order", name))
    return VolumeFacts(tuple(findings), fingerprint=block_means(array).astype(np.float16), **facts)


def repeated_slices(array: np.ndarray) -> int:
    """How many slices `[D, H, W]` are copies of another one.

    Blank slices don't count, nor do copies at either end: where few slices are enlarged to many, the first and the last
    come several times.
    """
    digests = [zlib.crc32(np.ascontiguousarray(plane)) for plane in array]
    first = next((i for i, digest in enumerate(digests) if digest != digests[0]), len(digests))
    last = next((i for i, digest in enumerate(reversed(digests)) if digest != digests[-1]), len(digests))
    inner = digests[max(first - 1, 0) : len(digests) - max(last - 1, 0)]
    blank = {digest for digest, plane in zip(digests, array, strict=True) if plane.min() == plane.max()}
    return sum(count - 1 for digest, count in Counter(inner).items() if digest not in blank)


def out_of_order(array: np.ndarray) -> bool:
    """Whether slices `[D, H, W]` alternate, as in some sagittal series of M3D, or are scattered.

    In an ordered volume slices grow less alike with their distance. Both signs of disorder look at all distances up to
    16, because resizing along D stretches and blurs what was at a distance of 1 or 2. The thresholds lie between 21
    real and phantom volumes (cut in three planes, as they are and resized) in order and the same in disorder.
    """
    if len(array) < _FEW_SLICES:
        return False
    rows, columns = (max(1, size // 48) for size in array.shape[1:])
    planes = array[:, ::rows, ::columns].reshape(len(array), -1).astype(np.float32)
    planes -= planes.mean(1, keepdims=True)
    planes /= np.maximum(np.linalg.norm(planes, axis=1, keepdims=True), 1e-6)
    alike = planes @ planes.T  # correlation of each slice with each, [D, D]
    return _alternate(alike) or _scattered(alike)


def _alternate(alike: np.ndarray) -> bool:
    """Whether slices at some distance are clearly more alike than slices at a smaller one, everywhere.

    Distances: up to 16, and half of the volume, where the even slices are followed by the odd ones.
    """
    lags = range(1, min(_LAGS, len(alike) // 3) + 1)
    return _rises(alike, lags) or any(_rises(alike, (*lags, lag)) for lag in {len(alike) // 2, (len(alike) + 1) // 2})


def _rises(alike: np.ndarray, lags: Sequence[int]) -> bool:
    by_lag = np.stack([alike.diagonal(lag)[: len(alike) - lags[-1]] for lag in lags])
    means = by_lag.mean(1)
    farther = int((means - np.minimum.accumulate(means)).argmax())
    nearer = int(means[: farther + 1].argmin())
    return bool(means[farther] > _ALIKE) and _everywhere(by_lag[farther] - by_lag[nearer])


def _scattered(alike: np.ndarray) -> bool:
    """Whether more slices than could lie nearer are more like a slice than those at some distance on either side.

    At distance k up to 2k slices lie nearer, twice as many where left and right are mirror images.
    """
    others = alike.copy()
    np.fill_diagonal(others, -1)
    others = -np.sort(-others, axis=1)  # the most alike first
    for lag in range(1, min(_LAGS, len(alike) // 6) + 1):
        beside, count = np.zeros(len(alike), np.float32), np.full(len(alike), 2)
        beside[lag:] += alike.diagonal(lag)
        beside[:-lag] += alike.diagonal(lag)
        count[:lag] = count[-lag:] = 1
        expected = others[:, 4 * lag + 1]
        if expected.mean() > _ALIKE and _everywhere(expected - beside / count):
            return True
    return False


def _everywhere(rises: np.ndarray) -> bool:
    """Whether correlation rises clearly on average, and at least a little in each quarter of the volume."""
    return bool(rises.mean() > _RISE and min(quarter.mean() for quarter in np.array_split(rises, 4)) > _EVERY_QUARTER)


def block_means(array: np.ndarray) -> np.ndarray:
    """Means over blocks, `[D, H, W]` -> float32 `[8, 8, 8]` (fewer along an axis with fewer than 8 voxels repeat)."""
    means = array
    for axis in (1, 2, 0):
        edges = np.arange(BLOCKS + 1) * array.shape[axis] // BLOCKS
        # reduceat takes one element where an interval is empty.
        totals = np.add.reduceat(means, np.minimum(edges[:-1], array.shape[axis] - 1), axis=axis, dtype=np.float32)
        counts = np.maximum(np.diff(edges), 1).astype(np.float32)
        means = totals / counts.reshape([-1 if i == axis else 1 for i in range(3)])
    return means if array.dtype != np.uint8 else means / np.float32(255)
