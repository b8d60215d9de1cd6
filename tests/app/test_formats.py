"""What can be dropped into the viewer: every format, DICOM as a zip or as files, several series."""

import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from tests.app.conftest import open_scan, upload_error
from tests.app.scans import torso


@pytest.fixture(scope="module")
def image():
    picture = sitk.GetImageFromArray(torso((12, 20, 24)))
    picture.SetSpacing((3.0, 4.0, 6.0))
    return picture


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A folder with two CT series of 6 and 4 slices, made from a phantom; no patient in it."""
    folder = tmp_path_factory.mktemp("dicom")
    for number, slices in ((1, 6), (2, 4)):
        uid = f"1.2.826.0.1.3680043.8.498.{number}"
        for index, plane in enumerate(torso((slices, 20, 24))):
            write_slice(folder / f"{number}_{index}.dcm", plane, uid, number, index)
    return folder


def write_slice(path: Path, plane: np.ndarray, uid: str, number: int, index: int) -> None:
    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, f"{uid}.{index + 1}"
    data.SeriesInstanceUID, data.SeriesNumber, data.InstanceNumber = uid, number, index + 1
    data.StudyInstanceUID, data.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.9", f"{uid}.9"
    data.Modality, data.PatientName, data.SeriesDescription = "CT", "Nobody^Knows", f"series {number}"
    data.Rows, data.Columns = plane.shape
    data.PixelSpacing, data.SliceThickness = [4.0, 3.0], 6.0
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [0, 0, -6.0 * index]
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, 0, "HU"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelData = plane.astype("<i2").tobytes()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("names", [("scan.nrrd",), ("scan.mha",), ("scan.mhd", "scan.raw"), ("scan.nii",)])
def test_formats(page, image, tmp_path, names):
    sitk.WriteImage(image, str(tmp_path / names[0]))
    open_scan(page, *(tmp_path / name for name in names))
    assert page.inner_text(".facts .name") == names[0]
    assert page.inner_text(".facts .about").startswith("12 × 20 × 24 voxels, 6.00 × 4.00 × 3.00 mm")


def test_dicom_files_and_the_choice_of_a_series(page, series):
    open_scan(page, *sorted(series.iterdir()))
    assert "6 × 20 × 24 voxels" in page.inner_text(".facts .about") and "CT" in page.inner_text(".facts .about")
    assert "Nobody" not in page.content()
    labels = page.locator(".series option").all_inner_texts()
    assert len(labels) == 2 and "4 slices" in labels[1]
    page.select_option(".series select", label=labels[1])
    page.wait_for_function("document.querySelector('.facts .about').textContent.startsWith('4 ')")
    assert page.input_value(".series select").endswith(".2")
    assert "Lung" in page.inner_text(".preset")  # Hounsfield units


def test_a_zip_of_dicom(page, series, tmp_path):
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for file in series.glob("2_*"):
            archive.write(file, f"CT/{file.name}")
    open_scan(page, tmp_path / "series.zip")
    assert page.inner_text(".facts .about").startswith("4 × 20 × 24")


def test_a_zip_of_another_format(page, scan, tmp_path):
    with zipfile.ZipFile(tmp_path / "torso.zip", "w") as archive:
        archive.write(scan, "torso.nii.gz")
    open_scan(page, tmp_path / "torso.zip")
    assert page.inner_text(".facts").startswith("torso.zip 24 × 40 × 48") and not page.is_visible(".series")


def test_files_that_do_not_belong_together(page, scan, tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        (tmp_path / name).write_bytes(scan.read_bytes())
    error = upload_error(page, tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    assert error and "/tmp" not in error and "Traceback" not in error
