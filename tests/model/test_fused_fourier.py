"""The stem as one convolution by Fourier transforms equals its four layers, at the borders above all."""

import copy

import pytest
import torch

from med3dvlm.model.dcformer import DCFormer, Variant
from med3dvlm.model.fused import fourier
from med3dvlm.model.fused.inference import FoldedStem
from tests.helpers.golden import fill_by_rule, relative_deviation, rule_volume
from tests.model.test_fused import assert_follows
from tests.model.test_fused_native import needs_kernels

# D, H, W: thinner than the layers reach; not of whole places; one place more than a tile; several tiles
SIZES = [(1, 1, 1), (2, 5, 7), (3, 4, 9), (12, 8, 13), (4, 70, 3), (66, 31, 68), (17, 130, 64), (8, 9, 133)]


def stem_of(name: str) -> torch.nn.Sequential:
    return fill_by_rule(DCFormer.from_variant(name), "fourier").eval().encoder["s0"][0]


def plain(layers: torch.nn.Sequential, volume: torch.Tensor) -> torch.Tensor:
    """[B, 1, D, H, W] -> [B, D', H', W', C] in float64."""
    return copy.deepcopy(layers).double()(volume.double().movedim(1, -1))


@needs_kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_exact_at_every_place(size):
    layers, volume = stem_of("phantom"), rule_volume("fourier", (2, 1, *size))
    with torch.no_grad():
        expected = plain(layers, volume)
        assert relative_deviation(fourier.FourierStem(layers, torch.float32)(volume), expected) <= 1e-6
        rounded = fourier.FourierStem(layers, torch.bfloat16)(volume)  # borders up to four times
        assert relative_deviation(rounded, expected) <= 1.5e-2


@needs_kernels
@pytest.mark.parametrize("name", ["nano", "small"])  # 32 and 64 channels, as all others
def test_every_width(name):
    layers, volume = stem_of(name), rule_volume("fourier", (3, 1, 30, 65, 70))
    with torch.no_grad():
        found, expected = fourier.FourierStem(layers, torch.float32)(volume), plain(layers, volume)
    assert found.shape == expected.shape and found.is_contiguous()
    assert relative_deviation(found, expected) <= 1e-6


@needs_kernels
def test_samples_of_a_batch_do_not_touch_each_other():
    stem, volume = fourier.FourierStem(stem_of("phantom"), torch.float32), torch.rand(3, 1, 30, 64, 190)  # odd tiles
    volume[1] *= 1e4
    volume[2, 0, 4, 8, 7] = torch.nan
    with torch.no_grad():
        together, alone = stem(volume), [stem(sample[None]) for sample in volume[:2]]
    assert torch.equal(together[0], alone[0][0]) and torch.equal(together[1], alone[1][0])
    assert together[2].isnan().any()


@needs_kernels
@pytest.mark.parametrize("threads", [1, 5])
def test_any_number_of_threads(threads):
    layers, volume = stem_of("phantom"), rule_volume("fourier", (1, 1, 40, 80, 75))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            assert relative_deviation(fourier.FourierStem(layers, torch.float32)(volume), plain(layers, volume)) <= 1e-6
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_large_volumes_take_it_and_follow_the_weights():
    encoder, volume = fill_by_rule(DCFormer.from_variant("phantom"), "fourier").eval(), torch.rand(1, 1, 128, 128, 128)
    assert_follows(encoder, volume)
    (folded,) = (cache.folded for cache in encoder.fused_cache.values())
    assert "as_one" in vars(folded.stem) and "as_three" not in vars(folded.stem)
    with torch.no_grad():
        encoder.encoder["s0"][0][3].c2[0].weight.mul_(1.5)
        encoder.encoder["s0"][0][1].c3[1].running_mean.add_(0.3)
    assert_follows(encoder, volume)
    assert_follows(encoder, volume.expand(2, -1, -1, -1, -1).transpose(3, 4))  # not contiguous


@needs_kernels
def test_small_volumes_and_those_without_kernels_do_not_take_it(monkeypatch):
    stem = FoldedStem(stem_of("phantom"), torch.float32)
    with torch.no_grad():
        assert relative_deviation(stem(volume := torch.rand(1, 1, 32, 64, 64)), plain(stem.layers, volume)) <= 1e-6
    assert "as_one" not in vars(stem)
    large = torch.rand(1, 1, 128, 256, 256)
    assert fourier.pays(large, torch.float32, 64) and not fourier.pays(large, torch.float64, 64)
    monkeypatch.setenv("MED3DVLM_FUSED", "torch")
    assert not fourier.pays(large, torch.float32, 64)


def test_other_widths_take_the_layers():
    encoder = fill_by_rule(DCFormer(Variant((24, 24, 40, 48, 48), (1, 1, 1, 1), (3, 3, 3, 3))), "fourier").eval()
    assert_follows(encoder, torch.rand(1, 1, 128, 128, 128))


def test_parameters_may_be_views_at_odd_places():
    encoder = fill_by_rule(DCFormer.from_variant("phantom"), "fourier").eval().bfloat16()
    for parameter in encoder.parameters():
        whole = parameter.new_zeros(2 * parameter.numel() + 1)
        apart = parameter.ndim == 1 or parameter.shape[0] % 2  # every second number, or all of them behind an odd one
        view = whole[1::2] if apart else whole[1 : 1 + parameter.numel()]
        parameter.data = view.view(parameter.shape).copy_(parameter)
    with torch.no_grad():
        volume = torch.rand(1, 1, 128, 128, 128)
        found = encoder(volume.bfloat16())
        assert encoder.fused_cache, "the plain path was taken"
        for state, expected in zip(found, copy.deepcopy(encoder).float()._plain(volume), strict=True):
            assert (state.float() - expected).norm() <= 1.5e-2 * expected.norm()
