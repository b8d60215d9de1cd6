"""Batching: items of different lengths become padded tensors. Padding goes to the longest item of the batch."""

import torch
from torch.utils.data import default_collate

from med3dvlm.data.augment import to_unit

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
    turn_ids (-1 on padding) and position_ids; where they carry images, images and image_seeds as `stack_images` says.
    Items that a data set skipped as unreadable (None) are left out.
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
        batch |= stack_images(items)
    return batch


def collate_pairs(items, tokenizer) -> dict[str, torch.Tensor]:
    """Batch items of `PairDataset`: images as `stack_images` says, input_ids and attention_mask `[B, longest]`."""
    items = _present(items)
    return {
        **stack_images(items),
        "input_ids": pad_sequences([item["input_ids"] for item in items], tokenizer.pad_token_id),
        "attention_mask": pad_sequences([item["attention_mask"] for item in items], 0),
    }


def stack_images(items) -> dict[str, torch.Tensor | list[int]]:
    """images `[B, 1, D, H, W]`: uint8 codes where all items hold codes, otherwise float32 within 0..1.

    Where items carry an image_seed, image_seeds is the list of them: `med3dvlm.data.augment.to_unit` takes both. This
    is the only copy on the way from a mapped file; in a loader's process it goes straight into shared memory.
    """
    images = [item["image"] for item in items]
    if len({image.dtype for image in images}) > 1:
        images = [to_unit(image[None])[0] for image in images]
    batch = {"images": default_collate(images)}
    if "image_seed" in items[0]:
        batch["image_seeds"] = [item["image_seed"] for item in items]
    return batch


def _present(items) -> list[dict]:
    present = [item for item in items if item is not None]
    if not present:
        raise ValueError(f"all {len(items)} items of this batch were unreadable; see the data set's bad_samples")
    return present
