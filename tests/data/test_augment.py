"""Conversion of stored images with the published augmentation, against MONAI's."""

import numpy as np
import pytest
import torch

from med3dvlm.data.augment import (
    AUGMENTATIONS,
    Augmentation,
    Change,
    D,
    H,
    W,
    allowed_augmentation,
    change_into,
    draw,
    names_side_or_plane,
    to_unit,
)

PUBLISHED = AUGMENTATIONS["published"]


def codes(*shape, seed=0):
    """Random images as uint8."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_codes_become_what_the_reader_gives():
    """A prepared uint8 file has the slope 1/255 as float32; every code to the bit, and 255 is 1."""
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 4, 8, 8)
    found = to_unit(images)
    expected = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    assert found.dtype == torch.float32 and np.array_equal(found.flatten().numpy(), expected)
    assert found.min() == 0 and found.max() == 1


def test_floating_point_images_stay_as_they_are():
    images = torch.rand(2, 1, 3, 4, 5)
    assert torch.equal(to_unit(images), images)
    half = to_unit(images, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, images.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seeds", [None, [1, 2, 3]])
def test_a_given_buffer_is_filled_with_the_same(dtype, seeds):
    images = codes(3, 1, 4, 6, 6)
    expected = to_unit(images, dtype, seeds)
    buffer = torch.full(images.shape, torch.nan, dtype=dtype)
    assert to_unit(images, dtype, seeds, out=buffer) is buffer
    assert torch.equal(buffer, expected) and expected.dtype == dtype
    assert (expected.float() - to_unit(images, torch.float32, seeds)).abs().max() <= 2**-7


CHANGES = [
    Change(turns, flips, scale, shift)
    for turns in range(4)
    for flips in [(), (D,), (H,), (W,), (D, W), (H, W), (D, H, W)]
    for scale, shift in [(1.0, 0.0), (1.07, -0.06)]
]


@pytest.mark.parametrize("stored", ["uint8", "float32"])
def test_every_change_equals_monais(stored):
    """The same parameters through MONAI's own transforms, in the published order."""
    from monai.transforms import Flip, Rotate90, ScaleIntensity, ShiftIntensity

    image = codes(1, 4, 6, 6) if stored == "uint8" else torch.rand(1, 4, 6, 6)
    unit = 1 / 255 if stored == "uint8" else 1.0
    for change in CHANGES:
        expected = image.float() * unit
        if change.turns:
            expected = Rotate90(change.turns, spatial_axes=(1, 2))(expected)
        for axis in change.flips:
            expected = Flip(spatial_axis=axis + 3)(expected)
        expected = ScaleIntensity(minv=None, maxv=None, factor=change.scale - 1)(expected)
        expected = torch.as_tensor(ShiftIntensity(change.shift)(expected))
        found = change_into(torch.empty(1, 4, 6, 6), image, change, unit)
        assert torch.allclose(found, expected, atol=1e-6, rtol=0), change


def test_changes_have_the_distribution_of_monais():
    """Frequencies and spread of every parameter over 4,000 images, of ours and of MONAI's random transforms."""
    from monai.transforms import RandFlip, RandRotate90, RandScaleIntensity, RandShiftIntensity

    count = 4000
    ours = np.array([
        [*(change.turns == k for k in range(4)), *(axis in change.flips for axis in (D, H, W)),
         change.scale == 1, change.scale - 1, abs(change.scale - 1), change.shift == 0, change.shift, abs(change.shift)]
        for change in (draw(seed, PUBLISHED, square=True) for seed in range(count))
    ], dtype=float)  # fmt: skip
    turn, flips = RandRotate90(prob=0.5, spatial_axes=(1, 2)), [RandFlip(prob=0.1, spatial_axis=a) for a in range(3)]
    scale, shift = RandScaleIntensity(factors=0.1, prob=0.5), RandShiftIntensity(offsets=0.1, prob=0.5)
    for seed, transform in enumerate([turn, *flips, scale, shift]):
        transform.set_random_state(seed)
    theirs = []
    for _ in range(count):
        for transform in (turn, scale, shift):
            transform.randomize()
        for flip in flips:
            flip.randomize(None)
        k = turn._rand_k if turn._do_transform else 0
        factor = scale.factor if scale._do_transform else 0.0
        offset = shift._offset if shift._do_transform else 0.0
        theirs.append([*(k == n for n in range(4)), *(flip._do_transform for flip in flips), factor == 0, factor,
                       abs(factor), offset == 0, offset, abs(offset)])  # fmt: skip
    theirs = np.array(theirs, dtype=float)
    known = [1 / 2, *[1 / 6] * 3, *[0.1] * 3, 1 / 2, 0, 0.025, 1 / 2, 0, 0.025]
    error = theirs.std(axis=0) / np.sqrt(count)
    assert (np.abs(ours.mean(axis=0) - known) < 4.5 * error).all()
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4.5 * np.sqrt(2) * error).all()
    assert np.allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.12)
    assert np.abs(ours[:, [8, 11]]).max() <= 0.1
    correlation = np.corrcoef(ours[:, [0, 4, 5, 6, 7, 8, 10, 11]].T) - np.eye(8)
    assert np.abs(correlation).max() < 0.08  # drawn independently of each other


