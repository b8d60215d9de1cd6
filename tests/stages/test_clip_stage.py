"""The contrastive stage on a few phantoms: what it writes, where it starts, how it goes on after an interruption."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from med3dvlm.data.manifest import ManifestError
from med3dvlm.data.volume import VolumeError
from med3dvlm.inference import load_clip
from med3dvlm.model.checkpoint import load_vision_encoder
from med3dvlm.model.clip import CLIPModel
from med3dvlm.model.weights import CheckpointError, read_tensors, write_tensors
from med3dvlm.processing import load_tokenizer
from med3dvlm.train.arguments import FlagError
from med3dvlm.train.trainer import CheckpointCallback, require_batch
from tests.helpers.tiny_stages import TRAINING_CASES, copy_run, damaged_data, different, interrupt, losses

# Two steps are an epoch (10 cases, batches of 4, the rest dropped).
STEPS, SAVE = ["--max_steps", 6], ["--save_steps", 1, "--save_total_limit", 10]


def test_the_data_are_what_the_tests_think(stages):
    manifest = json.loads((stages.data / "M3D_Cap_npy/M3D_Cap.json").read_text())
    assert len(manifest["train"]) == TRAINING_CASES


@pytest.fixture(scope="module")
def run(stages, tmp_path_factory):
    """An uninterrupted run of three epochs."""
    folder = tmp_path_factory.mktemp("clip") / "run"
    metrics = stages.clip(folder, *STEPS, *SAVE)
    assert metrics["bad_samples"] == 0 and math.isfinite(metrics["train_loss"])
    return folder


def test_the_stage_hands_over_its_encoder_under_the_published_names(run, tmp_path):
    assert {"config.json", "model.safetensors", "pretrained_ViT.bin", "tokenizer.json", "trainer_state.json"} <= {
        file.name for file in run.iterdir()
    }
    encoder = read_tensors(run / "pretrained_ViT.bin")
    assert all(key.startswith("encoder.") for key in encoder)
    model = CLIPModel.from_pretrained(run)
    assert not different(model.vision_encoder.state_dict(), encoder)
    assert model.config.architectures == ["DEC_CLIP"]
    write_tensors(encoder, tmp_path / "pretrained_ViT.safetensors")
    for source in (run / "pretrained_ViT.bin", tmp_path / "pretrained_ViT.safetensors", tmp_path):
        fresh = CLIPModel(model.config)
        load_vision_encoder(fresh, source)
        assert not different(fresh.vision_encoder.state_dict(), encoder)


def test_the_trained_model_can_be_evaluated(run):
    encoder = load_clip(run, device="cpu")
    tokens = encoder.tokenizer(["a small cyst", "a large abscess"], padding=True, return_tensors="pt")
    features = encoder.encode_texts(tokens["input_ids"], tokens["attention_mask"])
    assert features.shape == (2, 32) and torch.allclose(features.norm(dim=1), torch.ones(2))


def test_a_checkpoint_is_a_model_with_the_preprocessing_of_its_run(run):
    found, expected = (load_clip(folder, device="cpu") for folder in (run / "checkpoint-2", run))
    assert (found.preprocess, found.training_data) == (expected.preprocess, expected.training_data)
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


@pytest.mark.parametrize("stopped_at", ["save_preprocess", "save_vision_encoder", "CLIPModel.save_pretrained"])
def test_an_interrupted_end_leaves_no_model_that_loads(stages, run, tmp_path, monkeypatch, stopped_at):
    """Neither in a new folder nor over the model of an older run."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    older = copy_run(run, tmp_path / "older")
    monkeypatch.setattr(f"med3dvlm.train.clip.{stopped_at}", interrupted)
    for folder in (older, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            stages.clip(folder, "--save_strategy", "no", "--max_steps", 1)
        with pytest.raises(CheckpointError, match="no config.json"):
            load_clip(folder, device="cpu")


def test_everything_trains_and_text_weights_start_from_the_named_encoder(stages, run, tmp_path):
    stages.clip(tmp_path / "start", "--max_steps", 1, "--learning_rate", 0)
    started, trained = (load_file(folder / "model.safetensors") for folder in (tmp_path / "start", run))
    text = AutoModel.from_pretrained(stages.models / "text_encoder").state_dict()
    prefix = "language_encoder."
    assert not different({k.removeprefix(prefix): v for k, v in started.items() if k.startswith(prefix)}, text)
    stayed = set(started) - set(different(trained, started))
    # Biases of convolutions in front of a batch norm have no effect and, on the fused path, gradient 0.
    stayed = {key for key in stayed if not (key.startswith("vision_encoder.") and re.search(r"c[123]\.0\.bias$", key))}
    assert not stayed, f"did not train: {stayed}"


@pytest.mark.parametrize("step", [3, 4, 6], ids=["within an epoch", "between epochs", "after the last step"])
def test_resuming_equals_not_having_stopped(stages, run, tmp_path, step):
    folder = copy_run(run, tmp_path / "run")
    interrupt(folder, *range(1, step + 1))
    stages.clip(folder, *STEPS, *SAVE, "--resume_from_checkpoint", "auto")
    assert losses(folder) == losses(run)
    assert not different(load_file(folder / "model.safetensors"), load_file(run / "model.safetensors"))


def test_an_incomplete_checkpoint_is_not_continued_from(stages, run, tmp_path, caplog):
    folder = copy_run(run, tmp_path / "run")
    interrupt(folder)
    with pytest.raises(ValueError, match="checkpoint-3: expected a complete checkpoint folder, found no"):
        stages.clip(folder, *STEPS, "--resume_from_checkpoint", folder / "checkpoint-3")
    (folder / "checkpoint-3" / "optimizer.pt").unlink()
    stages.clip(folder, *STEPS, "--save_strategy", "no", "--resume_from_checkpoint", "auto")
    assert "continuing from" not in caplog.text
    assert losses(folder) == losses(run)


def stop_after(monkeypatch, step):
    """Interrupt a run when this step is done, with what it has saved until then."""

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointCallback, "on_step_begin", stop)


