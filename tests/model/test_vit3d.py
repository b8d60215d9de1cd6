"""The ViT-3D baseline has the published names and token order, and a sound feed-forward part."""

import pytest
import torch

from med3dvlm.model.vit3d import ViT3D
from tests.helpers.golden import fill_by_rule, layout_of, load_golden, relative_deviation, rule_volume

PUBLISHED_MLP_DIM = 4  # a slip of the published code, needed only to compare with it


def test_layout_is_the_published_one():
    record, _ = load_golden("layout/vit3d_dim768_depth12_256x256x128")
    with torch.device("meta"):
        encoder = ViT3D(
            (256, 256, 128), (record["patch_size"],) * 3, record["dim"], record["depth"], mlp_dim=PUBLISHED_MLP_DIM
        )
    assert list(layout_of(encoder).items()) == list(record["state_dict"].items())


def test_output_equals_the_published_one():
    record, tensors = load_golden("vit3d/vit3d_a")
    encoder = ViT3D(
        record["constructor_input_size"],
        (record["patch_size"],) * 3,
        record["dim"],
        record["depth"],
        mlp_dim=PUBLISHED_MLP_DIM,
    )
    fill_by_rule(encoder, record["salt"]).eval()
    with torch.inference_mode():
        hidden_states = encoder(rule_volume(record["input_tag"], record["input_shape"]))
    assert relative_deviation(hidden_states[-1], tensors["output"]) <= 5e-6


def test_token_order_is_depth_first_at_every_level():
    encoder = ViT3D((8, 16, 24), (8, 8, 8), dim=8, depth=1)
    torch.nn.init.zeros_(encoder.encoder.pos_embedding)
    volume = torch.rand(1, 1, 24, 8, 16)  # D', H', W' = 3, 1, 2
    changed = volume.clone()
    changed[..., 16:24, 0:8, 8:16] += torch.rand(8, 8, 8)  # the last patch along D and W
    difference = (encoder(volume)[0] - encoder(changed)[0]).abs().sum(-1)
    assert encoder.token_grid(0) == (3, 1, 2)
    assert difference.nonzero().tolist() == [[0, 5]]


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    encoder = ViT3D((32, 32, 16), (16, 16, 16), dim=12, depth=2, heads=2)
    hidden_states = encoder(torch.rand(2, 1, 16, 32, 32))
    assert [tuple(state.shape) for state in hidden_states] == [(2, encoder.num_tokens(-1), 12)] * 3
    assert encoder.encoder.transformer.layers[0][1].net[1].out_features == 48
    hidden_states[-1].square().mean().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match=r"patch_size \(16, 16, 16\) does not divide input_size \(64, 64, 40\)"):
        ViT3D((64, 64, 40), (16, 16, 16), dim=8, depth=1)
    encoder = ViT3D((32, 32, 16), (16, 16, 16), dim=8, depth=1)
    with pytest.raises(ValueError, match=r"expected volumes \[B, 1, 16, 32, 32\], found shape \(1, 1, 32, 32, 16\)"):
        encoder(torch.rand(1, 1, 32, 32, 16))
