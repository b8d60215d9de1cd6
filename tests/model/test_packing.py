"""Questions packed into one sequence give the logits, loss and gradients of separate sequences."""

import pytest
import torch

from med3dvlm.data.collate import collate_vlm
from med3dvlm.model.packing import packed_attention_mask
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.processing import VLMProcessor
from tests.helpers.tiny_data import vlm_tokenizer
from tests.helpers.tiny_model import tiny_vlm_config

# Turns about the images of a batch: prompt (the first with the image tokens) and answer, of all lengths.
TURNS = [
    [("Which plane is shown? Choices: A. axial B. coronal", "B. coronal"), ("Where?", "left liver"), ("Why?", "No.")],
    [("Is there a cyst?", "Yes")],
    [("What kind of lesion is present in this scan?", "an abscess"), ("Which organ?", "the right kidney")],
]


@pytest.fixture(scope="module")
def model():
    """The tiny model in float64, so that only what is really another computation differs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = tiny_vlm_config("mixer", initializer_range=0.3)
        return VLMForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def processor(model):
    return VLMProcessor(vlm_tokenizer(), model.num_image_tokens, None)


@pytest.fixture(scope="module")
def images():
    return torch.rand(len(TURNS), 1, 32, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def packed_batch(processor, side="right"):
    items = []
    for turns in TURNS:
        prompts = [(processor.turn if number else processor.prompt)(q) for number, (q, _) in enumerate(turns)]
        items.append(processor.encode_turns([(p, a) for p, (_, a) in zip(prompts, turns, strict=True)], 512))
    return collate_vlm(items, processor.tokenizer.pad_token_id, side)


def separate(processor, question, answer):
    """One turn as a batch of its own, attended from end to end."""
    item = processor.encode(processor.prompt(question), answer, 512)
    return {"input_ids": item["input_ids"][None], "labels": item["labels"][None]}


def separate_loss(model, processor, images):
    """The mean over all labelled tokens of all turns, each in a sequence of its own."""
    total, count = 0, 0
    for row, turns in enumerate(TURNS):
        for question, answer in turns:
            batch = separate(processor, question, answer)
            tokens = (batch["labels"] != -100).sum()
            total = total + model(**batch, images=images[row : row + 1]).loss * tokens
            count += tokens
    return total / count


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_separate_sequences(model, processor, images, side):
    batch = packed_batch(processor, side)
    with torch.no_grad():
        logits = model(**batch, images=images).logits
        for row, turns in enumerate(TURNS):
            for number, (question, answer) in enumerate(turns, 1):
                alone = model(**separate(processor, question, answer), images=images[row : row + 1]).logits[0]
                mine = batch["turn_ids"][row] == number
                expected = alone[processor.num_image_tokens :]
                assert torch.equal(batch["input_ids"][row][mine],
                                   separate(processor, question, answer)["input_ids"][0, -len(expected) :])  # fmt: skip
                torch.testing.assert_close(logits[row][mine], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_gradients_are_those_of_separate_sequences(model, processor, images, side):
    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    packed, alone = model(**packed_batch(processor, side), images=images).loss, separate_loss(model, processor, images)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)  # transformers takes the loss in float32
    found, expected = gradients(packed), gradients(alone)
    assert any("vision_tower" in name and gradient.abs().max() > 1e-3 for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_turns_do_not_see_each_other(model, processor, images):
    """Another first question changes nothing for the second."""
    batch = packed_batch(processor)
    changed = {key: tensor.clone() for key, tensor in batch.items()}
    first, second = (batch["turn_ids"][0] == number for number in (1, 2))
    changed["input_ids"][0][first] = 17
    with torch.no_grad():
        before, after = (model(**b, images=images).logits[0] for b in (batch, changed))
    assert torch.equal(before[second], after[second]) and not torch.equal(before[first], after[first])


def test_all_turns_see_the_image(model, processor, images):
    batch = packed_batch(processor)
    with torch.no_grad():
        before = model(**batch, images=images).logits[0]
        after = model(**batch, images=images.flip(0)).logits[0]
    for number in (1, 2, 3):
        turn = batch["turn_ids"][0] == number
        assert (before[turn] - after[turn]).abs().max() > 1e-6


def test_the_mask_shows_what_is_shared_and_what_is_ones_own():
    turn_ids = torch.tensor([[0, 0, 1, 1, 2, -1, -1]])
    seen = packed_attention_mask(turn_ids, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mask_is_finite_in_every_dtype(dtype):
    mask = packed_attention_mask(torch.tensor([[-1, 0, 1, 2, -1]]), dtype)
    assert mask.shape == (1, 1, 5, 5) and mask.dtype == dtype and torch.isfinite(mask).all()
    assert (mask == 0).any(dim=-1).all(), "a row that sees nothing would become NaN"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(processor, images, dtype):
    small = VLMForCausalLM(tiny_vlm_config("mixer")).to(dtype).eval()
    with torch.no_grad():
        output = small(**packed_batch(processor, "left"), images=images.to(dtype))
    assert torch.isfinite(output.loss) and torch.isfinite(output.logits).all()


def test_labels_are_answers_and_end_tokens_only(processor):
    batch = packed_batch(processor)
    for row, turns in enumerate(TURNS):
        text = processor.tokenizer.decode(batch["labels"][row][batch["labels"][row] != -100])
        assert text == "".join(f" {answer}<|im_end|>" for _, answer in turns)


def test_turns_that_do_not_fit_are_left_out_as_a_whole(processor):
    turns = [(processor.prompt("Where?"), "left"), (processor.turn("Which organ is it?"), "liver"),
             (processor.turn("Why?"), "No")]  # fmt: skip
    sizes = [len(processor.encode_turns(turns[:1], 512)["input_ids"])]
    sizes += [len(processor.encode_turns([turns[0], turn], 512)["input_ids"]) - sizes[0] for turn in turns[1:]]
    assert sizes[2] < sizes[1]
    item = processor.encode_turns(turns, sizes[0] + sizes[2])
    assert len(item["input_ids"]) == sizes[0] + sizes[2] and item["turn_ids"].max() == 2
    text = processor.tokenizer.decode(item["input_ids"])
    assert "Why?" in text and "organ" not in text
