"""What a GPU is asked for at the published sizes. Nothing is computed: tensors have no memory, kernels are not run."""

from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode

from med3dvlm.benchmark import roofline
from med3dvlm.model.dcformer import VARIANTS, DCFormer
from tests.helpers.triton_device import DEVICE

from med3dvlm.model.fused import triton_encoder, triton_feed_forward, triton_kernels  # isort: skip

LIMITS = (2**31 - 1, 65535, 65535)  # of programs along each axis of a launch
WAITING = {
    torch.tensor, torch.as_tensor, torch.from_numpy, torch.nonzero, torch.Tensor.nonzero, torch.Tensor.item,
    torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__, torch.Tensor.__float__,
    torch.Tensor.__int__, torch.Tensor.__index__,
}  # fmt: skip

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="meant for machines without a GPU")


class Launches(dict):
    """Stands for a kernel: takes down grids and arguments."""

    def __init__(self, name, found):
        super().__init__()
        self.name, self.found = name, found

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.found.append((self.name, grid, arguments, constants))


@pytest.fixture
def launches(monkeypatch):
    found = []
    for name in [name for name in vars(triton_kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_kernels, name, Launches(name, found))
    monkeypatch.setattr(triton_feed_forward, "WAYS", triton_feed_forward.WAYS[1:])
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **flags: nullcontext())  # knows no meta device
    return found


class Watch(TorchFunctionMode):
    """Notes calls for which the host waits for a GPU: values that it hands over, or asks for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in WAITING:
            self.found.append(func)
        return func(*args, **kwargs or {})


def encoder_on_no_device(name):
    with torch.device("meta"):
        return DCFormer.from_variant(name)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_training_step_of_64_volumes(name, launches):
    encoder = encoder_on_no_device(name).train()
    volume = torch.empty(64, 1, 128, 256, 256, device="meta")
    with Watch() as watch:
        states = triton_encoder.encode(encoder, torch.bfloat16, volume)
        torch.autograd.backward(states, [torch.empty_like(state) for state in states])
    assert watch.found == []
    assert all(parameter.grad.shape == parameter.shape for parameter in encoder.parameters())
    assert [state.shape[:2] for state in states] == [(64, encoder.num_tokens(level)) for level in range(5)]
    names = [launch[0] for launch in launches]
    layers = 3 + sum(VARIANTS[name].depths)  # the stem's first two are one
    assert names.count("statistics_kernel") == names.count("branch_gradient_kernel") == layers
    assert names.count("sum_kernel") == 2 * layers - 1  # the volume wants no gradient
    for name, grid, arguments, _ in launches:
        assert all(0 < size <= limit for size, limit in zip(grid, LIMITS, strict=False)), (name, grid)
        assert all(tensor.is_contiguous() for tensor in arguments if isinstance(tensor, torch.Tensor)), name


@pytest.mark.parametrize("name", VARIANTS)
def test_inference_of_64_volumes(name, launches):
    encoder = encoder_on_no_device(name).eval()
    volume = torch.empty(64, 1, 128, 256, 256, device="meta")
    with torch.no_grad():
        folded = triton_encoder.FoldedEncoder(encoder, torch.bfloat16)
        with Watch() as watch:
            states = folded(volume)
    assert watch.found == []
    assert [state.shape[:2] for state in states] == [(64, encoder.num_tokens(level)) for level in range(5)]
    narrow = [stage for stage in range(4) if VARIANTS[name].channels[stage + 1] <= triton_feed_forward.WIDEST]
    kernels = 3 + sum(VARIANTS[name].depths) + sum(VARIANTS[name].depths[stage] for stage in narrow)
    assert len(launches) == kernels


def bytes_moved(launches, *kernels):
    """Of all volumes [B, D, H, W, C] and rows [P, C], each once in a launch."""
    total = 0
    for kernel, _, arguments, _ in launches:
        if kernel in kernels:
            rows = kernel == "feed_forward_kernel"
            tensors = (*arguments[:2], arguments[7]) if rows else [t for t in arguments if getattr(t, "ndim", 0) > 4]
            total += sum({id(tensor): tensor.nbytes for tensor in tensors if tensor.dtype == torch.bfloat16}.values())
    return total


@pytest.mark.parametrize("name", VARIANTS)
def test_the_computed_table_counts_these_kernels(name, launches):
    encoder, size, variant = encoder_on_no_device(name), (32, 64, 64), VARIANTS[name]
    volume = torch.empty(3, 1, *size, device="meta")
    convolutions = ("layers 1 and 2", "layers 3 and 4", "depth-wise")
    narrow = tuple(f"stage {i}, feed-forward" for i in range(1, 5) if variant.channels[i] <= triton_feed_forward.WIDEST)

    def expected(parts, words):
        return pytest.approx(sum(part.gigabytes for part in parts if part.name.endswith(words)) * 1e9)

    assert roofline.FUSED == triton_feed_forward.WIDEST
    with torch.no_grad():
        triton_encoder.FoldedEncoder(encoder, torch.bfloat16)(volume)
    parts = roofline.inference(variant, 3, size)
    assert bytes_moved(launches, "sum_kernel") == expected(parts, convolutions)
    assert bytes_moved(launches, "feed_forward_kernel") == expected(parts, narrow)
    launches.clear()
    states = triton_encoder.encode(encoder.train(), torch.bfloat16, volume)
    torch.autograd.backward(states, [torch.empty_like(state) for state in states])
    kernels = {launch[0] for launch in launches} - {"feed_forward_kernel"}
    assert bytes_moved(launches, *kernels) == expected(roofline.training(variant, 3, size), convolutions)
