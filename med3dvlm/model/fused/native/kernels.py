"""The C++ kernels on tensors: channels-last, contiguous, float32 or bfloat16, channels a multiple of 16 where they
leave a kernel. Kernels of convolutions are [C', C / groups, k] in any dtype. Sums over places are float64, but for the
gradients of kernels: float32, in parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from med3dvlm.model.fused.native import build
from med3dvlm.model.fused.native.calls import call, places_and_channels

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (3, 5, 7, 9, 11, 13)  # of depth-wise kernels
_ABILITIES = getattr(torch.cpu, "get_capabilities", dict)()  # of the processor; torch did not always tell
_AMX = _ABILITIES.get("amx_tile", False)
# G of Winograd's F(4, 3), six weights for three taps, from the points of winograd.cpp: each with the product of its
# distances from the others. The sixth is infinity.
_POINTS = {0: 1, 2 / 3: -130 / 81, -2 / 3: -130 / 81, 3 / 2: 65 / 8, -3 / 2: 65 / 8}
SPREAD = torch.tensor(
    [[p**k / f for k in range(3)] for p, f in _POINTS.items()] + [[0, 0, 1]], dtype=torch.float64, device="cpu"
)


def take(dtype: torch.dtype, kernel: Tensor, groups: int) -> bool:
    """Whether there are kernels for convolutions with weights [C', C / groups, k] in this dtype."""
    lengths = (3,) if groups == 1 else LENGTHS
    return take_dtype(dtype) and len(kernel) % 16 == 0 and kernel.shape[-1] in lengths


def take_dtype(dtype: torch.dtype) -> bool:
    """Whether there are kernels for results in this dtype."""
    return dtype in DTYPES and build.wanted()


def prepare(kernel: Tensor) -> Tensor:
    """[C', C, 3] -> the weights [6, C, C'] of Winograd's form, or a depth-wise [C, 1, k] -> [k, C]; float32."""
    if kernel.shape[1] == 1:
        return kernel[:, 0].float().T.contiguous()
    return torch.einsum("pt,oct->pco", SPREAD, kernel.double()).float().contiguous()


def convolve(x: Tensor, kernel: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """A convolution along one axis: [B, D, H, W, C] and a kernel [C', C, 3], or depth-wise [C, 1, k] ->
    [B, D, H, W, C'], and the sums [2, C'] over places, float64, of the result before rounding and of its square.
    """
    y = x.new_empty(*x.shape[:-1], len(kernel))
    sums, places = x.new_zeros(2, len(kernel), dtype=torch.float64), lines(x, axis)
    if kernel.shape[1] == 1:
        call("depthwise_convolve", x, x, prepare(kernel), y, sums, *places, len(kernel), kernel.shape[-1])
    else:
        call("dense_convolve", x, x, _by_taps(kernel, x.dtype), y, sums, *places, x.shape[-1], len(kernel))
    return y, sums


def _by_taps(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    """[C', C, 3] -> [3, C, C'] float32, or where bfloat16 is multiplied in pairs, [3, C / 2, C', 2] of it."""
    weights = kernel.permute(2, 1, 0)
    if not in_pairs(dtype):
        return weights.float().contiguous()
    return weights.to(dtype).unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def lanes() -> int:
    """Channels in a register, by which `fourier` takes its weights apart."""
    return build.library().fourier_lanes()


def fourier(volume: Tensor, weights: Tensor) -> Tensor:
    """The stem without the corrections of `fused.fourier.Face`: [B, 1, D, H, W] float32 -> [B, D', H', W', C]."""
    sizes = (len(volume), *volume.shape[2:], weights.shape[0] * weights.shape[-1])
    y = volume.new_empty(len(volume), *((n + 3) // 4 for n in volume.shape[2:]), sizes[-1], dtype=weights.dtype)
    call("fourier_convolve", y, volume, weights, y, *sizes)
    return y


def correct_side(
    y: Tensor, volume: Tensor, axis: int, high: bool, where: Tensor, counts: Tensor, weights: Tensor
) -> None:
    """Add to the planes of y that lie next to a side of the grid what the columns there call for.

    Args:
        y: [B, D', H', W', C], changed.
        volume: [B, 1, D, H, W] float32.
        axis: to which the side is perpendicular, 0 to 2 for D, H and W.
        high: whether it is the side of the last place.
        where: [R, 4] int64, what a place looks at: along the other two axes 0 to 4 for -2 to 2, the plane counted from
            outside (0 or 1), the one of the 20 columns.
        counts: [3] int64, how many of these the planes, counted from outside, take in turn.
        weights: [R, C] float32.
    """
    sizes = (y.shape[-1], len(volume), *volume.shape[2:])
    call("faces_correct", y, volume, where, counts, len(counts), weights, y, *sizes, axis, high)


def depthwise_sum(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """A sum of depth-wise convolutions along all three axes: [B, D, H, W, C] -> like it, rounded once.

    Args:
        x: the volume.
        taps: [3, k, C], float32: `prepare` of the kernels along h, w and d.
        bias: [C], float32.
    """
    y = torch.empty_like(x)
    call("depthwise_sum", x, x, taps, bias, y, *x.shape, taps.shape[1])
    return y


def gradients(
    x: Tensor,
    dy: Tensor,
    combined: tuple[Tensor, Tensor],
    kernel: Tensor,
    back: Tensor,
    axis: str,
    add_to: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and the kernel of a convolution along one axis, like them.

    Args:
        x: the input, [B, D, H, W, C].
        dy, combined: (z like dy, scale [3, C'] float32), which make the output's gradient [B, D, H, W, C'],
            scale[0] * dy + scale[1] * z + scale[2].
        kernel: [C', C, 3], or depth-wise [C, 1, k].
        back: `prepare` of the kernel that takes a gradient back.
        axis: "h", "w" or "d".
        add_to: the input's gradient is added to this tensor, which is returned.
    """
    dx = torch.empty_like(x) if add_to is None else add_to
    return dx, _kernel_gradient(x, dy, kernel, axis, *combined, back, dx, add_to is not None)


def kernel_gradient(x: Tensor, dy: Tensor, kernel: Tensor, axis: str) -> Tensor:
    """The gradient of a dense kernel alone, from that of the output itself: see `gradients`."""
    return _kernel_gradient(x, dy, kernel, axis, None, None, None, None, False)


def _kernel_gradient(x: Tensor, dy: Tensor, kernel: Tensor, axis: str, *others: Tensor | bool | None) -> Tensor:
    channels, places = x.shape[-1], lines(x, axis)
    if kernel.shape[1] == 1:
        taps = x.new_zeros(kernel.shape[-1], channels, dtype=torch.float32)
        call("depthwise_gradients", x, x, dy, *others, taps, *places, channels, len(taps))
        return taps.T.unsqueeze(1).to(kernel.dtype)
    weights = x.new_zeros(len(SPREAD), channels, len(kernel), dtype=torch.float32)
    call("winograd_gradients", x, x, dy, *others, weights, *places, channels, len(kernel))
    return torch.einsum("pt,pco->oct", SPREAD, weights.double()).to(kernel.dtype)


def normalised_sum(z: list[Tensor], scale: Tensor, shift: Tensor) -> Tensor:
    """Sum of scale[i] * z[i], plus shift: [.., C] three times, [3, C] and [C] float32 -> [.., C]."""
    y = torch.empty_like(z[0])
    call("norms_sum", y, *z, scale.contiguous(), shift, y, *places_and_channels(y))
    return y


def gradient_sums(dy: Tensor, z: list[Tensor], mean: Tensor) -> Tensor:
    """Sums over places of dy, and of dy * (z[i] - mean[i]): [.., C] and [3, C] float32 -> [4, C] float64."""
    sums = dy.new_zeros(4, dy.shape[-1], dtype=torch.float64)
    call("norms_gradient_sums", dy, dy, *z, mean, sums, *places_and_channels(dy))
    return sums


def take_products(dtype: torch.dtype, channels: int, wide: int) -> bool:
    """Whether there are kernels for a feed-forward part of these widths in this dtype, and none faster in oneDNN.

    oneDNN's are faster in bfloat16 where the processor multiplies matrices of it (AMX, and on ARM).
    """
    if dtype not in DTYPES or channels % 16 or wide % 16 or not build.wanted():
        return False
    return multiplied(dtype) == torch.float32 or not _AMX and in_pairs(dtype)


def in_pairs(dtype: torch.dtype) -> bool:
    """Whether the kernels multiply this dtype in pairs: bfloat16 where there is an instruction for it."""
    return dtype == torch.bfloat16 and build.library().bfloat16_products() == 1


def multiplied(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch multiplies matrices of this one: float32 where it would emulate bfloat16, slowly."""
    return torch.float32 if dtype == torch.bfloat16 and not _AMX and not _multiplies_bfloat16() else dtype


def _multiplies_bfloat16() -> bool:
    return build.library().bfloat16_products() > 0 if build.wanted() else _ABILITIES.get("avx512_bf16", True)


def max_pool(x: Tensor) -> Tensor:
    """Max pooling over 3x3x3 places, stride 2, padding 1: [B, D, H, W, C] -> [B, D', H', W', C], halves rounded up."""
    y = x.new_empty(_halved(x))
    call("max_pool", x, x, y, None, *x.shape)
    return y


def max_pool_with_places(x: Tensor) -> tuple[Tensor, Tensor]:
    """`max_pool`, and which of its 27 inputs each result is, as `max_pool_gradient` takes it."""
    y, places = x.new_empty(_halved(x)), x.new_empty(_halved(x), dtype=torch.uint8)
    call("max_pool", x, x, y, places, *x.shape)
    return y, places


def max_pool_gradient(dy: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of an input of `max_pool` with this shape."""
    dx = dy.new_empty(shape)
    call("max_pool_gradient", dy, dy, places, dx, *shape)
    return dx


def take_moments(x: Tensor) -> bool:
    """Whether `second_moments` takes a tensor like x; it has no backward pass."""
    return x.dtype in DTYPES and x.device.type == "cpu" and not x.requires_grad and build.wanted()


def second_moments(a: Tensor, b: Tensor) -> Tensor:
    """a' b of [P, C] twice -> [C, C], in float64."""
    result = a.new_zeros(a.shape[-1], a.shape[-1], dtype=torch.float64)
    call("moments_second", a, a.contiguous(), b.contiguous(), result, *a.shape)
    return result


def lines(x: Tensor, axis: str) -> tuple[int, int, int]:
    """Places before, along and behind an axis of [B, D, H, W, C]."""
    batch, depth, height, width, _ = x.shape
    return {
        "w": (batch * depth * height, width, 1),
        "h": (batch * depth, height, width),
        "d": (batch, depth, height * width),
    }[axis]


def _halved(x: Tensor) -> tuple[int, ...]:
    batch, depth, height, width, channels = x.shape
    return batch, (depth + 1) // 2, (height + 1) // 2, (width + 1) // 2, channels
