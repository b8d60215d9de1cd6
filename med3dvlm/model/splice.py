"""The two ways image features enter a sequence of embeddings.

Shapes: B batch, T sequence, N image tokens, H width of the language model.
"""

import torch
from torch import Tensor


def splice_at_placeholders(embeds: Tensor, features: Tensor, is_image: Tensor) -> Tensor:
    """Write the N features of each row over its N image-token embeddings; what we train.

    Args:
        embeds: [B, T, H]; features: [B, N, H]; is_image: [B, T], true at the `<im_patch>` positions.
    Returns:
        [B, T, H]
    Raises:
        ValueError: a row has another number of image tokens than N.
    """
    for row, found in enumerate(is_image.sum(dim=1).tolist()):
        if found != features.shape[1]:
            raise ValueError(
                f"row {row}: expected {features.shape[1]} image tokens in input_ids, found {found}; "
                "let the processor write the prompt, and don't truncate it"
            )
    return embeds.masked_scatter(is_image.unsqueeze(-1), features)


def splice_as_published(embeds: Tensor, features: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Write the features over positions 1..N, counted from the first attended token; what published checkpoints expect.

    With a tokenizer that adds no leading token, position 0 keeps an `<im_patch>` embedding and position N, the first
    token of the text, is overwritten: so the published models were trained.

    Args:
        embeds: [B, T, H]; features: [B, N, H]; attention_mask: [B, T] or None (all attended).
    Returns:
        [B, T, H]
    Raises:
        ValueError: a row has no room for N tokens after its first.
    """
    batch, length, width = embeds.shape
    count = features.shape[1]
    start = torch.zeros(batch, dtype=torch.long, device=embeds.device)  # [B]
    if attention_mask is not None:
        start = attention_mask.to(embeds.device).ne(0).int().argmax(dim=1)
    for row, first in enumerate(start.tolist()):
        if first + count >= length:
            raise ValueError(
                f"row {row}: expected room for {count} image tokens after the first token, "
                f"found {length - first - 1} positions"
            )
    positions = start[:, None] + 1 + torch.arange(count, device=embeds.device)  # [B, N]
    return embeds.scatter(1, positions[:, :, None].expand(-1, -1, width), features)
