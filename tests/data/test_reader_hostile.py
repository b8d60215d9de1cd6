"""Hostile and broken files: each ends in a `VolumeError` with its name and the reason, with little memory."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3dvlm.data.volume import VolumeError, load_volume
from tests.helpers.memory import growth
from tests.helpers.tiny_data import write_slices

sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")

BODY = np.random.default_rng(0).integers(0, 1000, (4, 5, 6)).astype(np.int16)  # [k, j, i]
MHA = "ObjectType = Image\nNDims = {n}\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = {zip}\n" \
      "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = {size}\n" \
      "{more}ElementType = MET_SHORT\nElementDataFile = {data}\n"  # fmt: skip
NRRD = "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: {size}\nendian: little\n" \
       "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nencoding: {encoding}\n{more}\n"  # fmt: skip


def nifti_bytes(shape, data: bytes = b"", dtype=np.int16) -> bytes:
    """A NIfTI file that declares `shape` and holds `data`."""
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header["dim"][: len(shape) + 1] = [len(shape), *shape]
    header.set_sform(np.diag([2.0, 2, 2, 1]), code=1)
    header["vox_offset"] = 352
    header["pixdim"][1:4] = 2
    return header.binaryblock + bytes(4) + data


def zeros_gz(head: bytes, megabytes: int) -> bytes:
    """`head` and then zeros, compressed piece by piece."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9, mtime=0) as stream:
        stream.write(head)
        for _ in range(megabytes):
            stream.write(bytes(1 << 20))
    return out.getvalue()


