import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from med3dvlm.data.profile import PUBLISHED_PROFILE
from med3dvlm.data.prompts import CAPTION_PROMPTS, closed_question
from med3dvlm.data.volume import Volume, VolumeError, load_volume
from med3dvlm.inference import (
    Answer,
    AnswerStream,
    DeviceError,
    QuestionError,
    Sampling,
    load_clip,
    load_model,
)
from med3dvlm.model.weights import CheckpointError
from tests.helpers.commands import ROOT
from tests.helpers.tiny_data import clip_tokenizer, write_prepared_tree
from tests.helpers.tiny_model import TINY_SIZE, write_tiny_clip, write_tiny_vlm

QUESTIONS = ["Which plane is shown?", "Where?", "Describe the findings of this scan, please."]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = write_prepared_tree(tmp_path_factory.mktemp("data"), cases=3, size=TINY_SIZE)
    return sorted(root.glob("M3D_Cap_npy/ct_case/*/*.nii.gz"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(write_tiny_clip(tmp_path_factory.mktemp("models") / "clip"), device="cpu")


# ---------------------------------------------------------------- one answer, a batch


def untimed(answer):
    return replace(answer, seconds=0)


def test_batch_answers_equal_single_answers(model, paths):
    pairs = list(zip(paths, QUESTIONS, strict=True))
    single = [untimed(model.answer(*pair, max_new_tokens=8)) for pair in pairs]
    images = torch.stack([model.see(path).image for path in paths])
    for batch in ((pairs,), (paths, QUESTIONS)):
        assert [untimed(answer) for answer in model.answer_batch(*batch, max_new_tokens=8)] == single
    assert [answer.text for answer in model.answer_batch(images, QUESTIONS, max_new_tokens=8)] == [
        answer.text for answer in single
    ]
    one_question = model.answer_batch(paths, QUESTIONS[0], max_new_tokens=8)
    one_scan = model.answer_batch(paths[0], QUESTIONS, max_new_tokens=8)
    assert len(one_question) == len(one_scan) == 3
    assert one_question[0].text == one_scan[0].text == single[0].text
    assert model.answer_batch([]) == model.answer_batch([], []) == []


def test_a_batch_reads_and_encodes_each_scan_once(model, paths, monkeypatch):
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda images: encoded.append(len(images)) or encode(images))
    read, see = [], model.see
    monkeypatch.setattr(model, "see", lambda scan, **reading: read.append(scan) or see(scan, **reading))
    image = see(paths[2]).image
    batch = [(paths[0], "Where?"), (image, "Where?"), (str(paths[0]), "Why?"), (paths[1], "Why?"), (image, "Why?")]
    assert len(model.answer_batch(batch, max_new_tokens=3)) == 5
    assert len(read) == 3 and encoded == [1, 1, 1]


def test_decoding_is_that_of_transformers(model, paths):
    """Token for token, in a padded batch; transformers' own loop is the reference."""
    images = torch.stack([model.see(path).image for path in paths])
    batch = model.processor(QUESTIONS, volumes=list(images))
    reference = model.model.generate(**batch, max_new_tokens=12, do_sample=False,
                                     eos_token_id=model.processor.tokenizer.eos_token_id)  # fmt: skip
    texts = model.processor.tokenizer.batch_decode(reference, skip_special_tokens=True)
    answers = model.answer_batch(images, QUESTIONS, max_new_tokens=12)
    assert [answer.text for answer in answers] == [text.strip() for text in texts]


def test_two_threads_at_once(model, paths):
    pairs = [(path, question) for path in paths for question in QUESTIONS]
    expected = [model.answer(*pair, max_new_tokens=6).text for pair in pairs]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda pair: model.answer(*pair, max_new_tokens=6).text, pairs)) == expected


def test_features_stand_for_images(model, paths):
    images = torch.stack([model.processor.load_image(path) for path in paths])
    features = model.encode(images)
    assert features.shape == (3, model.processor.num_image_tokens, model.model.config.hidden_size)
    expected = [answer.text for answer in model.answer_batch(images, QUESTIONS, max_new_tokens=8)]
    assert model.answer_features(features, QUESTIONS, max_new_tokens=8) == expected
    with pytest.raises(ValueError, match="3 images and 1 questions"):
        model.answer_features(features, QUESTIONS[:1])


