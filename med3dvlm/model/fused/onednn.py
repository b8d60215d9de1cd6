"""oneDNN's products of matrices, and its convolutions that activate their result, or add it to another, in one pass.

`torch.compile` uses these operators when it freezes a model; called directly they need no compiler and no warm-up.
torch itself leaves float32 products to MKL, which takes twice as long on the AMD processor (Zen 5) that it was timed
on. For tensors that oneDNN has no kernels for, the same is computed by torch, in several passes. The operators are not
part of torch's public interface: in a version without one of them oneDNN takes nothing, and the encoder its plain path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_NAMES = (
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "_is_mkldnn_bf16_supported",
    "_linear_pointwise",
    "_reorder_convolution_weight",
)
_COMPLETE = all(hasattr(torch.ops.mkldnn, name) for name in _NAMES)


def takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this dtype on this processor."""
    if not _COMPLETE or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layer with weight [N, K], which may be a transposed view: [.., K] -> [.., N]."""
    if takes(x.dtype):
        bias = None if bias is None else bias.contiguous()  # it would be read as if it were
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a' b of [P, N] and [P, K] -> [N, K]."""
    if a.dtype != torch.float32 or not takes(a.dtype):
        return a.T @ b
    if len(a) > a.shape[1] > b.shape[1]:  # oneDNN copies its first factor: of many places the narrower one
        return linear(b.T, a.T).T
    return linear(a.T, b.T)


class Conv:
    """A 2D convolution of stride 1 with fixed weights, which are laid out for the sizes of its latest input.

    Args:
        weight: [C', C / groups, k_1, k_2].
        bias: [C'], or None.
        dtype: of the arithmetic; that of images may be another.
        dilation: distance of the taps, in steps.
        groups: 1 (dense), or C (depth-wise).

    A step is a place along the kernel's axis unless a call says otherwise.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, dilation: int = 1, groups: int = 1):
        # Detached: a view would hold on to the parameter, which torch then could not swap.
        self.weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else bias.detach().to(dtype).contiguous()
        self.dilation, self.groups = dilation, groups
        self.prepared: tuple[tuple, Tensor, tuple] | None = None

    def __call__(self, images: Tensor, gelu: bool = False) -> Tensor:
        """[N, H, W, C] -> [N, H, W, C'], with GELU (exact) if asked."""
        x = images.movedim(-1, 1).to(self.weight.dtype)
        weight, geometry = self._prepared_for(x, 1)
        if takes(x.dtype):
            arguments = ("gelu" if gelu else "none", [], "none")
            y = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *geometry, *arguments)
        else:
            y = self._by_torch(x, geometry)
            y = F.gelu(y) if gelu else y
        return y.movedim(1, -1).to(images.dtype).contiguous()  # a copy only where axes of size 1 leave the layout open

    def add_to(self, total: Tensor, images: Tensor, step: int = 1) -> None:
        """total [N, H, W, C'] += convolution of images [N, H, W, C], a step being so many places."""
        x = images.movedim(-1, 1).to(self.weight.dtype)
        weight, geometry = self._prepared_for(x, step)
        if takes(x.dtype) and total.dtype == x.dtype:
            arguments = ("add", None, None, [], None)
            add_ = torch.ops.mkldnn._convolution_pointwise_.binary
            result = add_(total.movedim(-1, 1), x, weight, self.bias, *geometry, *arguments).movedim(1, -1)
            if result.data_ptr() != total.data_ptr():  # here, too, axes of size 1
                total.copy_(result)
        else:
            total += self._by_torch(x, geometry).movedim(1, -1)

    def _by_torch(self, x: Tensor, geometry: tuple) -> Tensor:
        padding, stride, dilation, groups = geometry
        return F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)

    def _prepared_for(self, x: Tensor, step: int) -> tuple[Tensor, tuple]:
        """For inputs [N, C, H, W] of this size: weights as oneDNN wants them; padding, stride, dilation and groups."""
        key, prepared = (x.shape, step, takes(x.dtype)), self.prepared  # read once: others may encode another size
        if prepared is None or prepared[0] != key:
            sizes, dilation = self.weight.shape[2:], self.dilation * step
            padding = [dilation * (size - 1) // 2 for size in sizes]  # keeps the images' size
            geometry = (padding, [1, 1], [dilation if size > 1 else 1 for size in sizes], self.groups)
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            weight = reorder(self.weight, *geometry, x.shape) if takes(x.dtype) else self.weight
            prepared = self.prepared = (key, weight, geometry)
        return prepared[1:]
