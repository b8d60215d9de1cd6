"""Stage 1: contrastive training of the image encoder on image-report pairs (SigLIP or CLIP loss). Everything trains.

    python -m med3dvlm.train.clip --data_root data --cap_data_path data/M3D_Cap_npy/M3D_Cap.json

Writes a dual encoder in the published layout (`config.json`, `model.safetensors`, tokenizer) and `pretrained_ViT.bin`,
the image encoder for the next stages, into `--output_dir`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from med3dvlm.configuration import CLIPConfig
from med3dvlm.data.collate import collate_pairs
from med3dvlm.data.datasets import PairDataset
from med3dvlm.data.manifest import read_caption_manifest
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.profile import DataProfile
from med3dvlm.model.checkpoint import save_vision_encoder
from med3dvlm.model.clip import CLIPModel
from med3dvlm.model.fused.choice import set_fused
from med3dvlm.model.published import begin_folder, local_folder
from med3dvlm.model.weights import CheckpointError, misfitting, read_weights
from med3dvlm.processing import load_preprocess, load_tokenizer, save_preprocess
from med3dvlm.train.arguments import (
    CLIPModelArguments,
    CLIPTrainingArguments,
    FlagError,
    PairDataArguments,
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
from med3dvlm.train.trainer import StageTrainer, log_to_console

logger = logging.getLogger("med3dvlm.train")  # also when run as __main__


def build_model(args: CLIPModelArguments) -> CLIPModel:
    """A new dual encoder with the weights of the named text encoder, or the one to continue from."""
    if args.pretrained_model:
        return CLIPModel.from_pretrained(args.pretrained_model)
    return CLIPModel.from_text_encoder(
        args.language_model_name_or_path,
        vision_encoder=args.vision_encoder,
        vision_variant=args.vision_variant,
        input_size=args.input_size,
        dim=args.dim,
        depth=args.depth,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        loss_type=args.loss_type,
        t_prime=args.t_prime,
        bias=args.bias,
    )


def begin_model(folder: Path, tokenizer, preprocess: PreprocessConfig, profile: DataProfile) -> None:
    """Write what stands beside the weights of a dual encoder; its `save_pretrained` then makes the folder whole."""
    begin_folder(folder)
    tokenizer.save_pretrained(folder)
    save_preprocess(folder, preprocess, profile)


class ContrastiveTrainer(StageTrainer):
    """As `StageTrainer`; the text encoder may learn at a rate of its own.

    Args:
        begin: `begin_model` of this run, for a folder: every checkpoint is a model to be evaluated.
    """

    def __init__(self, model: CLIPModel, begin: Callable[[Path], None], *args):
        super().__init__(model, *args)
        self.begin = begin
        for parameter in model.parameters():
            if parameter.ndim == 0:
                # DeepSpeed can't broadcast single numbers and skips what has this mark; all ranks start from the same.
                parameter.ds_optim_param = True

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        rate = self.args.text_learning_rate
        if rate is not None:
            text = {id(parameter) for parameter in self.model.language_encoder.parameters()}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in text]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in text]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.begin(Path(output_dir or self.args.output_dir))
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: CLIPModel | None = None) -> None:
        model, stored = model or self.model, read_weights(resume_from_checkpoint)
        misfits = misfitting(stored, model.state_dict())
        if misfits:
            then, now = CLIPConfig.from_pretrained(resume_from_checkpoint).to_dict(), model.config.to_dict()
            flags = [field.name for field in fields(CLIPModelArguments) if field.name in now]
            changed = [f"{flag} was {then[flag]}, now {now[flag]}" for flag in flags if then[flag] != now[flag]]
            raise CheckpointError(f"{resume_from_checkpoint} is of another run: {', '.join(changed) or misfits}; go on "
                                  "with the flags of that run, or start anew in another --output_dir")  # fmt: skip
        model.load_state_dict(stored)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the stage; returns its metrics (`train_loss`, `train_runtime` in seconds, `bad_samples`, ...).

    Raises:
        FlagError: flags that contradict each other. ManifestError, VolumeError, SampleError, CheckpointError: data or
            a model that cannot be used.
    """
    classes = (CLIPModelArguments, PairDataArguments, CLIPTrainingArguments)
    model_args, data_args, training_args = parse_stage("clip", classes, argv, __doc__)
    log_to_console()
    check_writable(training_args.output_dir)
    if data_args.max_bad_samples and training_args.world_size > 1:
        raise FlagError("--max_bad_samples needs a single process here: all ranks must bring equal batches")
    if is_deepspeed_zero3_enabled():
        raise FlagError("ZeRO-3 can't spread the single numbers t_prime and bias; here use scripts/zero2.json")
    set_seed(training_args.seed)

    records = read_caption_manifest(data_args.cap_data_path, data_args.data_root, "train", data_args.check_files)
    require_samples(records, f"{data_args.cap_data_path} (train)")
    preprocess, profile = preparation_of(records, data_args)
    start = model_args.pretrained_model or model_args.language_model_name_or_path
    with checked_flags(f"a dual encoder from {start}"):
        local_folder(start)  # says so where there is no such folder; the loaders' errors are about hub names
        tokenizer = load_tokenizer(start)
        model = build_model(model_args)
        preprocess = replace(preprocess, size=model_args.volume_size)
        if model_args.pretrained_model:  # it goes on seeing what it has seen
            preprocess, known = load_preprocess(model_args.pretrained_model, model.config)
            profile = profile if profile.cases else known
    set_fused(model, model_args.fused_encoder)
    tell_about_preparation(records, preprocess)
    augmentation = choose_augmentation(data_args.augment, records)
    dataset = PairDataset(
        records,
        tokenizer,
        data_args.max_length,
        preprocess,
        shuffled=True,
        images=open_images(records, preprocess, data_args, training_args.disable_tqdm),
        seed=training_args.seed,
        augmented=augmentation != "none",
        max_bad_samples=data_args.max_bad_samples,
    )
    logger.info("%d image-report pairs", len(dataset))
    collate = partial(collate_pairs, tokenizer=tokenizer)
    begin = partial(begin_model, tokenizer=tokenizer, preprocess=preprocess, profile=profile)
    trainer = ContrastiveTrainer(model, begin, training_args, dataset, collate, augmentation)
    metrics = trainer.run()

    output = Path(training_args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if training_args.should_save:
        begin(output)
    save_vision_encoder(model, output / "pretrained_ViT.bin")
    model.save_pretrained(output, is_main_process=training_args.should_save)  # last: see begin_folder
    return metrics


if __name__ == "__main__":
    run(main)