def test_the_image_is_looked_at(model, paths):
    prompts = [model.processor.prompt("Which plane is shown?")]
    ids = model.processor.tokenizer(prompts, return_tensors="pt")["input_ids"]
    images = torch.stack([model.processor.load_image(path) for path in paths[:2]])
    with torch.inference_mode():
        logits = [model.model(input_ids=ids, images=image[None]).logits[0, -1] for image in images]
    assert not torch.equal(*logits)


def test_answer_says_how_it_came_about(model, paths):
    answer = model.answer(paths[0], "Where?", max_new_tokens=5)
    assert answer.tokens == 5 and not answer.finished and answer.seconds > 0
    assert answer.preprocessing == model.processor.preprocess.to_dict()
    assert set(load_volume(paths[0]).warnings) <= set(answer.warnings)
    assert answer.probabilities is None and str(answer) == answer.text


def test_an_answer_ends_with_the_end_token(folder, paths):
    model = load_model(folder, device="cpu")
    tokenizer = model.processor.tokenizer
    stream = model.stream(paths[0], "Where?", max_new_tokens=6)
    list(stream)
    spoken = stream._ids
    last = next(i for i, token in enumerate(spoken) if i and token not in spoken[:i])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(spoken[last])
    answer = model.answer(paths[0], "Where?", max_new_tokens=6)
    assert answer.finished and answer.tokens == last + 1 < 6
    rest = model.answer_batch(paths[:2], ["Where?", QUESTIONS[2]], max_new_tokens=6)
    assert untimed(rest[0]) == untimed(answer)  # the other row may go on


def test_report_is_an_answer_in_the_form_of_reports(model, paths):
    expected = model.answer(paths[0], CAPTION_PROMPTS[0], "caption", max_new_tokens=6).text
    assert model.report(paths[0], max_new_tokens=6).text == expected


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((["a.nii"] * 2, ["Where?"]), "2 scans and 1 questions"),
        ((["a.nii", "b.nii"],), r"pairs \(scan, question\)"),
        (([("a.nii", "Where?", "liver")],), r"pairs \(scan, question\)"),
    ],
)
def test_batches_that_are_none(model, batch, message):
    with pytest.raises(ValueError, match=message):
        model.answer_batch(*batch)


# ---------------------------------------------------------------- scans


def test_every_form_of_a_scan_gives_the_same_answer(model, paths):
    volume, seen = load_volume(paths[0]), model.see(paths[0])
    assert seen.image.shape == (1, *TINY_SIZE) and seen.volume.path == str(paths[0])
    answers = {model.answer(scan, "Where?", max_new_tokens=6).text for scan in (paths[0], volume, seen.image)}
    assert len(answers) == 1


def test_reading_options_reach_the_reader(model, paths):
    flipped = model.see(paths[0], flip="W").image
    torch.testing.assert_close(flipped, model.see(paths[0]).image.flip(3))
    for read_already in (flipped, load_volume(paths[0])):
        with pytest.raises(ValueError, match="flip: options of reading"):
            model.see(read_already, flip="W")


def test_warnings_say_what_is_unlike_the_training_data(model, monkeypatch):
    monkeypatch.setattr(model.processor, "training_data", PUBLISHED_PROFILE)  # CT
    scan = Volume(np.random.default_rng(0).random((16, 16, 16), dtype=np.float32) * 900, modality="MR",
                  warnings=("two slices were left out",))  # fmt: skip
    answer = model.answer(scan, "Where?", max_new_tokens=2)
    assert "two slices were left out" in answer.warnings
    assert any("MR" in warning and "trained on CT" in warning for warning in answer.warnings)
    assert model.answer_batch([scan], ["Where?"], max_new_tokens=2)[0].warnings == answer.warnings


