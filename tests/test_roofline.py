"""The computed table of what the encoder moves and computes."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from med3dvlm.benchmark import roofline
from med3dvlm.model.dcformer import VARIANTS, Block, DCFormer


@pytest.mark.parametrize("name", VARIANTS)
def test_products_are_those_of_the_plain_layers(name):
    size = (33, 64, 70)
    with torch.device("meta"):
        encoder = DCFormer.from_variant(name)
        volume = torch.empty(2, 1, *size)
    point_wise = 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        states = encoder(volume)
    for layer, counted in counter.get_flop_counts().items():
        if layer.endswith(".mlp.mlp"):
            point_wise += sum(counted.values())
    for stage, state in enumerate(states[1:], start=1):
        block = encoder.encoder[f"s{stage}"][0]
        assert isinstance(block, Block) and isinstance(block.mlp.mlp[0], nn.Linear)
        point_wise += 2 * state[..., 0].numel() * block.proj.weight.numel()
    parts = roofline.inference(VARIANTS[name], 2, size)
    found = sum(part.gigaflop for part in parts if part.name.startswith("stage")) * 1e9
    assert found == pytest.approx(point_wise)
    assert roofline.levels(VARIANTS[name], 2, size) == [state[..., 0].numel() for state in states]


def test_the_limit_that_is_met_first_counts():
    assert roofline.Part("", 2.0, 30.0).least_seconds(bandwidth=1.0, rate=10.0) == 3.0
    assert roofline.Part("", 4.0, 30.0).least_seconds(bandwidth=1.0, rate=10.0) == 4.0


def test_the_command_line(capsys):
    assert roofline.main(["--variant", "nano", "--batches", "1", "8", "--bandwidth", "3350", "--products", "989"]) == 0
    out = capsys.readouterr().out
    assert "computed" in out and out.count("| least time, all |") == 2
    assert "| stage 4, feed-forward |" in out and "batch 8: GB / GFLOP / least ms" in out
