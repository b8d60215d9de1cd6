"""DCFormer as its definition reads: what the fast paths are timed against and, in tests, held equal to.

One `conv3d` for each branch, a batch norm after each, two additions, channels first, nothing folded or shared, run
eagerly. `published_hidden_states` has the published axis order H, W, D as well; `plain_hidden_states` has D, H, W, in
which the same convolutions are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.model.dcformer import Block, DCFormer, DecomposedConv3d

Convolve = Callable[[nn.Conv3d, Tensor], Tensor]


def plain_hidden_states(encoder: DCFormer, volume: Tensor) -> list[Tensor]:
    """[B, 1, D, H, W] -> five hidden states [B, D' * H' * W', C], from the encoder's weights and in its mode."""
    return [x.flatten(2).transpose(1, 2) for x in _levels(encoder, volume, _depth_first)]


def published_hidden_states(encoder: DCFormer, volume: Tensor) -> list[Tensor]:
    """The same by way of tensors [B, C, H, W, D]."""
    levels = _levels(encoder, volume.movedim(2, -1).contiguous(), _depth_last)
    return [x.movedim(-1, 2).movedim(1, -1).flatten(1, 3) for x in levels]


def _depth_first(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution whose weights have the axes (H, W, D), on [B, C, D, H, W]."""
    stride, padding = (sizes[2:] + sizes[:2] for sizes in (conv.stride, conv.padding))
    return F.conv3d(x, conv.weight.permute(0, 1, 4, 2, 3), conv.bias, stride, padding, groups=conv.groups)


def _depth_last(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution, its weights as they are, on [B, C, H, W, D]."""
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)


def _levels(encoder: DCFormer, x: Tensor, convolve: Convolve) -> Iterator[Tensor]:
    """[B, 1, ...] -> [B, C, ...] after each level; the order of the three axes is that of `convolve`.

    A generator: where states are laid out only after the last level, gradients meet in another layout, and a backward
    pass takes 15% longer.
    """
    for layers in encoder.encoder.values():
        layers = layers[0] if isinstance(layers[0], nn.Sequential) else layers  # the stem is nested once more
        for layer in layers:
            x = (_block if isinstance(layer, Block) else _decomposed)(layer, x, convolve)
        yield x


def _decomposed(layer: DecomposedConv3d, x: Tensor, convolve: Convolve) -> Tensor:
    """[B, C, ...] -> [B, C', ...]."""
    along_h, along_w, along_d = (norm(convolve(conv, x)) for conv, norm in (layer.c1, layer.c2, layer.c3))
    return along_h + along_w + along_d


def _block(block: Block, x: Tensor, convolve: Convolve) -> Tensor:
    """[B, C, ...] -> [B, C', ...]."""
    if block.proj is not None:
        x = convolve(block.proj, block.pool(x))
    tokens = _decomposed(block.dwconv, x, convolve).movedim(1, -1)  # [B, ..., C']
    return x + (block.scale * block.mlp(tokens)).movedim(-1, 1)
