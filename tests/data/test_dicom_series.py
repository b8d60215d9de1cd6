"""DICOM series: which files belong together, in which order, how far apart, and which way up."""

import itertools
import shutil

import nibabel as nib
import numpy as np
import pytest

from med3dvlm.data.readers.base import Reading, VolumeError
from med3dvlm.data.readers.dicom import list_dicom_series, looks_like_dicom, read_dicom
from med3dvlm.data.volume import list_series, load_volume
from tests.helpers.dicom_files import AXIAL, SERIES, image, save, write_series

LPS = np.diag([-1.0, -1, 1, 1])  # columns to the left, rows to the back, slices upwards
ARRAY = np.random.default_rng(0).integers(-1000, 1000, (5, 4, 3)).astype(np.int16)  # [k, j, i]


def read(path, **options):
    return read_dicom(path, Reading(**options))


@pytest.fixture
def series(tmp_path):
    """A folder with ARRAY, 2 mm apart."""
    return write_series(tmp_path / "ct", ARRAY, LPS @ np.diag([0.5, 0.25, 2, 1]))


ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_every_orientation_equals_the_nifti_file_of_the_same_array(tmp_path, order, signs):
    affine = np.zeros((4, 4))
    for axis, (target, sign, size) in enumerate(zip(order, signs, (0.5, 0.75, 2.0), strict=True)):
        affine[target, axis] = sign * size
    affine[:, 3] = (10, -20, 30, 1)
    nib.save(nib.Nifti1Image(ARRAY.T, affine), tmp_path / "x.nii")
    write_series(tmp_path / "dicom", ARRAY, affine)

    expected, got = load_volume(tmp_path / "x.nii"), load_volume(tmp_path / "dicom")
    assert np.array_equal(got.array, expected.array)
    assert got.spacing == pytest.approx(expected.spacing)
    assert (got.modality, got.units, got.warnings) == ("CT", "HU", ())


def test_order_comes_from_positions_not_from_names_or_numbers(tmp_path, series):
    names = ["z", "b.IMA", "x.dcm", "a", "2"]
    write_series(tmp_path / "other", ARRAY, LPS @ np.diag([0.5, 0.25, 2, 1]), names=names, InstanceNumber=7)
    other = read(tmp_path / "other")
    assert np.array_equal(other.array, ARRAY)
    assert np.array_equal(other.affine, LPS @ np.diag([0.5, 0.25, 2, 1]))  # 2 mm, not the SliceThickness of 99
    assert np.array_equal(read(series).array, ARRAY)


def test_oblique_slices_keep_their_affine(tmp_path):
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    affine = turn @ LPS @ np.diag([0.5, 0.25, 2, 1])
    affine[:3, 3] = (3, 4, 5)
    write_series(tmp_path, ARRAY, affine)
    decoded = read(tmp_path)
    assert np.array_equal(decoded.array, ARRAY)
    assert decoded.affine == pytest.approx(affine, abs=1e-6)
    assert "oblique" in load_volume(tmp_path).warnings[0]


