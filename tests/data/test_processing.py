"""The processor: image tokens, prompts, labels, batches for generation, saving and loading."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from med3dvlm.configuration import CLIPConfig
from med3dvlm.data.preprocess import PreprocessConfig, preprocess
from med3dvlm.data.profile import PUBLISHED_PROFILE, DataProfile
from med3dvlm.data.volume import Volume, VolumeError, write_prepared
from med3dvlm.model.weights import CheckpointError
from med3dvlm.processing import (
    SequenceTooLongError,
    VLMProcessor,
    load_preprocess,
    load_tokenizer,
    save_preprocess,
    see,
)
from tests.helpers.tiny_data import clip_tokenizer, vlm_tokenizer

SIZE = (4, 6, 8)


@pytest.fixture
def processor():
    return VLMProcessor(vlm_tokenizer(), 8, PreprocessConfig("published", SIZE))


def word_tokenizer(*words):
    """A word-level tokenizer without `<im_patch>` and without a pad token."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<unk>", "<eos>", *words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def test_image_token_and_pad_token_are_added_once():
    tokenizer = word_tokenizer("what", "is", "it")
    processor = VLMProcessor(tokenizer, 3, PreprocessConfig())
    assert processor.image_token_id == 5 and len(tokenizer) == 6
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert VLMProcessor(tokenizer, 3, PreprocessConfig()).image_token_id == 5 and len(tokenizer) == 6
    assert processor.encode(processor.prompt("what is it"))["input_ids"].tolist() == [5, 5, 5, 2, 3, 4]


def test_prompt_has_a_space_before_questions_only(processor):
    assert processor.prompt("Where?") == "<im_patch>" * 8 + " Where?"
    assert processor.prompt("Describe.", "caption") == "<im_patch>" * 8 + "Describe."
    with pytest.raises(ValueError, match="vqa, caption"):
        processor.prompt("Where?", "closed")


def test_length_limits(processor):
    """One answer token may be left; the end token goes first; a prompt that leaves none is an error, not a NaN."""
    prompt = processor.prompt("Where is the cyst located?")
    asked = len(processor.encode(prompt)["input_ids"])
    whole = processor.encode(prompt, "Left kidney")
    length = len(whole["input_ids"])
    assert whole["labels"][-1] == processor.tokenizer.eos_token_id and whole["attention_mask"].tolist()[-2:] == [1, 0]
    cut = processor.encode(prompt, "Left kidney", length - 1)
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-1]) and cut["attention_mask"].all()
    shortest = processor.encode(prompt, "Left kidney", asked + 1)
    assert (shortest["labels"] != -100).sum() == 1
    with pytest.raises(SequenceTooLongError, match=f"{asked} tokens .*sequence of {asked}"):
        processor.encode(prompt, "Left kidney", asked)


def test_turns_share_the_image(processor):
    turns = [(processor.prompt("What?"), "A cyst"), (processor.turn("Where?"), "Left"), (processor.turn("Why?"), "No")]
    whole = processor.encode_turns(turns, 64)
    parts = [processor.encode(*turn) for turn in turns]
    for key in ("input_ids", "labels"):
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))
    assert whole["attention_mask"].all()
    assert (whole["input_ids"] == processor.image_token_id).sum() == 8
    assert (whole["labels"] == processor.tokenizer.eos_token_id).sum() == 3
    lengths = [len(part["input_ids"]) for part in parts]
    shorter = processor.encode_turns(turns, sum(lengths) - 1)
    assert torch.equal(shorter["input_ids"], whole["input_ids"][: sum(lengths[:2])])


def test_a_first_turn_that_does_not_fit_is_cut_off_as_a_single_one(processor):
    turns = [(processor.prompt("What?"), "A cyst in the left kidney"), (processor.turn("Where?"), "Left")]
    asked = len(processor.encode(turns[0][0])["input_ids"])
    for length in (asked + 1, asked + 3):
        cut, single = processor.encode_turns(turns, length), processor.encode(*turns[0], length)
        assert torch.equal(cut["input_ids"], single["input_ids"]) and torch.equal(cut["labels"], single["labels"])
        assert len(cut["turn_ids"]) == len(cut["position_ids"]) == length and cut["turn_ids"].max() == 1
    with pytest.raises(SequenceTooLongError, match=f"the question has {asked} tokens .*sequence of {asked}"):
        processor.encode_turns(turns, asked)


