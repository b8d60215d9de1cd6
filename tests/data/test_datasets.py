"""Data sets: the golden items, packing, bad samples, repeatable randomness."""

import json
import random
import re
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from med3dvlm.data.augment import to_unit
from med3dvlm.data.cache import build_cache
from med3dvlm.data.collate import collate_pairs, collate_vlm
from med3dvlm.data.datasets import (
    CaptionDataset,
    GroupedQADataset,
    PairDataset,
    SampleError,
    VQADataset,
    shorten_report,
)
from med3dvlm.data.manifest import read_caption_manifest, read_vqa_csv
from med3dvlm.data.preprocess import PreprocessConfig, preprocess
from med3dvlm.data.volume import VolumeError, load_volume, write_prepared
from med3dvlm.processing import VLMProcessor
from tests.helpers.tiny_data import GOLDEN_DATA, clip_tokenizer, unpack_tree, vlm_tokenizer, write_prepared_tree

GOLDEN = json.loads((GOLDEN_DATA / "dataset_items_a.json").read_text(encoding="utf-8"))
SIZE = tuple(GOLDEN["volume_shape"])
CONFIG = PreprocessConfig("published", SIZE)
PADS = {"pad_differs_from_eos": "<|endoftext|>", "pad_equals_eos": "<|im_end|>"}
IMAGES = "M3D_Cap_npy"
TABLES = "M3D-VQA"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return unpack_tree("dataset_root_a.npz", tmp_path_factory.mktemp("root"))


def golden_processor(pad="<|endoftext|>"):
    return VLMProcessor(vlm_tokenizer(pad), GOLDEN["proj_out_num"], CONFIG)


def captions(root, split):
    return read_caption_manifest(root / IMAGES / "M3D_Cap.json", root, split)


def questions(root, name):
    return read_vqa_csv(root / TABLES / f"M3D_VQA_{name}.csv", root)


def golden_dataset(name, root, processor):
    kind, _, part = name.partition("/")
    length = GOLDEN["max_length"]
    if kind == "CapDataset":
        records = captions(root, part.removesuffix("_without_augmentation"))
        return CaptionDataset(records, processor, length, prompts=[GOLDEN["caption_prompt"]])
    if kind == "VQADataset":
        return VQADataset(questions(root, "test"), processor, length, "closed" if part.endswith("True") else "open")
    return VQADataset(questions(root, "yn_train"), processor, length, "yes_no")


def assert_same_image(item, expected):
    assert list(item["image"].shape) == expected["image_shape"]
    assert str(item["image"].dtype) == expected["image_dtype"]
    assert item["image"].double().sum().item() == pytest.approx(expected["image_sum"], abs=1e-4)


@pytest.mark.parametrize("name", GOLDEN["pad_differs_from_eos"])
@pytest.mark.parametrize("pad", PADS)
def test_golden_items(pad, name, root):
    """Ids, masks, labels and texts are the published ones, padded as published; a cell "None" stays "None"."""
    dataset = golden_dataset(name, root, golden_processor(PADS[pad]))
    pad_id = dataset.processor.tokenizer.pad_token_id
    assert len(dataset) == len(GOLDEN[pad][name])
    for index, expected in enumerate(GOLDEN[pad][name]):
        if set(expected["label"]) == {-100}:  # published: a loss that is not a number
            with pytest.raises(SampleError, match=rf"M3D_VQA_test.csv, row {index} "):
                dataset[index]
            continue
        if "nan" in expected["question"] + expected["answer"]:
            assert dataset[index]["question"] == expected["question"].replace("nan", "None")
            assert dataset[index]["answer"] == expected["answer"].replace("nan", "None")
            continue
        item = dataset[index]
        for ours, theirs, padding in (
            ("input_ids", "input_id", pad_id), ("labels", "label", -100), ("attention_mask", "attention_mask", 0),
        ):  # fmt: skip
            row = item[ours].tolist()
            assert row + [padding] * (len(expected[theirs]) - len(row)) == expected[theirs], (ours, index)
        for key in ("question", "answer", "question_type", "answer_choice"):
            assert item[key] == expected.get(key, ""), key
        assert_same_image(item, expected)


@pytest.mark.parametrize("split", GOLDEN["CLIPDataset"]["items"])
def test_golden_pairs(split, root):
    records = captions(root, split.removesuffix("_without_augmentation"))
    length = GOLDEN["CLIPDataset"]["max_length"]
    dataset = PairDataset(records, clip_tokenizer(), length, CONFIG)
    batch = collate_pairs([dataset[i] for i in range(len(dataset))], dataset.tokenizer)
    for index, expected in enumerate(GOLDEN["CLIPDataset"]["items"][split]):
        item = dataset[index]
        assert item["text"] == expected["text"]
        assert item["question_type"] == expected["question_type"]
        ids = batch["input_ids"][index].tolist()
        assert ids + [dataset.tokenizer.pad_token_id] * (length - len(ids)) == expected["input_id"]
        mask = batch["attention_mask"][index].tolist()
        assert mask + [0] * (length - len(mask)) == expected["attention_mask"]
        assert_same_image(item, expected)


