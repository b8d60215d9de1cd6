"""The fast paths equal the plain encoder, follow its weights, and step aside where they cannot."""

import copy
import io
import logging

import pytest
import torch
from torch import nn

from med3dvlm.benchmark.plain import plain_hidden_states, published_hidden_states
from med3dvlm.model.dcformer import DCFormer
from med3dvlm.model.fused import choice, onednn
from med3dvlm.model.fused.inference import FoldedEncoder
from med3dvlm.model.fused.native import kernels as native
from tests.helpers.golden import fill_by_rule, relative_deviation, rule_volume

VARIANTS = ["phantom", "nano", "naive", "tiny"] + [
    pytest.param(name, marks=pytest.mark.slow) for name in ("small", "base", "large")
]


def encoder_of(name: str = "phantom") -> DCFormer:
    return fill_by_rule(DCFormer.from_variant(name), "fused").eval()


def plain(encoder: DCFormer, volume: torch.Tensor) -> list[torch.Tensor]:
    return copy.deepcopy(encoder).requires_grad_(False).float()._plain(volume.float())


def assert_follows(encoder: DCFormer, volume: torch.Tensor) -> None:
    """The encoder takes its fast path, and with its present weights."""
    with torch.no_grad():
        found = encoder(volume)
    assert encoder.fused_cache, "the plain path was taken"
    for state, expected in zip(found, plain(encoder, volume), strict=True):
        assert relative_deviation(state.float(), expected) <= 5e-6


@pytest.mark.parametrize("formulation", [plain_hidden_states, published_hidden_states])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_encoder_is_the_published_formulation(mode, formulation):
    encoder, volume = encoder_of("nano"), rule_volume("fused", (2, 1, 34, 67, 72))
    encoder.train(mode == "train")
    encoder.fused = "off"
    for state, expected in zip(encoder(volume), formulation(copy.deepcopy(encoder), volume), strict=True):
        assert relative_deviation(state, expected) <= 5e-6


