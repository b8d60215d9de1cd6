"""The projector and the LoRA stage on a few phantoms: what trains, what is handed over, how an interruption ends."""

import csv
import json
import math
import re
import shutil

import pytest
import torch

from med3dvlm.data.datasets import SampleError
from med3dvlm.data.manifest import ManifestError
from med3dvlm.data.volume import VolumeError
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.model.weights import CheckpointError, read_tensors, read_weights, write_tensors
from med3dvlm.train import merge, vlm
from tests.helpers.tiny_data import write_table
from tests.helpers.tiny_model import write_tiny_vlm
from tests.helpers.tiny_stages import LORA, PROJECTOR, copy_run, damaged_data, different, interrupt, losses

ENCODER = "model.vision_tower.vision_tower."
EMBEDDINGS = "model.embed_tokens.weight"
BASES = {"untied": "language_model", "tied": "tied_language_model"}


@pytest.fixture(scope="module")
def encoder(stages, tmp_path_factory):
    """`pretrained_ViT.bin` of a contrastive run."""
    folder = tmp_path_factory.mktemp("clip")
    stages.clip(folder)
    return folder / "pretrained_ViT.bin"


@pytest.fixture(scope="module", params=BASES)
def base(request, stages):
    return stages.models / BASES[request.param]


@pytest.fixture(scope="module")
def start(base, encoder):
    """The flags that both stages start with, and the tensors that these name: encoder and language model."""
    tensors = {f"{ENCODER}{key}": tensor for key, tensor in read_tensors(encoder).items()} | read_weights(base)
    return ["--model_name_or_path", base, "--pretrain_vision_model", encoder], tensors


@pytest.fixture(scope="module")
def projector(stages, start, tmp_path_factory):
    """A run of the projector stage, and all of its model's tensors at the end."""
    folder, seen = tmp_path_factory.mktemp("projector"), {}
    with pytest.MonkeyPatch.context() as patch:
        save = vlm.save_projector
        patch.setattr(vlm, "save_projector", lambda m, path: (seen.update(m.state_dict()), save(m, path)))
        stages.vlm(folder, *start[0], *PROJECTOR)
    return folder, seen


@pytest.fixture(scope="module")
def lora(stages, start, projector, tmp_path_factory):
    """A run of the LoRA stage, and its tensors without the adapters' key prefix."""
    folder = tmp_path_factory.mktemp("lora")
    stages.vlm(folder, *start[0], *LORA, "--pretrain_mm_mlp_adapter", projector[0] / "mm_projector.bin")
    return folder, plain(read_tensors(folder / "model_with_lora.bin"))


def plain(tensors):
    assert all(key.startswith("base_model.model.") for key in tensors)
    return {key.removeprefix("base_model.model.").replace(".base_layer.", "."): t for key, t in tensors.items()}


def same_rows(found, expected, rows=421):
    """Whether embeddings are the same but for the row of `<im_patch>`, the last, which building replaces."""
    return torch.equal(found[: rows - 1], expected[: rows - 1])


# ---------------------------------------------------------------- projector stage


def test_projector_stage_hands_over_projector_and_embeddings(projector):
    folder, tensors = projector
    names = {file.name for file in folder.iterdir() if file.is_file()}
    assert names >= {"mm_projector.bin", "config.json", "processor_config.json", "tokenizer.json", "base_model.json",
                     "trainer_state.json"}  # fmt: skip
    written = read_tensors(folder / "mm_projector.bin")
    assert all(key == EMBEDDINGS or key.startswith("model.mm_projector.") for key in written)
    assert not different(written, {key: tensors[key] for key in written})
    assert EMBEDDINGS in written


def test_projector_stage_trains_nothing_else(projector, start, base):
    _, tensors = projector
    _, started = start
    frozen = {key for key in started if not key.startswith(("lm_head", EMBEDDINGS))}
    assert len(frozen) > 100 and any("running_mean" in key for key in frozen)
    assert not different({key: tensors[key] for key in frozen}, {key: started[key] for key in frozen})
    assert not same_rows(tensors[EMBEDDINGS], started[EMBEDDINGS])
    if "tied" in base.name:
        assert torch.equal(tensors["lm_head.weight"], tensors[EMBEDDINGS])
    else:
        assert same_rows(tensors["lm_head.weight"], started["lm_head.weight"])


