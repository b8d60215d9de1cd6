"""One named pipeline from a volume to the model's input, used by every stage, the evaluations, demo and app.

It is stored beside the weights (see `med3dvlm.processing`), so that a model is always shown what it was trained on.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from med3dvlm.data.volume import Volume, VolumeError

PUBLISHED_SIZE = (128, 256, 256)  # D, H, W
PRESETS = {
    "published": "min-max over the whole volume, crop to values above 0, trilinear resize",
    "prepared": "values already within 0..1: trilinear resize where the size differs, otherwise unchanged",
}


@dataclass(frozen=True)
class PreprocessConfig:
    """The serialisable form of the pipeline: a preset and the size (D, H, W) it ends with."""

    preset: str = "published"
    size: tuple[int, int, int] = PUBLISHED_SIZE

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preprocessing {self.preset!r}; known are {', '.join(PRESETS)}")
        size = tuple(int(n) for n in self.size)
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"the size of a volume is three positive numbers (D, H, W), not {self.size}")
        object.__setattr__(self, "size", size)

    def to_dict(self) -> dict:
        """A dict that json can hold; `version` counts changes of what a preset means."""
        return {**asdict(self), "size": list(self.size), "version": 1}

    @classmethod
    def from_dict(cls, values: dict) -> "PreprocessConfig":
        """The inverse of `to_dict`. Raises ValueError where a newer version wrote it or a key is unknown."""
        values = dict(values)
        version = values.pop("version", 1)
        unknown = set(values) - {"preset", "size"}
        if version != 1 or unknown:
            raise ValueError(f"preprocessing of version {version} with keys {sorted(values)} is not known here; update")
        return cls(**values)

    def __str__(self) -> str:
        return f"{self.preset} ({PRESETS[self.preset]}) to {'x'.join(map(str, self.size))}"


def preprocess(volume: Volume | np.ndarray, preset: str = "published", size=PUBLISHED_SIZE) -> torch.Tensor:
    """Return the model's input: float32 `[1, D, H, W]` within 0..1.

    volume: a `Volume`, or an array `[D, H, W]`. A prepared volume is only resized, and passes unchanged where it
    already has the right size.
    Raises:
        VolumeError: not three axes, no contrast, or values outside 0..1 in what is said to be prepared.
        ValueError: unknown preset or size.
    """
    config = PreprocessConfig(preset, size)
    if not isinstance(volume, Volume):
        volume = Volume(np.ascontiguousarray(volume, dtype=np.float32), path="array")
    array, name = volume.array, volume.path or "volume"
    if array.ndim != 3:
        raise VolumeError(f"{name}: expected [D, H, W], found shape {array.shape}")
    image = torch.from_numpy(array)  # [D, H, W]
    low, high = image.min().item(), image.max().item()
    if not volume.prepared and preset == "published":
        if not high > low:
            raise VolumeError(f"{name}: all values are {low:g}, there is nothing to see")
        return resize(crop_to_foreground(min_max(image)), config.size)[None]  # [1, D, H, W]
    if low < 0 or high > 1:
        raise VolumeError(f"{name}: prepared values lie within 0..1, found {low:g}..{high:g}; use the published preset")
    return resize(image, config.size)[None]  # [1, D, H, W]


def min_max(image: torch.Tensor) -> torch.Tensor:
    """Scale to 0..1 over the whole volume."""
    image = image - image.min()
    return image / image.max().clamp(min=1e-8)


def crop_to_foreground(image: torch.Tensor) -> torch.Tensor:
    """The smallest box of `[D, H, W]` that holds every value above 0."""
    plane = (image > 0).any(dim=0)  # [H, W]
    along = ((image > 0).flatten(1).any(dim=1), plane.any(dim=1), plane.any(dim=0))  # D, H, W
    ends = [axis.nonzero().flatten()[[0, -1]].tolist() for axis in along]
    return image[tuple(slice(first, last + 1) for first, last in ends)]


def resize(image: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Trilinear, half-pixel centres, no antialiasing; `[D, H, W]` that has the size already stays as it is."""
    if tuple(image.shape) == size:
        return image
    return F.interpolate(image[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]


@lru_cache
def published_augmentation(square: bool):
    """The random changes of the published training as one MONAI Compose on `[1, D, H, W]`.

    Quarter turns in the (H, W) plane with probability 0.5 (left out where H and W differ: they would change the
    shape), flips along D, H and W with 0.1 each, intensity scaled within 10 % and shifted within 0.1 with 0.5 each.
    """
    from monai.transforms import Compose, RandFlip, RandRotate90, RandScaleIntensity, RandShiftIntensity

    turns = [RandRotate90(prob=0.5, spatial_axes=(1, 2))] if square else []
    flips = [RandFlip(prob=0.1, spatial_axis=axis) for axis in range(3)]
    intensity = [RandScaleIntensity(factors=0.1, prob=0.5), RandShiftIntensity(offsets=0.1, prob=0.5)]
    return Compose(turns + flips + intensity)


def augment(image: torch.Tensor, seed: int) -> torch.Tensor:
    """Apply the published augmentation to `[1, D, H, W]`; the same seed gives the same change.

    Off unless asked for: flips and turns contradict what reports say about sides and planes. As published, values may
    leave 0..1 by up to 0.2.
    """
    transform = published_augmentation(image.shape[-2] == image.shape[-1])
    transform.set_random_state(seed=seed)
    return torch.as_tensor(transform(image).as_tensor()).contiguous()
