"""Sums of three one-dimensional convolutions, with batch norm and gradients, on the kernels of `triton_kernels`.

Training never stores a branch's output: one pass over the input finds the statistics, a second one, with the batch
norms folded into the taps, the sum. The backward pass computes the branches again: one pass for the sums that batch
norm's gradient needs, one that writes the gradients of the branches' outputs (and depth-wise the taps' gradients), one
that takes those back to the input; dense layers need one more for their taps.

Sums over positions are kept per tile and added in float64. Results do not depend on the order in which programs run.

On a GPU the first call for a width, dtype and rough size times the tiles of `TILES` and keeps the fastest. Without one,
in Triton's interpreter (TRITON_INTERPRET=1), the tile is fixed.

Shapes as in `triton_kernels`: x [B, D, H, W, CI]; taps [3, K, CI, CO], depth-wise [3, K, C]; axes in the order h, w, d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
import triton.testing
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.runtime.errors import OutOfResources

from med3dvlm.model.fused import triton_kernels as kernels

EPSILON = 1e-5  # of batch norm
DENSE_PARTS = 64  # independent sums for the gradient of a dense tap


class Tile(NamedTuple):
    """What one program computes: positions along each axis, output channels; and its warps."""

    depth: int
    height: int
    width: int
    channels: int
    warps: int


INTERPRETED = Tile(2, 4, 8, 32, 4)
TILES = {  # compiled for compute capability 8.0, these spill at most a few registers
    "depth-wise": [
        Tile(2, 4, 8, 32, 4), Tile(2, 8, 8, 32, 4), Tile(2, 8, 8, 32, 8), Tile(4, 8, 8, 32, 8), Tile(8, 8, 8, 16, 8),
    ],
    "dense": [Tile(2, 4, 8, 64, 4), Tile(2, 4, 8, 64, 8), Tile(2, 8, 8, 64, 8), Tile(2, 8, 8, 32, 4)],
}  # fmt: skip
_TRITON = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_chosen: dict[tuple, Tile] = {}


def axis_sum(inputs: tuple[Tensor, Tensor, Tensor], taps: Tensor, bias: Tensor, centres: bool = True) -> Tensor:
    """bias [CO] + the convolutions of three volumes, one per axis -> [B, D, H, W, CO], in the volumes' dtype.

    With `centres` false only the taps along w have a centre (see `merge_centres`).
    """

    def run(tile: Tile) -> Tensor:
        y = inputs[0].new_empty(*inputs[0].shape[:-1], taps.shape[-1])
        _launch(kernels.sum_kernel, tile, inputs[0], taps, (*inputs, taps, bias, y), CENTRES=centres)
        return y

    return _tuned("sum", inputs[0], taps, run)


def merge_centres(taps: Tensor) -> Tensor:
    """Taps for one shared input, whose three centres are one: it lies in the kernel along w, the others are unused."""
    taps, centre = taps.clone(), taps.shape[1] // 2
    taps[1, centre] = taps[:, centre].sum(0)
    return taps


def statistics(x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every branch, each [3, CO]."""
    dtype = accumulator(x)

    def run(tile: Tile) -> Tensor:
        partial = x.new_empty(_tiles(x, tile), 3, 3, taps.shape[-1], dtype=dtype)
        _launch(kernels.statistics_kernel, tile, x, taps, (x, taps, partial))
        return partial

    count, mean, squares = _tuned("statistics", x, taps, run).double().unbind(2)  # [tiles, 3, CO]
    total = count.sum(0)
    means = (count * mean).sum(0) / total
    variances = (squares + count * (mean - means).square()).sum(0) / total
    return means.to(dtype), variances.to(dtype)


