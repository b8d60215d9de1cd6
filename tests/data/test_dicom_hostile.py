"""Truncated, damaged and hostile DICOM, and headers with names in them: errors, within bounds, that tell nothing."""

import json
import logging
import random
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless

from med3dvlm.data.readers.base import Reading, VolumeError
from med3dvlm.data.readers.dicom import list_dicom_series, read_dicom
from tests.helpers.dicom_files import AXIAL, compressed, enhanced, image, save, write_series
from tests.helpers.memory import growth

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
LPS = np.diag([-1.0, -1, 1, 1])
PLACE = dict(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=AXIAL)
PIXELS = np.arange(12, dtype=np.int16).reshape(3, 4)


def read(path, **options):
    return read_dicom(path, Reading(**options))


def header(name) -> pydicom.Dataset:
    return pydicom.dcmread(FILES / name)


@pytest.mark.parametrize("keep", [0.97, 0.6, 0.05, 0.02])
@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm", "MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm"])
def test_truncated_files(tmp_path, name, keep):
    data = (FILES / name).read_bytes()
    (tmp_path / "x.dcm").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(VolumeError, match="x.dcm"):
        read(tmp_path / "x.dcm")
    with pytest.raises(VolumeError, match="x.dcm|no pixels|no DICOM"):
        read(tmp_path)


def elements(data: bytes) -> list[int]:
    """Where each top-level element of an explicit little-endian file without sequences begins, and where it ends."""
    places, at = [], 132
    while at < len(data):
        places.append(at)
        long = data[at + 4 : at + 6] in (b"OB", b"OW", b"UN")
        start = at + 12 if long else at + 8
        at = start + int.from_bytes(data[start - 4 : start] if long else data[start - 2 : start], "little")
    return places


def test_a_slice_that_was_cut_between_two_elements_is_named(tmp_path):
    """Wherever the cut lies behind the meta information: what is left looks like a file that never had pixels."""
    write_series(tmp_path, np.stack([PIXELS] * 5), LPS)
    last = tmp_path / "004.dcm"
    data = last.read_bytes()
    places = elements(data)
    meta = next(n for n, at in enumerate(places) if data[at : at + 2] != b"\2\0")
    assert len(places) - meta > 15
    for at in places[meta:]:
        last.write_bytes(data[:at])
        decoded = read(tmp_path)
        assert len(decoded.array) == 4 and any("cannot be parsed: 004.dcm" in text for text in decoded.warnings), at
        assert any(series.damaged and "004.dcm" in series.reason for series in list_dicom_series(tmp_path)), at


def test_a_header_that_was_emptied_on_purpose_is_passed_over(tmp_path):
    write_series(tmp_path / "whole", np.stack([PIXELS] * 3), LPS)
    tags = pydicom.dcmread(save(tmp_path / "emptied", image(PIXELS, **PLACE)))
    for keyword in ("PixelData", "Rows", "Columns"):
        delattr(tags, keyword)
    tags.SeriesInstanceUID = pydicom.uid.generate_uid()
    tags.save_as(tmp_path / "emptied")
    assert [series.reason for series in list_dicom_series(tmp_path)] == ["", "no pixels"]
    assert not read(tmp_path).warnings


def huge_rows(path):
    save(path, image(PIXELS, **PLACE, Rows=65535, Columns=65535))


def huge_compressed(path):
    (frame,) = pydicom.encaps.generate_frames(header("MR_small_jp2klossless.dcm").PixelData, number_of_frames=1)
    frame = bytearray(frame)
    frame[8:16] = (60000).to_bytes(4) * 2  # the size in the codestream
    save(path, compressed(image(np.zeros((64, 64), np.int16), **PLACE), [bytes(frame)]), JPEG2000Lossless)


def large_compressed(path):
    (frame,) = pydicom.encaps.generate_frames(header("MR_small_jpeg_ls_lossless.dcm").PixelData, number_of_frames=1)
    frame = frame.replace((64).to_bytes(2) * 2, (19000).to_bytes(2) * 2, 1)
    tags = image(np.zeros((64, 64), np.int16), **PLACE, Rows=19000, Columns=19000)
    save(path, compressed(tags, [frame]), JPEGLSLossless)


def many_frames(path):
    save(path, image(PIXELS, **PLACE, NumberOfFrames=2**31 - 1))


def deflate_bomb(path):
    save(path, image(PIXELS, **PLACE), DeflatedExplicitVRLittleEndian)
    data = path.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    chunk = bytes(1 << 24)
    path.write_bytes(data[:start] + b"".join(deflater.compress(chunk) for _ in range(4)) + deflater.flush())


def endless_header(path):
    data = save(path, image(PIXELS, **PLACE)).read_bytes()
    path.write_bytes(data[: data.index(b"\x28\x00\x02\x00US")] + bytes(50_000_000))


def zeros(path):
    path.write_bytes(bytes(128) + b"DICM" + bytes(50_000_000))


def zeros_behind_meta(path):
    path.write_bytes(b"\x02\0\0\0UL\4\0\0\0\0\0" + bytes(50_000_000))


def endless_meta(path):
    path.write_bytes(bytes(128) + b"DICM" + b"\x02\0\1\0UL\0\0" * 6_000_000)


def nested(path):
    data = save(path, image(PIXELS, **PLACE)).read_bytes()
    item = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    path.write_bytes(data[: data.index(b"\x10\x00\x10\x00PN")] + item * 100_000)


