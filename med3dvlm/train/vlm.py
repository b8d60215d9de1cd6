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
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from med3dvlm.configuration import VLMConfig
from med3dvlm.data.collate import collate_vlm
from med3dvlm.data.datasets import CaptionDataset, GroupedQADataset, VQADataset
from med3dvlm.data.manifest import check_closed, read_caption_manifest, read_vqa_csv
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.model.checkpoint import load_projector, load_vision_encoder, save_lora, save_projector
from med3dvlm.model.encoder import build_vision_encoder
from med3dvlm.model.fused.choice import set_fused
from med3dvlm.model.identity import IDENTITY_FILE, base_identity, write_identity
from med3dvlm.model.published import begin_folder, local_folder
from med3dvlm.model.vlm import VLMForCausalLM, lora_target_modules
from med3dvlm.model.weights import read_config
from med3dvlm.processing import VLMProcessor, load_tokenizer
from med3dvlm.train.arguments import (
    FlagError,
    QADataArguments,
    VLMModelArguments,
    VLMTrainingArguments,
    check_writable,
    checked_flags,
    parse_stage,
    run,
)
from med3dvlm.train.data import (
    choose_augmentation,
    open_images,
    preparation_of,
    require_samples,
    tell_about_preparation,
)
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


def build_model(
    args: VLMModelArguments, stage: str, preprocess: PreprocessConfig
) -> tuple[VLMForCausalLM, VLMProcessor]:
    """The model of a stage with the hand-over files of the stages before it, and its processor.

    preprocess: that of the data, which a new model takes over; one that is trained further keeps its own.
    Weights are float32, as published: what trains in bfloat16 alone loses small updates. Arithmetic is the Trainer's.
    """
    if read_config(local_folder(args.model_name_or_path)).get("model_type") == VLMConfig.model_type:
        model = VLMForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
        processor = VLMProcessor.from_pretrained(args.model_name_or_path, config=model.config)
    else:
        preprocess = replace(preprocess, size=args.volume_size)
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


def read_records(data_args: QADataArguments, yes_no: bool) -> dict[str, list]:
    """The training rows by what becomes of them: "caption", "closed", "open" and, where asked for, "yes_no"."""
    root, check = data_args.data_root, data_args.check_files
    captions = read_caption_manifest(data_args.cap_data_path, root, "train", check)
    questions = read_vqa_csv(data_args.vqa_data_train_path, root, check)
    if check:
        check_closed(questions)
    records = {"caption": captions, "closed": questions, "open": questions}
    if yes_no:
        records["yes_no"] = read_vqa_csv(data_args.vqa_yn_data_train_path, root, check)
    return records


def build_dataset(records: dict[str, list], processor: VLMProcessor, max_length: int, per_image: int, **options):
    """The data sets of `read_records` one after the other, or grouped by image where `per_image` is above 1."""
    datasets = [
        CaptionDataset(rows, processor, max_length, **options)
        if kind == "caption"
        else VQADataset(rows, processor, max_length, kind=kind, **options)
        for kind, rows in records.items()
    ]
    return GroupedQADataset(datasets, max_length, per_image, **options) if per_image > 1 else MixedDataset(datasets)


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
        FlagError: neither stage is asked for, or flags contradict each other. ManifestError, VolumeError, SampleError,
            CheckpointError: data or a model that cannot be used.
    """
    classes = (VLMModelArguments, QADataArguments, VLMTrainingArguments)
    model_args, data_args, training_args = parse_stage("vlm", classes, argv, __doc__)
    stage = "lora" if training_args.lora_enable else "projector"
    if stage == "projector" and not model_args.tune_mm_mlp_adapter:
        raise FlagError("say what trains: --tune_mm_mlp_adapter True (projector) or --lora_enable True (LoRA)")
    log_to_console()
    check_writable(training_args.output_dir)
    set_seed(training_args.seed)

    records = read_records(data_args, yes_no=stage == "lora")
    rows = [record for kind in records.values() for record in kind]
    require_samples(rows, f"{data_args.cap_data_path} (train)", data_args.vqa_data_train_path)
    preprocess, profile = preparation_of(rows, data_args)
    with whole_models(training_args), checked_flags(f"a model from {model_args.model_name_or_path}"):
        model, processor = build_model(model_args, stage, preprocess)
    processor.training_data = profile if profile.cases else processor.training_data
    identity = base_identity(model, model_args.model_name_or_path)
    set_fused(model, model_args.fused_encoder)
    tell_about_preparation(rows, processor.preprocess)
    augmentation = choose_augmentation(data_args.augment, rows)
    dataset = build_dataset(
        records,
        processor,
        training_args.model_max_length,
        data_args.questions_per_image,
        images=open_images(rows, processor.preprocess, data_args, training_args.disable_tqdm),
        seed=training_args.seed,
        augmented=augmentation != "none",
        max_bad_samples=data_args.max_bad_samples,
    )
    logger.info("%d samples", len(dataset))
    trained = add_adapters(model, training_args) if stage == "lora" else model
    model.config.use_cache = False
    model.freeze(stage)
    collate = partial(collate_vlm, pad_token_id=processor.tokenizer.pad_token_id)
    trainer = TrainedOnlyTrainer(trained, training_args, dataset, collate, augmentation)
    metrics = trainer.run()

    output = Path(training_args.output_dir)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if training_args.should_save:
        begin_folder(output, IDENTITY_FILE)
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
        write_identity(identity, output)  # last: see begin_folder
    return metrics


if __name__ == "__main__":
    run(main)