def test_one_slice_stands_for_its_series(series, tmp_path):
    save(series / "localizer", image(ARRAY[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    save(series / "other.dcm", image(ARRAY[0], SeriesInstanceUID="1.2.3"))
    decoded = read(series / "002.dcm")
    assert np.array_equal(decoded.array, ARRAY)
    assert decoded.warnings == ("002.dcm is one slice of a series; its 5 files in this folder were read",)

    alone = save(
        tmp_path / "alone" / "x", image(ARRAY[0], ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=AXIAL)
    )
    decoded = read(alone)
    assert np.array_equal(decoded.array, ARRAY[:1])
    assert "a single slice" in decoded.warnings[0]


def test_the_largest_series_is_read_and_the_others_are_named(tmp_path):
    write_series(tmp_path / "a" / "deep", ARRAY, LPS, SeriesInstanceUID="1.2.1", SeriesNumber=3)
    write_series(tmp_path / "b", ARRAY[:3] + 1, LPS, SeriesInstanceUID="1.2.2", SeriesNumber=2, Modality="MR")
    save(tmp_path / "dose", image(ARRAY[0], SOPClassUID="1.2.840.10008.5.1.4.1.1.7", SeriesInstanceUID="1.2.3"))
    (tmp_path / "notes.txt").write_text("nothing")
    save(tmp_path / "broken.dcm", image(ARRAY[0], BitsStored=17))

    decoded = read(tmp_path)
    assert np.array_equal(decoded.array, ARRAY)
    assert "broken.dcm" in decoded.warnings[0]
    assert decoded.warnings[1].startswith("read series 3, the largest of 2; another can be chosen (--series")
    shown = [(s.uid, s.number, s.modality, s.shape, s.usable, s.reason) for s in list_dicom_series(tmp_path)]
    assert shown == [
        ("1.2.3", None, "CT", (1, 0, 0), False, "a secondary capture"),
        ("1.2.2", 2, "MR", (3, 4, 3), True, ""),
        ("1.2.1", 3, "CT", (5, 4, 3), True, ""),
        ("", None, "", (1, 0, 0), False, "broken.dcm cannot be parsed"),
    ]
    for chosen in ("1.2.2", 2, "2"):
        assert np.array_equal(read(tmp_path, series=chosen).array, ARRAY[:3] + 1)
    with pytest.raises(VolumeError, match="no such series; their numbers are 2, 3; list_series .--list-series. shows"):
        read(tmp_path, series=4)
    with pytest.raises(VolumeError, match="cannot be read as a volume: a secondary capture"):
        read(tmp_path, series="1.2.3")


@pytest.mark.parametrize(
    ("given", "shown"),
    [((7, 3), [3, 7]), ((3, 3), [1, 2]), ((None, 3), [1, 2]), ((-1, 3), [1, 2]), ((0, 3), [1, 2]), ((2, 1), [1, 2])],
)
def test_series_are_numbered_by_the_header_where_that_tells_them_apart(tmp_path, given, shown):
    for n, number in enumerate(given):
        write_series(tmp_path / str(n), ARRAY + n, LPS, SeriesInstanceUID=f"1.2.{n}", SeriesNumber=number)
    scout = dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.2.1", SeriesNumber=given[1])
    save(tmp_path / "scout", image(ARRAY[0], **scout))
    listing = {s.number: s.uid for s in list_dicom_series(tmp_path) if s.usable}
    assert [*listing] == shown
    for number, uid in listing.items():
        assert np.array_equal(read(tmp_path, series=number).array, ARRAY + int(uid[-1]))


def test_images_of_another_kind_within_a_series_are_set_aside(series):
    scout = dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], InstanceNumber=99)
    save(series / "scout", image(ARRAY[0], ImagePositionPatient=[0, 0, 1], ImageOrientationPatient=AXIAL, **scout))
    sagittal = dict(ImageOrientationPatient=[0, 1, 0, 0, 0, -1], ImagePositionPatient=[0, 0, 0])
    save(series / "sagittal", image(ARRAY[0], **sagittal))
    save(
        series / "large",
        image(np.zeros((6, 2), np.int16), ImagePositionPatient=[0, 0, 1], ImageOrientationPatient=AXIAL),
    )
    decoded = read(series)
    assert np.array_equal(decoded.array, ARRAY)
    assert "largest of 3" in decoded.warnings[0]
    assert decoded.warnings[1] == "1 images of the series left out: a localizer"
    assert [s.reason for s in list_dicom_series(series)].count("a localizer") == 1


@pytest.mark.parametrize("tags", [{}, dict(PixelSpacing=[2, 2]), dict(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])])
def test_a_series_that_mixes_images_of_several_kinds_needs_a_choice(tmp_path, tags):
    write_series(tmp_path / "a", ARRAY, LPS, SeriesNumber=4)
    other = ARRAY[:4] if tags else ARRAY[:4, :3]
    for k, plane in enumerate(other):
        place = dict(ImageOrientationPatient=AXIAL, ImagePositionPatient=[0, 0, k + 0.5])
        save(tmp_path / "b" / str(k), image(plane, SeriesNumber=4, **place | tags))
    for options in ({}, {"series": SERIES}):
        with pytest.raises(VolumeError, match="a series mixes images of several .*; name one of them by its number"):
            read(tmp_path, **options)
    (number,) = [s.number for s in list_dicom_series(tmp_path) if s.slices == 5]
    assert np.array_equal(read(tmp_path, series=number).array, ARRAY)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        (dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localizer"),
        (dict(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]), "a screen capture"),
        (dict(Modality="SEG"), "a segmentation"),
        (dict(Modality="RTDOSE"), "a radiation dose"),
        (dict(PhotometricInterpretation="PALETTE COLOR"), "a colour image"),
        (dict(ImagePositionPatient=None), "no ImagePositionPatient"),
        (dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "not two perpendicular unit vectors"),
        (dict(PixelSpacing=[0, 1]), "PixelSpacing is not positive"),
        (dict(PixelSpacing=None), "no PixelSpacing"),
        (dict(NumberOfFrames=2), "several frames without a position each"),
    ],
)
def test_what_is_no_slice_of_a_volume_is_refused_with_its_reason(tmp_path, tags, reason):
    given = dict(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=AXIAL) | tags
    file = save(tmp_path / "x.dcm", image(ARRAY[0], **given))
    for path in (file, tmp_path):
        with pytest.raises(VolumeError, match=reason) as error:
            read(path)
        assert "lanted" not in str(error.value).lower()
    assert reason in list_dicom_series(tmp_path)[0].reason
    assert looks_like_dicom(file) and looks_like_dicom(tmp_path)