def test_a_seed_decides_the_change_of_its_image_alone():
    images = codes(5, 1, 4, 8, 8)
    seeds = [11, 7, 11, 2**31 - 1, 0]
    together = to_unit(images, seeds=seeds)
    assert torch.equal(together, to_unit(images, seeds=torch.tensor(seeds)))
    for image, seed, result in zip(images, seeds, together, strict=True):
        assert torch.equal(to_unit(image[None], seeds=[seed])[0], result)
    plain = to_unit(images[:1].expand(40, -1, -1, -1, -1), seeds=range(40))
    changed = [not torch.equal(image, to_unit(images[:1])[0]) for image in plain]
    assert 0 < changed.count(False) < 15
    assert plain.min() >= -0.1 - 1e-6 and plain.max() <= 1.2 + 1e-6


def test_parts_of_the_augmentation():
    image = codes(1, 1, 4, 6, 6).expand(60, -1, -1, -1, -1)
    plain, seeds = to_unit(image), list(range(60))
    assert torch.equal(to_unit(image, seeds=seeds, augmentation="none"), plain)
    intensity = to_unit(image, seeds=seeds, augmentation="intensity")
    scale = (intensity.amax((1, 2, 3, 4)) - intensity.amin((1, 2, 3, 4))) / (plain[0].max() - plain[0].min())
    shift = intensity.amin((1, 2, 3, 4)) - scale * plain[0].min()
    rebuilt = plain * scale.view(-1, 1, 1, 1, 1) + shift.view(-1, 1, 1, 1, 1)
    assert torch.allclose(intensity, rebuilt, atol=1e-5)  # no voxel has moved
    assert len(set(scale.tolist())) > 10
    moved = to_unit(image, seeds=seeds, augmentation=Augmentation(turns=True, flips=True))
    assert torch.allclose(moved.flatten(1).sort().values, plain.flatten(1).sort().values)
    assert not torch.equal(moved, plain)


def test_no_quarter_turns_where_they_would_not_fit():
    images = codes(1, 1, 4, 6, 8).expand(50, -1, -1, -1, -1)
    assert to_unit(images, seeds=range(50)).shape == images.shape
    assert {draw(seed, PUBLISHED, square=False).turns for seed in range(50)} == {0}


@pytest.mark.parametrize("arguments, reason", [
    ((torch.zeros(1, 1, 2, 2, 2, dtype=torch.int64),), "uint8 or floating point, found torch.int64"),
    ((torch.zeros(2, 1, 2, 2, 2), torch.float32, [1]), "2 images and 1 seeds"),
    ((torch.zeros(1, 1, 2, 2, 2), torch.float32, [1], "flips"), "one of none, intensity, published, not 'flips'"),
])  # fmt: skip
def test_wrong_arguments_are_named(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        to_unit(*arguments)


@pytest.mark.parametrize("text, expected", [
    ("A cyst in the LEFT kidney.", True), ("Which plane is this? Axial", True), ("right-sided pleural effusion", True),
    ("The upper lobe is collapsed.", True), ("displaced anteriorly", True),
    ("Is there a fracture? Yes", False), ("Normal brightness.", False),
    ("A copyright note, leftover contrast", False),
])  # fmt: skip
def test_texts_that_name_sides_or_planes(text, expected):
    assert names_side_or_plane(text) is expected
    assert allowed_augmentation(["Emphysema.", text]) == ("intensity" if expected else "published")
