"""Two CPU processes with DeepSpeed through the launchers: what they save is what one process would have."""

import math
import shutil

import pytest
import torch

from med3dvlm.inference import load_clip, load_model
from med3dvlm.model.checkpoint import load_vision_encoder
from med3dvlm.model.weights import read_tensors
from med3dvlm.train import merge
from tests.helpers.commands import ROOT, run_script
from tests.helpers.tiny_stages import PROJECTOR, different, losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an extension: g++ is missing"),
]

STEPS = ["--max_steps", 3, "--save_steps", 2, "--save_total_limit", 5, "--dataloader_num_workers", 0]
BF16 = ["--bf16", "True"]


def launch(name, flags, folder, zero=2):
    """Run a launcher with two processes of one thread each; the first start compiles for a minute."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    variables = {"NPROC": "2", "OMP_NUM_THREADS": "1", "DEEPSPEED_CONFIG": str(ROOT / f"scripts/zero{zero}.json")}
    done = run_script(f"scripts/{name}.sh", *map(str, flags), cwd=folder, timeout=280, **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def handed_over(stages, tmp_path_factory):
    """Flags that name the files of the stages before, which one process has written."""
    folder = tmp_path_factory.mktemp("before")
    stages.clip(folder / "clip")
    encoder = ["--pretrain_vision_model", folder / "clip" / "pretrained_ViT.bin"]
    stages.vlm(folder / "projector", *PROJECTOR, *encoder)
    return [*encoder, "--pretrain_mm_mlp_adapter", folder / "projector" / "mm_projector.bin"]


@pytest.mark.parametrize("precision", [[], BF16], ids=["fp32", "bf16"])
def test_contrastive_stage(stages, tmp_path, precision):
    flags = stages.clip_flags(tmp_path, *STEPS, "--per_device_train_batch_size", 2, *precision,
                              "--image_cache", tmp_path / "cache", "--augment", "intensity")  # fmt: skip
    launch("train_clip", flags, tmp_path)
    assert len(losses(tmp_path)) == 3 and all(map(math.isfinite, losses(tmp_path)))
    model = load_clip(tmp_path, device="cpu").model
    load_vision_encoder(model, tmp_path / "pretrained_ViT.bin")
    tensors = read_tensors(tmp_path / "model.safetensors")
    assert tensors["t_prime"].shape == tensors["bias"].shape == ()
    assert any(value.item() not in (0.0, 1.0) for key, t in tensors.items() if "running_mean" in key for value in t[:1])
    assert (tmp_path / "checkpoint-2" / "complete").is_file()


def test_contrastive_stage_says_that_zero_3_is_not_for_it(stages, tmp_path):
    flags = stages.clip_flags(tmp_path, *STEPS)
    with pytest.raises(AssertionError, match="here use scripts/zero2.json"):
        launch("train_clip", flags, tmp_path, zero=3)


@pytest.mark.parametrize("zero, precision", [(2, []), (2, BF16), (3, []), (3, BF16)],
                         ids=["ZeRO-2", "ZeRO-2 bf16", "ZeRO-3", "ZeRO-3 bf16"])  # fmt: skip
def test_lora_stage_is_saved_merged_and_resumed(stages, handed_over, tmp_path, zero, precision):
    def train(folder, *flags):
        flags = stages.vlm_flags(folder, *handed_over, *STEPS, *precision, *flags)
        launch("finetune_lora", flags, tmp_path, zero)
        return read_tensors(folder / "model_with_lora.bin")

    folder, again = tmp_path / "lora", tmp_path / "again"
    found = train(folder)
    assert len(losses(folder)) == 3 and all(map(math.isfinite, losses(folder)))
    adapters = [key for key in found if ".lora_B." in key]
    assert adapters and all(found[key].abs().max() > 0 for key in adapters)

    merge.main(["--model_with_lora", str(folder), "--output_dir", str(tmp_path / "model"),
                "--model_name_or_path", str(stages.models / "language_model")])  # fmt: skip
    answer = load_model(tmp_path / "model", device="cpu").answer(torch.rand(1, 32, 64, 64), "Where?", max_new_tokens=2)
    assert answer.tokens >= 1

    shutil.copytree(folder / "checkpoint-2", again / "checkpoint-2")
    resumed = train(again, "--resume_from_checkpoint", "auto")
    assert losses(again) == losses(folder)
    assert not different(resumed, found)
