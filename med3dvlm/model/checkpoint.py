"""The published layout taken apart: what lies where in a checkpoint, and the files that go between the stages.

| file (`.bin` or `.safetensors`, by its ending) | keys start with |
| --- | --- |
| `pretrained_ViT.*` | `encoder.`: the image encoder after the contrastive stage |
| `mm_projector.*` | `model.mm_projector.`, and `model.embed_tokens.weight` |
| `model_with_lora.*` | `base_model.model.`: everything, after LoRA fine-tuning |
| `vision_tower.*` | `vision_tower.`: the image encoder of a merged model |

Complete models load and save by their own `from_pretrained` and `save_pretrained` (see `med3dvlm.model.published`).
Under DeepSpeed ZeRO-3 the `save_*` functions are to be called on every rank; the first one writes.

    python -m med3dvlm.model.checkpoint inspect FOLDER
    python -m med3dvlm.model.checkpoint extract FOLDER --part projector|encoder|embeddings|language_model [--output F]
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config

from med3dvlm.configuration import CLIPConfig, VLMConfig
from med3dvlm.model.published import TEXT_ENCODER_PREFIX, begin_folder, text_config_of
from med3dvlm.model.weights import (
    WEIGHT_FILES,
    CheckpointError,
    full_state_dict,
    load_strict,
    read_config,
    read_tensors,
    read_weights,
    write_tensors,
    write_weights,
    written_atomically,
)

LORA_PREFIX = "base_model.model."
ENCODER_PREFIXES = ("model.vision_tower.vision_tower.", "vision_encoder.", "vision_tower.")
PROJECTOR_PREFIX = "model.mm_projector."
EMBEDDINGS = "model.embed_tokens.weight"
# Parts that `extract` takes out, and where to when it isn't told.
PARTS = {
    "projector": "mm_projector.bin",
    "encoder": "pretrained_ViT.bin",
    "embeddings": "embed_tokens.bin",
    "language_model": "language_model",
}
# What a language model's folder holds beside config and weights.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


# -------------------------------------------------------------------- files between the stages


def save_vision_encoder(model: nn.Module, path: str | Path) -> None:
    """Write the image encoder of a dual encoder or language model (or a bare one) as `pretrained_ViT.*`."""
    _write_on_first_rank(full_state_dict(_encoder_of(model)), path)


def save_vision_tower(model: nn.Module, path: str | Path) -> None:
    """Write the image encoder as `vision_tower.*`, the file beside a merged model."""
    _write_on_first_rank(_prefixed("vision_tower.", full_state_dict(_encoder_of(model))), path)


def load_vision_encoder(model: nn.Module, path: str | Path) -> None:
    """Load the image encoder of a dual encoder or language model (or a bare one), strictly.

    Args:
        path: `pretrained_ViT.*`, `vision_tower.*`, any full checkpoint, or a folder with one of them.
    Raises:
        CheckpointError: nothing there, or keys or shapes that don't fit.
    """
    file = _stage_file(path, "pretrained_ViT")
    load_strict(_encoder_of(model), part_of(read_checkpoint(file), "encoder", file), str(file))


def save_projector(model: nn.Module, path: str | Path) -> None:
    """Write projector and token embeddings of the language model as `mm_projector.*`."""
    vlm = _without_adapters(model)
    tensors = _prefixed(PROJECTOR_PREFIX, full_state_dict(vlm.model.mm_projector))
    tensors |= _prefixed("model.embed_tokens.", full_state_dict(vlm.model.embed_tokens))
    _write_on_first_rank(tensors, path)


def load_projector(model: nn.Module, path: str | Path, embeddings: bool = True) -> None:
    """Load projector and token embeddings into the language model, strictly.

    Args:
        path: `mm_projector.*`, a full checkpoint, or a folder with one of them.
        embeddings: False keeps the model's own embeddings, as the published LoRA stage does.
    Raises:
        CheckpointError: nothing there, or keys or shapes that don't fit.
    """
    vlm = _without_adapters(model)
    file = _stage_file(path, "mm_projector")
    tensors = part_of(read_checkpoint(file), "projector", file)
    stored = {key.removeprefix(PROJECTOR_PREFIX): t for key, t in tensors.items() if key.startswith(PROJECTOR_PREFIX)}
    load_strict(vlm.model.mm_projector, stored, f"{file} ({PROJECTOR_PREFIX})")
    if embeddings:
        stored = {"weight": tensors[EMBEDDINGS]} if EMBEDDINGS in tensors else {}
        load_strict(vlm.model.embed_tokens, stored, f"{file} (model.embed_tokens.)")


def save_lora(peft_model: nn.Module, path: str | Path) -> None:
    """Write everything of a model with adapters, unmerged, as `model_with_lora.*`."""
    tensors = full_state_dict(peft_model)
    if _without_adapters(peft_model).config.tie_word_embeddings:
        tensors = {key: tensor for key, tensor in tensors.items() if key != f"{LORA_PREFIX}lm_head.weight"}
    _write_on_first_rank(tensors, path)


def load_lora(peft_model: nn.Module, path: str | Path) -> None:
    """Load `model_with_lora.*` into a model that has the same adapters, strictly. Raises CheckpointError."""
    file = _stage_file(path, "model_with_lora")
    tied = _without_adapters(peft_model).config.tie_word_embeddings
    optional = [f"{LORA_PREFIX}lm_head.weight"] if tied else []
    load_strict(peft_model, read_tensors(file), str(file), optional=optional)


def _without_adapters(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _encoder_of(model: nn.Module) -> nn.Module:
    model = _without_adapters(model)
    inside = getattr(model, "vision_encoder", model)
    return inside.model.vision_tower.vision_tower if hasattr(inside, "model") else inside


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _write_on_first_rank(tensors: dict[str, Tensor], path: str | Path) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        write_tensors(tensors, path)


def _stage_file(path: str | Path, name: str) -> Path:
    """`path`, or the stage's file in it when it is a folder that has one."""
    path = Path(path)
    found = [path / f"{name}{ending}" for ending in (".safetensors", ".bin") if (path / f"{name}{ending}").is_file()]
    return found[0] if found else path


