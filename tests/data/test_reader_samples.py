"""Real scans that others published: read as SimpleITK reads them, with the organs where they belong."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from med3dvlm.data.samples import REFERENCE_FILES, TOTALSEGMENTATOR
from med3dvlm.data.volume import load_volume
from tests.helpers.packages import fetch_or_skip

sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")

pytestmark = pytest.mark.slow
SCANS = {  # file -> shape [D, H, W] and axes
    "example_ct.nii.gz": ((112, 101, 122), "RAS"),
    "example_ct_sm.nii.gz": ((30, 101, 122), "RAS"),
    "aorta_report/example_ct.nii.gz": ((191, 167, 233), "LPS"),
    "example_mr_sm.nii.gz": ((20, 91, 117), "LPS"),
}
# labels of example_seg.nii.gz, the organs of example_ct_sm.nii.gz
SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, LIVER, AORTA, SPINAL_CORD = 1, 2, 3, 5, 52, 79
SPINE = (33, 32, 31, 30)  # T11, T12, L1, L2


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """The folder with the reference files of TotalSegmentator (Apache-2.0)."""
    archive = fetch_or_skip(TOTALSEGMENTATOR)
    folder = tmp_path_factory.mktemp("samples")
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.name.startswith(REFERENCE_FILES)]
        tar.extractall(folder, members, filter="data")
    return folder / REFERENCE_FILES


@pytest.mark.parametrize("name", SCANS)
def test_array_and_spacing_equal_simpleitk(scans, name):
    volume = load_volume(scans / name)
    image = sitk.DICOMOrient(sitk.ReadImage(str(scans / name)), "LPS")  # to the left, back and top
    assert (volume.array.shape, volume.axes) == SCANS[name] and volume.warnings == ()
    assert np.array_equal(volume.array, sitk.GetArrayFromImage(image)[::-1].astype(np.float32))
    assert volume.spacing == pytest.approx(image.GetSpacing()[::-1], rel=1e-6)
    assert not volume.prepared and volume.orientation == "canonical"


def test_organs_lie_where_they_belong(scans):
    """Liver on the patient's right, spleen on the left, the cord behind the aorta, the spine from top to bottom."""
    labels, scan = (load_volume(scans / name) for name in ("example_seg.nii.gz", "example_ct_sm.nii.gz"))
    organs = (SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, LIVER, AORTA, SPINAL_CORD, *SPINE)
    where = {label: np.argwhere(labels.array == label).mean(axis=0) for label in organs}  # mean d, h, w
    middle = labels.array.shape[2] / 2
    assert where[LIVER][2] < middle < where[SPLEEN][2]
    assert where[RIGHT_KIDNEY][2] < where[SPINAL_CORD][2] < where[LEFT_KIDNEY][2]
    assert where[AORTA][1] < where[SPINAL_CORD][1]
    heights = [where[vertebra][0] for vertebra in SPINE]
    assert heights == sorted(heights) and where[LIVER][0] < where[RIGHT_KIDNEY][0]
    liver = scan.array[labels.array == LIVER]  # the mask fits the scan: HU of tissue, not of lung or bone
    assert 40 < np.median(liver) < 200 and np.percentile(liver, 5) > 0
