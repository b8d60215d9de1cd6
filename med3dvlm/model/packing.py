"""Several questions about one image in one sequence, each as if it stood alone.

The image tokens come first and are turn 0; every question with its answer is a turn of its own (1, 2, ...) that sees
the image and itself, never another turn, and counts its positions from the end of the image. So the logits equal those
of separate sequences, while encoder, projector and image tokens are computed once. (Turns that see each other teach
less: what one answer says need not be read from the image again.)
"""

import torch
from torch import Tensor

PADDING_TURN = -1


def packed_attention_mask(turn_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [B, 1, T, T]: 0 where attended, the lowest number of `dtype` elsewhere.

    Args:
        turn_ids: [B, T], 0 on what all turns see, 1, 2, ... on the turns, -1 on padding (which only sees itself).
    """
    same = turn_ids[:, :, None] == turn_ids[:, None, :]  # [B, T, T]
    shared = (turn_ids == 0)[:, None, :]  # [B, 1, T]
    causal = torch.ones(turn_ids.shape[1], turn_ids.shape[1], dtype=torch.bool, device=turn_ids.device).tril()
    allowed = (same | shared) & causal  # [B, T, T]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=turn_ids.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]  # [B, 1, T, T]
