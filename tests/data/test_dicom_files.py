"""DICOM that others wrote: pydicom's test files (installed with it), compared with SimpleITK, value by value."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import CTImageStorage

from med3dvlm.data.readers.base import Reading, VolumeError
from med3dvlm.data.readers.dicom import list_dicom_series, looks_like_dicom, read_dicom
from med3dvlm.data.volume import load_volume
from tests.helpers.dicom_files import AXIAL

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
TREE = FILES / "dicomdirtests"


def header(file) -> pydicom.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(file, force=True)


def files_with_pixels() -> list[Path]:
    files = [file for file in sorted(FILES.rglob("*")) if file.is_file() and looks_like_dicom(file)]
    return [file for file in files if "PixelData" in header(file)]


def read_with_itk(files) -> sitk.Image:
    if isinstance(files, list):
        return sitk.ReadImage([str(file) for file in files], imageIO="GDCMImageIO")
    return sitk.ReadImage(str(files), imageIO="GDCMImageIO")


def as_background(array: np.ndarray, file) -> np.ndarray:
    """SimpleITK's values with padding replaced as `read_dicom` does."""
    tags = header(file)
    padding = tags.get("PixelPaddingValue")
    if padding is not None:
        blank = array == padding * float(tags.get("RescaleSlope", 1)) + float(tags.get("RescaleIntercept", 0))
        array = np.where(blank, array[~blank].min(), array)
    return array


def test_every_file_with_pixels_equals_simpleitk_or_is_refused(tmp_path):
    refused, read = {}, []
    for number, file in enumerate(files_with_pixels()):
        copy = tmp_path / str(number) / "x"  # alone: several are versions of one image
        copy.parent.mkdir()
        shutil.copy(file, copy)
        try:
            decoded = read_dicom(copy, Reading())
        except VolumeError as error:
            assert str(copy) in str(error)
            refused[file.relative_to(FILES).as_posix()] = str(error).removeprefix(f"{copy}: ")
            continue
        image = read_with_itk(copy)
        assert np.array_equal(decoded.array, as_background(sitk.GetArrayFromImage(image), file)), file
        affine = np.diag([-1, -1, 1, 1]) @ decoded.affine
        directions = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        assert affine[:3, :2] == pytest.approx(directions[:, :2], abs=1e-4), file
        assert affine[:3, 3] == pytest.approx(image.GetOrigin(), abs=1e-4), file
        read.append(file)
    assert (len(read), len(refused)) == (31, 64), refused
    assert refused["MR_truncated.dcm"].startswith("truncated: 8130 of 8192 bytes")
    assert "a localizer" in refused["dicomdirtests/98892001/CT2N/6293"]
    assert "a projection" in refused["dicomdirtests/98892003/MR700/4467"]
    assert "a colour image" in refused["examples_ybr_color.dcm"]
    assert "a radiation dose" in refused["rtdose.dcm"]
    assert "a segmentation" in refused["liver_1frame.dcm"]
    assert "a secondary capture" in refused["JPEG2000.dcm"]
    assert "no ImagePositionPatient" in refused["dicomdirtests/77654033/CR1/6154"]


def test_every_file_without_pixels_is_refused():
    files = [file for file in sorted(FILES.rglob("*")) if file.is_file() and looks_like_dicom(file)]
    without = [file for file in files if "PixelData" not in header(file)]
    assert len(without) == 70
    for file in without:
        with pytest.raises(VolumeError, match="no pixels|is a DICOMDIR|: truncated: it "):
            read_dicom(file, Reading())


