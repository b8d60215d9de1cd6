"""The five projectors equal the published ones, fit DCFormer, and say what does not fit."""

from types import SimpleNamespace

import pytest
import torch

from med3dvlm.model.dcformer import DCFormer
from med3dvlm.model.projector import (
    PROJECTORS,
    build_projector,
    check_projector_sizes,
    projector_tokens,
    takes_two_streams,
)
from tests.helpers.golden import (
    assert_gradient_norms,
    fill_by_rule,
    layout_of,
    load_golden,
    relative_deviation,
    rule_normal_like,
)


def config_of(constructor: dict) -> SimpleNamespace:
    """The recorded constructor arguments under the names of our configurations."""
    ours = {
        "type": "mm_projector_type",
        "mlp_depth": "mm_mlp_depth",
        "input_size": "mm_hidden_size",
        "embed_dim": "mm_hidden_size",
        "output_size": "hidden_size",
        "output_dim": "hidden_size",
    }
    values = {ours.get(key, key): value for key, value in constructor.items()}
    return SimpleNamespace(**{"mm_mlp_depth": 2, "mm_hidden_size": None, **values})


def small_config(kind: str, **overrides) -> SimpleNamespace:
    """A configuration for DCFormer nano at 64x64x32 (H, W, D): last two hidden states [4, 128] and [1, 256]."""
    mixer = kind == "mixer"
    values = {
        "mm_projector_type": kind,
        "hidden_size": 16,
        "mm_hidden_size": 256,
        "mm_mlp_depth": 2,
        "low_input_size": [4, 128] if mixer else 128,
        "high_input_size": [1, 256] if mixer else 256,
        "low_output_size": [6, 5],
        "high_output_size": [3, 2],
    }
    return SimpleNamespace(**{**values, **overrides})


@pytest.mark.parametrize("kind", PROJECTORS)
def test_layout_is_the_published_one(kind):
    record = load_golden("layout/projectors_hidden3584")[0][kind]
    with torch.device("meta"):
        projector = build_projector(SimpleNamespace(**record["config"]))
    assert layout_of(projector) == record["state_dict"]
    assert sum(parameter.numel() for parameter in projector.parameters()) == record["parameters"]


@pytest.mark.parametrize("name", ["linear_a", "mlp_a", "low_high_mlp_a", "mixer_a", "mixer_depth3_a", "mhsa_a"])
def test_output_and_gradients_equal_the_published_ones(name):
    record, tensors = load_golden(f"projector/{name}")
    config = config_of(record["constructor"])
    projector = fill_by_rule(build_projector(config), record["salt"])
    streams = [
        rule_normal_like(f"{name}|input{i}", shape).requires_grad_() for i, shape in enumerate(record["input_shapes"])
    ]
    assert takes_two_streams(config) == (len(streams) == 2)
    output = projector(streams if takes_two_streams(config) else streams[0])
    (output * rule_normal_like(f"{name}|cotangent", record["output_shape"])).sum().backward()

    assert relative_deviation(output, tensors["output"]) <= 5e-6
    assert output.shape[1] == projector_tokens(config, streams[0].shape[1], streams[-1].shape[1])
    for i, stream in enumerate(streams):
        assert relative_deviation(stream.grad, tensors[f"input_grad.{i}"]) <= 1e-5
    assert_gradient_norms(projector, record["parameter_grad_norm"])


