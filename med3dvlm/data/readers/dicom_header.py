"""Parse the headers of DICOM files, within bounds whatever the file says, up to their pixels.

Only the tags listed here are looked at; none of them identifies a person, apart from what hospitals write into
`SeriesDescription`, which goes into listings only.
"""

import io
import logging
import os
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from med3dvlm.data.readers.base import VolumeError, decoding

MAX_ELEMENTS = 200_000  # of one header
MAX_INFLATED = 1 << 28  # bytes of a file in the deflated transfer syntax
UNDEFINED_LENGTH = 0xFFFFFFFF
NO_PIXELS = "no pixels"
PIXEL_DATA = 0x7FE00010
FLOAT_PIXELS = (0x7FE00008, 0x7FE00009)

# What can tell the volumes of one series apart, in the order in which they are tried.
VOLUME_TAGS = (
    "StackID", "TemporalPositionIdentifier", "TemporalPositionIndex", "AcquisitionNumber", "EchoNumbers", "EchoTime",
    "EffectiveEchoTime", "DiffusionBValue", "DiffusionGradientOrientation", "TriggerTime",
    "NominalPercentageOfCardiacPhase", "NominalCardiacTriggerDelayTime", "FrameReferenceTime", "ImageType", "FrameType",
    "InversionTime", "FlipAngle", "KVP", "ConvolutionKernel",
)  # fmt: skip
OTHER_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "InstanceNumber",
    "Modality", "Units", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip
TAGS = [tag_for_keyword(keyword) for keyword in VOLUME_TAGS + OTHER_TAGS]


def is_dicom_file(path) -> bool:
    """Whether a file begins as DICOM does: the mark after 128 bytes, or at once an element of group 2 or 8."""
    if not os.path.isfile(path):  # not a pipe or a device, which could block
        return False
    with open(path, "rb") as stream:
        return begins_as_dicom(stream.read(132))


def begins_as_dicom(head: bytes) -> bool:
    """As `is_dicom_file`, of the first 132 bytes."""
    if head[128:] == b"DICM":
        return True
    explicit, implicit = head[4:6].isalpha() and head[4:6].isupper(), head[6:8] == b"\0\0"
    group = int.from_bytes(head[:2], "little")
    return head[3:4] == b"\0" and (group == 8 and (explicit or implicit) or group == 2 and explicit)


@contextmanager
def parsing(path: Path):
    """As `decoding`, and pydicom's warnings stay unheard: they quote values of the header."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with decoding(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Stop:
    """pydicom's `stop_when`: stops at tags, gives up on endless headers, and knows where the last element ends."""

    def __init__(self, path: Path, stream, at: Callable[[BaseTag], bool]):
        self.path, self.stream, self.at = path, stream, at
        self.count = self.end = 0

    def __call__(self, tag: BaseTag, vr, length: int) -> bool:
        self.count += 1
        if self.count > MAX_ELEMENTS:  # some files end in megabytes of zeros, each eight of which are an element
            raise VolumeError(f"{self.path}: its header has more than {MAX_ELEMENTS:,} elements; is it DICOM?")
        if self.at(tag):
            return True
        self.end = self.stream.tell() + (0 if length == UNDEFINED_LENGTH else length)
        return False

    def check(self) -> None:
        """pydicom takes an element that goes on behind the end of the file for a short one."""
        if self.end > self.stream.seek(0, os.SEEK_END):
            raise VolumeError(f"{self.path}: truncated: it ends within its header")


def _read_meta(path: Path, stream) -> Dataset:
    """The elements of group 2 at the beginning, behind the preamble if there is one; the stream stands behind them."""
    stream.seek(128)
    stream.seek(132 if stream.read(4) == b"DICM" else 0)
    stop = _Stop(path, stream, lambda tag: tag.group != 2)
    meta = read_dataset(stream, False, True, stop_when=stop)
    end = stream.tell()
    stop.check()
    stream.seek(end)
    return meta


@contextmanager
def open_stream(path: Path, syntax: str | None):
    """The bytes of a file as a seekable stream; of a file in the deflated syntax its inflated data set."""
    with path.open("rb") as stream:
        if syntax != DeflatedExplicitVRLittleEndian:
            yield stream
            return
        _read_meta(path, stream)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflater.decompress(stream.read(), MAX_INFLATED)
        if inflater.unconsumed_tail:
            raise VolumeError(f"{path}: inflates to more than {MAX_INFLATED >> 20} MB; store it uncompressed")
        yield io.BytesIO(data)


def read_header(path: Path):
    """The header of a DICOM file, and (transfer syntax, VR, offset, length) of its pixels, or why there are none.

    The offset is that of the value in `open_stream`; the length is -1 where it is undefined, as it is for encapsulated
    frames. Both results are None for a DICOMDIR. Raises what pydicom raises about broken files.
    """
    with path.open("rb") as stream:
        meta = _read_meta(path, stream)
        start = stream.tell()
        syntax = meta.get("TransferSyntaxUID") or _guessed_syntax(stream.read(6))
    if meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return None, None
    with open_stream(path, syntax) as stream:
        stream.seek(0 if syntax == DeflatedExplicitVRLittleEndian else start)
        stop = _Stop(path, stream, lambda tag: tag == PIXEL_DATA or tag in FLOAT_PIXELS)
        implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
        header = read_dataset(stream, implicit, little, stop_when=stop, specific_tags=TAGS)
        if "SOPClassUID" not in header and "MediaStorageSOPClassUID" in meta:  # the file ends before it, perhaps
            header.SOPClassUID = meta.MediaStorageSOPClassUID
        pixels = _find_pixels(stream, syntax)
        if pixels == NO_PIXELS:
            stop.check()
        return header, pixels


def _guessed_syntax(head: bytes) -> str:
    """The transfer syntax of a file that does not say, by its first element: (group, element, VR), or no VR."""
    if not (head[4:6].isalpha() and head[4:6].isupper()):
        return ImplicitVRLittleEndian
    return ExplicitVRBigEndian if head[:1] == b"\0" else ExplicitVRLittleEndian


def _find_pixels(stream, syntax: str):
    """Read the beginning of the pixel data element, in front of which the parser has stopped."""
    order = "big" if syntax == ExplicitVRBigEndian else "little"
    head = stream.read(8)
    tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)
    if len(head) < 8 or tag != PIXEL_DATA:
        return "floating-point pixels" if tag in FLOAT_PIXELS else NO_PIXELS
    vr, length = "OW", head[4:]
    if head[4:6] in (b"OB", b"OW"):  # explicit: VR, two bytes of nothing, then the length
        vr, length = head[4:6].decode(), stream.read(4)
    length = int.from_bytes(length, order)
    return str(syntax), vr, stream.tell(), -1 if length == UNDEFINED_LENGTH else length
