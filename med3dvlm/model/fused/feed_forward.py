"""The feed-forward part of a block with its residual connection: x + scale * contract(gelu(expand(y))).

By the C++ kernels where they are to be had, otherwise by oneDNN (inference) or torch (training). Where the processor
does not multiply bfloat16, products are made in float32, and bfloat16 is how tensors are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.model.fused import onednn
from med3dvlm.model.fused.native import kernels as native
from med3dvlm.model.fused.native import mlp as compiled


def folded(block: nn.Module, dtype: torch.dtype) -> NativeFeedForward | FeedForward:
    """The feed-forward part of a block for inference, with its present weights."""
    wide, channels = block.mlp.mlp[0].weight.shape
    return (NativeFeedForward if native.take_products(dtype, channels, wide) else FeedForward)(block, dtype)


def pointwise(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> onednn.Conv:
    """A linear layer with weight [C', C] of tensors in `dtype`."""
    return onednn.Conv(weight[..., None, None], bias, native.multiplied(dtype))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The linear layer with weight [C', C], in x's dtype: [.., C] -> [.., C']."""
    dtype = native.multiplied(x.dtype)
    return onednn.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


def linear_gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight from that of `linear`'s result, [.., C']."""
    dtype = native.multiplied(x.dtype)
    dy = dy.to(dtype)
    d_weight = onednn.product(dy.flatten(0, -2), x.flatten(0, -2).to(dtype))
    return onednn.linear(dy, weight.to(dtype).T).to(x.dtype), d_weight.to(weight.dtype)


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
        expand, contract, scale = block.mlp.mlp[0], block.mlp.mlp[3], block.scale
        biases = (tensor.detach().float().contiguous() for tensor in (expand.bias, contract.bias, scale))
        expand_bias, contract_bias, self.scale = biases
        self.expand = (compiled.panels(expand.weight, dtype), expand_bias)
        self.contract = (compiled.panels(contract.weight, dtype), contract_bias)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        compiled.feed_forward(x, y, self.expand, self.contract, self.scale, out=x)


def forward(x: Tensor, y: Tensor, scale: Tensor, mlp: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The result [.., C], in x's dtype, and expand(y) [.., wide], in y's, for training.

    Args:
        x: [.., C], the residual connection.
        y: [.., C] in the dtype of the arithmetic.
        scale: [C].
        mlp: weight [wide, C] and bias of the expansion, weight [C, wide] and bias of the contraction.
    """
    wide, channels = mlp[0].shape
    worth_packing = y[..., 0].numel() >= channels  # a copy of the weights
    if worth_packing and native.take_products(y.dtype, channels, wide):
        expand, expand_bias, contract, contract_bias = (tensor.float().contiguous() for tensor in mlp)
        out, inner = torch.empty_like(x), y.new_empty(*y.shape[:-1], wide)
        packed = (compiled.panels(expand, y.dtype), expand_bias), (compiled.panels(contract, y.dtype), contract_bias)
        compiled.feed_forward(x, y, *packed, scale.float().contiguous(), out, inner)
        return out, inner
    dtype = native.multiplied(y.dtype)
    expand, expand_bias, contract, contract_bias = (tensor.to(dtype) for tensor in mlp)
    inner = onednn.linear(y.to(dtype), expand, expand_bias)
    outer = onednn.linear(F.gelu(inner), contract, contract_bias).to(x.dtype)
    return torch.addcmul(x, outer, scale.to(x.dtype)), inner.to(y.dtype)


def backward(
    dy: Tensor, y: Tensor, inner: Tensor, scale: Tensor, mlp: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of y, in its dtype, of the scale and of `mlp` from that of the result; arguments as of `forward`."""
    wide, channels = mlp[0].shape
    total = dy.flatten(0, -2).sum(0, dtype=scale.dtype)  # [C]
    if native.take_products(y.dtype, channels, wide):
        dy, expand, contract, factor = (tensor.float().contiguous() for tensor in (dy, mlp[0], mlp[2], scale))
        d_y, d_expand, d_bias, d_contract, d_scale = compiled.feed_forward_gradients(
            dy, y, inner, expand, contract, factor
        )
    else:
        dtype = native.multiplied(y.dtype)
        dy, left, inner = (tensor.to(dtype).flatten(0, -2) for tensor in (dy, y, inner))  # [P, C], [P, C], [P, wide]
        expand, contract, factor = (tensor.to(dtype) for tensor in (mlp[0], mlp[2], scale))
        d_contract = onednn.product(dy, F.gelu(inner))  # [C, wide], for the gradients of `contract` and of the scale
        d_scale = (d_contract * contract).sum(1, dtype=scale.dtype)
        d_contract *= factor[:, None]
        d_inner = torch.ops.aten.gelu_backward(onednn.linear(dy * factor, contract.T), inner)
        d_y, d_expand, d_bias = onednn.linear(d_inner, expand.T), onednn.product(d_inner, left), d_inner.sum(0)
    return d_y.to(y.dtype), d_scale + total * mlp[3], [d_expand, d_bias, d_contract, scale * total]
