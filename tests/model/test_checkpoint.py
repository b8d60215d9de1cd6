"""The published layout: strict, bit-exact, by its own dtypes; and the files that go between the stages."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from med3dvlm import CLIPConfig, CLIPModel, VLMConfig, VLMForCausalLM
from med3dvlm.model import checkpoint
from med3dvlm.model.dcformer import DCFormer
from med3dvlm.model.vlm import lora_target_modules
from med3dvlm.model.weights import (
    CheckpointError,
    parameters_on_meta,
    read_weights,
    write_json,
    write_tensors,
    write_weights,
    written_atomically,
)
from tests.helpers.golden import GOLDEN_DIR, rule_tensor
from tests.helpers.tiny_model import TINY_ENCODER, TINY_TEXT, tiny_vlm_config, write_tiny_clip, write_tiny_vlm


def layout(name):
    return json.loads((GOLDEN_DIR / "layout" / f"{name}.json").read_text())


def config_json(folder):
    return json.loads((folder / "config.json").read_text())


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    different = [
        key
        for key, tensor in expected.items()
        if found[key].dtype != tensor.dtype or not torch.equal(found[key], tensor)
    ]
    assert not different


def stored_again(folder, tensors, form):
    """Replace the weights of a folder by `tensors` in another of the forms a published folder may have."""
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.index.json")):
        file.unlink()
    name, ending = ("model", "safetensors") if form.startswith("safetensors") else ("pytorch_model", "bin")

    def write(part, path):
        if ending == "bin":
            torch.save(part, path)
        else:
            save_file(part, path, metadata={"format": "pt"})

    if not form.endswith("shards"):
        return write(tensors, folder / f"{name}.{ending}")
    keys, index = list(tensors), {}
    for number, chosen in enumerate((keys[::2], keys[1::2]), start=1):
        shard = f"{name}-{number:05}-of-00002.{ending}"
        write({key: tensors[key] for key in chosen}, folder / shard)
        index |= dict.fromkeys(chosen, shard)
    (folder / f"{name}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


# ---------------------------------------------------------------- layouts


def test_the_7b_layout_is_ours():
    expected = layout("med3dvlm_qwen2_5_7b")
    with torch.device("meta"):
        model = VLMForCausalLM(VLMConfig.from_dict(layout("med3dvlm_qwen2_5_7b_config")))
    found = {key: [list(tensor.shape), str(tensor.dtype).split(".")[1]] for key, tensor in model.state_dict().items()}
    assert set(found) == set(expected["state_dict"])
    int64 = {key for key, (_, dtype) in found.items() if dtype == "int64"}
    assert {key: shape for key, (shape, _) in found.items()} == {k: v[0] for k, v in expected["state_dict"].items()}
    assert int64 == {key for key, (_, dtype) in expected["state_dict"].items() if dtype == "int64"}
    assert model.num_parameters() == expected["parameters"]


def test_a_published_contrastive_folder_loads_without_a_text_config(tmp_path):
    """Published keys at a small size, with the float64 `t_prime` and the config that says float64 of that stage."""
    values = layout("dcformer_siglip_config")["model_save"] | {"hidden_size": 48, "vision_variant": "nano"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    text = {"model_type": "distilbert", "vocab_size": 60, "dim": 128, "n_layers": 2, "n_heads": 2, "hidden_dim": 96,
            "max_position_embeddings": 40}  # fmt: skip
    shapes = CLIPModel(CLIPConfig.from_dict(values | {"text_config": text})).state_dict()
    tensors = {key: rule_tensor("layout", key, tensor.shape) for key, tensor in shapes.items()}
    tensors["t_prime"] = tensors["t_prime"].double()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    model = CLIPModel.from_pretrained(tmp_path)
    assert_same_bits(model.state_dict(), tensors)
    sizes = model.config.text_config.to_dict()
    assert {key: sizes[key] for key in text} == text
    assert model.dtype == torch.float32
    images, ids = torch.rand(1, 1, 32, 64, 64), torch.ones(1, 5, dtype=torch.long)
    assert model.encode_image(images).dtype == model.encode_text(ids, ids).dtype == torch.float32

    model.save_pretrained(tmp_path / "again")
    written = config_json(tmp_path / "again")
    assert (written["torch_dtype"], written["architectures"]) == ("float32", ["DEC_CLIP"])
    assert_same_bits(load_file(tmp_path / "again" / "model.safetensors"), tensors)


def test_a_text_encoder_that_cannot_be_guessed_is_named(tmp_path):
    write_tiny_clip(tmp_path)
    values = config_json(tmp_path)
    del values["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {key.replace(".transformer.layer.", ".encoder.layer."): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no text_config, so a DistilBERT was expected"):
        CLIPModel.from_pretrained(tmp_path)


def test_wrong_keys_of_a_guessed_text_encoder_are_named_alone(tmp_path):
    write_tiny_clip(tmp_path)
    values = config_json(tmp_path)
    del values["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_encoder.embeddings.position_embeddings.weight"]
    tensors["language_encoder.embeddings.word_embeddings.weight"] = torch.zeros(3, 7)
    tensors["language_encoder.transformer.layer.0.ffn.lin1.weight"] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        CLIPModel.from_pretrained(tmp_path)
    assert str(caught.value).endswith(
        "missing: language_encoder.embeddings.position_embeddings.weight; "
        "wrong shape: language_encoder.embeddings.word_embeddings.weight (expected [3, 32], found [3, 7]), "
        "language_encoder.transformer.layer.0.ffn.lin1.weight (expected [64, 32], found [5])"
    )


# ---------------------------------------------------------------- loading and saving whole models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_language_model_round_trips_bit_exactly(tmp_path, tied, dtype):
    model = VLMForCausalLM(tiny_vlm_config(tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(tmp_path / "a")
    written = config_json(tmp_path / "a")
    assert written["architectures"] == ["VLMQwenForCausalLM"]
    assert written["torch_dtype"] == str(dtype).split(".")[1] and written["rope_theta"] == 10000.0
    loaded = VLMForCausalLM.from_pretrained(tmp_path / "a")
    assert_same_bits(loaded.state_dict(), model.state_dict())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not loaded.training and loaded.dtype == dtype
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    ids = torch.arange(5, 15)[None]
    # Rotary frequencies are no weights: a loaded model has them in float32, which `.to(dtype)` would have rounded.
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("form", ["safetensors", "safetensors shards", "bin", "bin shards"])
def test_every_form_of_a_published_folder_loads(tmp_path, form):
    write_tiny_vlm(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    # A published config has none of our own keys.
    values = config_json(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if key not in ("image_splice", "image_token_id")})
    )
    stored_again(tmp_path, tensors, form)
    model = VLMForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(model.state_dict(), tensors)
    assert model.config.image_splice == "published"
    assert model.config.image_token_id == model.config.vocab_size - 1


def test_the_stored_dtype_decides_unless_one_is_asked_for(tmp_path):
    write_tiny_vlm(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    stored_again(tmp_path, tensors, "safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(tmp_path) | {"torch_dtype": "float64"}))
    assert_same_bits(VLMForCausalLM.from_pretrained(tmp_path).state_dict(), tensors)
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), tensors)
    for asked in ({"dtype": torch.float32}, {"dtype": "float32"}, {"torch_dtype": torch.float32}):
        for loader in (VLMForCausalLM, AutoModelForCausalLM):
            model = loader.from_pretrained(tmp_path, **asked)
            assert {t.dtype for t in model.state_dict().values()} == {torch.float32, torch.int64}
            assert model.config.dtype == torch.float32


def test_transformers_loads_our_folders(tmp_path):
    write_tiny_vlm(tmp_path / "vlm")
    write_tiny_clip(tmp_path / "clip")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "vlm"), VLMConfig)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "vlm"))
    assert type(model) is VLMForCausalLM
    assert_same_bits(model.state_dict(), VLMForCausalLM.from_pretrained(tmp_path / "vlm").state_dict())
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path / "vlm").eos_token_id
    assert isinstance(AutoModel.from_pretrained(tmp_path / "clip"), CLIPModel)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "vlm", attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


def test_shards_are_written_and_older_weights_removed(tmp_path):
    model = VLMForCausalLM(tiny_vlm_config())
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    shards = sorted(file.name for file in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_bits(VLMForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
    model.save_pretrained(tmp_path)
    assert [file.name for file in sorted(tmp_path.glob("*model*"))] == ["model.safetensors"]
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert not (tmp_path / "model.safetensors").exists()


def test_every_wrong_key_is_named_in_one_error(tmp_path):
    write_tiny_vlm(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in ("model.norm.weight", "model.mm_projector.low_mixer.0.ln1.bias"):
        del tensors[key]
    tensors["model.extra.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(3, 2)
    stored_again(tmp_path, tensors, "safetensors")
    with pytest.raises(CheckpointError) as caught:
        VLMForCausalLM.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "missing: model.norm.weight, model.mm_projector.low_mixer.0.ln1.bias" in message
    assert "unexpected: model.extra.weight" in message
    assert "wrong shape: lm_head.weight (expected [421, 32], found [3, 2])" in message
    assert str(tmp_path) in message


def test_a_head_that_contradicts_tying_is_an_error(tmp_path):
    write_tiny_vlm(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    stored_again(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, "bin")
    VLMForCausalLM.from_pretrained(tmp_path)
    stored_again(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, "bin")
    with pytest.raises(CheckpointError, match="expected lm_head.weight to equal model.embed_tokens.weight"):
        VLMForCausalLM.from_pretrained(tmp_path)


def test_bad_folders_are_named(tmp_path):
    write_tiny_clip(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="expected a checkpoint of type vlm_qwen, found dec_clip"):
        VLMForCausalLM.from_pretrained(tmp_path / "clip")
    advice = "models/absent: no such folder, and not to be had from the hub .*; check the name .* name a local folder"
    with pytest.raises(CheckpointError, match=advice):
        CLIPModel.from_pretrained("models/absent", local_files_only=True)
    with pytest.raises(TypeError, match="unknown arguments colour"):
        CLIPModel.from_pretrained(tmp_path / "clip", colour="red")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="model.safetensors: not a readable weight file"):
        CLIPModel.from_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights: expected one of model.safetensors"):
        CLIPModel.from_pretrained(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no config.json"):
        CLIPModel.from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize("content", ["{", "[]", {"loss_type": "?"}, {"input_size": 5}, {"vision_variant": "?"}])
def test_a_config_that_cannot_be_used_is_named(tmp_path, content):
    write_tiny_clip(tmp_path)
    if isinstance(content, dict):
        content = json.dumps(config_json(tmp_path) | content)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*: cannot be used"):
        CLIPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json: cannot be used"):
        read_weights(tmp_path)


def test_arguments_that_transformers_users_know(tmp_path):
    model = CLIPModel.from_pretrained(write_tiny_clip(tmp_path / "a"), low_cpu_mem_usage=True, device_map="cpu")
    model.save_pretrained(tmp_path / "b", safe_serialization=True, push_to_hub=False)
    again = CLIPModel.from_pretrained(tmp_path / "b", device_map="auto").cpu()
    assert_same_bits(again.state_dict(), model.state_dict())
    assert CLIPModel.from_pretrained(tmp_path / "a", device_map=torch.device("meta")).device.type == "meta"
    with pytest.raises(TypeError, match="one device as a whole"):
        CLIPModel.from_pretrained(tmp_path / "a", device_map={"": "cpu"})
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(tmp_path / "c", safe_serialization=False)
    with pytest.raises(ValueError, match="a folder only"):
        model.save_pretrained(tmp_path / "c", push_to_hub=True)
    assert not (tmp_path / "c").exists()


def test_a_lost_shard_is_named(tmp_path):
    write_tiny_vlm(tmp_path)
    stored_again(tmp_path, load_file(tmp_path / "model.safetensors"), "safetensors shards")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors: no such file"):
        VLMForCausalLM.from_pretrained(tmp_path)


class NotATensor:
    """What a pickle with code in it holds."""


def test_a_pickle_with_code_is_refused(tmp_path):
    write_tiny_vlm(tmp_path)
    stored_again(tmp_path, {"model.norm.weight": NotATensor()}, "bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: not a readable weight file"):
        VLMForCausalLM.from_pretrained(tmp_path)


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    target = tmp_path / "mm_projector.bin"
    with pytest.raises(KeyboardInterrupt), written_atomically(target) as temporary:
        temporary.write_bytes(b"half of it")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    write_tiny_vlm(tmp_path / "model")
    monkeypatch.setattr("med3dvlm.model.weights.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        VLMForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no config.json"):
        VLMForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("mask", [0o022, 0o027])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_a_weight_file_is_as_readable_as_others(tmp_path, ending, mask):
    before = os.umask(mask)
    try:
        write_tensors({"x": torch.zeros(3)}, tmp_path / f"x.{ending}")
    finally:
        os.umask(before)
    assert (tmp_path / f"x.{ending}").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_a_mount_that_refuses_chmod_takes_a_weight_file(tmp_path, monkeypatch, ending):
    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refused)
    write_tensors({"x": torch.zeros(3)}, tmp_path / f"x.{ending}")
    assert [file.name for file in tmp_path.iterdir()] == [f"x.{ending}"]


def left_over(path, age):
    path.write_bytes(b"half of it")
    for file in (path, path.parent) if path.parent.suffix == ".tmp" else (path,):
        os.utime(file, (time.time() - age,) * 2)


def test_what_a_killed_writer_left_goes_with_a_later_write(tmp_path):
    for name, age in ((".x.bin.12345.tmp", 2 * 86400), (".other.bin.12345.tmp", 2 * 86400), (".x.bin.23456.tmp", 60)):
        left_over(tmp_path / name, age)
    for name, age in ((".x.bin.a.tmp", 2 * 86400), (".x.bin.b.tmp", 60)):
        (tmp_path / name).mkdir()
        left_over(tmp_path / name / ".tmpAbCdEf", age)
    os.utime(tmp_path / ".x.bin.b.tmp", (time.time() - 2 * 86400,) * 2)  # what is in it is younger
    write_tensors({"x": torch.zeros(3)}, tmp_path / "x.bin")
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == [".other.bin.12345.tmp", ".x.bin.23456.tmp", ".x.bin.b.tmp", "x.bin"]  # some may be at work


def test_a_killed_write_of_safetensors_leaves_nothing_that_a_later_write_does_not_find(tmp_path, monkeypatch):
    def killed(tensors, file, metadata):
        file.with_name(".tmpAbCdEf").write_bytes(b"half of it")  # as safetensors does
        raise SystemExit

    monkeypatch.setattr("med3dvlm.model.weights.save_file", killed)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        write_tensors({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    monkeypatch.undo()
    for file in tmp_path.rglob("*"):
        os.utime(file, (time.time() - 2 * 86400,) * 2)
    write_tensors({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_temporary_file_of_another_writer_may_vanish_at_any_time(tmp_path, monkeypatch):
    gone = tmp_path / ".x.json.12345.tmp"
    monkeypatch.setattr("pathlib.Path.glob", lambda folder, pattern: iter([gone]))
    write_json({"a": 1}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """Also threads of one process, which share its number."""

    def write(number):
        for _ in range(50):
            write_json({"writer": number}, tmp_path / "x.json")

    with ThreadPoolExecutor(4) as writers:
        list(writers.map(write, range(4)))
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text())["writer"] in range(4)


def test_an_interrupted_extraction_over_an_older_one_is_refused(tmp_path, monkeypatch):
    write_tiny_vlm(tmp_path)
    target = checkpoint.extract(tmp_path, "language_model")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.extract(tmp_path, "language_model")
    assert not (target / "config.json").exists()


def test_an_interrupted_write_over_older_shards_holds_no_weights(tmp_path, monkeypatch):
    """Neither the older ones nor, as the names of the shards are the same, a mixture."""
    old, new = ({key: torch.full((10,), value) for key in "abc"} for value in (0.0, 1.0))
    write_weights(old, tmp_path, max_shard_size=40)
    assert_same_bits(read_weights(tmp_path), old)
    written = []

    def interrupted(tensors, path):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_tensors(tensors, path)

    monkeypatch.setattr("med3dvlm.model.weights.write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_weights(new, tmp_path, max_shard_size=40)
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_weights(tmp_path)
    monkeypatch.undo()
    write_weights(new, tmp_path, max_shard_size=40)
    assert_same_bits(read_weights(tmp_path), new)


def test_parameters_on_meta_keeps_buffers():
    with parameters_on_meta():
        model = VLMForCausalLM(tiny_vlm_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


# ---------------------------------------------------------------- files between the stages


@pytest.fixture
def vlm():
    torch.manual_seed(3)
    return VLMForCausalLM(tiny_vlm_config())


@pytest.fixture
def clip():
    torch.manual_seed(4)
    return CLIPModel(CLIPConfig(**TINY_ENCODER, hidden_size=16, text_config={"model_type": "distilbert", **TINY_TEXT}))


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_the_encoder_goes_from_the_dual_encoder_to_the_language_model(tmp_path, clip, vlm, ending):
    file = tmp_path / f"pretrained_ViT.{ending}"
    checkpoint.save_vision_encoder(clip, file)
    assert all(key.startswith("encoder.") for key in checkpoint.read_tensors(file))
    checkpoint.load_vision_encoder(vlm, file)
    assert_same_bits(vlm.model.vision_tower.vision_tower.state_dict(), clip.vision_encoder.state_dict())
    # The same from a whole checkpoint, and from the file beside a merged model.
    clip.save_pretrained(tmp_path / "clip")
    other = VLMForCausalLM(tiny_vlm_config())
    checkpoint.load_vision_encoder(other, tmp_path / "clip")
    assert_same_bits(other.model.vision_tower.state_dict(), vlm.model.vision_tower.state_dict())
    file = tmp_path / f"vision_tower.{ending}"
    checkpoint.save_vision_tower(vlm, file)
    assert all(key.startswith("vision_tower.encoder.") for key in checkpoint.read_tensors(file))
    third = VLMForCausalLM(tiny_vlm_config())
    checkpoint.load_vision_encoder(third, file)
    assert_same_bits(third.model.vision_tower.state_dict(), vlm.model.vision_tower.state_dict())


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_projector_and_embeddings_go_to_the_next_stage(tmp_path, vlm, ending):
    file = tmp_path / f"mm_projector.{ending}"
    checkpoint.save_projector(vlm, file)
    keys = set(checkpoint.read_tensors(file))
    assert "model.embed_tokens.weight" in keys
    assert all(key.startswith("model.mm_projector.") for key in keys - {"model.embed_tokens.weight"})
    other = VLMForCausalLM(tiny_vlm_config())
    embeddings = other.model.embed_tokens.weight.clone()
    checkpoint.load_projector(other, tmp_path, embeddings=False)
    assert_same_bits(other.model.mm_projector.state_dict(), vlm.model.mm_projector.state_dict())
    assert torch.equal(other.model.embed_tokens.weight, embeddings)
    checkpoint.load_projector(other, file)
    assert torch.equal(other.model.embed_tokens.weight, vlm.model.embed_tokens.weight)


def adapted(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=lora_target_modules(model), task_type="CAUSAL_LM"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_a_model_with_adapters_round_trips(tmp_path, tied, ending):
    file = tmp_path / f"model_with_lora.{ending}"
    model = adapted(VLMForCausalLM(tiny_vlm_config(tie_word_embeddings=tied)))
    checkpoint.save_lora(model, file)
    keys = set(checkpoint.read_tensors(file))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in keys
    assert ("base_model.model.lm_head.weight" in keys) == (not tied)
    other = adapted(VLMForCausalLM(tiny_vlm_config(tie_word_embeddings=tied)))
    checkpoint.load_lora(other, tmp_path)
    assert_same_bits(other.state_dict(), model.state_dict())
    for part in ("encoder", "projector", "embeddings"):
        checkpoint.extract(file, part, tmp_path / f"{part}.safetensors")
    checkpoint.load_projector(other, tmp_path / "projector.safetensors")
    with pytest.raises(CheckpointError, match="expected a merged model, found adapters"):
        checkpoint.extract(file, "language_model")


def test_a_file_of_another_model_is_named(tmp_path, vlm):
    checkpoint.save_vision_encoder(vlm, tmp_path / "pretrained_ViT.bin")
    with pytest.raises(CheckpointError, match="pretrained_ViT.bin doesn't fit DCFormer: .*wrong shape: encoder.s1"):
        checkpoint.load_vision_encoder(DCFormer.from_variant("naive"), tmp_path / "pretrained_ViT.bin")
    with pytest.raises(CheckpointError, match="expected a part projector, found encoder"):
        checkpoint.load_projector(vlm, tmp_path / "pretrained_ViT.bin")
    with pytest.raises(CheckpointError, match=r"ends with .safetensors or .bin"):
        checkpoint.save_projector(vlm, tmp_path / "mm_projector.pt")


# ---------------------------------------------------------------- the command line


def test_extract_takes_every_part_out_of_a_full_checkpoint(tmp_path, vlm):
    vlm.save_pretrained(tmp_path)
    state = vlm.state_dict()
    encoder = checkpoint.main(["extract", str(tmp_path), "--part", "encoder"])
    assert encoder == tmp_path / "pretrained_ViT.bin"
    assert_same_bits(checkpoint.read_tensors(encoder), vlm.model.vision_tower.vision_tower.state_dict())
    file = tmp_path / "out" / "projector.safetensors"
    assert checkpoint.main(["extract", str(tmp_path), "--part", "projector", "--output", str(file)]) == file
    assert_same_bits(
        load_file(file),
        {k: t for k, t in state.items() if k.startswith(("model.mm_projector.", "model.embed_tokens."))},
    )
    embeddings = checkpoint.main(["extract", str(tmp_path), "--part", "embeddings"])
    assert list(checkpoint.read_tensors(embeddings)) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_extracted_language_model_is_a_plain_one(tmp_path, tied):
    write_tiny_vlm(tmp_path, tie_word_embeddings=tied)
    vlm = VLMForCausalLM.from_pretrained(tmp_path)
    folder = checkpoint.main(["extract", str(tmp_path), "--part", "language_model"])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain).__name__ == "Qwen2ForCausalLM"
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, vlm(input_ids=ids).logits)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(tmp_path))


def test_the_extracted_text_encoder_is_a_plain_one(tmp_path, clip):
    clip.save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(checkpoint.extract(tmp_path, "language_model"))
    assert_same_bits(plain.state_dict(), clip.language_encoder.state_dict())


def test_inspect_says_what_is_in_a_checkpoint(tmp_path, vlm, capsys):
    vlm.bfloat16().save_pretrained(tmp_path, max_shard_size="2MB")
    result = checkpoint.main(["inspect", str(tmp_path)])
    assert result["model_type"] == "vlm_qwen"
    assert set(result["parts"]) == {"encoder", "projector", "embeddings", "language_model"}
    assert sum(part["tensors"] for part in result["parts"].values()) == len(vlm.state_dict())
    encoder = vlm.model.vision_tower.state_dict()
    assert result["parts"]["encoder"]["parameters"] == sum(tensor.numel() for tensor in encoder.values())
    assert set(result["parts"]["encoder"]["dtypes"]) == {"bfloat16", "int64"}
    assert "projector" in capsys.readouterr().out


def test_inspect_names_a_damaged_config(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="config.json: cannot be used .JSONDecodeError: "):
        checkpoint.inspect(tmp_path)


def test_inspect_reads_no_data(tmp_path):
    write_tensors({"encoder.weight": torch.zeros(2, 3, dtype=torch.float16)}, tmp_path / "pretrained_ViT.safetensors")
    write_tensors({"encoder.weight": torch.zeros(2, 3, dtype=torch.float16)}, tmp_path / "pretrained_ViT.bin")
    for ending in ("safetensors", "bin"):
        tensor = checkpoint.read_checkpoint(tmp_path / f"pretrained_ViT.{ending}", device="meta")["encoder.weight"]
        assert tensor.is_meta and tensor.dtype == torch.float16 and list(tensor.shape) == [2, 3]
