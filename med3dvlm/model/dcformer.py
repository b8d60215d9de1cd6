"""DCFormer: a 3D image encoder made of decomposed convolutions.

Notable:
- every spatial convolution is the sum of three one-dimensional ones, along H, W and D, each with its own batch norm;
- five levels of resolution: a stem that shrinks each axis by 4, then four stages that usually halve it;
- a block is one depth-wise decomposed convolution, one point-wise feed-forward part, one scaled residual connection;
- no activation outside the feed-forward part, not even in the stem (published so; docs/decisions.md);
- tensors are channels-last throughout, [B, D, H, W, C]: point-wise layers are linear layers, one-dimensional
  convolutions are 2D ones without a transposition, and token sequences are views;
- this is the reference. `med3dvlm.model.fused` computes the same faster and takes over where it can (`DCFormer.fused`).

Source: "DCFormer: Efficient 3D Vision-Language Modeling with Decomposed Convolutions" (arXiv 2502.05091). The names of
the state dict are those of the published checkpoints. Shapes: B batch, C channels, D slices, H rows, W columns; a prime
marks the value after a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.model.fused import choice

NUM_LEVELS = 5  # stem and four stages


@dataclass(frozen=True)
class Variant:
    """Sizes of one encoder; entries of depths to pool belong to stages 1 to 4.

    Attributes:
        channels: width of each of the five levels, stem first.
        depths: blocks per stage.
        kernels: length of the one-dimensional convolutions per stage, odd.
        mlp_ratios: inner width of the feed-forward part over its outer width.
        pool: whether the stage starts by halving each axis.
        layer_scale: start value of the blocks' layer scale. Nearly 0 (published) starts every block as the identity,
            which long training overcomes; short training wants 1.
    """

    channels: tuple[int, int, int, int, int]
    depths: tuple[int, int, int, int]
    kernels: tuple[int, int, int, int] = (13, 11, 9, 7)
    mlp_ratios: tuple[int, int, int, int] = (4, 4, 4, 4)
    pool: tuple[bool, bool, bool, bool] = (True, True, True, True)
    layer_scale: float = 1e-6


VARIANTS = {
    "nano": Variant((32, 32, 64, 128, 256), (1, 1, 1, 1)),
    "naive": Variant((32, 64, 128, 256, 512), (2, 2, 2, 2)),
    "tiny": Variant((64, 96, 192, 384, 768), (2, 3, 3, 2)),
    "small": Variant((64, 96, 192, 384, 768), (2, 3, 6, 2)),
    "base": Variant((64, 128, 256, 512, 1024), (2, 6, 6, 2)),
    "large": Variant((64, 256, 512, 1024, 2048), (2, 6, 12, 2)),
    # Ours, for phantoms of 32x64x64: stage 1 keeps the stem's resolution, so the last two levels have 32 and 4 tokens.
    "phantom": Variant((16, 32, 64, 96, 128), (1, 1, 1, 1), (3, 3, 3, 3), (2, 4, 4, 4), (False, True, True, True), 1.0),
}


class ConvWithinSlices(nn.Conv3d):
    """A kernel along H or W, run as a 2D convolution of every slice. Weights keep the published axes (H, W, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W, C] -> [B, D', H', W', C']."""
        stride_h, stride_w, stride_d = self.stride
        x = x[:, ::stride_d]  # [B, D', H, W, C]
        images = x.flatten(0, 1).movedim(-1, 1)  # [B * D', C, H, W]
        kernel = self.weight.squeeze(-1)  # [C', C / groups, k, 1] along H, [C', C / groups, 1, k] along W
        images = F.conv2d(images, kernel, self.bias, (stride_h, stride_w), self.padding[:2], groups=self.groups)
        return images.movedim(1, -1).unflatten(0, x.shape[:2])  # [B, D', H', W', C']


class ConvAcrossSlices(nn.Conv3d):
    """A kernel along D, run as a 2D convolution of an image with axes (D, H' * W'). Weights keep the published axes."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W, C] -> [B, D', H', W', C']."""
        stride_h, stride_w, stride_d = self.stride
        x = x[:, :, ::stride_h, ::stride_w]  # [B, D, H', W', C]
        images = x.flatten(2, 3).movedim(-1, 1)  # [B, C, D, H' * W']
        kernel = self.weight.flatten(2).unsqueeze(-1)  # [C', C / groups, k, 1]
        images = F.conv2d(images, kernel, self.bias, (stride_d, 1), (self.padding[2], 0), groups=self.groups)
        return images.movedim(1, -1).unflatten(2, x.shape[2:4])  # [B, D', H', W', C']


