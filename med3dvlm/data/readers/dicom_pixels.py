"""Decode the pixels of DICOM planes: native and compressed, as stored and as values."""

from collections.abc import Iterator

import numpy as np
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import UID, JPEGTransferSyntaxes

from med3dvlm.data.readers.base import VolumeError
from med3dvlm.data.readers.dicom_header import open_stream, parsing
from med3dvlm.data.readers.dicom_itk import ItkDecoder, ItkError
from med3dvlm.data.readers.dicom_planes import PixelSource, Plane
from med3dvlm.data.scratch import let_go, put, slabs

MAX_COMPRESSED = 1 << 26  # pixels of one compressed frame: 8192 x 8192
INSTALL = {  # what decodes a transfer syntax that neither this environment's pydicom nor SimpleITK can
    "1.2.840.10008.1.2.4.5": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.6": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.7": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.8": "pyjpegls",
    "1.2.840.10008.1.2.4.9": "pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.20": "pylibjpeg-openjpeg",
}


def read_values(planes: list[Plane], array: np.ndarray) -> None:
    """Fill `array` `[k, j, i]` float32 with the rescaled values of `planes`, one after the other.

    Padding becomes the smallest of all other values. MONOCHROME1 says how to show values, so nothing is inverted.
    Raises:
        VolumeError: pixels are truncated or cannot be decoded, or everything is padding.
    """
    padded = []
    for k, stored in stored_planes(planes):
        plane = planes[k]
        if plane.slope == 1 and plane.source.stored <= 16:
            values = np.add(stored, np.float32(plane.intercept), dtype=np.float32)
        else:
            values = (stored * plane.slope + plane.intercept).astype(np.float32)  # in float64 until here
        if plane.padding:
            blank = (stored >= plane.padding[0]) & (stored <= plane.padding[1])
            if blank.any():
                values[blank] = np.nan
                padded.append(k)
        put(array[k], values)
    if padded:
        lowest = np.fmin.reduce([np.fmin.reduce(part, axis=None) for part in slabs(array)])
        if np.isnan(lowest):
            raise VolumeError(f"{planes[0].path}: every pixel of the series is padding")
        for k in padded:
            array[k][np.isnan(array[k])] = lowest
            let_go(array)


def stored_planes(planes: list[Plane]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index in `planes`, stored integers `[rows, columns]`), file after file.

    Raises:
        VolumeError: pixels are truncated or cannot be decoded.
    """
    files: dict[PixelSource, dict[int, int]] = {}
    for k, plane in enumerate(planes):
        files.setdefault(plane.source, {})[plane.index] = k
    with ItkDecoder() as itk:
        for source, wanted in files.items():
            with parsing(source.path):
                compressed = UID(source.syntax).is_encapsulated
                for index, stored in _encapsulated(source, wanted, itk) if compressed else _native(source, wanted):
                    yield wanted[index], stored


def _options(source: PixelSource, frames: int) -> dict:
    """What pydicom's decoders want to know."""
    return dict(
        rows=source.rows,
        columns=source.columns,
        number_of_frames=frames,
        samples_per_pixel=1,
        photometric_interpretation="MONOCHROME2",
        pixel_representation=int(source.signed),
        bits_allocated=source.allocated,
        bits_stored=source.stored,
        pixel_keyword="PixelData",
        pixel_vr=source.vr,
    )


def _native(source: PixelSource, wanted) -> Iterator[tuple[int, np.ndarray]]:
    expected = source.frames * source.rows * source.columns * source.allocated // 8
    with open_stream(source.path, source.syntax) as stream:
        there = min(source.length, stream.seek(0, 2) - source.offset)
        if there < expected:
            raise VolumeError(f"{source.path}: truncated: {there} of {expected} bytes of pixels are there")
        decoder = get_decoder(source.syntax)
        options = _options(source, source.frames)
        for index in sorted(wanted):
            stream.seek(source.offset)
            stored, _ = decoder.as_array(stream, index=index, raw=True, correct_unused_bits=False, **options)
            unused = source.allocated - 1 - source.high  # bits above the highest: overlays, rubbish
            if source.stored < source.allocated:
                stored = (stored << unused) >> (source.allocated - source.stored)
            yield index, stored


def _encapsulated(source: PixelSource, wanted, itk: ItkDecoder) -> Iterator[tuple[int, np.ndarray]]:
    found = 0
    if source.rows * source.columns > MAX_COMPRESSED:  # decoders take several times as much memory
        raise VolumeError(f"{source.path}: compressed slices of {source.rows} x {source.columns} pixels are not read")
    with open_stream(source.path, source.syntax) as stream:
        _check_fragments(source, stream)
        stream.seek(source.offset)
        for index, encoded in enumerate(generate_frames(stream, number_of_frames=source.frames)):
            if index in wanted:
                found += 1
                yield index, _decode(source, bytes(encoded), itk)
    if found < len(wanted):
        raise VolumeError(f"{source.path}: truncated: {found} of {len(wanted)} frames are there")


def _check_fragments(source: PixelSource, stream) -> None:
    """Refuse a file that ends within compressed data: some decoders would fill up what is missing."""
    size, at = stream.seek(0, 2), source.offset
    while at + 8 <= size:
        stream.seek(at)
        head = stream.read(8)
        if head[:4] != b"\xfe\xff\x00\xe0":  # no further item
            return
        at += 8 + int.from_bytes(head[4:], "little")
    raise VolumeError(f"{source.path}: truncated: it ends within its compressed pixels")


def _decode(source: PixelSource, encoded: bytes, itk: ItkDecoder) -> np.ndarray:
    """One compressed frame `[rows, columns]`, by pydicom's plugins where they can, else by SimpleITK."""
    size = codestream_size(encoded)
    if size not in (None, (source.rows, source.columns)):
        raise VolumeError(f"{source.path}: declares {(source.rows, source.columns)} pixels and compresses {size}")
    decoder = get_decoder(source.syntax)
    name = UID(source.syntax).name
    if decoder.is_available:
        try:
            stream = encapsulate([encoded], has_bot=False)
            return decoder.as_array(stream, index=0, raw=True, **_options(source, 1))[0]
        except (RuntimeError, ValueError) as error:  # into which pydicom collects what its plugins raise
            if source.syntax not in JPEGTransferSyntaxes:  # Pillow knows only 8 bits
                raise VolumeError(f"{source.path}: its pixels ({name}) are damaged and cannot be decoded") from error
    try:
        return itk.decode(source, encoded)
    except ItkError as error:
        package = next((package for start, package in INSTALL.items() if source.syntax.startswith(start)), None)
        advice = f"install {package}, if the file is sound" if package else "convert it to another transfer syntax"
        raise VolumeError(f"{source.path}: its pixels ({name}) cannot be decoded here; {advice}") from error


def codestream_size(encoded: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 stream declares; None where it is something else."""
    start = encoded[:4096].find(b"\xff\x4f\xff\x51")  # JPEG 2000: start of the codestream, then its size
    if start >= 0 and len(encoded) >= start + 24:
        right, bottom, left, top = (int.from_bytes(encoded[start + n : start + n + 4]) for n in (8, 12, 16, 20))
        return bottom - top, right - left
    if encoded[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 < len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # start of a frame
            return int.from_bytes(encoded[at + 5 : at + 7]), int.from_bytes(encoded[at + 7 : at + 9])
        at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4])
    return None
