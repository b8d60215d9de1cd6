"""Sums of three one-dimensional convolutions, with batch norm and gradients, on the kernels of `triton_kernels`.

Training never stores a branch's output: one pass over the input finds the statistics, a second one, with the batch
norms folded into the taps, the sum. The backward pass computes the branches again: one pass for the sums that batch
norm's gradient needs, one that writes the gradients of the branches' outputs (and depth-wise the taps' gradients), one
that takes those back to the input; dense layers need one more for their taps.

Sums over positions: a program adds up those of its tiles, and what up to `PROGRAMS` of them found is added in float64.
There are no atomic operations: results do not depend on the order in which programs run. `triton_tuning` chooses tiles.

Shapes as in `triton_kernels`: x [B, D, H, W, CI]; taps [3, K, CI, CO], depth-wise [3, K, C]; axes in the order h, w, d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from med3dvlm.model.fused import triton_kernels as kernels
from med3dvlm.model.fused.first_order import first_order
from med3dvlm.model.fused.triton_tuning import INTERPRETED, tuned

EPSILON = 1e-5  # of batch norm
PROGRAMS = 2048  # of a kernel that sums over positions: several for each processor of a large GPU


class Tile(NamedTuple):
    """What one program computes: positions along each axis, output channels; and its warps."""

    depth: int
    height: int
    width: int
    channels: int
    warps: int


TILES = {  # compiled for compute capability 8.0, these spill at most a few registers; of dense float32, the first only
    "depth-wise": [
        Tile(2, 4, 8, 32, 4), Tile(2, 8, 8, 32, 4), Tile(2, 8, 8, 32, 8), Tile(4, 8, 8, 32, 8), Tile(8, 8, 8, 16, 8),
    ],
    "dense": [Tile(2, 4, 8, 32, 4), Tile(2, 4, 8, 64, 4), Tile(2, 4, 8, 64, 8), Tile(2, 8, 8, 64, 8)],
}  # fmt: skip
_TRITON = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


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
    dtype = accumulator(x.dtype)

    def run(tile: Tile) -> Tensor:
        partial = x.new_empty(_parts(x, taps, tile), 3, 3, taps.shape[-1], dtype=dtype)
        _launch_parts(kernels.statistics_kernel, tile, x, taps, (x, taps, partial))
        return partial

    count, mean, squares = _tuned("statistics", x, taps, run).double().unbind(2)  # [parts, 3, CO]
    total = count.sum(0)
    means = (count * mean).sum(0) / total
    variances = (squares + count * (mean - means).square()).sum(0) / total
    return means.to(dtype), variances.to(dtype)


def correlations(x: Tensor, dy: Tensor, taps: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all positions of dy (z - mean) for the branches z, [3, CO], and of dy, [CO], in float64."""

    def run(tile: Tile) -> Tensor:
        partial = x.new_empty(_parts(x, taps, tile), 3, 2, taps.shape[-1], dtype=mean.dtype)
        _launch_parts(kernels.correlation_kernel, tile, x, taps, (x, dy, taps, mean, partial))
        return partial

    sums = _tuned("correlations", x, taps, run).double().sum(0)
    return sums[:, 0], sums[0, 1]


