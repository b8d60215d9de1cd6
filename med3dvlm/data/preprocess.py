"""One named pipeline from a volume to the model's input, used by every stage, the evaluations, demo and app.

It is stored beside the weights (see `med3dvlm.processing`), so that a model is always shown what it was trained on.
Stages: intensities to 0..1, crop to what lies above 0, resize (see docs/data.md, "Intensities").
"""

from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from med3dvlm.data.geometry import linear_taps
from med3dvlm.data.presets import PUBLISHED_SIZE, PreprocessConfig
from med3dvlm.data.scratch import let_go, slabs
from med3dvlm.data.volume import Volume, VolumeError

_MR_PERCENTILES = (0.5, 99.5)
_MOST_SORTED = 1 << 27  # voxels that percentiles are taken of; of larger volumes every n-th slice counts
_LEAST_CONTRAST = 0.01  # of the range 0..1; what a window leaves of a volume that has no HU


@lru_cache(maxsize=16)
def build_pipeline(config: PreprocessConfig):
    """The stages as one `monai.transforms.Compose` from `[1, D, H, W]` (a MetaTensor with spacing where the aspect is
    to be kept) to `[1, *config.size]` within 0..1.

    MONAI is imported here, because its import takes seconds and prepared volumes don't need it.
    Raises ValueError for the preset "prepared", which has no stages.
    """
    from monai.transforms import (
        Compose,
        CropForeground,
        Resize,
        ResizeWithPadOrCrop,
        ScaleIntensity,
        ScaleIntensityRange,
        ScaleIntensityRangePercentiles,
    )

    if config.preset == "prepared":
        raise ValueError("prepared volumes pass through no pipeline")
    if config.preset == "published":
        stages = [ScaleIntensity(0.0, 1.0)]
    elif config.preset == "mr":
        stages = [ScaleIntensityRangePercentiles(*_MR_PERCENTILES, 0.0, 1.0, clip=True)]
    else:
        stages = [ScaleIntensityRange(*config.hu_range, 0.0, 1.0, clip=True)]
    if config.crop:
        stages.append(CropForeground())  # to the smallest box that holds every value above 0
    if config.keep_aspect:
        stages += [partial(scale_to_fit, size=config.size), ResizeWithPadOrCrop(config.size)]
    else:
        stages.append(Resize(config.size, mode="trilinear", align_corners=False))  # half-pixel centres
    return Compose(stages)


