"""The Triton kernels equal the plain layers: in Triton's interpreter, or on a GPU where there is one."""

import copy
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch.nn import functional as F

from med3dvlm.model.dcformer import VARIANTS, DCFormer
from tests.helpers.golden import fill_by_rule, relative_deviation, rule_volume
from tests.helpers.triton_device import DEVICE, EXACT, TOLERANCE, assert_close

from med3dvlm.model.fused import triton_encoder, triton_feed_forward, triton_sums  # isort: skip
from med3dvlm.model.fused import triton_kernels as kernels  # isort: skip
from med3dvlm.model.fused.triton_sums import NormalisedSum, Tile  # isort: skip

ROOT = Path(__file__).parents[2]
MAP_NORESERVE = 0x4000  # of Linux; in mmap from Python 3.13
SMALL, WHOLE = Tile(2, 2, 4, 16, 4), Tile(2, 8, 8, 256, 4)  # the second one covers what an encoder test needs

# [B, D, H, W], kernel, channels. Axes shorter than the kernel, of one position, cut by tiles with something left over.
DEPTH_WISE = [
    ((2, 3, 2, 4), 3, 3), ((1, 2, 3, 6), 3, 5), ((2, 1, 2, 3), 7, 3), ((1, 2, 1, 2), 9, 20), ((1, 1, 3, 2), 11, 2),
    ((1, 1, 2, 5), 13, 4), ((2, 1, 1, 1), 3, 18),
]  # fmt: skip
DENSE = [((1, 3, 2, 3), 3, (20, 18)), ((2, 1, 1, 2), 3, (16, 5)), ((2, 1, 1, 1), 3, (4, 2))]
CASES = [pytest.param(*case, id=f"{case[0]} {case[1]} {case[2]}") for case in DEPTH_WISE + DENSE]


