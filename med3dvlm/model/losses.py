"""Contrastive losses of images and texts, the same value and gradient for one process and for several.

With several processes every rank gathers the features of all and evaluates the loss of the global batch, so the value
is the same on every rank. The gather is differentiable: after the usual averaging of parameter gradients over the ranks
(DDP, DeepSpeed) the gradient is that of the global loss. All ranks must bring the same number of samples.

Sources: SigLIP (arXiv 2303.15343, algorithm 1); InfoNCE as in CLIP (arXiv 2103.00020, figure 3). The published code
departs from both (docs/decisions.md). Shapes: b local batch, B global batch (b times the number of ranks), E width of
the shared space.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def siglip_logits(image_features: Tensor, text_features: Tensor, t_prime: Tensor, bias: Tensor) -> Tensor:
    """exp(t') * similarity + bias: [B, E] and [B, E] -> [B, B] in float32, rows images, columns texts."""
    return t_prime.float().exp() * image_features.float() @ text_features.float().T + bias.float()


def info_nce_logits(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """exp(scale) * similarity: [B, E] and [B, E] -> [B, B] in float32, rows images, columns texts."""
    return logit_scale.float().exp() * image_features.float() @ text_features.float().T


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    t_prime: Tensor,
    bias: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sigmoid loss: every pair of the global batch is one binary decision, "belongs together" on the diagonal.

    Args:
        image_features, text_features: [b, E], rows of unit norm; row i of both belongs together.
        t_prime: scalar, logarithm of the scale.
        bias: scalar, offset of the logits.
        group: process group of the global batch; None is the default group, where one is initialised.
    Returns:
        Scalar in float32: the sum over all B * B pairs, divided by B.
    """
    image_features = gather_rows(image_features, group)  # [B, E]
    text_features = gather_rows(text_features, group)  # [B, E]
    logits = siglip_logits(image_features, text_features, t_prime, bias)  # [B, B]
    labels = 2 * torch.eye(len(logits), device=logits.device) - 1  # [B, B], +1 on the diagonal, -1 elsewhere
    return -F.logsigmoid(labels * logits).sum() / len(logits)


def info_nce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Softmax loss: each image picks its text among the global batch, and each text its image.

    Args:
        image_features, text_features: [b, E], rows of unit norm; row i of both belongs together.
        logit_scale: scalar, logarithm of the scale.
        group: process group of the global batch; None is the default group, where one is initialised.
    Returns:
        Scalar in float32: the mean of the two cross-entropies.
    """
    image_features = gather_rows(image_features, group)  # [B, E]
    text_features = gather_rows(text_features, group)  # [B, E]
    logits = info_nce_logits(image_features, text_features, logit_scale)  # [B, B]
    target = torch.arange(len(logits), device=logits.device)  # [B]
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[b, E] -> [B, E]: the rows of all ranks in rank order, differentiable; x itself where there is one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return x
    return _GatherRows.apply(x, group)


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all ranks: every rank's loss depends on these rows."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        pieces = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, x.contiguous(), group=group)
        return torch.cat(pieces)  # [B, E]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)  # [B, E]; not in place, autograd may hold the original
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None