def test_mixer_of_published_size_equals_the_published_one():
    record, _ = load_golden("projector/mixer_full")
    projector = fill_by_rule(build_projector(config_of(record["constructor"])), record["salt"])
    streams = [rule_normal_like(f"mixer_full|input{i}", shape) for i, shape in enumerate(record["input_shapes"])]
    with torch.inference_mode():
        output = projector(streams)
    assert relative_deviation(output, record["output"]) <= 5e-6
    torch.testing.assert_close(output[0].mean(-1), torch.tensor(record["token_mean"]), rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_kind_works_on_dcformer(kind):
    torch.manual_seed(0)
    encoder = DCFormer.from_variant("nano", input_size=(64, 64, 32)).eval()
    config = small_config(kind)
    projector = build_projector(config)
    hidden_states = encoder(torch.rand(2, 1, 32, 64, 64))
    output = projector(hidden_states[-2:] if takes_two_streams(config) else hidden_states[-1])
    tokens = projector_tokens(config, encoder.num_tokens(3), encoder.num_tokens(4))
    assert output.shape == (2, tokens, 16)
    output.square().mean().backward()
    # One token attends to itself only: its query and key have no influence.
    idle = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias") if kind == "mhsa" else ()
    for key, parameter in projector.named_parameters():
        assert parameter.grad is not None and (parameter.grad.abs().max() > 0 or key in idle), key


@pytest.mark.parametrize(
    "kind, streams, message",
    [
        ("linear", [(2, 1, 128)], r"linear projector: expected hidden states \[B, N, 256\], found shape \(2, 1, 128\)"),
        ("mlp", [(2, 256)], r"mlp projector: expected hidden states \[B, N, 256\], found shape \(2, 256\)"),
        ("mhsa", [(2, 1, 128)], r"mhsa projector: expected hidden states \[B, N, 256\], found shape \(2, 1, 128\)"),
        ("low_high_mlp", [(2, 4, 96), (2, 1, 256)], r"low stream: expected hidden states \[B, N, 128\], found .*96\)"),
        ("mixer", [(2, 8, 128), (2, 1, 256)], r"low stream: expected hidden states \[B, 4, 128\], found .*8, 128\)"),
        ("mixer", [(2, 4, 128), (2, 2, 256)], r"high stream: expected hidden states \[B, 1, 256\], found .*2, 256\)"),
    ],
)
def test_hidden_states_that_do_not_fit_are_named(kind, streams, message):
    projector = build_projector(small_config(kind))
    streams = [torch.rand(shape) for shape in streams]
    with pytest.raises(ValueError, match=message):
        projector(streams if len(streams) == 2 else streams[0])


def test_low_high_mlp_takes_the_channels_of_tokens_and_channels():
    config = small_config("low_high_mlp", low_input_size=[4, 128], high_input_size=[1, 256])
    del config.mm_hidden_size  # a size of the other kinds
    projector = build_projector(config)
    assert projector([torch.rand(2, 4, 128), torch.rand(2, 1, 256)]).shape == (2, 5, 16)
    encoder = DCFormer.from_variant("nano", input_size=(64, 64, 32))
    check_projector_sizes(config, encoder)
    config.low_input_size, config.vision_tower, config.input_size = [4, 96], "dcformer", [64, 64, 32]
    with pytest.raises(ValueError, match=r"low_input_size: expected 128 .* found \[4, 96\]"):
        check_projector_sizes(config, encoder)


@pytest.mark.parametrize(
    "kind, name", [("mixer", "low_output_size"), ("mlp", "mm_mlp_depth"), ("mhsa", "mm_hidden_size")]
)
def test_a_missing_size_is_named(kind, name):
    config = small_config(kind)
    delattr(config, name)
    with pytest.raises(ValueError, match=f"{kind} projector: the configuration does not say {name}"):
        build_projector(config)


def test_contradicting_sizes_are_named():
    with pytest.raises(ValueError, match="unknown mm_projector_type 'conv'; known: linear, mlp"):
        build_projector(small_config("conv"))
    with pytest.raises(ValueError, match=r"low_output_size \[6, 5\] and high_output_size \[3\] must have one entry"):
        build_projector(small_config("mixer", high_output_size=[3]))
    with pytest.raises(ValueError, match="low_input_size must be .tokens, channels., found 128"):
        build_projector(small_config("mixer", low_input_size=128))
    with pytest.raises(ValueError, match="7 heads do not divide mm_hidden_size 256"):
        build_projector(small_config("mhsa", num_heads=7))
