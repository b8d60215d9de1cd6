"""Whether a GPU's path takes a call; importable where Triton is not installed.

`triton_encoder.FoldedEncoder` is the path for inference, `triton_encoder.encode` that for training.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from subprocess import SubprocessError

import torch
from torch import Tensor, nn

CAPABILITY = (8, 0)  # the first GPUs whose tensor cores take bfloat16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(encoder: nn.Module, volume: Tensor, dtype: torch.dtype) -> str:
    """Why the Triton path does not take this volume [B, 1, D, H, W] on a GPU; empty if it does."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"no Triton kernels for {dtype}"
    if torch.cuda.get_device_capability(volume.device) < CAPABILITY:
        return "the GPU is older than compute capability {}.{}".format(*CAPABILITY)
    return oversize(encoder, volume) or failure(volume.device)


def oversize(encoder: nn.Module, volume: Tensor) -> str:
    """Whether one sample is beyond the kernels' 32-bit addresses; no tensor has more positions than the stem's grid."""
    positions = 1
    for size in volume.shape[2:]:
        positions *= (size - 1) // 4 + 1
    return f"volumes of {tuple(volume.shape[2:])} are too large" if positions * max(encoder.channels) >= 2**31 else ""


@functools.cache
def failure(device: torch.device) -> str:
    """Why no kernel runs on this GPU, found by running one; empty if it does.

    Triton may be there and useless: it needs a C compiler and Python's headers, and a version that knows the GPU.
    """
    try:
        from med3dvlm.model.fused import triton_tuning

        triton_tuning.try_out(device)
    except (ImportError, OSError, RuntimeError, SubprocessError) as error:
        return f"Triton does not work here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return ""