@pytest.mark.parametrize("kernels", ["", "torch"], ids=["kernels", "no kernels"])  # the latter as without a compiler
@pytest.mark.parametrize("name", VARIANTS)
def test_inference_equals_the_plain_path(name, kernels, monkeypatch):
    monkeypatch.setenv("MED3DVLM_FUSED", kernels)
    encoder, volume = encoder_of(name), rule_volume("fused", (2, 1, 19, 50, 39))
    assert_follows(encoder, volume)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = encoder(volume)
    for state, expected in zip(found, plain(encoder, volume), strict=True):
        assert (state - expected).norm() <= 1.5e-2 * expected.norm()


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 32, 64, 64), (3, 1, 5, 9, 3), (2, 1, 1, 1, 1), (1, 1, 1, 1, 70), (1, 1, 40, 1, 1), (2, 1, 1, 30, 1)],
)
def test_any_size_is_exact_up_to_its_borders(shape):
    encoder, volume = encoder_of().double(), torch.rand(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = encoder(volume)
        found = FoldedEncoder(encoder, torch.float64)(volume)
        assert_follows(encoder.float(), volume.float())
    for state, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(state, reference, rtol=1e-10, atol=1e-11)


def test_input_that_is_not_contiguous():
    volume = rule_volume("fused", (2, 1, 20, 36, 40))
    assert_follows(encoder_of(), volume.transpose(2, 4)[:, :, ::2].flip(3))


@pytest.mark.parametrize(
    "kernels, products",  # without kernels bfloat16 is widened unless the processor multiplies it
    [("", None), ("torch", False), ("torch", True)],
    ids=["kernels", "widened", "multiplied"],
)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_have_the_plain_dtypes(dtype, autocast, products, kernels, monkeypatch):
    if products and (autocast or dtype == torch.bfloat16) and not onednn.takes(torch.bfloat16):
        pytest.skip("oneDNN does not take bfloat16 on this processor")
    monkeypatch.setenv("MED3DVLM_FUSED", kernels)
    if products is not None:
        monkeypatch.setattr(native, "_multiplies_bfloat16", lambda: products)
    encoder, volume = encoder_of().to(dtype), rule_volume("fused", (1, 1, 16, 32, 32)).to(dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = encoder(volume)
        assert encoder.fused_cache
        encoder.fused = "off"
        expected = encoder(volume)
    assert [state.dtype for state in found] == [state.dtype for state in expected]
    for state, reference in zip(found, expected, strict=True):
        assert (state.float() - reference.float()).norm() <= 2e-2 * reference.float().norm()


def test_autocast_leaves_float64_alone():
    encoder, volume = encoder_of().double(), rule_volume("fused", (1, 1, 16, 32, 32)).double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {state.dtype for state in encoder(volume)} == {torch.float64}


def test_bfloat16_needs_no_support_by_onednn_where_it_is_widened(monkeypatch):
    monkeypatch.setattr(native, "_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(native, "_AMX", False)
    monkeypatch.setattr(onednn, "takes", lambda dtype: dtype == torch.float32)
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = encoder(volume)
    assert encoder.fused_cache, "the plain path was taken"
    for state, expected in zip(found, plain(encoder, volume), strict=True):
        assert (state - expected).norm() <= 1.5e-2 * expected.norm()


def test_a_torch_without_an_operator_takes_the_plain_path(monkeypatch, caplog):
    monkeypatch.setattr(onednn, "_COMPLETE", False)
    choice._log_once.cache_clear()
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="med3dvlm"):
        found = encoder(volume)
        assert not encoder.fused_cache and "oneDNN does not take torch.float32" in caplog.text
        assert all(torch.equal(a, b) for a, b in zip(found, encoder._plain(volume), strict=True))


def change_in_place(encoder):
    with torch.no_grad():
        encoder.encoder["s2"][0].mlp.mlp[3].weight.mul_(1.5)


def change_a_running_mean(encoder):
    encoder.encoder["s0"][0][1].c2[1].running_mean.add_(0.25)


def load_others(encoder):
    encoder.load_state_dict(fill_by_rule(DCFormer.from_variant("phantom"), "others").state_dict())


def assign_others(encoder):
    encoder.load_state_dict(fill_by_rule(DCFormer.from_variant("phantom"), "others").state_dict(), assign=True)


def round_to_bfloat16_and_back(encoder):
    encoder.to(torch.bfloat16).to(torch.float32)


def train_one_step(encoder):
    encoder.train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.01)
    encoder(torch.rand(2, 1, 16, 32, 32))[-1].square().mean().backward()
    optimizer.step()
    encoder.eval()


def write_through_data(encoder):
    encoder.train()
    for parameter in encoder.parameters():
        parameter.data.mul_(0.9)  # torch does not count this as a change
    encoder.eval()


def write_unseen(encoder):  # as collectives do
    encoder.encoder["s1"][0].dwconv.c1[1].running_mean.detach().numpy()[:] += 1


def write_through_data_alone(encoder):
    for parameter in encoder.parameters():
        parameter.data.mul_(0.9)


def replace_a_parameter(encoder):
    encoder.encoder["s1"][0].scale = nn.Parameter(torch.full((32,), 0.3))


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_a_running_mean, load_others, assign_others, round_to_bfloat16_and_back, train_one_step,
     write_through_data, write_through_data_alone, write_unseen, replace_a_parameter],
)  # fmt: skip
def test_folded_weights_follow(change):
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    assert_follows(encoder, volume)
    cache = encoder.fused_cache[torch.float32]
    assert_follows(encoder, volume)
    assert_follows(encoder.eval().to("cpu"), volume)
    assert encoder.fused_cache[torch.float32] is cache, "folded again without need"
    change(encoder)
    assert_follows(encoder, volume)