def test_the_config_holds_what_building_needs(projector):
    config, processor = (json.loads((projector[0] / f"{n}.json").read_text()) for n in ("config", "processor_config"))
    assert config["image_splice"] == "placeholder" and config["use_cache"] is True
    assert config["proj_out_num"] == processor["num_image_tokens"]


# ---------------------------------------------------------------- LoRA stage


def test_lora_stage_saves_everything_that_trained(lora, projector, start, base):
    folder, tensors = lora
    names = {file.name for file in folder.iterdir()}
    assert names >= {"model_with_lora.bin", "adapter_config.json", "base_model.json", "config.json",
                     "processor_config.json", "tokenizer.json"}  # fmt: skip
    _, before = projector
    expected = set(before) - ({"lm_head.weight"} if "tied" in base.name else set())
    assert {key for key in tensors if "lora_" not in key} == expected
    language = {key for key in expected if key.startswith(("model.layers.", "model.norm."))}
    unchanged = {key for key in expected if torch.equal(tensors[key], before[key])}
    assert language <= unchanged, "the language blocks don't train"
    # A convolution's bias before batch norm has no gradient but rounding noise, which can be exactly 0.
    stuck = {key for key in unchanged - language if ".0.bias" not in key or "vision_tower" not in key}
    assert not stuck, "encoder, projector, embeddings and head train"
    adapters = [key for key in tensors if ".lora_B." in key]
    assert len(adapters) == 2 * 7 and all(tensors[key].abs().max() > 0 for key in adapters)