@pytest.fixture
def tiny(tmp_path):
    return write_prepared_tree(tmp_path / "tiny", cases=8, size=SIZE)


def tiny_pairs(tiny, split="train", **options):
    records = read_caption_manifest(tiny / IMAGES / "M3D_Cap.json", tiny, split, check_files=False)
    return PairDataset(records, clip_tokenizer(), 64, CONFIG, **options)


def test_collate_pads_to_the_longest_of_the_batch(root):
    dataset = golden_dataset("CapDataset/test", root, golden_processor())
    items = [dataset[0], dataset[1]]
    lengths = [len(item["input_ids"]) for item in items]
    assert lengths[0] > lengths[1]
    right = collate_vlm([items[0], None, items[1]], pad_token_id=7)
    left = collate_vlm(items, pad_token_id=7, padding_side="left")
    gap = lengths[0] - lengths[1]
    assert right["images"].shape == (2, 1, *SIZE)
    for key, value in (("input_ids", 7), ("labels", -100), ("attention_mask", 0)):
        assert right[key].shape == left[key].shape == (2, lengths[0])
        assert torch.equal(right[key][1, :-gap], items[1][key]) and (right[key][1, -gap:] == value).all()
        assert torch.equal(left[key][1, gap:], items[1][key]) and (left[key][1, :gap] == value).all()
    with pytest.raises(ValueError, match="all 2 items"):
        collate_vlm([None, None], 7)


def test_text_can_be_had_without_the_image_and_the_other_way_round(root):
    dataset = golden_dataset("VQADataset/close_ended=True", root, golden_processor())
    assert "image" not in dataset.load_text(0)
    assert torch.equal(dataset.load_image(0), dataset[0]["image"])


def test_unreadable_file_is_named_with_manifest_and_row(tiny):
    dataset = tiny_pairs(tiny, "test")
    Path(dataset.records[1].image).write_bytes(b"damaged")
    Path(dataset.records[2].image).unlink()
    Path(dataset.records[3].text_path).unlink()
    for index, file in ((1, "000005"), (2, "000006"), (3, "000007/text.txt")):
        with pytest.raises(ValueError, match=rf"M3D_Cap.json, row test\[{index}\]: .*{file}"):
            dataset[index]
    assert dataset[0]["image"].shape == (1, *SIZE)


@pytest.mark.parametrize("workers", [0, 2])
def test_allowed_bad_samples_are_left_out_counted_and_listed(tiny, workers):
    """No other sample takes the place of a bad one, also with loader processes; one too many is an error."""
    dataset = tiny_pairs(tiny, max_bad_samples=1)
    Path(dataset.records[1].image).write_bytes(b"damaged")

    def collate(items):
        return collate_pairs(items, dataset.tokenizer)

    def read():
        return [len(batch["images"]) for batch in DataLoader(dataset, 2, collate_fn=collate, num_workers=workers)]

    assert read() == [1, 2] and read() == [1, 2]  # a second epoch does not count it again
    assert dataset.bad_samples == [f"{dataset.records[1].where}: {dataset.records[1].image}"]
    Path(dataset.records[2].image).unlink()
    # With several workers the one that comes back to the first bad item may be the one to find that there are two.
    with pytest.raises(VolumeError, match=r"row train\[[12]\]: .*1 bad samples allowed") as caught:
        read()
    traceback.clear_frames(caught.tb)  # else the loader goes with a cycle of references, and its processes hang a while


def test_prompts_and_sentences_change_with_the_epoch_and_repeat_with_the_seed(root):
    records = captions(root, "validation") * 10

    def draws(seed, epoch):
        dataset = CaptionDataset(records, golden_processor(), 128, seed=seed)
        dataset.set_epoch(epoch)
        return [dataset.question(i)["question"] for i in range(len(dataset))]

    assert draws(0, 0) == draws(0, 0)
    assert draws(0, 0) != draws(0, 1) and draws(0, 0) != draws(1, 0)
    assert len(set(draws(0, 0))) > 5


def test_augmentation_only_where_asked(tiny):
    plain, augmented = tiny_pairs(tiny), tiny_pairs(tiny, augmented=True)
    assert "image_seed" not in plain[0]

    def seeds(epoch):
        augmented.set_epoch(epoch)
        return [augmented[i]["image_seed"] for i in range(len(augmented))]

    assert seeds(0) == seeds(0) != seeds(1) and len(set(seeds(0))) == len(augmented)
    assert seeds(0) == [seed for batch in loaded(augmented, workers=2) for seed in batch["image_seeds"]]


