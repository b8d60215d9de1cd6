"""Defaults of the stages: the published recipe, presets over it, the command line over both."""

import math
from pathlib import Path

import pytest

from med3dvlm.configuration import PRESETS
from med3dvlm.train import arguments, clip, merge, stand_in, vlm
from med3dvlm.train.arguments import FlagError, check_writable, parse_stage, run
from med3dvlm.train.checkpoints import complete_checkpoints, set_aside

CLIP = (arguments.CLIPModelArguments, arguments.PairDataArguments, arguments.CLIPTrainingArguments)
VLM = (arguments.VLMModelArguments, arguments.QADataArguments, arguments.VLMTrainingArguments)
STAGES = {
    "clip": ("clip", CLIP, []),
    "projector": ("vlm", VLM, ["--tune_mm_mlp_adapter", "True"]),
    "lora": ("vlm", VLM, ["--lora_enable", "True"]),
}
# batch per GPU, epochs, learning rate, weight decay
RECIPE = {"clip": (64, 100, 1e-4, 0.1), "projector": (16, 3, 1e-4, 0.0), "lora": (8, 5, 5e-5, 0.0)}


def parse(stage, *argv):
    name, classes, flags = STAGES[stage]
    return parse_stage(name, classes, [*flags, *argv], "")


@pytest.mark.parametrize("stage", RECIPE)
def test_defaults_are_the_published_recipe(stage):
    model, data, training = parse(stage)
    found = (training.per_device_train_batch_size, training.num_train_epochs, training.learning_rate,
             training.weight_decay)  # fmt: skip
    assert found == RECIPE[stage]
    assert training.lr_scheduler_type == "cosine" and training.get_warmup_steps(1000) == 30
    assert (model.vision_variant, model.input_size, model.volume_size) == ("small", [256, 256, 128], (128, 256, 256))
    assert (data.augment, data.image_cache) == ("none", None) and data.max_bad_samples == 0 and training.max_steps == -1
    if stage == "clip":
        assert (model.loss_type, model.language_model_name_or_path) == ("sigmoid", "medicalai/ClinicalBERT")
        assert (model.t_prime, model.bias) == (math.log(10), -10)
        assert data.max_length == 512 and training.dataloader_drop_last
    else:
        assert (model.model_name_or_path, model.mm_projector_type) == ("Qwen/Qwen2.5-7B-Instruct", "mixer")
        assert (model.low_output_size, model.high_output_size) == ([192, 128], [64, 128])
        assert training.model_max_length == 512 and data.questions_per_image == 1
    if stage == "lora":
        assert (training.lora_r, training.lora_alpha, training.lora_dropout) == (16, 32, 0.05)


@pytest.mark.parametrize("stage", RECIPE)
def test_presets_come_before_defaults_and_the_command_line_before_presets(stage):
    values = PRESETS["quickstart"][stage]
    *_, plain = parse(stage, "--preset", "quickstart")
    model, _, asked = parse(stage, "--learning_rate", "0.5", "--preset", "quickstart", "--vision_variant", "tiny")
    assert plain.learning_rate == values["learning_rate"] and plain.max_steps == values["max_steps"] > 0
    assert asked.learning_rate == 0.5 and asked.max_steps == values["max_steps"]
    assert model.vision_variant == "tiny" and model.input_size == values["input_size"]


def test_every_key_of_a_preset_is_a_flag_of_its_stage():
    for preset in PRESETS.values():
        for stage, (_, classes, _) in STAGES.items():
            known = {name for cls in classes for name in cls.__dataclass_fields__}
            assert set(preset[stage]) <= known, stage


