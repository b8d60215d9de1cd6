"""freeze(stage) says what trains, as the published stages; what is frozen doesn't change."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from med3dvlm.model.vlm import VLMForCausalLM, lora_target_modules
from tests.helpers.golden import GOLDEN_DIR
from tests.helpers.tiny_model import tiny_vlm_config

PUBLISHED = json.loads((GOLDEN_DIR / "lora" / "training_state.json").read_text())
# The recorded model: two blocks, hidden 64, the published encoder and mixer. Only names are compared, so no weights.
RECORDED = {
    "vision_variant": "small",
    "input_size": [256, 256, 128],
    "hidden_size": 64,
    "low_input_size": [256, 384],
    "high_input_size": [32, 768],
    "low_output_size": [192, 128],
    "high_output_size": [64, 128],
    "intermediate_size": 128,
    "vocab_size": 421,
}


def recorded_model():
    with torch.device("meta"):
        return VLMForCausalLM(tiny_vlm_config(**RECORDED))


def adapted(model):
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=lora_target_modules(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def names(model, trainable):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad == trainable)


def test_adapters_go_where_the_published_ones_are():
    assert lora_target_modules(recorded_model()) == sorted(PUBLISHED["lora"]["target_modules"])


def test_projector_stage_trains_what_the_published_one_does():
    model = recorded_model()
    counts = model.freeze("projector")
    assert names(model, True) == sorted(PUBLISHED["pretrain_stage"]["trainable"])
    assert names(model, False) == sorted(PUBLISHED["pretrain_stage"]["frozen"])
    assert sum(trains for trains, _ in counts.values()) == PUBLISHED["pretrain_stage"]["trainable_elements"]


def test_lora_stage_trains_what_the_published_one_does():
    with torch.device("meta"):
        model = adapted(VLMForCausalLM(tiny_vlm_config(**RECORDED)))
    counts = model.get_base_model().freeze("lora")
    assert names(model, True) == sorted(PUBLISHED["finetune_stage"]["trainable"])
    assert names(model, False) == sorted(PUBLISHED["finetune_stage"]["frozen"])
    assert sum(trains for trains, _ in counts.values()) == PUBLISHED["finetune_stage"]["trainable_elements"]


def test_counts_are_logged_by_part(caplog):
    model = VLMForCausalLM(tiny_vlm_config(tie_word_embeddings=True))
    with caplog.at_level(logging.INFO, logger="med3dvlm.model.vlm"):
        counts = model.freeze("projector")
    encoder = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    assert counts["image encoder"] == (0, encoder)
    assert counts["lm_head"] == (0, 0), "a tied tensor counts once, as embeddings"
    assert f"stage projector: image encoder: 0 parameters train, {encoder} are frozen" in caplog.text
    assert sum(map(sum, counts.values())) == sum(parameter.numel() for parameter in model.parameters())


def test_unknown_stages_are_an_error():
    with pytest.raises(ValueError, match="unknown stage 'warmup'; known: projector, lora, all"):
        VLMForCausalLM(tiny_vlm_config()).freeze("warmup")


def train_a_step(model, vlm):
    """One optimiser step on random images and tokens, as a trainer takes it."""
    torch.manual_seed(1)
    ids = torch.randint(5, 400, (2, 16))
    ids[:, : vlm.num_image_tokens] = vlm.config.image_token_id
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model.train()
    model(input_ids=ids, images=torch.rand(2, 1, 32, 64, 64), labels=ids).loss.backward()
    optimizer.step()


def copied(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_projector_step_changes_projector_and_embeddings_only(tied):
    model = VLMForCausalLM(tiny_vlm_config(tie_word_embeddings=tied))
    model.freeze("projector")
    before = copied(model)
    train_a_step(model, model)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    allowed = {key for key in before if key.startswith("model.mm_projector.")} | {"model.embed_tokens.weight"}
    assert changed <= allowed | ({"lm_head.weight"} if tied else set())
    assert {"model.embed_tokens.weight", "model.mm_projector.low_mixer.0.ln1.weight"} <= changed
    frozen = (model.model.vision_tower, model.model.layers, model.model.norm)
    assert not any(module.training for part in frozen for module in part.modules())
    assert model.model.mm_projector.training and model.training
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_lora_step_changes_everything_but_the_base_weights(tied):
    vlm = VLMForCausalLM(tiny_vlm_config(tie_word_embeddings=tied))
    model = adapted(vlm)
    vlm.freeze("lora")
    before = copied(vlm)
    train_a_step(model, vlm)
    unchanged = {key for key, tensor in vlm.state_dict().items() if torch.equal(tensor, before[key])}
    base = {key for key in before if ".layers." in key and "lora_" not in key} | {"model.norm.weight"}
    assert base <= unchanged
    assert {"lm_head.weight", "model.embed_tokens.weight"} & unchanged == set()
    assert any("running_mean" in key for key in set(before) - unchanged), "batch norm of a trained encoder updates"
    assert vlm.model.vision_tower.training and (vlm.lm_head.weight is vlm.model.embed_tokens.weight) == tied


def test_frozen_blocks_still_checkpoint_their_activations():
    model = VLMForCausalLM(tiny_vlm_config())
    model.freeze("projector")
    model.gradient_checkpointing_enable()
    model.train()
    assert all(layer.training for layer in model.model.layers)
    assert not any(module.training for layer in model.model.layers for module in layer.children())