def _scaling(config: PreprocessConfig, array: np.ndarray, low: float, high: float):
    """The first stage of `build_pipeline(config)`, to the bit, as a function of parts of a volume; and what becomes 0.

    low, high: extremes of `array` `[D, H, W]`.
    """
    from monai.transforms import ScaleIntensityRange
    from monai.transforms.utils_pytorch_numpy_unification import percentile

    if config.preset == "mr":
        step = -(-array.size // _MOST_SORTED)  # a volume that is too large for memory is not sorted whole
        low, high = (percentile(torch.from_numpy(array[::step]), share) for share in _MR_PERCENTILES)
    elif config.preset == "published":  # float32, as MONAI finds them in the volume
        low, high = torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
    else:
        low, high = config.hu_range
    scale = ScaleIntensityRange(low, high, 0.0, 1.0, clip=config.preset != "published")
    return lambda part: scale(torch.from_numpy(part)).as_tensor(), low


def _box(array: np.ndarray, floor) -> tuple[slice, ...]:
    """The smallest box of `[D, H, W]` with all values above `floor`; everything where there are none."""
    rows, columns, planes = 0, 0, []
    for part in slabs(array):
        above = torch.from_numpy(part) > floor  # [d, H, W]
        rows, columns = rows | above.any(2).any(0), columns | above.any(1).any(0)
        planes.append(above.any(2).any(1))
    inside = [along.nonzero().flatten().tolist() for along in (torch.cat(planes), rows, columns)]
    return tuple(slice(found[0], found[-1] + 1) if found else slice(None) for found in inside)


def _resized(array: np.ndarray, scale, size: tuple[int, int, int]) -> torch.Tensor:
    """Scale `[D, H, W]` and `resize` it, to the bit, but plane by plane and without a copy of the volume."""
    result = torch.empty(size)
    upper, lower, weights = linear_taps(len(array), size[0])
    held: dict[int, torch.Tensor] = {}  # by source plane
    for index, (one, other) in enumerate(zip(upper.tolist(), lower.tolist(), strict=True)):
        held = {plane: held[plane] for plane in held.keys() & {one, other}}
        for plane in {one, other} - held.keys():
            held[plane] = resize(scale(array[plane : plane + 1]), (1, *size[1:]))[0]  # [H, W] of the result
            let_go(array)
        weight = float(weights[index])
        # In the order, and with the roundings, of torch's kernel for volumes.
        torch.addcmul(held[other] * weight, held[one], torch.tensor(1 - weight), out=result[index])
    return result


def scale_to_fit(image, size: tuple[int, int, int]):
    """Scale a MetaTensor `[1, D, H, W]` to voxels of one length on all axes, as large as fits into `size`."""
    from monai.transforms import Resize

    return Resize(fitted_size(image.shape[1:], image.pixdim, size), mode="trilinear", align_corners=False)(image)


def fitted_size(shape, spacing, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """The largest size within `size` that has the proportions of `shape` voxels of `spacing` mm (all D, H, W)."""
    extent = np.array(shape) * np.asarray(spacing)  # mm
    voxel = (extent / size).max()  # mm
    return tuple(np.clip(np.rint(extent / voxel), 1, size).astype(int).tolist())


def preprocess(volume: Volume | np.ndarray, preset="published", size=PUBLISHED_SIZE, **options) -> torch.Tensor:
    """Return the model's input: float32 `[1, D, H, W]` within 0..1.

    volume: a `Volume`, or an array `[D, H, W]`. A prepared volume is only resized, and passes unchanged where it
    already has the right size.
    preset: a `PreprocessConfig`, or the name of a preset, with `size` and the other fields as keywords.
    Raises:
        VolumeError: not three axes, no contrast, or values outside 0..1 in what is said to be prepared.
        ValueError: unknown preset, size or option.
    """
    config = preset if isinstance(preset, PreprocessConfig) else PreprocessConfig(preset, size, **options)
    if not isinstance(volume, Volume):
        volume = Volume(np.ascontiguousarray(volume, dtype=np.float32), path="array")
    array, name = volume.array, volume.path or "volume"
    if array.ndim != 3:
        raise VolumeError(f"{name}: expected [D, H, W], found shape {array.shape}")
    lows, highs = zip(*(torch.aminmax(torch.from_numpy(part)) for part in slabs(array)), strict=True)
    low, high = torch.stack(lows).min().item(), torch.stack(highs).max().item()
    if volume.prepared or config.preset == "prepared":
        if low < 0 or high > 1:
            raise VolumeError(
                f"{name}: prepared values lie within 0..1, found {low:g}..{high:g}; use the published preset"
            )
        return resize(torch.from_numpy(array), config.size)[None]  # [1, D, H, W]
    _check_contrast(name, low, high, config)
    return _run(config, volume, (low, high), name)  # [1, D, H, W]


def resize(image: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Trilinear, half-pixel centres, no antialiasing; `[D, H, W]` that has the size already stays as it is."""
    if tuple(image.shape) == size:
        return image
    return F.interpolate(image[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]


def _check_contrast(name: str, low: float, high: float, config: PreprocessConfig) -> None:
    """Refuse what would come out as one grey value."""
    if not high > low:
        raise VolumeError(f"{name}: all values are {low:g}, there is nothing to see")
    if config.hu_range is None:
        return
    floor, ceiling = config.hu_range
    seen = np.clip((np.array([low, high]) - floor) / (ceiling - floor), 0, 1)
    if seen[1] - seen[0] < _LEAST_CONTRAST:
        raise VolumeError(
            f"{name}: its values {low:g}..{high:g} show nothing in the HU window {floor:g}..{ceiling:g}; "
            "what was windowed before, or is no CT, needs another preset (published, mr or prepared)"
        )


def _run(config: PreprocessConfig, volume: Volume, extremes: tuple[float, float], name: str) -> torch.Tensor:
    """What `build_pipeline(config)` makes of a volume, without its copies of the volume. extremes: of the values.

    Raises VolumeError where percentiles leave nothing to scale by.
    """
    from monai.transforms import ResizeWithPadOrCrop

    scale, floor = _scaling(config, volume.array, *extremes)
    inside = volume.array[_box(volume.array, floor)] if config.crop else volume.array
    if config.keep_aspect:
        result = _resized(inside, scale, fitted_size(inside.shape, volume.spacing, config.size))
        result = ResizeWithPadOrCrop(config.size)(result[None]).as_tensor()  # [1, D, H, W]
    else:
        result = _resized(inside, scale, config.size)[None]  # [1, D, H, W]
    low, high = (value.item() for value in torch.aminmax(result))
    if low < -1e-4 or high > 1 + 1e-4 or not high > low:
        raise VolumeError(f"{name}: nearly all of its values are the same, there is nothing to see")
    return result.clamp_(0, 1).contiguous()
