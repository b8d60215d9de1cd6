"""From a folder of slices straight to its prepared volume: the published preset, slice by slice, in bytes.

The same result as `preprocess(load_volume(folder))`, which expands the whole series to float32 first. Here slices stay
uint8: maximum and bounding box come from the highest value of each pixel over all slices, each slice is resized inside
the box while it is in the processor's cache, and neighbouring slices are blended into each slice of the result. The
memory that this takes does not depend on the number of slices (see `SlicePreparer`). Torch is not needed.

Grey JPEG and PNG files are decoded by OpenCV, whose values are those of Pillow (tested); colour, palettes, 16 bits and
whatever looks odd go through Pillow, whose rule is the published one.
"""

import struct
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from med3dvlm.data.geometry import linear_taps
from med3dvlm.data.readers.slices import read_slice
from med3dvlm.data.volume import VolumeError, slice_files

MEMORY = 256 * 2**20  # bytes of decoded slices that are kept: a series of 1,000 slices of 512x512
MAX_PIXELS = 2**26  # of one slice; more are refused before memory is taken
SAMPLED_SLICES, SAMPLED_PIXELS = 16, 6000  # what a sample of a series holds at least, where there is so much
LOW_CONTRAST = 64  # below so many grey values, float32 rounding is followed step by step


@dataclass(frozen=True)
class PreparedSlices:
    """array: `[D, H, W]`, uint8 codes or float32 within 0..1. shape: of the series (D, H, W). sample: some of its grey
    values, `[d, h, w]` uint8, evenly spread. notes: sentences that a user should see.
    """

    array: np.ndarray
    shape: tuple[int, int, int]
    sample: np.ndarray
    notes: tuple[str, ...] = ()


class _DeeperThanBytes(Exception):
    """A slice has 16 bits."""


@dataclass
class _Series:
    """The slices of one shape (H, W): files, what was kept of them, extremes."""

    files: list[Path] = field(default_factory=list)
    kept: list[np.ndarray | None] = field(default_factory=list)
    sampled: list[np.ndarray] = field(default_factory=list)
    highest: list[int] = field(default_factory=list)  # of each slice
    lowest: int = 255
    peak: np.ndarray | None = None  # [H, W] uint8, the highest value of each pixel over all slices

    def add(self, file: Path, image: np.ndarray, keep: bool, sampled: bool) -> None:
        self.peak = image.copy() if self.peak is None else np.maximum(self.peak, image, out=self.peak)
        self.highest.append(int(image.max()))
        self.lowest = min(self.lowest, int(image.min()))
        self.files.append(file)
        self.kept.append(image if keep else None)
        if sampled or not self.sampled:
            step = max(1, int((image.size / SAMPLED_PIXELS) ** 0.5))
            self.sampled.append(image[::step, ::step].copy())

    def slice(self, index: int) -> np.ndarray:
        """One slice `[H, W]` uint8, decoded again where it was not kept."""
        image = self.kept[index]
        return decode_slice(self.files[index]) if image is None else image


