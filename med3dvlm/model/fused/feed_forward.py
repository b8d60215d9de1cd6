"""The feed-forward part of a block with its residual connection: x + scale * contract(gelu(expand(y))).

By the C++ kernels where they are to be had, otherwise by oneDNN (inference) or torch (training, always in bfloat16).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.model.fused import onednn
from med3dvlm.model.fused.native import kernels as native


def folded(block: nn.Module, dtype: torch.dtype) -> NativeFeedForward | FeedForward:
    """The feed-forward part of a block for inference, with its present weights."""
    wide, channels = block.mlp.mlp[0].weight.shape
    return (NativeFeedForward if native.take_products(dtype, channels, wide) else FeedForward)(block, dtype)


def pointwise(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> onednn.Conv:
    """A linear layer with weight [C', C]."""
    return onednn.Conv(weight[..., None, None], bias, dtype)


class FeedForward:
    """The layer scale is folded into `contract`, which adds to the residual connection."""

    def __init__(self, block: nn.Module, dtype: torch.dtype):
        expand, contract, scale = block.mlp.mlp[0], block.mlp.mlp[3], block.scale.double()
        self.expand = pointwise(expand.weight, expand.bias, dtype)
        self.contract = pointwise(scale[:, None] * contract.weight.double(), scale * contract.bias.double(), dtype)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """x += scale * contract(gelu(expand(y))), [B, D, H, W, C] both."""
        inner = self.expand(y.flatten(1, 2), gelu=True)  # [B, D * H, W, ratio * C]
        self.contract.add_to(x.flatten(1, 2), inner)


class NativeFeedForward:
    """The same by the C++ kernels."""

    def __init__(self, block: nn.Module, dtype: torch.dtype):
        expand, contract = block.mlp.mlp[0], block.mlp.mlp[3]
        self.expand = (native.panels(expand.weight.to(dtype)), expand.bias.float().contiguous())
        self.contract = (native.panels(contract.weight.to(dtype)), contract.bias.float().contiguous())
        self.scale = block.scale.float().contiguous()

    def add_to(self, x: Tensor, y: Tensor) -> None:
        native.feed_forward(x, y, self.expand, self.contract, self.scale, out=x)


def forward(x: Tensor, y: Tensor, scale: Tensor, mlp: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The result [.., C], in x's dtype, and expand(y) [.., wide], for training.

    Args:
        x: [.., C], the residual connection.
        y: [.., C] in the dtype of the arithmetic.
        scale: [C].
        mlp: weight [wide, C] and bias of the expansion, weight [C, wide] and bias of the contraction, in y's dtype.
    """
    expand, expand_bias, contract, contract_bias = mlp
    wide, channels = expand.shape
    worth_packing = y[..., 0].numel() >= channels // 2  # a copy of the weights
    if worth_packing and _by_kernels(y.dtype, channels, wide):
        out, inner = torch.empty_like(x), y.new_empty(*y.shape[:-1], wide)
        packed = (native.panels(expand), expand_bias), (native.panels(contract), contract_bias)
        native.feed_forward(x, y, *packed, scale, out, inner)
        return out, inner
    inner = F.linear(y, expand, expand_bias)
    outer = F.linear(F.gelu(inner), contract, contract_bias).to(x.dtype)
    return torch.addcmul(x, outer, scale.to(x.dtype)), inner


def backward(
    dy: Tensor, y: Tensor, inner: Tensor, scale: Tensor, mlp: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of y, of the scale and of `mlp` from that of the result; arguments as of `forward`."""
    expand, _, contract, contract_bias = mlp
    total = dy.flatten(0, -2).sum(0, dtype=scale.dtype)  # [C]
    if _by_kernels(y.dtype, *contract.shape):
        d_inner, d_contract, d_scale, d_expand, d_bias = native.feed_forward_gradients(dy, y, inner, contract, scale)
    else:
        dy, y, inner = (tensor.to(y.dtype).flatten(0, -2) for tensor in (dy, y, inner))  # [P, C], [P, C], [P, wide]
        factor = scale.to(y.dtype)
        d_contract = (F.gelu(inner).T @ dy).T  # [C, wide], for the gradients of `contract` and of the scale
        d_scale = (d_contract * contract).sum(1, dtype=scale.dtype)
        d_contract = factor[:, None] * d_contract
        d_inner = torch.ops.aten.gelu_backward((dy * factor) @ contract, inner)
        d_expand, d_bias = d_inner.T @ y, d_inner.sum(0)
    d_mlp = [d_expand, d_bias, d_contract, (scale * total).to(contract.dtype)]
    return d_inner @ expand, d_scale + total * contract_bias, d_mlp


def _by_kernels(dtype: torch.dtype, channels: int, wide: int) -> bool:
    """Whether the C++ kernels take a step of training."""
    return dtype == torch.float32 and native.take_products(dtype, channels, wide)