@pytest.mark.parametrize("kernels", ["", "torch"], ids=["kernels", "no kernels"])
def test_folded_weights_let_go_of_parameters(kernels, monkeypatch):
    """torch swaps two tensors only where nothing else holds them."""
    monkeypatch.setenv("MED3DVLM_FUSED", kernels)
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    assert_follows(encoder, volume)
    for parameter in encoder.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(0.9 * parameter.detach(), requires_grad=False))
    assert_follows(encoder, volume)
    encoder.to(torch.bfloat16)
    assert not encoder.fused_cache


def test_copies_and_files_hold_no_folded_weights():
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    keys, file = list(encoder.state_dict()), io.BytesIO()
    torch.save(encoder, file)
    size = file.tell()
    assert_follows(encoder, volume)
    assert list(encoder.state_dict()) == keys
    file = io.BytesIO()
    torch.save(encoder, file)
    assert file.tell() == size
    twin = copy.deepcopy(encoder)
    assert not twin.fused_cache
    change_in_place(twin)
    assert_follows(twin, volume)
    assert_follows(encoder, volume)


def add_a_hook(encoder):
    encoder.encoder["s1"][0].mlp.register_forward_hook(lambda *arguments: None)


def replace_a_layer(encoder):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = encoder.encoder["s1"][0].mlp.mlp
    scaled = Scaled(*reversed(layers[0].weight.shape))
    scaled.load_state_dict(layers[0].state_dict())
    layers[0] = scaled


def mark_as_sharded(encoder):
    encoder.encoder["s1"][0].scale.ds_id = 0  # as DeepSpeed ZeRO-3 does


def use_float64(encoder):
    encoder.double()


def add_a_backward_hook(encoder):
    encoder.encoder["s2"].register_full_backward_hook(lambda *arguments: None)


def add_a_backward_pre_hook(encoder):
    encoder.encoder["s2"].register_full_backward_pre_hook(lambda *arguments: None)


def change_an_eps(encoder):
    encoder.encoder["s2"][0].dwconv.c2[1].eps = 0.5


def take_cumulative_averages(encoder):
    encoder.encoder["s2"][0].dwconv.c2[1].momentum = None


def approximate_gelu(encoder):
    encoder.encoder["s1"][0].mlp.mlp[1].approximate = "tanh"


CHANGED = "a layer was replaced or its settings were changed: "


def take_out_gelu(encoder):
    encoder.encoder["s2"][0].mlp.mlp[1] = nn.Identity()


def activate_twice(encoder):
    encoder.encoder["s2"][0].mlp.mlp[2] = nn.GELU()


def pool_otherwise(encoder):
    encoder.encoder["s2"][0].pool = nn.MaxPool3d(2, 2)


def pool_without_padding(encoder):
    encoder.encoder["s2"][0].pool.padding = 0


def add_a_bias(encoder):
    encoder.encoder["s2"][0].proj.bias = nn.Parameter(torch.ones(64))


def take_away_biases(encoder):
    encoder.encoder["s0"][0][1].c2[0].bias = None
    encoder.encoder["s2"][0].mlp.mlp[3].bias = None


def take_out_a_norm(encoder):
    encoder.encoder["s2"][0].dwconv.c3[1] = nn.Identity()


def add_a_block(encoder):
    encoder.encoder["s2"].append(nn.Identity())


def lengthen_a_kernel(encoder):
    conv = encoder.encoder["s2"][0].dwconv.c1[0]
    conv.kernel_size, conv.padding, conv.weight = (5, 1, 1), (2, 0, 0), nn.Parameter(torch.ones(64, 1, 5, 1, 1))


def drop_running_statistics(encoder):
    norm = encoder.encoder["s2"][0].dwconv.c2[1]
    norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, None, None, None


