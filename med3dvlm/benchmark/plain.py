"""DCFormer as its definition reads: what the fast paths are timed against and, in tests, held equal to.

One `conv3d` for each branch, a batch norm after each, two additions, tensors [B, C, D, H, W], nothing folded or shared:
the published formulation run eagerly. Only the axis order of the kernels is ours (D, H, W instead of H, W, D), which
makes the token sequences cheaper and this baseline faster: with the published order it took 501 instead of 427 ms.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.model.dcformer import Block, DCFormer, DecomposedConv3d


def plain_hidden_states(encoder: DCFormer, volume: Tensor) -> list[Tensor]:
    """[B, 1, D, H, W] -> five hidden states [B, D' * H' * W', C], from the encoder's weights and in its mode."""
    x, hidden_states = volume, []  # [B, C, D, H, W]
    for layers in encoder.encoder.values():
        layers = layers[0] if isinstance(layers[0], nn.Sequential) else layers  # the stem is nested once more
        for layer in layers:
            x = _block(layer, x) if isinstance(layer, Block) else _decomposed(layer, x)
        hidden_states.append(x.flatten(2).transpose(1, 2))
    return hidden_states


def _decomposed(layer: DecomposedConv3d, x: Tensor) -> Tensor:
    """[B, C, D, H, W] -> [B, C', D', H', W']."""
    along_h, along_w, along_d = (norm(_conv(conv, x)) for conv, norm in (layer.c1, layer.c2, layer.c3))
    return along_h + along_w + along_d


def _conv(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution whose weights have the axes (H, W, D), on [B, C, D, H, W]."""
    stride, padding = (sizes[2:] + sizes[:2] for sizes in (conv.stride, conv.padding))
    return F.conv3d(x, conv.weight.permute(0, 1, 4, 2, 3), conv.bias, stride, padding, groups=conv.groups)


def _block(block: Block, x: Tensor) -> Tensor:
    """[B, C, D, H, W] -> [B, C', D', H', W']."""
    if block.proj is not None:
        x = _conv(block.proj, block.pool(x))
    tokens = _decomposed(block.dwconv, x).movedim(1, -1)  # [B, D', H', W', C']
    return x + (block.scale * block.mlp(tokens)).movedim(-1, 1)
