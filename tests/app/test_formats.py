"""What can be dropped into the viewer: every format, DICOM as a zip or as files, several series."""

import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image

from med3dvlm.app.opening import _series
from med3dvlm.data.volume import load_volume
from tests.app.conftest import drop, open_scan, problem, upload_error, wait_for_scan
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
    assert page.inner_text(".facts .name") == "10 files"
    labels = page.locator(".lists option").all_inner_texts()
    assert len(labels) == 2 and "4 slices" in labels[1]
    assert "1.2.826" not in page.content()  # nor anything that leads to the study
    page.get_by_label("Series", exact=True).select_option(index=1)
    wait_for_scan(page, "4 ")
    assert page.evaluate("document.querySelector('.lists select').selectedIndex") == 1
    assert "Lung" in page.inner_text(".preset")  # Hounsfield units


def test_the_series_that_is_read_is_the_one_that_the_list_names(tmp_path):
    """The largest has the most voxels, not the most slices."""
    for number, shape in ((1, (6, 20, 24)), (2, (4, 40, 48))):
        for index, plane in enumerate(torso(shape)):
            write_slice(tmp_path / f"{number}_{index}", plane, f"1.2.826.0.1.3680043.8.498.{number}", number, index)
    series = _series(tmp_path, tmp_path, None)
    assert load_volume(tmp_path).array.shape == (4, 40, 48)
    assert "4 slices" in series.labels[series.chosen]


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
    assert page.inner_text(".facts").startswith("torso.zip 24 × 40 × 48") and not page.is_visible(".lists")


def test_files_that_do_not_belong_together(page, scan, tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        (tmp_path / name).write_bytes(scan.read_bytes())
    error = upload_error(page, tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    assert error and "/tmp" not in error and "Traceback" not in error


def test_a_dropped_file(page, scan):
    drop(page, scan)
    wait_for_scan(page, "24 × 40 × 48")
    assert page.inner_text(".facts .name") == scan.name


def test_a_dropped_folder_of_dicom(page, series):
    (series / ".DS_Store").write_bytes(b"of the file manager")
    drop(page, series)
    wait_for_scan(page, "6 × 20 × 24")
    assert page.inner_text(".facts .name") == series.name and page.locator(".lists option").count() == 2


def test_a_folder_may_be_chosen_too_and_files_again_after_it(page, series, scan):
    with page.expect_file_chooser() as chooser:
        page.click(".bar [data-folder]")
    chooser.value.set_files(series)
    wait_for_scan(page, "6 × 20 × 24")
    with page.expect_file_chooser() as chooser:
        page.click(".bar .open.primary")
    chooser.value.set_files(scan)
    wait_for_scan(page, "24 × 40 × 48")


def test_folders_of_pictures_are_not_mixed(page, tmp_path):
    for folder, grey in (("one/a", 60), ("one/b", 200)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(5):
            picture = np.full((16, 16), grey, np.uint8)
            picture[number:12, 4:12] = 0
            Image.fromarray(picture).save(tmp_path / folder / f"{number}.png")
    drop(page, tmp_path / "one")
    assert "2 folders" in problem(page)
    drop(page, tmp_path / "one/b")
    wait_for_scan(page, "5 × 16 × 16")
    assert page.inner_text(".facts .name") == "b"


def test_an_empty_folder(page, tmp_path):
    drop(page, tmp_path)
    assert "nothing to read" in problem(page)


def test_one_volume_of_several_is_chosen(page, tmp_path):
    frames = np.stack([torso((8, 12, 16), seed) + 100 * seed for seed in range(3)])  # [T, D, H, W]
    nib.save(nib.Nifti1Image(frames.T.astype(np.int16), np.diag([-3, -3, -3, 1])), tmp_path / "dynamic.nii.gz")
    error = upload_error(page, tmp_path / "dynamic.nii.gz")
    assert "3 volumes" in error and "--" not in error and "frame=" not in error
    page.get_by_label("What to open").select_option(index=2)
    page.click(".remedies >> text=Open")
    wait_for_scan(page, "8 × 12 × 16")
    value = "(voxel) => window.med3dvlm.scan.value(voxel)"
    assert page.evaluate(value, [5, 6, 4]) == frames[2, 4, 6, 5] and not page.is_visible(".problem")
    assert page.get_by_label("Volume", exact=True).evaluate("(list) => [list.length, list.selectedIndex]") == [3, 2]
    number = page.evaluate("window.med3dvlm.number")
    page.get_by_label("Volume", exact=True).select_option(index=1)
    page.wait_for_function(f"window.med3dvlm.number > {number} && document.querySelector('.busy').hidden")
    assert page.evaluate(value, [5, 6, 4]) == frames[1, 4, 6, 5]


@pytest.mark.parametrize("broken", ["uneven", "nan"])
def test_what_reading_can_mend_is_offered(page, tmp_path, broken):
    if broken == "nan":
        array = torso((8, 12, 16)).astype(np.float32)
        array[0, 0, 0] = np.nan
        np.save(tmp_path / "scan.npy", array)
        label = "Make them background and open"
    else:
        for index in (0, 1, 2, 4, 5, 6, 7):  # a slice is missing
            plane = torso((8, 12, 16))[index]
            write_slice(tmp_path / f"{index}.dcm", plane, "1.2.826.0.1.3680043.8.498.7", 1, index)
        label = "Interpolate and open"
    error = upload_error(page, *tmp_path.iterdir())
    assert "--" not in error and "True" not in error and "fill" not in error
    page.click(f".remedies >> text={label}")
    wait_for_scan(page, "8 × 12 × 16")
    assert not page.is_visible(".problem")