def test_auto_never_takes_the_checkpoint_of_an_older_run(stages, run, tmp_path, monkeypatch, caplog):
    """A fresh start with another seed, over a finished run, is interrupted: it goes on as what it was."""
    folder, flags = copy_run(run, tmp_path / "run"), [*STEPS, "--save_steps", 2, "--seed", 5]
    stages.clip(tmp_path / "undisturbed", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        stages.clip(folder, *flags)
    assert f"6 checkpoints of an older run in {folder} are set aside" in caplog.text and "checkpoint-6)" in caplog.text
    assert len(list(folder.glob("checkpoint-*/model.safetensors"))) == 6, "files of the older run are gone"
    caplog.clear()
    stages.clip(folder, *flags, "--resume_from_checkpoint", "auto")
    assert f"continuing from {folder / 'checkpoint-2'}" in caplog.text and "set aside" not in caplog.text
    assert losses(folder) == losses(tmp_path / "undisturbed") != losses(run)
    encoders = [read_tensors(place / "pretrained_ViT.bin") for place in (folder, tmp_path / "undisturbed")]
    assert not different(*encoders)


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(stages, run, tmp_path, monkeypatch):
    folder = copy_run(run, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        stages.clip(folder, *STEPS, *SAVE, "--resume_from_checkpoint", folder / "checkpoint-3")
    complete = sorted(file.parent.name for file in folder.glob("checkpoint-*/complete"))
    assert complete == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("steps", [4, 5, 6], ids=["fewer than trained", "within an epoch", "as many as trained"])
def test_a_run_with_nothing_left_to_train_says_so(stages, run, tmp_path, caplog, steps):
    folder = copy_run(run, tmp_path / "run")
    interrupt(folder, *range(1, max(steps, 5) + 1))
    last = folder / f"checkpoint-{max(steps, 5)}"
    stages.clip(folder, "--max_steps", steps, *SAVE, "--resume_from_checkpoint", "auto")
    assert f"nothing left to train: {last} is of step {max(steps, 5)} of {steps}" in caplog.text
    assert not different(load_file(folder / "model.safetensors"), load_file(last / "model.safetensors"))


def test_a_named_checkpoint_is_continued_from(stages, run, tmp_path):
    stages.clip(tmp_path, *STEPS, "--save_strategy", "no", "--resume_from_checkpoint", run / "checkpoint-2")
    assert losses(tmp_path) == losses(run)


@pytest.mark.parametrize(("flags", "change"), [
    (["--loss_type", "nce"], "loss_type was sigmoid, now nce"),
    (["--vision_variant", "naive"], "vision_variant was nano, now naive"),
    (["--hidden_size", 16], "hidden_size was 32, now 16"),
])  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(stages, run, tmp_path, flags, change):
    checkpoint = run / "checkpoint-2"
    with pytest.raises(CheckpointError, match=rf"^{checkpoint} is of another run: {change}; go on with the flags"):
        stages.clip(tmp_path, *flags, "--resume_from_checkpoint", checkpoint)


def test_a_checkpoint_that_lacks_weights_is_refused(stages, run, tmp_path):
    checkpoint = copy_run(run / "checkpoint-2", tmp_path / "checkpoint-2")
    weights = read_tensors(checkpoint / "model.safetensors")
    del weights["bias"]
    write_tensors(weights, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"^{checkpoint} is of another run: missing: bias;"):
        stages.clip(tmp_path / "run", "--resume_from_checkpoint", checkpoint)


def test_older_checkpoints_go_only_when_the_new_one_is_complete(stages, tmp_path, monkeypatch):
    """A run that dies while it writes or removes a checkpoint leaves one that it can continue from."""
    from med3dvlm.train import trainer

    remove = shutil.rmtree

    def dies(path, *args, **kwargs):
        if not Path(path).name.startswith("checkpoint-"):
            return remove(path, *args, **kwargs)  # temporary folders
        assert not (path / "complete").exists(), "half removed, yet marked as complete"
        assert (tmp_path / "checkpoint-2" / "complete").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        stages.clip(tmp_path, "--save_steps", 1, "--save_total_limit", 1)


def test_as_many_checkpoints_stay_as_asked_for(stages, tmp_path):
    stages.clip(tmp_path, *STEPS, "--save_steps", 1, "--save_total_limit", 2)
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_a_dual_encoder_is_trained_further(stages, run, tmp_path):
    stages.clip(tmp_path, "--pretrained_model", run, "--language_model_name_or_path", "absent", "--learning_rate", 0,
                "--max_steps", 1)  # fmt: skip
    changed = different(load_file(tmp_path / "model.safetensors"), load_file(run / "model.safetensors"))
    assert changed and all("running_" in key or "num_batches" in key for key in changed)
    vocabularies = [load_tokenizer(folder).get_vocab() for folder in (tmp_path, run)]
    assert vocabularies[0] == vocabularies[1]


def test_the_text_encoder_may_learn_at_its_own_rate(stages, tmp_path):
    stages.clip(tmp_path, "--text_learning_rate", 0, "--bias", -3, "--weight_decay", 0.1)
    weights = load_file(tmp_path / "model.safetensors")
    text = AutoModel.from_pretrained(stages.models / "text_encoder").state_dict()
    assert not different({key: weights[f"language_encoder.{key}"] for key in text}, text)
    assert weights["bias"].item() != -3.0 and abs(weights["bias"].item() + 3) < 0.1


@pytest.mark.parametrize("flags", [
    ["--loss_type", "nce"],
    ["--vision_encoder", "vit3d", "--dim", "48", "--depth", "2", "--patch_size", "16", "16", "16"],
], ids=["nce", "vit3d"])  # fmt: skip
def test_other_losses_and_encoders_train(stages, tmp_path, flags):
    stages.clip(tmp_path, *flags)
    assert all(math.isfinite(loss) for loss in losses(tmp_path)) and len(losses(tmp_path)) == 2
    model = CLIPModel.from_pretrained(tmp_path)
    assert hasattr(model, "logit_scale") == ("nce" in flags)
    load_vision_encoder(model, tmp_path / "pretrained_ViT.bin")


@pytest.mark.parametrize("flag", ["--language_model_name_or_path", "--pretrained_model"])
def test_a_model_to_start_from_that_is_not_there_is_named(stages, tmp_path, flag):
    with pytest.raises(CheckpointError, match="^/no/such/model: no such folder; name a folder, or"):
        stages.clip(tmp_path / "run", flag, "/no/such/model")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length", [["--max_steps", 2], ["--max_steps", -1, "--num_train_epochs", 2]])
def test_fewer_pairs_than_a_batch_are_refused(stages, tmp_path, length):
    with pytest.raises(
        FlagError, match="^10 samples are fewer than a batch: 64, .*lower --per_device_train_batch_size$"
    ):
        stages.clip(tmp_path, "--per_device_train_batch_size", 64, *length)
    assert not (tmp_path / "config.json").exists()


def test_a_batch_is_needed_on_every_process():
    """Only full batches count; accumulating gradients asks for no more of them."""
    args = SimpleNamespace(train_batch_size=5, world_size=2, dataloader_drop_last=True, gradient_accumulation_steps=4)
    require_batch(10, args)
    with pytest.raises(FlagError, match=r"^9 samples are fewer than a batch: 5 \(x 2 processes\)"):
        require_batch(9, args)
    args.dataloader_drop_last = False
    require_batch(1, args)


def test_accumulation_over_more_batches_than_there_are_trains(stages, tmp_path):
    stages.clip(tmp_path, "--gradient_accumulation_steps", 9)
    assert all(loss > 0 for loss in losses(tmp_path)) and len(losses(tmp_path)) == 2


def test_no_pairs_at_all_are_named(stages, tmp_path):
    manifest = json.loads((stages.data / "M3D_Cap_npy/M3D_Cap.json").read_text()) | {"train": []}
    (tmp_path / "empty.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"empty.json \(train\): no rows to train on$"):
        stages.clip(tmp_path / "run", "--cap_data_path", tmp_path / "empty.json")


def test_a_missing_file_is_named_before_training(stages, tmp_path):
    root, image, _ = damaged_data(stages.data, tmp_path / "data")
    image.unlink()
    with pytest.raises(ManifestError, match=rf"M3D_Cap.json, row train\[1\]: {image} does not exist"):
        stages.clip(tmp_path / "run", *stages.data_flags(root))


def test_a_damaged_file_is_named_when_it_is_read(stages, tmp_path):
    root, image, _ = damaged_data(stages.data, tmp_path / "data")
    with pytest.raises(VolumeError, match=rf"M3D_Cap.json, row train\[1\]: {image}"):
        stages.clip(tmp_path / "run", *stages.data_flags(root))


@pytest.mark.parametrize("missing", [False, True])
def test_as_many_bad_samples_as_allowed_are_skipped_and_listed(stages, tmp_path, caplog, missing):
    root, *images = damaged_data(stages.data, tmp_path / "data")
    if missing:
        images[0].unlink()
    flags = [*stages.data_flags(root), "--num_train_epochs", 1, "--max_steps", -1, "--per_device_train_batch_size", 5]
    with pytest.raises((VolumeError, ManifestError), match=r"\(1 bad samples allowed\)"):
        stages.clip(tmp_path / "run", *flags, "--max_bad_samples", 1)
    metrics = stages.clip(tmp_path / "run", *flags, "--max_bad_samples", 2)
    assert metrics["bad_samples"] == 2
    assert "2 samples could not be read and were skipped" in caplog.text
    for number, image in zip((1, 4), images, strict=True):
        assert f"M3D_Cap.json, row train[{number}]: {image}" in caplog.text


def test_the_encoder_runs_the_path_that_is_asked_for(stages, tmp_path, monkeypatch):
    from med3dvlm.model.fused import training

    taken = []
    encode = training.encode
    monkeypatch.setattr(training, "encode", lambda *args: taken.append(1) or encode(*args))
    for mode, steps in (("cpu", 2), ("auto", 2), ("off", 0)):
        taken.clear()
        stages.clip(tmp_path / mode, "--fused_encoder", mode)
        assert len(taken) == steps, mode
        assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
