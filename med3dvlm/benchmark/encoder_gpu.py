"""DCFormer's GPU path in bfloat16, timed against eager code and `torch.compile` of it.

`sh scripts/benchmark.sh encoder --device cuda`. Shares are of what this GPU reaches in a copy and in a product of large
matrices, for the bytes and products that `roofline` computes. The tables say where the GPU path was not taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from med3dvlm.benchmark import roofline
from med3dvlm.benchmark.encoder import build, call, fused, gradients_for, plain, step
from med3dvlm.benchmark.timing import alternate, table
from med3dvlm.model.dcformer import VARIANTS
from med3dvlm.model.fused import choice

HEADS = ["encoder", "batch", "eager", "compiled", "fused", "to eager", "to compiled", "share of bandwidth",
         "share of matrix rate", "path"]  # fmt: skip


def refusal(variants: list[str]) -> str:
    """Why there is nothing to time, in one sentence; empty if there is."""
    if not torch.cuda.is_available():
        return "--device cuda needs a GPU, and torch finds none here"
    return "vit3d has no GPU path of its own" if "vit3d" in variants else ""


def ceilings(device: str, width: int = 8192) -> tuple[float, float]:
    """(GB/s of a copy, GFLOP/s of a product) of bfloat16 matrices of this width."""
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    copied, product = torch.empty_like(a), torch.empty_like(a)
    times = alternate({"copy": lambda: copied.copy_(a), "product": lambda: torch.mm(a, b, out=product)}, 15, warmup=3)
    moved = 2 * a.numel() * a.element_size()  # read and written
    return moved / min(times["copy"].wall) / 1e9, 2 * width**3 / min(times["product"].wall) / 1e9


def forms(encoder: nn.Module, volume: Tensor, run: Callable) -> dict[str, Callable[[], object]]:
    """The three candidates of one call or step."""
    encodes = {"eager": plain, "compiled": torch.compile(plain), "fused": fused}
    return {name: lambda encode=encode: run(encode, encoder, volume, True) for name, encode in encodes.items()}


def row(variant: str, mode: str, batch: int, arguments: argparse.Namespace, limits: tuple[float, float]) -> list[str]:
    """One line of a table; what does not fit the GPU's memory is said, not timed."""
    encoder = build(variant, arguments.size, arguments.device).train(mode == "training")
    volume = torch.rand(batch, 1, *arguments.size, device=arguments.device)
    with torch.set_grad_enabled(mode == "training"):
        choice.set_fused(encoder, "auto")
        with torch.autocast(volume.device.type, torch.bfloat16):
            path = "fused" if choice.choose(encoder, volume) else "plain"
        try:
            run = call
            if mode == "training":
                run = partial(step, gradients={True: gradients_for(encoder, volume, True)})
            times = alternate(forms(encoder, volume, run), repeats=arguments.repeats, warmup=3)
        except torch.OutOfMemoryError:
            return [variant, str(batch), *["out of memory"] * 3, *["-"] * 4, path]
    eager, compiled, ours = (time.median_wall for time in times.values())
    parts = getattr(roofline, mode)(VARIANTS[variant], batch, tuple(arguments.size))
    work = sum(part.gigabytes for part in parts), sum(part.gigaflop for part in parts)
    shares = [f"{100 * amount / ours / limit:.0f}%" for amount, limit in zip(work, limits, strict=True)]
    milliseconds = [f"{1e3 * time:.2f}" for time in (eager, compiled, ours)]
    return [variant, str(batch), *milliseconds, f"{eager / ours:.2f}", f"{compiled / ours:.2f}", *shares, path]


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The ceilings, then a table for each mode, as Markdown."""
    limits = ceilings(arguments.device)
    yield "copy {:.0f} GB/s, product {:.0f} GFLOP/s, bfloat16".format(*limits)
    for mode in arguments.modes:
        rows = [row(variant, mode, batch, arguments, limits)
                for variant in arguments.variants for batch in arguments.batch]  # fmt: skip
        yield f"\n{mode}\n\n{table(HEADS, rows)}"
