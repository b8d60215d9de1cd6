"""From a file to image tokens, one CT of 512x512x300, step by step, on CPU: `sh scripts/benchmark.sh infer`.

The volume is drawn: an ellipse of tissue with noise, as int16 in a compressed NIfTI. Weights are random; the sizes of
encoder and projector are the published ones. The plain fp32 encoder is timed beside, as a measure for the other steps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import torch

from med3dvlm.benchmark.encoder import build, call, fused, plain
from med3dvlm.benchmark.timing import alternate, machine, table
from med3dvlm.configuration import VLMConfig
from med3dvlm.data.command import run_command
from med3dvlm.data.preprocess import preprocess
from med3dvlm.data.volume import VolumeError, load_volume
from med3dvlm.model.projector import build_projector


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--scan", type=Path, help="a file of your own instead of the drawn one")
    parser.add_argument("--slices", type=int, default=300, help="of the drawn volume (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions (default: %(default)s)")
    return parser.parse_args(argv)


def draw(path: Path, slices: int, width: int = 512) -> None:
    """Write a volume [width, width, slices] in HU: air, a body of soft tissue with noise, a spine."""
    rng = np.random.default_rng(0)
    across = np.linspace(-1, 1, width, dtype=np.float32)
    radius = np.hypot(across[:, None] / 0.8, across[None, :] / 0.6)  # [W, H]
    mean = np.where(radius < 1, 40.0, -1000.0)
    mean[np.hypot(across[:, None], across[None, :] + 0.35) < 0.1] = 700.0
    volume = np.empty((width, width, slices), dtype=np.int16)
    for k in range(slices):
        volume[..., k] = mean + 12 * rng.standard_normal((width, width), dtype=np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([0.8, 0.8, 1.0, 1.0])), path)


def steps(path: Path, repeats: int) -> dict[str, float]:
    """Median milliseconds of each step."""
    volume = load_volume(path)
    image = preprocess(volume)[None]  # [1, 1, 128, 256, 256]
    encoder = build("small", list(image.shape[2:])).eval()
    projector = build_projector(VLMConfig(hidden_size=3584)).eval()  # the width of Qwen2.5-7B
    with torch.inference_mode():
        states = encoder(image)
        times = alternate(
            {
                "read": lambda: load_volume(path),
                "preprocess": lambda: preprocess(volume),
                "encode, fp32": lambda: call(fused, encoder, image, False),
                "encode, bf16": lambda: call(fused, encoder, image, True),
                "project": lambda: projector(states[-2:]),
                "plain encoder, fp32": lambda: call(plain, encoder, image, False),
            },
            repeats=repeats,
        )
    return {name: 1e3 * time.median_wall for name, time in times.items()}


def report(path: Path, repeats: int) -> str:
    """The steps with their shares of the whole in fp32, and each against the plain encoder, as Markdown."""
    found, whole = steps(path, repeats), ("read", "preprocess", "encode, fp32", "project")
    found["whole, fp32"] = sum(found[name] for name in whole)
    rows = []
    for name, time in found.items():
        share = f"{100 * time / found['whole, fp32']:.0f}%" if name in whole else ""
        rows.append([name, f"{time:.0f}", share, f"{time / found['plain encoder, fp32']:.2f}"])
    return table(["step", "ms", "share, fp32", "of the plain encoder's time"], rows)


def main(argv=None) -> int:
    """The command line; prints Markdown."""
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.scan or Path(folder, "ct.nii.gz")
        if arguments.scan is None:
            draw(path, arguments.slices)
        print(f"{machine()}; {path.stat().st_size / 1e6:.0f} MB, medians of {arguments.repeats}\n", flush=True)
        print(report(path, arguments.repeats), flush=True)
    return 0


if __name__ == "__main__":
    run_command(main, (OSError, VolumeError))
