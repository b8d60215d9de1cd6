"""What a model is shown, and how it sees it."""

import os
from dataclasses import dataclass

import torch

from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.profile import DataProfile
from med3dvlm.data.volume import Volume, VolumeError
from med3dvlm.processing import see

Scan = str | os.PathLike | Volume | torch.Tensor
"""A path of any form that `load_volume` reads, a `Volume`, or a preprocessed image `[1, D, H, W]` in [0, 1]."""

ROUNDING = 1e-3  # by which a preprocessed image in few bits may leave [0, 1]


@dataclass(frozen=True)
class Seen:
    """A scan as the model sees it.

    image: float32 `[1, D, H, W]` in [0, 1], the model's input.
    volume: what it was made from; None where a preprocessed image was given.
    warnings: sentences a user should see.
    """

    image: torch.Tensor
    volume: Volume | None = None
    warnings: tuple[str, ...] = ()


def look(scan: Scan, config: PreprocessConfig, training_data: DataProfile, **reading) -> Seen:
    """A scan as a model with this preprocessing and training data sees it.

    reading: how a path is read (series, frame, resample, nan, flip), as `load_volume` takes it.
    Raises:
        VolumeError: it cannot be read, is of no use to the model, or is none of `Scan`.
        ValueError: `reading` for what has been read already.
    """
    if isinstance(scan, str | os.PathLike | Volume):
        return Seen(*see(scan, config, training_data, **reading))
    if not isinstance(scan, torch.Tensor):
        raise VolumeError(
            "a scan is a path, a Volume, or a preprocessed image (a torch tensor); found a "
            f"{type(scan).__name__}. Volume(array, spacing) makes one of an array [D, H, W]"
        )
    if reading:
        raise ValueError(f"{', '.join(reading)}: options of reading belong to a path, not to an image")
    expected = (1, *config.size)
    if tuple(scan.shape) != expected:
        raise VolumeError(f"expected a preprocessed image {list(expected)}, found a tensor {list(scan.shape)}")
    low, high = (value.item() for value in scan.aminmax())
    if not scan.is_floating_point() or not (low >= -ROUNDING and high <= 1 + ROUNDING):  # nor NaN
        raise VolumeError(
            f"a preprocessed image holds floating-point values in [0, 1], found {scan.dtype} {low:g}..{high:g}; "
            "give the path of the scan, or a Volume, to have it preprocessed"
        )
    return Seen(scan)
