"""The reader: axes, spacing, prepared files, every kind of bad input."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from nibabel.testing import data_path
from PIL import Image

from med3dvlm.data.volume import VolumeError, load_volume, write_prepared
from tests.helpers.tiny_data import write_slices


def save_nifti(path, data, affine=None):
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine), path)
    return path


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SRA", "PIR", "ILP"])
def test_canonical_axes_do_not_depend_on_the_file(tmp_path, axes):
    """The same body stored in any axis order gives the same array [superior, anterior, right first] and spacing."""
    rng = np.random.default_rng(0)
    body = rng.random((5, 6, 7), dtype=np.float32)  # i, j, k: to the right, to the front, upwards
    image = nib.Nifti1Image(body, nib.affines.from_matvec(np.diag([1.0, 2.0, 3.0]), [-9, 4, 30]))
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    nib.save(image.as_reoriented(turn), tmp_path / "x.nii.gz")

    volume = load_volume(tmp_path / "x.nii.gz")

    # D from superior, H from anterior, W from the patient's right (the end of i) to the left
    expected = body.transpose(2, 1, 0)[::-1, ::-1, ::-1]
    assert np.array_equal(volume.array, expected)
    assert volume.spacing == pytest.approx((3.0, 2.0, 1.0))
    assert volume.orientation == "canonical" and not volume.prepared


def test_oblique_affine_takes_the_nearest_axes(tmp_path):
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    body = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    affine = nib.affines.from_matvec(turn @ np.diag([1.0, 2.0, 3.0]), [1, 2, 3])
    volume = load_volume(save_nifti(tmp_path / "x.nii", body, affine))
    assert np.array_equal(volume.array, body.transpose(2, 1, 0)[::-1, ::-1, ::-1])
    assert volume.spacing == pytest.approx((3.0, 2.0, 1.0))


def test_stored_keeps_the_order_of_the_file(tmp_path):
    body = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    volume = load_volume(save_nifti(tmp_path / "x.nii", body), orientation="stored")
    assert np.array_equal(volume.array, body.T)
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
    assert volume.spacing == (4.0, 3.0, 2.0)
    with pytest.raises(ValueError, match="canonical, stored"):
        load_volume(tmp_path / "x.nii", orientation="ras")


def test_slope_big_endian_and_nifti2(tmp_path):
    expected = nib.load(f"{data_path}/anatomical.nii")
    volume = load_volume(f"{data_path}/anatomical.nii", orientation="stored")
    assert np.array_equal(volume.array, expected.get_fdata(dtype=np.float32).T)
    body = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nib.save(nib.Nifti2Image(body, np.diag([2, 2, 2, 1])), tmp_path / "two.nii.gz")
    assert np.array_equal(load_volume(tmp_path / "two.nii.gz", orientation="stored").array, body.T)


def test_same_values_as_an_independent_reader(tmp_path):
    """SimpleITK, told to turn the image to LPS, gives the same array up to the direction of D."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    body = np.random.default_rng(1).random((5, 6, 7)).astype(np.float32)
    save_nifti(tmp_path / "x.nii.gz", body, np.array([[0, 2.0, 0, 5], [-1.0, 0, 0, 7], [0, 0, 3.0, 9], [0, 0, 0, 1]]))
    turned = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "x.nii.gz")), "LPS"))
    assert np.array_equal(load_volume(tmp_path / "x.nii.gz").array, turned[::-1])


def test_the_file_named_is_the_file_read(tmp_path):
    """`x.nii` beside `x.nii.gz` holds other voxels: neither is taken for the other."""
    for name, value in (("x.nii", 1), ("x.nii.gz", 2)):
        save_nifti(tmp_path / name, np.full((2, 3, 4), value, np.int16))
    assert load_volume(tmp_path / "x.nii").array.max() == 1
    assert load_volume(tmp_path / "x.nii.gz").array.max() == 2


@pytest.mark.parametrize("dtype, step", [("float32", 0), ("uint8", 0.5 / 255 + 1e-7)])
def test_prepared_files_are_known_and_keep_their_order(tmp_path, dtype, step):
    array = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32)
    array.flat[:2] = 0, 1
    write_prepared(tmp_path / "x.nii.gz", array, dtype)
    for orientation in ("canonical", "stored"):
        volume = load_volume(tmp_path / "x.nii.gz", orientation)
        assert volume.prepared and volume.orientation == "stored" and volume.warnings == ()
        assert np.abs(volume.array - array).max() <= step
        assert volume.array.min() == 0 and volume.array.max() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.nii.gz"]  # no temporary file is left


