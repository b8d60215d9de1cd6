import pytest
import torch
from transformers import TextStreamer

from med3dvlm.data.volume import VolumeError, load_volume
from med3dvlm.inference import load_clip, load_model
from med3dvlm.model.weights import CheckpointError
from tests.helpers.tiny_data import clip_tokenizer, write_prepared_tree
from tests.helpers.tiny_model import TINY_SIZE, write_tiny_clip, write_tiny_vlm

QUESTIONS = ["Which plane is shown?", "Where?", "Describe the findings of this scan, please."]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = write_prepared_tree(tmp_path_factory.mktemp("data"), cases=3, size=TINY_SIZE)
    return sorted(root.glob("M3D_Cap_npy/ct_case/*/*.nii.gz"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(write_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm")), device="cpu")


def test_batch_answers_equal_single_answers(model, paths):
    together = model.answer_batch(paths, QUESTIONS, max_new_tokens=8)
    single = [model.answer(path, q, max_new_tokens=8).text for path, q in zip(paths, QUESTIONS, strict=True)]
    assert together == single


def test_features_stand_for_images(model, paths):
    images = torch.stack([model.processor.load_image(path) for path in paths])
    features = model.encode(images)
    assert features.shape == (3, model.processor.num_image_tokens, model.model.config.hidden_size)
    expected = model.answer_batch(images, QUESTIONS, max_new_tokens=8)
    assert model.answer_batch(image_features=features, questions=QUESTIONS, max_new_tokens=8) == expected


def test_the_image_is_looked_at(model, paths):
    prompts = [model.processor.prompt("Which plane is shown?")]
    ids = model.processor.tokenizer(prompts, return_tensors="pt")["input_ids"]
    images = torch.stack([model.processor.load_image(path) for path in paths[:2]])
    with torch.inference_mode():
        logits = [model.model(input_ids=ids, images=image[None]).logits[0, -1] for image in images]
    assert not torch.equal(*logits)


def test_answer_says_how_it_came_about(model, paths):
    answer = model.answer(paths[0], "Where?", max_new_tokens=5)
    assert 1 <= answer.tokens <= 5 and answer.seconds > 0
    assert answer.preprocessing == model.processor.preprocess.to_dict()
    assert answer.warnings == load_volume(paths[0]).warnings


def test_answer_streams_the_words_it_returns(model, paths, capsys):
    answer = model.answer(paths[0], "Where?", max_new_tokens=6,
                          streamer=TextStreamer(model.processor.tokenizer, skip_special_tokens=True))  # fmt: skip
    assert capsys.readouterr().out.strip() == answer.text


def test_numbers_of_images_and_questions_have_to_agree(model, paths):
    with pytest.raises(ValueError, match="2 images and 1 questions"):
        model.answer_batch(paths[:2], ["Where?"])
    with pytest.raises(ValueError, match="either images or image_features"):
        model.answer_batch(questions=["Where?"])


def test_unreadable_scan(model, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"no")
    with pytest.raises(VolumeError, match="scan.nii.gz"):
        model.answer(tmp_path / "scan.nii.gz", "Where?")


def test_dtype_of_the_files_unless_another_one_is_asked_for(tmp_path):
    folder = str(write_tiny_vlm(tmp_path / "vlm"))
    assert load_model(folder, device="cpu").dtype == torch.float32
    assert load_model(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_dual_encoder_gives_unit_features(tmp_path, paths):
    clip = load_clip(str(write_tiny_clip(tmp_path / "clip")), device="cpu")
    assert clip.preprocess.size == TINY_SIZE
    images = clip.encode_images(torch.rand(2, 1, *TINY_SIZE))
    tokens = clip.tokenizer(["a cyst", "a large cyst in the liver"], padding=True, return_tensors="pt")
    texts = clip.encode_texts(tokens["input_ids"], tokens["attention_mask"])
    assert images.shape == texts.shape == (2, clip.model.config.hidden_size)
    torch.testing.assert_close(torch.cat([images, texts]).norm(dim=1), torch.ones(4))


def test_dual_encoder_reads_its_tokenizer_as_it_is(tmp_path):
    """transformers would go by the name of our config and build CLIP's byte-level tokenizer."""
    folder = write_tiny_clip(tmp_path / "clip")
    (folder / "tokenizer_config.json").unlink()
    expected = clip_tokenizer()("a large cyst")["input_ids"]
    assert load_clip(str(folder), device="cpu").tokenizer("a large cyst")["input_ids"] == expected


def test_other_architecture_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="expected a checkpoint of type vlm_qwen, found dec_clip"):
        load_model(str(write_tiny_clip(tmp_path / "clip")))