def far_apart(path):
    write_series(path, np.stack([PIXELS] * 4), LPS, positions=[0, 1, 2, 9e12])


def tilted_far(path):
    affine = LPS.copy()
    affine[1, 2] = 1e9
    write_series(path, np.stack([PIXELS] * 3), affine)


HOSTILE = {
    huge_rows: "declares 4,294,836,225 voxels",
    huge_compressed: "declares .64, 64. pixels and compresses .60000, 60000.",
    large_compressed: "compressed slices of 19000 x 19000 pixels are not read",
    many_frames: "several frames without a position each",
    deflate_bomb: "inflates to more than 32 MB",
    endless_header: "more than 200,000 elements",
    zeros: "more than 200,000 elements",
    zeros_behind_meta: "more than 200,000 elements",
    endless_meta: "more than 200,000 elements",
    nested: "cannot be read .RecursionError",
    far_apart: "declares",
    tilted_far: "declares",
}
READ_ALL = """
import json
from pathlib import Path
from med3dvlm.data.readers import dicom_header
from med3dvlm.data.readers.base import Reading, VolumeError
from med3dvlm.data.readers.dicom import read_dicom
dicom_header.MAX_INFLATED = 1 << 25
found = {}
"""
READ_EACH = """
for path in Path(sys.argv[1]).iterdir():
    try:
        read_dicom(path, Reading(resample=True))
    except VolumeError as error:
        found[path.name] = str(error)
Path(sys.argv[2]).write_text(json.dumps(found))
"""


def test_hostile_files_end_in_an_error_within_bounds(tmp_path):
    (tmp_path / "in").mkdir()
    for write in HOSTILE:
        write(tmp_path / "in" / write.__name__)
    assert growth(READ_ALL, READ_EACH, tmp_path / "in", tmp_path / "found.json") < 500 << 20
    found = json.loads((tmp_path / "found.json").read_text())
    for write, reason in HOSTILE.items():
        assert re.search(reason, found[write.__name__]), found


def test_pixels_of_a_size_that_the_file_cannot_hold(tmp_path):
    with pytest.raises(VolumeError, match="truncated: 24 of 2000000 bytes of pixels are there"):
        read(save(tmp_path / "x", image(PIXELS, **PLACE, Rows=1000, Columns=1000)))


def test_slopes_that_give_no_values(tmp_path):
    for slope in (0, "NaN", "inf"):
        tags = image(PIXELS, **PLACE)
        tags.add_new("RescaleSlope", "LO", str(slope))
        with pytest.raises(VolumeError, match="rescale slope .* give no values"):
            read(save(tmp_path / "x", tags))


def test_damaged_bytes_give_a_volume_or_a_volume_error(tmp_path):
    save(tmp_path / "enhanced", enhanced(np.stack([PIXELS] * 3), LPS, [2, 0, 1]))
    names = ("CT_small", "MR_small_RLE", "MR_small_jp2klossless", "MR_small_implicit", "no_meta")
    sources = [(FILES / f"{name}.dcm").read_bytes() for name in names] + [(tmp_path / "enhanced").read_bytes()]
    chance, refused = random.Random(0), 0
    (tmp_path / "x").mkdir()
    for _ in range(200):
        data = bytearray(chance.choice(sources))
        for _ in range(chance.choice((1, 2, 10))):
            data[chance.randrange(min(len(data), 3000))] = chance.choice((0, 255, chance.randrange(256)))
        (tmp_path / "x" / "y").write_bytes(data)
        try:
            assert np.isfinite(read(tmp_path / "x" / "y").array).all()
        except VolumeError:
            refused += 1
    assert 20 < refused < 180


def test_no_patient_data_in_errors_warnings_and_logs(tmp_path, caplog, recwarn):
    """Names, numbers and UIDs planted in the header, some in places where they make pydicom complain."""
    planted = dict(PatientName="Planted^Name", PatientID="PLANTED-ID", AccessionNumber="PLANTED-ACC",
                   StudyInstanceUID="9.99.PLANTED", SOPInstanceUID="9.98.PLANTED", SeriesDescription="PLANTED desc",
                   PatientBirthDate="PLANTED-BIRTH", FrameOfReferenceUID="9.97.PLANTED")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_series(tmp_path / "gap", np.stack([PIXELS] * 3), LPS, positions=[0, 1, 4], **planted)
        for n in range(2):
            save(
                tmp_path / "two" / str(n), image(PIXELS, **PLACE, EchoTime=n, **planted | {"SOPInstanceUID": f"1.{n}"})
            )
        save(tmp_path / "scout", image(PIXELS, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **PLACE, **planted))
        save(tmp_path / "cut", image(PIXELS, **PLACE, Rows=50, **planted))
    caplog.clear()
    recwarn.clear()
    texts = []
    with caplog.at_level(logging.DEBUG):
        for name in ("gap", "two", "scout", "cut"):
            with pytest.raises(VolumeError) as error:
                read(tmp_path / name)
            texts.append(str(error.value))
        texts += read(tmp_path / "gap", resample=True).warnings
    texts += [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in recwarn]
    assert len(texts) >= 5
    assert not [text for text in texts if "planted" in text.lower()]
    assert not caplog.records and not recwarn.list
    assert {s.description for s in list_dicom_series(tmp_path / "gap")} == {"PLANTED desc"}  # only there
