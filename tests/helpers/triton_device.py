"""Where Triton's kernels run in tests. Importing this skips a test file where Triton is not installed."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs these tests on a CPU)")

if DEVICE == "cpu" and isinstance(triton.language.cdiv, triton.JITFunction):
    raise RuntimeError("Triton was imported before TRITON_INTERPRET=1 was set, and cannot interpret any more")

# Products of the GPU's float64 tensor cores are not what these kernels are for.
EXACT, TOLERANCE = (torch.float64, 1e-10) if DEVICE == "cpu" else (torch.float32, 1e-4)


def assert_close(found, expected, tolerance=TOLERANCE):
    """Relative distance of each tensor from what is expected, in the L2 norm."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other.double()).norm() <= tolerance * (other.double().norm() + 1e-6)
