"""From uploaded files to what the model and the browser get."""

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from med3dvlm.app.sessions import Choices, Session
from med3dvlm.app.volumes import write_for_browser
from med3dvlm.data.volume import SeriesInfo, Volume, VolumeError, list_series
from med3dvlm.inference import QuestionError

HEADER_SUFFIXES = (".mhd", ".nhdr", ".hdr")  # of formats whose voxels lie in a second file
# What reading can do about a file that it refuses: what the page calls it, and the option of `load_volume`.
REMEDIES = {
    "resample": ("Interpolate and open", {"resample": True}),
    "nan": ("Make them background and open", {"nan": "fill"}),
}
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


def open_scan(session: Session, source: Path, choices: Choices | None = None) -> None:
    """Read a scan, show it to the model and write what the browser shows. On an error all stays as it was.

    source: a file, or a folder of files that belong together; choices: how it is read, where that was asked.
    Raises:
        VolumeError: it cannot be read or used.
        QuestionError: nothing was uploaded.
    """
    if not source.exists():
        raise QuestionError("The files did not arrive. Open the scan again.")
    path = _volume_path(source)
    reading = choices.readings[choices.chosen] if choices else {}
    session.stop()
    chat = session.chat.model.chat(path, **reading)
    seen, volume = chat.seen, chat.seen.volume
    chat.seen = replace(seen, volume=None)  # hundreds of megabytes, which the conversation doesn't need
    lists = [_series(source, path, reading.get("series")), choices if "frame" in reading else None]
    thinned = write_for_browser(session.folder / "scan.new", volume.array, volume.spacing)
    write_for_browser(session.folder / "model.new", seen.image[0].numpy(), (1.0, 1.0, 1.0))
    shown_thinned = ("shown with fewer planes than it has, because of its size; the model gets all of them",)
    # Only now, so that what is shown and what is asked about are the same scan, whatever fails before.
    for name in ("scan", "model"):
        (session.folder / f"{name}.new").replace(session.folder / f"{name}.nii")
    session.chat = chat
    session.number += 1
    session.source = source
    session.lists = [each for each in lists if each]
    session.messages = []
    session.scan = {
        "number": session.number,
        "name": f"{len(list(path.iterdir()))} files" if path.parent == session.uploads else path.name,
        "about": _about(volume),
        "oriented": volume.orientation == "canonical",
        "units": volume.units,
        "ct": _looks_like_ct(volume),
        "warnings": [*seen.warnings, *(shown_thinned if thinned else ())],
        "preprocessing": str(session.chat.model.processor.preprocess),
        "lists": [each.shown() for each in session.lists],
    }


def remedies(error: VolumeError, source: Path, choices: Choices | None) -> Choices | None:
    """What could be done about files that could not be read as they were; None where nothing can."""
    reading = choices.readings[choices.chosen] if choices else {}
    if error.remedy == "frame":
        frames = tuple({**reading, "frame": frame} for frame in range(len(error.choices)))
        return Choices("Volume", source, error.choices, frames)
    if error.remedy in REMEDIES:
        label, option = REMEDIES[error.remedy]
        return Choices("", source, (label,), ({**reading, **option},))
    return None


def _volume_path(source: Path) -> Path:
    """The file that names a volume, or the folder of its files: what lies alone in the upload, or a header."""
    while source.is_dir() and len(files := list(source.iterdir())) == 1:
        source = files[0]
    headers = [file for file in files if file.suffix.lower() in HEADER_SUFFIXES] if source.is_dir() else []
    return headers[0] if len(headers) == 1 else source


def _series(source: Path, path: Path, chosen: str | None) -> Choices | None:
    """The DICOM series of a path that a volume was read from; None where there are no two to choose from."""
    if not path.is_dir() and path.suffix.lower() != ".zip":
        return None
    try:
        usable = [info for info in list_series(path) if info.usable]
    except VolumeError:  # no DICOM in it: a zip of a NIfTI file, a folder of pictures
        return None
    if len(usable) < 2:
        return None
    uids = [info.uid for info in usable]
    largest = max(range(len(usable)), key=lambda index: prod(usable[index].shape))  # the one that reading takes
    return Choices(
        "Series",
        source,
        tuple(_label(info) for info in usable),
        tuple({"series": uid} for uid in uids),
        uids.index(chosen) if chosen else largest,
    )


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


def _label(info: SeriesInfo) -> str:
    return f"{info.number}: {info.modality} {info.description}, {info.slices} slices".replace(" ,", ",")
