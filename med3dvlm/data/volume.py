"""Read any volume into one canonical array. The only reader of the project.

Axis order is always `[D, H, W]`. Canonically D runs from superior to inferior, H from anterior to posterior and W from
the patient's right to left, whatever order the file uses. What carries no anatomy (prepared files, slice folders,
NumPy arrays) keeps the order of the file.

`python -m med3dvlm.data.volume PATH` prints what is understood of a file.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from med3dvlm.data import readers
from med3dvlm.data.command import run_command
from med3dvlm.data.geometry import OBLIQUE_DEGREES, canonical_turn, voxel_spacing
from med3dvlm.data.prepared import PREPARED_ERROR, write_prepared
from med3dvlm.data.readers.base import MAX_VOXELS, NAN_RULES, PUBLISHED_SIZE, Reading, SeriesInfo, VolumeError
from med3dvlm.data.readers.nifti import PREPARED_MARK, prepared_header
from med3dvlm.data.readers.slices import SLICE_SUFFIXES, read_slice, slice_files
from med3dvlm.data.scratch import new_array, put, slabs

__all__ = [
    "PREPARED_ERROR", "PREPARED_MARK", "SLICE_SUFFIXES", "SeriesInfo", "Volume", "VolumeError", "add_reading_arguments",
    "list_series", "load_volume", "prepared_header", "read_slice", "reading_options", "slice_files", "write_prepared",
]  # fmt: skip

ORIENTATIONS = ("canonical", "stored")


@dataclass(frozen=True)
class Volume:
    """One volume in memory.

    array: float32 `[D, H, W]`.
    spacing: voxel size in mm along D, H, W; ones where the file has none.
    path: where it was read from.
    orientation: "canonical" (reoriented by the affine) or "stored" (order of the file).
    prepared: the values are already the output of the preparation, within 0..1.
    warnings: sentences a user should see, for example slices that were left out.
    modality: "CT", "MR", "PT", or "" where the file does not say. units: "HU", or "".
    axes: where the file's own axes (i, j, k) point, for example "LPS"; "" where it carries no anatomy.
    preparation: name of the preprocessing recorded in a prepared file of ours, else "".
    """

    array: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    path: str = ""
    orientation: str = "stored"
    prepared: bool = False
    warnings: tuple[str, ...] = ()
    modality: str = ""
    units: str = ""
    axes: str = ""
    preparation: str = ""


def load_volume(
    path,
    orientation: str = "canonical",
    *,
    series: str | int | None = None,
    frame: int | None = None,
    resample: bool = False,
    nan: str = "error",
    flip: str = "",
    max_voxels: int = MAX_VOXELS,
    prepared_size: tuple[int, int, int] = PUBLISHED_SIZE,
    scratch: Path | None = None,
) -> Volume:
    """Read NIfTI, DICOM, NRRD, MetaImage, NumPy, a folder of PNG / JPEG slices, or a zip of one of these.

    Args:
        path: file or folder. A folder may hold a DICOM series, slices, or one volume file.
        orientation: "canonical" turns the axes as the module says, oblique volumes to the nearest ones; "stored" keeps
            the order of the file, `[k, j, i]`. Prepared files, slices and NumPy arrays are always read as stored.
        series: DICOM series by UID or by the number of `list_series`; the largest one by default.
        frame: which volume of a four-dimensional file, from 0.
        resample: interpolate uneven slice distances and straighten a tilted gantry, instead of an error.
        nan: "error", or "fill": values that are not finite become the smallest finite one.
        flip: letters out of "DHW"; these axes of the result are reversed.
        max_voxels: larger volumes are refused before memory is taken for them.
        prepared_size: (D, H, W) at which NIfTI without our mark is taken for a prepared volume, with a warning, if its
            affine is the unit and its values lie within 0..1: the published preparation leaves no other trace.
        scratch: folder on a disk for the array of a volume of more than 128 million voxels; None keeps it in memory.
    Raises:
        VolumeError: missing, unknown, corrupt, not one volume of real numbers, empty, too large, or not finite.
        ValueError: unknown `orientation`, `nan` or `flip`.
    """
    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation must be one of {', '.join(ORIENTATIONS)}, not {orientation!r}")
    reading = Reading(series, frame, resample, nan, flip, max_voxels, prepared_size, scratch)
    path = Path(path)
    _check_path(path)
    with np.errstate(over="ignore", invalid="ignore"):  # what is beyond float32 is found below
        decoded = readers.decode(path, reading)
    warnings = decoded.warnings
    turn = None if decoded.affine is None else canonical_turn(decoded.affine)
    spacing = voxel_spacing(decoded.affine) if turn else decoded.spacing
    view = decoded.array
    if decoded.affine is None or decoded.prepared is not None:
        orientation = "stored"
    elif orientation == "canonical":
        if turn is None:
            raise VolumeError(f"{path}: its affine is singular or not finite; read it with orientation='stored'")
        if turn.degrees > OBLIQUE_DEGREES:
            warnings += (
                f"oblique: its axes lie up to {turn.degrees:.1f} degrees off the body's, the nearest are used",
            )
        view, spacing = turn.view(view), turn.spacing  # [D, H, W]
    view = view[tuple(slice(None, None, -1 if axis in flip else 1) for axis in "DHW")]
    array, replaced = _finite_float32(view, decoded.finite, path, reading)
    return Volume(
        array=array,
        spacing=tuple(float(size) for size in spacing),
        path=str(path),
        orientation=orientation,
        prepared=decoded.prepared is not None,
        warnings=warnings + replaced,
        modality=decoded.modality,
        units=decoded.units,
        axes=turn.axes if turn and decoded.prepared is None else "",
        preparation=(decoded.prepared or {}).get("preparation", ""),
    )


def list_series(path, max_voxels: int = MAX_VOXELS) -> list[SeriesInfo]:
    """The DICOM series of a folder, a file or a zip; UID and description as the headers have them.

    Their numbers are the SeriesNumbers of the headers where those tell all usable series apart, else 1, 2, ...
    Raises:
        VolumeError: missing, unreadable, or without DICOM.
    """
    path = Path(path)
    _check_path(path)
    return readers.list_series(path, max_voxels)


def _check_path(path: Path) -> None:
    if not path.is_file() and not path.is_dir():  # a pipe or device would never end
        raise VolumeError(f"{path}: {'neither a file nor a folder' if path.exists() else 'no such file or folder'}")


def _finite_float32(view: np.ndarray, known: bool, path: Path, reading: Reading) -> tuple[np.ndarray, tuple[str, ...]]:
    """`view` as contiguous float32 that may be written to, and a warning where values were replaced.

    `known`: it is finite; nobody looks.

    Raises:
        VolumeError: not finite (also beyond float32) and `reading.nan` is "error", or nothing finite.
    """
    array = view
    if not (view.dtype == np.float32 and view.flags.c_contiguous and view.flags.writeable):  # or in a mapped file
        array = new_array(view.shape, reading.scratch)
        with np.errstate(over="ignore", invalid="ignore"):
            put(array, view)
    lowest, bad = np.inf, 0
    for part in slabs(array) if view.dtype.kind == "f" and not known else ():
        if np.isfinite(part.min()) and np.isfinite(part.max()):  # quick, and needs no mask
            lowest = min(lowest, part.min())
        else:
            finite = np.isfinite(part)
            bad += finite.size - int(np.count_nonzero(finite))
            lowest = min(lowest, part.min(where=finite, initial=np.inf))
    if not bad:
        return array, ()
    if reading.nan == "error":
        raise VolumeError(
            f"{path}: {bad:,} values are not finite (NaN, infinity)",
            "nan='fill' (--nan fill) makes them background",
            remedy="nan",
        )
    if bad == array.size:
        raise VolumeError(f"{path}: none of its values is finite")
    for part in slabs(array):
        part[~np.isfinite(part)] = lowest
    return array, (f"{bad:,} values that are not finite were replaced by the smallest one, {lowest:g}",)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of reading to a command line; `reading_options` takes them out again."""
    group = parser.add_argument_group("reading")
    listed = "SeriesNumber, or where that is missing or not unique 1, 2, ..., as --list-series prints them"
    group.add_argument("--series", type=_series, help=f"DICOM series: UID or number ({listed}; default: the largest)")
    group.add_argument("--frame", type=int, help="which volume of a four-dimensional file, from 0")
    group.add_argument(
        "--resample", action="store_true", help="interpolate uneven slice distances and straighten a tilted gantry"
    )
    group.add_argument("--nan", choices=NAN_RULES, default="error", help="fill: NaN and infinity become background")
    group.add_argument("--flip", type=_axes, default="", help="reverse these axes of the result, for example D or DW")
    group.add_argument("--max_voxels", type=int, default=MAX_VOXELS, help="refuse larger ones (default: %(default)s)")


