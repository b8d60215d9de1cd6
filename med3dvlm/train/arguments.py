"""Arguments of the training stages: published flag names, defaults of the published recipe, and presets.

Every flag of `transformers.TrainingArguments` is accepted as well. Order of precedence: command line, preset, default.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from med3dvlm.configuration import PRESETS
from med3dvlm.data.cache import CacheError
from med3dvlm.data.command import run_command
from med3dvlm.data.datasets import SampleError
from med3dvlm.data.manifest import ManifestError
from med3dvlm.data.volume import VolumeError
from med3dvlm.model.weights import CheckpointError
from med3dvlm.train.checkpoints import COMPLETE, complete_checkpoints


class FlagError(ValueError):
    """Flags that contradict each other or name what cannot be; the message says which."""


BAD_INPUT = (FlagError, CacheError, CheckpointError, ManifestError, SampleError, VolumeError)


def _device_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def arg(help: str, **kwargs: Any):
    """A dataclass field with a help text; `default=` or `factory=`."""
    if "factory" in kwargs:
        kwargs["default_factory"] = kwargs.pop("factory")
    return field(metadata={"help": help}, **kwargs)


@dataclass
class VisionArguments:
    """The image encoder, the same in all stages."""

    vision_variant: str = arg("DCFormer variant: nano, naive, tiny, small (published), base, large.", default="small")
    input_size: list[int] = arg("Volume size as H W D, in voxels.", factory=lambda: [256, 256, 128])
    dim: int = arg("Width of the ViT-3D (vit3d only).", default=768)
    depth: int = arg("Blocks of the ViT-3D (vit3d only).", default=12)
    patch_size: list[int] = arg("Patch of the ViT-3D (vit3d only).", factory=lambda: [16, 16, 16])
    fused_encoder: Literal["cpu", "auto", "off"] = arg(
        "Fast path of DCFormer: on the CPU only, auto: also the Triton kernels on a GPU, off: nowhere.", default="cpu"
    )

    def __post_init__(self):
        for flag in ("input_size", "patch_size"):
            sizes = getattr(self, flag)
            if len(sizes) != 3 or min(sizes) < 1:
                raise FlagError(f"--{flag} {' '.join(map(str, sizes))}: expected three numbers of 1 or more, H W D")

    @property
    def volume_size(self) -> tuple[int, int, int]:
        """(D, H, W) of the volumes the model sees."""
        height, width, depth = self.input_size
        return (depth, height, width)


@dataclass
class CLIPModelArguments(VisionArguments):
    """The dual encoder."""

    language_model_name_or_path: str = arg("Text encoder: a folder or hub name.", default="medicalai/ClinicalBERT")
    vision_encoder: str = arg("dcformer or vit3d.", default="dcformer")
    hidden_size: int = arg("Width of the shared feature space.", default=768)
    loss_type: str = arg("sigmoid (SigLIP) or nce (CLIP).", default="sigmoid")
    t_prime: float = arg("Start value of the log scale of the logits (SigLIP paper: log 10).", default=math.log(10))
    bias: float = arg("Start value of the offset of the logits; small batches want about -log(batch).", default=-10.0)
    pretrained_model: str | None = arg("Continue from this dual encoder (folder or hub name).", default=None)


@dataclass
class VLMModelArguments(VisionArguments):
    """The language model with its image encoder and projector."""

    model_name_or_path: str = arg(
        "Qwen2.5 to build on, or a complete Med3DVLM to train further: a folder or hub name.",
        default="Qwen/Qwen2.5-7B-Instruct",
    )
    vision_tower: str = arg("dcformer or vit3d.", default="dcformer")
    pretrain_vision_model: str | None = arg("pretrained_ViT.* of the contrastive stage.", default=None)
    mm_projector_type: str = arg("linear, mlp, low_high_mlp, mixer (published) or mhsa.", default="mixer")
    mm_mlp_depth: int = arg("Linear layers in each MLP of the projector.", default=2)
    low_output_size: list[int] = arg("Mixer: tokens of the low stream after each layer.", factory=lambda: [192, 128])
    high_output_size: list[int] = arg("Mixer: tokens of the high stream after each layer.", factory=lambda: [64, 128])
    tune_mm_mlp_adapter: bool = arg("Projector stage: train projector and token embeddings.", default=False)
    pretrain_mm_mlp_adapter: str | None = arg("mm_projector.* of the projector stage.", default=None)
    embeddings_from_base: bool = arg(
        "LoRA stage: start from the base model's token embeddings (as published), not the projector stage's.",
        default=False,
    )


@dataclass
class DataArguments:
    """Where the data lies (see docs/data.md) and how much of it may be unreadable."""

    data_root: str = arg("Folder that the paths in the manifests are relative to.", default="./data")
    cap_data_path: str = arg("M3D_Cap.json.", default="./data/M3D_Cap_npy/M3D_Cap.json")
    max_bad_samples: int = arg("Unreadable samples to skip (counted and listed) before the stage stops.", default=0)
    image_cache: str | None = arg(
        "Folder of a memory-mapped image cache, made when it is not there (one byte a voxel); 'auto': image_cache "
        "in data_root.",
        default=None,
    )
    augment: Literal["none", "intensity", "published", "auto"] = arg(
        "Random changes of images. intensity: scale and shift; published: also flips and quarter turns, which "
        "contradict texts with sides and planes; auto: published where no text names any, otherwise intensity.",
        default="none",
    )

    @property
    def check_files(self) -> bool:
        """Whether to look for every file before training; where some may be bad, each is met when it is its turn."""
        return self.max_bad_samples == 0


@dataclass
class PairDataArguments(DataArguments):
    max_length: int = arg("Tokens of a report; longer ones are shortened by whole sentences.", default=512)


@dataclass
class QADataArguments(DataArguments):
    vqa_data_train_path: str = arg("M3D-VQA training table.", default="./data/M3D-VQA/M3D_VQA_train.csv")
    vqa_yn_data_train_path: str = arg("Yes/no table (LoRA stage).", default="./data/M3D-VQA/M3D_VQA_yn_train.csv")
    questions_per_image: int = arg(
        "Questions about one image that share its encoding in a training sample; 1 is the published way.", default=1
    )


@dataclass
class StageTrainingArguments(transformers.TrainingArguments):
    """Defaults of the published recipe that all stages share."""

    output_dir: str = arg("Folder for checkpoints and results.", default="./output/stage")
    bf16: bool = arg("bfloat16 arithmetic; default: where the device has it.", factory=_device_has_bf16)
    learning_rate: float = arg("Peak learning rate.", default=1e-4)
    warmup_ratio: float = arg("Share of the steps over which the learning rate rises.", default=0.03)
    lr_scheduler_type: str = arg("Schedule of the learning rate.", default="cosine")
    remove_unused_columns: bool = arg("Must stay off: samples are dictionaries of ours.", default=False)
    ddp_find_unused_parameters: bool = arg("Not needed: every trained parameter is used.", default=False)
    logging_steps: float = arg("Steps between two log lines.", default=10)
    save_total_limit: int | None = arg("Checkpoints to keep.", default=2)
    dataloader_pin_memory: bool = arg("Pinned memory for the transfer to a GPU.", factory=torch.cuda.is_available)
    report_to: str = arg("tensorboard, wandb or none.", default="tensorboard")
    seed: int = arg("Seed of initialisation, order and every random choice.", default=42)
    resume_from_checkpoint: str | None = arg(
        "A checkpoint folder, or 'auto': the last complete one of output_dir, if there is any. Without it, those of an "
        "older run in output_dir are set aside.",
        default=None,
    )
    wb_name: str | None = arg("Name of the run in the logs.", default=None)

    def __post_init__(self):
        for flag in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, flag) < 1:
                raise FlagError(f"--{flag} {getattr(self, flag)}: expected a number of 1 or more")
        if self.warmup_ratio and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # below 1: a share of all steps
        self.run_name = self.wb_name or self.run_name
        super().__post_init__()
        # What is pinned can go to the device while the step before it is computed.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory

    def checkpoint_to_resume(self) -> str | None:
        """The folder to continue from, None for a fresh start.

        Raises:
            FlagError: the named folder is not a complete checkpoint.
        """
        asked = self.resume_from_checkpoint
        if asked is None or str(asked).lower() == "false":
            return None
        if str(asked).lower() in ("auto", "true", "last"):
            complete = complete_checkpoints(self.output_dir)
            return str(complete[-1]) if complete else None
        if not (Path(asked) / COMPLETE).is_file():
            raise FlagError(f"--resume_from_checkpoint {asked}: expected a complete checkpoint folder, found no file "
                            f"{COMPLETE!r} in it; 'auto' takes the last complete one of --output_dir")  # fmt: skip
        return str(asked)


@dataclass
class CLIPTrainingArguments(StageTrainingArguments):
    output_dir: str = arg("Folder for checkpoints and results.", default="./output/DCFormer_SigLIP")
    num_train_epochs: float = arg("Epochs.", default=100)
    per_device_train_batch_size: int = arg("Image-report pairs per device.", default=64)
    weight_decay: float = arg("Weight decay.", default=0.1)
    text_learning_rate: float | None = arg("Peak rate of the text encoder (default: that of all).", default=None)
    dataloader_drop_last: bool = arg("The gathered loss wants the same batch size on every rank.", default=True)


@dataclass
class VLMTrainingArguments(StageTrainingArguments):
    output_dir: str = arg("Folder for checkpoints and results.", default="./output/Med3DVLM-Qwen-2.5-7B-pretrain")
    num_train_epochs: float = arg("Epochs.", default=3)
    per_device_train_batch_size: int = arg("Samples per device.", default=16)
    model_max_length: int = arg("Tokens of a sample, image tokens included.", default=512)
    lora_enable: bool = arg("LoRA stage: adapters, encoder, projector, embeddings and lm_head train.", default=False)
    lora_r: int = arg("Rank of the adapters.", default=16)
    lora_alpha: int = arg("Scale of the adapters, over their rank.", default=32)
    lora_dropout: float = arg("Dropout before the adapters.", default=0.05)


# What differs from the dataclass defaults in the published LoRA stage.
PUBLISHED_LORA = {
    "output_dir": "./output/Med3DVLM-Qwen-2.5-7B-finetune",
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-5,
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples of the description as they are written."""