def test_an_interrupted_end_over_an_older_run_is_not_merged(stages, lora, tmp_path):
    """Else its weights would be taken with the adapters' settings and the preprocessing of the older run."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    folder = copy_run(lora[0], tmp_path / "lora")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(vlm.VLMProcessor, "save_pretrained", interrupted)
        stages.vlm(folder, *LORA, "--max_steps", 1, "--save_strategy", "no")
    with pytest.raises(CheckpointError, match="found no base_model.json"):
        merge.main(["--model_with_lora", str(folder), "--output_dir", str(tmp_path / "model")])


def without_training(stages, folder, *flags):
    """The tensors that a LoRA stage starts from: one step at a learning rate of 0."""
    stages.vlm(folder, *LORA, *flags, "--learning_rate", 0, "--max_steps", 1)
    return plain(read_tensors(folder / "model_with_lora.bin"))


def test_lora_stage_starts_from_the_stages_before(stages, start, projector, tmp_path):
    flags, started = start
    folder, before = projector
    tensors = without_training(stages, tmp_path, *flags, "--pretrain_mm_mlp_adapter", folder / "mm_projector.bin")
    weights = {key for key in tensors if key.startswith("model.") and "lora_" not in key}
    weights = {key for key in weights if not re.search("running_(mean|var)|num_batches", key)}
    assert not different({key: tensors[key] for key in weights}, {key: before[key] for key in weights})


def test_lora_stage_starts_from_the_bases_embeddings_when_asked(stages, start, projector, tmp_path):
    flags, started = start
    folder, before = projector
    tensors = without_training(stages, tmp_path, *flags, "--pretrain_mm_mlp_adapter", folder / "mm_projector.bin",
                               "--embeddings_from_base", True)  # fmt: skip
    assert same_rows(tensors[EMBEDDINGS], started[EMBEDDINGS])
    assert not torch.equal(tensors[EMBEDDINGS], before[EMBEDDINGS])
    keys = [key for key in before if key.startswith("model.mm_projector.")]
    assert not different({key: tensors[key] for key in keys}, {key: before[key] for key in keys})


@pytest.fixture(scope="module")
def untied(stages, encoder):
    return ["--model_name_or_path", stages.models / "language_model", "--pretrain_vision_model", encoder]


def test_hand_over_files_are_read_in_both_formats(stages, encoder, tmp_path):
    stages.vlm(tmp_path / "projector", "--pretrain_vision_model", encoder, *PROJECTOR)
    files = {"vision_model": encoder, "mm_mlp_adapter": tmp_path / "projector" / "mm_projector.bin"}
    from_bin = without_training(stages, tmp_path / "a", *(x for k, f in files.items() for x in (f"--pretrain_{k}", f)))
    for key, file in files.items():
        files[key] = tmp_path / f"{file.stem}.safetensors"
        write_tensors(read_tensors(file), files[key])
    found = without_training(stages, tmp_path / "b", *(x for k, f in files.items() for x in (f"--pretrain_{k}", f)))
    assert not different(found, from_bin)


# ---------------------------------------------------------------- interruptions

GROUPED = ["--questions_per_image", 5, "--per_device_train_batch_size", 5]
# Sizes that make an epoch of two steps.
KINDS = {
    "projector": (PROJECTOR, "mm_projector.bin", ["--per_device_train_batch_size", 9]),
    "lora": (LORA, "model_with_lora.bin", ["--per_device_train_batch_size", 11]),
    "projector, grouped": (PROJECTOR, "mm_projector.bin", GROUPED),
    "lora, grouped": (LORA, "model_with_lora.bin", GROUPED),
}


@pytest.fixture(scope="module")
def few_questions(stages, tmp_path_factory):
    """Flags for tables of four questions each, which with the 10 reports make 18 samples, in the LoRA stage 22."""
    folder, flags = tmp_path_factory.mktemp("tables"), []
    for name, flag in (("train", "--vqa_data_train_path"), ("yn_train", "--vqa_yn_data_train_path")):
        rows = (stages.data / f"M3D-VQA/M3D_VQA_{name}.csv").read_text().splitlines()[:5]
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
        flags += [flag, folder / f"{name}.csv"]
    return flags


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_equals_not_having_stopped(stages, untied, few_questions, tmp_path, kind):
    stage, file, sizes = KINDS[kind]
    flags = [*untied, *few_questions, *stage, *sizes, "--max_steps", 4, "--save_steps", 1, "--save_total_limit", 10]
    stages.vlm(tmp_path / "whole", *flags)
    expected = read_tensors(tmp_path / "whole" / file)
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert (state["epoch"], len(losses(tmp_path / "whole"))) == (2, 4)
    for step in (1, 3):
        folder = copy_run(tmp_path / "whole", tmp_path / f"from {step}")
        interrupt(folder, step)
        stages.vlm(folder, *flags, "--resume_from_checkpoint", "auto")
        assert losses(folder) == losses(tmp_path / "whole")
        assert not different(read_tensors(folder / file), expected)


def test_checkpoints_hold_what_trains_only(stages, untied, tmp_path):
    stages.vlm(tmp_path, *untied, *PROJECTOR)
    stored = read_tensors(tmp_path / "checkpoint-2" / "trained.safetensors")
    assert not different(stored, read_tensors(tmp_path / "mm_projector.bin"))


def test_an_incomplete_checkpoint_is_not_continued_from(stages, untied, tmp_path):
    flags = [*untied, *PROJECTOR, "--save_steps", 1]
    stages.vlm(tmp_path, *flags)
    before = losses(tmp_path)
    interrupt(tmp_path, 1)
    (tmp_path / "checkpoint-2" / "trained.safetensors").write_bytes(b"half")
    stages.vlm(tmp_path, *flags, "--resume_from_checkpoint", "auto")
    assert losses(tmp_path) == before
    assert (tmp_path / "checkpoint-2" / "complete").is_file()


def test_a_checkpoint_of_another_stage_is_refused(stages, untied, tmp_path):
    stages.vlm(tmp_path, *untied, *PROJECTOR)
    with pytest.raises(CheckpointError, match="trained.safetensors is of another run: missing: .*lora_A"):
        stages.vlm(tmp_path, *untied, *LORA, "--max_steps", 4, "--resume_from_checkpoint", "auto")


def test_a_checkpoint_of_adapters_of_another_rank_is_refused(stages, untied, tmp_path):
    stages.vlm(tmp_path, *untied, *LORA, "--max_steps", 1)
    with pytest.raises(CheckpointError, match=r"trained.safetensors is of another run: wrong shape: .*lora_A"):
        stages.vlm(tmp_path, *untied, *LORA, "--lora_r", 2, "--resume_from_checkpoint", "auto")


# ---------------------------------------------------------------- projectors, models, data


PROJECTOR_FLAGS = {
    "linear": [],
    "mlp": ["--mm_mlp_depth", 2],
    "low_high_mlp": [],
    "mhsa": [],
    "mixer": ["--low_output_size", 6, 4, "--high_output_size", 3, 2],
}


@pytest.mark.parametrize("kind", PROJECTOR_FLAGS)
def test_every_projector_trains_and_is_fine_tuned(stages, encoder, tmp_path, kind):
    flags = ["--pretrain_vision_model", encoder, "--mm_projector_type", kind, *PROJECTOR_FLAGS[kind]]
    stages.vlm(tmp_path / "projector", *flags, *PROJECTOR, "--max_steps", 1)
    file = tmp_path / "projector" / "mm_projector.bin"
    stages.vlm(tmp_path / "lora", *flags, *LORA, "--pretrain_mm_mlp_adapter", file)
    assert all(math.isfinite(loss) for folder in ("projector", "lora") for loss in losses(tmp_path / folder))
    before, after = read_tensors(file), plain(read_tensors(tmp_path / "lora" / "model_with_lora.bin"))
    keys = [key for key in before if key.startswith("model.mm_projector.")]
    stayed = [key for key in keys if torch.equal(before[key], after[key])]
    assert keys and not stayed, f"did not train: {stayed}"


def test_a_complete_model_is_trained_further(stages, tmp_path):
    """Its own encoder, projector and tokenizer; the flags that describe a new encoder don't count."""
    write_tiny_vlm(tmp_path / "vlm", projector="mlp", seed=7)
    before = read_weights(tmp_path / "vlm")
    tensors = without_training(stages, tmp_path / "lora", "--model_name_or_path", tmp_path / "vlm")
    weights = [key for key in before if not re.search("running_(mean|var)|num_batches", key)]
    assert not different({key: tensors[key] for key in weights}, {key: before[key] for key in weights})
    assert json.loads((tmp_path / "lora" / "config.json").read_text())["mm_projector_type"] == "mlp"