def test_published_prepared_files_are_taken_as_such_with_a_warning(tmp_path):
    array = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32)
    path = save_nifti(tmp_path / "x.nii.gz", array.T, np.diag([-1.0, -1.0, 1.0, 1.0]))
    volume = load_volume(path)
    assert volume.prepared and "prepared" in volume.warnings[0] and np.array_equal(volume.array, array)
    path = save_nifti(tmp_path / "ct.nii.gz", array.T * 1000, np.diag([-1.0, -1.0, 1.0, 1.0]))
    assert not load_volume(path).prepared


def test_file_without_orientation_is_read_with_a_warning(tmp_path):
    nib.save(nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), None), tmp_path / "x.nii")
    assert "orientation" in load_volume(tmp_path / "x.nii").warnings[0]


def test_slices_of_the_common_size_in_numeric_order(tmp_path):
    volume = np.arange(12 * 4 * 5, dtype=np.uint8).reshape(12, 4, 5)
    write_slices(tmp_path / "s", volume)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "s" / "12.png")
    (tmp_path / "s" / "notes.txt").write_text("not a slice")
    read = load_volume(tmp_path / "s")
    assert np.array_equal(read.array, volume.astype(np.float32) / np.float32(255))
    assert "1 of 13 slices" in read.warnings[0]


def test_numpy_arrays(tmp_path):
    array = np.arange(24, dtype=np.float64).reshape(1, 2, 3, 4)
    np.save(tmp_path / "x.npy", array)
    assert np.array_equal(load_volume(tmp_path / "x.npy").array, array[0].astype(np.float32))


def bad_inputs(folder):
    """name -> (path, what the message says)"""
    full = np.ones((3, 4, 5), np.float32)
    save_nifti(folder / "good.nii.gz", full)
    data = (folder / "good.nii.gz").read_bytes()
    hole = full.copy()
    hole[1, 1, 1] = np.nan
    infinite = full.copy()
    infinite[0, 0, 0], infinite[2, 2, 2] = np.inf, -np.inf
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "cut.nii.gz").write_bytes(data[: len(data) // 2])
    (folder / "text.nii").write_text("this is not a volume")
    (folder / "notgzip.nii.gz").write_bytes(gzip.decompress(data))
    (folder / "short.nii").write_bytes(gzip.decompress(data)[:-20])
    save_nifti(folder / "four.nii.gz", np.ones((3, 4, 5, 2), np.float32))
    save_nifti(folder / "two.nii.gz", np.ones((3, 4), np.float32))
    save_nifti(folder / "nan.nii.gz", hole)
    save_nifti(folder / "inf.nii.gz", infinite)
    save_nifti(folder / "colour.nii", np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    save_nifti(folder / "complex.nii", np.zeros((2, 3, 4), np.complex64))
    np.save(folder / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(folder / "flat.npy", np.zeros((3, 4)))
    np.save(folder / "none.npy", np.zeros((0, 4, 5)))
    (folder / "scan.xyz").write_text("?")
    (folder / "no_slices").mkdir()
    write_slices(folder / "broken_slice", np.zeros((3, 4, 5), np.uint8))
    (folder / "broken_slice" / "1.png").write_bytes(b"\x89PNG broken")
    return {
        "missing.nii.gz": "no such file", "empty.nii.gz": "cannot be read", "cut.nii.gz": "cannot be read",
        "text.nii": "cannot be read", "notgzip.nii.gz": "cannot be read", "short.nii": "cannot be read",
        "four.nii.gz": "3 axes", "two.nii.gz": "3 axes", "nan.nii.gz": "not finite", "inf.nii.gz": "not finite",
        "colour.nii": "one number", "complex.nii": "one number", "pickled.npy": "cannot be read", "flat.npy": "3 axes",
        "none.npy": "empty", "scan.xyz": "unknown format", "no_slices": "no slices", "broken_slice": "1.png",
    }  # fmt: skip


def test_bad_input_is_named(tmp_path):
    for name, reason in bad_inputs(tmp_path).items():
        with pytest.raises(VolumeError) as caught:
            load_volume(tmp_path / name)
        assert name in str(caught.value) and reason in str(caught.value), (name, str(caught.value))


def test_affine_that_cannot_be_used(tmp_path):
    path = save_nifti(tmp_path / "x.nii", np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    data = bytearray(path.read_bytes())
    data[280:328] = bytes(48)  # the sform, whose code stays set, becomes zero
    data[252:256] = b"\x00\x00\x02\x00"
    path.write_bytes(bytes(data))
    with pytest.raises(VolumeError, match="affine"):
        load_volume(path)
    assert load_volume(path, orientation="stored").array.shape == (4, 3, 2)
