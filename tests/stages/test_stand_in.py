"""The stand-in for pre-trained language models: text only, checked before anything is built on it."""

import json

import pytest
import torch
from transformers import AutoModel

from med3dvlm.data.manifest import read_caption_manifest, read_vqa_csv
from med3dvlm.processing import VLMProcessor, load_tokenizer
from med3dvlm.train import clip, stand_in
from med3dvlm.train.stand_in import TextExercises, language_tokenizer, text_encoder_tokenizer
from tests.helpers.tiny_stages import PROJECTOR, VISION

STEPS = 4


@pytest.fixture(scope="module")
def texts(stages):
    manifest = stages.data / "M3D_Cap_npy/M3D_Cap.json"
    records = read_caption_manifest(manifest, stages.data, "train")
    return {record.image.split("/")[-2]: record.read_text() for record in records}


@pytest.fixture(scope="module")
def exercises(stages, texts):
    tables = stages.data / "M3D-VQA"
    questions, yes_no = (read_vqa_csv(tables / f"M3D_VQA_{n}.csv", stages.data) for n in ("train", "yn_train"))
    tokenizer = language_tokenizer([*texts.values(), *(record.question for record in questions)])
    return TextExercises(tokenizer, texts, questions, yes_no, size=40, seed=5)


def turns_of(exercises, item):
    """The text of what all turns see, and per turn the text of the question and of the labels."""

    def text(ids):
        return exercises.tokenizer.decode(ids)

    shared = text(item["input_ids"][item["turn_ids"] == 0])
    turns = []
    for turn in range(1, int(item["turn_ids"].max()) + 1):
        own = item["turn_ids"] == turn
        labelled = own & (item["labels"] != -100)
        assert torch.equal(item["labels"][labelled], item["input_ids"][labelled])
        turns.append((text(item["input_ids"][own & ~labelled]), text(item["labels"][labelled])))
    return shared, turns


def test_matching_comes_first_and_needs_no_report(exercises):
    shared, turns = turns_of(exercises, exercises[0])
    assert shared == "" and len(turns) == 10
    for question, answer in turns:
        assert answer.endswith("<|im_end|>")
        answer = answer.removesuffix("<|im_end|>").strip()
        if answer[1:3] == ". ":  # a word with choices: its letter and itself
            assert f" {answer}" in question and question.strip().startswith(answer[3:])
        else:  # choices and a letter: the word
            assert f"{question.strip()[-1]}. {answer}" in question


def test_questions_about_a_report_are_answered_from_it(exercises, texts):
    items = [turns_of(exercises, exercises[index]) for index in range(12, 40)]
    about = [(shared, turns) for shared, turns in items if shared]
    assert about and {shared for shared, _ in about} <= set(texts.values())
    for shared, turns in about:
        answers = [answer.removesuffix("<|im_end|>").strip() for _, answer in turns]
        assert shared in answers, "the report itself is one of the answers"
        closed = [(q, a) for (q, _), a in zip(turns, answers, strict=True) if " Choices: " in q]
        assert len(closed) == 5 and all(f" {answer}" in question for question, answer in closed)
        organ = next(answer for question, answer in closed if "Which organ" in question)
        assert organ.split(". ")[1] in shared


def test_an_exercise_follows_from_seed_and_index(exercises):
    first, second = exercises[20], exercises[20]
    assert all(torch.equal(first[key], second[key]) for key in first)
    exercises.seed = 6
    try:
        assert not torch.equal(first["input_ids"][:50], exercises[20]["input_ids"][:50])
    finally:
        exercises.seed = 5


def test_positions_count_on_from_the_report(exercises):
    item = next(exercises[index] for index in range(12, 40) if (exercises[index]["turn_ids"] == 0).any())
    start = int((item["turn_ids"] == 0).sum())
    for turn in range(1, int(item["turn_ids"].max()) + 1):
        positions = item["position_ids"][item["turn_ids"] == turn]
        assert positions.tolist() == list(range(start, start + len(positions)))


def test_the_tokenizers_lose_nothing(texts):
    language, text = language_tokenizer(list(texts.values())), text_encoder_tokenizer(list(texts.values()))
    for report in [*texts.values(), "Größe 3½ mm\n"]:
        assert language.decode(language(report)["input_ids"]) == report
    ids = text(next(iter(texts.values())))["input_ids"]
    assert text.convert_ids_to_tokens([ids[0], ids[-1]]) == ["[CLS]", "[SEP]"]
    assert text.unk_token_id not in ids


@pytest.fixture(scope="module")
def flags(stages):
    tables = stages.data / "M3D-VQA"
    return [*stages.data_flags(), "--vqa_data_train_path", str(tables / "M3D_VQA_train.csv"),
            "--vqa_yn_data_train_path", str(tables / "M3D_VQA_yn_train.csv"), "--max_steps", str(STEPS), "--use_cpu",
            "True", "--report_to", "none", "--preset", "quickstart", "--disable_tqdm", "True"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_steps_of_the_text_encoder():
    """Its 200 steps would take most of the tests' time."""
    write = stand_in.write_text_encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in, "write_text_encoder", lambda *args: write(*args, steps=2, batch=4))
        yield


def test_a_model_that_cannot_find_letters_is_not_handed_on(flags, tmp_path):
    with pytest.raises(RuntimeError, match=r"finds \d+% of the letters, expected 95% .*--max_steps.*--seed"):
        stand_in.main([*flags, "--output_dir", str(tmp_path)])
    assert not (tmp_path / "language_model").exists()


def test_what_it_writes_carries_the_other_stages(stages, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(stand_in, "REQUIRED_LETTER_ACCURACY", 0.0)
    result = stand_in.main([*flags, "--output_dir", str(tmp_path)])
    assert 0 <= result["letter_accuracy"] <= 1 and result["train_loss"] > 0
    text = AutoModel.from_pretrained(tmp_path / "text_encoder")
    assert text.config.model_type == "distilbert"
    tokenizer = load_tokenizer(tmp_path / "language_model")
    assert tokenizer.decode(tokenizer(" left liver")["input_ids"]) == " left liver"
    clip.main([*stages.clip_flags(tmp_path / "clip", "--language_model_name_or_path", tmp_path / "text_encoder")])
    stages.vlm(tmp_path / "projector", *PROJECTOR, *VISION, "--model_name_or_path", tmp_path / "language_model",
               "--pretrain_vision_model", tmp_path / "clip" / "pretrained_ViT.bin")  # fmt: skip
    config = json.loads((tmp_path / "projector" / "config.json").read_text())
    processor = VLMProcessor.from_pretrained(tmp_path / "projector")
    assert len(processor.tokenizer) == config["vocab_size"] and processor.image_token_id == config["image_token_id"]


def test_it_never_looks_at_an_image(flags, tmp_path, monkeypatch):
    """The stand-in reads no volume, so nothing about images can leak into what later stages start from."""
    from med3dvlm.data import codes, volume

    def looked(*args, **kwargs):
        raise AssertionError("read a volume")

    for module, name in ((codes, "load_volume"), (codes, "read_codes"), (volume, "load_volume")):
        monkeypatch.setattr(module, name, looked)
    monkeypatch.setattr(stand_in, "REQUIRED_LETTER_ACCURACY", 0.0)
    stand_in.main([*flags, "--output_dir", str(tmp_path), "--max_steps", "1"])
    assert (tmp_path / "language_model" / "config.json").is_file()
    assert not hasattr(stand_in, "load_volume"), "a name of its own would escape the patches above"