# -------------------------------------------------------------------- parts of a checkpoint


def read_checkpoint(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a full checkpoint (a folder, also that of a `model_with_lora.*`) or of one weight file.

    The adapters' key prefix is cut; on device "meta" the tensors come without their data.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    path = Path(path)
    if path.is_dir() and not any((path / name).is_file() for name in WEIGHT_FILES):
        path = _stage_file(path, "model_with_lora")
    tensors = read_weights(path, device) if path.is_dir() else read_tensors(path, device)
    return {key.removeprefix(LORA_PREFIX): tensor for key, tensor in tensors.items()}


def part_name(key: str) -> str:
    """The part that a state-dict key belongs to: one of PARTS, "adapters" or "other" (projections, loss)."""
    if "lora_" in key:
        return "adapters"
    if key.startswith((*ENCODER_PREFIXES, "encoder.")):
        return "encoder"
    if key.startswith(PROJECTOR_PREFIX):
        return "projector"
    if key == EMBEDDINGS:
        return "embeddings"
    return "language_model" if key.startswith(("model.", "lm_head.", TEXT_ENCODER_PREFIX)) else "other"


def part_of(tensors: dict[str, Tensor], part: str, source: str | Path) -> dict[str, Tensor]:
    """Tensors of one part, under the keys of its file (the language model's: those of a plain one).

    The projector comes with the embeddings it was trained with, the language model has its own.

    Raises:
        CheckpointError: no such part in these tensors, or a language model with unmerged adapters.
    """
    wanted = {"projector": ("projector", "embeddings"), "language_model": ("language_model", "embeddings")}
    chosen = {key: tensor for key, tensor in tensors.items() if part_name(key) in wanted.get(part, (part,))}
    held = sorted({part_name(key) for key in tensors})
    if part not in held:
        raise CheckpointError(f"{source}: expected a part {part}, found {', '.join(held)}")
    if part == "language_model" and "adapters" in held:
        raise CheckpointError(f"{source}: expected a merged model, found adapters; first run med3dvlm.train.merge")
    prefixes = {"encoder": ENCODER_PREFIXES, "language_model": (TEXT_ENCODER_PREFIX,)}.get(part, ())
    return {_cut(key, prefixes): tensor for key, tensor in chosen.items()}


def _cut(key: str, prefixes: tuple[str, ...]) -> str:
    return next((key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)), key)