def use_tile(monkeypatch, tile):
    """In the interpreter; a GPU chooses for itself."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_sums, "TILES", {"depth-wise": [tile], "dense": [tile]})
        monkeypatch.setattr(triton_feed_forward, "WAYS", [triton_feed_forward.Tile(32, 64, 4, 2)])
        monkeypatch.setattr(triton_sums, "PROGRAMS", 12)  # several tiles in each


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tile(monkeypatch, SMALL)


def layer_of(shape, kernel, channels, dtype=EXACT):
    """Random (x, taps, weight, shift) that require gradients, and a gradient of the output."""
    torch.manual_seed(0)
    inputs, outputs = channels if isinstance(channels, tuple) else (channels, channels)
    widths = channels if isinstance(channels, tuple) else (channels,)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(*shape, inputs).to(DEVICE, dtype)
    parameters = [torch.randn(3, kernel, *widths), torch.rand(3, outputs) + 0.5, torch.randn(3, outputs)]
    leaves = [tensor.requires_grad_() for tensor in (x, *(p.to(DEVICE, sums) for p in parameters))]
    return leaves, torch.randn(*shape, outputs).to(DEVICE, dtype)


def plain_branches(x, taps):
    """The three convolutions by torch, [B, D, H, W, C] each."""
    kernel, depth_wise = taps.shape[1], taps.ndim == 3
    for along, taps_of_axis in zip((1, 2, 0), taps, strict=True):  # h, w, d as axes of [D, H, W]
        sizes, padding = [1, 1, 1], [0, 0, 0]
        sizes[along], padding[along] = kernel, kernel // 2
        weight = taps_of_axis.T[:, None] if depth_wise else taps_of_axis.permute(2, 1, 0)
        groups = x.shape[-1] if depth_wise else 1
        yield F.conv3d(x.movedim(-1, 1), weight.unflatten(-1, sizes), None, 1, padding, 1, groups).movedim(1, -1)


def plain_sum(x, taps, weight, shift):
    def norm(z, weight, shift):
        return F.batch_norm(z.movedim(-1, 1), None, None, weight, shift, True, 0.0, 1e-5).movedim(1, -1)

    return sum(norm(*args) for args in zip(plain_branches(x, taps), weight, shift, strict=True))


def as_double(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("shape, kernel, channels", CASES)
def test_normalised_sum_and_its_gradients(shape, kernel, channels):
    leaves, dy = layer_of(shape, kernel, channels)
    y, mean, var = NormalisedSum.apply(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy)
    plain_leaves = as_double(leaves)
    expected = plain_sum(*plain_leaves)
    assert_close([y, *gradients], [expected, *torch.autograd.grad(expected, plain_leaves, dy.double())])
    branches = torch.stack([z.flatten(0, 3) for z in plain_branches(*plain_leaves[:2])])
    assert_close([mean, var], [branches.mean(1), branches.var(1, correction=0)])


@pytest.mark.parametrize("shape, kernel, channels", [CASES[1], CASES[5], CASES[7]])
def test_a_sum_with_one_centre(shape, kernel, channels):
    (x, taps, *_), _ = layer_of(shape, kernel, channels)
    bias = torch.randn(taps.shape[-1], dtype=taps.dtype, device=DEVICE)
    merged = triton_sums.merge_centres(taps.detach())
    found = [
        triton_sums.axis_sum((x.detach(),) * 3, taps.detach(), bias),
        triton_sums.axis_sum((x.detach(),) * 3, merged, bias, centres=False),
    ]
    assert_close(found, [bias + sum(plain_branches(x.detach(), taps.detach()))] * 2)


@pytest.mark.parametrize("channels", [6, (20, 6)], ids=["depth-wise", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_adds_up_in_float32(dtype, channels):
    leaves, dy = layer_of((1, 1, 2, 4), 3, channels, dtype)
    y, mean, _ = NormalisedSum.apply(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert y.dtype == gradients[0].dtype == dtype and mean.dtype == gradients[1].dtype == torch.float32
    plain_leaves = as_double(leaves)
    expected = plain_sum(*plain_leaves)
    tolerance = 20 * torch.finfo(dtype).eps
    assert_close([y, *gradients], [expected, *torch.autograd.grad(expected, plain_leaves, dy.double())], tolerance)


def test_statistics_do_not_cancel():
    """Bright voxels, little contrast: the mean is 1000 times the deviation."""
    (x, taps, *_), _ = layer_of((2, 2, 3, 5), 3, 4, torch.float32)
    taps = torch.zeros_like(taps)
    taps[:, 1] = 1
    bright = 1000 + x.detach()
    _, var = triton_sums.statistics(bright, taps)
    torch.testing.assert_close(var[0].double(), bright.double().flatten(0, 3).var(0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.skipif(DEVICE != "cpu", reason="finite differences need float64")
@pytest.mark.parametrize("channels", [2, (2, 3)], ids=["depth-wise", "dense"])
def test_gradients_by_finite_differences(channels):
    leaves, _ = layer_of((1, 2, 2, 3), 3, channels)
    assert torch.autograd.gradcheck(lambda *leaves: NormalisedSum.apply(*leaves)[0], leaves, fast_mode=True)


def test_a_gradient_that_is_not_contiguous_and_an_input_without():
    (x, *parameters), _ = layer_of((1, 1, 2, 3), 3, 2)
    y = NormalisedSum.apply(x, *parameters)[0]
    expected = torch.autograd.grad(y, parameters, torch.ones_like(y))
    y = NormalisedSum.apply(x.detach(), *parameters)[0]
    assert_close(torch.autograd.grad(y.sum(), parameters), expected)


def encoder_of(name):
    return fill_by_rule(DCFormer.from_variant(name), "fused").eval().to(DEVICE)


@pytest.mark.parametrize(
    "name", ["phantom", "nano", *(pytest.param(n, marks=pytest.mark.slow) for n in list(VARIANTS)[1:-1])]
)
def test_inference_equals_the_plain_path(name, monkeypatch):
    use_tile(monkeypatch, WHOLE)
    encoder = encoder_of(name)
    volume = rule_volume("fused", (2, 1, 7, 19, 22)).to(DEVICE).transpose(3, 4)  # [2, 1, 7, 22, 19], not contiguous
    with torch.no_grad():
        # The interpreter cuts bfloat16 off instead of rounding it; float16 shows what rounding alone does.
        coarse = 5e-2 if DEVICE == "cpu" else 3e-2
        for dtype, tolerance in ((EXACT, TOLERANCE), (torch.float16, 3e-3), (torch.bfloat16, coarse)):
            expected = copy.deepcopy(encoder).to(EXACT)._plain(volume.to(EXACT))
            found = triton_encoder.FoldedEncoder(encoder, dtype)(volume)
            assert all(state.dtype == dtype for state in found)
            assert_close(found, expected, tolerance)


def without_gradient(name):
    """Biases in front of a batch norm: of the stem's layers and the blocks' convolutions, `c1.0.bias` and so on."""
    return name.split(".")[-3:] in [[f"c{i}", "0", "bias"] for i in (1, 2, 3)]


@pytest.mark.parametrize("name", ["phantom", pytest.param("nano", marks=pytest.mark.slow)])
def test_training_equals_the_plain_path(name, monkeypatch):
    use_tile(monkeypatch, WHOLE)
    fast, plain = (encoder_of(name).to(EXACT).train() for _ in range(2))
    volume = rule_volume("fused", (2, 1, 8, 12, 18)).to(DEVICE, EXACT)
    inputs = [volume.clone().requires_grad_() for _ in range(2)]
    states = triton_encoder.encode(fast, EXACT, inputs[0]), plain._plain(inputs[1])
    assert_close(*states)
    for one in states:
        torch.autograd.backward(one, [torch.sin(torch.arange(s.numel()).view_as(s)).to(s) for s in one])
    tolerance = 100 * TOLERANCE
    assert_close([inputs[0].grad], [inputs[1].grad], tolerance)
    expected = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        if without_gradient(name):
            assert parameter.grad is not None and not parameter.grad.any()
        else:
            assert_close([parameter.grad], [expected[name].grad], tolerance)
    for (name, one), other in zip(fast.named_buffers(), plain.buffers(), strict=True):
        assert relative_deviation(one.double(), other.double()) <= TOLERANCE, name


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_training_returns_the_plain_dtypes(weights, monkeypatch):
    use_tile(monkeypatch, WHOLE)
    encoder = encoder_of("phantom").to(weights).train()
    volume = torch.rand(2, 1, 4, 4, 4, device=DEVICE).to(weights)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, expected = triton_encoder.encode(encoder, torch.bfloat16, volume), encoder._plain(volume)
        torch.autograd.backward(found, [torch.ones_like(state) for state in found])
    assert [state.dtype for state in found] == [state.dtype for state in expected]
    assert all(parameter.grad.dtype == weights for parameter in encoder.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    leaves, dy = layer_of((1, 1, 2, 3), 3, 2)
    expected = torch.autograd.grad(NormalisedSum.apply(*leaves)[0], leaves, dy)
    again = [leaf.detach().requires_grad_() for leaf in leaves]
    torch.utils.checkpoint.checkpoint(NormalisedSum.apply, *again, use_reentrant=reentrant)[0].backward(dy)
    assert_close([leaf.grad for leaf in again], expected)


def without_memory(dtype, *sizes):
    """Zeros, as many as can be addressed: only pages that are touched exist."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, math.prod(sizes) * dtype.itemsize, flags=flags), dtype=dtype).view(sizes)


