"""One reader for each format, and the choice among them.

A reader takes a path and a `Reading` and gives a `Decoded`: the array in the order of the file and where it lies.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from med3dvlm.data.readers.archive import unpacked
from med3dvlm.data.readers.arrays import read_npy, read_npz
from med3dvlm.data.readers.base import Decoded, Reading, SeriesInfo, VolumeError, decoding
from med3dvlm.data.readers.itk import read_itk
from med3dvlm.data.readers.nifti import read_nifti
from med3dvlm.data.readers.slices import SLICE_SUFFIXES, read_slices, slice_files

READERS: dict[tuple[str, ...], Callable[[Path, Reading], Decoded]] = {
    (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz"): read_nifti,
    (".nrrd", ".nhdr", ".mha", ".mhd"): read_itk,
    (".npy",): read_npy,
    (".npz",): read_npz,
}
ENDINGS = (*(ending for endings in READERS for ending in endings), ".zip")  # of volumes; DICOM has none
KNOWN = (
    "NIfTI (.nii, .nii.gz, .hdr/.img), DICOM (a folder, a file), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd), "
    "NumPy (.npy, .npz), a folder of .png or .jpeg slices, a .zip of one of these"
)
BESIDE_SLICES = (".txt", ".json", ".csv", ".md")  # files that slice folders may hold too


def decode(path: Path, reading: Reading) -> Decoded:
    """Read a file, folder or zip with the reader of its format.

    Raises:
        VolumeError: unknown format, a folder that holds nothing or several things, or what the reader raises.
    """
    if path.is_dir():
        return _decode_folder(path, reading)
    if path.name.lower().endswith(".zip"):
        with unpacked(path, reading.max_voxels) as folder:
            return _decode_folder(folder, reading)
    reader = _reader_of(path)
    if reader:
        return reader(path, reading)
    from med3dvlm.data.readers.dicom import looks_like_dicom, read_dicom

    if looks_like_dicom(path):
        return read_dicom(path, reading)
    raise VolumeError(f"{path}: unknown format; known are {KNOWN}")


def list_series(path: Path, max_voxels: int) -> list[SeriesInfo]:
    """The DICOM series of a folder, file or zip.

    Raises:
        VolumeError: there are none.
    """
    from med3dvlm.data.readers.dicom import list_dicom_series, looks_like_dicom

    if path.name.lower().endswith(".zip") and path.is_file():
        with unpacked(path, max_voxels) as folder:
            return list_series(folder, max_voxels)
    if not looks_like_dicom(path):
        raise VolumeError(f"{path}: holds no DICOM, so there are no series to list")
    return list_dicom_series(path)


def _reader_of(file: Path) -> Callable[[Path, Reading], Decoded] | None:
    """The reader for the ending of a file name; DICOM has none. An `.img` without its `.hdr` may be DICOM, too."""
    header = header_of(file)
    if header and not header.exists():
        return None
    for suffixes, reader in READERS.items():
        if file.name.lower().endswith(suffixes):
            return reader
    return None


def _decode_folder(folder: Path, reading: Reading) -> Decoded:
    """Decide what a folder is: a DICOM series, slices, or the one volume file in it."""
    with decoding(folder):
        entries = sorted(e for e in folder.iterdir() if not e.name.startswith("."))
        slices = slice_files(folder)
    volumes = volume_files(folder)
    if slices and all(e.suffix.lower() in SLICE_SUFFIXES + BESIDE_SLICES for e in entries):
        return read_slices(folder, reading)
    from med3dvlm.data.readers.dicom import looks_like_dicom, read_dicom

    dicom = looks_like_dicom(folder)
    if dicom and (reading.series is not None or not volumes):
        return read_dicom(folder, reading)
    if len(volumes) == 1 and not dicom and not slices:
        return _reader_of(volumes[0])(volumes[0], reading)
    if slices and not volumes:
        return read_slices(folder, reading)
    if volumes:
        names = [*(["DICOM"] if dicom else []), *([f"{len(slices)} slices"] if slices else [])]
        found = ", ".join(names + [v.name for v in volumes[:10]])
        raise VolumeError(f"{folder}: holds several things ({found}); give the path of one of them")
    kinds = Counter("folders" if e.is_dir() else f"{e.suffix or 'other'} files" for e in entries)
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(10)) or "nothing"
    raise VolumeError(f"{folder}: holds no slices ({', '.join(SLICE_SUFFIXES)}), no DICOM and no volume file: {found}")


def volume_files(folder: Path) -> list[Path]:
    """The volumes that lie directly in a folder, one for a pair of files; neither slices, DICOM nor zips."""
    entries = sorted(e for e in folder.iterdir() if not e.name.startswith("."))
    return [e for e in entries if e.is_file() and _reader_of(e) and header_of(e) not in entries]


def header_of(file: Path) -> Path | None:
    """The file that stands for both in a pair of `.hdr` and `.img`; None for what is no `.img`."""
    header = re.sub(r"\.img(\.gz)?$", r".hdr\1", re.sub(r"\.IMG(\.GZ)?$", r".HDR\1", file.name))
    return None if header == file.name else file.with_name(header)
