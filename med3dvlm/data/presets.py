"""The named pipelines from a volume to the model's input: what they are called and how they are written down.

What they do is in `med3dvlm.data.preprocess`. Nothing here imports torch.
"""

import argparse
from dataclasses import asdict, dataclass, replace

import numpy as np

from med3dvlm.data.volume import Volume

VERSION = 2  # of the serialised form; 1 had preset and size only
PUBLISHED_SIZE = (128, 256, 256)  # D, H, W
WINDOWS = {  # level and width in HU
    "ct_abdomen": (40, 400),
    "ct_mediastinum": (50, 350),
    "ct_lung": (-600, 1500),
    "ct_bone": (400, 1800),
    "ct_brain": (40, 80),
    "ct_wide": (0, 2000),
}
PRESETS = {
    "published": "min-max over the whole volume, as the published preparation does",
    **{name: f"HU window {c - w / 2:g}..{c + w / 2:g} (level {c}, width {w})" for name, (c, w) in WINDOWS.items()},
    "window": "a HU window of your own (level and width)",
    "mr": "0.5th to 99.5th percentile of the volume, for MR and other scans without HU",
    "prepared": "values already within 0..1: only resized, and unchanged where the size is right",
}


@dataclass(frozen=True)
class PreprocessConfig:
    """The serialisable form of the pipeline.

    preset: one of `PRESETS`, what happens to intensities.
    size: (D, H, W) of the result.
    window: level and width in HU, for the preset "window" only.
    keep_aspect: scale all axes by the same physical factor and pad with background, instead of stretching each axis
        to the size.
    crop: cut off what surrounds the values above 0 (after the first stage: above the window's floor).
    """

    preset: str = "published"
    size: tuple[int, int, int] = PUBLISHED_SIZE
    window: tuple[float, float] | None = None
    keep_aspect: bool = False
    crop: bool = True

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preprocessing {self.preset!r}; known are {', '.join(PRESETS)}")
        size = tuple(int(n) for n in self.size)
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"the size of a volume is three positive numbers (D, H, W), not {self.size}")
        if (self.window is None) == (self.preset == "window"):
            raise ValueError("the preset 'window' takes a level and a width in HU, the others have none of their own")
        if self.window is not None:
            window = tuple(float(n) for n in self.window)
            if len(window) != 2 or not (np.isfinite(window).all() and window[1] > 0):
                raise ValueError(f"a window is a level and a width above 0, in HU, not {self.window}")
            object.__setattr__(self, "window", window)
        if self.preset == "prepared" and (self.keep_aspect or not self.crop):
            raise ValueError("prepared volumes are only resized: keep_aspect and crop belong to other presets")
        object.__setattr__(self, "size", size)

    @property
    def name(self) -> str:
        """Preset and options without the size, as prepared files record it: "published", "window 40 400 no_crop"."""
        words = [self.preset, *(f"{n:g}" for n in self.window or ())]
        return " ".join(words + ["keep_aspect"] * self.keep_aspect + ["no_crop"] * (not self.crop))

    @property
    def hu_range(self) -> tuple[float, float] | None:
        """What becomes 0 and what becomes 1, in HU; None where that depends on the volume."""
        if self.preset not in (*WINDOWS, "window"):
            return None
        level, width = self.window or WINDOWS[self.preset]
        return level - width / 2, level + width / 2

    def to_dict(self) -> dict:
        """A dict that json can hold; `version` counts changes of what it means."""
        window = None if self.window is None else list(self.window)
        return {**asdict(self), "size": list(self.size), "window": window, "version": VERSION}

    @classmethod
    def from_dict(cls, values: dict) -> "PreprocessConfig":
        """The inverse of `to_dict`. Raises ValueError where a newer version wrote it or a key is unknown."""
        values = dict(values)
        version = values.pop("version", 1)
        if version not in (1, VERSION):
            raise ValueError(f"preprocessing of version {version}: this software knows up to {VERSION}; update it")
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"preprocessing with unknown keys {', '.join(unknown)}: written by a newer version?")
        return cls(**values)

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        resized = f"scaled with its proportions and padded to {size}" if self.keep_aspect else f"to {size}"
        crop = "" if self.preset == "prepared" else ", cropped" if self.crop else ", not cropped"
        what = f"HU window {self.hu_range[0]:g}..{self.hu_range[1]:g}" if self.window else PRESETS[self.preset]
        return f"{self.preset} ({what}{crop}) {resized}"


def check_preparation(volume: Volume | str, config: PreprocessConfig) -> str | None:
    """A sentence where a prepared volume went through another pipeline than `config`; None where all is well.

    volume: a `Volume`, or the name that a prepared file records (`Volume.preparation`; "" where it has none). What is
    not prepared passes, and so does a file without a name where the published preparation is expected.
    """
    if isinstance(volume, Volume) and not volume.prepared:
        return None
    made = volume.preparation if isinstance(volume, Volume) else volume
    if made == config.name or config.preset == "prepared" or (not made and config.name == "published"):
        return None
    how = f"was prepared as {made!r}" if made else "is prepared, but its file does not say how"
    return f"the volume {how}, the model expects {config.name!r}: prepare it again, or give the original scan"


def add_preprocess_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that choose a pipeline: --preset, --window, --keep_aspect, --no_crop."""
    presets = "; ".join(f"{name}: {text}" for name, text in PRESETS.items())
    group = parser.add_argument_group("preprocessing")
    group.add_argument("--preset", choices=list(PRESETS), help=presets)
    group.add_argument("--window", type=float, nargs=2, metavar=("LEVEL", "WIDTH"), help="a window of your own, in HU")
    group.add_argument("--keep_aspect", action="store_true", help="keep proportions: scale by spacing, then pad")
    group.add_argument("--no_crop", action="store_true", help="keep what surrounds the body")


def preprocess_config(args: argparse.Namespace, base: PreprocessConfig | None = None) -> PreprocessConfig:
    """The pipeline that the flags of `add_preprocess_arguments` ask for; what they leave open is as in `base`.

    Raises ValueError for flags that contradict each other.
    """
    base = base or PreprocessConfig()
    changes = {}
    if args.window is not None:
        if args.preset not in (None, "window"):
            raise ValueError(f"--window is a preset of its own, it can't change {args.preset}")
        changes = {"preset": "window", "window": tuple(args.window)}
    elif args.preset is not None:
        changes = {"preset": args.preset, "window": base.window if args.preset == base.preset else None}
    if args.keep_aspect:
        changes["keep_aspect"] = True
    if args.no_crop:
        changes["crop"] = False
    return replace(base, **changes)
