"""When the Triton path of the encoder takes a call; these tests need no Triton."""

import subprocess
import sys
from types import ModuleType

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
    monkeypatch.setattr(triton_choice, "failure", lambda device: "")


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


def cannot(error):
    def try_out(device):
        raise error

    return try_out


@pytest.mark.parametrize(
    "error, said",
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC.\nmore"),
            "RuntimeError: Failed to find C compiler",
        ),
        (subprocess.CalledProcessError(1, ["gcc"]), "CalledProcessError: Command '['gcc']' returned non-zero"),
        (ImportError("libtriton.so: undefined symbol"), "ImportError: libtriton.so"),
    ],
    ids=["no compiler", "no headers", "broken"],
)
def test_a_triton_that_cannot_run_is_refused(error, said, monkeypatch):
    """Installed is not enough: it compiles C at the first launch. A training must not end there."""
    tuning = ModuleType("triton_tuning")
    tuning.try_out = cannot(error)
    monkeypatch.setitem(sys.modules, "med3dvlm.model.fused.triton_tuning", tuning)
    monkeypatch.setattr("med3dvlm.model.fused.triton_tuning", tuning, raising=False)
    triton_choice.failure.cache_clear()
    reason = triton_choice.failure(torch.device("cpu"))
    triton_choice.failure.cache_clear()
    assert said in reason and "\n" not in reason


def test_other_errors_are_not_taken_for_a_missing_tool(monkeypatch):
    tuning = ModuleType("triton_tuning")
    tuning.try_out = cannot(TypeError("a mistake of ours"))
    monkeypatch.setitem(sys.modules, "med3dvlm.model.fused.triton_tuning", tuning)
    monkeypatch.setattr("med3dvlm.model.fused.triton_tuning", tuning, raising=False)
    triton_choice.failure.cache_clear()
    with pytest.raises(TypeError):
        triton_choice.failure(torch.device("cpu"))