@pytest.mark.skipif(DEVICE != "cpu" or sys.platform != "linux", reason="needs memory that is promised but not there")
def test_samples_beyond_32_bit_addresses():
    """9 samples of 2^28 values, of which the last one starts at 2^31; 16 channels of each are computed."""
    samples, channels = 9, 2**28
    grid_and_width = (1, 1, 1, channels, channels)
    constants = {"BI": 0, "BD": 1, "BH": 1, "BW": 1, "BC": 16, "K": 1, **triton_sums.kernel_types(torch.empty(0))}
    x, y = (without_memory(torch.float16, samples, channels) for _ in range(2))
    x[:, :16] = torch.arange(samples * 16).view(samples, 16)
    taps, bias = without_memory(torch.float32, 3, channels), torch.ones(16)
    taps[:, :16] = 2
    kernels.sum_kernel[samples, 1](x, x, x, taps, bias, y, *grid_and_width, CENTRES=False, **constants)
    assert y[:, :16].equal(2 * x[:, :16] + 1)
    dz = without_memory(torch.float16, 3, samples, channels)
    factors = without_memory(torch.float32, 3, 3, channels)
    factors[:, 0, :16], factors[:, 1, :16] = torch.tensor([[[1.0], [2.0], [3.0]], [[0.5], [0.25], [1.0]]])
    partial = without_memory(torch.float32, 1, 3, channels)
    arguments = (x, y, taps, factors, dz, partial, samples, samples)
    kernels.branch_gradient_kernel[3, 1, 1](*arguments, *grid_and_width, KP=1, **constants)
    expected = factors[:, :1, :16] * y[:, :16].float() + factors[:, 1:2, :16] * 2 * x[:, :16].float()
    assert_close([dz[..., :16], partial[0, :, :16]], [expected, (expected * x[:, :16].float()).sum(1)], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_gpus_that_are_not_here(capability, tmp_path):
    """The interpreter accepts more than the compiler does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.triton_compile", capability]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 40  # 10 kernels, 2 dtypes, sizes open or 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nano", "small"])
def test_published_size_on_a_gpu(name):
    fast, plain = encoder_of(name), encoder_of(name)
    fast.fused, plain.fused = "auto", "off"
    volume = rule_volume("fused", (2, 1, 128, 256, 256)).to("cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        found = fast(volume)
    assert fast.fused_cache, "the plain path was taken"
    with torch.no_grad():
        assert_close(found, plain(volume), 3e-2)
    losses = []
    for encoder in (fast.train(), plain.train()):
        with torch.autocast("cuda", torch.bfloat16, enabled=encoder is fast):
            losses.append(sum(state.float().square().mean() for state in encoder(volume)))
        losses[-1].backward()
        assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=0)
    weight, expected = (encoder.encoder["s4"][-1].mlp.mlp[3].weight.grad for encoder in (fast, plain))
    assert_close([weight], [expected], 0.1)