def branch_gradients(x: Tensor, dy: Tensor, taps: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the branches' outputs, dz [3, B, D, H, W, CO] = a dy + b z + c, and of the taps, shaped like them.

    factors [3, 3, CO] hold a, b, c for each branch.
    """
    dz = dy.new_empty(3, *dy.shape)

    def run(tile: Tile) -> Tensor:
        partial = x.new_empty(_parts(x, taps, tile) if taps.ndim == 3 else 0, *taps.shape, dtype=factors.dtype)
        arguments, padded = (x, dy, taps, factors, dz, partial, len(x)), triton.next_power_of_2(taps.shape[1])
        _launch_parts(kernels.branch_gradient_kernel, tile, x, taps, arguments, KP=padded)
        return partial

    partial = _tuned("branch_gradients", x, taps, run)
    return dz, (_dense_taps(x, dz, taps) if taps.ndim == 4 else partial).double().sum(0).to(taps.dtype)


def _dense_taps(x: Tensor, dz: Tensor, taps: Tensor) -> Tensor:
    """Parts [parts, 3, K, CI, CO] of the gradient of dense taps."""
    sums = 3 * taps.shape[1]

    def run(tile: Tile) -> Tensor:
        partial = x.new_empty(_parts(x, taps, tile, sums), *taps.shape, dtype=accumulator(x.dtype))
        _launch_parts(kernels.dense_taps_kernel, tile, x, taps, (x, dz, partial, len(x)), sums)
        return partial

    return _tuned("dense_taps", x, taps, run)


class NormalisedSum(torch.autograd.Function):
    """The sum of three convolutions with batch norm: (y [B, D, H, W, CO], mean [3, CO], biased variance [3, CO]).

    Takes x, taps in the accumulator's dtype, and the batch norms' weights and shifts [3, CO]. Mean and variance are
    those of the batch, for the running ones; no gradient flows through them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor, weight: Tensor, shift: Tensor):
        mean, var = statistics(x, for_kernels(taps, x.dtype))
        scale = weight * (var + EPSILON).rsqrt()
        folded = merge_centres(_per_axis(scale, taps) * taps)
        y = axis_sum((x, x, x), for_kernels(folded, x.dtype), (shift - scale * mean).sum(0), centres=False)
        ctx.save_for_backward(x, taps, weight, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @first_order
    def backward(ctx, dy: Tensor, _mean, _var):
        x, taps, weight, mean, var = ctx.saved_tensors
        dy, taps = dy.to(x.dtype).contiguous(), for_kernels(taps, x.dtype)
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


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels add up what they read in another."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def for_kernels(taps: Tensor, dtype: torch.dtype) -> Tensor:
    """Taps as the kernels want them for volumes of a dtype: dense ones in the same."""
    return taps.to(dtype if taps.ndim == 4 else accumulator(dtype)).contiguous()


def _per_axis(scale: Tensor, taps: Tensor) -> Tensor:
    """[3, CO] -> [3, 1, CO] or [3, 1, 1, CO]."""
    return scale.unflatten(1, (*[1] * (taps.ndim - 2), -1))


def _tuned(name: str, x: Tensor, taps: Tensor, run: Callable[[Tile], Tensor]) -> Tensor:
    return tuned(name, x, taps, TILES["dense" if taps.ndim == 4 else "depth-wise"], run)


def _launch(kernel, tile: Tile, x: Tensor, taps: Tensor, arguments: tuple, **constants) -> None:
    """A program for every tile and block of channels."""
    grid = (_tiles(x, tile), triton.cdiv(taps.shape[-1], tile.channels))
    kernel[grid](*arguments, *_sizes(x, taps), **_constants(tile, x, taps), **constants)


def _launch_parts(kernel, tile: Tile, x: Tensor, taps: Tensor, arguments: tuple, sums: int = 3, **constants) -> None:
    """A program for each of `sums` (of the axes), block of channels, and part. Those of one part share the cache."""
    grid = (sums, triton.cdiv(taps.shape[-1], tile.channels), _parts(x, taps, tile, sums))
    kernel[grid](*arguments, _tiles(x, tile), *_sizes(x, taps), **_constants(tile, x, taps), **constants)


def _parts(x: Tensor, taps: Tensor, tile: Tile, sums: int = 3) -> int:
    """Parts in which sums over positions come: of the tiles each has every parts-th."""
    return min(_tiles(x, tile), triton.cdiv(PROGRAMS, sums * triton.cdiv(taps.shape[-1], tile.channels)))


def _tiles(x: Tensor, tile: Tile) -> int:
    per_axis = (triton.cdiv(size, step) for size, step in zip(x.shape[1:4], tile[:3], strict=True))
    return len(x) * math.prod(per_axis)


def _sizes(x: Tensor, taps: Tensor) -> tuple[int, int, int, int, int]:
    """D, H, W, CI, CO."""
    return *x.shape[1:], taps.shape[-1]


def _constants(tile: Tile, x: Tensor, taps: Tensor) -> dict[str, object]:
    return {
        "BI": power_of_two(x.shape[-1]) if taps.ndim == 4 else 0,
        "BD": tile.depth,
        "BH": tile.height,
        "BW": tile.width,
        "BC": tile.channels,
        "K": taps.shape[1],
        "num_warps": tile.warps,
        "num_stages": 2,
        **kernel_types(x),
    }


def kernel_types(x: Tensor) -> dict[str, object]:
    """The dtypes in which kernels add up, and multiply, what they read from x."""
    dot = accumulator(x.dtype) if INTERPRETED else x.dtype  # the interpreter would multiply the bits of bfloat16
    return {"ACC": _TRITON[accumulator(x.dtype)], "DOT": _TRITON[dot]}


def power_of_two(n: int) -> int:
    """The next power of two that a product in the tensor cores accepts."""
    return max(16, triton.next_power_of_2(n))
