"""Several volumes in one DICOM series: points in time, echoes, stacks; single files and enhanced multi-frame ones."""

import numpy as np
import pytest

from med3dvlm.data.readers.base import Reading, VolumeError
from med3dvlm.data.readers.dicom import list_dicom_series, read_dicom
from tests.helpers.dicom_files import AXIAL, enhanced, image, save, write_series

LPS = np.diag([-1.0, -1, 1, 1])
ARRAY = np.random.default_rng(0).integers(-1000, 1000, (5, 4, 3)).astype(np.int16)  # [k, j, i]


def read(path, **options):
    return read_dicom(path, Reading(**options))


def four_dimensional(folder, vary: str, values, **tags):
    for n, value in enumerate(values):
        tags |= {vary: value, "SeriesInstanceUID": "1.2.9"}
        names = [f"{n}-{k}" for k in range(len(ARRAY))]
        write_series(folder, ARRAY + n, LPS, names=names, **tags)
    return folder


@pytest.mark.parametrize(
    ("vary", "values", "shown"),
    [
        ("TemporalPositionIdentifier", [1, 2, 10], "2: TemporalPositionIdentifier 10 .5 slices"),
        ("AcquisitionNumber", [4, 5], "0: AcquisitionNumber 4 .5 slices.; 1: AcquisitionNumber 5"),
        ("EchoTime", [9.5, 20], "0: EchoTime 9.5"),
        ("ConvolutionKernel", ["B60f", "Doe^Jane"], "0: ConvolutionKernel .5 slices.; 1: ConvolutionKernel .5 slices"),
        (
            "ImageType",
            [["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]],
            r"0: ImageType ORIGINAL.PRIMARY.M .5 slices.; 1: ImageType ORIGINAL.PRIMARY.P ",
        ),
        (
            "ImageType",
            [["ORIGINAL", "PRIMARY", "AXIAL"], ["ORIGINAL", "PRIMARY", "DOE JANE"]],
            r"0: ImageType ORIGINAL.PRIMARY.AXIAL .5 slices.; 1: ImageType ORIGINAL.PRIMARY.another image type .5 ",
        ),
    ],
)
def test_several_volumes_need_a_frame(tmp_path, vary, values, shown):
    four_dimensional(tmp_path, vary, values)
    with pytest.raises(VolumeError, match=f"holds {len(values)} volumes; name it .frame=N, --frame N.*{shown}"):
        read(tmp_path)
    for n in range(len(values)):
        assert np.array_equal(read(tmp_path, frame=n).array, ARRAY + n)
    with pytest.raises(VolumeError, match="has no frame 7"):
        read(tmp_path, frame=7)
    (listed,) = list_dicom_series(tmp_path)
    assert (listed.shape, listed.reason) == (
        (5, 4, 3),
        f"{len(values)} volumes; name it (frame=N, --frame N on the command line)",
    )


def test_volumes_that_only_their_numbers_tell_apart(tmp_path):
    for n in range(3):
        for k, plane in enumerate(ARRAY):
            place = dict(ImageOrientationPatient=AXIAL, ImagePositionPatient=[0, 0, k])
            save(tmp_path / f"{k}{n}", image(plane + n, InstanceNumber=10 * n + k, **place))
    for n in range(3):
        assert np.array_equal(read(tmp_path, frame=n).array, ARRAY + n)


def test_enhanced_frames_are_ordered_and_rescaled_one_by_one(tmp_path):
    order = [3, 0, 4, 1, 2]
    rescale = [(1 + n, 10 * n) for n in range(5)]
    affine = LPS @ np.diag([0.5, 0.25, 2, 1])
    file = save(tmp_path / "enhanced", enhanced(ARRAY, affine, order, rescale=rescale))
    decoded = read(file)
    expected = np.array([ARRAY[k] * (1.0 + order.index(k)) + 10 * order.index(k) for k in range(5)])
    assert np.array_equal(decoded.array, expected)
    assert np.array_equal(decoded.affine, affine)
    assert (decoded.modality, decoded.units) == ("CT", "HU")


@pytest.mark.parametrize(("keyword", "values"), [("TemporalPositionIndex", (1, 2)), ("StackID", ("1", "2"))])
def test_enhanced_files_with_several_volumes(tmp_path, keyword, values):
    array = np.concatenate([ARRAY, ARRAY[:2] + 1])
    content = [{keyword: values[0]}] * 5 + [{keyword: values[1]}] * 2
    dataset = enhanced(array, LPS, range(7), content)
    if keyword == "TemporalPositionIndex":  # the same positions again; stacks lie one beside the other
        for k in (0, 1):
            frame = dataset.PerFrameFunctionalGroupsSequence[5 + k]
            frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, k]
    file = save(tmp_path / "x", dataset)
    with pytest.raises(VolumeError, match=f"holds 2 volumes.*1: {keyword} 2 .2 slices"):
        read(file)
    assert np.array_equal(read(file, frame=0).array, ARRAY)
    assert np.array_equal(read(file, frame=1).array, ARRAY[:2] + 1)


def test_an_enhanced_file_that_contradicts_itself(tmp_path):
    dataset = enhanced(ARRAY, LPS, range(5))
    dataset.NumberOfFrames = 4
    with pytest.raises(VolumeError, match="declares 4 frames and describes 5"):
        read(save(tmp_path / "x", dataset))
