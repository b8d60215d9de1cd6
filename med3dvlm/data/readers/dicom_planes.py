"""The image planes that a DICOM file holds, single or multi-frame, or why it is passed over."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID

from med3dvlm.data.readers.base import VolumeError
from med3dvlm.data.readers.dicom_header import NO_PIXELS, VOLUME_TAGS, parsing, read_header

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # the single-frame class; the numbers of the others continue it
NO_IMAGES = {"SEG": "a segmentation", "RTDOSE": "a radiation dose", "SC": "a secondary capture"}  # by Modality
TEXTS = ("SR", "KO", "PR", "DOC", "REG", "PLAN", "RTPLAN", "RTSTRUCT")  # Modality of files that need no pixels
NO_SLICES = {  # by words of ImageType
    "LOCALIZER": "a localizer", "SCOUT": "a localizer", "TOPOGRAM": "a localizer", "SCREEN SAVE": "a screen capture",
    "DOSE_INFO": "a dose report", "PROJECTION IMAGE": "a projection",
}  # fmt: skip
UNITS = frozenset(  # of PET and nuclear medicine, as the standard has them
    "CNTS NONE CM2 CM2ML PCNT CPS BQML MGMINML UMOLMINML MLMING MLG 1CM UMOLML PROPCNTS PROPCPS MLMINML MLML GML "
    "STDDEV SUV".split()
)


@dataclass(frozen=True)
class PixelSource:
    """Where the pixels of one file lie and how they are stored; `syntax` to `length` are those of `read_header`."""

    path: Path
    syntax: str
    vr: str
    offset: int
    length: int
    frames: int
    rows: int
    columns: int
    allocated: int
    stored: int
    high: int
    signed: bool


@dataclass(frozen=True, eq=False)
class Plane:
    """One slice: a file, or frame number `index` of a multi-frame file.

    series: SeriesInstanceUID. instance: SOPInstanceUID. number: InstanceNumber, or the index of a frame.
    reason: why it cannot be a slice of a volume; then the fields below it keep their defaults.
    position: mm, in DICOM's LPS, of the centre of the first pixel. along: unit vectors `[2, 3]` in which the column and
    the row index grow. spacing: mm between rows and between columns. inverse: MONOCHROME1. padding: range of stored
    values that are no image. key: the values of `VOLUME_TAGS`.
    """

    path: Path
    index: int
    series: str
    instance: str
    number: int
    modality: str
    series_number: int
    description: str
    reason: str = ""
    source: PixelSource | None = None
    position: np.ndarray | None = None
    along: np.ndarray | None = None
    spacing: tuple[float, float] = (1.0, 1.0)
    slope: float = 1.0
    intercept: float = 0.0
    units: str = ""
    inverse: bool = False
    padding: tuple[int, int] | None = None
    key: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return (self.source.rows, self.source.columns) if self.source else (0, 0)


def read_planes(path: Path) -> list[Plane]:
    """The planes of one DICOM file; a single one with a `reason` where it holds none. Empty for a DICOMDIR.

    Raises:
        VolumeError: the file cannot be parsed, or contradicts itself.
    """
    with parsing(path):
        header, pixels = read_header(path)
        if header is None:
            return []
        if pixels == NO_PIXELS and _was_image(header):
            raise VolumeError(f"{path}: truncated: it describes an image and ends before the pixels")
        reason = _why_no_image(header, pixels)
        if reason:
            return [Plane(**_identity(path, header, 0), reason=reason)]
        source = _pixel_source(path, header, pixels)
        return [_plane(frame, source, index) for index, frame in enumerate(_frames(header, source))]


def _was_image(header: Dataset) -> bool:
    """Whether a header without pixels is what is left of an image, rather than that of a text or an emptied file."""
    if header.get("Modality") in TEXTS:
        return False
    cut = "SeriesInstanceUID" not in header  # which every image has, close to the beginning
    return "Rows" in header or cut and UID(header.get("SOPClassUID", "")).name.endswith("Image Storage")


def _why_no_image(header: Dataset, pixels) -> str:
    """Why this file holds no slices of a volume; empty if it may."""
    if isinstance(pixels, str) or not (header.get("Rows") and header.get("Columns")):
        return pixels if isinstance(pixels, str) else NO_PIXELS
    if str(header.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE):
        return "a secondary capture"
    if header.get("Modality") in NO_IMAGES:
        return NO_IMAGES[header.Modality]
    words = header.get("ImageType") or []
    for word in [words] if isinstance(words, str) else words:
        if word.strip().upper() in NO_SLICES:
            return NO_SLICES[word.strip().upper()]
    grey = header.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    if not grey or header.get("SamplesPerPixel", 1) != 1:
        return "a colour image"
    if header.get("BitsAllocated") not in (8, 16, 32):
        return "pixels that are not 8, 16 or 32 bits wide"
    if int(header.get("NumberOfFrames") or 1) > 1 and "PerFrameFunctionalGroupsSequence" not in header:
        return "several frames without a position each"
    return ""


def _pixel_source(path: Path, header: Dataset, pixels) -> PixelSource:
    allocated = int(header.BitsAllocated)
    stored = int(header.get("BitsStored") or allocated)
    high = header.get("HighBit")
    high = stored - 1 if high is None else int(high)
    if not 1 <= stored <= high + 1 <= allocated:
        raise VolumeError(f"{path}: stores {stored} of {allocated} bits, the highest being bit {high}: impossible")
    return PixelSource(
        path,
        *pixels,
        frames=int(header.get("NumberOfFrames") or 1),
        rows=int(header.Rows),
        columns=int(header.Columns),
        allocated=allocated,
        stored=stored,
        high=high,
        signed=bool(header.get("PixelRepresentation")),
    )


def _frames(header: Dataset, source: PixelSource) -> Iterator[Dataset]:
    """One flat header a frame: that of the file, over it the groups that all frames share, over them its own."""
    if "PerFrameFunctionalGroupsSequence" not in header:
        yield header
        return
    own_groups = header.PerFrameFunctionalGroupsSequence
    if len(own_groups) != source.frames:
        raise VolumeError(f"{source.path}: declares {source.frames} frames and describes {len(own_groups)}")
    shared_groups = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    del header.PerFrameFunctionalGroupsSequence
    for own in own_groups:
        flat = Dataset()
        flat.update(header)
        for groups in (shared_groups, own):
            for group in groups:
                if group.VR == "SQ" and group.value:
                    flat.update(group.value[0])
        yield flat


def _identity(path: Path, header: Dataset, index: int) -> dict:
    modality = str(header.get("Modality") or "")
    multi_frame = int(header.get("NumberOfFrames") or 1) > 1
    return dict(
        path=path,
        index=index,
        series=str(header.get("SeriesInstanceUID") or ""),
        instance=str(header.get("SOPInstanceUID") or path),
        number=index if multi_frame else int(header.get("InstanceNumber") or 0),
        modality=modality if re.fullmatch("[A-Z]{2}", modality) else "",  # nothing that somebody typed
        series_number=int(header.get("SeriesNumber") or 0),
        description=str(header.get("SeriesDescription") or ""),
    )


def _plane(header: Dataset, source: PixelSource, index: int) -> Plane:
    identity = _identity(source.path, header, index)
    geometry = _geometry(header)
    if isinstance(geometry, str):
        return Plane(**identity, reason=geometry)
    position, along, spacing = geometry
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    units = _units(header, slope is not None and intercept is not None)
    slope, intercept = float(1 if slope is None else slope), float(intercept or 0)
    if not (np.isfinite([slope, intercept]).all() and slope):
        raise VolumeError(f"{source.path}: rescale slope {slope} and intercept {intercept} give no values")
    return Plane(
        **identity,
        source=source,
        position=position,
        along=along,
        spacing=spacing,
        slope=slope,
        intercept=intercept,
        units=units,
        inverse=header.PhotometricInterpretation == "MONOCHROME1",
        padding=_padding(header, source),
        key=tuple(str(header.get(keyword, "")) for keyword in VOLUME_TAGS),
    )


def _geometry(header: Dataset):
    """Position, directions and pixel spacing of a plane, or what is wrong with them."""
    lengths = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    values = {}
    for keyword, length in lengths.items():
        value = header.get(keyword)
        if value is None or isinstance(value, str) or not hasattr(value, "__len__") or len(value) != length:
            return f"no {keyword}"
        values[keyword] = np.array(value, dtype=np.float64)
        if not np.isfinite(values[keyword]).all():
            return f"{keyword} is not finite"
    along = values["ImageOrientationPatient"].reshape(2, 3)
    sizes = np.linalg.norm(along, axis=1)
    if np.abs(sizes - 1).max() > 0.01 or abs(along[0] @ along[1]) > 0.01:
        return "ImageOrientationPatient is not two perpendicular unit vectors"
    spacing = values["PixelSpacing"]
    if not (spacing > 0).all():
        return "PixelSpacing is not positive"
    return values["ImagePositionPatient"], along / sizes[:, None], (float(spacing[0]), float(spacing[1]))


def _units(header: Dataset, rescaled: bool) -> str:
    if header.get("Modality") == "CT":
        return "HU" if rescaled and header.get("RescaleType") in (None, "", "HU", "US") else ""
    units = str(header.get("Units") or "")
    return units if units in UNITS else ""


def _padding(header: Dataset, source: PixelSource) -> tuple[int, int] | None:
    """The range of stored values that mean "no image"; their sign is that of the pixels, whatever the header's VR."""
    value = header.get("PixelPaddingValue")
    if value is None or value == "":
        return None
    limit = header.get("PixelPaddingRangeLimit")
    ends = []
    for end in (value, value if limit is None or limit == "" else limit):
        end = int(end) % (1 << source.allocated)
        ends.append(end - (1 << source.allocated) if source.signed and end >> (source.allocated - 1) else end)
    return min(ends), max(ends)
