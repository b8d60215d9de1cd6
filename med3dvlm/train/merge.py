"""Stage 4: fold the adapters into the language model and write one self-contained folder.

    python -m med3dvlm.train.merge --model_with_lora output/Med3DVLM-Qwen-2.5-7B-finetune \\
        --output_dir models/Med3DVLM-Qwen-2.5-7B

The folder holds config, weights, tokenizer and processor in the published layout, and `vision_tower.bin`. Logits equal
those of the unmerged model. The base model recorded by the LoRA stage is checked; naming another one is an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, get_peft_model

from med3dvlm.configuration import VLMConfig
from med3dvlm.model.checkpoint import load_lora, save_vision_tower
from med3dvlm.model.identity import IDENTITY_FILE, check_identity, read_identity
from med3dvlm.model.published import begin_folder
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.model.weights import CheckpointError
from med3dvlm.processing import VLMProcessor
from med3dvlm.train.arguments import check_writable, run


def lora_folder(path: str | Path) -> Path:
    """The folder of the LoRA stage that `path`, this folder or a weight file in it, names.

    Raises:
        CheckpointError: nothing there, or it lacks a file of that stage.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder or file; name the folder that the LoRA stage wrote, or the "
                              "model_with_lora file in it")  # fmt: skip
    folder = path if path.is_dir() else path.parent
    for name in (IDENTITY_FILE, "config.json", "adapter_config.json"):
        if not (folder / name).is_file():
            beside = "" if folder == path else " beside it"
            raise CheckpointError(f"{path}: expected the output of the LoRA stage, found no {name}{beside}")
    return folder


def load_unmerged(path: str | Path):
    """The fine-tuned model with its adapters (a `PeftModel` in eval mode).

    Args:
        path: folder of the LoRA stage, or the weight file in it to load.
    Raises:
        CheckpointError: see `lora_folder`, or the weights don't fit the config.
    """
    folder = lora_folder(path)
    model = VLMForCausalLM(VLMConfig.from_pretrained(folder))
    adapters = LoraConfig.from_pretrained(folder)
    model.name_or_path = adapters.base_model_name_or_path  # peft warns where they differ; the weights are checked
    adapted = get_peft_model(model, adapters)
    load_lora(adapted, path)
    return adapted.eval()


def main(argv: Sequence[str] | None = None) -> Path:
    """Merge; returns the folder that was written.

    Raises:
        CheckpointError: see `load_unmerged`, or the base model is another one.
        FlagError: the folder to write cannot be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_with_lora", required=True, help="folder of the LoRA stage, or the weight file in it")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--model_name_or_path", help="base model to check against the recorded one (default: none)")
    args = parser.parse_args(argv)

    folder, output = lora_folder(args.model_with_lora), Path(args.output_dir)
    check_writable(output)
    identity = read_identity(folder)
    adapted = load_unmerged(args.model_with_lora)
    check_identity(identity, adapted.get_base_model(), args.model_name_or_path)
    processor = VLMProcessor.from_pretrained(folder)
    merged = adapted.merge_and_unload()

    begin_folder(output)
    save_vision_tower(merged, output / "vision_tower.bin")
    processor.save_pretrained(output)
    merged.save_pretrained(output)  # last: the folder is complete only with its config.json
    print(f"{output}: merged {args.model_with_lora} (base model {identity['name_or_path']})")
    return output


if __name__ == "__main__":
    run(main)
