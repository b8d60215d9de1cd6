"""The language model equals the published one, and handles padding, image tokens and tied embeddings."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer

from med3dvlm.configuration import VLMConfig
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.model.weights import resize_rows
from tests.helpers.golden import fill_by_rule, load_golden, rule_volume
from tests.helpers.tiny_data import vlm_tokenizer
from tests.helpers.tiny_model import TINY_PROJECTORS, tiny_vlm_config, write_tiny_language_model


@pytest.fixture(scope="module")
def golden():
    record, tensors = load_golden("vlm/vlm-a")
    model = fill_by_rule(VLMForCausalLM(VLMConfig(**record["config"])), record["salt"]).eval()
    images = rule_volume(record["image_rule_tag"], record["image_shape"])
    with torch.no_grad():
        features = model.encode_images(images)
    return record, tensors, model, images, features


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return VLMForCausalLM(tiny_vlm_config(initializer_range=0.3)).eval()


def assert_within(found, expected, tolerance=5e-6):
    deviation = (found - expected).abs().max() / expected.abs().max()
    assert deviation <= tolerance, f"deviates by {deviation:.2e} of the largest value"


# ---------------------------------------------------------------- equal to the published model


def test_features_and_splice_equal_the_published_model(golden):
    _, tensors, model, _, features = golden
    assert model.num_image_tokens == 12
    assert_within(features, tensors["image_features"])
    embeds = model.embed(tensors["input_ids"], tensors["attention_mask"], image_features=features)
    assert_within(embeds, tensors["inputs_embeds"])


def test_logits_loss_and_gradients_equal_the_published_model(golden):
    record, tensors, model, images, _ = golden
    batch = {key: tensors[key] for key in ("input_ids", "attention_mask", "labels")}
    output = model(**batch, images=images)
    attended = batch["attention_mask"].bool()
    # The language model amplifies rounding: with gradients both are 3.4e-6 from float64 on some processors.
    assert_within(output.logits[attended], tensors["logits"][attended], 1e-5)
    assert output.loss.item() == pytest.approx(record["loss"], rel=1e-5)
    output.loss.backward()
    expected = record["parameter_grad_norm"]
    found = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert found.keys() == expected.keys()
    floor = 1e-4 * max(expected.values())
    for name, norm in expected.items():  # in the encoder, processors decide near ties of max pooling differently
        relative = 1e-3 if "vision_tower" in name else 1e-4
        assert abs(found[name] - norm) <= max(relative * norm, floor), name


@torch.no_grad()
def test_text_only_equals_the_published_model(golden):
    record, tensors, model, _, _ = golden
    batch = {key: tensors[key] for key in ("input_ids", "attention_mask", "labels")}
    output = model(**batch)
    attended = batch["attention_mask"].bool()
    assert_within(output.logits[attended], tensors["text_only_logits"][attended])
    assert output.loss.item() == pytest.approx(record["text_only_loss"], rel=1e-5)
    generated = model.generate(input_ids=tensors["prompt_ids"], max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, tensors["text_only_generated"])


def test_greedy_tokens_equal_the_published_model(golden):
    record, tensors, model, images, features = golden
    prompt = {"input_ids": tensors["prompt_ids"], "max_new_tokens": 16, "do_sample": False}
    output = model.generate(**prompt, images=images, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(output.sequences, tensors["generated"])
    assert_within(torch.stack(output.logits, dim=1), tensors["generation_step_logits"])
    stop = {key: record["early_stop"][key] for key in ("eos_token_id", "pad_token_id")}
    stopped = model.generate(**prompt, **stop, image_features=features)
    assert torch.equal(stopped, tensors["generated_with_eos"])
    without_cache = model.generate(**prompt, image_features=features, use_cache=False)
    assert torch.equal(without_cache, tensors["generated"])


def test_the_published_placement_counts_from_the_first_attended_token(golden):
    _, tensors, model, _, features = golden
    prompt = tensors["prompt_ids"]
    padded = torch.nn.functional.pad(prompt, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (5, 0))
    answer = model.generate(
        input_ids=padded, attention_mask=mask, image_features=features, max_new_tokens=16, do_sample=False
    )
    assert torch.equal(answer, tensors["generated"])


def test_no_room_for_the_published_placement_is_named(golden):
    _, tensors, model, _, features = golden
    with pytest.raises(ValueError, match="row 0: expected room for 12 image tokens after the first token, found 9"):
        model(input_ids=tensors["prompt_ids"][:, :10], image_features=features)


# ---------------------------------------------------------------- placeholders, padding, generation


def prompts(model, lengths, seed=0):
    """Left-padded placeholder prompts: 2 text tokens, the image tokens, then as many text tokens as `lengths` says."""
    generator = torch.Generator().manual_seed(seed)
    count, image_id = model.num_image_tokens, model.config.image_token_id
    total = 2 + count + max(lengths)
    ids = torch.randint(5, 400, (len(lengths), total), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        start = max(lengths) - length
        ids[row, :start], mask[row, :start] = model.config.pad_token_id, 0
        ids[row, start + 2 : start + 2 + count] = image_id
    images = torch.rand(len(lengths), 1, 32, 64, 64, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "images": images}


def test_placeholders_are_replaced_in_order(tiny):
    batch = prompts(tiny, [4, 2])
    with torch.no_grad():
        features = tiny.encode_images(batch["images"])
        embeds = tiny.embed(**batch)
        plain = tiny.get_input_embeddings()(batch["input_ids"])
    is_image = batch["input_ids"] == tiny.config.image_token_id
    assert torch.equal(embeds[is_image].view_as(features), features)
    assert torch.equal(embeds[~is_image], plain[~is_image])


@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_image_tokens_is_an_error(tiny, change):
    batch = prompts(tiny, [4, 4])
    image_id, expected = tiny.config.image_token_id, tiny.num_image_tokens
    # Position 2 holds the first image token, position 0 a text token.
    batch["input_ids"][1, 2 if change < 0 else 0] = 7 if change < 0 else image_id
    with pytest.raises(ValueError, match=f"row 1: expected {expected} image tokens.*found {expected + change}"):
        tiny(**batch)


def test_text_and_images_of_different_batch_sizes_are_an_error(tiny):
    batch = prompts(tiny, [4, 4])
    with pytest.raises(ValueError, match="2 rows of text, but images for 1"):
        tiny(**{**batch, "images": batch["images"][:1]})


def test_batched_greedy_output_equals_that_of_single_items(tiny):
    batch = prompts(tiny, [1, 7, 4, 2, 9])
    together = tiny.generate(**batch, max_new_tokens=12, do_sample=False)
    assert len(set(together[:, 0].tolist())) > 1, "the rows should differ, or the test shows nothing"
    for row in range(len(together)):
        attended = batch["attention_mask"][row].bool()
        alone = tiny.generate(
            input_ids=batch["input_ids"][row : row + 1, attended],
            images=batch["images"][row : row + 1],
            max_new_tokens=12,
            do_sample=False,
        )
        length = alone.shape[1]
        assert torch.equal(alone[0], together[row, :length])


def test_image_features_can_be_reused(tiny):
    batch = prompts(tiny, [3, 3])
    images = batch.pop("images")
    with torch.no_grad():
        features = tiny.encode_images(images)
        assert torch.equal(tiny(**batch, images=images).logits, tiny(**batch, image_features=features).logits)


def test_generate_streams_the_new_tokens_only(tiny):
    tokenizer = vlm_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    answer = tiny.generate(**prompts(tiny, [3]), max_new_tokens=6, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(answer[0])


@pytest.mark.parametrize("projector", TINY_PROJECTORS)
def test_every_projector_works_in_the_language_model(projector):
    model = VLMForCausalLM(tiny_vlm_config(projector))
    batch = prompts(model, [3, 2])
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    assert model.encode_images(batch["images"]).shape == (2, model.num_image_tokens, model.config.hidden_size)
    # In placeholder mode no image token keeps its embedding, and layer scale leaves nothing without a gradient.
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("projector", "sizes", "message"),
    [
        ("mixer", {"high_input_size": [2, 256]}, r"high_input_size: expected \[1, 256\].*found \[2, 256\]"),
        ("mixer", {"input_size": [128, 128, 64]}, r"low_input_size: expected \[32, 128\].*found \[4, 128\]"),
        ("low_high_mlp", {"low_input_size": 64}, "low_input_size: expected 128.*found 64"),
        ("mlp", {"mm_hidden_size": 768}, "mm_hidden_size: expected 256.*found 768"),
    ],
)
def test_projector_sizes_that_do_not_fit_the_encoder_are_named(projector, sizes, message):
    with pytest.raises(ValueError, match=message):
        VLMForCausalLM(tiny_vlm_config(projector, **sizes))


# ---------------------------------------------------------------- from a plain language model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [430, 420])
def test_building_on_a_language_model_keeps_it_and_averages_the_new_row(tmp_path, tied, rows):
    write_tiny_language_model(tmp_path, tie_word_embeddings=tied)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    overrides = tiny_vlm_config(vocab_size=rows, image_token_id=rows - 1, tie_word_embeddings=tied).to_dict()
    model = VLMForCausalLM.from_language_model(tmp_path, overrides)
    assert model.config.image_splice == "placeholder" and model.config.proj_out_num == model.num_image_tokens
    kept = min(rows - 1, base.config.vocab_size)
    for found, old in ((model.get_input_embeddings(), base.get_input_embeddings()), (model.lm_head, base.lm_head)):
        assert torch.equal(found.weight[:kept], old.weight[:kept])
        torch.testing.assert_close(found.weight[-1], old.weight[:kept].mean(dim=0))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits[..., :kept], expected[..., :kept])
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_building_on_another_architecture_is_an_error(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a checkpoint of type qwen2, found gpt2"):
        VLMForCausalLM.from_language_model(tmp_path)


def test_a_row_in_the_middle_is_averaged_without_itself():
    weight = torch.arange(8.0).view(4, 2)
    resized = resize_rows(weight, 4, image_token_id=1)
    assert torch.equal(resized[1], weight[[0, 2, 3]].mean(dim=0))
    assert torch.equal(resized[[0, 2, 3]], weight[[0, 2, 3]])
