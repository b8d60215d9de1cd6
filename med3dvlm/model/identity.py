"""Which language model a set of adapters belongs to: a name for people, a hash of its frozen weights for the check."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from med3dvlm.model.published import local_folder
from med3dvlm.model.weights import CheckpointError, full_state_dict, read_weights, write_json

IDENTITY_FILE = "base_model.json"


def base_identity(model: nn.Module, name_or_path: str) -> dict[str, str]:
    """Name and hash of the language model in `model` (before or after adapters were added)."""
    return {"name_or_path": str(name_or_path), "sha256": _hash(_base_weights(full_state_dict(model)))}


def write_identity(identity: dict[str, str], folder: str | Path) -> None:
    write_json(identity, Path(folder) / IDENTITY_FILE)


def read_identity(folder: str | Path) -> dict[str, str]:
    """The identity that a stage recorded. Raises CheckpointError where there is none."""
    file = Path(folder) / IDENTITY_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder}: expected the output of the LoRA stage, found no {IDENTITY_FILE}")
    return json.loads(file.read_text())


def check_identity(identity: dict[str, str], model: nn.Module, name_or_path: str | None = None) -> None:
    """Check that the frozen weights in `model`, and those of a named base model, are the recorded ones.

    Raises:
        CheckpointError: they are others; the message names both.
    """
    candidates = {"the weights that carry the adapters": full_state_dict(model)}
    if name_or_path:
        candidates[str(name_or_path)] = read_weights(local_folder(name_or_path))
    for source, tensors in candidates.items():
        found = _hash(_base_weights(tensors))
        if found != identity["sha256"]:
            raise CheckpointError(
                f"{source}: expected the base model {identity['name_or_path']} (sha256 {identity['sha256'][:12]}), "
                f"found another one ({found[:12]})"
            )


def _base_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that no stage changes: language blocks and final norm, under the keys of a plain language model."""
    plain = {key.replace(".base_layer.", "."): t for key, t in tensors.items() if ".lora_" not in key}
    return {key: t for key, t in plain.items() if key.startswith(("model.layers.", "model.norm."))}


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().to(torch.bfloat16).contiguous()  # what every dtype of training keeps
        digest.update(f"{key} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