def test_unusable_scans(model, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"no")
    with pytest.raises(VolumeError, match="scan.nii.gz"):
        model.answer(tmp_path / "scan.nii.gz", "Where?")


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        (torch.zeros(1, 8, 8, 8), r"expected a preprocessed image \[1, 32, 64, 64\], found a tensor \[1, 8"),
        (torch.full((1, *TINY_SIZE), -1000.0), r"values in \[0, 1\], found torch.float32 -1000..-1000"),
        (torch.full((1, *TINY_SIZE), float("nan")), r"values in \[0, 1\], found torch.float32 nan"),
        (torch.full((1, *TINY_SIZE), 200, dtype=torch.uint8), r"floating-point values in \[0, 1\], found torch.uint8"),
        (np.random.default_rng(0).random(TINY_SIZE), r"found a ndarray. Volume\(array, spacing\)"),
        (None, "found a NoneType"),
        (["a.nii.gz"], "found a list"),
    ],
)
def test_what_is_no_scan_is_said_by_both_models(model, clip, scan, message):
    """Raw HU or NaN in a tensor would be answered about, wrongly."""
    with pytest.raises(VolumeError, match=message):
        model.see(scan)
    with pytest.raises(VolumeError, match=message):
        clip.embed_image(scan)


def test_preprocessed_images_in_few_bits_are_taken(model, paths):
    image = model.see(paths[0]).image
    expected = model.answer(image, "Where?", max_new_tokens=4).text
    assert model.answer(image.double(), "Where?", max_new_tokens=4).text == expected
    assert model.see(image.to(torch.bfloat16)).image.dtype == torch.bfloat16


# ---------------------------------------------------------------- questions


def test_a_question_that_is_too_long_says_how_many_tokens_fit(model, paths):
    def ask(words):
        return model.answer(paths[0], " ".join(["liver"] * words), max_new_tokens=100)

    with pytest.raises(QuestionError) as error:
        ask(400)
    has, fit = map(int, re.match(r"the question has (\d+) tokens, (\d+) fit:", str(error.value)).groups())
    room = model.context - 100 - model.processor.num_image_tokens
    assert fit == room < has
    count = [len(model.processor.tokenizer(" " + " ".join(["liver"] * words))["input_ids"]) for words in range(400)]
    words = next(n for n in range(400) if count[n] > fit)
    ask(words - 1)
    with pytest.raises(QuestionError):
        ask(words)


def test_the_length_of_training_samples_is_no_limit(folder, paths):
    """As `model_max_length=512` leaves it in a folder: 256 image tokens and as many for the answer leave nothing."""
    model = load_model(folder, device="cpu")
    model.processor.tokenizer.model_max_length = model.processor.num_image_tokens + 4
    assert model.answer(paths[0], "Where?", max_new_tokens=4).tokens == 4


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (" \n", "is empty"),
        ("", "is empty"),
        ("What is <im_patch>?", "holds <im_patch>"),
        ("a \udcff b", "bytes that are no characters"),
        (None, "is no text: None"),
        (["Where?"], "is no text"),
    ],
)
def test_questions_that_cannot_be_asked(model, paths, question, message):
    for ask in (model.answer, model.stream, model.chat(paths[0]).ask, lambda p, q: model.answer_batch([p], [q])):
        with pytest.raises(QuestionError, match=message):
            ask(paths[0], question) if ask.__name__ != "ask" else ask(question)


# ---------------------------------------------------------------- streams


def test_stream_gives_the_answer_in_pieces(model, paths):
    stream = model.stream(paths[0], "Where?", max_new_tokens=12)
    assert stream.answer is None
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.answer.text == model.answer(paths[0], "Where?", max_new_tokens=12).text
    assert stream.answer.tokens == 12 and list(stream) == []


def test_characters_of_several_tokens_come_whole(model):
    """The tokenizer is byte-level: "é" and "肝" are several tokens."""
    tokenizer = model.processor.tokenizer
    ids = tokenizer("  l'épaule \n 肝 droite")["input_ids"]
    stream = AnswerStream(iter([[i] for i in ids]), tokenizer,
                          lambda **values: Answer(preprocessing={}, **values), 0.0)  # fmt: skip
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == "l'épaule \n 肝 droite"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_stop_from_another_thread_ends_the_stream(model, paths):
    before = threading.active_count()
    stream = model.stream(paths[0], "Where?", max_new_tokens=400)
    first = next(stream)
    other = threading.Thread(target=stream.stop)
    other.start()
    other.join()
    assert list(stream) == []
    assert stream.answer.text.startswith(first) and 1 <= stream.answer.tokens < 10 and not stream.answer.finished
    assert threading.active_count() == before


