"""The merge: logits as before, a folder that stands alone, and the right base model or none."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from med3dvlm.inference import load_model
from med3dvlm.model.weights import CheckpointError, read_tensors, read_weights, write_tensors
from med3dvlm.train import merge
from tests.helpers.tiny_model import write_tiny_language_model
from tests.helpers.tiny_stages import LORA, PROJECTOR, different

BASES = {"untied": "language_model", "tied": "tied_language_model"}


@pytest.fixture(scope="module", params=BASES)
def base(request, stages):
    return stages.models / BASES[request.param]


@pytest.fixture(scope="module")
def lora(stages, base, tmp_path_factory):
    """The folder of a LoRA stage whose adapters say something."""
    folder = tmp_path_factory.mktemp("lora")
    stages.vlm(folder, *LORA, "--model_name_or_path", base, "--learning_rate", 0.05, "--max_steps", 3)
    return folder


@pytest.fixture(scope="module")
def merged(lora, base, tmp_path_factory):
    """The merged folder, alone in another place."""
    folder = tmp_path_factory.mktemp("merge") / "model"
    returned = merge.main(["--model_with_lora", str(lora / "model_with_lora.bin"), "--output_dir", str(folder),
                           "--model_name_or_path", str(base)])  # fmt: skip
    assert returned == folder
    return shutil.move(folder, tmp_path_factory.mktemp("elsewhere") / "model")


@pytest.fixture(scope="module")
def batch(stages, merged):
    """Two questions about two volumes, of different lengths."""
    row = json.loads((stages.data / "M3D_Cap_npy/M3D_Cap.json").read_text())["test"]
    processor = load_model(merged, device="cpu").processor
    return processor(["Which plane is shown?", "Where?"], [stages.data / row[n]["image"] for n in (0, 1)])


def test_logits_equal_those_of_the_unmerged_model(lora, merged, batch):
    unmerged = merge.load_unmerged(lora)
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        expected, found = unmerged(**batch).logits, model(**batch).logits
        with unmerged.disable_adapter():
            without = unmerged(**batch).logits
    assert (found - expected).abs().max() < 1e-5
    assert (without - expected).abs().max() > 1e-2, "the adapters change nothing: the test would prove nothing"


def test_the_folder_is_complete_and_in_the_published_layout(merged, base):
    names = {file.name for file in merged.iterdir()}
    assert {"config.json", "model.safetensors", "vision_tower.bin", "processor_config.json", "tokenizer.json"} <= names
    tensors = read_weights(merged)
    assert all(key.startswith(("model.", "lm_head.")) and "lora" not in key for key in tensors)
    assert ("lm_head.weight" in tensors) == ("tied" not in base.name)
    tower = read_tensors(merged / "vision_tower.bin")
    assert all(key.startswith("vision_tower.encoder.") for key in tower)
    assert not different(tower, {key: tensors[f"model.vision_tower.{key}"] for key in tower})
    config = json.loads((merged / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["VLMQwenForCausalLM"], "vlm_qwen")
    assert config["torch_dtype"] == "float32" and config["use_cache"] is True


def test_the_merged_model_answers(stages, merged):
    model = load_model(merged, device="cpu")
    row = json.loads((stages.data / "M3D_Cap_npy/M3D_Cap.json").read_text())["test"][0]
    answer = model.answer(stages.data / row["image"], "Which plane is shown?", max_new_tokens=4)
    assert 1 <= answer.tokens <= 4 and answer.preprocessing["size"] == [32, 64, 64]
    assert model.processor.num_image_tokens == model.model.num_image_tokens


def test_a_merged_model_can_be_trained_further(stages, merged, tmp_path):
    stages.vlm(tmp_path / "projector", *PROJECTOR, "--model_name_or_path", merged)
    stages.vlm(tmp_path / "lora", *LORA, "--model_name_or_path", merged, "--pretrain_mm_mlp_adapter",
               tmp_path / "projector" / "mm_projector.bin")  # fmt: skip
    merge.main(["--model_with_lora", str(tmp_path / "lora"), "--output_dir", str(tmp_path / "model"),
                "--model_name_or_path", str(merged)])  # fmt: skip
    load_model(tmp_path / "model", device="cpu")
    further, before = read_weights(tmp_path / "model"), read_weights(merged)
    assert further.keys() == before.keys() and different(further, before)


def test_safetensors_of_the_lora_stage_are_read(lora, merged, tmp_path):
    copy = shutil.copytree(lora, tmp_path / "lora", ignore=shutil.ignore_patterns("checkpoint-*", "*.bin"))
    write_tensors(read_tensors(lora / "model_with_lora.bin"), copy / "model_with_lora.safetensors")
    merge.main(["--model_with_lora", str(copy), "--output_dir", str(tmp_path / "model")])
    assert not different(read_weights(tmp_path / "model"), read_weights(merged))


@pytest.mark.parametrize("stopped_at", ["save_vision_tower", "VLMProcessor.save_pretrained",
                                        "VLMForCausalLM.save_pretrained"])  # fmt: skip
def test_an_interrupted_merge_over_an_older_one_is_refused(lora, merged, tmp_path, monkeypatch, stopped_at):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    folder = shutil.copytree(merged, tmp_path / "model")
    monkeypatch.setattr(f"med3dvlm.train.merge.{stopped_at}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge.main(["--model_with_lora", str(lora), "--output_dir", str(folder)])
    with pytest.raises(CheckpointError, match="no config.json"):
        load_model(folder, device="cpu")


# ---------------------------------------------------------------- the base model


@pytest.fixture(scope="module")
def untied_lora(stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    stages.vlm(folder, *LORA)
    return folder


def test_another_base_model_is_refused(untied_lora, stages, tmp_path):
    other = write_tiny_language_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError) as caught:
        merge.main(["--model_with_lora", str(untied_lora), "--output_dir", str(tmp_path / "model"),
                    "--model_name_or_path", str(other)])  # fmt: skip
    assert str(other) in str(caught.value) and str(stages.models / "language_model") in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_exchanged_weights_under_the_adapters_are_refused(untied_lora, tmp_path):
    copy = shutil.copytree(untied_lora, tmp_path / "lora", ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = read_tensors(copy / "model_with_lora.bin")
    tensors["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"] *= 1.1
    write_tensors(tensors, copy / "model_with_lora.bin")
    with pytest.raises(CheckpointError, match="weights that carry the adapters: expected the base model .*, found ano"):
        merge.main(["--model_with_lora", str(copy), "--output_dir", str(tmp_path / "model")])


def test_the_same_base_in_half_precision_is_the_same_base(stages, tmp_path):
    """As Qwen2.5 is stored; training has it in float32."""
    base = shutil.copytree(stages.models / "language_model", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    stages.vlm(tmp_path / "lora", *LORA, "--model_name_or_path", base)
    output = merge.main(["--model_with_lora", str(tmp_path / "lora"), "--output_dir", str(tmp_path / "model"),
                         "--model_name_or_path", str(base)])  # fmt: skip
    assert (output / "config.json").is_file()


@pytest.mark.parametrize("missing", ["base_model.json", "config.json", "adapter_config.json", "model_with_lora.bin"])
def test_a_folder_that_lacks_a_file_of_the_stage_is_named(untied_lora, tmp_path, missing):
    copy = shutil.copytree(untied_lora, tmp_path / "lora", ignore=shutil.ignore_patterns("checkpoint-*", missing))
    with pytest.raises(CheckpointError) as caught:
        merge.main(["--model_with_lora", str(copy), "--output_dir", str(tmp_path / "model")])
    assert str(copy) in str(caught.value)
    if missing != "model_with_lora.bin":
        assert f"expected the output of the LoRA stage, found no {missing}" in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_the_file_that_is_named_is_the_one_that_is_merged(untied_lora, tmp_path):
    copy = shutil.copytree(untied_lora, tmp_path / "lora", ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = read_tensors(copy / "model_with_lora.bin")
    changed = {key: t * 1.5 if ".mm_projector." in key else t for key, t in tensors.items()}
    write_tensors(changed, copy / "model_with_lora.safetensors")
    for name, expected in (("model_with_lora.bin", tensors), ("model_with_lora.safetensors", changed)):
        merge.main(["--model_with_lora", str(copy / name), "--output_dir", str(tmp_path / name)])
        merged = {k: t for k, t in read_weights(tmp_path / name).items() if ".mm_projector." in k}
        assert merged and not different(merged, {key: expected[f"base_model.model.{key}"] for key in merged})


@pytest.mark.parametrize("named, message", [
    ("absent", "^absent: no such folder or file; name the folder that the LoRA stage wrote"),
    ("lora/model_with_lora.pt", "^lora/model_with_lora.pt: no such folder or file"),
    ("stray.bin", "^stray.bin: expected the output of the LoRA stage, found no base_model.json beside it$"),
    ("lora/adapter_config.json", "^lora/adapter_config.json: not a readable weight file"),
])  # fmt: skip
def test_what_is_no_weight_file_of_the_stage_is_named_as_it_was_given(
    untied_lora, tmp_path, monkeypatch, named, message
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(untied_lora, "lora", ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.copy("lora/model_with_lora.bin", "stray.bin")
    with pytest.raises(CheckpointError, match=message):
        merge.main(["--model_with_lora", named, "--output_dir", "model"])
    assert not (tmp_path / "model").exists()


def test_the_folder_of_another_stage_is_refused(stages, tmp_path):
    stages.vlm(tmp_path / "projector", *PROJECTOR)
    with pytest.raises(CheckpointError, match="projector: expected the output of the LoRA stage"):
        merge.main(["--model_with_lora", str(tmp_path / "projector"), "--output_dir", str(tmp_path / "model")])
