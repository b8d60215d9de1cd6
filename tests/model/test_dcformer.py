"""DCFormer equals the published encoder: key names, hidden states, a training step."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from med3dvlm.model.dcformer import VARIANTS, ConvAcrossSlices, ConvWithinSlices, DCFormer
from med3dvlm.model.encoder import build_vision_encoder
from tests.helpers.golden import (
    assert_gradient_norms,
    fill_by_rule,
    layout_of,
    load_golden,
    relative_deviation,
    rule_volume,
)

PUBLISHED = ("nano", "naive", "tiny", "small", "base", "large")


def recorded_encoder(record: dict) -> DCFormer:
    encoder = DCFormer.from_variant(record["variant"].removeprefix("decomp_"), record["constructor_input_size"])
    return fill_by_rule(encoder, record["salt"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_is_the_published_one(name):
    expected = load_golden("layout/dcformer_variants")[0][f"decomp_{name}"]
    with torch.device("meta"):
        encoder = DCFormer.from_variant(name)
    assert list(layout_of(encoder).items()) == list(expected["state_dict"].items())
    assert list(encoder.channels) == expected["channels"]
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected["parameters"]


@pytest.mark.parametrize(
    "name",
    [
        "nano_a",
        "nano_b_noncubic",
        "tiny_32x64x64",
        "small_64x128x128",
        pytest.param("small_full_128x256x256", marks=pytest.mark.slow),
    ],
)
def test_hidden_states_equal_the_published_ones(name):
    record, _ = load_golden(f"dcformer/{name}")
    encoder = recorded_encoder(record).eval()
    with torch.inference_mode():
        hidden_states = encoder(rule_volume(record["input_tag"], record["input_shape"]))
    assert len(hidden_states) == len(record["hidden_states"])
    for level, (found, expected) in enumerate(zip(hidden_states, record["hidden_states"], strict=True)):
        assert relative_deviation(found, expected) <= 5e-6, f"level {level}"
        assert found.shape[1:] == (encoder.num_tokens(level), encoder.channels[level])


def test_training_step_equals_the_published_one():
    record, tensors = load_golden("dcformer/nano_train_step")
    encoder = recorded_encoder(record).train()
    volume = rule_volume(record["input_tag"], record["input_shape"]).requires_grad_()
    hidden_states = encoder(volume)
    loss = hidden_states[-1].square().mean()
    loss.backward()

    assert loss.item() == pytest.approx(record["loss_float64"], rel=1e-5)
    for found, expected in zip(hidden_states, record["hidden_states_train_mode"], strict=True):
        assert relative_deviation(found, expected) <= 5e-6
    assert_gradient_norms(encoder, record["grad_norm_float64"])
    assert volume.grad.norm().item() == pytest.approx(record["input_grad_norm_float64"], rel=1e-4)
    assert relative_deviation(volume.grad[:, :, ::4, ::4, ::4], tensors["input_grad"]) <= 1e-4
    state = encoder.state_dict()
    for key, expected in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "bn_after":
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-5, msg=key)
        elif kind == "grad":
            assert relative_deviation(encoder.get_parameter(name).grad, expected) <= 1e-4, key


@pytest.mark.parametrize("stride, groups", [(1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize("conv_class, size", [(ConvWithinSlices, (5, 1, 1)), (ConvWithinSlices, (1, 5, 1)),
                                              (ConvAcrossSlices, (1, 1, 5))])  # fmt: skip
def test_axis_convolutions_equal_conv3d(conv_class, size, stride, groups):
    torch.manual_seed(0)
    conv = conv_class(4, 8, size, stride, tuple(n // 2 for n in size), groups=groups)
    plain = nn.Conv3d(4, 8, size, stride, tuple(n // 2 for n in size), groups=groups)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 6, 9, 11, 4)  # [B, D, H, W, C], no two axes alike
    expected = plain(x.permute(0, 4, 2, 3, 1)).permute(0, 4, 2, 3, 1)  # Conv3d's axes are (H, W, D)
    torch.testing.assert_close(conv(x), expected)


def test_token_grid_follows_the_strides():
    encoder = DCFormer.from_variant("nano", input_size=(256, 200, 128))
    assert [encoder.token_grid(level) for level in range(5)] == [
        (32, 64, 50),
        (16, 32, 25),
        (8, 16, 13),
        (4, 8, 7),
        (2, 4, 4),
    ]
    assert encoder.token_grid(-2) == encoder.token_grid(3)
    phantom = DCFormer.from_variant("phantom", input_size=(64, 64, 32))
    assert [phantom.num_tokens(level) for level in range(5)] == [2048, 2048, 256, 32, 4]


@pytest.mark.parametrize("name", ["nano", "phantom"])
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    encoder = DCFormer.from_variant(name, input_size=(64, 64, 32))
    hidden_states = encoder(torch.rand(2, 1, 32, 64, 64))
    assert [tuple(state.shape) for state in hidden_states] == [
        (2, encoder.num_tokens(level), encoder.channels[level]) for level in range(5)
    ]
    sum(state.square().mean() for state in hidden_states).backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        before_a_batch_norm = key.endswith(".0.bias") and ".mlp." not in key  # without effect, so without gradient
        assert before_a_batch_norm or parameter.grad.abs().max() > 0, key


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown DCFormer variant 'huge'; known: nano, naive"):
        DCFormer.from_variant("huge")
    with pytest.raises(ValueError, match=r"expected volumes \[B, 1, D, H, W\], found shape \(2, 32, 64, 64\)"):
        DCFormer.from_variant("nano")(torch.rand(2, 32, 64, 64))


def test_the_configuration_names_the_encoder():
    sizes = {"vision_variant": "tiny", "input_size": (64, 64, 32), "dim": 16, "depth": 2, "patch_size": (16, 16, 16)}
    encoder = build_vision_encoder(SimpleNamespace(vision_encoder="dcformer", **sizes))
    assert encoder.variant == VARIANTS["tiny"] and encoder.num_tokens(3) == 4
    encoder = build_vision_encoder(SimpleNamespace(vision_tower="vit3d", **sizes))
    assert encoder.channels == (16, 16, 16) and encoder.num_tokens(-1) == 32
    with pytest.raises(ValueError, match="unknown vision encoder 'resnet'; known: dcformer, vit3d"):
        build_vision_encoder(SimpleNamespace(vision_tower="resnet", **sizes))