def test_a_program_may_end_in_the_middle_of_a_stream(folder, paths):
    program = """
import sys
from med3dvlm import load_model
stream = load_model(sys.argv[1]).stream(sys.argv[2], "Where?", max_new_tokens=400)
print(len(next(stream)))
"""
    command = [sys.executable, "-c", program, str(folder), str(paths[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) >= 1
    assert "Exception ignored" not in done.stderr and "Traceback" not in done.stderr


def test_what_was_shown_is_the_answer_when_a_stream_is_stopped(model, paths):
    """Not the bytes of a character that was not whole yet, nor a token that comes in after the answer was asked for."""
    tokenizer = model.processor.tokenizer
    first, *rest = tokenizer("a肝")["input_ids"]
    assert len(rest) > 1

    def pieces(tokens, complete=lambda **values: Answer(preprocessing={}, **values)):
        return AnswerStream(iter([[i] for i in tokens]), tokenizer, complete, 0.0)

    stream = pieces([first, *rest])
    shown = next(stream)
    assert stream._take([rest[0]]) == ""  # as if stopped while the next token was generated
    stream.stop()
    assert stream.answer.text == shown == "a"
    assert stream._take(rest[1:]) == "" and list(stream) == [] and stream.answer.text == "a"


def test_an_error_of_the_model_reaches_whoever_asks_for_the_next_piece(model, paths, monkeypatch):
    stream = model.stream(paths[0], "Where?", max_new_tokens=40)
    next(stream)
    monkeypatch.setattr(model.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)


# ---------------------------------------------------------------- sampling


def test_a_seed_repeats_its_answer_and_another_one_does_not(model, paths):
    def answer(**values):
        return model.answer(paths[0], "Where?", max_new_tokens=12, sampling=Sampling(**values)).text

    state = torch.get_rng_state()
    first = answer(temperature=1.0, seed=3)
    assert answer(temperature=1.0, seed=3) == first != answer(temperature=1.0, seed=4)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own draws are left alone
    greedy = model.answer(paths[0], "Where?", max_new_tokens=12).text
    assert answer() == answer(temperature=1.0, top_p=1e-6) == answer(temperature=1e-6) == greedy
    assert answer(temperature=1e-300) == greedy  # a quotient beyond what numbers hold
    batch = model.answer_batch(paths[:2], "Where?", max_new_tokens=12, sampling=Sampling(1.0, seed=3))
    assert batch[0].text == first


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"seed": 2**64}, {"seed": None}],
)
def test_sampling_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("choices", "shown", "answers"),
    [
        (["liver", "left kidney"], "Where? Choices: A. liver B. left kidney", ["A. liver", "B. left kidney"]),
        (["Yes", "No"], "Where?", ["Yes", "No"]),
        (["a", "b", "c", "d", "spleen"], "Where?", ["a", "b", "c", "d", "spleen"]),
    ],
)
def test_probabilities_of_choices(model, paths, choices, shown, answers):
    answer = model.answer(paths[0], "Where?", choices=choices)
    scores, image = [], model.see(paths[0]).image
    for text in answers:  # each as a whole sequence of its own
        row = model.processor.encode(model.processor.prompt(shown), text)
        own = row["labels"] >= 0
        with torch.inference_mode():
            logits = model.model(input_ids=row["input_ids"][None], images=image[None]).logits[0]  # [T, V]
        chosen = logits.log_softmax(-1)[:-1].gather(1, row["input_ids"][1:, None])[:, 0]
        scores.append(chosen[own[1:]].sum())
    expected = torch.stack(scores).softmax(0).tolist()
    assert list(answer.probabilities) == choices
    assert list(answer.probabilities.values()) == pytest.approx(expected, rel=1e-4)
    assert answer.text == choices[expected.index(max(expected))]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "two or more different"),
        (["liver"], "two or more different"),
        ("liver", "two or more different"),  # no list of letters
        (["liver", "liver "], "two or more different"),
        (["liver", " "], "a choice is empty"),
        (["liver", 3], "a choice is no text: 3"),
        (["<im_patch>", "b", "c", "d", "e"], "a choice holds <im_patch>"),
    ],
)
def test_choices_that_are_none(model, paths, choices, message):
    with pytest.raises(QuestionError, match=message):
        model.answer(paths[0], "Where?", choices=choices)


# ---------------------------------------------------------------- chat


