"""Values of DICOM pixels: rescaling, padding, bit layouts, compression; truncated, hostile and telling headers."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from med3dvlm.data.readers import dicom_itk
from med3dvlm.data.readers.base import Reading, VolumeError
from med3dvlm.data.readers.dicom import read_dicom
from med3dvlm.data.readers.dicom_pixels import codestream_size
from med3dvlm.data.readers.dicom_planes import PixelSource
from tests.helpers.dicom_files import AXIAL, compressed, enhanced, image, save

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
LPS = np.diag([-1.0, -1, 1, 1])
PLACE = dict(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=AXIAL)
PIXELS = np.arange(12, dtype=np.int16).reshape(3, 4)


def read(path, **options):
    return read_dicom(path, Reading(**options))


def test_each_slice_has_its_own_slope(tmp_path):
    for k, slope in enumerate((0.5, 2.25, 1)):
        place = dict(ImagePositionPatient=[0, 0, k], ImageOrientationPatient=AXIAL)
        save(tmp_path / f"{k}", image(PIXELS, Modality="PT", Units="BQML", RescaleSlope=slope, **place))
    decoded = read(tmp_path)
    assert np.array_equal(decoded.array, [PIXELS * 0.5, PIXELS * 2.25, PIXELS])
    assert (decoded.modality, decoded.units) == ("PT", "BQML")


@pytest.mark.parametrize(
    ("tags", "modality", "units"),
    [
        (dict(), "CT", "HU"),
        (dict(RescaleType="HU"), "CT", "HU"),
        (dict(RescaleType="Z_EFF"), "CT", ""),
        (dict(RescaleSlope=None, RescaleIntercept=None), "CT", ""),
        (dict(Modality="MR"), "MR", ""),
        (dict(Modality="Doe, Jane"), "", ""),
        (dict(Modality="DOEJANE"), "", ""),
        (dict(Modality="PT", Units="DOEJANE"), "PT", ""),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value")  # while it is written
def test_modality_and_units(tmp_path, tags, modality, units):
    decoded = read(save(tmp_path / "x", image(PIXELS, **PLACE, **tags)))
    assert (decoded.modality, decoded.units) == (modality, units)
    assert any("not say that its values are HU" in warning for warning in decoded.warnings) == (
        modality == "CT" and not units
    )


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(("value", "limit", "gone"), [(-2000, None, {-2000}), (-2000, -1998, {-2000, -1999, -1998})])
def test_padding_becomes_the_smallest_other_value(tmp_path, syntax, value, limit, gone):
    pixels = np.array([[-2000, -1999, -1998], [-500, 0, 700]], np.int16)
    order = pixels.astype(">i2") if syntax == ExplicitVRBigEndian else pixels
    tags = image(order, **PLACE, PixelPaddingValue=value, PixelPaddingRangeLimit=limit, RescaleIntercept=-24)
    decoded = read(save(tmp_path / "x", tags, syntax))
    lowest = min(set(pixels.ravel().tolist()) - gone)
    assert np.array_equal(decoded.array[0], np.where(np.isin(pixels, list(gone)), lowest, pixels) - 24)


def test_padding_written_with_the_wrong_sign(tmp_path):
    tags = image(np.array([[-2000, -5, 3]], np.int16), **PLACE)
    tags.add_new("PixelPaddingValue", "US", 63536)  # -2000, as a well-known scanner writes it
    assert np.array_equal(read(save(tmp_path / "x", tags)).array[0], [[-5, -5, 3]])


def test_nothing_but_padding(tmp_path):
    with pytest.raises(VolumeError, match="every pixel of the series is padding"):
        read(save(tmp_path / "x", image(PIXELS * 0, **PLACE, PixelPaddingValue=0)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
def test_widths_and_signs(tmp_path, dtype):
    info = np.iinfo(dtype)
    pixels = np.array([[info.min, info.max, 1], [2, 3, 4]], dtype)
    decoded = read(save(tmp_path / "x", image(pixels, **PLACE, RescaleIntercept=-1)))
    assert np.array_equal(decoded.array[0], (pixels.astype(np.float64) - 1).astype(np.float32))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("high", [11, 13, 15])
def test_bits_beyond_the_stored_ones_are_ignored(tmp_path, signed, high):
    values = np.array([[-2048, -1, 2047]]) if signed else np.array([[0, 1, 4095]])
    rubbish = 0xFFFF & ~(0xFFF << (high - 11))
    words = ((values & 0xFFF) << (high - 11) | rubbish).astype(np.uint16)
    tags = image(words, **PLACE, BitsStored=12, HighBit=high, PixelRepresentation=int(signed))
    assert np.array_equal(read(save(tmp_path / "x", tags)).array[0], values)


def test_frames_of_a_compressed_multi_frame_file(tmp_path):
    array = np.random.default_rng(0).integers(0, 4000, (4, 16, 16)).astype(np.uint16)
    tags = enhanced(array, LPS, [2, 0, 3, 1])
    tags.file_meta = pydicom.dataset.FileMetaDataset()
    tags.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    tags.compress(RLELossless)
    assert np.array_equal(read(save(tmp_path / "rle", tags, RLELossless)).array, array)

    jpeg_ls = header("MR_small_jpeg_ls_lossless.dcm")
    (frame,) = pydicom.encaps.generate_frames(jpeg_ls.PixelData, number_of_frames=1)
    tags = compressed(enhanced(np.zeros((2, 64, 64), np.int16), LPS, [1, 0]), [frame, frame])
    decoded = read(save(tmp_path / "jls", tags, JPEGLSLossless))
    assert np.array_equal(decoded.array, [header("MR_small.dcm").pixel_array] * 2)


def header(name) -> pydicom.Dataset:
    return pydicom.dcmread(FILES / name)


def test_what_cannot_be_decoded_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text("import a_package_that_is_not_there")
    monkeypatch.setattr(dicom_itk, "WORKER", tmp_path / "worker.py")
    header("MR_small_jpeg_ls_lossless.dcm").save_as(tmp_path / "x")
    with pytest.raises(
        VolumeError, match=r"x: its pixels \(JPEG-LS Lossless.*\) cannot be decoded here; install pyjpegls"
    ):
        read(tmp_path / "x")


def test_a_frame_that_crashes_or_hangs_the_decoder_ends_its_process_only(monkeypatch):
    source = PixelSource(Path("x"), RLELossless, "OB", 0, -1, 1, 64, 64, 16, 16, 15, False)
    with dicom_itk.ItkDecoder() as itk, pytest.raises(dicom_itk.ItkError, match="crashed"):
        itk.decode(source, bytes(64))  # no segments: a division by zero in SimpleITK 2.5
    monkeypatch.setattr(dicom_itk, "SECONDS", 0)
    with dicom_itk.ItkDecoder() as itk, pytest.raises(dicom_itk.ItkError, match="crashed"):
        itk.decode(source, bytes(64))


def test_sizes_that_compressed_streams_declare():
    for name, size in {"JPEG2000.dcm": (1024, 256), "JPEG-lossy.dcm": (1024, 256), "693_J2KI.dcm": (512, 512),
                       "JPEGLSNearLossless_08.dcm": (45, 10), "MR_small_RLE.dcm": None}.items():  # fmt: skip
        (frame,) = pydicom.encaps.generate_frames(header(name).PixelData, number_of_frames=1)
        assert codestream_size(frame) == size, name
    assert codestream_size(b"\xff\xd8" + b"\xff" * 50) is None