def correlations(x: Tensor, dy: Tensor, taps: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all positions of dy (z - mean) for the branches z, [3, CO], and of dy, [CO], in float64."""

    def run(tile: Tile) -> Tensor:
        partial = x.new_empty(_tiles(x, tile), 4, taps.shape[-1], dtype=mean.dtype)
        _launch(kernels.correlation_kernel, tile, x, taps, (x, dy, taps, mean, partial))
        return partial

    sums = _tuned("correlations", x, taps, run).double().sum(0)
    return sums[:3], sums[3]


def branch_gradients(x: Tensor, dy: Tensor, taps: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the branches' outputs, dz [3, B, D, H, W, CO] = a dy + b z + c, and of the taps, shaped like them.

    factors [3, 3, CO] hold a, b, c for each branch.
    """
    dz = dy.new_empty(3, *dy.shape)

    def run(tile: Tile) -> Tensor:
        partial = x.new_empty(_tiles(x, tile) if taps.ndim == 3 else 0, *taps.shape, dtype=factors.dtype)
        _launch(kernels.branch_gradient_kernel, tile, x, taps, (x, dy, taps, factors, dz, partial, len(x)))
        return partial

    partial = _tuned("branch_gradients", x, taps, run)
    return dz, (_dense_taps(x, dz, taps) if taps.ndim == 4 else partial).double().sum(0).to(taps.dtype)


def _dense_taps(x: Tensor, dz: Tensor, taps: Tensor) -> Tensor:
    """Parts [parts, 3, K, CI, CO] of the gradient of dense taps."""

    def run(tile: Tile) -> Tensor:
        tile = tile._replace(channels=_power_of_two(taps.shape[3]))
        tiles = _tiles(x, tile)
        partial = x.new_empty(3, min(tiles, DENSE_PARTS), *taps.shape[1:], dtype=accumulator(x))
        for axis, part in enumerate(partial):
            grid = (taps.shape[1], len(part))
            constants = _constants(tile, x, taps)
            kernels.dense_taps_kernel[grid](x, dz[axis], part, tiles, *_sizes(x, taps), AXIS=axis, **constants)
        return partial.transpose(0, 1)

    return _tuned("dense_taps", x, taps, run)


class NormalisedSum(torch.autograd.Function):
    """The sum of three convolutions with batch norm: (y [B, D, H, W, CO], mean [3, CO], biased variance [3, CO]).

    Takes x, taps in the accumulator's dtype, and the batch norms' weights and shifts [3, CO]. Mean and variance are
    those of the batch, for the running ones; no gradient flows through them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor, weight: Tensor, shift: Tensor):
        mean, var = statistics(x, for_kernels(taps, x))
        scale = weight * (var + EPSILON).rsqrt()
        folded = merge_centres(_per_axis(scale, taps) * taps)
        y = axis_sum((x, x, x), for_kernels(folded, x), (shift - scale * mean).sum(0), centres=False)
        ctx.save_for_backward(x, taps, weight, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, _mean, _var):
        x, taps, weight, mean, var = ctx.saved_tensors
        dy, taps = dy.to(x.dtype).contiguous(), for_kernels(taps, x)
        inverse = (var + EPSILON).rsqrt()
        products, total = correlations(x, dy, taps, mean)  # [3, CO], [CO]
        count = x[..., 0].numel()
        a = weight * inverse
        b = -a * inverse.square() * products / count
        factors = torch.stack([a, b, -a * total / count - b * mean], dim=1).to(mean.dtype)  # [3, 3, CO]
        dz, d_taps = branch_gradients(x, dy, taps, factors)
        dx = None
        if ctx.needs_input_grad[0]:
            back = taps.flip(1) if taps.ndim == 3 else taps.flip(1).transpose(2, 3)
            dx = axis_sum(tuple(dz), back.contiguous(), mean.new_zeros(back.shape[-1]))
        d_shift = total.expand(3, -1).to(mean.dtype)
        return dx, d_taps.to(mean.dtype), (inverse * products).to(mean.dtype), d_shift


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype in which kernels add up what they read from x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def for_kernels(taps: Tensor, x: Tensor) -> Tensor:
    """Taps as the kernels want them: dense ones in the dtype of x."""
    return taps.to(x.dtype if taps.ndim == 4 else accumulator(x)).contiguous()


def _per_axis(scale: Tensor, taps: Tensor) -> Tensor:
    """[3, CO] -> [3, 1, CO] or [3, 1, 1, CO]."""
    return scale.unflatten(1, (*[1] * (taps.ndim - 2), -1))


def _tuned(name: str, x: Tensor, taps: Tensor, run: Callable[[Tile], Tensor]) -> Tensor:
    """`run` with the fastest tile for this device, width, dtype and order of magnitude."""
    if not x.is_cuda:
        return run(INTERPRETED)
    key = (name, x.device, x.dtype, taps.shape, x[..., 0].numel().bit_length())
    with torch.cuda.device(x.device):  # Triton launches on the current one
        if key not in _chosen:
            _chosen[key] = fastest(TILES["dense" if taps.ndim == 4 else "depth-wise"], run)
        return run(_chosen[key])


def fastest(tiles: list[Tile], run: Callable[[Tile], Tensor]) -> Tile:
    """The tile with which `run` takes the least time; those that the GPU has no room for are left out."""
    return min(tiles, key=lambda tile: _milliseconds(run, tile))


def _milliseconds(run: Callable[[Tile], Tensor], tile: Tile) -> float:
    try:
        return triton.testing.do_bench(lambda: run(tile), warmup=5, rep=20)
    except OutOfResources:  # this GPU has too few registers or too little shared memory for the tile
        return float("inf")


def _launch(kernel, tile: Tile, x: Tensor, taps: Tensor, arguments: tuple, **constants) -> None:
    grid = (_tiles(x, tile), triton.cdiv(taps.shape[-1], tile.channels))
    kernel[grid](*arguments, *_sizes(x, taps), **_constants(tile, x, taps), **constants)


def _tiles(x: Tensor, tile: Tile) -> int:
    per_axis = (triton.cdiv(size, step) for size, step in zip(x.shape[1:4], tile[:3], strict=True))
    return len(x) * math.prod(per_axis)


def _sizes(x: Tensor, taps: Tensor) -> tuple[int, int, int, int, int]:
    """D, H, W, CI, CO."""
    return *x.shape[1:], taps.shape[-1]


def _constants(tile: Tile, x: Tensor, taps: Tensor) -> dict[str, object]:
    return {
        "BI": _power_of_two(x.shape[-1]) if taps.ndim == 4 else 0,
        "BD": tile.depth,
        "BH": tile.height,
        "BW": tile.width,
        "BC": tile.channels,
        "K": taps.shape[1],
        "ACC": _TRITON[accumulator(x)],
        # The interpreter would multiply the bits of bfloat16.
        "DOT": _TRITON[x.dtype if x.is_cuda else accumulator(x)],
        "num_warps": tile.warps,
    }


def _power_of_two(n: int) -> int:
    """The next power of two that a product in the tensor cores accepts."""
    return max(16, triton.next_power_of_2(n))
