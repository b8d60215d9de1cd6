"""NRRD (`.nrrd`, `.nhdr`) and MetaImage (`.mha`, `.mhd`), decoded by SimpleITK after a look at the header.

SimpleITK opens any data file that a header names, and returns what it has when compressed voxels of a MetaImage are
damaged; so names, lengths and checksums are checked first.
"""

import re
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from isal import isal_zlib

from med3dvlm.data.geometry import empty_turned
from med3dvlm.data.readers.base import (
    DEFLATE_LIMIT,
    Decoded,
    Reading,
    VolumeError,
    check_ratio,
    check_size,
    decoding,
    pick_frame,
)
from med3dvlm.data.scratch import put

HEADER_LIMIT = 1 << 20
IO_NAMES = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
MODALITIES = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR"}
ANATOMICAL_SPACE = r"(left|right)[- ]?(anterior|posterior)[- ]?superior([- ]?time)?|[LR][AP]ST?"  # of NRRD
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_itk(path: Path, reading: Reading) -> Decoded:
    """Read one NRRD or MetaImage volume.

    Raises:
        VolumeError: damaged, four axes without `reading.frame`, not one real number a voxel, larger than allowed or
            than the file can be, or voxels in a file outside the folder of the header.
    """
    import SimpleITK as sitk  # half a second, and only needed here

    with decoding(path):
        header = _header(path)
        fields, data_path = _fields(header), _data_file(path, header)
        reader = sitk.ImageFileReader()
        reader.SetImageIO(IO_NAMES[path.suffix.lower()])
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        size = reader.GetSize()  # i, j, k, ...
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())
        if reader.GetNumberOfComponents() != 1 or "complex" in kind or "vector" in kind:
            raise VolumeError(f"{path}: expected one number a voxel, found {reader.GetNumberOfComponents()} ({kind})")
        check_size(path, size, reading.max_voxels)
        start = len(header) if data_path == path else 0
        check_ratio(path, size, _voxel_bytes(kind), data_path.stat().st_size)
        _check_data(path, fields, data_path, start, prod(size) * _voxel_bytes(kind))
        frame = _frame(path, size, reading)
        reader.SetExtractSize([*size[:3], *[0] * (len(size) - 3)])
        reader.SetExtractIndex([0, 0, 0, *[frame, 0, 0][: len(size) - 3]])
        image = reader.Execute()
        affine = _affine(image)
        array = empty_turned(size[2::-1], affine, reading.scratch)  # [k, j, i]
        put(array, sitk.GetArrayViewFromImage(image))  # the view doesn't keep the image alive
    warnings = ()
    if not _says_orientation(path, fields):
        warnings = (f"{path.name} says nothing about its orientation: left and right are guessed",)
    return Decoded(array, affine, modality=MODALITIES.get(fields.get("modality", ""), ""), warnings=warnings)


def _says_orientation(path: Path, fields: dict[str, str]) -> bool:
    """Whether a header says how its axes lie in a patient. NRRD may have directions in a space of another kind."""
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        return re.fullmatch(ANATOMICAL_SPACE, fields.get("space", ""), re.IGNORECASE) is not None
    return bool({"transformmatrix", "rotation", "orientation"} & fields.keys())


def _header(path: Path) -> bytes:
    """The header up to its end: an empty line (NRRD), or the line that names the data file (MetaImage)."""
    with path.open("rb") as stream:
        data = stream.read(HEADER_LIMIT)
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        start, end = rb"NRRD\d", rb"\r?\n\r?\n|\Z"
    else:
        start, end = rb"\s*\w+\s*[=:]", rb"ElementDataFile\s*[=:][^\n]*(\n|\Z)"
    last = re.search(end, data)
    if not re.match(start, data) or not last or last.end() == HEADER_LIMIT:
        raise VolumeError(f"{path}: cannot be read: it does not begin with a header of its format")
    return data[: last.end()]


def _fields(header: bytes) -> dict[str, str]:
    """Names, in lower case, and values."""
    pairs = re.findall(r"^\s*(\w[\w ]*?) *[:=] *([^\r\n]*)", header.decode("latin-1"), re.MULTILINE)
    return {key.lower(): value.strip() for key, value in pairs}


def _data_file(path: Path, header: bytes) -> Path:
    """The file that holds the voxels: the header's own, or one that lies beside it or below.

    Every mention counts, wherever it stands: SimpleITK's parsers are more forgiving than ours.
    """
    names = re.findall(r"data ?file\s*[:=]+[ \t]*([^\r\n]*)", header.decode("latin-1"), re.IGNORECASE)
    name = names[0].strip() if names else "LOCAL"
    if name.upper() == "LOCAL" and len(names) < 2:
        return path
    if len(names) > 1 or name.upper().startswith("LIST") or "%" in name:
        raise VolumeError(f"{path}: its voxels are spread over several files ({name[:80]}); join them first")
    if ".." in PureWindowsPath(name).parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise VolumeError(f"{path}: names a data file outside its folder ({name[:80]}); it is not opened")
    if not (path.parent / name).is_file():
        raise VolumeError(f"{path}: its voxels should lie in {name[:80]}, which is not there")
    return path.parent / name


def _voxel_bytes(kind: str) -> int:
    """Bytes of a voxel, from a description such as "16-bit signed integer"."""
    bits = re.match(r"(\d+)-bit", kind)
    return int(bits[1]) // 8 if bits else 1


def _check_data(path: Path, fields: dict[str, str], data_path: Path, start: int, declared: int) -> None:
    """Refuse voxels that are fewer, or other, than declared, before memory is taken for them."""
    size = data_path.stat().st_size - start
    encoding = fields.get("encoding", "raw").lower()
    if fields.get("binarydata", "").lower().startswith("f"):
        encoding = "ascii"
    zlib = fields.get("compresseddata", "").lower().startswith(("t", "1"))
    limit = size * (DEFLATE_LIMIT if zlib or encoding in ("gz", "gzip") else 1)
    if encoding in ("raw", "gz", "gzip") and declared > limit:
        raise VolumeError(
            f"{path}: cannot be read: its header declares {declared:,} bytes of voxels, {data_path.name} has {size:,}; "
            f"is the file complete?"
        )
    if zlib and _inflated_length(data_path, start, declared) != declared:
        raise VolumeError(f"{path}: cannot be read: its voxels don't unpack to the {declared:,} bytes declared")


def _inflated_length(path: Path, start: int, limit: int) -> int:
    """The number of bytes that a zlib or gzip stream unpacks to, counted up to a little more than `limit`.

    Raises:
        isal_zlib.error: the stream is damaged, its checksum included.
    """
    unpacker, total = isal_zlib.decompressobj(wbits=47), 0
    with path.open("rb") as stream:
        stream.seek(start)
        while total <= limit and not unpacker.eof and (part := stream.read(1 << 20)):
            while part and total <= limit:
                total += len(unpacker.decompress(part, 1 << 24))
                part = unpacker.unconsumed_tail
    return total if unpacker.eof else -1


def _frame(path: Path, size: tuple[int, ...], reading: Reading) -> int:
    if len(size) < 3:
        raise VolumeError(f"{path}: expected a volume with 3 axes, found shape {size[::-1]}")
    if prod(size[4:]) != 1:
        raise VolumeError(f"{path}: expected a volume with 3 axes, found shape {size[::-1]}; extract one volume first")
    return pick_frame(path, prod(size[3:]), reading.frame)


def _affine(image) -> np.ndarray:
    """The RAS+ affine of a SimpleITK image of three axes, whose own space is LPS."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS_TO_RAS @ affine
