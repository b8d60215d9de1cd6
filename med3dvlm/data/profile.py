"""What a model's training data looked like, and whether a volume looks like that.

Preparation summarises every volume before it is scaled, makes a `DataProfile` of the summaries, and writes it with the
pipeline into the prepared folder; training copies both beside the weights; inference warns where a scan is far from it.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from med3dvlm.data.files import write_bytes
from med3dvlm.data.presets import PreprocessConfig, check_preparation
from med3dvlm.data.scratch import slabs
from med3dvlm.data.volume import Volume

PREPARATION_FILE = "preparation.json"  # in a prepared folder
VERSION = 1
PERCENTILES = (0.5, 5, 50, 95, 99.5)
_MOST_VOXELS = 100_000  # what a summary looks at
_AIR_HU = -200  # the lowest values of a CT scan lie below this, unless it was windowed or cropped
_LARGEST_GREY = 255  # larger values without any below 0 are neither HU nor 8-bit grey
_FEW_SLICES = 10
_SPACING_FACTOR = 1.5  # how far outside the range of the training data voxels are still as usual
_NARROW, _FLAT = 0.1, 0.01  # shares of the grey levels that tell too little
_SPOKEN = {"PT": "PET"}
_SOFT_TISSUE_HU = 400  # width of a window in which radiologists read soft tissue


@dataclass(frozen=True)
class DataProfile:
    """What is known about training data; what is not known is empty.

    cases: number of volumes.
    modalities: "CT", "MR", ... as files or intensities say, most frequent first.
    values: "HU", "0..1" (8-bit slices, or scaled before) or "counts" (anything else), before the pipeline.
    percentiles: of the values, at `PERCENTILES`; each the median over the volumes.
    spacing: smallest and largest voxel size in mm along D, H, W (1st and 99th percentile over the volumes).
    slices: smallest and largest number of slices.
    """

    cases: int = 0
    modalities: tuple[str, ...] = ()
    values: str = ""
    percentiles: tuple[float, ...] = ()
    spacing: tuple[tuple[float, float], ...] = ()
    slices: tuple[int, ...] = ()

    @classmethod
    def from_summaries(cls, summaries: Iterable[dict]) -> "DataProfile":
        """Put together what `summarize` said about each volume."""
        rows = list(summaries)
        if not rows:
            return cls()
        known = [row["spacing"] for row in rows if row["spacing"]]
        spacing = np.percentile(known, (1, 99), axis=0).T if known else ()  # [3, 2]
        slices = [row["shape"][0] for row in rows]
        return cls(
            cases=len(rows),
            modalities=_by_frequency(row["modality"] for row in rows),
            values=_by_frequency(row["values"] for row in rows)[0],
            percentiles=tuple(_short(x) for x in np.median([row["percentiles"] for row in rows], axis=0)),
            spacing=tuple((_short(low), _short(high)) for low, high in spacing),
            slices=(min(slices), max(slices)),
        )

    def to_dict(self) -> dict:
        """A dict that json can hold."""
        return json.loads(json.dumps({**asdict(self), "version": VERSION}))

    @classmethod
    def from_dict(cls, values: dict) -> "DataProfile":
        """The inverse of `to_dict`. Raises ValueError where a newer version wrote it or a key is unknown."""
        values = dict(values)
        version = values.pop("version", VERSION)
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if version != VERSION or unknown:
            raise ValueError(f"training data profile of version {version} with unknown keys {unknown}: update")
        return cls(**{key: _frozen(value) for key, value in values.items()})

    def __str__(self) -> str:
        parts = [f"{self.cases} volumes"] if self.cases else []
        parts += [", ".join(self.modalities)] if self.modalities else []
        parts += [f"values {self.values}"] if self.values else []
        parts += [f"voxels {_ranges(self.spacing)} mm (D H W)"] if self.spacing else []
        return "; ".join(parts) or "unknown"


# What is known of M3D, which the published checkpoints learned from: CT slices as 8-bit grey, windowed by whoever
# uploaded them; spacing was not kept.
PUBLISHED_PROFILE = DataProfile(modalities=("CT",), values="0..1")


def summarize(
    volume: Volume | np.ndarray, spacing=None, modality: str = "", scale: float = 1.0
) -> dict[str, str | list | None]:
    """What the profile needs to know of one volume, before it is scaled: a small dict that json can hold.

    volume: a `Volume`, or an array `[D, H, W]` with its `spacing` (mm along D, H, W; None is unknown) and `modality`.
    scale: factor to the values as they are read; 1/255 for an array of 8-bit slices.
    Looks at up to 100,000 voxels.
    """
    units = ""
    if isinstance(volume, Volume):
        spacing = volume.spacing if _has_spacing(volume) else None
        modality, units, volume = volume.modality, volume.units, volume.array
    values = np.percentile(_some_voxels(volume), PERCENTILES) * scale
    kind = kind_of_values(values[0], values[-1], units)
    return {
        "modality": modality or _guess_modality(kind, values[0], values[-1]),
        "values": kind,
        "percentiles": [_short(x) for x in values],
        "spacing": None if spacing is None else [_short(x) for x in spacing],
        "shape": [int(n) for n in volume.shape],
    }


def kind_of_values(low: float, high: float, units: str = "") -> str:
    """What values between these two percentiles are: "HU", "0..1" or "counts"."""
    if units == "HU" or low <= _AIR_HU:
        return "HU"
    return "0..1" if low >= 0 and high <= 1 else "counts"


def input_warnings(volume: Volume, config: PreprocessConfig, profile: DataProfile) -> tuple[str, ...]:
    """Sentences about what makes a volume unlike what the model was trained on; none where nothing is unusual.

    config: the pipeline that the volume goes through. profile: of the model's training data.
    """
    extremes = float(volume.array.min()), float(volume.array.max())
    span = extremes[1] - extremes[0]
    if volume.prepared:
        found = [check_preparation(volume, config)]
    else:
        summary = summarize(volume)
        found = [
            _about_modality(volume, summary, profile) or _about_values(volume, extremes, summary, config, profile),
            _about_spacing(summary, config, profile),
            _about_slices(summary, profile),
        ]
    found.append(_about_contrast(volume, span, config))
    return tuple(sentence for sentence in found if sentence)


def _about_modality(volume: Volume, summary: dict, profile: DataProfile) -> str | None:
    modality = summary["modality"]
    if not modality or not profile.modalities or modality in profile.modalities:
        return None
    trained = " and ".join(_SPOKEN.get(name, name) for name in profile.modalities)
    if volume.modality:
        return f"the scan is {_SPOKEN.get(modality, modality)}, the model was trained on {trained}"
    doubt = " (CT whose rescale intercept was lost looks the same)" if modality == "MR" else ""
    return f"intensities look like {modality}, the model was trained on {trained}{doubt}"


def _about_values(
    volume: Volume, extremes: tuple[float, float], summary: dict, config: PreprocessConfig, profile: DataProfile
) -> str | None:
    kind, (low, *_, high) = summary["values"], summary["percentiles"]
    span = extremes[1] - extremes[0]
    if config.hu_range is not None and kind == "counts" and _without_air(low, high):
        return (
            f"preset {config.preset} expects HU, but nothing lies far below 0, as air (-1000) would: this is no CT, "
            "or the intercept of its values (often -1024) was lost, or all below 0 was cut off"
        )
    trained = profile.values == "HU"
    if (trained or config.hu_range is not None) and kind == "counts" and _no_hu(volume, extremes, config):
        return (
            f"values lie within {extremes[0]:g}..{extremes[1]:g}, as 8-bit grey or labels do, and seem to be no HU, "
            f"which {'the model was trained on' if trained else f'preset {config.preset} expects'}: give the original"
        )
    if kind == "HU" and profile.values == "0..1" and config.preset == "published" and span > 2 * _SOFT_TISSUE_HU:
        return (
            f"values are HU, the model was trained on slices that had been windowed to 8-bit grey; min-max over all "
            f"{span:g} HU leaves soft tissue ({_SOFT_TISSUE_HU} HU) {_SOFT_TISSUE_HU / span:.0%} of the grey levels. A "
            "window comes closer to the training data: preset ct_abdomen, ct_mediastinum, ct_lung, ct_bone or "
            "ct_brain, or a window of your own"
        )
    if kind == "0..1" and profile.values == "HU":
        return (
            "values lie within 0..1, the model was trained on HU: a scan that was windowed or scaled before looks "
            "different to it; give the original"
        )
    return None


def _about_spacing(summary: dict, config: PreprocessConfig, profile: DataProfile) -> str | None:
    spacing = summary["spacing"]
    if spacing is None:
        return "the file has no spacing: voxels are taken for cubes to keep the aspect" if config.keep_aspect else None
    usual = zip(spacing, profile.spacing, strict=False)  # no pairs where the profile has none
    if all(low / _SPACING_FACTOR <= size <= high * _SPACING_FACTOR for size, (low, high) in usual):
        return None
    sizes = " x ".join(f"{size:g}" for size in spacing)
    return f"voxels are {sizes} mm (D H W), those of the training data {_ranges(profile.spacing)} mm"


def _about_slices(summary: dict, profile: DataProfile) -> str | None:
    slices = summary["shape"][0]
    fewest = min(_FEW_SLICES, profile.slices[0] if profile.slices else _FEW_SLICES)
    if slices >= fewest:
        return None
    return f"only {slices} slices: what the model sees between them is interpolated"


def _about_contrast(volume: Volume, span: float, config: PreprocessConfig) -> str | None:
    """Whether hardly anything of the volume can be told apart once its intensities are scaled."""
    if config.preset == "mr" and not volume.prepared:
        return None  # scaled by percentiles
    low, high = np.percentile(_some_voxels(volume.array), (PERCENTILES[0], PERCENTILES[-1]))
    if volume.prepared or config.preset == "prepared":
        used, least, hint = high - low, _FLAT, "is this the right file?"
    elif config.hu_range is not None:
        floor, ceiling = config.hu_range
        used = (np.clip(high, floor, ceiling) - np.clip(low, floor, ceiling)) / (ceiling - floor)
        least, hint = _NARROW, f"hardly anything lies in the HU window {floor:g}..{ceiling:g}: choose another window"
    else:
        used = (high - low) / span if span else 0
        least, hint = _NARROW, "a few extreme voxels (metal, padding) take the rest: choose a HU window, or preset mr"
    if used >= least:
        return None
    return f"99 % of the voxels share {used:.1%} of the grey levels: {hint}"


def write_preparation(folder, config: PreprocessConfig, profile: DataProfile, **facts) -> None:
    """Write what a prepared folder was made with into `<folder>/preparation.json`, for training to read.

    facts: what else people may want to know (dtype, largest error, number of bytes, ...); json must be able to hold it.
    """
    values = {"preprocess": config.to_dict(), "training_data": profile.to_dict(), **facts}
    write_bytes(Path(folder) / PREPARATION_FILE, (json.dumps(values, indent=2) + "\n").encode("utf-8"))


def read_preparation(folder) -> tuple[PreprocessConfig, DataProfile] | None:
    """What `write_preparation` wrote; None where the folder has no such file.

    Raises ValueError where the file is damaged or of a newer version.
    """
    path = Path(folder) / PREPARATION_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return PreprocessConfig.from_dict(values["preprocess"]), DataProfile.from_dict(values["training_data"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be used ({error}); prepare the folder again") from error


def _some_voxels(array: np.ndarray) -> np.ndarray:
    """A regular sample of `[D, H, W]`, flat."""
    step = max(1, int(np.ceil((array.size / _MOST_VOXELS) ** (1 / 3))))
    steps = [min(step, n) for n in array.shape]
    return np.concatenate([part[:, :: steps[1], :: steps[2]].ravel() for part in slabs(array[:: steps[0]])])


def _guess_modality(kind: str, low: float, high: float) -> str:
    """What values alone tell of the modality: HU are CT, large numbers that hardly fall below 0 most likely MR."""
    if kind == "HU":
        return "CT"
    return "MR" if _without_air(low, high) else ""


def _without_air(low: float, high: float) -> bool:
    """No 8-bit grey, and nothing as far below 0 as air and fat in HU; interpolation may have undershot a little."""
    return high > _LARGEST_GREY and low >= -0.02 * high


def _no_hu(volume: Volume, extremes: tuple[float, float], config: PreprocessConfig) -> bool:
    """Only values that 8 bits hold: bone and metal of a CT lie above them, even where it was cut off at 0.

    Not so where the file says HU, or where the very window of the pipeline was applied before.
    """
    low, high = extremes
    return volume.units != "HU" and low >= -0.02 * high and high <= _LARGEST_GREY and extremes != config.hu_range


def _has_spacing(volume: Volume) -> bool:
    """Whether the spacing was read rather than assumed."""
    return volume.orientation == "canonical" or tuple(volume.spacing) != (1.0, 1.0, 1.0)


def _by_frequency(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name, _ in Counter(name for name in names if name).most_common())


def _ranges(pairs) -> str:
    return " x ".join(f"{low:g}..{high:g}" for low, high in pairs)


def _short(number) -> float:
    """Four digits are enough to compare with, and read better."""
    return float(f"{float(number):.4g}")


def _frozen(value):
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