def zip_bytes(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def npy_bytes(shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def nifti_files() -> dict[str, tuple[bytes, str]]:
    good = nifti_bytes((6, 5, 4), BODY.tobytes())
    compressed = gzip.compress(good, mtime=0)
    broken_checksum = compressed[:-8] + bytes(4) + compressed[-4:]
    return {
        "terabytes.nii": (nifti_bytes((30000, 30000, 30000)), "voxels"),
        "terabytes.nii.gz": (gzip.compress(nifti_bytes((30000, 30000, 30000))), "max_voxels"),
        "more_than_it_has.nii": (nifti_bytes((500, 500, 500), bytes(1000)), "declares"),
        "more_than_it_can_have.nii.gz": (gzip.compress(nifti_bytes((500, 500, 500))), "declares"),
        "frames.nii": (nifti_bytes((500, 500, 500, 30000), bytes(1000)), "or name it"),
        "bomb.nii.gz": (zeros_gz(nifti_bytes((700, 700, 700)), 1), "declares"),
        "truncated.nii.gz": (compressed[: len(compressed) // 2], "cannot be read"),
        "truncated_inside.nii.gz": (gzip.compress(good[:-50]), "cannot be read"),
        "broken_checksum.nii.gz": (broken_checksum, "cannot be read"),
        "text.nii.gz": (b"patient: nobody\n" * 50, "cannot be read"),
        "compressed_text.nii.gz": (gzip.compress(b"patient: nobody\n" * 50), "NIfTI header"),
        "zero_size.nii": (nifti_bytes((6, 0, 4)), "is empty"),
        "negative.nii": (nifti_bytes((6, -5, 4), BODY.tobytes()), "is empty"),
        "far_offset.nii": (good[:108] + struct.pack("<f", 1e18) + good[112:], "cannot be read"),
        "near_offset.nii": (good[:108] + struct.pack("<f", 4) + good[112:], "cannot be read"),
        "vectors.nii": (nifti_bytes((6, 5, 2, 1, 2), BODY.tobytes()), "one number a voxel"),
        "unknown_type.nii": (good[:70] + struct.pack("<h", 77) + good[72:], "cannot be read"),
        "analyze.hdr": (good[:344] + bytes(4), "Analyze"),
        "analyze.img": (BODY.tobytes(), "Analyze"),
        "lonely.hdr": (good[:344] + b"ni1\0", "lonely.img"),
        "empty.nii.gz": (b"", "cannot be read"),
    }  # fmt: skip


def itk_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    packed = bytearray(zlib.compress(BODY.tobytes()))
    more = f"CompressedDataSize = {len(packed)}\n"
    good = MHA.format(n=3, size="6 5 4", zip=True, more=more, data="LOCAL").encode() + packed
    packed[len(packed) // 2] ^= 0xFF
    damaged = MHA.format(n=3, size="6 5 4", zip=True, more=more, data="LOCAL").encode() + packed
    plain = dict(n=3, zip=False, more="")
    outside = folder.parent / "outside.raw"
    outside.write_bytes(BODY.tobytes())
    (folder / "beside.raw").write_bytes(BODY.tobytes()[:-2])
    raw = dict(size="6 5 4", encoding="raw")
    return {
        "terabytes.mha": (MHA.format(size="30000 30000 30000", data="LOCAL", **plain).encode(), "max_voxels"),
        "short.mha": (MHA.format(size="6 5 4", data="LOCAL", **plain).encode() + BODY.tobytes()[:-2], "declares"),
        "cut.mha": (good[:-20], "unpack"),
        "damaged.mha": (bytes(damaged), "cannot be read"),
        "longer.mha": (good.replace(b"6 5 4", b"6 5 3"), "unpack"),
        "shorter.mha": (good.replace(b"6 5 4", b"6 5 9"), "unpack"),
        "up.mhd": (MHA.format(size="6 5 4", data="../outside.raw", **plain).encode(), "outside its folder"),
        "absolute.mhd": (MHA.format(size="6 5 4", data=outside, **plain).encode(), "outside its folder"),
        "windows.mhd": (MHA.format(size="6 5 4", data="..\\outside.raw", **plain).encode(), "outside its folder"),
        "colon.mhd": (MHA.format(size="6 5 4", data="LOCAL", n=3, zip=False, more="ElementDataFile: ../outside.raw\n"
            ).encode() + BODY.tobytes(), "outside its folder"),
        "hidden.nhdr": (NRRD.format(**raw, more="x:=y\rDATA FILE: ../outside.raw\n").encode(), "outside its folder"),
        "twice.nhdr": (NRRD.format(**raw, more="data file: beside.raw\ndatafile: ../outside.raw\n").encode(),
            "several files"),
        "endless.nhdr": (NRRD.format(**raw, more="")[:-1].encode() + b"# comment\n" * 200_000, "header"),
        "list.mhd": (MHA.format(size="6 5 4", data="LIST", **plain).encode() + b"/etc/passwd\n", "several files"),
        "missing.mhd": (MHA.format(size="6 5 4", data="nothing.raw", **plain).encode(), "not there"),
        "short_beside.mhd": (MHA.format(size="6 5 4", data="beside.raw", **plain).encode(), "declares"),
        "four.mha": (MHA.format(n=4, size="6 5 2 2", data="LOCAL", zip=False, more="").replace(
            "Matrix = 1 0 0 0 1 0 0 0 1", "Matrix = 1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1").replace("= 0 0 0", "= 0 0 0 0"
            ).replace("Spacing = 1 1 1", "Spacing = 1 1 1 1").encode() + BODY.tobytes(), "or name it"),
        "colour.mha": (MHA.format(size="6 5 4", data="LOCAL", n=3, zip=False, more="ElementNumberOfChannels = 3\n"
            ).encode() + BODY.tobytes() * 3, "one number a voxel"),
        "text.mha": (b"patient: nobody\n" * 50, "a header of its format"),
        "terabytes.nrrd": (NRRD.format(**{**raw, "size": "30000 30000 30000"}, more="").encode(), "max_voxels"),
        "short.nrrd": (NRRD.format(**raw, more="").encode() + BODY.tobytes()[:-2], "declares"),
        "bomb.nrrd": (NRRD.format(size="600 600 600", encoding="gzip", more="").encode() + gzip.compress(bytes(1000)),
                      "declares"),
        "cut.nrrd": (NRRD.format(size="6 5 4", encoding="gzip", more="").encode() + gzip.compress(BODY.tobytes())[:-60],
                     "cannot be read"),
        "up.nhdr": (NRRD.format(**raw, more="data file: ../outside.raw\n").encode(), "outside its folder"),
        "absolute.nhdr": (NRRD.format(**raw, more=f"datafile: {outside}\n").encode(), "outside its folder"),
        "pattern.nhdr": (NRRD.format(**raw, more="data file: x%03d.raw 1 4 1\n").encode(), "several files"),
        "text.nrrd": (b"patient: nobody\n" * 50, "a header of its format"),
    }  # fmt: skip


def other_files() -> dict[str, tuple[bytes, str]]:
    good = nifti_bytes((6, 5, 4), BODY.tobytes())
    link = zipfile.ZipInfo("x.nii")
    link.external_attr = 0o120777 << 16
    linked = io.BytesIO()
    with zipfile.ZipFile(linked, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    arrays = io.BytesIO()
    np.savez(arrays, ct=BODY, mask=BODY)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    zeros = bytes(1 << 20)
    return {
        "terabytes.npy": (npy_bytes("(30000, 30000, 30000)"), "max_voxels"),
        "short.npy": (npy_bytes("(500, 500, 500)", bytes(100)), "declares"),
        "pickled.npy": (pickled.getvalue(), "pickled"),
        "text.npy": (b"patient: nobody\n" * 50, "cannot be read"),
        "two.npz": (arrays.getvalue(), "ct, mask"),
        "none.npz": (zip_bytes({"readme.txt": b"?"}), "none"),
        "short.npz": (zip_bytes({"a.npy": npy_bytes("(500, 500, 500)", bytes(100))}), "declares"),
        "pickled.npz": (zip_bytes({"a.npy": pickled.getvalue()}), "pickled"),
        "up.zip": (zip_bytes({"../x.nii": good}), "leads out"),
        "absolute.zip": (zip_bytes({"/tmp/x.nii": good}), "leads out"),
        "drive.zip": (zip_bytes({"C:\\x.nii": good}), "leads out"),
        "link.zip": (linked.getvalue(), "link"),
        "bomb.zip": (zip_bytes({f"{n}.dcm": zeros for n in range(80)}), "times its size"),
        "huge.zip": (zip_bytes({"a.nii": zeros * 4}), "max_voxels"),
        "cut.zip": (zip_bytes({"x.nii": good})[:200], "cannot be read"),
        "damaged.zip": (zip_bytes({"x.nii": good}).replace(gzip.compress(good)[12:40], bytes(28)), "cannot be read"),
        "nested.zip": (zip_bytes({"x.zip": zip_bytes({"x.nii": good})}), "no volume file"),
        "two.zip": (zip_bytes({"a.nii": good, "b.nii": good}), "several things (a.nii, b.nii)"),
        "empty.zip": (zip_bytes({}), "nothing"),
        "inside.zip": (zip_bytes({"case/scan/x.nii": good[:-1]}), "declares"),
    }  # fmt: skip


def hostile_files(folder: Path) -> dict[str, str]:
    """Write them all; name -> what the message says."""
    files = {**nifti_files(), **itk_files(folder), **other_files()}
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    write_slices(folder / "huge_slice", np.zeros((3, 4, 5), np.uint8))
    png = (folder / "huge_slice" / "1.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + png[24:29]
    png = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    (folder / "huge_slice" / "1.png").write_bytes(png)
    (folder / "several").mkdir()
    for name in ("a.nii", "b.mha"):
        (folder / "several" / name).write_bytes(b"?")
    (folder / "nothing").mkdir()
    expected = {name: reason for name, (_, reason) in files.items()}
    return {**expected, "huge_slice": "1.png", "several": "a.nii, b.mha", "nothing": "no volume file"}


READ_ALL = """
import json, re, sys
from pathlib import Path
from med3dvlm.data.volume import VolumeError, load_volume
folder, found = Path(sys.argv[1]), {}
for name in json.loads(sys.argv[2]):
    try:
        load_volume(folder / name, max_voxels=1_000_000 if name == "huge.zip" else 400_000_000)
        found[name] = "was read"
    except VolumeError as error:
        found[name] = str(error)
# Not ru_maxrss: that of a child begins at what its parent held when it was started.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([found, peak]))
"""


def test_hostile_files_end_in_one_named_error(tmp_path):
    """In another process, so that its memory can be seen and a hanging reader be stopped."""
    expected = hostile_files(tmp_path)
    (tmp_path / "temporary").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path), json.dumps(list(expected))],
        capture_output=True, text=True, timeout=120, check=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    found, kilobytes = json.loads(result.stdout)
    for name, reason in expected.items():
        named = name.replace("analyze.img", "analyze.hdr")
        assert str(tmp_path / named) in found[name] and reason in found[name], (name, found[name])
        assert "\n" not in found[name] and "Traceback" not in found[name] and "med3dvlm-" not in found[name]
    assert kilobytes < 1 << 20
    assert not list((tmp_path / "temporary").iterdir())  # what was unpacked is gone


def test_a_compressed_file_may_hold_a_little_behind_its_voxels_but_no_bomb(tmp_path):
    good = nifti_bytes((6, 5, 4), BODY.tobytes())
    (tmp_path / "tail.nii.gz").write_bytes(zeros_gz(good, 1))
    volume = load_volume(tmp_path / "tail.nii.gz", orientation="stored")
    assert np.array_equal(volume.array, BODY)
    assert "goes on behind the voxels that its header declares: 1,048,576 bytes" in volume.warnings[0]
    damaged = bytearray(gzip.compress(good + bytes(1000), mtime=0))
    damaged[-8] ^= 1
    (tmp_path / "tail.nii.gz").write_bytes(damaged)
    with pytest.raises(VolumeError, match="cannot be read"):
        load_volume(tmp_path / "tail.nii.gz")

    (tmp_path / "bomb.nii.gz").write_bytes(zeros_gz(good, 300))
    with pytest.raises(VolumeError, match="bomb.nii.gz: goes on for more than 4,194,304 bytes behind"):
        load_volume(tmp_path / "bomb.nii.gz")
    setup = "from med3dvlm.data.volume import VolumeError, load_volume"
    read = "try:\n    load_volume(sys.argv[1])\nexcept VolumeError:\n    pass"
    assert growth(setup, read, tmp_path / "bomb.nii.gz") < 50 << 20


def test_bombs_of_an_allowed_size_are_refused_before_memory_is_taken(tmp_path, monkeypatch):
    """With a limit of 1 MB instead of 2 GB."""
    monkeypatch.setattr("med3dvlm.data.readers.base.MEMORY_FREE", 1 << 20)
    zeros = np.zeros((100, 80, 60), np.int16)
    np.savez_compressed(tmp_path / "x.npz", zeros)
    for name in ("x.nrrd", "x.mha"):
        sitk.WriteImage(sitk.GetImageFromArray(zeros), str(tmp_path / name), useCompression=True)
    for name in ("x.npz", "x.nrrd", "x.mha"):
        with pytest.raises(VolumeError, match=rf"{name}: would take 0.0 GB, [0-9,]+ times its size; if it is"):
            load_volume(tmp_path / name)
    for name in ("y.nrrd", "y.mha"):
        sitk.WriteImage(sitk.GetImageFromArray(zeros), str(tmp_path / name))
        assert load_volume(tmp_path / name).array.size == zeros.size


def test_the_limit_is_an_option(tmp_path):
    np.save(tmp_path / "x.npy", BODY)
    with pytest.raises(VolumeError, match="120 voxels .* more than the 100 that are read .* raise max_voxels"):
        load_volume(tmp_path / "x.npy", max_voxels=100)
    assert load_volume(tmp_path / "x.npy", max_voxels=120).array.size == 120


def test_names_inside_an_archive_are_not_repeated(tmp_path):
    """They may be those of patients, and the message goes into ledgers."""
    (tmp_path / "x.zip").write_bytes(zip_bytes({"../Planted/Name.dcm": b"?"}))
    with pytest.raises(VolumeError, match="x.zip: holds a name that leads out of its folder") as caught:
        load_volume(tmp_path / "x.zip")
    assert "Planted" not in str(caught.value)
    (tmp_path / ("Planted Name " * 9)).mkdir()
    broken = tmp_path / ("Planted Name " * 9) / "x.nrrd"
    broken.write_bytes(NRRD.format(size="6 5 4", encoding="raw", more="").encode().replace(b"(0,1,0)", b"(0,"))
    with pytest.raises(VolumeError) as caught:  # ITK's message holds the beginning of the path
        load_volume(broken)
    assert "Planted" not in str(caught.value).replace(str(broken), "")


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "nrrd", "mha", "npy", "npz", "zip"])
def test_damaged_bytes_give_a_volume_or_a_volume_error(tmp_path, suffix):
    """Any few bytes of a sound file changed: never another error, a crash, or much memory."""
    path, rng = tmp_path / f"x.{suffix}", np.random.default_rng(0)
    image = sitk.GetImageFromArray(BODY)
    {
        "nii": lambda: nib.save(nib.Nifti1Image(BODY.T, np.eye(4)), path),
        "nii.gz": lambda: nib.save(nib.Nifti1Image(BODY.T, np.eye(4)), path),
        "nrrd": lambda: sitk.WriteImage(image, str(path), useCompression=True),
        "mha": lambda: sitk.WriteImage(image, str(path)),
        "npy": lambda: np.save(path, BODY),
        "npz": lambda: np.savez_compressed(path, BODY),
        "zip": lambda: path.write_bytes(zip_bytes({"x.nii": nifti_bytes((6, 5, 4), BODY.tobytes())})),
    }[suffix]()
    sound = path.read_bytes()
    outcomes = set()
    for _ in range(150):
        data = bytearray(sound)
        for place in rng.integers(0, min(len(data), 400), rng.integers(1, 6)):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            outcomes.add(load_volume(path, max_voxels=10_000_000).array.dtype.name)
        except VolumeError as error:
            assert str(path) in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes and outcomes <= {"float32", "refused"}
