"""The encoder on a GPU: the composed stem and all decomposed convolutions in Triton, the rest by `torch.compile`.

The same algebra as on a CPU (`stem`): the stem's first two layers are one dense layer over 20 columns, batch norms are
folded into taps, three branches are one pass, and so is the feed-forward part of the narrower levels
(`triton_feed_forward`). Other products stay with cuBLAS, pooling with torch, and the compiler fuses point-wise parts.
On a CPU, where the kernels run in Triton's interpreter for tests, nothing is compiled.

Shapes: B batch, D, H, W a level's grid, C channels; axes in the order h, w, d.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.model.fused import moments, stem
from med3dvlm.model.fused.axes import AXES, batch_norms, convolutions, kernels_of
from med3dvlm.model.fused.branches import update_running
from med3dvlm.model.fused.inference import folded_branches, through_stages
from med3dvlm.model.fused.training import batch_affine
from med3dvlm.model.fused.triton_feed_forward import Mlp, feed_forward
from med3dvlm.model.fused.triton_sums import NormalisedSum, accumulator, axis_sum, for_kernels, merge_centres
from med3dvlm.model.fused.triton_tuning import compiled_for

SAMPLES = 8  # whose columns are held in float64 at a time


class FoldedSum:
    """A decomposed convolution with its batch norms folded.

    Args:
        kernels: [C', C / groups, k] per axis.
        bias: [C'].
        dtype: of the arithmetic.
    """

    def __init__(self, kernels: dict[str, Tensor], bias: Tensor, dtype: torch.dtype):
        self.taps = for_kernels(merge_centres(stacked(kernels)), dtype)
        self.bias = bias.to(accumulator(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """[B, D, H, W, C] -> [B, D, H, W, C']."""
        x = x.contiguous()
        return axis_sum((x, x, x), self.taps, self.bias, centres=False)


class FoldedEncoder:
    """What inference needs of a `DCFormer`, folded once from its present weights and running statistics.

    Args:
        encoder: the plain module.
        dtype: of the arithmetic.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        first, second, *others = encoder.encoder["s0"][0]
        matrix = stem.first_layer(stem.tap_rows(first), stem.running_affine(first))
        composed = stem.normalised(stem.second_layer(second, matrix), stem.running_affine(second))
        self.stem = [FoldedSum(*composed, dtype), *(FoldedSum(*folded_branches(layer), dtype) for layer in others)]
        stages = [encoder.encoder[name] for name in encoder.encoder if name != "s0"]
        self.stages = [[self._folded(block) for block in blocks] for blocks in stages]

    def _folded(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        mix = FoldedSum(*folded_branches(block.dwconv), self.dtype)
        proj = None if block.proj is None else block.proj.weight.flatten(1).to(self.dtype)
        return partial(run_block, block.pool, proj, mix, weights_of(block, self.dtype), self.dtype)

    def __call__(self, volume: Tensor) -> list[Tensor]:
        """[B, 1, D, H, W] -> five hidden states [B, D' * H' * W', C] in `dtype`."""
        x = compiled_for(volume, stem.columns)(volume, self.dtype)  # [B, D', H', W', 20]
        for layer in self.stem:
            x = layer(x)  # [B, D', H', W', C]
        return through_stages(x, self.stages)


def encode(encoder: nn.Module, dtype: torch.dtype, volume: Tensor) -> list[Tensor]:
    """[B, 1, D, H, W] -> five hidden states [B, D' * H' * W', C] in training mode; running statistics are updated."""
    with torch.autocast(volume.device.type, enabled=False):
        first, second, *others = encoder.encoder["s0"][0]
        x = compiled_for(volume, stem.columns)(volume, dtype)  # [B, D', H', W', 20]
        x = normalised(second, x, composed_kernels(first, second, x))  # [B, D', H', W', C]
        for layer in others:
            x = normalised(layer, x, kernels_of(layer))
        stages = list(encoder.encoder.values())[1:]
        return through_stages(x, ([partial(train_block, block, dtype) for block in blocks] for blocks in stages))


def train_block(block: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    """[B, D, H, W, C] -> [B, D', H', W', C'] with batch statistics; convolutions and products in `dtype`."""

    def mix(x: Tensor) -> Tensor:
        return normalised(block.dwconv, x.to(dtype), kernels_of(block.dwconv))

    proj = None if block.proj is None else block.proj.weight.flatten(1).to(dtype)
    residual_dtype = torch.promote_types(dtype, block.scale.dtype)  # as in the plain code
    return run_block(block.pool, proj, mix, weights_of(block, dtype), residual_dtype, x)


def run_block(
    pool: nn.Module,
    proj: Tensor | None,
    mix: Callable[[Tensor], Tensor],
    mlp: Mlp,
    residual_dtype: torch.dtype,
    x: Tensor,
) -> Tensor:
    """[B, D, H, W, C] -> [B, D', H', W', C']; `mix` is the decomposed convolution."""
    if proj is not None:
        x = pool(x.to(proj.dtype).movedim(-1, 1)).movedim(1, -1)  # [B, D', H', W', C]
        x = F.linear(x, proj).to(residual_dtype)  # [B, D', H', W', C']
    return feed_forward(x, mix(x), mlp)


def weights_of(block: nn.Module, dtype: torch.dtype) -> Mlp:
    """The feed-forward part's weights, its products in `dtype`."""
    expand, contract = block.mlp.mlp[0], block.mlp.mlp[3]
    tensors = (tensor.to(dtype) for tensor in (expand.weight, expand.bias, contract.weight, contract.bias))
    return Mlp(*tensors, block.scale.to(accumulator(dtype)))


def normalised(layer: nn.Module, x: Tensor, kernels: dict[str, Tensor]) -> Tensor:
    """A decomposed layer with batch statistics and these kernels: [B, D, H, W, C] -> [B, D, H, W, C']."""
    norms, kept = batch_norms(layer), accumulator(x.dtype)
    weight = torch.stack([norms[axis].weight for axis in AXES]).to(kept)
    # A bias in front of a batch norm has no effect. It takes part, so that its gradient is 0 and not missing.
    biases = torch.stack([convolutions(layer)[axis].bias for axis in AXES]).to(kept)
    shift = torch.stack([norms[axis].bias for axis in AXES]).to(kept) + 0 * biases
    y, mean, var = NormalisedSum.apply(x.contiguous(), stacked(kernels).to(kept), weight, shift)
    update_running(layer, mean, var, x[..., 0].numel())
    return y


def composed_kernels(first: nn.Module, second: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The kernels of the stem's first two layers as one, over the columns x [B, D', H', W', 20] of a batch."""
    count = x[..., 0].numel()
    mean, square = 0, 0
    for part in x.split(SAMPLES):
        part = part.double().flatten(0, 3)  # [P, 20]
        mean = mean + part.sum(0) / count
        square = square + moments.product(part, part) / count
    rows = stem.tap_rows(first)  # [C, 20] per axis, float64
    affine = batch_affine(first, {axis: moments.of_products(rows[axis], mean, square) for axis in AXES}, count)
    return stem.second_layer(second, stem.first_layer(rows, affine))


def stacked(kernels: dict[str, Tensor]) -> Tensor:
    """Kernels [C', C / groups, k] per axis -> taps [3, k, C, C'], depth-wise [3, k, C]."""
    taps = torch.stack([kernels[axis].permute(2, 1, 0) for axis in AXES])
    return taps[:, :, 0] if taps.shape[2] == 1 else taps
