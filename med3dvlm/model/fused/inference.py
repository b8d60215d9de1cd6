"""The encoder for inference: batch norms folded into the kernels, additions and activations into the convolutions.

Against the plain formulation: the stem's layers are one (`fourier`; without the C++ kernels of `native`, or for small
volumes, the first two are, `stem`), the three centre taps of a dense layer are one tap, a sum of three branches is one
buffer to which each convolution adds, GELU and layer scale and the residual connection belong to the point-wise layers.
Results differ from the plain ones by rounding only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from med3dvlm.model.fused import feed_forward, fourier, stem
from med3dvlm.model.fused.axes import AXES, AxisSum, kernels_of
from med3dvlm.model.fused.native import kernels as native


class FoldedBlock:
    """x + scale * contract(gelu(expand(decomposed_convolution(x))))."""

    def __init__(self, block: nn.Module, dtype: torch.dtype):
        self.pool = pooling(block, dtype)
        self.proj = None if block.proj is None else feed_forward.pointwise(block.proj.weight.flatten(1), None, dtype)
        self.dwconv = depthwise(*folded_branches(block.dwconv), dtype)
        self.feed_forward = feed_forward.folded(block, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, D, H, W, C] -> [B, D', H', W', C'], a new tensor in a stage's first block and x itself in the others."""
        if self.proj is not None:
            x = self.pool(x)  # [B, D', H', W', C]
            x = self.proj(x.flatten(1, 2)).unflatten(1, x.shape[1:3])  # [B, D', H', W', C']
        self.feed_forward.add_to(x, self.dwconv(x))
        return x


class FoldedStem:
    """The stem's four layers, folded in the form that suits a volume when the first such volume comes."""

    def __init__(self, layers: nn.Sequential, dtype: torch.dtype):
        self.layers, self.dtype = layers, dtype

    def __call__(self, volume: Tensor) -> Tensor:
        """[B, 1, D, H, W] -> [B, D', H', W', C]."""
        channels = len(self.layers[0].c1[0].weight)
        return (self.as_one if fourier.pays(volume, self.dtype, channels) else self.as_three)(volume)

    @functools.cached_property
    def as_one(self) -> fourier.FourierStem:
        return fourier.FourierStem(self.layers, self.dtype)

    @functools.cached_property
    def as_three(self) -> LayeredStem:
        return LayeredStem(self.layers, self.dtype)


class LayeredStem:
    """Three layers instead of four, the first over `stem.columns`."""

    def __init__(self, layers: nn.Sequential, dtype: torch.dtype):
        first = stem.first_layer(stem.tap_rows(layers[0]), stem.running_affine(layers[0]))
        kernels, bias = stem.normalised(stem.second_layer(layers[1], first), stem.running_affine(layers[1]))
        self.dtype, self.multiplied = dtype, native.multiplied(dtype)
        self.layers = [AxisSum(stem.constant_into_columns(kernels, bias), None, self.multiplied)]
        self.layers += [AxisSum(*folded_branches(layer), self.multiplied) for layer in layers[2:]]

    def __call__(self, volume: Tensor) -> Tensor:
        """[B, 1, D, H, W] -> [B, D', H', W', C]."""
        x = stem.columns(volume, self.multiplied)  # [B, D', H', W', 20]
        for layer in self.layers:
            x = layer(x)  # [B, D', H', W', C]
        return x.to(self.dtype)


def pooling(block: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What a stage's first block does to [B, D, H, W, C] before its projection."""
    if isinstance(block.pool, nn.Identity):
        return block.pool
    return native.max_pool if native.take_dtype(dtype) else max_pool


def max_pool(x: Tensor) -> Tensor:
    """Max pooling over 3x3x3 places, stride 2, padding 1, axis by axis: [B, D, H, W, C] -> [B, D', H', W', C]."""
    for axis in (1, 2, 3):
        lines = x.movedim(axis, 0)
        even, odd = lines[::2], lines[1::2]
        y = torch.maximum(even[: len(odd)], odd)
        y = y if len(y) == len(even) else torch.cat([y, even[len(odd) :]])
        torch.maximum(y[1:], odd[: len(y) - 1], out=y[1:])
        x = y.movedim(0, axis)
    return x.contiguous()


def depthwise(kernels: dict[str, Tensor], bias: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The sum of three depth-wise convolutions with kernels [C, 1, k] per axis: [B, D, H, W, C] -> like it."""
    if native.take(dtype, kernels["w"], groups=len(bias)):
        taps = torch.stack([native.prepare(kernels[axis]) for axis in AXES])  # [3, k, C]
        return functools.partial(native.depthwise_sum, taps=taps, bias=bias.float())
    return AxisSum(kernels, bias, dtype, groups=len(bias))


class FoldedEncoder:
    """What inference needs of a `DCFormer`, folded once from its present weights and running statistics.

    Args:
        encoder: the plain module.
        dtype: of the arithmetic, float32 or bfloat16 (float64 for tests). Without C++ kernels float32 takes the place
            of a bfloat16 that the processor does not multiply.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype):
        dtype = dtype if native.take_dtype(dtype) else native.multiplied(dtype)
        self.stem = FoldedStem(encoder.encoder["s0"][0], dtype)
        self.stages = [
            [FoldedBlock(block, dtype) for block in encoder.encoder[name]] for name in encoder.encoder if name != "s0"
        ]

    def __call__(self, volume: Tensor) -> list[Tensor]:
        """[B, 1, D, H, W] -> five hidden states [B, D' * H' * W', C] in the dtype of the arithmetic."""
        return through_stages(self.stem(volume), self.stages)


def through_stages(x: Tensor, stages: Iterable[Iterable[Callable[[Tensor], Tensor]]]) -> list[Tensor]:
    """The stem's result [B, D', H', W', C] and the blocks of each stage -> hidden states [B, D' * H' * W', C]."""
    hidden_states = [x]
    for blocks in stages:
        for block in blocks:
            x = block(x)  # [B, D', H', W', C]
        hidden_states.append(x)
    return [state.flatten(1, 3) for state in hidden_states]


def folded_branches(layer: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """A decomposed layer with its batch norms folded: kernels [C', C / groups, k] per axis, bias [C'], float64."""
    kernels = {axis: kernel.double() for axis, kernel in kernels_of(layer).items()}
    return stem.normalised(kernels, stem.running_affine(layer))