def test_chat_encodes_the_scan_once_and_answers_as_if_asked_alone(model, paths, monkeypatch):
    expected = [model.answer(paths[0], question, max_new_tokens=6).text for question in QUESTIONS]
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda images: encoded.append(len(images)) or encode(images))
    chat = model.chat(paths[0])
    assert [chat.ask(question, max_new_tokens=6).text for question in QUESTIONS] == expected
    chat.report(max_new_tokens=3)
    assert encoded == [1]
    assert [question for question, _ in chat.history] == [*QUESTIONS, CAPTION_PROMPTS[0]]
    assert [answer.text for _, answer in chat.history[:3]] == expected


def test_remembered_turns_stand_in_the_prompt_as_training_writes_them(model, paths, monkeypatch):
    chat = model.chat(paths[0], remember=True)
    first = chat.ask("Where?", choices=["liver", "lung"])
    asked = []
    embed = model.model.embed
    monkeypatch.setattr(model.model, "embed", lambda ids, **kw: asked.append(ids[0].tolist()) or embed(ids, **kw))
    chat.ask("And why?", max_new_tokens=5)
    processor = model.processor
    said = {"liver": "A. liver", "lung": "B. lung"}[first.text]
    earlier = processor.encode(processor.prompt(closed_question("Where?", ["liver", "lung"])), said)[
        "input_ids"
    ].tolist()
    question = processor.tokenizer(processor.turn("And why?"))["input_ids"]
    assert asked == [earlier + question] and earlier[-1] == processor.tokenizer.eos_token_id
    chat.reset()
    chat.ask("And why?", max_new_tokens=5)
    assert chat.remember and asked[-1] == processor.tokenizer(processor.prompt("And why?"))["input_ids"]


def test_another_image_is_another_conversation(model, paths, tmp_path):
    chat = model.chat()
    with pytest.raises(QuestionError, match="no scan"):
        chat.ask("Where?")
    chat.set_image(paths[0])
    chat.ask("Where?", max_new_tokens=5)
    with pytest.raises(VolumeError):
        chat.set_image(tmp_path / "nowhere.nii.gz")
    assert chat.seen.volume.path == str(paths[0]) and len(chat.history) == 1
    chat.set_image(paths[1])
    assert chat.history == []
    assert chat.ask("Where?", max_new_tokens=5).text == model.answer(paths[1], "Where?", max_new_tokens=5).text


def test_a_stopped_answer_belongs_to_the_conversation_it_was_asked_in(model, paths):
    chat = model.chat(paths[0])
    stream = chat.stream("Where?", max_new_tokens=50)
    piece, history = next(stream), chat.history
    chat.reset()
    stream.stop()
    assert stream.answer.text.startswith(piece)
    assert history == [("Where?", stream.answer)] and chat.history == []


# ---------------------------------------------------------------- loading


def test_dtype_of_the_files_unless_another_one_is_asked_for(folder, model):
    assert model.dtype == torch.float32
    assert load_model(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(folder, device=torch.device("cpu"), dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be one of auto, float32"):
        load_model(folder, dtype="int3")


@pytest.mark.parametrize("load", [load_model, load_clip])
@pytest.mark.parametrize("device", ["nosuch", "cuda:99", "privateuseone", "hpu", "meta", ""])
def test_devices_that_cannot_be_used(folder, load, device):
    with pytest.raises(DeviceError, match=f"device {device}"):
        load(folder, device=device)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_incomplete_folder(folder, tmp_path, missing):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path / "copy")):
        load_model(tmp_path / "copy", device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "generation_config.json"])
def test_half_written_files(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=str(tmp_path / "copy")):
        load_model(tmp_path / "copy", device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_half_written_files_of_a_dual_encoder(tmp_path, name):
    folder = write_tiny_clip(tmp_path / "clip")
    (folder / name).write_text('{"preprocess": {')
    with pytest.raises(CheckpointError, match=str(folder)):
        load_clip(folder, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_image_tokens": 7}, "the number of image tokens is 7 in .*, 6 in its model"),
        ({"preprocess": {"size": [16, 16, 16]}}, r"the size of the image \(D, H, W\) is \(16, 16, 16\)"),
        ({"image_token": "[PAD]"}, r"the id of \[PAD\] is"),
        ({"image_token": "<other>"}, "<other>"),
    ],
)
def test_files_of_different_models_are_found_before_the_first_question(folder, tmp_path, changes, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / "processor_config.json").read_text())
    (copy / "processor_config.json").write_text(json.dumps(values | changes))
    with pytest.raises(CheckpointError, match=message):
        load_model(copy, device="cpu")


