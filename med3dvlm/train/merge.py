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
from med3dvlm.model.identity import check_identity, read_identity
from med3dvlm.model.published import begin_folder
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.model.weights import CheckpointError
from med3dvlm.processing import VLMProcessor
from med3dvlm.train.arguments import run


def load_unmerged(folder: str | Path):
    """The fine-tuned model with its adapters (a `PeftModel` in eval mode) from the folder of the LoRA stage.

    Raises:
        CheckpointError: the folder lacks a file of that stage, or its weights don't fit its config.
    """
    folder = Path(folder)
    for name in ("config.json", "adapter_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: expected the output of the LoRA stage, found no {name}")
    model = VLMForCausalLM(VLMConfig.from_pretrained(folder))
    adapters = LoraConfig.from_pretrained(folder)
    model.name_or_path = adapters.base_model_name_or_path  # peft warns where they differ; the weights are checked
    adapted = get_peft_model(model, adapters)
    load_lora(adapted, folder)
    return adapted.eval()


def main(argv: Sequence[str] | None = None) -> Path:
    """Merge; returns the folder that was written.

    Raises:
        CheckpointError: see `load_unmerged`, or the base model is another one.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_with_lora", required=True, help="folder of the LoRA stage, or the file in it")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--model_name_or_path", help="base model to check against the recorded one (default: none)")
    args = parser.parse_args(argv)

    folder = Path(args.model_with_lora)
    folder = folder if folder.is_dir() else folder.parent
    identity = read_identity(folder)
    adapted = load_unmerged(folder)
    check_identity(identity, adapted.get_base_model(), args.model_name_or_path)
    processor = VLMProcessor.from_pretrained(folder)
    merged = adapted.merge_and_unload()

    output = Path(args.output_dir)
    begin_folder(output)
    save_vision_tower(merged, output / "vision_tower.bin")
    processor.save_pretrained(output)
    merged.save_pretrained(output)  # last: the folder is complete only with its config.json
    print(f"{output}: merged {folder} (base model {identity['name_or_path']})")
    return output


if __name__ == "__main__":
    run(main)