def parse_stage(stage: str, classes: Sequence[type], argv: Sequence[str] | None, description: str) -> tuple[Any, ...]:
    """Parse a stage's command line into one object per dataclass.

    Args:
        stage: "clip", or "vlm", which becomes "projector" or "lora" by its flags.
        classes: dataclasses of the stage.
    Raises:
        FlagError: values that don't go together. What is no flag at all ends the program, as argparse does.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=sorted(PRESETS), default="published")
    first.add_argument("--lora_enable", nargs="?", const="true", default="false")
    known, _ = first.parse_known_args(argv)
    if stage == "vlm":
        stage = "lora" if known.lora_enable.lower() in ("true", "1", "yes", "y", "t") else "projector"

    parser = transformers.HfArgumentParser(
        classes, description=description, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="published", help="defaults for all other flags")
    defaults = (PUBLISHED_LORA if stage == "lora" else {}) | PRESETS[known.preset][stage]
    accepted = {action.dest for action in parser._actions}
    parser.set_defaults(**{key: value for key, value in defaults.items() if key in accepted})
    with checked_flags("flags of the stage"):
        *parsed, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


@contextmanager
def checked_flags(about: str) -> Iterator[None]:
    """What flags bring about elsewhere (a model that is not there, sizes that don't fit) is a FlagError `about` them.

    Errors that say themselves what they are about stay as they are.
    """
    try:
        yield
    except BAD_INPUT:
        raise
    except (OSError, ValueError) as error:
        raise FlagError(f"{about}: {' '.join(str(error).split())}") from error


def check_writable(folder: str | Path) -> None:
    """Raise FlagError unless files can be written into `--output_dir`, which is not made yet, and so left by no error.

    Asked first: the work of a stage may take days, and is lost where it cannot be saved.
    """
    try:
        there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
        Path(tempfile.mkdtemp(prefix=".med3dvlm-", dir=there)).rmdir()
    except OSError as error:
        raise FlagError(f"--output_dir {folder}: cannot be written ({error.strerror}); name another folder") from error


def run(main: Callable[[], object]) -> None:
    """A stage as a program: what users can put right ends it with one sentence and exit status 1."""
    run_command(main, (*BAD_INPUT, OSError))