def test_a_series_in_a_zip(series, tmp_path):
    archive = shutil.make_archive(tmp_path / "scan", "zip", series.parent)
    assert np.array_equal(load_volume(archive).array, load_volume(series).array)
    assert [s.shape for s in list_series(archive)] == [(5, 4, 3)]
    (series / "002.dcm").unlink()
    archive = shutil.make_archive(tmp_path / "gap", "zip", series.parent)
    with pytest.raises(VolumeError, match="gap.zip.*: 1 slice seems to be missing"):
        load_volume(archive)


def test_nothing_that_is_dicom(tmp_path):
    (tmp_path / "a.dcm").write_text("text")
    assert not looks_like_dicom(tmp_path) and not looks_like_dicom(tmp_path / "a.dcm")
    for call in (read, list_dicom_series):
        with pytest.raises(VolumeError, match="holds no DICOM files"):
            call(tmp_path)


# Distances


def test_positions_that_are_nearly_even_are_even(tmp_path):
    write_series(tmp_path, ARRAY, LPS @ np.diag([1, 1, 7, 1]), positions=[0, 1.019, 1.981, 3, 4])  # within 2% of 7 mm
    assert np.array_equal(read(tmp_path).array, ARRAY)
    assert load_volume(tmp_path).spacing == pytest.approx((7, 1, 1))


def test_missing_slices_are_an_error_that_names_the_gap(tmp_path):
    write_series(tmp_path, ARRAY, LPS @ np.diag([1, 1, 2, 1]), positions=[0, 1, 2, 5, 6])
    with pytest.raises(VolumeError, match=r"2 slices seem to be missing: 6 mm between 002.dcm and 003.dcm, where 2 mm"):
        read(tmp_path)
    assert list_dicom_series(tmp_path)[0].reason == "uneven slice distances; needs resample=True (--resample)"
    decoded = read(tmp_path, resample=True)
    assert decoded.array.shape == (7, 4, 3)
    assert np.array_equal(decoded.array[[0, 1, 2, 5, 6]], ARRAY)
    assert decoded.array[3] == pytest.approx((ARRAY[2] * 2.0 + ARRAY[3]) / 3, rel=1e-4, abs=1e-3)
    assert "interpolated between slices up to 6 mm apart" in decoded.warnings


