"""The Trainer of all stages: checkpoints to be trusted, data sets that know the epoch, batches of like lengths."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_pt_utils import LengthGroupedSampler

from med3dvlm.data.augment import to_unit
from med3dvlm.model.weights import CheckpointError, misfitting, read_tensors, write_tensors
from med3dvlm.train.arguments import FlagError, StageTrainingArguments
from med3dvlm.train.checkpoints import COMPLETE, complete_checkpoints, set_aside

logger = logging.getLogger("med3dvlm.train")  # also when run as __main__

TRAINED = "trained.safetensors"  # what a checkpoint of a language-model stage holds: all that trains, nothing frozen


class MixedDataset(ConcatDataset):
    """Several data sets one after the other, that are told the epoch and report what they skipped."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    @property
    def bad_samples(self) -> list[str]:
        return [line for dataset in self.datasets for line in dataset.bad_samples]

    @property
    def lengths(self) -> list[int]:
        return [length for dataset in self.datasets for length in dataset.lengths]


class LengthSampler(LengthGroupedSampler):
    """Batches of like lengths; their order follows from seed and epoch alone, so that a continued run repeats it.

    Args:
        dataset: has `lengths` and `epoch`.
    """

    def __init__(self, batch_size: int, dataset: MixedDataset, seed: int):
        super().__init__(batch_size, lengths=dataset.lengths, generator=torch.Generator())
        self.dataset, self.seed = dataset, seed

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.dataset.epoch)
        return super().__iter__()


class CheckpointCallback(TrainerCallback):
    """Tells the data set its epoch; marks a checkpoint as complete once everything of it is written.

    Only then older ones are removed, down to `keep` (None: all stay), so that there is always one to continue from.
    Those of another run in the same folder are set aside when training begins, with `continued` (a folder) loaded.
    """

    def __init__(self, dataset, keep: int | None):
        self.dataset = dataset
        self.keep = keep
        self.continued: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            older = set_aside(args.output_dir, self.continued)
            if older:
                logger.info("%d checkpoints of an older run in %s are set aside, never to be taken for this run's "
                            "(%s); an empty file %r in such a folder makes it one to continue from again",
                            len(older), args.output_dir, ", ".join(f.name for f in older), COMPLETE)  # fmt: skip
        if self.continued and state.global_step >= state.max_steps:
            logger.warning("nothing left to train: %s is of step %d of %d, and what is saved now is what it holds; to "
                           "train anew leave --resume_from_checkpoint out or name another --output_dir",
                           self.continued, state.global_step, state.max_steps)  # fmt: skip
        _wait_for_all()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))  # a sum of fractions may end just below

    def on_save(self, args, state, control, **kwargs):
        _wait_for_all()  # every process has written its part
        if not state.is_world_process_zero:
            return
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (written / COMPLETE).touch()
        if self.keep:
            older = [folder for folder in complete_checkpoints(args.output_dir) if folder != written]
            for folder in older[: max(0, len(older) + 1 - self.keep)]:
                (folder / COMPLETE).unlink()
                shutil.rmtree(folder)


class StageTrainer(Trainer):
    """HF Trainer for the contrastive stage: whole checkpoints in the published layout.

    Args:
        train_dataset: has `set_epoch`, `bad_samples` and, where batches of like lengths pay, `lengths` and `epoch`.
        augmentation: of images whose batch has image_seeds, a name in `med3dvlm.data.augment.AUGMENTATIONS`.
    Raises:
        FlagError: see `require_batch`.
    """

    def __init__(
        self, model: nn.Module, args: StageTrainingArguments, train_dataset, data_collator, augmentation: str = "none"
    ):
        require_batch(len(train_dataset), args)
        self.checkpoints = CheckpointCallback(train_dataset, args.save_total_limit)
        args.save_total_limit = None  # the Trainer would remove the old checkpoint before the new one is complete
        super().__init__(model, args, data_collator, train_dataset, callbacks=[self.checkpoints])
        self.augmentation = augmentation

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Images come as bytes and become float32 (augmented where asked) on the device."""
        inputs = super()._prepare_inputs(inputs)
        seeds = inputs.pop("image_seeds", None)
        inputs["images"] = to_unit(inputs["images"], seeds=seeds, augmentation=self.augmentation)
        return inputs

    def _get_train_sampler(self, train_dataset=None):
        if not hasattr(self.train_dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthSampler(batch, self.train_dataset, self.args.seed)

    def _run_epoch(self, *args, **kwargs) -> None:
        """Continued from its last step within an epoch, a run would train one step more than asked for."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def run(self) -> dict[str, float]:
        """Train from the start or the asked checkpoint; returns the stage's metrics and writes `trainer_state.json`."""
        checkpoint = self.args.checkpoint_to_resume()
        if checkpoint:
            logger.info("continuing from %s", checkpoint)
        self.checkpoints.continued = checkpoint
        metrics = self.train(resume_from_checkpoint=checkpoint).metrics
        self.save_state()
        skipped = self.train_dataset.bad_samples
        if skipped:
            logger.warning("%d samples could not be read and were skipped:\n%s", len(skipped), "\n".join(skipped))
        return metrics | {"bad_samples": len(skipped)}


class TrainedOnlyTrainer(StageTrainer):
    """As `StageTrainer`, but a checkpoint holds what trains and no frozen weight (of a 7B model that is 28 GB)."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        keys = trained_keys(self.model)
        write_tensors({key: state_dict[key] for key in keys}, Path(output_dir or self.args.output_dir) / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = model or self.model
        file = Path(resume_from_checkpoint) / TRAINED
        stored, state = read_tensors(file), model.state_dict()
        misfits = misfitting(stored, {key: state[key] for key in trained_keys(model)})
        if misfits:
            raise CheckpointError(f"{file} is of another run: {misfits}")
        model.load_state_dict(stored, strict=False)


def _wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def require_batch(count: int, args: StageTrainingArguments) -> None:
    """Raise FlagError where `count` samples make no full batch and only full ones are trained on: none would be.

    Every process drops what is left of its share; an accumulated gradient may be of fewer batches than asked for.
    """
    batch, processes = args.train_batch_size, args.world_size
    if args.dataloader_drop_last and count < batch * processes:
        times = f" (x {processes} processes)" if processes > 1 else ""
        raise FlagError(f"{count} samples are fewer than a batch: {batch}{times}, so that nothing would be trained; "
                        "lower --per_device_train_batch_size")  # fmt: skip


def trained_keys(model: nn.Module) -> list[str]:
    """State-dict keys of all trainable parameters and of the buffers (batch norm statistics) beside them."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    persistent = model.state_dict().keys()

    def trains(buffer: str) -> bool:
        module = buffer.rpartition(".")[0]
        return any(f"{module}.{leaf}" in trainable for leaf in ("weight", "bias"))

    buffers = [name for name, _ in model.named_buffers() if name in persistent and trains(name)]
    return sorted(trainable) + sorted(buffers)


@contextmanager
def whole_models(args: StageTrainingArguments) -> Iterator[None]:
    """Build models whole on every process.

    Under ZeRO-3, transformers would spread the weights while it loads them, and then they can be neither resized nor
    checked. DeepSpeed spreads those of a whole model when training starts.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    yield
    if config is not None:
        set_hf_deepspeed_config(config)


def log_to_console() -> None:
    """Show the package's messages on the terminal, once, on the first process only."""
    package = logging.getLogger("med3dvlm")
    if not package.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    package.setLevel(logging.INFO if first else logging.ERROR)
