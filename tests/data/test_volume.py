"""The reader: axes, spacing, prepared files, every kind of bad input."""

import argparse
import gzip
import os
import pickle
import shutil
import warnings
import zipfile

import nibabel as nib
import numpy as np
import pytest
from nibabel.testing import data_path
from PIL import Image

from med3dvlm.data.volume import (
    PREPARED_ERROR,
    VolumeError,
    add_reading_arguments,
    list_series,
    load_volume,
    main,
    prepared_header,
    reading_options,
    write_prepared,
)
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
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
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


@pytest.mark.parametrize("dtype, share", [("float32", 0.005), ("float16", 0.005), ("uint8", 0.001)])
def test_prepared_files_are_known_and_keep_their_order(tmp_path, dtype, share):
    array = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32)
    array.flat[:2] = 0, 1
    write_prepared(tmp_path / "x.nii.gz", array, dtype, preparation="window 40 400")
    for orientation in ("canonical", "stored"):
        volume = load_volume(tmp_path / "x.nii.gz", orientation)
        assert volume.prepared and volume.orientation == "stored" and volume.warnings == ()
        assert volume.preparation == "window 40 400" and volume.spacing == (1, 1, 1)
        assert np.abs(volume.array - array).max() <= PREPARED_ERROR[dtype] + 1e-7
        assert volume.array.min() == 0 and volume.array.max() == 1
    assert prepared_header(tmp_path / "x.nii.gz") == {
        "shape": (4, 5, 6), "dtype": dtype, "preparation": "window 40 400"
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["x.nii.gz"]  # no temporary file is left


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_other_readers_get_the_values_of_a_prepared_file(tmp_path, dtype):
    """nibabel in either precision and SimpleITK: within 0..1, and within the stated error."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    array = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    write_prepared(tmp_path / "x.nii.gz", array, dtype)
    image = nib.load(tmp_path / "x.nii.gz")
    assert np.array_equal(image.affine, np.diag([-1, -1, 1, 1])) and image.header.get_zooms() == (1, 1, 1)
    itk = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "x.nii.gz")))
    for values in (image.get_fdata().T, image.get_fdata(dtype=np.float32, caching="unchanged").T, itk):
        assert values.min() == 0 and 1 - 1e-6 < values.max() <= 1
        assert np.abs(values - array).max() <= PREPARED_ERROR[dtype] + 1e-6


def test_prepared_codes_are_stored_as_they_are(tmp_path):
    codes = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    write_prepared(tmp_path / "a.nii.gz", codes, "uint8")
    write_prepared(tmp_path / "b.nii.gz", codes * np.float32(1 / 255), "uint8")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert np.array_equal(load_volume(tmp_path / "a.nii.gz").array, codes * np.float32(1 / 255))
    with pytest.raises(ValueError, match="float32"):
        write_prepared(tmp_path / "c.nii.gz", codes, "float32")
    for wrong in (np.full((2, 3, 4), 1.01), np.full((2, 3, 4), np.nan), np.zeros((2, 3))):
        with pytest.raises(ValueError, match="within 0..1"):
            write_prepared(tmp_path / "c.nii.gz", wrong.astype(np.float32), "uint8")
    with pytest.raises(ValueError, match="printable"):
        write_prepared(tmp_path / "c.nii.gz", codes, "uint8", preparation="")
    assert not (tmp_path / "c.nii.gz").exists()


def test_prepared_files_of_the_first_version_are_known(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.diag([-1, -1, 1, 1]))
    image.header["descrip"] = b"med3dvlm prepared v1: published min-max, crop, resize"
    nib.save(image, tmp_path / "x.nii.gz")
    volume = load_volume(tmp_path / "x.nii.gz")
    assert volume.prepared and volume.preparation == "published" and volume.warnings == ()


def test_published_prepared_files_are_taken_as_such_with_a_warning(tmp_path):
    array = np.zeros((128, 256, 256), np.float32)
    array[::7, ::5, ::3] = np.random.default_rng(0).random(array[::7, ::5, ::3].shape)
    unit = np.diag([-1.0, -1.0, 1.0, 1.0])
    volume = load_volume(save_nifti(tmp_path / "x.nii", array.T, unit))
    assert volume.prepared and "prepared" in volume.warnings[0] and np.array_equal(volume.array, array)
    assert volume.orientation == "stored" and volume.preparation == ""
    assert prepared_header(tmp_path / "x.nii") is None and prepared_header(tmp_path / "none.nii") is None
    for name, other, affine in (
        ("values.nii", array * 2, unit), ("size.nii", array[:100], unit),
        ("spacing.nii", array, np.diag([-1.0, -1.0, 2.0, 1.0])),
    ):  # fmt: skip
        assert not load_volume(save_nifti(tmp_path / name, other.T, affine)).prepared, name
    assert load_volume(tmp_path / "size.nii", prepared_size=(100, 256, 256)).prepared


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


def test_16_bit_slices_keep_their_depth(tmp_path):
    body = np.random.default_rng(0).integers(0, 65536, (3, 4, 5)).astype(np.uint16)
    write_slices(tmp_path / "s", body)
    assert np.array_equal(load_volume(tmp_path / "s").array, body.astype(np.float32) / np.float32(65535))


def test_numpy_arrays(tmp_path):
    array = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    expected = array.astype(np.float32)
    np.save(tmp_path / "x.npy", array[None])
    np.save(tmp_path / "columns.npy", np.asfortranarray(array))
    np.savez(tmp_path / "x.npz", array[..., None])
    np.savez_compressed(tmp_path / "named.npz", ct=np.asfortranarray(array))
    for name in ("x.npy", "columns.npy", "x.npz", "named.npz"):
        volume = load_volume(tmp_path / name)
        assert np.array_equal(volume.array, expected) and volume.array.flags.writeable, name
        assert volume.orientation == "stored" and volume.axes == ""


FRAMES = np.random.default_rng(0).integers(0, 1000, (3, 4, 5, 6)).astype(np.int16)  # [frame, k, j, i]


def write_frames(folder):
    """The same three volumes in every format that can hold several."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    affine = np.diag([-1.0, -2.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(FRAMES.T, affine), folder / "x.nii.gz")
    nib.save(nib.Nifti2Pair(FRAMES.T, affine), folder / "x.hdr")
    image = sitk.GetImageFromArray(FRAMES, isVector=False)
    for name in ("x.nrrd", "x.mha", "x.nhdr"):
        sitk.WriteImage(image, str(folder / name))
    np.save(folder / "x.npy", FRAMES)
    return ("x.nii.gz", "x.hdr", "x.img", "x.nrrd", "x.mha", "x.nhdr", "x.npy")


def test_one_volume_out_of_several(tmp_path):
    for name in write_frames(tmp_path):
        with pytest.raises(VolumeError, match="3 volumes; extract one of them, or name it .*--frame"):
            load_volume(tmp_path / name)
        for frame in range(3):
            read = load_volume(tmp_path / name, orientation="stored", frame=frame)
            assert np.array_equal(read.array, FRAMES[frame]), name
            guessed = name in ("x.nrrd", "x.nhdr")  # SimpleITK writes `space dimension: 4`, no space
            assert ["left and right are guessed" in warning for warning in read.warnings] == [True] * guessed, name
        for frame in (3, -1):
            with pytest.raises(VolumeError, match=f"no frame {frame}"):
                load_volume(tmp_path / name, frame=frame)


def test_axes_of_length_one_are_no_frames(tmp_path):
    body = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1, 1)
    assert load_volume(save_nifti(tmp_path / "x.nii", body)).array.shape == (4, 3, 2)
    assert load_volume(tmp_path / "x.nii", frame=0).array.shape == (4, 3, 2)


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "npy"])
def test_values_that_are_not_finite_can_become_background(tmp_path, suffix):
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    body = np.random.default_rng(0).random((3, 4, 5)) - 2
    expected = body.astype(np.float32)
    for index, value in (((0, 0, 0), np.nan), ((1, 1, 1), np.inf), ((2, 2, 2), -np.inf), ((2, 0, 0), 1e300)):
        body[index], expected[index] = value, np.inf
    expected[np.isinf(expected)] = expected.min()
    path = tmp_path / f"x.{suffix}"
    {"nii.gz": lambda: save_nifti(path, body.T), "npy": lambda: np.save(path, body),
     "nrrd": lambda: sitk.WriteImage(sitk.GetImageFromArray(body), str(path))}[suffix]()  # fmt: skip
    with pytest.raises(VolumeError, match="4 values are not finite .*nan='fill'"):
        load_volume(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 1e300 is beyond float32, and numpy says so unless it is told not to
        volume = load_volume(path, orientation="stored", nan="fill")
    assert np.array_equal(volume.array, expected)
    assert "4 values" in volume.warnings[0]
    with pytest.raises(ValueError, match="nan must be"):
        load_volume(path, nan="zero")
    np.save(tmp_path / "all.npy", np.full((2, 3, 4), np.nan))
    with pytest.raises(VolumeError, match="none of its values"):
        load_volume(tmp_path / "all.npy", nan="fill")


def test_integers_with_slope_equal_nibabel(tmp_path):
    """Stored integers of every width and byte order, with slope and intercept, rounded once."""
    rng = np.random.default_rng(0)
    for code in ("u1", "i1", "<i2", ">i2", "<u2", ">i4", "<u4", "<f4", ">f8"):
        dtype = np.dtype(code)
        high = 1000 if dtype.kind == "f" else np.iinfo(dtype).max
        body = rng.integers(0, high, (5, 6, 7)).astype(dtype)
        header = nib.Nifti1Header(endianness=">" if code[0] == ">" else "<")
        header.set_data_dtype(dtype)
        header.set_data_shape(body.shape)
        header.set_slope_inter(0.37, -1024)
        header["vox_offset"] = 352
        (tmp_path / "y.nii").write_bytes(header.binaryblock + bytes(4) + body.tobytes(order="F"))
        expected = nib.load(tmp_path / "y.nii").get_fdata().astype(np.float32)
        assert np.array_equal(load_volume(tmp_path / "y.nii", orientation="stored").array, expected.T), code


def test_integers_that_a_slope_takes_beyond_float32_are_found(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_slope_inter(1e36, 0)
    image = nib.Nifti1Image(np.zeros((4, 3, 2), np.int16), np.eye(4), header)
    nib.save(image, tmp_path / "x.nii")
    data = bytearray((tmp_path / "x.nii").read_bytes())
    data[-2:], data[112:116] = np.int16(1000).tobytes(), np.float32(1e36).tobytes()  # the last voxel, the slope
    (tmp_path / "x.nii").write_bytes(data)
    with pytest.raises(VolumeError, match="1 values are not finite"):
        load_volume(tmp_path / "x.nii")


def zip_of(path, files: dict):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in files.items():
            archive.write(file, name)
    return path


def test_folders_and_zips_are_what_they_hold(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    body = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    write_slices(tmp_path / "slices", body)
    (tmp_path / "slices" / "text.txt").write_text("report")
    (tmp_path / "one").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(body), str(tmp_path / "one" / "x.mhd"))  # x.mhd and x.raw
    (tmp_path / "pair").mkdir()
    nib.save(nib.Nifti1Pair(body.T, np.diag([-1.0, -1, 1, 1])), tmp_path / "pair" / "x.hdr")
    for folder in ("slices", "one", "pair"):
        expected = load_volume(tmp_path / folder).array
        values = body if folder == "slices" else body[::-1]
        assert np.array_equal(expected * (255 if folder == "slices" else 1), values), folder
        files = {f"case 1/{folder}/{f.name}": f for f in (tmp_path / folder).iterdir()}
        files["__MACOSX/._x"] = tmp_path / "slices" / "text.txt"
        volume = load_volume(zip_of(tmp_path / f"{folder}.ZIP", files))
        assert np.array_equal(volume.array, expected) and volume.path == str(tmp_path / f"{folder}.ZIP"), folder


def test_reading_options_reach_the_reader(tmp_path):
    parser = argparse.ArgumentParser()
    add_reading_arguments(parser)
    assert load_volume(
        save_nifti(tmp_path / "x.nii", FRAMES[0].T), **reading_options(parser.parse_args([]))
    ).array.any()
    options = reading_options(parser.parse_args("--frame 2 --flip w,d --nan fill --resample --series 3".split()))
    assert options["series"] == 3 and options["resample"] is True and options["nan"] == "fill"
    np.save(tmp_path / "x.npy", FRAMES)
    assert np.array_equal(load_volume(tmp_path / "x.npy", **options).array, FRAMES[2, ::-1, :, ::-1])
    assert reading_options(parser.parse_args(["--series", "1.2.3"]))["series"] == "1.2.3"
    with pytest.raises(VolumeError, match="more than the 10 "):
        load_volume(tmp_path / "x.npy", **reading_options(parser.parse_args(["--max_voxels", "10"])))


def test_what_is_neither_file_nor_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.nii")
    with pytest.raises(VolumeError, match="neither a file nor a folder"):
        load_volume(tmp_path / "x.nii")
    with pytest.raises(VolumeError, match="DICOM"):
        list_series(save_nifti(tmp_path / "y.nii", FRAMES[0]))


def test_dicom_beside_other_volumes(tmp_path):
    """A folder with both needs a choice; previews and reports beside DICOM don't matter."""
    for number in (0, 1):
        shutil.copy(data_path / f"{number}.dcm", tmp_path / f"i{number}.img")  # as some scanners name it
    (tmp_path / "preview.jpg").write_bytes(b"?")
    expected = load_volume(tmp_path).array
    assert np.array_equal(load_volume(tmp_path / "i0.img").array[0], expected[0])
    save_nifti(tmp_path / "mask.nii", FRAMES[0])
    with pytest.raises(VolumeError, match="several things \\(DICOM, 1 slices, mask.nii\\)"):
        load_volume(tmp_path)
    assert np.array_equal(load_volume(tmp_path, series=12).array, expected)


def test_command_prints_what_the_reader_understood(tmp_path, capsys):
    save_nifti(tmp_path / "x.nii.gz", np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    assert main([str(tmp_path / "x.nii.gz")]) == 0
    out = capsys.readouterr().out
    assert "4 x 3 x 2" in out and "4 x 3 x 2 mm" in out and "RAS" in out and "0 .. 23" in out
    assert main([str(tmp_path / "missing.nii")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    np.save(tmp_path / "four.npy", np.zeros((2, 3, 4, 5)))
    assert main([str(tmp_path / "four.npy"), "--frame", "1", "--flip", "D"]) == 0
    with pytest.raises(SystemExit):
        main([str(tmp_path / "four.npy"), "--flip", "K"])


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


def test_an_error_says_what_would_help(tmp_path):
    """For programs that show volumes: the problem without the hint, the option that helps, and what there is."""
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5, 2), np.int16), np.eye(4)), tmp_path / "x.nii")
    np.save(tmp_path / "x.npy", np.full((2, 3, 4), np.nan))
    found = {}
    for name, options in (("x.nii", {}), ("x.npy", {}), ("x.nii", {"max_voxels": 9, "frame": 0})):
        with pytest.raises(VolumeError) as caught:
            load_volume(tmp_path / name, **options)
        error = pickle.loads(pickle.dumps(caught.value))
        assert (str(error), vars(error)) == (str(caught.value), vars(caught.value))
        assert str(error).startswith(f"{error.problem}; ") and "--" not in error.problem
        found[error.remedy] = error.choices
    assert found == {"frame": ("volume 0", "volume 1"), "nan": (), "": ()}
    named = caught.value.renamed(str(tmp_path), "somewhere")
    assert str(named).startswith("somewhere/x.nii: declares") and named.problem.startswith("somewhere/x.nii: declares")
