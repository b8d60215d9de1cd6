"""From stored bytes to the model's numbers, with the published random changes folded into the conversion.

The published training turns, flips, scales and shifts each image with MONAI. Here the same changes are drawn (see
`draw`) and done on the way from uint8 to float: turns are another order of strides, flips move single bytes, scale and
shift are one multiply-add. The results equal MONAI's for the same parameters, and the parameters have the same
distribution.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

UNIT = 1 / 255  # as float32, what a prepared uint8 file holds as its slope
D, H, W = -3, -2, -1  # axes of [..., D, H, W]
_TURNS = {0: (), 1: (H,), 2: (H, W), 3: (W,)}  # what is flipped, after H and W changed places, by quarter turns
_SIDE_OR_PLANE = re.compile(
    r"\b((left|right|anterior|posterior|superior|inferior|medial|lateral|ventral|dorsal|cranial|caudal)(ly|wards?|most)?"
    r"|axial|coronal|sagittal|oblique|upper|lower|(hemi|antero|postero|supero|infero)\w+)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Augmentation:
    """Which of the published random changes are made.

    turns: quarter turns in the (H, W) plane, probability 0.5; only where H and W are equal.
    flips: along D, H and W, probability 0.1 each.
    intensity: scaled within 10 % and shifted within 0.1, probability 0.5 each; values may leave 0..1 by up to 0.2.
    """

    turns: bool = False
    flips: bool = False
    intensity: bool = False


AUGMENTATIONS = {
    "none": Augmentation(),
    "intensity": Augmentation(intensity=True),
    "published": Augmentation(turns=True, flips=True, intensity=True),
}


class Change(NamedTuple):
    """What happens to one image: `turns` quarter turns (0 to 3), then flips along `flips`, then x * scale + shift."""

    turns: int = 0
    flips: tuple[int, ...] = ()
    scale: float = 1.0
    shift: float = 0.0


def names_side_or_plane(text: str) -> bool:
    """Whether an English text speaks of left and right, planes or directions, which turns and flips would falsify."""
    return _SIDE_OR_PLANE.search(text) is not None


def allowed_augmentation(texts: Iterable[str]) -> str:
    """The most that is allowed for data with these texts (reports, questions, answers): "intensity" where one of them
    names a side or a plane, "published" otherwise.
    """
    return "intensity" if any(map(names_side_or_plane, texts)) else "published"


def draw(seed: int, augmentation: Augmentation, square: bool) -> Change:
    """The change of one image; the same seed gives the same one. `square`: H and W are equal, turns are possible."""
    rng = random.Random(seed)
    turns = rng.randint(1, 3) if augmentation.turns and square and rng.random() < 0.5 else 0
    flips = tuple(axis for axis in (D, H, W) if augmentation.flips and rng.random() < 0.1)
    scale = 1 + rng.uniform(-0.1, 0.1) if augmentation.intensity and rng.random() < 0.5 else 1.0
    shift = rng.uniform(-0.1, 0.1) if augmentation.intensity and rng.random() < 0.5 else 0.0
    return Change(turns, flips, scale, shift)


def to_unit(
    images: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    seeds: Sequence[int] | torch.Tensor | None = None,
    augmentation: str | Augmentation = "published",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convert stored images to the model's input, on the device they are on.

    images: `[B, 1, D, H, W]`, uint8 (0..255 becomes 0..1) or floating point within 0..1.
    seeds: B whole numbers, each of which decides the change of one image (keep them in a list or on the CPU: reading
        them from a GPU waits for it); None leaves the images as they are.
    augmentation: which changes are drawn, an `Augmentation` or one of the names in `AUGMENTATIONS`.
    out: a contiguous tensor of that shape and dtype to write to, so that no memory is allocated anew.
    Returns `[B, 1, D, H, W]` in `dtype`.
    Raises ValueError where the numbers of images and seeds differ, images are neither uint8 nor floating point, or the
    augmentation has no such name.
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"expected images as uint8 or floating point, found {images.dtype}")
    if seeds is None and out is None and images.is_floating_point():
        return images.to(dtype)
    if out is None:
        out = torch.empty(images.shape, dtype=dtype, device=images.device)
    unit = UNIT if images.dtype == torch.uint8 else 1.0
    if seeds is None:
        return out.copy_(images).mul_(unit)
    if isinstance(augmentation, str):
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, not {augmentation!r}")
        augmentation = AUGMENTATIONS[augmentation]
    seeds = seeds.tolist() if isinstance(seeds, torch.Tensor) else list(seeds)
    if len(seeds) != len(images):
        raise ValueError(f"expected one seed an image, found {len(images)} images and {len(seeds)} seeds")
    square = images.shape[H] == images.shape[W]
    for image, target, seed in zip(images, out, seeds, strict=True):
        change_into(target, image, draw(seed, augmentation, square), unit)
    return out


def change_into(target: torch.Tensor, image: torch.Tensor, change: Change, unit: float = 1.0) -> torch.Tensor:
    """Write `image * unit` after `change` to `target`; both `[..., D, H, W]`.

    A turn is a transposed view and flips; all flips are one move of the stored numbers (torch has no negative
    strides), which for bytes is a quarter of what the float copy moves.
    """
    if change.turns % 2:
        image = image.transpose(H, W)
    # Flipping twice along one axis is not flipping it.
    flips = set(_TURNS[change.turns]) ^ set(change.flips)
    if flips:
        image = image.flip(sorted(flips))
    target.copy_(image)
    # One pass: target = shift + scale * unit * target
    return torch.add(torch.tensor(change.shift), target, alpha=change.scale * unit, out=target)