@pytest.mark.parametrize(
    ("name", "syntax"),
    [
        ("JPEG-lossy.dcm", "1.2.840.10008.1.2.4.51"),  # 12 bits
        ("JPEG2000.dcm", "1.2.840.10008.1.2.4.91"),
        ("JPEGLSNearLossless_08.dcm", "1.2.840.10008.1.2.4.81"),
        ("JPEGLSNearLossless_16.dcm", "1.2.840.10008.1.2.4.81"),
        ("MR_small_jpeg_ls_lossless.dcm", "1.2.840.10008.1.2.4.80"),
        ("MR_small_jp2klossless.dcm", "1.2.840.10008.1.2.4.90"),
        ("MR_small_RLE.dcm", "1.2.840.10008.1.2.5"),
        ("image_dfl.dcm", "1.2.840.10008.1.2.1.99"),
        ("MR_small_expb.dcm", "1.2.840.10008.1.2.2"),
        ("MR_small_implicit.dcm", "1.2.840.10008.1.2"),
    ],
)
def test_transfer_syntaxes_equal_simpleitk_and_are_never_inverted(tmp_path, name, syntax):
    """The files get a position, which most of the compressed ones lack, and MONOCHROME1, which SimpleITK inverts."""
    expected = sitk.GetArrayFromImage(read_with_itk(FILES / name))
    tags = header(FILES / name)
    assert tags.file_meta.TransferSyntaxUID == syntax
    tags.SOPClassUID = tags.file_meta.MediaStorageSOPClassUID = CTImageStorage
    tags.ImagePositionPatient, tags.ImageOrientationPatient, tags.PixelSpacing = [0, 0, 0], AXIAL, [1, 1]
    tags.PhotometricInterpretation = "MONOCHROME1"
    tags.save_as(tmp_path / "x")
    decoded = read_dicom(tmp_path / "x", Reading())
    assert np.array_equal(decoded.array, expected)
    assert any("MONOCHROME1" in warning for warning in decoded.warnings)
    assert not np.array_equal(sitk.GetArrayFromImage(read_with_itk(tmp_path / "x")), expected)


@pytest.mark.parametrize(
    ("name", "meta"),
    [
        ("CT_small.dcm", True),
        ("CT_small.dcm", False),
        ("MR_small_implicit.dcm", True),
        ("MR_small_implicit.dcm", False),
        ("MR_small_expb.dcm", True),
        ("image_dfl.dcm", True),
    ],
)
def test_files_without_preamble(tmp_path, name, meta):
    """As pydicom's `save_as` writes them unless told otherwise; without group 2 the first element says how to go on."""
    tags = header(FILES / name)
    tags.SOPClassUID = CTImageStorage
    tags.ImagePositionPatient, tags.ImageOrientationPatient, tags.PixelSpacing = [0, 0, 0], AXIAL, [1, 1]
    tags.save_as(tmp_path / "x")
    expected = read_dicom(tmp_path / "x", Reading()).array
    data = (tmp_path / "x").read_bytes()[132:]
    (tmp_path / "x").write_bytes(data if meta else data[12 + int.from_bytes(data[8:12], "little") :])
    assert looks_like_dicom(tmp_path / "x")
    assert np.array_equal(read_dicom(tmp_path / "x", Reading()).array, expected)


def test_the_clean_series_equals_simpleitk(tmp_path):
    folder = TREE / "98892001" / "CT5N"
    volume = load_volume(folder)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.DICOMOrient(read_with_itk(list(names)), "LPS")
    expected = sitk.GetArrayFromImage(image)[::-1]  # LPS runs upwards, D downwards
    assert np.array_equal(volume.array, as_background(expected, names[0]))
    assert volume.spacing == pytest.approx(image.GetSpacing()[::-1])
    assert (volume.array.shape, volume.modality, volume.units) == ((5, 16, 16), "CT", "HU")


def test_the_series_with_a_gap():
    folder = TREE / "77654033" / "CT2"
    with pytest.raises(
        VolumeError, match="161 slices seem to be missing: 202.5 mm between 17106 and 17136, .* 1.25 mm"
    ):
        load_volume(folder)
    volume = load_volume(folder, resample=True)
    assert volume.array.shape == (165, 16, 16)
    assert volume.spacing == pytest.approx((1.25, 0.488281, 0.488281))
    for d, name in ((0, "17196"), (1, "17166"), (2, "17136"), (164, "17106")):  # from superior to inferior
        alone = as_background(sitk.GetArrayFromImage(read_with_itk(folder / name)), folder / name)
        assert np.abs(volume.array[d] - alone[0]).max() <= 1e-3


def test_a_tree_of_many_series_is_listed_and_the_largest_read():
    listing = list_dicom_series(TREE)
    assert [series.number for series in listing] == list(range(1, len(listing) + 1))
    assert sum(series.usable for series in listing) == 12
    assert {series.reason for series in listing if not series.usable} == {
        "no pixels", "no ImagePositionPatient", "a localizer", "a projection",
    }  # fmt: skip
    volume = load_volume(TREE)
    assert np.array_equal(volume.array, load_volume(TREE / "98892001" / "CT5N").array)
    assert "largest of 12" in volume.warnings[0]
    number = next(series.number for series in listing if series.uid.endswith(".17") and series.usable)
    assert load_volume(TREE, series=number).modality == "MR"
