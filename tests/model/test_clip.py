"""The dual encoder has the published names and features, and every parameter takes part."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from med3dvlm.configuration import CLIPConfig
from med3dvlm.model.clip import CLIPModel
from tests.helpers.contrastive import recorded_clip_model
from tests.helpers.golden import assert_gradient_norms, layout_of, load_golden, relative_deviation, rule_volume

TINY_TEXT = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 16}
TINY = {"vision_variant": "nano", "input_size": (64, 64, 32), "hidden_size": 8}


def tiny_model(**overrides) -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(**{"text_config": {"model_type": "distilbert", **TINY_TEXT}, **TINY, **overrides}))


def test_layout_is_the_published_one():
    expected = load_golden("layout/dcformer_siglip")[0]["state_dict"]
    with torch.device("meta"):
        found = layout_of(CLIPModel(CLIPConfig()))
    assert found.pop("t_prime")[0] == expected.pop("t_prime")[0]  # published in float64 by accident
    assert found == expected


@pytest.mark.parametrize("name", ["clip-a", "clip-dist", pytest.param("clip-full", marks=pytest.mark.slow)])
def test_features_equal_the_published_ones(name):
    record, tensors = load_golden(f"clip/{name}")
    model = recorded_clip_model(record)
    with torch.inference_mode():
        image_features = model.encode_image(rule_volume(record["image_rule_tag"], record["image_shape"]))
        text_features = model.encode_text(tensors["input_ids"], tensors["attention_mask"])
    torch.testing.assert_close(image_features, tensors["image_features"], rtol=0, atol=1e-6)
    torch.testing.assert_close(text_features, tensors["text_features"], rtol=0, atol=1e-6)


def test_projections_equal_the_published_ones_before_normalisation():
    record, tensors = load_golden("clip/clip-a")
    model = recorded_clip_model(record)
    raw = {}
    model.mm_vision_proj.register_forward_hook(lambda _, __, output: raw.update(image=output))
    model.mm_language_proj.register_forward_hook(lambda _, __, output: raw.update(text=output))
    with torch.inference_mode():
        images = rule_volume(record["image_rule_tag"], record["image_shape"])
        model(images, tensors["input_ids"], tensors["attention_mask"])
    assert relative_deviation(raw["image"], tensors["raw_image_projection"]) <= 5e-6
    assert relative_deviation(raw["text"], tensors["raw_text_projection"]) <= 5e-6


def test_gradients_through_both_encoders_equal_the_published_ones():
    """The recorded gradients are those of the published loss (which is not ours), written out here."""
    record, tensors = load_golden("clip/clip-a")
    model = recorded_clip_model(record)
    images = rule_volume(record["image_rule_tag"], record["image_shape"])
    output = model(images, tensors["input_ids"], tensors["attention_mask"])
    logits = model.t_prime * output.image_features @ output.text_features.T + model.bias
    labels = 2 * torch.eye(len(logits)) - 1
    loss = -F.logsigmoid(labels * (logits + logits.T) / 2).sum()
    loss.backward()
    assert loss.item() == pytest.approx(record["published_sigmoid"]["loss"], rel=1e-5)
    assert_gradient_norms(model, record["published_sigmoid"]["grad_norm"])


@pytest.mark.parametrize("loss_type, scalars", [("sigmoid", {"t_prime", "bias"}), ("nce", {"logit_scale"})])
def test_forward_trains_every_parameter(loss_type, scalars):
    model = tiny_model(loss_type=loss_type)
    assert scalars == {key for key in model.state_dict() if "." not in key}
    ids = torch.randint(1, 50, (3, 6))
    output = model(torch.rand(3, 1, 32, 64, 64), ids, torch.ones_like(ids))
    assert output.logits.shape == (3, 3) and output.image_features.shape == output.text_features.shape == (3, 8)
    torch.testing.assert_close(output.image_features.norm(dim=-1), torch.ones(3))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model(torch.rand(3, 1, 32, 64, 64), ids, return_loss=False).loss is None


def test_padding_does_not_change_a_text_feature():
    model = tiny_model().eval()
    ids = torch.randint(1, 50, (1, 5))
    padded = F.pad(ids, (0, 4))
    mask = F.pad(torch.ones_like(ids), (0, 4))
    torch.testing.assert_close(model.encode_text(padded, mask), model.encode_text(ids, torch.ones_like(ids)))


def test_a_pretrained_text_encoder_keeps_its_weights_and_loses_its_pooler(tmp_path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text_encoder = BertModel(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))
    text_encoder.save_pretrained(tmp_path)
    model = CLIPModel.from_text_encoder(tmp_path, **TINY)
    assert model.config.text_config.model_type == "bert" and model.mm_language_proj.in_features == 12
    for key, tensor in model.language_encoder.state_dict().items():
        torch.testing.assert_close(tensor, text_encoder.state_dict()[key], rtol=0, atol=0)
    assert not any("pooler" in key for key in model.state_dict())
    assert CLIPModel(model.config).state_dict().keys() == model.state_dict().keys()
