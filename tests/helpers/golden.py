"""Weights, inputs and comparisons of the recorded golden data.

The records hold numbers of the published implementation (github.com/mirthAI/Med3DVLM, commit cbbd6335, float32 on CPU).
Weights and inputs are not stored: both follow the fixed pseudo-random rule below (NumPy's legacy generator gives the
same bits in every version), so only the expected outputs lie in tests/golden.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

GOLDEN_DIR = Path(__file__).parent.parent / "golden"


def rule_uniform(tag: str, shape) -> np.ndarray:
    """float64 values in [0, 1) that depend on the tag only, C order."""
    seed = zlib.crc32(tag.encode("utf-8"))
    count = int(np.prod(shape, dtype=np.int64)) if len(shape) else 1
    return np.random.RandomState(seed).random_sample(count).reshape(shape)


def rule_tensor(salt: str, key: str, shape) -> torch.Tensor:
    """The recorded value of the state-dict entry `key`: float32, scaled by the kind of parameter; counters are 0."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    u = rule_uniform(salt + "|" + key, shape)
    if len(shape) == 0:
        value = {"t_prime": 1.5 + u, "bias": -1.0 - u, "logit_scale": 2.0 + u}[leaf]
    elif leaf == "running_var":
        value = 0.5 + u
    elif leaf == "running_mean":
        value = 0.4 * (u - 0.5)
    elif leaf == "scale":
        value = 0.2 + 0.6 * u
    elif leaf in ("pos_embedding", "cls_token"):
        value = u - 0.5
    elif len(shape) == 1 and leaf == "weight":
        value = 0.5 + u
    elif len(shape) == 1:
        value = 0.4 * (u - 0.5)
    else:
        fan_in = int(np.prod(shape[1:], dtype=np.int64))
        value = (2.0 * u - 1.0) * math.sqrt(3.0 / fan_in)
    return torch.from_numpy(np.asarray(value, dtype=np.float64).astype(np.float32))


def rule_volume(tag: str, shape) -> torch.Tensor:
    """Images [B, 1, D, H, W] float32 in about [-0.2, 1.5): noise, slopes that differ per axis, and one bright box."""
    _, _, depth, height, width = shape
    u = rule_uniform(tag, shape)
    d = (np.arange(depth) / depth).reshape(1, depth, 1, 1)
    h = ((np.arange(height) / height) ** 2).reshape(1, 1, height, 1)
    w = (np.arange(width) / width).reshape(1, 1, 1, width)
    slopes = [(0.3, 0.15, 0.05), (0.0, 0.4, 0.1), (0.1, 0.0, 0.5), (-0.2, 0.3, 0.2)]
    volume = np.empty(shape, dtype=np.float64)
    for b in range(shape[0]):
        slope_d, slope_h, slope_w = slopes[b % 4]
        volume[b] = 0.5 / (1 + b) * u[b] + slope_d * d + slope_h * h + slope_w * w
        volume[
            b, :, depth // 8 : depth // 4 + 2 * b, height // 2 : 3 * height // 4, width // 16 + 3 * b : width // 3
        ] += 0.4
    return torch.from_numpy(volume.astype(np.float32))


def rule_normal_like(tag: str, shape) -> torch.Tensor:
    """Projector inputs and cotangents: float32, uniform with mean 0 and variance 1."""
    return torch.from_numpy((2 * (rule_uniform(tag, shape) - 0.5) * 1.7320508).astype(np.float32))


def fill_by_rule(module: nn.Module, salt: str) -> nn.Module:
    """Replace every entry of the module's state dict, buffers included, by its rule value; returns the module."""
    state = module.state_dict()
    module.load_state_dict(
        {key: rule_tensor(salt, key, tensor.shape).to(tensor.dtype) for key, tensor in state.items()}
    )
    return module


def load_golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(record, tensors) of tests/golden/<name>.json and <name>.safetensors; a missing one of the two is empty."""
    record_file, tensor_file = GOLDEN_DIR / f"{name}.json", GOLDEN_DIR / f"{name}.safetensors"
    if not record_file.exists() and not tensor_file.exists():
        raise FileNotFoundError(f"no golden record {name!r} in {GOLDEN_DIR}")
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    tensors = load_file(tensor_file) if tensor_file.exists() else {}
    return record, tensors


def relative_deviation(tensor: torch.Tensor, expected: torch.Tensor | dict) -> float:
    """Largest absolute difference over the largest absolute expected value.

    `expected` is a whole tensor, or a recorded summary: shape, mean, std, l2, min, max, the first and last 64 elements
    of the C-order flattening (`first64`, `last64`) and 256 elements at regular distances (`strided256`).
    """
    if isinstance(expected, torch.Tensor):
        assert tensor.shape == expected.shape
        return ((tensor - expected).abs().max() / expected.abs().max()).item()
    assert list(tensor.shape) == expected["shape"]
    flat = tensor.detach().double().flatten()
    strided = flat[torch.arange(256) * len(flat) // 256]
    found = [flat[:64], flat[-64:], strided, torch.stack([flat.mean(), flat.std(correction=0), flat.min(), flat.max()])]
    wanted = [expected["first64"], expected["last64"], expected["strided256"]]
    wanted.append([expected[key] for key in ("mean", "std", "min", "max")])
    difference = torch.cat(found) - torch.tensor(sum(wanted, []), dtype=torch.float64)
    scale = max(abs(expected["min"]), abs(expected["max"]))
    return max(difference.abs().max().item() / scale, abs(flat.norm().item() - expected["l2"]) / expected["l2"])


def assert_gradient_norms(module: nn.Module, expected: dict[str, float], tolerance: float = 1e-4) -> None:
    """Every parameter has a gradient of the recorded norm.

    The tolerance is relative to the norm, or to a tenth of the largest norm where that is more: what is analytically
    zero (a bias before a normalisation) is recorded as rounding noise.
    """
    found = {key: parameter.grad.double().norm().item() for key, parameter in module.named_parameters()}
    assert found.keys() == expected.keys()
    floor = max(expected.values()) / 10
    wrong = {
        key: (found[key], norm)
        for key, norm in expected.items()
        if abs(found[key] - norm) > tolerance * max(norm, floor)
    }
    assert not wrong, f"gradient norms (found, expected): {wrong}"


def layout_of(module: nn.Module) -> dict[str, list]:
    """State-dict key -> [shape, dtype name], in order, as the recorded layouts have it."""
    return {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in module.state_dict().items()}