def test_damaged_slices_are_named_where_slices_are_missing(series, tmp_path):
    file = series / "002.dcm"
    file.write_bytes(file.read_bytes()[:300])
    for path in (series, series / "000.dcm"):
        with pytest.raises(VolumeError, match=r"1 slice .* 001.dcm and 003.dcm, .* cannot be parsed: 002.dcm; find"):
            read(path)
    decoded = read(series, resample=True)
    assert decoded.array.shape == (5, 4, 3) and np.array_equal(decoded.array[3], ARRAY[3])
    assert "left out: DICOM files that cannot be parsed: 002.dcm" in decoded.warnings


def test_uneven_slices_are_an_error_or_interpolated(tmp_path):
    write_series(tmp_path, ARRAY, LPS @ np.diag([1, 1, 2, 1]), positions=[0, 1, 2.3, 3, 4])
    with pytest.raises(VolumeError, match=r"uneven: 2.6 mm between 001.dcm and 002.dcm"):
        read(tmp_path)
    decoded = read(tmp_path, resample=True)
    assert decoded.array.shape == ARRAY.shape
    expected = ARRAY[1] + (ARRAY[2].astype(float) - ARRAY[1]) / 1.3
    assert decoded.array[2] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert decoded.affine == pytest.approx(LPS @ np.diag([1, 1, 2, 1]))


def test_a_tilted_gantry_is_refused_or_sheared_straight(tmp_path):
    size = 24
    straight = np.zeros((6, size, 4), np.int16)
    straight[:, 12:16] = 100
    tilted = np.stack([np.roll(plane, -2 * k, axis=0) for k, plane in enumerate(straight)])
    affine = LPS @ np.diag([1, 0.5, 4, 1])
    affine[1, 2] = -1.0  # each slice begins 1 mm, two rows, further back
    write_series(tmp_path, tilted, affine)
    with pytest.raises(VolumeError, match=r"tilted by 14.0 degrees: slices are shifted sideways by up to 5.0 mm"):
        read(tmp_path)
    decoded = read(tmp_path, resample=True)
    assert decoded.array.shape == (6, size + 10, 4)
    assert np.array_equal(decoded.array[:, :size], straight)
    assert decoded.affine == pytest.approx(LPS @ np.diag([1, 0.5, 4, 1]))
    assert "sheared straight" in decoded.warnings[0]


def test_slices_shifted_sideways_without_a_tilt(tmp_path):
    write_series(tmp_path, ARRAY, LPS)
    moved = dict(ImageOrientationPatient=AXIAL, ImagePositionPatient=[2, 0, 2])
    save(tmp_path / "002.dcm", image(ARRAY[2], **moved))
    with pytest.raises(VolumeError, match=": slices are shifted sideways by up to 2.0 mm; give resample=True"):
        read(tmp_path)
    decoded = read(tmp_path, resample=True)
    assert np.array_equal(decoded.array[2, :, 2:], ARRAY[2])
    assert np.array_equal(decoded.array[1, :, :3], ARRAY[1])


def test_repeated_positions(series):
    place = dict(ImageOrientationPatient=AXIAL, ImagePositionPatient=[0, 0, 4], PixelSpacing=[0.25, 0.5])
    save(series / "copy", image(ARRAY[2], **place, InstanceNumber=3))
    decoded = read(series)
    assert np.array_equal(decoded.array, ARRAY)
    assert decoded.warnings == ("left out 1 copies of slices, the first is copy",)
    save(series / "zzz", image(ARRAY[2] + 1, **place, InstanceNumber=3))
    with pytest.raises(VolumeError, match="zzz: lies at the same position as 002.dcm and shows something else"):
        read(series)
