"""Where the stages get their images from: cache or files, loader processes, augmentation, how they were prepared."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from med3dvlm.data.datasets import SampleError
from med3dvlm.data.manifest import ManifestError
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.profile import DataProfile, write_preparation
from med3dvlm.data.volume import VolumeError, load_volume, write_prepared
from med3dvlm.inference import load_clip
from med3dvlm.train import arguments, trainer
from med3dvlm.train.data import choose_augmentation
from tests.helpers.commands import ROOT
from tests.helpers.tiny_stages import CASES, PROJECTOR, copy_run, damaged_data, different, interrupt, losses

STEPS = ["--max_steps", 4, "--save_steps", 1, "--save_total_limit", 10]  # two steps are an epoch
AUGMENT = ["--augment", "published"]


@pytest.fixture(scope="module")
def run(stages, tmp_path_factory):
    """An uninterrupted contrastive run from the files, with augmentation."""
    folder = tmp_path_factory.mktemp("images") / "run"
    stages.clip(folder, *STEPS, *AUGMENT)
    return folder


def assert_same_training(found, expected):
    assert losses(found) == losses(expected)
    assert not different(load_file(found / "model.safetensors"), load_file(expected / "model.safetensors"))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_training_is_the_same_from_the_cache_and_with_any_number_of_workers(stages, run, tmp_path, workers, cached):
    flags = ["--image_cache", tmp_path / "cache"] if cached else []
    stages.clip(tmp_path / "run", *STEPS, *AUGMENT, *flags, "--dataloader_num_workers", workers)
    assert_same_training(tmp_path / "run", run)


def test_a_resumed_training_sees_the_same_augmented_images(stages, run, tmp_path):
    for step in (1, 2):
        folder = copy_run(run, tmp_path / f"from {step}")
        interrupt(folder, step)
        flags = ["--image_cache", tmp_path / "cache", "--resume_from_checkpoint", "auto"]
        stages.clip(folder, *STEPS, *AUGMENT, *flags)
        assert_same_training(folder, run)


def test_augmentation_changes_what_is_seen(stages, run, tmp_path):
    found = {tuple(losses(run))}
    for name in ("none", "intensity"):
        stages.clip(tmp_path / name, *STEPS[:2], "--augment", name)
        found.add(tuple(losses(tmp_path / name)))
    assert len(found) == 3


def test_stages_share_the_cache_beside_the_data(stages, tmp_path, monkeypatch):
    root = copy_data(stages, tmp_path)
    flags = [*stages.data_flags(root), "--image_cache", "auto"]
    stages.clip(tmp_path / "clip", *flags)
    monkeypatch.setattr("med3dvlm.data.cache._fill", None)
    tables = ["--vqa_data_train_path", root / "M3D-VQA/M3D_VQA_train.csv"]
    stages.vlm(tmp_path / "projector", *PROJECTOR, *flags, *tables, "--questions_per_image", 3)
    stages.vlm(tmp_path / "plain", *PROJECTOR, *flags[:-2], *tables, "--questions_per_image", 3)
    assert losses(tmp_path / "projector") == losses(tmp_path / "plain")
    assert [folder.name[:8] for folder in (root / "image_cache").iterdir()] == ["32x64x64"]


def copy_data(stages, tmp_path) -> Path:
    return copy_run(stages.data, tmp_path / "data")


def test_batches_reach_the_device_as_bytes(stages, tmp_path, monkeypatch):
    seen = []
    convert = trainer.to_unit
    monkeypatch.setattr(trainer, "to_unit", lambda images, **kw: seen.append(images.dtype) or convert(images, **kw))
    stages.clip(tmp_path)
    assert seen == [torch.uint8] * 2


def test_archives_of_the_same_values_train_alike_whatever_their_dtype(stages, tmp_path):
    root = copy_data(stages, tmp_path)
    for file in (root / "M3D_Cap_npy").rglob("*.nii.gz"):
        write_prepared(file, load_volume(file).array, "float32")
    for name, flags in {"files": [], "cache": ["--image_cache", tmp_path / "cache"]}.items():
        stages.clip(tmp_path / name, *stages.data_flags(root), *flags)
    stages.clip(tmp_path / "codes")
    # What is float32 here was uint8 before.
    assert losses(tmp_path / "files") == losses(tmp_path / "cache") == losses(tmp_path / "codes")


@pytest.mark.parametrize("cached", [[], ["--image_cache", "auto"]], ids=["files", "cache"])
def test_bad_images_are_treated_alike(stages, tmp_path, caplog, cached):
    root, *images = damaged_data(stages.data, tmp_path / "data")
    flags = [*stages.data_flags(root), *cached, "--num_train_epochs", 1, "--max_steps", -1]
    flags += ["--per_device_train_batch_size", 5]
    with pytest.raises(VolumeError, match=rf"M3D_Cap.json, row train\[[14]\]: ({images[0]}|{images[1]})"):
        stages.clip(tmp_path / "run", *flags, "--max_bad_samples", 1)
    metrics = stages.clip(tmp_path / "run", *flags, "--max_bad_samples", 2)
    assert metrics["bad_samples"] == 2 and "2 samples could not be read" in caplog.text


# ---------------------------------------------------------------- how data were prepared

PROFILE = DataProfile(cases=10, modalities=("CT",), values="HU")


def test_preparation_and_profile_are_recorded_beside_the_weights(stages, tmp_path, caplog):
    root = copy_data(stages, tmp_path)
    config = PreprocessConfig("ct_abdomen", (32, 64, 64), keep_aspect=True)
    write_preparation(root / "M3D_Cap_npy", config, PROFILE)
    stages.clip(tmp_path / "clip", *stages.data_flags(root))
    assert "the model expects 'ct_abdomen keep_aspect'" in caplog.text  # the files say how they were made
    assert load_clip(tmp_path / "clip", device="cpu").preprocess == config
    stages.vlm(tmp_path / "projector", *PROJECTOR, *stages.data_flags(root))
    for name in ("clip", "projector"):
        values = json.loads((tmp_path / name / "processor_config.json").read_text())
        assert PreprocessConfig.from_dict(values["preprocess"]) == config
        assert DataProfile.from_dict(values["training_data"]) == PROFILE


def test_a_damaged_preparation_file_is_named(stages, tmp_path):
    root = copy_data(stages, tmp_path)
    (root / "M3D_Cap_npy" / "preparation.json").write_text("{")
    with pytest.raises(ManifestError, match="preparation.json: cannot be used"):
        stages.clip(tmp_path / "clip", *stages.data_flags(root))


def test_a_model_that_is_trained_further_keeps_its_preprocessing(stages, tmp_path, caplog):
    """Data that went through another pipeline are reported, once."""
    root = copy_data(stages, tmp_path)
    config = PreprocessConfig("ct_lung", (32, 64, 64))
    write_preparation(root / "M3D_Cap_npy", config, PROFILE)
    stages.clip(tmp_path / "first", *stages.data_flags(root))
    caplog.clear()
    stages.clip(tmp_path / "second", "--pretrained_model", tmp_path / "first")  # on data without a preparation.json
    assert caplog.text.count("the model expects 'ct_lung'") == 1
    assert load_clip(tmp_path / "second", device="cpu").preprocess == config


def test_data_of_another_size_are_reported_and_resized(stages, tmp_path, caplog):
    stages.clip(tmp_path, "--input_size", 32, 32, 32)
    assert caplog.text.count("is prepared as 32x64x64, the model sees 32x32x32") == 1


def test_what_the_preparation_wrote_reaches_the_checkpoint_and_matches(stages, tmp_path, caplog):
    stages.clip(tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "prepar" in record.message]
    values = json.loads((tmp_path / "processor_config.json").read_text())
    assert PreprocessConfig.from_dict(values["preprocess"]) == PreprocessConfig("published", (32, 64, 64))
    assert DataProfile.from_dict(values["training_data"]).cases == CASES


class Report:
    def __init__(self, text):
        self.text = text

    def read_text(self):
        return self.text


@pytest.mark.parametrize("text, allowed", [("A cyst in the left kidney.", "intensity"), ("A cyst.", "published")])
def test_scans_are_not_turned_against_their_texts_unless_asked(text, allowed, caplog):
    records = [Report("No finding."), Report(text)]
    assert choose_augmentation("auto", records) == allowed
    assert "wrong" not in caplog.text
    assert choose_augmentation("published", records) == "published"
    assert ("texts name sides or planes" in caplog.text) == (allowed == "intensity")
    assert choose_augmentation("none", records) == "none"


# ---------------------------------------------------------------- errors of the command lines


@pytest.mark.parametrize("error, sentence", [
    (VolumeError("a.nii.gz: is empty"), "a.nii.gz: is empty"),
    (SampleError("Caught SampleError in DataLoader worker process 0.\nOriginal Traceback ...\n"
                 "med3dvlm.data.datasets.SampleError: row 1: too long\n"), "row 1: too long"),
    (arguments.FlagError("--a and --b"), "--a and --b"),
])  # fmt: skip
def test_a_bad_input_ends_a_stage_with_one_sentence(error, sentence):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        arguments.run(main)
    assert caught.value.code == f"error: {sentence}"


def test_other_errors_keep_their_traceback():
    def main():
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="a mistake of ours"):
        arguments.run(main)


@pytest.mark.parametrize("flags, message", [
    (["--model_name_or_path", "/dev/null"], "/dev/null is a file: name the folder"),
    (["--vision_variant", "huge"], "huge"),
    (["--input_size", "0", "64", "32"], "size"),
    (["--image_cache", "/dev/null"], "/dev/null.*name another folder"),
    (["--save_strategy", "epoch", "--load_best_model_at_end", "True"], "load_best_model_at_end"),
])  # fmt: skip
def test_flags_that_cannot_be_are_bad_input(stages, tmp_path, flags, message):
    with pytest.raises(arguments.BAD_INPUT, match=message):
        stages.vlm(tmp_path, *PROJECTOR, *flags)


def test_the_exit_status_is_1(tmp_path):
    command = [sys.executable, "-m", "med3dvlm.train.clip", "--cap_data_path", "absent.json", "--use_cpu", "True"]
    done = subprocess.run([*command, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "error: absent.json: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