class SingleChannelConv(nn.Conv3d):
    """A kernel along any axis of a one-channel volume: here `conv3d` is as fast and rounds as the published one."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W, 1] -> [B, D', H', W', C']."""

        def slices_first(sizes: tuple[int, ...]) -> tuple[int, int, int]:
            return (sizes[2], sizes[0], sizes[1])

        kernel = self.weight.permute(0, 1, 4, 2, 3)  # [C', 1, k_D, k_H, k_W]
        stride, padding = slices_first(self.stride), slices_first(self.padding)
        # The axis of one channel gets the stride that belongs to it: oneDNN has written beyond its memory with others.
        x = x.squeeze(-1).contiguous().unsqueeze(1)  # [B, 1, D, H, W]
        return F.conv3d(x, kernel, self.bias, stride, padding).movedim(1, -1)  # [B, D', H', W', C']


class PointwiseConv(nn.Conv3d):
    """A 1x1x1 convolution, run as a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W, C] -> [B, D, H, W, C']."""
        return F.linear(x, self.weight.flatten(1), self.bias)


def _channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer made for [B, C, D, H, W] to [B, D, H, W, C]; both moves are views."""
    return layer(x.movedim(-1, 1)).movedim(1, -1)


class BatchNorm(nn.BatchNorm3d):
    """Batch norm whose weights may be of lower precision than its statistics, as under DeepSpeed in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, D, H, W] -> [B, C, D, H, W]."""
        if self.weight is None or self.running_mean is None or self.weight.dtype == self.running_mean.dtype:
            return super().forward(x)
        if self.training:
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
        )


class DecomposedConv3d(nn.Module):
    """Sum of three one-dimensional convolutions with batch norm, along H (`c1`), W (`c2`) and D (`c3`)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()

        def branch(conv_class: type[nn.Conv3d], size: tuple[int, int, int]) -> nn.Sequential:
            padding = tuple(n // 2 for n in size)
            conv_class = SingleChannelConv if in_channels == 1 else conv_class
            conv = conv_class(in_channels, out_channels, size, stride, padding, groups=groups)
            return nn.Sequential(conv, BatchNorm(out_channels))

        self.c1 = branch(ConvWithinSlices, (kernel, 1, 1))
        self.c2 = branch(ConvWithinSlices, (1, kernel, 1))
        self.c3 = branch(ConvAcrossSlices, (1, 1, kernel))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W, C] -> [B, D', H', W', C']; every branch is strided along all three axes."""
        along_h, along_w, along_d = (_channels_last(norm, conv(x)) for conv, norm in (self.c1, self.c2, self.c3))
        return along_h + along_w + along_d


class FeedForward(nn.Module):
    """Point-wise expansion, exact GELU, point-wise contraction; channels are the last axis."""

    def __init__(self, channels: int, ratio: int):
        super().__init__()
        # Layer 2 is the published drop-out of probability 0; the published keys count it.
        self.mlp = nn.Sequential(
            nn.Linear(channels, ratio * channels), nn.GELU(), nn.Identity(), nn.Linear(ratio * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Block(nn.Module):
    """x + scale * feed_forward(decomposed_convolution(x)); a stage's first block also changes resolution and width.

    Args:
        in_channels: width of the previous level in the first block of a stage, None in the others.
        pool: halve each axis before anything else (first block only).
    """

    def __init__(
        self,
        channels: int,
        kernel: int,
        mlp_ratio: int,
        layer_scale: float,
        in_channels: int | None = None,
        pool: bool = False,
    ):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), layer_scale))
        self.pool = nn.MaxPool3d(3, stride=2, padding=1) if pool else nn.Identity()
        self.proj = None if in_channels is None else PointwiseConv(in_channels, channels, 1, bias=False)
        self.dwconv = DecomposedConv3d(channels, channels, kernel, groups=channels)
        self.mlp = FeedForward(channels, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W, C] -> [B, D', H', W', C']."""
        if self.proj is not None:
            x = _channels_last(self.pool, x)  # [B, D', H', W', C]
            x = self.proj(x)  # [B, D', H', W', C']
        return x + self.scale * self.mlp(self.dwconv(x))  # [B, D', H', W', C']


