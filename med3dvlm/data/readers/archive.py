"""Zip archives: unpacked into a private temporary folder, after a look at what they would become."""

import stat
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from med3dvlm.data.readers.base import MAX_RATIO, VolumeError, decoding

MAX_MEMBERS = 100_000
RATIO_FREE = 64 << 20  # bytes to which archives of any ratio may unpack
BYTES_PER_VOXEL = 4


@contextmanager
def unpacked(path: Path, max_voxels: int):
    """Yield a folder with the contents of a zip; it is gone afterwards.

    A single folder at its top is stepped into. A `VolumeError` raised inside names the archive, not the folder.
    Raises:
        VolumeError: not a zip, damaged, encrypted, with names that lead out of the folder, with links, or with more
            than 4 bytes for each of `max_voxels`, or far more than its own size.
    """
    with tempfile.TemporaryDirectory(prefix="med3dvlm-") as temporary:
        with decoding(path), zipfile.ZipFile(path) as archive:
            members = _checked(path, archive.infolist(), max_voxels)
            if len(members) == 1:
                members[0].filename = _nameless(members[0].filename)
            for member in members:
                archive.extract(member, temporary)
        folder = Path(temporary)
        while len(entries := list(folder.iterdir())) == 1 and entries[0].is_dir():
            folder = entries[0]
        try:
            yield folder
        except VolumeError as error:
            raise error.renamed(str(folder), str(path)).renamed(temporary, str(path)) from error


def _nameless(name: str) -> str:
    """The name under which a volume file that is alone in its archive is unpacked.

    Where this process is killed outright the file stays, and should not bear the name of a patient. Several files keep
    their names: headers refer to files, and messages to slices.
    """
    from med3dvlm.data.readers import ENDINGS  # which imports this module

    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), None)
    return name if ending is None else f"1{ending}"


def _checked(path: Path, members: list[zipfile.ZipInfo], max_voxels: int) -> list[zipfile.ZipInfo]:
    """The files to unpack; refuses an archive with any that should not be."""
    for member in members:
        # zipfile would quietly drop what leads out of the folder; such an archive is not to be trusted at all. Names
        # are not quoted: they may be those of patients.
        windows = PureWindowsPath(member.filename)
        if ".." in windows.parts or windows.anchor or PurePosixPath(member.filename).is_absolute():
            raise VolumeError(f"{path}: holds a name that leads out of its folder; refused")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise VolumeError(f"{path}: holds a link; refused")
    total, packed = sum(m.file_size for m in members), path.stat().st_size
    if len(members) > MAX_MEMBERS or total > BYTES_PER_VOXEL * max_voxels:
        raise VolumeError(
            f"{path}: unpacks to {len(members):,} files of {total:,} bytes, more than {MAX_MEMBERS:,} files or "
            f"{BYTES_PER_VOXEL * max_voxels:,} bytes; raise max_voxels if it is really that large"
        )
    if total > max(RATIO_FREE, MAX_RATIO * packed):
        times = total // max(packed, 1)
        raise VolumeError(f"{path}: unpacks to {times} times its size; if it is sound, unpack it and give the folder")
    hidden = ("__MACOSX/", ".")
    return [m for m in members if not m.is_dir() and not m.filename.startswith(hidden)]
