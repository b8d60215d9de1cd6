"""The fused training path: gradients, running statistics, memory, and what else takes part in a training step."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from med3dvlm.model.dcformer import DCFormer, Variant
from med3dvlm.model.fused import branches, moments, training
from tests.helpers.golden import fill_by_rule, relative_deviation, rule_volume

TINY = Variant((4, 6, 6, 8, 8), (1, 2, 1, 1), (3, 5, 3, 3), (2, 2, 2, 2), (False, True, True, True))


@pytest.fixture(params=["", "torch"], ids=["kernels", "no kernels"])
def kernels(request, monkeypatch):
    """Both ways to compute: with the C++ kernels, where there is a compiler, and without."""
    monkeypatch.setenv("MED3DVLM_FUSED", request.param)


def encoder_of(variant: str | Variant = "phantom") -> DCFormer:
    encoder = DCFormer.from_variant(variant) if isinstance(variant, str) else DCFormer(variant)
    return fill_by_rule(encoder, "fused").train()


def step(encoder: DCFormer, volume: torch.Tensor, encode=None, autocast: bool = False):
    """Hidden states, parameter gradients, input gradient and buffers after one step of a copy of the encoder."""
    encoder, volume = copy.deepcopy(encoder), volume.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden_states = (encode or DCFormer.forward)(encoder, volume)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(h.shape, generator=generator).to(h.dtype) / h.numel() ** 0.5 for h in hidden_states]
    torch.autograd.backward(hidden_states, cotangents)
    gradients = {key: parameter.grad for key, parameter in encoder.named_parameters()}
    return hidden_states, gradients, volume.grad, dict(encoder.named_buffers())


def differences(found: dict, expected: dict) -> list[float]:
    """Relative L2 distances of gradients, in order; biases in front of a batch norm, whose gradient is 0, left out."""
    keys = [key for key in expected if not key.endswith(".0.bias") or ".mlp." in key]
    return sorted(distance(found[key], expected[key]) for key in keys)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def in_float64(encoder, volume):
    return training.encode(encoder, torch.float64, volume)


@pytest.mark.parametrize("shape", [(2, 1, 32, 40, 36), (2, 1, 17, 22, 39), (3, 1, 5, 9, 3), (2, 1, 1, 1, 33)])
@pytest.mark.parametrize("variant", [TINY, "phantom", "nano"], ids=["small stage", "phantom", "nano"])
def test_a_step_in_float64_is_the_plain_one(variant, shape):
    encoder, volume = encoder_of(variant).double(), rule_volume("fused", shape).double()
    encoder.fused = "off"
    states, gradients, input_gradient, buffers = step(encoder, volume)
    found_states, found_gradients, found_input_gradient, found_buffers = step(encoder, volume, in_float64)
    for found, expected in zip(found_states, states, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert all(not found_gradients[key].any() for key in gradients if key.endswith(".0.bias") and ".mlp." not in key)
    assert differences(found_gradients, gradients)[-1] <= 1e-7
    assert distance(found_input_gradient, input_gradient) <= 1e-7
    for key, expected in buffers.items():
        torch.testing.assert_close(found_buffers[key], expected, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["phantom", "nano", "naive", pytest.param("tiny", marks=pytest.mark.slow)])
def test_a_step_in_float32_is_the_plain_one_up_to_rounding(name, kernels):
    # Against float64, from which the plain path in float32 is as far, or on one thread farther. A volume without near
    # ties of max pooling: where rounding decides one, gradients are 1 % apart, the plain path's as well.
    encoder, volume = encoder_of(name), rule_volume("fused", (2, 1, 64, 80, 72))
    states, gradients, input_gradient, buffers = step(copy.deepcopy(encoder).double(), volume.double(), DCFormer._plain)
    found_states, found_gradients, found_input_gradient, found_buffers = step(encoder, volume)
    assert type(found_states[0].grad_fn.next_functions[0][0]).__name__ == "DenseLayersBackward", "not the fused path"
    for found, expected in zip(found_states, states, strict=True):
        assert relative_deviation(found.double(), expected) <= 5e-6
    apart = differences(found_gradients, gradients)
    assert apart[len(apart) // 2] <= 1e-5 and apart[len(apart) * 9 // 10] <= 1e-3
    assert distance(found_input_gradient, input_gradient) <= 1e-4
    for key, expected in buffers.items():
        torch.testing.assert_close(
            found_buffers[key], expected.to(found_buffers[key].dtype), rtol=1e-5, atol=1e-6, msg=key
        )


def test_bfloat16_is_as_near_to_float32_as_the_plain_path(kernels):
    encoder, volume = encoder_of(), rule_volume("fused", (2, 1, 64, 72, 80))
    _, gradients, input_gradient, _ = step(encoder, volume, DCFormer._plain)
    plain_states, plain, plain_input, _ = step(encoder, volume, DCFormer._plain, autocast=True)
    states, found, found_input, _ = step(encoder, volume, autocast=True)
    assert [state.dtype for state in states] == [state.dtype for state in plain_states]
    plain, found = differences(plain, gradients), differences(found, gradients)
    median, most = len(found) // 2, len(found) * 9 // 10  # the last one is the luck of a single parameter
    assert found[median] <= 1.2 * plain[median] and found[most] <= 1.2 * plain[most]
    assert found[-1] <= 2 * plain[-1]
    assert distance(found_input, input_gradient) <= 1.2 * distance(plain_input, input_gradient)


def test_gradcheck():
    encoder, volume = encoder_of(TINY).double(), rule_volume("fused", (2, 1, 10, 9, 12)).double().requires_grad_()
    names = ["s0.0.0.c1.0.weight", "s0.0.1.c2.0.weight", "s0.0.2.c3.1.weight", "s1.0.scale", "s2.0.proj.weight"]
    values = [encoder.encoder.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def last_states(volume, *values):
        replaced = {f"encoder.encoder.{name}": value for name, value in zip(names, values, strict=True)}
        states = torch.func.functional_call(Caller(encoder), replaced, (volume,))
        return states[0], states[-1]

    assert torch.autograd.gradcheck(last_states, (volume, *values), eps=1e-6, atol=1e-4, rtol=1e-3, fast_mode=True)


class Caller(torch.nn.Module):
    def __init__(self, encoder: DCFormer):
        super().__init__()
        self.encoder = encoder

    def forward(self, volume):
        return in_float64(self.encoder, volume)


def kept_bytes(encoder: DCFormer, volume: torch.Tensor, encode, autocast: bool) -> int:
    """Bytes of the activations that the backward pass keeps, each storage once, weights and input left out."""
    known = {t.untyped_storage().data_ptr() for t in (*encoder.parameters(), *encoder.buffers(), volume)}
    kept = {}

    def see(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            encode(encoder, volume)
    return sum(kept.values())


@pytest.mark.parametrize("of_input", [False, True], ids=["", "and input gradient"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "name, size", [("nano", (64, 128, 128)), pytest.param("small", (128, 256, 256), marks=pytest.mark.slow)]
)
def test_half_of_the_memory_is_enough(name, size, autocast, of_input, kernels):
    encoder, volume = encoder_of(name), torch.rand(1, 1, *size, requires_grad=of_input)
    plain = kept_bytes(encoder, volume, DCFormer._plain, autocast)
    assert kept_bytes(encoder, volume, DCFormer.forward, autocast) <= 0.5 * plain


def test_gradient_checkpointing_and_a_second_backward_pass(kernels):
    encoder, volume = encoder_of(), rule_volume("fused", (2, 1, 32, 64, 64))
    _, gradients, _, _ = step(encoder, volume)
    _, checkpointed, _, _ = step(encoder, volume, lambda e, v: checkpoint(e, v, use_reentrant=False))
    for key, expected in gradients.items():
        torch.testing.assert_close(checkpointed[key], expected, msg=key)
    states = encoder(volume)
    for _ in range(2):
        states[-1].sum().backward(retain_graph=True)
    twice = encoder.encoder["s0"][0][3].c1[0].weight.grad.clone()
    encoder.zero_grad()
    states[-1].sum().backward()
    torch.testing.assert_close(twice, 2 * encoder.encoder["s0"][0][3].c1[0].weight.grad)


def test_threads_keep_their_own_autocast(kernels):
    encoder, volume = encoder_of(TINY), rule_volume("fused", (2, 1, 16, 16, 16))
    encoder.requires_grad_(False)

    def steps(autocast: bool) -> bool:
        states = []
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(20):
                training.encode(encoder, torch.float32, volume)
                states.append(torch.is_autocast_enabled("cpu"))
        return all(state == autocast for state in states) and not torch.is_autocast_enabled("cpu")

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(steps, [True, False]))


def test_frozen_parameters_get_no_gradient():
    encoder, volume = encoder_of(), rule_volume("fused", (2, 1, 32, 64, 64))
    for name in ("s0", "s2"):
        encoder.encoder[name].requires_grad_(False)
    _, gradients, _, _ = step(encoder, volume)
    for key, gradient in gradients.items():
        assert (gradient is None) == key.startswith(("encoder.s0.", "encoder.s2.")), key


def test_training_mode_without_gradients_updates_the_statistics_as_the_plain_path():
    encoder, volume = encoder_of(), rule_volume("fused", (2, 1, 32, 64, 64))
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        encoder(volume)
        twin._plain(volume)
    assert all(torch.equal(a, b) for a, b in zip(encoder.buffers(), twin.buffers(), strict=True))


def test_partly_trained_layers_and_single_values_take_the_plain_path():
    encoder, volume = encoder_of(), rule_volume("fused", (1, 1, 32, 64, 64))
    encoder.encoder["s3"].eval()
    kept = encoder.encoder["s3"][0].dwconv.c1[1].running_mean.clone()
    encoder(volume)[-1].sum().backward()
    assert torch.equal(encoder.encoder["s3"][0].dwconv.c1[1].running_mean, kept)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        encoder_of()(volume[..., :1, :1, :1])


def test_statistics_of_a_body_in_air(kernels):
    # The grid's border and the air are far from the mean of what the branches' outputs vary by within the body.
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in (32, 64, 64)), indexing="ij")
    inside = axes[1].square() + axes[2].square() < 0.7
    volume = (inside * (0.5 + 0.05 * torch.sin(5 * axes[0] + 3 * axes[1]) * torch.cos(4 * axes[2])))[None, None]
    encoder = encoder_of()
    for norm in (module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm3d)):
        norm.momentum = 1.0
    expected = copy.deepcopy(encoder).double()
    for state, reference in zip(encoder(volume), expected._plain(volume.double()), strict=True):
        assert relative_deviation(state.double(), reference) <= 5e-6
    for key, buffer in encoder.named_buffers():
        if key.startswith("encoder.s0") and key.endswith("running_var"):
            torch.testing.assert_close(buffer.double(), expected.get_buffer(key), rtol=5e-6, atol=0, msg=key)


@pytest.mark.parametrize("bright", [0, 1000])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 9, 8, 10)])
def test_moments_are_those_of_the_shifted_columns(shape, bright, kernels):
    x = bright + torch.rand(*shape, 3)
    x[..., -1] = 1
    found = moments.along_axes(x)
    padded = torch.nn.functional.pad(x.double(), (0, 0, 1, 1, 1, 1, 1, 1))
    for dim, axis in enumerate("dhw", start=1):
        shifts = [padded.narrow(dim, start, x.shape[dim]) for start in range(3)]
        for other in {1, 2, 3} - {dim}:
            shifts = [shift.narrow(other, 1, x.shape[other]) for shift in shifts]
        rows = torch.cat(shifts, dim=-1).flatten(0, 3)  # [P, 3 * C]
        torch.testing.assert_close(found.shifted_mean[axis], rows.mean(0))
        torch.testing.assert_close(found.shifted_second[axis], rows.T @ rows / len(rows), rtol=1e-12, atol=0)
        # What the centre differs from its neighbours by varies by 1/2 at most, however bright it is.
        difference = torch.tensor([[-0.5, 0, 0, 1, 0, 0, -0.5, 0, 0]], dtype=torch.float64)
        _, variance = moments.of_products(difference, found.shifted_mean[axis], found.shifted_second[axis])
        torch.testing.assert_close(variance, (rows @ difference.T).var(0, correction=0), rtol=1e-8, atol=0)


@pytest.mark.parametrize("shape", [(1, 32, 64, 64, 8), (2, 3, 5, 7, 6), (1, 1, 1, 2, 4)])
def test_statistics_keep_their_digits_over_many_places(shape):
    x = torch.randn(shape) * torch.rand(shape[-1]) + 4 * torch.randn(shape[-1])
    mean, var = branches.mean_and_variance(x, torch.float32)
    flat = x.double().flatten(0, 3)
    torch.testing.assert_close(mean.double(), flat.mean(0), rtol=5e-7, atol=1e-6)
    torch.testing.assert_close(var.double(), flat.var(0, correction=0), rtol=2e-6, atol=1e-9)
