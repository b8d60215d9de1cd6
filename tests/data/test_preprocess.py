"""The pipeline from a volume to the model's input."""

import numpy as np
import pytest
import torch

from med3dvlm.data.preprocess import PreprocessConfig, augment, preprocess
from med3dvlm.data.volume import Volume, VolumeError


def test_published_preset_equals_the_monai_transforms():
    """Min-max, crop to the foreground and resize give what MONAI's own transforms give (an independent reference)."""
    transforms = pytest.importorskip("monai.transforms")
    array = np.random.default_rng(0).random((9, 14, 11), dtype=np.float32) * 700 - 200
    array[:2], array[:, :3], array[:, :, -4:] = -200, -200, -200
    scaled = torch.from_numpy(array) - array.min()
    scaled = (scaled / scaled.max())[None]
    reference = transforms.Compose(
        [
            transforms.CropForeground(select_fn=lambda x: x > 0),
            transforms.Resize((8, 16, 12), mode="trilinear", align_corners=False),
        ]
    )(scaled)
    image = preprocess(array, "published", (8, 16, 12))
    assert image.shape == (1, 8, 16, 12) and image.dtype == torch.float32
    assert torch.allclose(image, reference.as_tensor(), atol=1e-6)
    assert image.min() >= 0 and image.max() <= 1


def test_intensity_scale_and_offset_do_not_matter():
    array = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32)
    first, second = (preprocess(a, "published", (4, 5, 6)) for a in (array, array * 3000 - 1024))
    assert torch.allclose(first, second, atol=1e-4)


def test_prepared_volume_passes_unchanged_or_is_only_resized():
    array = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32) * 0.5  # min-max would stretch it
    volume = Volume(array, prepared=True)
    assert torch.equal(preprocess(volume, "published", (4, 5, 6)), torch.from_numpy(array)[None])
    assert torch.equal(preprocess(array, "prepared", (4, 5, 6)), torch.from_numpy(array)[None])
    larger = preprocess(volume, "published", (8, 10, 12))
    assert larger.shape == (1, 8, 10, 12) and larger.max() <= 0.5


@pytest.mark.parametrize("volume, reason", [
    (Volume(np.full((2, 3, 4), 7, np.float32), path="flat.nii"), "flat.nii: all values are 7"),
    (np.ones((2, 3), np.float32), r"array: expected \[D, H, W\], found shape \(2, 3\)"),
    (Volume(np.array([[[0, 2]]], np.float32), path="x.nii", prepared=True), "x.nii: prepared values lie within 0..1"),
])  # fmt: skip
def test_unusable_values_are_named(volume, reason):
    with pytest.raises(VolumeError, match=reason):
        preprocess(volume, size=(2, 3, 4))


def test_config_round_trip_and_refusals():
    config = PreprocessConfig("published", (32, 64, 64))
    assert PreprocessConfig.from_dict(config.to_dict()) == config
    assert PreprocessConfig().size == (128, 256, 256)
    assert "32x64x64" in str(config)
    for values in ({"preset": "window"}, {"size": [1, 2]}, {"size": [0, 2, 3]}, {"version": 2}, {"clip": 1}):
        with pytest.raises(ValueError):
            PreprocessConfig.from_dict(values)


def test_augmentation_is_repeatable_and_as_published():
    image = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = [augment(image, seed) for seed in range(40)]
    assert all(torch.equal(result, augment(image, seed)) for seed, result in enumerate(results))
    assert all(result.shape == image.shape and result.dtype == image.dtype for result in results)
    changed = [not torch.equal(result, image) for result in results]
    assert 0 < changed.count(False) < 20  # four independent coins: mostly, but not always, something changes
    assert min(r.min() for r in results) >= -0.1 - 1e-6 and max(r.max() for r in results) <= 1.2 + 1e-6
    assert augment(torch.rand(1, 4, 6, 8), 3).shape == (1, 4, 6, 8)  # no quarter turns where they would not fit