def loaded(dataset, workers):
    return DataLoader(dataset, 2, collate_fn=partial(collate_pairs, tokenizer=dataset.tokenizer), num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_handed_on_as_bytes_with_and_without_the_cache(tiny, workers):
    """What a batch holds becomes, converted, what the model is shown at inference: to the bit."""
    plain = tiny_pairs(tiny)
    cached = tiny_pairs(tiny, images=build_cache(tiny / "cache", plain.records, CONFIG, quiet=True))
    expected = torch.stack([preprocess(load_volume(record.image), CONFIG) for record in plain.records])
    for dataset in (plain, cached):
        images = torch.cat([batch["images"] for batch in loaded(dataset, workers)])
        assert images.dtype == torch.uint8 and torch.equal(to_unit(images), expected)


def test_a_batch_of_bytes_and_floats_is_floats(tiny):
    dataset = tiny_pairs(tiny)
    volume = load_volume(dataset.records[1].image).array
    write_prepared(dataset.records[1].image, volume, "float32")
    items = [dataset[0], dataset[1]]
    assert [item["image"].dtype for item in items] == [torch.uint8, torch.float32]
    images = collate_pairs(items, dataset.tokenizer)["images"]
    assert images.dtype == torch.float32 and torch.equal(images[1, 0], torch.from_numpy(volume))
    assert torch.equal(images[:1], to_unit(items[0]["image"][None]))


def test_shortened_report_keeps_whole_sentences():
    tokenizer = clip_tokenizer()
    text = "The liver is normal. No free fluid. No free fluid. The spleen is normal. Small hiatal hernia"
    sentences = text.split(".")
    assert shorten_report(text, tokenizer, 1000) == text
    short = {shorten_report(text, tokenizer, 20, random.Random(seed)) for seed in range(20)}
    assert len(short) > 1
    for result in short:
        parts = result.split(".")
        assert parts[0] == sentences[0] and set(parts) <= set(sentences) and len(parts) == len(set(parts))
        assert sum(len(tokenizer(part)["input_ids"]) for part in parts[1:]) <= 20
    assert shorten_report(text, tokenizer, 20) == shorten_report(text, tokenizer, 20)


def grouped(root, processor, length=128, **options):
    table = questions(root, "train")[:3]
    caption = CaptionDataset(captions(root, "train")[:1], processor, length)
    kinds = [VQADataset(table, processor, length, kind) for kind in ("closed", "open")]
    return GroupedQADataset([caption, *kinds], length, **options)


def test_grouped_questions_share_one_image(root):
    processor = golden_processor()
    dataset = grouped(root, processor)
    # the train images: case 0 (report and plane question, closed and open), case 2, case 3
    assert [len(group) for group in dataset.groups] == [3, 2, 2]
    item = dataset[0]
    assert (item["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens
    assert (item["input_ids"][: processor.num_image_tokens] == processor.image_token_id).all()
    labelled = processor.tokenizer.decode(item["input_ids"][item["labels"] != -100])
    answers = item["answer"].split("\n")
    assert sorted(answers) == ["A. Axial", "Axial", "The liver is normal. No focal lesion is seen."]
    assert labelled == "".join(f" {answer}<|im_end|>" for answer in answers)
    assert torch.equal(item["image"], dataset.load_image(0))


def test_grouped_questions_limit_order_and_epochs(root):
    dataset = grouped(root, golden_processor(), questions_per_image=2)
    seen = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        first, again = dataset[0], dataset[0]
        assert torch.equal(first["input_ids"], again["input_ids"])
        assert len(first["answer"].split("\n")) == 2
        seen.add(first["answer"])
    assert len(seen) > 2


def test_grouped_question_that_does_not_fit_is_named(root):
    dataset = grouped(root, golden_processor(), length=12)
    with pytest.raises(SampleError, match=r"row train\[0\]: the question has .* in a sequence of 12"):
        dataset[0]


@pytest.mark.parametrize("part", ["question", "answer"])
def test_a_text_with_the_image_token_is_named(root, part):
    """Also where its question is asked among others about the image: the row is that of the text."""
    processor, table = golden_processor(), questions(root, "train")[:3]
    row = replace(table[0], **{part: "Which <im_patch> is shown?"})
    dataset = VQADataset([row], processor, 128, "open")
    message = rf"{re.escape(row.where)}: its {part} holds <im_patch>, which stands for the scan: remove it"
    with pytest.raises(SampleError, match=message):
        dataset[0]
    reports = CaptionDataset(captions(root, "train")[:1], processor, 128)
    assert reports.records[0].image == row.image
    with pytest.raises(SampleError, match=message):
        GroupedQADataset([reports, dataset], 128)[0]


def test_a_missing_report_has_length_0_where_bad_samples_are_allowed(tiny):
    records = read_caption_manifest(tiny / IMAGES / "M3D_Cap.json", tiny, "train")
    Path(records[1].text_path).unlink()
    lengths = CaptionDataset(records, golden_processor(), 128, max_bad_samples=1).lengths
    assert lengths[1] == 0 and min(lengths[0], *lengths[2:]) > 0
    with pytest.raises(FileNotFoundError, match="000001/text.txt"):
        _ = CaptionDataset(records, golden_processor(), 128).lengths


def test_lengths_order_texts_without_reading_images(root):
    dataset = golden_dataset("CapDataset/validation", root, golden_processor())
    assert dataset.lengths[0] < dataset.lengths[1]
    table = golden_dataset("VQADataset/close_ended=True", root, golden_processor())
    assert max(range(4), key=table.lengths.__getitem__) == 3
