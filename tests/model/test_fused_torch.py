"""What the fused path computes with without C++ kernels: oneDNN's operators in the forms that they are fast in."""

import pytest
import torch
from torch.nn import functional as F

from med3dvlm.model.fused import branches, inference, onednn
from med3dvlm.model.fused.axes import AXES, AxisSum

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}  # relative L2
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)
DIMS = {"d": 0, "h": 1, "w": 2}  # of a kernel over D, H and W


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def convolve(x: torch.Tensor, kernel: torch.Tensor, axis: str, groups: int) -> torch.Tensor:
    """[B, D, H, W, C] with [C', C / groups, k] along an axis, by torch in float64."""
    sizes = [kernel.shape[-1] if dim == DIMS[axis] else 1 for dim in range(3)]
    weight = kernel.double().reshape(*kernel.shape[:2], *sizes)
    padding = [size // 2 for size in sizes]
    return F.conv3d(x.double().movedim(-1, 1), weight, None, 1, padding, groups=groups).movedim(1, -1)


@DTYPES
@pytest.mark.parametrize("places, left, right", [(200, 24, 16), (200, 16, 24), (20, 24, 16), (20, 16, 24), (1, 3, 2)])
def test_products(places, left, right, dtype):
    a, b = torch.randn(places, left).to(dtype), torch.randn(places, right).to(dtype)
    assert_near(onednn.product(a, b), a.double().T @ b.double(), dtype)
    weight, bias = torch.randn(left, right).to(dtype), torch.randn(right).to(dtype)
    assert_near(onednn.linear(a, weight.T, bias), a.double() @ weight.double() + bias.double(), dtype)


@DTYPES
@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("channels, width, groups, length", [(16, 16, 1, 3), (20, 16, 1, 3), (16, 16, 16, 5)])
@pytest.mark.parametrize("grid", [(1, 4, 5, 6), (2, 3, 7, 5), (2, 1, 4, 3), (1, 2, 1, 1)])
def test_sums_of_convolutions(grid, channels, width, groups, length, shared_input, dtype):
    inputs = {axis: torch.randn(*grid, channels).to(dtype) for axis in AXES}
    inputs = dict.fromkeys(AXES, inputs["h"]) if shared_input else inputs
    kernels = {axis: torch.randn(width, channels // groups, length).to(dtype) for axis in AXES}
    bias = torch.randn(width).to(dtype)
    expected = bias.double() + sum(convolve(inputs[axis], kernels[axis], axis, groups) for axis in AXES)
    layer = AxisSum(kernels, bias, dtype, groups, shared_input)
    for _ in range(2):  # with the weights laid out, and again
        assert_near(layer.of(inputs), expected, dtype)
    other = {axis: x.flip(2)[:, :, :1] for axis, x in inputs.items()}  # laid out again for another size
    expected = bias.double() + sum(convolve(other[axis], kernels[axis], axis, groups) for axis in AXES)
    assert_near(layer.of({axis: x.contiguous() for axis, x in other.items()}), expected, dtype)


@DTYPES
@pytest.mark.parametrize("channels, width, groups, length", [(20, 16, 1, 3), (16, 16, 16, 5), (16, 16, 16, 13)])
@pytest.mark.parametrize("axis", AXES)
def test_gradients_of_kernels(axis, channels, width, groups, length, dtype):
    x, dz = torch.randn(2, 3, 6, 14, channels).to(dtype), torch.randn(2, 3, 6, 14, width).to(dtype)
    kernel = torch.randn(width, channels // groups, length, dtype=torch.float64, requires_grad=True)
    convolve(x, kernel, axis, groups).backward(dz.double())
    found = branches.kernel_gradient(dz, x, kernel.detach().to(dtype), axis, groups)
    assert_near(found, kernel.grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4, 6, 8, 16), (2, 5, 7, 9, 3), (2, 1, 1, 2, 1), (1, 3, 1, 4, 2)])
def test_max_pooling(shape, dtype):
    x = torch.randn(shape).to(dtype) - 2
    x[0, 0, 0, 0, 0], x[-1, -1, -1, -1, -1] = float("-inf"), float("nan")
    expected = F.max_pool3d(x.movedim(-1, 1), 3, 2, 1).movedim(1, -1)
    found = inference.max_pool(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
