"""What torch does around an encoder: the fused paths take part in it, step aside, or say that they cannot."""

import logging

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from med3dvlm.model.dcformer import DCFormer
from med3dvlm.model.fused import choice
from tests.helpers.golden import fill_by_rule, relative_deviation, rule_volume


def encoder_of(training: bool = False) -> DCFormer:
    return fill_by_rule(DCFormer.from_variant("phantom"), "fused").train(training).requires_grad_(training)


def volume_of() -> torch.Tensor:
    return rule_volume("fused", (2, 1, 32, 40, 36))


def gradients_of(encoder: DCFormer, volume: torch.Tensor) -> list[torch.Tensor]:
    encoder(volume)[-1].square().sum().backward()
    return [parameter.grad for parameter in encoder.parameters()]


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype, device", [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")])
def test_another_default_dtype_or_device(dtype, device, training, default_dtype):
    """Buffers of the kernels are float32 on the CPU, whatever new tensors are by default."""
    run = gradients_of if training else DCFormer.forward
    expected, encoder, volume = run(encoder_of(training), volume_of()), encoder_of(training), volume_of()
    default_dtype(dtype)
    with torch.device(device):
        found = run(encoder, volume)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("kernels", ["", "torch"], ids=["kernels", "no kernels"])
def test_second_derivatives_are_refused(kernels, monkeypatch):
    monkeypatch.setenv("MED3DVLM_FUSED", kernels)
    encoder, volume = encoder_of(training=True), volume_of().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives: take the plain one, encoder.fused = 'off'"):
        torch.autograd.grad(encoder(volume)[-1].sum(), volume, create_graph=True)


def test_forward_mode_gradients_are_the_plain_ones():
    encoder, volume, tangent = encoder_of(), volume_of(), rule_volume("tangent", (2, 1, 32, 40, 36))
    with forward_ad.dual_level():
        found = [forward_ad.unpack_dual(state).tangent for state in encoder(forward_ad.make_dual(volume, tangent))]
    encoder.fused = "off"
    expected = torch.func.jvp(lambda x: encoder(x)[-1], (volume,), (tangent,))[1]
    torch.testing.assert_close(found[-1], expected)


def test_function_transforms_see_the_plain_path():
    encoder, volume = encoder_of(), volume_of()
    found = torch.func.vmap(lambda x: encoder(x[None])[-1][0])(volume)
    assert not encoder.fused_cache
    assert relative_deviation(found, encoder(volume)[-1]) <= 5e-6


def test_modes_that_follow_operations_see_the_plain_path():
    encoder, volume, counted = encoder_of(), volume_of(), []
    for encoder.fused in ("cpu", "off"):
        with FlopCounterMode(display=False) as counter:
            encoder(volume)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 1e7


def test_hooks_on_all_modules_see_all():
    encoder, calls = encoder_of(), []
    hook = register_module_forward_hook(lambda module, *others: calls.append(type(module)))
    try:
        encoder(volume_of())
    finally:
        hook.remove()
    assert nn.GELU in calls and not encoder.fused_cache


@pytest.mark.parametrize("kernels", ["", "torch"], ids=["kernels", "no kernels"])
def test_weights_and_kept_tensors_in_any_layout(kernels, monkeypatch):
    monkeypatch.setenv("MED3DVLM_FUSED", kernels)

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.T.contiguous().T if tensor.ndim == 2 else tensor.repeat_interleave(2)[::2]

    expected = gradients_of(encoder_of(training=True), volume_of())
    encoder = encoder_of(training=True)
    for block in (block for stage in ("s1", "s2", "s3", "s4") for block in encoder.encoder[stage]):
        block.scale = nn.Parameter(strided(block.scale.detach()))
        for layer in (block.mlp.mlp[0], block.mlp.mlp[3]):
            layer.weight, layer.bias = (nn.Parameter(strided(t.detach())) for t in (layer.weight, layer.bias))

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, turned):
        found = gradients_of(encoder, volume_of())
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())
    with torch.no_grad():
        found, encoder.fused = encoder.eval()(volume_of()), "off"
        assert all(relative_deviation(a, b) <= 5e-6 for a, b in zip(found, encoder(volume_of()), strict=True))


def test_a_device_without_a_path_is_said(caplog):
    encoder = encoder_of().to("meta")
    encoder.fused = "auto"
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="med3dvlm"):
        assert encoder(volume_of().to("meta"))[-1].shape[0] == 2
    assert "no path for meta" in caplog.text


def test_an_unknown_wish_in_the_environment_is_said(caplog, monkeypatch):
    monkeypatch.setenv("MED3DVLM_FUSED", "off")
    choice._log_once.cache_clear()
    encoder_of()(volume_of())
    assert "MED3DVLM_FUSED=off changes nothing; known are 0 and torch" in caplog.text


@pytest.mark.parametrize("fused", ["cpu", "off"])
def test_volumes_whose_channel_axis_has_any_stride(fused):
    """oneDNN's conv3d has written beyond its memory for an axis of one channel with the stride of the last axis."""
    encoder, volume = encoder_of(), volume_of()
    encoder.fused = fused
    expected = encoder(volume)
    for _ in range(5):
        found = encoder(volume.squeeze(1).unsqueeze(-1).movedim(-1, 1))
        assert all(relative_deviation(a, b) <= 5e-6 for a, b in zip(found, expected, strict=True))
