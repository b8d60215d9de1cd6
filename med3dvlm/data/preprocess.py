"""One named pipeline from a volume to the model's input, used by every stage, the evaluations, demo and app.

It is stored beside the weights (see `med3dvlm.processing`), so that a model is always shown what it was trained on.
Stages: intensities to 0..1, crop to what lies above 0, resize (see docs/data.md, "Intensities").
"""

from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from med3dvlm.data.presets import PUBLISHED_SIZE, PreprocessConfig
from med3dvlm.data.volume import Volume, VolumeError

_MR_PERCENTILES = (0.5, 99.5)
_CHUNK_VOXELS = 1 << 22  # that pass through MONAI at once
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


def scale_intensity(image: torch.Tensor, config: PreprocessConfig) -> torch.Tensor:
    """What the first stage of `build_pipeline(config)` makes of `[1, D, H, W]`, to the bit, with less memory.

    What `config.crop` will cut off is left out at once, and the rest goes some planes at a time through MONAI, which
    makes several copies of what it scales.
    """
    from monai.transforms import ScaleIntensityRange
    from monai.transforms.utils_pytorch_numpy_unification import percentile

    if config.preset == "published":
        low, high = torch.aminmax(image)
    elif config.preset == "mr":
        low, high = (percentile(image, share) for share in _MR_PERCENTILES)
    else:
        low, high = config.hu_range
    scale = ScaleIntensityRange(low, high, 0.0, 1.0, clip=config.preset != "published")
    if config.crop:
        image = image[(slice(None), *_box_above(image[0], low))]
    scaled = torch.empty_like(image, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK_VOXELS // image[0, 0].numel())  # planes
    for first in range(0, image.shape[1], step):
        planes = slice(first, first + step)
        scaled[:, planes] = scale(image[:, planes]).as_tensor()
    return scaled


def _box_above(image: torch.Tensor, floor) -> tuple[slice, ...]:
    """The smallest box of `[D, H, W]` with all values above `floor`; everything where there are none."""
    rows, columns = (torch.zeros(n, dtype=torch.bool) for n in image.shape[1:])
    planes = []
    for plane in image:  # one at a time: a mask of everything would take a quarter of the memory of the volume
        above = plane > floor
        rows |= above.any(1)
        columns |= above.any(0)
        planes.append(bool(above.any()))
    inside = [along.nonzero().flatten().tolist() for along in (torch.tensor(planes), rows, columns)]
    return tuple(slice(found[0], found[-1] + 1) if found else slice(None) for found in inside)


def scale_to_fit(image, size: tuple[int, int, int]):
    """Scale a MetaTensor `[1, D, H, W]` to voxels of one length on all axes, as large as fits into `size`."""
    from monai.transforms import Resize

    extent = np.array(image.shape[1:]) * np.asarray(image.pixdim)  # mm along D, H, W
    voxel = (extent / size).max()  # mm
    scaled = np.clip(np.rint(extent / voxel), 1, size).astype(int).tolist()
    return Resize(scaled, mode="trilinear", align_corners=False)(image)


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
    image = torch.from_numpy(array)  # [D, H, W]
    low, high = (value.item() for value in torch.aminmax(image))
    if volume.prepared or config.preset == "prepared":
        if low < 0 or high > 1:
            raise VolumeError(
                f"{name}: prepared values lie within 0..1, found {low:g}..{high:g}; use the published preset"
            )
        return resize(image, config.size)[None]  # [1, D, H, W]
    _check_contrast(name, low, high, config)
    return _run(config, image, volume.spacing, name)  # [1, D, H, W]


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


def _run(config: PreprocessConfig, image: torch.Tensor, spacing, name: str) -> torch.Tensor:
    """Send `[D, H, W]` through the pipeline. Raises VolumeError where percentiles leave nothing to scale by."""
    from monai.data import MetaTensor

    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    scaled = MetaTensor(scale_intensity(image[None], config), affine=affine)  # [1, D, H, W]
    result = build_pipeline(config)(scaled, start=1).as_tensor()
    low, high = (value.item() for value in torch.aminmax(result))
    if low < -1e-4 or high > 1 + 1e-4 or not high > low:
        raise VolumeError(f"{name}: nearly all of its values are the same, there is nothing to see")
    return result.clamp_(0, 1).contiguous()
