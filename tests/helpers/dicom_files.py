"""Synthetic DICOM files, written with pydicom: single slices, series, and enhanced multi-frame files."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

SERIES = "1.2.826.0.1.3680043.8.498.1"
AXIAL = [1, 0, 0, 0, 1, 0]


def image(pixels: np.ndarray, **tags) -> Dataset:
    """A CT header with uncompressed pixels `[rows, columns]` or `[frames, rows, columns]` of 8, 16 or 32 bits.

    A tag that is None is left out.
    """
    bits = 8 * pixels.dtype.itemsize
    header = dict(
        SOPClassUID=CTImageStorage, SOPInstanceUID=generate_uid(), SeriesInstanceUID=SERIES, Modality="CT",
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], PatientName="Planted^Name", PatientID="PLANTED-ID",
        Rows=pixels.shape[-2], Columns=pixels.shape[-1], SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=int(pixels.dtype.kind == "i"),
        RescaleSlope=1, RescaleIntercept=0, SliceThickness=99, SpacingBetweenSlices=99, PixelSpacing=[1, 1],
    )  # fmt: skip
    dataset = Dataset()
    for keyword, value in (header | tags).items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    return dataset


def save(path, dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> Path:
    """Write in the given transfer syntax, whatever the name says."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def compressed(dataset: Dataset, frames: list[bytes]) -> Dataset:
    """Replace the pixels by compressed frames."""
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return dataset


def geometry(affine) -> tuple[list[float], list[float], np.ndarray, np.ndarray]:
    """(ImageOrientationPatient, PixelSpacing, origin, step between slices) in LPS of an affine (i, j, k) -> RAS+."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine, float)
    sizes = np.linalg.norm(lps[:3, :2], axis=0)
    directions = lps[:3, :2] / sizes
    return [*directions[:, 0], *directions[:, 1]], [sizes[1], sizes[0]], lps[:3, 3], lps[:3, 2]


def write_series(folder, array: np.ndarray, affine=None, positions=None, names=None, **tags) -> Path:
    """Write `[k, j, i]` as one file a slice.

    affine: (i, j, k, 1) -> mm, RAS+. positions: instead of its k, fractional slice numbers. names: of the files.
    """
    orientation, spacing, origin, step = geometry(np.diag([-1.0, -1, 1, 1]) if affine is None else affine)
    for k, plane in enumerate(array):
        place = origin + step * (k if positions is None else positions[k])
        given = dict(
            ImageOrientationPatient=[f"{v:.10g}" for v in orientation],
            ImagePositionPatient=[f"{v:.10g}" for v in place],
            PixelSpacing=[f"{v:.10g}" for v in spacing],
            InstanceNumber=k + 1,
        )
        name = names[k] if names is not None else f"{k:03d}.dcm"
        save(Path(folder, name), image(plane, **(given | tags)))
    return Path(folder)


def item(**tags) -> Sequence:
    """A sequence of one item."""
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return Sequence([dataset])


def enhanced(array: np.ndarray, affine, order, frame_content=None, rescale=None, **tags) -> Dataset:
    """An enhanced multi-frame image whose frame n is slice `order[n]` of `[k, j, i]`.

    frame_content: one dict of FrameContent values a frame. rescale: (slope, intercept) a frame.
    """
    orientation, spacing, origin, step = geometry(affine)
    dataset = image(array[np.asarray(order)], SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(order), **tags)
    for keyword in ("RescaleSlope", "RescaleIntercept", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"):
        delattr(dataset, keyword)
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=[f"{v:.10g}" for v in orientation])
    shared.PixelMeasuresSequence = item(PixelSpacing=[f"{v:.10g}" for v in spacing], SliceThickness=99)
    frames = []
    for n, k in enumerate(order):
        frame = Dataset()
        frame.PlanePositionSequence = item(ImagePositionPatient=[f"{v:.10g}" for v in origin + step * k])
        slope, intercept = rescale[n] if rescale else (1, 0)
        frame.PixelValueTransformationSequence = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
        frame.FrameContentSequence = item(**(frame_content[n] if frame_content else {}))
        frames.append(frame)
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return dataset
