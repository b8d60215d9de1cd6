"""Stages 2 and 3: the language model learns to read the image encoder.

Projector pre-training (`--tune_mm_mlp_adapter True`) trains projector and token embeddings; LoRA fine-tuning
(`--lora_enable True`) trains adapters on every linear layer of the language model, and encoder, projector, embeddings
and lm_head in full.

    python -m med3dvlm.train.vlm --tune_mm_mlp_adapter True --pretrain_vision_model .../pretrained_ViT.bin
    python -m med3dvlm.train.vlm --lora_enable True --pretrain_vision_model .../pretrained_ViT.bin \\
        --pretrain_mm_mlp_adapter .../mm_projector.bin

Writes `mm_projector.bin`, or `model_with_lora.bin` (everything, unmerged), each with config, tokenizer, processor and
`base_model.json`, the identity of the language model it belongs to, into `--output_dir`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, set_seed

from med3dvlm.configuration import VLMConfig
from med3dvlm.data.collate import collate_vlm
from med3dvlm.data.datasets import CaptionDataset, GroupedQADataset, VQADataset
from med3dvlm.data.manifest import read_caption_manifest, read_vqa_csv
from med3dvlm.data.preprocess import PreprocessConfig
from med3dvlm.model.checkpoint import load_projector, load_vision_encoder, save_lora, save_projector
from med3dvlm.model.encoder import build_vision_encoder
from med3dvlm.model.identity import base_identity, write_identity
from med3dvlm.model.vlm import VLMForCausalLM, lora_target_modules
from med3dvlm.processing import VLMProcessor, load_tokenizer
from med3dvlm.train.arguments import QADataArguments, VLMModelArguments, VLMTrainingArguments, parse_stage
from med3dvlm.train.trainer import MixedDataset, TrainedOnlyTrainer, log_to_console, whole_models

logger = logging.getLogger("med3dvlm.train")  # also when run as __main__


def vision_config(args: VLMModelArguments) -> dict:
    """Keys of `VLMConfig` for encoder and projector; the projector's input sizes follow from the encoder."""
    keys = ("vision_tower", "vision_variant", "input_size", "dim", "depth", "patch_size")
    keys += ("mm_projector_type", "mm_mlp_depth", "low_output_size", "high_output_size")
    values = {key: getattr(args, key) for key in keys}
    with torch.device("meta"):
        encoder = build_vision_encoder(SimpleNamespace(**values))
    top = len(encoder.channels) - 1
    low, high = ([encoder.num_tokens(level), encoder.channels[level]] for level in (top - 1, top))
    if args.mm_projector_type == "low_high_mlp":
        low, high = low[1], high[1]
    return values | {"low_input_size": low, "high_input_size": high, "mm_hidden_size": encoder.channels[top]}


def build_model(args: VLMModelArguments, stage: str) -> tuple[VLMForCausalLM, VLMProcessor]:
    """The model of a stage with the hand-over files of the stages before it, and its processor.

    Weights are float32, as published: what trains in bfloat16 alone loses small updates. Arithmetic is the Trainer's.
    """
    if AutoConfig.from_pretrained(args.model_name_or_path).model_type == VLMConfig.model_type:
        model = VLMForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
        processor = VLMProcessor.from_pretrained(args.model_name_or_path, config=model.config)
    else:
        preprocess = PreprocessConfig("published", args.volume_size)
        processor = VLMProcessor(load_tokenizer(args.model_name_or_path), 0, preprocess)
        overrides = vision_config(args) | {
            "vocab_size": len(processor.tokenizer),
            "image_token_id": processor.image_token_id,
        }
        model = VLMForCausalLM.from_language_model(args.model_name_or_path, overrides, dtype=torch.float32)
        processor.num_image_tokens = model.num_image_tokens
    if args.pretrain_vision_model:
        load_vision_encoder(model, args.pretrain_vision_model)
    if args.pretrain_mm_mlp_adapter:
        load_projector(model, args.pretrain_mm_mlp_adapter, embeddings=stage != "lora" or not args.embeddings_from_base)
    return model, processor


def build_dataset(data_args: QADataArguments, training_args: VLMTrainingArguments, processor: VLMProcessor):
    """Reports, closed and open questions; in the LoRA stage yes/no questions as well (as published)."""
    options = {
        "seed": training_args.seed,
        "augmented": data_args.augment,
        "max_bad_samples": data_args.max_bad_samples,
    }
    length = training_args.model_max_length
    root, check = data_args.data_root, data_args.check_files
    captions = read_caption_manifest(data_args.cap_data_path, root, "train", check)
    questions = read_vqa_csv(data_args.vqa_data_train_path, root, check)
    datasets = [
        CaptionDataset(captions, processor, length, **options),
        VQADataset(questions, processor, length, kind="closed", **options),
        VQADataset(questions, processor, length, kind="open", **options),
    ]
    if training_args.lora_enable:
        yes_no = read_vqa_csv(data_args.vqa_yn_data_train_path, root, check)
        datasets.append(VQADataset(yes_no, processor, length, kind="yes_no", **options))
    if data_args.questions_per_image > 1:
        return GroupedQADataset(datasets, length, data_args.questions_per_image, **options)
    return MixedDataset(datasets)


def add_adapters(model: VLMForCausalLM, args: VLMTrainingArguments):
    """The model with LoRA matrices on every linear layer of the language model."""
    return get_peft_model(
        model,
        LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=lora_target_modules(model),
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the stage; returns its metrics (`train_loss`, `train_runtime` in seconds, `bad_samples`, ...).

    Raises:
        ValueError: neither stage is asked for.
    """
    classes = (VLMModelArguments, QADataArguments, VLMTrainingArguments)
    model_args, data_args, training_args = parse_stage("vlm", classes, argv, __doc__)
    stage = "lora" if training_args.lora_enable else "projector"
    if stage == "projector" and not model_args.tune_mm_mlp_adapter:
        raise ValueError("say what trains: --tune_mm_mlp_adapter True (projector) or --lora_enable True (LoRA)")
    log_to_console()
    set_seed(training_args.seed)

    with whole_models(training_args):
        model, processor = build_model(model_args, stage)
    identity = base_identity(model, model_args.model_name_or_path)
    dataset = build_dataset(data_args, training_args, processor)
    logger.info("%d samples; preprocessing: %s", len(dataset), processor.preprocess)
    trained = add_adapters(model, training_args) if stage == "lora" else model
    model.config.use_cache = False
    model.freeze(stage)
    collate = partial(collate_vlm, pad_token_id=processor.tokenizer.pad_token_id)
    trainer = TrainedOnlyTrainer(trained, training_args, dataset, collate)
    metrics = trainer.run()

    output = Path(training_args.output_dir)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if stage == "lora":
        save_lora(trained, output / "model_with_lora.bin")
    else:
        save_projector(trained, output / "mm_projector.bin")
    if training_args.should_save:
        model.config.use_cache = True
        model.config.save_pretrained(output)
        processor.save_pretrained(output)
        if stage == "lora":
            trained.peft_config["default"].save_pretrained(output)
        write_identity(identity, output)
    return metrics


if __name__ == "__main__":
    main()