@pytest.mark.parametrize("flag", ["--lora_rank", "--learn", "--no_such"])
def test_unknown_and_shortened_flags_are_refused(flag, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        parse("lora", flag, "1")
    assert flag in capsys.readouterr().err + str(caught.value)


@pytest.mark.parametrize("stage", RECIPE)
@pytest.mark.parametrize("flag, values, expected", [
    ("--input_size", "64 64", "three numbers of 1 or more, H W D"),
    ("--input_size", "64 64 0", "three numbers of 1 or more, H W D"),
    ("--patch_size", "16", "three numbers of 1 or more, H W D"),
    ("--per_device_train_batch_size", "0", "a number of 1 or more"),
    ("--gradient_accumulation_steps", "0", "a number of 1 or more"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_named(stage, flag, values, expected):
    with pytest.raises(FlagError, match=f"^{flag} {values}: expected {expected}$"):
        parse(stage, flag, *values.split())


def test_lora_enable_decides_on_the_defaults():
    assert parse_stage("vlm", VLM, ["--lora_enable"], "")[2].num_train_epochs == 5
    assert parse_stage("vlm", VLM, ["--lora_enable=False"], "")[2].num_train_epochs == 3


def test_complete_checkpoints_are_ordered_by_their_steps(tmp_path):
    for step in (100, 20, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    (tmp_path / "checkpoint-200").mkdir()
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == [
        "checkpoint-3", "checkpoint-20", "checkpoint-100"]  # fmt: skip
    assert complete_checkpoints(tmp_path / "absent") == []


def test_checkpoints_of_another_run_lose_their_mark_only(tmp_path):
    def write(folder, *steps):
        for step in steps:
            checkpoint = folder / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "complete").touch()
            (checkpoint / "model.safetensors").touch()
        return folder

    def complete(folder):
        return [checkpoint.name for checkpoint in complete_checkpoints(folder)]

    own = write(tmp_path / "own", 2, 4, 10)
    assert set_aside(own, str(own / "checkpoint-10")) == []
    assert set_aside(own, tmp_path / "own" / ".." / "own" / "checkpoint-4") == [own / "checkpoint-10"]
    assert complete(own) == ["checkpoint-2", "checkpoint-4"]
    elsewhere = write(tmp_path / "elsewhere", 4)
    assert len(set_aside(own, elsewhere / "checkpoint-4")) == 2 and complete(elsewhere) == ["checkpoint-4"]
    write(own, 2, 4)
    assert len(set_aside(own, None)) == 2 and complete(own) == []
    assert len(list(own.glob("*/model.safetensors"))) == 3
    assert set_aside(tmp_path / "absent", None) == []


# ---------------------------------------------------------------- how a stage ends


@pytest.mark.parametrize("place, reason", [("file", "Not a directory"), ("file/below/it", "Not a directory"),
                                           ("/proc/x", "No such file or directory")])  # fmt: skip
def test_a_folder_that_cannot_be_written_is_named(tmp_path, place, reason):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc on this system")
    (tmp_path / "file").touch()
    with pytest.raises(FlagError, match=rf"^--output_dir .*{place}: cannot be written \({reason}\); name another"):
        check_writable(tmp_path / place)


def test_a_folder_that_can_be_written_is_not_made_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, "new", str(tmp_path / "a/b/c"), "."):
        check_writable(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage, flags", [
    (clip, []), (vlm, ["--lora_enable", "True"]), (vlm, ["--tune_mm_mlp_adapter", "True"]), (stand_in, []),
], ids=["clip", "lora", "projector", "stand-in"])  # fmt: skip
def test_the_folder_is_tried_before_anything_is_read(tmp_path, stage, flags):
    (tmp_path / "file").touch()
    with pytest.raises(FlagError, match="--output_dir .*/file/run: cannot be written"):
        stage.main([*flags, "--output_dir", str(tmp_path / "file/run"), "--cap_data_path", "absent.json"])


def test_the_merge_tries_its_folder_before_it_loads_anything(tmp_path, monkeypatch):
    for name in ("base_model.json", "config.json", "adapter_config.json", "file"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(merge, "load_unmerged", lambda *_: pytest.fail("the model was loaded before"))
    with pytest.raises(SystemExit, match="^error: --output_dir .*/file/model: cannot be written"):
        run(lambda: merge.main(["--model_with_lora", str(tmp_path), "--output_dir", str(tmp_path / "file/model")]))


def raises(error):
    def main():
        raise error

    return main


def test_a_full_disk_ends_a_stage_with_a_sentence_and_an_interrupt_with_130(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(raises(OSError(28, "No space left on device", "out/model.safetensors")))
    assert stopped.value.code == "error: [Errno 28] No space left on device: 'out/model.safetensors'"
    with pytest.raises(SystemExit) as stopped:
        run(raises(KeyboardInterrupt()))
    assert stopped.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(raises(RuntimeError("a mistake of ours")))