class SlicePreparer:
    """Prepares folders of slices, one after the other, in memory that it keeps.

    It holds at most `memory` bytes of decoded slices (what exceeds them is decoded again when its turn comes), the
    result, and a few slices in float32.

    Args:
        size: (D, H, W) of the result.
        codes: return uint8 codes (255 is 1) instead of float32 values within 0..1.
        memory: bytes of decoded slices to keep.
    """

    def __init__(self, size: tuple[int, int, int], codes: bool = True, memory: int = MEMORY):
        cv2.setNumThreads(1)  # cases run in parallel already
        self.size = size
        self.codes = codes
        # Untouched pages take no memory, and used ones serve the next series without being faulted in again.
        self.arena = np.empty(memory, np.uint8)
        self.plane = np.empty(0, np.float32)
        self.resized = np.empty((2, *size[1:]), np.float32)  # the two neighbours of a slice of the result

    def __call__(self, folder) -> PreparedSlices | None:
        """The prepared volume of a folder; None where its slices have 16 bits, which `load_volume` reads.

        Raises:
            VolumeError: no slices, one that cannot be read, or no contrast.
        """
        try:
            series, left_out = self._read(folder)
            low, high = series.lowest, max(series.highest)
            if not high > low:
                raise VolumeError(f"{folder}: all values are {low / 255:g}, there is nothing to see")
            array = self._resize(series, low, high)
        except _DeeperThanBytes:
            return None
        if array.min() == array.max():
            raise VolumeError(f"{folder}: nearly all of its values are the same, there is nothing to see")
        shape = (len(series.files), *series.peak.shape)
        count = len(series.files) + left_out
        notes = (f"{left_out} of {count} slices left out: their size is not the common {shape[1:]}",)
        return PreparedSlices(array, shape, np.stack(series.sampled), notes if left_out else ())

    def _read(self, folder) -> tuple[_Series, int]:
        """Decode every slice once. The most frequent shape wins, as published; returns also how many have another."""
        files = slice_files(folder)
        if not files:
            raise VolumeError(f"{folder}: holds no slices (.png, .jpeg, .jpg)")
        shapes: dict[tuple[int, int], _Series] = defaultdict(_Series)
        used = 0
        for number, file in enumerate(files):
            image = decode_slice(file)
            keep = used + image.size <= self.arena.size
            if keep:
                place = self.arena[used : used + image.size].reshape(image.shape)
                place[:] = image
                image, used = place, used + image.size
            shapes[image.shape].add(file, image, keep, number % max(1, len(files) // SAMPLED_SLICES) == 0)
        series = max(shapes.values(), key=lambda series: len(series.files))
        return series, len(files) - len(series.files)

    def _resize(self, series: _Series, low: int, high: int) -> np.ndarray:
        """Crop to the voxels above the minimum and resize, trilinear with half-pixel centres."""
        depth = _extent(np.array(series.highest) > low)
        box = tuple(_extent(series.peak.max(axis=axis) > low) for axis in (1, 0))
        rows, columns = (linear_taps(e.stop - e.start, size) for e, size in zip(box, self.size[1:], strict=True))
        upper, lower, weights = linear_taps(depth.stop - depth.start, self.size[0])
        unit = 255 if self.codes else 1
        if high - low < LOW_CONTRAST:
            table, scale, offset = _published_values(low, high), unit, 0
        else:
            table, scale, offset = None, unit / (high - low), -low * unit / (high - low)

        result = np.empty(self.size, np.uint8 if self.codes else np.float32)  # [D, H, W]
        held = [-1, -1]  # which source slices `resized` holds
        for index in range(self.size[0]):
            for source in {int(upper[index]), int(lower[index])}:
                if held[source % 2] != source:
                    image = series.slice(depth.start + source)[box]
                    self._resize_plane(image, table, rows, columns, self.resized[source % 2])
                    held[source % 2] = source
            first, second = self.resized[upper[index] % 2], self.resized[lower[index] % 2]  # [H, W]
            share = float(weights[index])
            # Blending, scaling and, for codes, rounding to the nearest (ties to even, as numpy) in one pass.
            cv2.addWeighted(
                first, (1 - share) * scale, second, share * scale, offset, dst=result[index],
                dtype=cv2.CV_8U if self.codes else cv2.CV_32F,
            )  # fmt: skip
        # Rounding may leave the interval by 1e-7.
        return result if self.codes else np.clip(result, 0, 1, out=result)

    def _resize_plane(self, image: np.ndarray, table, rows, columns, result: np.ndarray) -> None:
        """Resize `[h, w]` uint8 into `result` [H, W] float32."""
        if self.plane.size < image.size:
            self.plane = np.empty(image.size, np.float32)
        plane = self.plane[: image.size].reshape(image.shape)
        if table is None:
            np.copyto(plane, image)
        else:
            cv2.LUT(image, table, dst=plane)
        if _all_exact(image.shape, result.shape):
            cv2.resize(plane, result.shape[::-1], dst=result, interpolation=cv2.INTER_LINEAR)
            return
        upper, lower, weights = rows
        tall = plane[upper] * (1 - weights)[:, None] + plane[lower] * weights[:, None]  # [H, w]
        left, right, weights = columns
        np.add(tall[:, left] * (1 - weights), tall[:, right] * weights, out=result)


def _extent(inside: np.ndarray) -> slice:
    """From the first to the last True."""
    found = np.flatnonzero(inside)
    return slice(int(found[0]), int(found[-1]) + 1)


def _published_values(low: int, high: int) -> np.ndarray:
    """What each grey value becomes, `[256]` float32, with the roundings of the published steps (/255, -min, /max)."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    values -= values[low]
    return values / max(values[high], np.float32(1e-8))


def _all_exact(shape, size) -> bool:
    """Whether float32 holds all scales exactly, as for the published size: then OpenCV's positions are torch's."""
    return all(float(np.float32(n / m)) == n / m for n, m in zip(shape, size, strict=True))


def decode_slice(file: Path) -> np.ndarray:
    """One slice as 8-bit grey, `[H, W]` uint8, by the published rule.

    Raises:
        VolumeError: not an image, damaged, or larger than MAX_PIXELS.
        _DeeperThanBytes: more than 8 bits.
    """
    try:
        with open(file, "rb", buffering=0) as stream:
            data = stream.read()
    except OSError as error:
        raise VolumeError(f"{file}: cannot be read ({error.strerror})") from error
    shape = _grey_shape(data)
    if shape is not None and 0 < shape[0] * shape[1] <= MAX_PIXELS:
        flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is not None and image.shape == shape:
            return image
    image = read_slice(file, MAX_PIXELS)
    if image.dtype != np.uint8:
        raise _DeeperThanBytes
    return image


def _grey_shape(data: bytes) -> tuple[int, int] | None:
    """(H, W) of a complete 8-bit grey JPEG or PNG file; None for everything else."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        if data[12:16] != b"IHDR" or data[-8:-4] != b"IEND":
            return None
        width, height, bits, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
        return (height, width) if (bits, colour, interlace) == (8, 0, 0) else None
    if data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9":
        return _grey_jpeg_shape(data)
    return None


def _grey_jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Walk the segments of a JPEG file to the one that starts the frame."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            return (height, width) if (bits, components) == (8, 1) else None
        position += 2 + length
    return None