def extract(path: str | Path, part: str, output: str | Path | None = None) -> Path:
    """Take a part out of a full checkpoint.

    Args:
        part: one of PARTS.
        output: a `.bin` or `.safetensors` file; for the language model also a folder, which any transformers model
            loader reads. Default: the stage's file name, beside the checkpoint.
    Returns:
        What was written.
    Raises:
        CheckpointError: see `read_checkpoint` and `part_of`.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    target = folder / PARTS[part] if output is None else Path(output)
    stored = read_checkpoint(path)
    tensors = part_of(stored, part, path)
    if part != "language_model" or target.suffix in (".bin", ".safetensors"):
        write_tensors(tensors, target)
        return target
    config = _language_model_config(folder, stored)
    begin_folder(target)
    write_weights(tensors, target)
    for name in COMPANIONS:
        if (folder / name).is_file():
            shutil.copy(folder / name, target / name)
    with written_atomically(target / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return target


def _language_model_config(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """config.json of the plain language model (Qwen2) or text encoder inside a checkpoint."""
    values = read_config(folder)
    if values.get("model_type") == CLIPConfig.model_type:
        return (CLIPConfig.from_dict(values).text_config or text_config_of(tensors, folder)).to_dict()
    if values.get("model_type") != VLMConfig.model_type:
        raise CheckpointError(f"{folder}: expected the config.json of a {VLMConfig.model_type}, found none")
    config = VLMConfig.from_dict(values).to_diff_dict()
    known = {*Qwen2Config().to_dict(), "rope_theta", "rope_scaling", "torch_dtype"}
    plain = {key: value for key, value in config.items() if key in known}
    return plain | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds: model type, and for each part its tensors, numbers of parameters and dtypes.

    Reads shapes only, no data. Raises CheckpointError as `read_checkpoint`.
    """
    config = read_config(Path(path)) if Path(path).is_dir() else {}
    parts: dict[str, dict[str, Any]] = {}
    for key, tensor in read_checkpoint(path, device="meta").items():
        part = parts.setdefault(part_name(key), {"tensors": 0, "parameters": 0, "dtypes": Counter()})
        part["tensors"] += 1
        part["parameters"] += tensor.numel()
        part["dtypes"][str(tensor.dtype).removeprefix("torch.")] += 1
    return {**{key: config.get(key) for key in ("model_type", "architectures")}, "parts": parts}


def main(argv: list[str] | None = None) -> Any:
    """Command line, see the module; returns what `inspect` or `extract` return."""
    parser = argparse.ArgumentParser(prog="python -m med3dvlm.model.checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="say what is in a checkpoint")
    extracting = commands.add_parser("extract", help="take a part out of a full checkpoint")
    for command in (inspecting, extracting):
        command.add_argument("path", metavar="FOLDER", help="checkpoint folder, or a single weight file")
    extracting.add_argument("--part", required=True, choices=list(PARTS))
    extracting.add_argument("--output", help=".bin or .safetensors file; default: the stage's file name in FOLDER")
    arguments = parser.parse_args(argv)
    if arguments.command == "extract":
        written = extract(arguments.path, arguments.part, arguments.output)
        print(f"wrote {written}")
        return written
    result = inspect(arguments.path)
    print(f"model type {result['model_type']}, architectures {result['architectures']}")
    for name, part in result["parts"].items():
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in part["dtypes"].items())
        print(f"{name:15} {part['tensors']:6} tensors {part['parameters']:15,} numbers   {dtypes}")
    return result


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        sys.exit(f"error: {error}")