@pytest.mark.parametrize("name", ["models/no/such", "/nowhere/model", "~/model"])
def test_a_path_is_not_looked_for_on_the_hub(name):
    for load in (load_model, load_clip):
        with pytest.raises(CheckpointError, match=f"^{name}: no such folder; name a folder, or"):
            load(name, device="cpu")


def test_a_file_is_no_model(folder):
    with pytest.raises(CheckpointError, match="model.safetensors is a file: name the folder"):
        load_model(folder / "model.safetensors", device="cpu")


def test_other_architecture_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="expected a checkpoint of type vlm_qwen, found dec_clip"):
        load_model(str(write_tiny_clip(tmp_path / "clip")))


def test_importing_the_package_is_light_and_still_offers_its_names():
    code = "import med3dvlm, sys; assert 'torch' not in sys.modules; print(med3dvlm.__all__, med3dvlm.VLMConfig)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "load_model" in done.stdout and "VLMConfig" in done.stdout, done.stderr


# ---------------------------------------------------------------- the dual encoder


def test_dual_encoder_gives_unit_features(clip):
    assert clip.preprocess.size == TINY_SIZE
    images = clip.encode_images(torch.rand(2, 1, *TINY_SIZE))
    tokens = clip.tokenizer(["a cyst", "a large cyst in the liver"], padding=True, return_tensors="pt")
    texts = clip.encode_texts(tokens["input_ids"], tokens["attention_mask"])
    assert images.shape == texts.shape == (2, clip.model.config.hidden_size)
    torch.testing.assert_close(torch.cat([images, texts]).norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("loss_type", ["sigmoid", "nce"])
def test_rank_says_which_text_belongs_to_which_scan(tmp_path, paths, loss_type):
    clip = load_clip(write_tiny_clip(tmp_path / "clip", loss_type=loss_type), device="cpu")
    texts = ["a cyst", "a large cyst in the liver", "normal"]
    ranking = clip.rank(paths[:2], texts)
    images = torch.stack([clip.embed_image(path) for path in paths[:2]])
    words = torch.stack([clip.embed_text(text) for text in texts])
    torch.testing.assert_close(ranking.similarity, images @ words.T)
    scale = (clip.model.t_prime if loss_type == "sigmoid" else clip.model.logit_scale).detach().exp()
    torch.testing.assert_close(ranking.probabilities, (scale * images @ words.T).softmax(1))
    assert ranking.similarity.gather(1, ranking.order).diff(dim=1).max() <= 0
    assert ranking.warnings == tuple(clip.see(path).warnings for path in paths[:2])
    alone = clip.rank(paths[0], texts[1])  # one of each
    torch.testing.assert_close(alone.similarity, ranking.similarity[:1, 1:2])


def test_there_is_something_to_rank(clip, paths):
    for scans, texts in (([], ["a cyst"]), (paths[:1], [])):
        with pytest.raises(QuestionError, match="nothing to rank"):
            clip.rank(scans, texts)


def test_features_in_few_bits_are_of_unit_norm_too(tmp_path, paths):
    clip = load_clip(write_tiny_clip(tmp_path / "clip"), device="cpu", dtype="bfloat16")
    assert clip.dtype == torch.bfloat16
    features = torch.stack([clip.embed_image(paths[0]), clip.embed_text("a large cyst in the liver")])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)


def test_texts_of_the_dual_encoder(clip):
    long = clip.embed_text("a large cyst in the liver " * 50)  # the tiny text encoder has 64 positions
    assert long.norm() == pytest.approx(1, abs=1e-5)
    with pytest.raises(QuestionError, match="empty"):
        clip.embed_text(" ")


def test_dual_encoder_reads_its_tokenizer_as_it_is(tmp_path):
    """transformers would go by the name of our config and build CLIP's byte-level tokenizer."""
    folder = write_tiny_clip(tmp_path / "clip")
    (folder / "tokenizer_config.json").unlink()
    expected = clip_tokenizer()("a large cyst")["input_ids"]
    assert load_clip(str(folder), device="cpu").tokenizer("a large cyst")["input_ids"] == expected
