"""The feed-forward part of a block on a GPU, x + scale * contract(gelu(expand(y))), with its gradients.

With C channels and R = 4 C inner values, cuBLAS and compiled point-wise operations move 42 C bytes a position in bf16,
because the inner values pass over memory three times; reading x and y and writing the result are 6 C. At 16 C * C FLOP
a position, memory is the limit below C of about 800 on an H100. In the widths where the sums of all channels fit into
registers (`WIDEST`), one Triton kernel keeps the inner values on the chip. It is one of the ways that are timed, the
libraries being another. For the backward pass y is kept there, and the inner values are computed again.

Shapes: P positions, C channels, R inner values; x, y [P, C].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from med3dvlm.model.fused import triton_kernels as kernels
from med3dvlm.model.fused.first_order import first_order
from med3dvlm.model.fused.triton_sums import kernel_types, power_of_two
from med3dvlm.model.fused.triton_tuning import compiled_for, tuned

WIDEST = 256  # channels


class Tile(NamedTuple):
    """What one program of the kernel computes at a time: positions, inner values; its warps and loads ahead."""

    positions: int
    inner: int
    warps: int
    stages: int


WAYS = [None, Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 64, 4, 2), Tile(128, 32, 8, 2)]  # None: by libraries


class Mlp(NamedTuple):
    """Weights as the kernel wants them: those of both products in the dtype of y, the layer scale in that of sums."""

    expand: Tensor  # [R, C]
    expand_bias: Tensor  # [R]
    contract: Tensor  # [C, R]
    contract_bias: Tensor  # [C]
    scale: Tensor  # [C]


def feed_forward(x: Tensor, y: Tensor, mlp: Mlp) -> Tensor:
    """[.., C] twice -> [.., C] in the dtype of x."""
    rows = x.flatten(0, -2).contiguous(), y.flatten(0, -2).contiguous()  # [P, C]
    width = x.shape[-1]
    run = FeedForward.apply if width <= WIDEST else compiled_for(y, by_libraries, width)
    return run(*rows, *mlp).view(x.shape)


def by_libraries(
    x: Tensor, y: Tensor, expand: Tensor, expand_bias: Tensor, contract: Tensor, contract_bias: Tensor, scale: Tensor
) -> Tensor:
    """[P, C] twice -> [P, C]."""
    inner = F.gelu(F.linear(y, expand, expand_bias))  # [P, R]
    return (x + scale * F.linear(inner, contract, contract_bias)).to(x.dtype)


class FeedForward(torch.autograd.Function):
    """As `by_libraries`, in the fastest way; y is all that is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, *mlp: Tensor) -> Tensor:
        ctx.save_for_backward(y, *mlp)

        def run(tile: Tile | None) -> Tensor:
            if tile is None:
                return compiled_for(y, by_libraries, y.shape[1])(x, y, *mlp)
            out, grid = torch.empty_like(x), (triton.cdiv(len(x), tile.positions),)
            constants = {"BP": tile.positions, "BC": power_of_two(y.shape[1]), "BR": tile.inner, **kernel_types(y)}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            kernels.feed_forward_kernel[grid](x, y, *mlp, out, *y.shape, len(mlp[0]), **constants, **options)
            return out

        return tuned("feed_forward", y, mlp[0], WAYS, run)

    @first_order
    def backward(ctx, dout: Tensor):
        y, *mlp = ctx.saved_tensors
        return dout, *compiled_for(y, gradients, y.shape[1])(dout, y, *mlp)


def gradients(
    dout: Tensor, y: Tensor, expand: Tensor, expand_bias: Tensor, contract: Tensor, contract_bias: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """Those of y and the weights, in this order, from that of the result."""
    inner = F.linear(y, expand, expand_bias)  # [P, R]
    product = dout.to(y.dtype).T @ F.gelu(inner)  # [C, R], for the gradients of `contract` and of the scale
    total = dout.sum(0, dtype=scale.dtype)  # [C]
    d_scale = (product * contract).sum(1, dtype=scale.dtype) + total * contract_bias
    d_inner = torch.ops.aten.gelu_backward((dout * scale).to(y.dtype) @ contract, inner)  # [P, R]
    d_contract = (scale[:, None] * product).to(y.dtype)
    return d_inner @ expand, d_inner.T @ y, d_inner.sum(0), d_contract, (scale * total).to(y.dtype), d_scale