def test_batch_for_generation_is_padded_on_the_left(processor, tmp_path):
    array = np.random.default_rng(0).random(SIZE, dtype=np.float32)
    write_prepared(tmp_path / "x.nii.gz", array)
    image = processor.load_image(tmp_path / "x.nii.gz")
    assert torch.equal(image, torch.from_numpy(array)[None])
    questions = ["Where is the cyst located?", "Where?"]
    batch = processor(questions, [str(tmp_path / "x.nii.gz"), image])
    assert batch["images"].shape == (2, 1, *SIZE) and torch.equal(batch["images"][0], batch["images"][1])
    for row, mask, question in zip(batch["input_ids"], batch["attention_mask"], questions, strict=True):
        assert torch.equal(row[mask.bool()], processor.encode(processor.prompt(question))["input_ids"])
        assert (row[~mask.bool()] == processor.tokenizer.pad_token_id).all()
        assert mask[-1] == 1
    assert "images" not in processor(questions)
    with pytest.raises(ValueError, match="2 questions, 1 volumes"):
        processor(questions, [image])


def test_load_image_accepts_a_volume_and_names_a_bad_file(processor, tmp_path):
    volume = Volume(np.random.default_rng(0).random((9, 9, 9), dtype=np.float32))
    assert processor.load_image(volume).shape == (1, *SIZE)
    with pytest.raises(VolumeError, match="missing.nii"):
        processor.load_image(tmp_path / "missing.nii")


def test_seeing_brings_image_volume_and_warnings(processor, tmp_path):
    """Those of reading, then what makes the scan unlike the training data."""
    array = np.random.default_rng(0).normal(0, 400, (20, 9, 9)).astype(np.float32)
    volume = Volume(array, (2.0, 1.0, 1.0), "x.nii", "canonical", warnings=("said by the reader",))
    processor.training_data = PUBLISHED_PROFILE
    image, seen, warnings = processor.see(volume)
    assert torch.equal(image, processor.load_image(volume)) and seen is volume
    assert warnings[0] == "said by the reader" and "values are HU" in warnings[1] and len(warnings) == 2
    np.save(tmp_path / "x.npy", array)
    config = PreprocessConfig("ct_abdomen", SIZE)
    image, seen, warnings = see(tmp_path / "x.npy", config, DataProfile(), flip="D")
    assert np.array_equal(seen.array, array[::-1]) and warnings == ()
    assert torch.equal(image, preprocess(array[::-1].copy(), config))
    with pytest.raises(ValueError, match="flip: options of reading belong to a path"):
        processor.see(volume, flip="D")


def test_the_whole_pipeline_is_applied_and_saved(tmp_path):
    """Not only preset and size: a window of one's own, aspect and crop too; and the profile of the training data."""
    config = PreprocessConfig("window", SIZE, window=(40, 400), keep_aspect=True, crop=False)
    profile = DataProfile(cases=3, modalities=("CT",), values="HU", spacing=((1.0, 3.0),) * 3)
    VLMProcessor(vlm_tokenizer(), 8, config, training_data=profile).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vlm_qwen"}')
    loaded = VLMProcessor.from_pretrained(tmp_path)
    assert loaded.preprocess == config and loaded.training_data == profile
    assert load_preprocess(tmp_path) == (config, profile)
    volume = Volume(np.random.default_rng(0).normal(0, 400, (9, 9, 9)).astype(np.float32), (3.0, 1.0, 1.0))
    assert torch.equal(loaded.load_image(volume), preprocess(volume, config))


def test_pipeline_of_a_dual_encoder(tmp_path):
    """Beside its weights where it was trained here; a published one has its size only, as (H, W, D)."""
    config, profile = PreprocessConfig("ct_lung", SIZE), DataProfile(cases=2, values="HU")
    save_preprocess(tmp_path / "ours", config, profile)
    assert load_preprocess(tmp_path / "ours") == (config, profile)
    published = tmp_path / "published"
    CLIPConfig(input_size=[256, 192, 128]).save_pretrained(published)
    expected = (PreprocessConfig("published", (128, 256, 192)), PUBLISHED_PROFILE)
    assert load_preprocess(published) == load_preprocess(published, CLIPConfig.from_pretrained(published)) == expected
    (published / "config.json").write_text('{"model_type": "dec_clip"}')
    with pytest.raises(CheckpointError, match="neither processor_config.json nor input_size"):
        load_preprocess(published)