@pytest.mark.parametrize(
    "change, reason",
    [
        (take_out_gelu, CHANGED + "Identity"),
        (activate_twice, CHANGED + "GELU"),
        (pool_otherwise, CHANGED + "MaxPool3d(kernel_size=2"),
        (pool_without_padding, CHANGED + "MaxPool3d(kernel_size=3, stride=2, padding=0"),
        (add_a_bias, CHANGED + "PointwiseConv"),
        (take_away_biases, CHANGED + "ConvWithinSlices(16, 16, kernel_size=(1, 3, 1)"),
        (take_out_a_norm, CHANGED + "Identity"),
        (add_a_block, CHANGED + "Sequential"),
        (lengthen_a_kernel, CHANGED + "ConvWithinSlices(64, 64, kernel_size=(5, 1, 1)"),
        (drop_running_statistics, CHANGED + "BatchNorm(64"),
        (add_a_hook, "layers have hooks"),
        (replace_a_layer, CHANGED + "Scaled"),
        (mark_as_sharded, "the weights are sharded"),
        (use_float64, "oneDNN does not take torch.float64"),
        (add_a_backward_hook, "layers have hooks"),
        (add_a_backward_pre_hook, "layers have hooks"),
        (change_an_eps, CHANGED + "BatchNorm(64, eps=0.5"),
        (take_cumulative_averages, CHANGED + "BatchNorm(64"),
        (approximate_gelu, CHANGED + "GELU(approximate='tanh')"),
    ],
)
def test_what_cannot_be_folded_takes_the_plain_path(change, reason, caplog):
    encoder = encoder_of()
    change(encoder)
    volume = rule_volume("fused", (1, 1, 16, 32, 32)).to(encoder.encoder["s1"][0].scale.dtype)
    choice._log_once.cache_clear()
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="med3dvlm"):
        found, again = encoder(volume), encoder(volume)
        encoder.fused = "off"
        expected = encoder(volume)
    assert not encoder.fused_cache
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, found, again, strict=True))
    assert len(caplog.records) == 1 and reason in caplog.text


def test_a_choice_for_gpus_is_logged_once_on_a_cpu(caplog):
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    encoder.fused = "auto"
    choice._log_once.cache_clear()
    with torch.no_grad(), caplog.at_level(logging.INFO, logger=choice.logger.name):
        encoder(volume), encoder(volume)
    assert encoder.fused_cache
    messages = [record.getMessage() for record in caplog.records if record.name == choice.logger.name]
    assert messages == ["DCFormer: no GPU, so no Triton kernels; the CPU's fused path is taken"]


def test_replicas_without_parameters_take_the_plain_path():
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    with torch.no_grad():
        expected = plain(encoder, volume)
    for module in encoder.modules():  # as nn.DataParallel leaves its copies: tensors as mere attributes
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            setattr(module, name, None if parameter is None else parameter.detach())
    with torch.no_grad():
        found = encoder(volume)
    assert not encoder.fused_cache
    assert all(relative_deviation(a, b) <= 5e-6 for a, b in zip(found, expected, strict=True))


def test_gradients_in_evaluation_mode_are_the_plain_ones():
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    encoder(volume)[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    encoder.requires_grad_(False)
    volume.requires_grad_()
    assert encoder(volume)[-1].requires_grad


def test_the_plain_path_can_be_forced(monkeypatch):
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    model = nn.ModuleDict({"vision": encoder, "other": nn.Linear(2, 2)})
    choice.set_fused(model, "off")
    with torch.no_grad():
        expected = encoder(volume)
        assert not encoder.fused_cache
        choice.set_fused(model, "cpu")
        monkeypatch.setenv("MED3DVLM_FUSED", "0")
        found = encoder(volume)
    assert not encoder.fused_cache and torch.equal(found[-1], expected[-1])
    with pytest.raises(ValueError, match="unknown mode of the fused encoder 'fast'; known: cpu, auto, off"):
        choice.set_fused(model, "fast")


def test_a_compiled_encoder_is_the_plain_one():
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 16, 32, 32))
    with torch.no_grad():
        found = torch.compile(encoder, backend="eager")(volume)
    assert not encoder.fused_cache
    for state, expected in zip(found, plain(encoder, volume), strict=True):
        assert relative_deviation(state, expected) <= 5e-6
