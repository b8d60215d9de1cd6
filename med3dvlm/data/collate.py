"""Batching: items of different lengths become padded tensors. Padding goes to the longest item of the batch."""

import torch

IGNORED_LABEL = -100


def pad_sequences(rows, value: int, side: str = "right") -> torch.Tensor:
    """Stack 1-D tensors of different lengths into `[B, longest]`, filled with `value` on the given side."""
    longest = max(len(row) for row in rows)
    batch = torch.full((len(rows), longest), value, dtype=torch.long)
    for target, row in zip(batch, rows, strict=True):
        start = longest - len(row) if side == "left" else 0
        target[start : start + len(row)] = torch.as_tensor(row)
    return batch


def collate_vlm(items, pad_token_id: int, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Batch items of the caption and question data sets.

    Returns input_ids, attention_mask, labels `[B, longest]` (labels of padding are -100); where the items are packed,
    turn_ids (-1 on padding) and position_ids; where they carry images, images `[B, 1, D, H, W]`. Items that a data set
    skipped as unreadable (None) are left out.
    Raises ValueError where every item of the batch was skipped.
    """
    items = _present(items)
    batch = {
        "input_ids": pad_sequences([item["input_ids"] for item in items], pad_token_id, padding_side),
        "attention_mask": pad_sequences([item["attention_mask"] for item in items], 0, padding_side),
        "labels": pad_sequences([item["labels"] for item in items], IGNORED_LABEL, padding_side),
    }
    if "turn_ids" in items[0]:
        batch["turn_ids"] = pad_sequences([item["turn_ids"] for item in items], -1, padding_side)
        batch["position_ids"] = pad_sequences([item["position_ids"] for item in items], 0, padding_side)
    if "image" in items[0]:
        batch["images"] = torch.stack([item["image"] for item in items])  # [B, 1, D, H, W]
    return batch


def collate_pairs(items, tokenizer) -> dict[str, torch.Tensor]:
    """Batch items of `PairDataset`: images `[B, 1, D, H, W]`, input_ids and attention_mask `[B, longest]`."""
    items = _present(items)
    return {
        "images": torch.stack([item["image"] for item in items]),
        "input_ids": pad_sequences([item["input_ids"] for item in items], tokenizer.pad_token_id),
        "attention_mask": pad_sequences([item["attention_mask"] for item in items], 0),
    }


def _present(items) -> list[dict]:
    present = [item for item in items if item is not None]
    if not present:
        raise ValueError(f"all {len(items)} items of this batch were unreadable; see the data set's bad_samples")
    return present