def test_processor_files_of_version_1_are_read(tmp_path):
    """They say nothing about the training data."""
    vlm_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vlm_qwen"}')
    steps = {"preset": "published", "size": [4, 6, 8], "version": 1}
    values = {"image_token": "<im_patch>", "num_image_tokens": 8, "preprocess": steps}
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    loaded = VLMProcessor.from_pretrained(tmp_path)
    assert loaded.preprocess == PreprocessConfig("published", SIZE) and loaded.training_data == DataProfile()


def test_saved_processor_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vlm_qwen"}')
    loaded = VLMProcessor.from_pretrained(tmp_path)
    assert loaded.preprocess == processor.preprocess and loaded.training_data == processor.training_data
    assert loaded.num_image_tokens == 8
    assert loaded.image_token_id == processor.image_token_id
    prompt = processor.prompt("Where is the cyst, 12 mm?")
    assert torch.equal(loaded.encode(prompt, "It's left")["labels"], processor.encode(prompt, "It's left")["labels"])


def test_published_folder_needs_no_processor_file(tmp_path):
    """Number of image tokens and volume size come from the published config, whose size is (H, W, D)."""
    vlm_tokenizer().save_pretrained(tmp_path)
    config = {"model_type": "vlm_qwen", "proj_out_num": 256, "input_size": [256, 192, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = VLMProcessor.from_pretrained(tmp_path)
    assert processor.num_image_tokens == 256
    assert processor.preprocess == PreprocessConfig("published", (128, 256, 192))
    (tmp_path / "config.json").write_text('{"model_type": "vlm_qwen"}')
    with pytest.raises(CheckpointError, match="proj_out_num"):
        VLMProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("text, reason", [
    ("{", "cannot be used"), ("[1]", "cannot be used"),
    ('{"image_token": "<im_patch>"}', "neither num_image_tokens in processor_config.json nor"),
    ('{"num_image_tokens": 8}', "cannot be used"),
    ('{"num_image_tokens": 8, "preprocess": {"preset": "none"}}', "unknown preprocessing 'none'"),
    ('{"num_image_tokens": 8, "preprocess": {"version": 9}}', "version 9: this software knows up to 2; update"),
    ('{"num_image_tokens": 8, "preprocess": {}, "training_data": {"version": 9}}', "version 9"),
])  # fmt: skip
def test_broken_processor_file_is_named(processor, tmp_path, text, reason):
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*: .*{reason}"):
        VLMProcessor.from_pretrained(tmp_path)


def test_a_half_copied_tokenizer_is_named(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{tmp_path}: its tokenizer: cannot be used"):
        VLMProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["qwen2", "vlm_qwen"])
def test_word_tokenizer_beside_a_qwen_model_keeps_its_ids(model_type, tmp_path):
    tokenizer = word_tokenizer("what", "is", "it")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 5}))
    assert load_tokenizer(tmp_path)("what is it")["input_ids"] == tokenizer("what is it")["input_ids"] == [2, 3, 4]


@pytest.mark.parametrize("model_type", ["dec_clip", "distilbert", "qwen2"])
def test_a_lone_tokenizer_json_is_the_tokenizer(model_type, tmp_path):
    clip_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert load_tokenizer(tmp_path)("a cyst")["input_ids"] == clip_tokenizer()("a cyst")["input_ids"]


def test_a_vocabulary_of_transformers_own_type_is_left_to_it(tmp_path):
    """Older hub folders name neither class nor special tokens: both follow from the model type."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cyst"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("cyst")["input_ids"] == [2, 5, 3] and tokenizer.pad_token_id == 0


def test_a_folder_without_a_tokenizer(tmp_path):
    """A dual encoder takes the one of its language model; nothing is made up."""
    clip_tokenizer().save_pretrained(tmp_path / "text")
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "dec_clip", "language_model_name_or_path": str(tmp_path / "text")}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder)("a cyst")["input_ids"] == clip_tokenizer()("a cyst")["input_ids"]
    for values in ({**config, "language_model_name_or_path": str(tmp_path / "absent")}, {"model_type": "vlm_qwen"}):
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=f"{folder}: holds no tokenizer"):
            load_tokenizer(folder)
