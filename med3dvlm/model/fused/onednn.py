"""oneDNN's products of matrices, and its convolutions that activate their result, or add it to another, in one pass.

`torch.compile` uses these operators when it freezes a model; called directly they need no compiler and no warm-up.
torch itself leaves float32 products to MKL, which on other makers' processors than Intel's takes twice as long. For
tensors that oneDNN has no kernels for, the same is computed by torch, in several passes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_STRIDE = (1, 1)


def takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layer with weight [N, K], which may be a transposed view: [.., K] -> [.., N]."""
    if takes(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a' b of [P, N] and [P, K] -> [N, K]."""
    if a.dtype != torch.float32 or not takes(a.dtype):
        return a.T @ b
    if len(a) > a.shape[1] > b.shape[1]:  # the first factor is laid out anew
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
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else bias.to(dtype)
        self.dilation, self.groups = dilation, groups
        self.packed: tuple[tuple, Tensor] | None = None

    def __call__(self, images: Tensor, gelu: bool = False) -> Tensor:
        """[N, H, W, C] -> [N, H, W, C'], with GELU (exact) if asked."""
        x = images.movedim(-1, 1).to(self.weight.dtype)
        padding, dilation = self._geometry(1)
        if takes(x.dtype):
            arguments = (padding, _STRIDE, dilation, self.groups, "gelu" if gelu else "none", [], "none")
            y = torch.ops.mkldnn._convolution_pointwise(x, self._packed_for(x, 1), self.bias, *arguments)
        else:
            y = F.conv2d(x, self.weight, self.bias, 1, padding, dilation, self.groups)
            y = F.gelu(y) if gelu else y
        return y.movedim(1, -1).to(images.dtype).contiguous()  # a copy only where axes of size 1 leave the layout open

    def add_to(self, total: Tensor, images: Tensor, step: int = 1) -> None:
        """total [N, H, W, C'] += convolution of images [N, H, W, C], with taps so many places apart."""
        x = images.movedim(-1, 1).to(self.weight.dtype)
        padding, dilation = self._geometry(step)
        if takes(x.dtype) and total.dtype == x.dtype:
            arguments = (padding, _STRIDE, dilation, self.groups, "add", None, None, [], None)
            add_ = torch.ops.mkldnn._convolution_pointwise_.binary
            result = add_(total.movedim(-1, 1), x, self._packed_for(x, step), self.bias, *arguments).movedim(1, -1)
            if result.data_ptr() != total.data_ptr():  # here, too, axes of size 1
                total.copy_(result)
        else:
            total += F.conv2d(x, self.weight, self.bias, 1, padding, dilation, self.groups).movedim(1, -1)

    def _geometry(self, step: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Padding that keeps the images' size, and dilation."""
        sizes, dilation = self.weight.shape[2:], self.dilation * step
        return tuple(dilation * (n - 1) // 2 for n in sizes), tuple(dilation if n > 1 else 1 for n in sizes)

    def _packed_for(self, x: Tensor, step: int) -> Tensor:
        """The weights in oneDNN's own layout for inputs [N, C, H, W] of this size."""
        packed = self.packed  # read once: another thread may encode another size
        if packed is None or packed[0] != (x.shape, step):
            padding, dilation = self._geometry(step)
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            weight = reorder(self.weight, padding, _STRIDE, dilation, self.groups, x.shape)
            packed = self.packed = ((x.shape, step), weight)
        return packed[1]
