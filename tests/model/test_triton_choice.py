"""When the Triton path of the encoder takes a call; these tests need no Triton."""

import pytest
import torch

from med3dvlm.model.dcformer import DCFormer
from med3dvlm.model.fused import triton_choice


@pytest.fixture(scope="module")
def encoder():
    return DCFormer.from_variant("phantom")


@pytest.fixture
def triton_on_a_recent_gpu(monkeypatch):
    monkeypatch.setattr(triton_choice, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_nothing_is_refused_without_a_reason(encoder, triton_on_a_recent_gpu):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert triton_choice.refusal(encoder, torch.zeros(2, 1, 32, 64, 64), dtype) == ""


def test_refusals_say_why(encoder, triton_on_a_recent_gpu, monkeypatch):
    volume = torch.zeros(1, 1, 8, 8, 8)
    assert triton_choice.refusal(encoder, volume, torch.float64) == "no Triton kernels for torch.float64"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "older than compute capability 8.0" in triton_choice.refusal(encoder, volume, torch.bfloat16)
    monkeypatch.setattr(triton_choice, "find_spec", lambda name: None)
    assert triton_choice.refusal(encoder, volume, torch.bfloat16) == "Triton is not installed"


def test_a_sample_beyond_32_bit_addresses_is_refused(encoder, triton_on_a_recent_gpu):
    assert max(encoder.channels) == 128
    fits = torch.zeros(1).expand(64, 1, 1024, 1024, 1020)  # 256 * 256 * 255 positions of 128 channels
    beyond = torch.zeros(1).expand(1, 1, 1024, 1024, 1024)
    assert triton_choice.refusal(encoder, fits, torch.bfloat16) == ""
    assert "(1024, 1024, 1024) are too large" in triton_choice.refusal(encoder, beyond, torch.bfloat16)
