"""From uploaded files to what the model and the browser get."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from med3dvlm.app.sessions import Session
from med3dvlm.app.volumes import write_for_browser
from med3dvlm.data.volume import SeriesInfo, Volume, VolumeError, list_series
from med3dvlm.inference import QuestionError

HEADER_SUFFIXES = (".mhd", ".nhdr", ".hdr")  # of formats whose voxels lie in a second file
PHANTOMS = 3  # how many of the quickstart's held-out scans are offered


@dataclass(frozen=True)
class Example:
    """A scan that the page offers by name."""

    name: str
    path: Path


def find_examples(samples: Path, quickstart: Path) -> list[Example]:
    """The fetched sample scans, and held-out phantoms of the quickstart; none where neither is there."""
    found = []
    if samples.is_dir():
        shown = [path for path in sorted(samples.iterdir()) if not path.name.startswith(".")]  # hidden: being fetched
        found = [Example(path.name, path) for path in shown if path.is_dir() or ".nii" in path.suffixes]
    manifest = quickstart / "data/M3D_Cap_npy/M3D_Cap.json"
    if manifest.is_file():
        cases = json.loads(manifest.read_text(encoding="utf-8"))["test"][:PHANTOMS]
        found += [Example(f"Phantom {n}", quickstart / "data" / case["image"]) for n, case in enumerate(cases, 1)]
    return [example for example in found if example.path.exists()]


def open_scan(session: Session, source: Path | None, series: str | None = None) -> None:
    """Read a scan, show it to the model and write what the browser shows. On an error all stays as it was.

    source: a file, or a folder of files that belong together; series: the UID of one of several DICOM series.
    Raises:
        VolumeError: it cannot be read or used.
        QuestionError: nothing was uploaded.
    """
    if source is None or not source.exists():
        raise QuestionError("The files did not arrive. Open the scan again.")
    path = _volume_path(source)
    session.stop()
    seen = session.chat.set_image(path, series=series)
    choices = _usable_series(path)
    session.chat.seen = replace(seen, volume=None)  # hundreds of megabytes, which the conversation doesn't need
    volume = seen.volume
    thinned = write_for_browser(session.folder / "scan.nii", volume.array, volume.spacing)
    write_for_browser(session.folder / "model.nii", seen.image[0].numpy(), (1.0, 1.0, 1.0))
    shown_thinned = ("shown with fewer planes than it has, because of its size; the model gets all of them",)
    session.number += 1
    session.source = source
    session.messages = []
    session.scan = {
        "number": session.number,
        "name": path.name,
        "about": _about(volume),
        "oriented": volume.orientation == "canonical",
        "units": volume.units,
        "ct": _looks_like_ct(volume),
        "warnings": [*seen.warnings, *(shown_thinned if thinned else ())],
        "preprocessing": str(session.chat.model.processor.preprocess),
        "series": [{"value": info.uid, "label": _label(info)} for info in choices],
        "chosen": series or _largest(choices),
    }


def _volume_path(source: Path) -> Path:
    """The file that names a volume: the only one, or the header beside its voxels; else the folder as a whole."""
    if source.is_file():
        return source
    files = sorted(source.iterdir())
    headers = [file for file in files if file.suffix.lower() in HEADER_SUFFIXES]
    if len(files) == 1 or len(headers) == 1:
        return (headers or files)[0]
    return source


def _usable_series(path: Path) -> list[SeriesInfo]:
    """The DICOM series of a path that a volume was read from; none where that was another format."""
    if not path.is_dir() and path.suffix.lower() != ".zip":
        return []
    try:
        return [info for info in list_series(path) if info.usable]
    except VolumeError:  # no DICOM in it: a zip of a NIfTI file, a folder of pictures
        return []


def _looks_like_ct(volume: Volume) -> bool:
    """Whether the CT windows make sense: NIfTI has no word for Hounsfield units, but air shows."""
    if volume.units or volume.modality:
        return volume.units == "HU"
    return bool(-4096 <= volume.array.min() <= -900 and volume.array.max() >= 100)


def _about(volume: Volume) -> str:
    size = " × ".join(map(str, volume.array.shape))
    spacing = " × ".join(f"{step:.2f}" for step in volume.spacing)
    facts = [f"{size} voxels", f"{spacing} mm", volume.modality, volume.units]
    if volume.orientation != "canonical":
        facts.append("orientation unknown")
    return ", ".join(fact for fact in facts if fact)


def _label(info) -> str:
    return f"{info.number}: {info.modality} {info.description}, {info.slices} slices".replace(" ,", ",")


def _largest(choices) -> str:
    return max(choices, key=lambda info: info.slices).uid if choices else ""
