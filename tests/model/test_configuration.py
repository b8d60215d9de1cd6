"""The configurations read published config.json files and write them back."""

import json
import math

import pytest
from transformers import AutoConfig, Qwen2Config

from med3dvlm import CLIPConfig, VLMConfig
from tests.helpers.golden import GOLDEN_DIR


def published(name):
    return json.loads((GOLDEN_DIR / "layout" / f"{name}.json").read_text())


def saved(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_the_published_language_model_config_round_trips(tmp_path):
    values = published("med3dvlm_qwen2_5_7b_config")
    config = VLMConfig.from_dict(dict(values))
    assert config.rope_parameters["rope_theta"] == 1e6
    assert (config.image_splice, config.image_token_id) == ("published", 151665)
    written = saved(config, tmp_path)
    values.pop("transformers_version")
    assert {key: written.get(key) for key in values} == values
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_the_published_contrastive_config_round_trips(tmp_path):
    values = published("dcformer_siglip_config")["model_save"]
    config = CLIPConfig.from_dict(dict(values))
    assert config.text_config is None and config.text_encoder_config.vocab_size == 119547
    written = saved(config, tmp_path)
    values.pop("transformers_version")
    assert {key: written.get(key) for key in values} == values
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CLIPConfig)


def test_scaled_rotary_embeddings_survive_a_round_trip(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = VLMConfig(rope_theta=1e6, rope_scaling=dict(scaling))
    written = saved(config, tmp_path)
    assert written["rope_theta"] == 1e6 and written["rope_scaling"] == scaling
    assert VLMConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_absent_keys_mean_what_transformers_and_the_siglip_paper_say():
    assert VLMConfig().rope_parameters == Qwen2Config().rope_parameters
    assert VLMConfig(vocab_size=300).image_token_id == 299
    assert VLMConfig(mm_projector_type="low_high_mlp").low_input_size == 384
    assert (CLIPConfig().t_prime, CLIPConfig().bias) == (math.log(10), -10.0)


def test_a_text_config_is_kept_with_its_type(tmp_path):
    config = CLIPConfig(text_config={"model_type": "distilbert", "dim": 32, "n_heads": 2})
    config.save_pretrained(tmp_path)
    loaded = CLIPConfig.from_pretrained(tmp_path).text_config
    assert (loaded.model_type, loaded.dim, loaded.n_heads) == ("distilbert", 32, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VLMConfig(image_splice="middle"), "image_splice must be one of published, placeholder, got 'middle'"),
        (lambda: CLIPConfig(loss_type="triplet"), "loss_type must be 'sigmoid' or 'nce', got 'triplet'"),
        (lambda: CLIPConfig(text_config={"dim": 32}), "text_config needs the 'model_type'"),
    ],
)
def test_unknown_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