def test_a_half_precision_base_trains_in_float32(stages, tmp_path):
    VLMForCausalLM.from_pretrained(write_tiny_vlm(tmp_path / "vlm")).bfloat16().save_pretrained(tmp_path / "vlm")
    stages.vlm(tmp_path / "lora", *LORA, "--model_name_or_path", tmp_path / "vlm")
    tensors = read_tensors(tmp_path / "lora" / "model_with_lora.bin").values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}


def test_a_base_model_that_is_not_there_is_named(stages, tmp_path):
    (tmp_path / "file").touch()
    for name, message in (("/no/such/model", "^/no/such/model: no such folder; name a folder, or"),
                          (tmp_path / "file", "^.*/file is a file: name the folder of the checkpoint"),
                          (tmp_path, "holds no tokenizer")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            stages.vlm(tmp_path / "run", *PROJECTOR, "--model_name_or_path", name)
    assert not (tmp_path / "run").exists()


def test_saying_what_trains_is_required(stages, tmp_path):
    with pytest.raises(ValueError, match="--tune_mm_mlp_adapter True .* or --lora_enable True"):
        stages.vlm(tmp_path)
    assert not list(tmp_path.iterdir())


def test_both_flags_mean_the_lora_stage(stages, untied, tmp_path):
    """As the published launcher gives them."""
    stages.vlm(tmp_path, *untied, *PROJECTOR, *LORA)
    assert (tmp_path / "model_with_lora.bin").is_file() and not (tmp_path / "mm_projector.bin").exists()


def test_a_projector_of_other_sizes_is_refused(stages, untied, tmp_path):
    stages.vlm(tmp_path / "a", *untied, *PROJECTOR, "--low_output_size", 8, 4)
    with pytest.raises(CheckpointError, match=r"wrong shape: .*expected \[6, 4\], found \[8, 4\]"):
        stages.vlm(tmp_path / "b", *untied, *LORA, "--pretrain_mm_mlp_adapter", tmp_path / "a" / "mm_projector.bin")


def test_an_encoder_of_another_variant_is_refused(stages, untied, tmp_path):
    with pytest.raises(CheckpointError, match="pretrained_ViT.bin doesn't fit DCFormer: .*expected .*found"):
        stages.vlm(tmp_path, *untied, *PROJECTOR, "--vision_variant", "phantom")


def test_a_question_that_leaves_no_room_is_named(stages, untied, tmp_path):
    with pytest.raises(SampleError, match=r"row .*leaves no room for an answer in a sequence of 8"):
        stages.vlm(tmp_path, *untied, *PROJECTOR, "--model_max_length", 8)


def test_a_report_with_the_image_token_is_named_or_skipped(stages, untied, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(stages.data / "M3D_Cap_npy", root / "M3D_Cap_npy")
    row = json.loads((root / "M3D_Cap_npy/M3D_Cap.json").read_text())["train"][4]
    (root / row["text"]).write_text("A finding <im_patch> of the liver.")
    flags = [*untied, *PROJECTOR, *stages.data_flags(root), "--num_train_epochs", 1, "--max_steps", -1,
             "--per_device_train_batch_size", 55]  # fmt: skip
    with pytest.raises(SampleError, match=r"M3D_Cap.json, row train\[4\]: its answer holds <im_patch>, .*: remove it"):
        stages.vlm(tmp_path / "run", *flags)
    assert stages.vlm(tmp_path / "run", *flags, "--max_bad_samples", 1)["bad_samples"] == 1


def test_no_samples_at_all_are_named(stages, tmp_path):
    manifest = json.loads((stages.data / "M3D_Cap_npy/M3D_Cap.json").read_text()) | {"train": []}
    (tmp_path / "empty.json").write_text(json.dumps(manifest))
    flags = [*PROJECTOR, "--cap_data_path", tmp_path / "empty.json", "--max_steps", 1]
    stages.vlm(tmp_path / "questions alone", *flags)
    table = (stages.data / "M3D-VQA/M3D_VQA_train.csv").read_text()
    (tmp_path / "empty.csv").write_text(table.splitlines()[0] + "\n")
    with pytest.raises(ManifestError, match=r"empty.json \(train\), .*empty.csv: no rows to train on$"):
        stages.vlm(tmp_path / "run", *flags, "--vqa_data_train_path", tmp_path / "empty.csv")


def test_an_open_table_is_no_closed_one(stages, untied, tmp_path):
    table = stages.data / "M3D-VQA/M3D_VQA_train.csv"
    rows = list(csv.reader(table.read_text().splitlines()))
    rows[3] = ["NA" if name.startswith("Choice") else cell for name, cell in zip(rows[0], rows[3], strict=True)]
    bad = write_table(tmp_path / "open.csv", rows[1:], rows[0])
    flags = [*untied, *PROJECTOR, "--vqa_data_train_path", bad]
    with pytest.raises(ManifestError, match=r"open.csv, row 2 .*it has none"):
        stages.vlm(tmp_path / "refused", *flags)
    flags += ["--max_bad_samples", 5, "--num_train_epochs", 1, "--max_steps", -1, "--per_device_train_batch_size", 55]
    assert stages.vlm(tmp_path / "skipped", *flags)["bad_samples"] == 1


@pytest.mark.parametrize("grouped", [False, True])
def test_a_damaged_file_is_named_or_skipped(stages, untied, tmp_path, caplog, grouped):
    root, image, other = damaged_data(stages.data, tmp_path / "data")
    other.unlink()
    flags = [*untied, *PROJECTOR, *stages.data_flags(root), "--num_train_epochs", 1, "--max_steps", -1]
    flags += ["--questions_per_image", 5, "--per_device_train_batch_size", 5] if grouped else []
    flags += [] if grouped else ["--per_device_train_batch_size", 55]
    with pytest.raises(ManifestError, match=rf"row train\[4\]: {other} does not exist"):
        stages.vlm(tmp_path / "run", *flags)
    other.write_bytes(image.read_bytes())
    with pytest.raises(VolumeError, match=rf"(M3D_Cap.json|M3D_VQA_train.csv), row .*: ({image}|{other})"):
        stages.vlm(tmp_path / "run", *flags)
    other.unlink()
    count = 2 if grouped else 22
    metrics = stages.vlm(tmp_path / "run", *flags, "--max_bad_samples", 22)
    assert metrics["bad_samples"] == count
    assert f"{count} samples could not be read" in caplog.text and f"row train[4]: {other}" in caplog.text