def reading_options(args: argparse.Namespace) -> dict:
    """The keyword arguments for `load_volume` out of parsed arguments."""
    return {name: getattr(args, name) for name in ("series", "frame", "resample", "nan", "flip", "max_voxels")}


def _series(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _axes(text: str) -> str:
    axes = text.upper().replace(",", "")
    if set(axes) - set("DHW"):
        raise argparse.ArgumentTypeError(f"axes are D, H and W, not {text!r}")
    return axes


def describe(volume: Volume) -> str:
    """What the reader understood, a line each."""
    low, high = volume.array.min(), volume.array.max()
    lines = {
        "shape": f"{' x '.join(map(str, volume.array.shape))} (D x H x W)",
        "spacing": f"{' x '.join(f'{size:.4g}' for size in volume.spacing)} mm",
        "axes": f"{volume.axes or 'unknown'} in the file, read as {volume.orientation}",
        "modality": f"{volume.modality or 'unknown'} {volume.units}".strip(),
        "range": f"{low:g} .. {high:g}",
    }
    if volume.prepared:
        lines["prepared"] = volume.preparation or "yes, by the published code as it seems"
    rows = [f"{name:9}{value}" for name, value in lines.items()]
    return "\n".join([volume.path, *rows, *(f"warning: {text}" for text in volume.warnings)])


def describe_series(series: SeriesInfo) -> str:
    """One line about a series."""
    number = "-" if series.number is None else series.number
    size, spacing = " x ".join(map(str, series.shape)), " x ".join(f"{mm:.3g}" for mm in series.spacing)
    state = ": ".join(part for part in ("usable" if series.usable else "not usable", series.reason) if part)
    return f"{number:>4}  {series.modality or '?':3}  {size}  {spacing} mm  {state}  {series.description}  {series.uid}"


def main(argv=None) -> int:
    """Print what the reader understands of a file; 1 where it cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m med3dvlm.data.volume", description=main.__doc__)
    parser.add_argument("path")
    parser.add_argument("--orientation", choices=ORIENTATIONS, default="canonical")
    parser.add_argument(
        "--list-series", "--list_series", action="store_true", help="list the DICOM series with their numbers"
    )
    add_reading_arguments(parser)
    args = parser.parse_args(argv)
    try:
        if args.list_series:
            print("\n".join(describe_series(series) for series in list_series(args.path, args.max_voxels)))
        else:
            print(describe(load_volume(args.path, args.orientation, **reading_options(args))))
    except VolumeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
