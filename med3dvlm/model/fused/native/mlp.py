"""The C++ kernels of a feed-forward part on tensors: contiguous, float32 or bfloat16, channels a multiple of 16."""

from __future__ import annotations

import torch
from torch import Tensor

from med3dvlm.model.fused.native.calls import call, places_and_channels
from med3dvlm.model.fused.native.kernels import in_pairs

PANEL = 64  # columns of a panel of weights, as in feed_forward.cpp


def panels(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] of a linear layer of rows in `dtype`, as read fastest: [N / 64, K, 64] float32, zeros after N.

    Where bfloat16 is multiplied in pairs, [N / 64, K / 2, 64, 2] of it, so that neighbours along K lie side by side.
    """
    (count, length), last = weight.shape, (PANEL, 2) if in_pairs(dtype) else (PANEL,)
    factor = dtype if in_pairs(dtype) else torch.float32
    packed = weight.new_empty(-(-count // PANEL), length // len(last), *last, dtype=factor)
    call("feed_forward_panels", packed, weight.float().contiguous(), packed, count, length)
    return packed


def feed_forward(
    x: Tensor,
    y: Tensor,
    expand: tuple[Tensor, Tensor],
    contract: tuple[Tensor, Tensor],
    scale: Tensor,
    out: Tensor,
    inner: Tensor | None = None,
) -> None:
    """out = x + scale * contract(gelu(expand(y))), sums in float32.

    Args:
        x, out: [.., C] in float32 or bfloat16; `out` may be x.
        y: [.., C] in float32 or bfloat16.
        expand: `panels` of [wide, C] for y's dtype, and bias [wide], float32.
        contract: `panels` of [C, wide] for y's dtype, and bias [C], float32.
        scale: [C], float32.
        inner: [.., wide] in y's dtype, where expand(y) is kept if wanted.
    """
    (places, channels), wide = places_and_channels(y), len(expand[1])
    sizes = (places, channels, wide, places > 2 * wide)  # then threads share the places, else the inner channels
    call("feed_forward", y, x.dtype == torch.bfloat16, x, y, *expand, *contract, scale, inner, out, *sizes)


def feed_forward_gradients(
    dy: Tensor, y: Tensor, inner: Tensor, expand: Tensor, contract: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, expand [wide, C], its bias [wide], contract and scale (but for the bias beside it), float32.

    Factors of products are rounded to bfloat16 if y has it and the processor multiplies it in pairs, sums are not.

    Args:
        dy: [.., C], the gradient of `feed_forward`'s result, float32.
        y, inner, scale: as there.
        expand, contract: weights alone, [wide, C] and [C, wide] as in linear layers, float32.
    """
    (places, channels), wide = places_and_channels(y), len(expand)
    of_places, of_inner = _shares(places, wide, torch.get_num_threads())
    shares = [(of_inner, *y.shape), (of_places, wide, channels), (of_places, wide), (of_places, channels, wide)]
    gradients = [dy.new_empty(shape) for shape in shares] + [dy.new_zeros(of_places * of_inner, channels)]
    sizes = (places, channels, wide, of_places, of_inner)
    call("feed_forward_gradients", y, dy, y, inner, expand, contract, scale, *gradients, *sizes)
    return tuple(gradient[0] if len(gradient) == 1 else gradient.sum(0) for gradient in gradients)


def _shares(places: int, wide: int, threads: int) -> tuple[int, int]:
    """Shares of the places and of the inner channels that together occupy the threads, with least memory for sums.

    None is empty: what it sums up would not be set.
    """
    panels = -(-wide // PANEL)
    pairs = [(share, min(threads // share, panels)) for share in range(1, min(threads, places) + 1)]
    return min(pairs, key=lambda pair: (-pair[0] * pair[1], 2 * wide * pair[0] + places * pair[1]))
