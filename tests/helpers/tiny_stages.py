"""The training stages on a dozen phantoms and tiny models, through their public commands; and what their tests compare.

Data come the public way: phantoms, preparation, renaming. Every stage runs in this process (`main(argv)`), on one CPU,
with the sizes below.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from med3dvlm.data import phantom, prepare
from med3dvlm.data.manifest import rename_manifest
from med3dvlm.train import clip, vlm
from tests.helpers.tiny_model import TINY_PROJECTORS, write_tiny_language_model, write_tiny_text_encoder

CASES, TRAINING_CASES = 16, 10
VISION = ["--vision_variant", "nano", "--input_size", "64", "64", "32"]
TRAINING = ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "1",
            "--seed", "3", "--learning_rate", "1e-3"]  # fmt: skip
PROJECTOR, LORA = ["--tune_mm_mlp_adapter", "True"], ["--lora_enable", "True"]


def write_phantoms(root: Path, cases: int = CASES) -> Path:
    """A data root as a user has it after preparation and renaming; 32x64x64 voxels, stored as uint8."""
    phantom.main(["--output", str(root), "--cases", str(cases), "--seed", "0", "--num_workers", "1"])
    prepared = root / "M3D_Cap_npy"
    assert not prepare.main(["--input_dir", str(root / "M3D_Cap"), "--output_dir", str(prepared), "--num_workers", "1",
                             "--dtype", "uint8", "--size", "32", "64", "64"])  # fmt: skip
    for manifest in (*(root / "M3D-VQA").glob("*.csv"), prepared / "M3D_Cap.json"):
        assert rename_manifest(manifest)
    return root


@dataclass
class Stages:
    """Runs the stages on one data root; further flags come last and so decide."""

    data: Path
    models: Path  # holds text_encoder, language_model and tied_language_model

    def data_flags(self, root: Path | None = None) -> list[str]:
        root = root or self.data
        return ["--data_root", str(root), "--cap_data_path", str(root / "M3D_Cap_npy/M3D_Cap.json")]

    def clip_flags(self, output: Path, *flags: object) -> list[str]:
        flags = ["--output_dir", output, "--max_steps", 2, "--per_device_train_batch_size", 4, *flags]
        return [*self.data_flags(), *VISION, *TRAINING, "--hidden_size", "32", "--max_length", "64",
                "--language_model_name_or_path", str(self.models / "text_encoder"), *map(str, flags)]  # fmt: skip

    def clip(self, output: Path, *flags: object) -> dict[str, float]:
        return clip.main(self.clip_flags(output, *flags))

    def vlm_flags(self, output: Path, *flags: object) -> list[str]:
        tables = self.data / "M3D-VQA"
        mixer = TINY_PROJECTORS["mixer"]
        flags = ["--output_dir", output, "--max_steps", 2, "--per_device_train_batch_size", 2, *flags]
        return [*self.data_flags(), *VISION, *TRAINING,
                "--vqa_data_train_path", str(tables / "M3D_VQA_train.csv"),
                "--vqa_yn_data_train_path", str(tables / "M3D_VQA_yn_train.csv"),
                "--model_name_or_path", str(self.models / "language_model"),
                "--low_output_size", *map(str, mixer["low_output_size"]),
                "--high_output_size", *map(str, mixer["high_output_size"]),
                "--lora_r", "4", *map(str, flags)]  # fmt: skip

    def vlm(self, output: Path, *flags: object) -> dict[str, float]:
        return vlm.main(self.vlm_flags(output, *flags))


def write_stages(folder: Path) -> Stages:
    """Data and base models of all stage tests."""
    models = folder / "models"
    write_tiny_text_encoder(models / "text_encoder")
    write_tiny_language_model(models / "language_model")
    write_tiny_language_model(models / "tied_language_model", tie_word_embeddings=True)
    return Stages(write_phantoms(folder / "data"), models)


def losses(folder: Path) -> list[float]:
    """The logged loss of every step of a run."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def interrupt(folder: Path, *keep: int) -> None:
    """Leave of a finished run what an interrupted one has: its checkpoints, of which only `keep` are complete."""
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) not in keep:
            (checkpoint / "complete").unlink()


def copy_run(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Keys whose tensors aren't the same to the bit; both must have the same keys."""
    assert found.keys() == expected.keys()
    return [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)]


def damaged_data(source: Path, target: Path) -> tuple[Path, Path, Path]:
    """A copy of a data root where the images of the training rows 1 and 4 are damaged; and these images."""
    shutil.copytree(source / "M3D_Cap_npy", target / "M3D_Cap_npy")
    shutil.copytree(source / "M3D-VQA", target / "M3D-VQA")
    rows = json.loads((target / "M3D_Cap_npy/M3D_Cap.json").read_text())["train"]
    images = [target / rows[number]["image"] for number in (1, 4)]
    for image in images:
        image.write_bytes(image.read_bytes()[:500])
    return target, *images