class DCFormer(nn.Module):
    """The encoder: a volume in, the token sequences of five levels out.

    Attributes:
        variant: the sizes (`Variant`).
        channels: width of each of the five levels.
        input_size: (H, W, D) that `token_grid` and `num_tokens` answer for; it does not influence the result.
        fused: whether faster code of equal results takes over: "cpu", "auto" or "off" (`med3dvlm.model.fused.choice`).
    """

    fused = "cpu"

    def __init__(self, variant: Variant, input_size: tuple[int, int, int] = (256, 256, 128)):
        super().__init__()
        self.variant = variant
        self.channels = variant.channels
        self.input_size = tuple(input_size)
        self.fused_cache: dict[torch.dtype, choice.Cache] = {}  # weights folded for inference
        self.encoder = nn.ModuleDict({"s0": _stem(variant.channels[0])})
        for stage in range(1, NUM_LEVELS):
            self.encoder[f"s{stage}"] = _stage(variant, stage)
        self.built = choice.forms_of(self)

    @classmethod
    def from_variant(cls, name: str, input_size: tuple[int, int, int] = (256, 256, 128)) -> DCFormer:
        """Build a variant by name for volumes of input_size (H, W, D); ValueError for a name not in `VARIANTS`."""
        if name not in VARIANTS:
            raise ValueError(f"unknown DCFormer variant {name!r}; known: {', '.join(VARIANTS)}")
        return cls(VARIANTS[name], input_size)

    def token_grid(self, level: int) -> tuple[int, int, int]:
        """(D', H', W') of the tokens of one level, an index of the hidden states, for volumes of `input_size`."""
        height, width, depth = self.input_size
        grid = [(n - 1) // 4 + 1 for n in (depth, height, width)]
        for pooled in self.variant.pool[: range(NUM_LEVELS)[level]]:
            grid = [(n - 1) // 2 + 1 for n in grid] if pooled else grid
        return tuple(grid)

    def num_tokens(self, level: int) -> int:
        """Length of the token sequence of one level for volumes of `input_size`."""
        return math.prod(self.token_grid(level))

    def forward(self, volume: Tensor) -> list[Tensor]:
        """Encode volumes.

        Args:
            volume: [B, 1, D, H, W] in [0, 1]; any size is accepted.
        Returns:
            Five hidden states [B, D' * H' * W', C], from the stem to the last stage, D' slowest and W' fastest.
        Raises:
            ValueError: the volume is not [B, 1, D, H, W].
        """
        if volume.ndim != 5 or volume.shape[1] != 1:
            raise ValueError(f"expected volumes [B, 1, D, H, W], found shape {tuple(volume.shape)}")
        return (choice.choose(self, volume) or self._plain)(volume)

    def _plain(self, volume: Tensor) -> list[Tensor]:
        """The definition of the encoder, step by step."""
        x = volume.movedim(1, -1)  # [B, D, H, W, 1]
        hidden_states = []
        for stage in self.encoder.values():
            x = stage(x)  # [B, D', H', W', C]
            hidden_states.append(x.flatten(1, 3))  # [B, D' * H' * W', C]
        return hidden_states

    def train(self, mode: bool = True) -> DCFormer:
        """As in torch. Weights may have changed unseen (by way of `.data`) where the mode changes: folded ones go."""
        if mode != self.training:
            self.fused_cache = {}
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):  # .to(), .half(), .cuda(), ...
        super()._apply(fn, recurse)
        choice.drop_stale(self)
        return self

    def __getstate__(self) -> dict:
        return self.__dict__ | {"fused_cache": {}}  # copies and pickles hold no folded weights


def _stem(channels: int) -> nn.Sequential:
    """[B, D, H, W, 1] -> [B, D / 4, H / 4, W / 4, C]: one strided layer and three that keep the size."""
    layers = [DecomposedConv3d(1, channels, kernel=7, stride=4)]
    layers += [DecomposedConv3d(channels, channels, kernel=3) for _ in range(3)]
    return nn.Sequential(nn.Sequential(*layers))  # nested, as a stage with one block: keys s0.0.<layer>


def _stage(variant: Variant, stage: int) -> nn.Sequential:
    """Blocks of stage 1 to 4; the first one changes resolution and width."""
    sizes = (variant.channels[stage], variant.kernels[stage - 1], variant.mlp_ratios[stage - 1], variant.layer_scale)
    first = Block(*sizes, in_channels=variant.channels[stage - 1], pool=variant.pool[stage - 1])
    return nn.Sequential(first, *[Block(*sizes) for _ in range(variant.depths[stage - 1] - 1)])
