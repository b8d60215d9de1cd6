"""The encoder for training: fewer passes over memory, less kept for the backward pass, the same gradients.

Against the plain formulation:
- the stem's first two layers are one, as in inference; the statistics of their batch norms follow from the second
  moments of the 20 columns (`moments`), the gradients of their weights from those of the composed kernels;
- a sum of three normalised branches is one node of the graph, which keeps its input and the branches' outputs, or in a
  block the input alone: depth-wise convolutions are cheap to repeat;
- the feed-forward part keeps its inner values before GELU, not those after;
- max pooling keeps its places in 8 or 32 bits, and not its input;
- convolutions, batch norms and the feed-forward part are C++ kernels where there are some (`native`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from med3dvlm.model.fused import feed_forward, moments, stem
from med3dvlm.model.fused.axes import AXES, AxisSum, batch_norms, convolutions
from med3dvlm.model.fused.branches import (
    PARAMETERS,
    Branches,
    branches_of,
    kernel_gradient,
    parameters_of,
    transposed,
    update_running,
)
from med3dvlm.model.fused.first_order import first_order
from med3dvlm.model.fused.inference import through_stages
from med3dvlm.model.fused.native import kernels as native


def encode(encoder: nn.Module, dtype: torch.dtype, volume: Tensor) -> list[Tensor]:
    """[B, 1, D, H, W] -> five hidden states [B, D' * H' * W', C] in training mode, the convolutions in `dtype`."""
    with torch.autocast("cpu", enabled=False):
        first, second, *others = encoder.encoder["s0"][0]
        x = stem_start(first, second, stem.columns(volume, dtype))  # [B, D', H', W', C]
        x = DenseLayers.apply(x, others, *(p for layer in others for p in parameters_of(layer, dtype)))
        stages = list(encoder.encoder.values())[1:]
        return through_stages(x, ([partial(run_block, block, dtype) for block in blocks] for blocks in stages))


def stem_start(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """The stem's first two layers over its columns: [B, D', H', W', 20] -> [B, D', H', W', C]."""
    count, of_columns = x[..., 0].numel(), moments.along_axes(x)
    rows = stem.tap_rows(first)  # [C, 20] per axis
    stats = {axis: moments.of_products(rows[axis], of_columns.mean, of_columns.second) for axis in AXES}
    matrix = stem.first_layer(rows, batch_affine(first, stats, count))  # [C, 20]
    kernels = stem.second_layer(second, matrix)  # [C', 20, 3] per axis
    for axis, kernel in kernels.items():
        rows = kernel.transpose(1, 2).flatten(1)  # [C', 3 * 20]
        stats[axis] = moments.of_products(rows, of_columns.shifted_mean[axis], of_columns.shifted_second[axis])
    kernels = stem.constant_into_columns(*stem.normalised(kernels, batch_affine(second, stats, count)))
    return SumOfConvolutions.apply(x, *(kernels[axis].to(x.dtype) for axis in AXES))


def batch_affine(layer: nn.Module, stats: dict[str, tuple[Tensor, Tensor]], count: int) -> dict[str, stem.Affine]:
    """A layer's batch norms with the mean and variance [C] of the batch, which their running statistics also see."""
    means, variances = zip(*(stats[axis] for axis in AXES), strict=True)
    update_running(layer, [mean.detach() for mean in means], [var.detach() for var in variances], count)
    affine, convs = {}, convolutions(layer)
    for axis, norm in batch_norms(layer).items():
        mean, var = stats[axis]
        # The bias is taken away again by the batch norm: its gradient is 0, but not none.
        affine[axis] = stem.affine_of(norm, 0 * convs[axis].bias.to(var.dtype), mean, var)
    return affine


def run_block(block: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    """[B, D, H, W, C] -> [B, D', H', W', C'] in the residual stream's dtype, that of the plain code."""
    if block.proj is not None:
        x = x.to(dtype)
        if isinstance(block.pool, nn.MaxPool3d):
            x = MaxPool.apply(x)  # [B, D', H', W', C]
        x = Project.apply(x, block.proj.weight.flatten(1).to(dtype))  # [B, D', H', W', C']
        x = x.to(torch.promote_types(dtype, block.scale.dtype))
    expand, contract = block.mlp.mlp[0], block.mlp.mlp[3]
    mlp = (expand.weight, expand.bias, contract.weight, contract.bias)
    return ResidualBlock.apply(x, block.dwconv, block.scale, *mlp, *parameters_of(block.dwconv, dtype))


def normalise(
    branches: Branches, x: Tensor, layer: nn.Module
) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """[B, D, H, W, C] -> branch outputs, the sum of their batch norms [B, D, H, W, C'], and (mean, 1 / std) [3, C']."""
    z, mean, var = branches.measure(x)
    update_running(layer, mean, var, x[..., 0].numel())
    inverse_std = (var + batch_norms(layer)["h"].eps).rsqrt()
    return z, branches.normalised_sum(z, mean, inverse_std), (mean, inverse_std)


def _kept(ctx) -> list[Tensor]:
    """What a forward pass has saved; hooks that keep it elsewhere may have brought it back in another layout."""
    return [tensor.contiguous() for tensor in ctx.saved_tensors]


class SumOfConvolutions(torch.autograd.Function):
    """[B, D, H, W, C] and three kernels [C', C, k] -> [B, D, H, W, C']."""

    @staticmethod
    def forward(ctx, x: Tensor, *kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, *kernels)
        return AxisSum(dict(zip(AXES, kernels, strict=True)), None, native.multiplied(x.dtype))(x)

    @first_order
    def backward(ctx, dy: Tensor):
        x, *kernels = _kept(ctx)
        kernels, dy, dx = dict(zip(AXES, kernels, strict=True)), dy.contiguous(), None
        if ctx.needs_input_grad[0]:
            dx = AxisSum({axis: transposed(kernel) for axis, kernel in kernels.items()}, None, dy.dtype)(dy)
        gradients = (kernel_gradient(dy, x, kernel, axis) for axis, kernel in kernels.items())
        if native.take(x.dtype, kernels["h"], groups=1):
            gradients = (native.kernel_gradient(x, dy, kernel, axis) for axis, kernel in kernels.items())
        return dx, *gradients


class DenseLayers(torch.autograd.Function):
    """The stem's later layers, of which `layers` give what is no tensor: [B, D, H, W, C] -> [B, D, H, W, C].

    Of what lies between two layers nothing is kept: it is the normalised sum of branch outputs that are.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layers: list[nn.Module], *parameters: Tensor) -> Tensor:
        kept = [x]
        for layer, branches in zip(layers, _each(parameters), strict=True):
            z, x, stats = normalise(branches, x, layer)
            kept += [*z.values(), *stats]
        ctx.save_for_backward(*kept, *parameters)
        ctx.kept = len(kept)
        return x

    @first_order
    def backward(ctx, dx: Tensor):
        saved, steps = _kept(ctx), []  # asked for once, as gradient checkpointing wants it
        x, *kept = saved[: ctx.kept]
        for i, branches in enumerate(_each(saved[ctx.kept :])):
            z_h, z_w, z_d, *stats = kept[5 * i : 5 * i + 5]
            steps.append((branches, x, {"h": z_h, "w": z_w, "d": z_d}, stats))
            x = branches.normalised_sum(steps[-1][2], *stats) if 5 * i + 5 < len(kept) else None
        gradients = []
        for branches, x, z, stats in reversed(steps):
            dx, ours = branches.backward(dx.contiguous(), x, z, *stats)
            gradients = [*ours, *gradients]
        return dx, None, *gradients


def _each(parameters: tuple[Tensor, ...]) -> list[Branches]:
    """Dense layers one after the other, from their parameters in a row."""
    return [branches_of(1, parameters[i : i + PARAMETERS]) for i in range(0, len(parameters), PARAMETERS)]


class MaxPool(torch.autograd.Function):
    """Max pooling that halves each axis: [B, D, H, W, C] -> [B, D', H', W', C]. Which inputs it chose is kept."""

    WINDOW = ([3, 3, 3], [2, 2, 2], [1, 1, 1])  # size, stride, padding

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        if native.take_dtype(x.dtype):
            pooled, places = native.max_pool_with_places(x)
        else:
            pooled, places = torch.ops.aten.max_pool3d_with_indices(x.movedim(-1, 1), *MaxPool.WINDOW)
            pooled, places = pooled.movedim(1, -1).contiguous(), places.to(torch.int32)
        ctx.shape = x.shape
        ctx.save_for_backward(places)
        return pooled  # [B, D', H', W', C]

    @first_order
    def backward(ctx, dy: Tensor):
        (places,) = _kept(ctx)
        if places.dtype == torch.uint8:
            return native.max_pool_gradient(dy.contiguous(), places, ctx.shape)
        shaped = dy.new_empty(ctx.shape).movedim(-1, 1)  # stands for the input, of which only the shape is used
        dx = torch.ops.aten.max_pool3d_with_indices_backward(
            dy.movedim(-1, 1), shaped, *MaxPool.WINDOW, [1, 1, 1], False, places.to(torch.int64)
        )
        return dx.movedim(1, -1)


class Project(torch.autograd.Function):
    """A point-wise layer with weight [C', C], which keeps its input in the dtype that it has: [.., C] -> [.., C']."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return feed_forward.linear(x, weight)

    @first_order
    def backward(ctx, dy: Tensor):
        return feed_forward.linear_gradients(dy, *_kept(ctx))


class ResidualBlock(torch.autograd.Function):
    """x + scale * contract(gelu(expand(normalised branches of x))): [B, D, H, W, C] -> [B, D, H, W, C]."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module, scale: Tensor, *parameters: Tensor) -> Tensor:
        mlp, branches = parameters[:4], branches_of(len(scale), parameters[4:])
        source = x.to(branches.kernels["h"].dtype)
        _, y, stats = normalise(branches, source, layer)
        out, inner = feed_forward.forward(x, y, scale, mlp)
        ctx.save_for_backward(source, inner, *stats, scale, *parameters)
        return out

    @first_order
    def backward(ctx, dy: Tensor):
        source, inner, mean, inverse_std, scale, *parameters = _kept(ctx)
        mlp, branches = parameters[:4], branches_of(len(scale), parameters[4:])
        z, dy = branches.convolve(source), dy.contiguous()
        y = branches.normalised_sum(z, mean, inverse_std)
        d_branches, d_scale, d_mlp = feed_forward.backward(dy, y, inner, scale, mlp)
        dx, gradients = branches.backward(d_branches.reshape(source.shape), source, z, mean, inverse_std)
        return dy + dx, None, d_scale.to(scale.dtype), *d_mlp, *gradients
