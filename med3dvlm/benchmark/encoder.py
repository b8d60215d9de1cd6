"""DCFormer's fused path timed against the plain formulation: `sh scripts/benchmark.sh encoder`, here on a CPU.

Published and plain are those of `med3dvlm.benchmark.plain`, run eagerly: the published formulation, and the same in the
axis order that is faster. Fused is what `DCFormer` does by itself. All alternate in one process, and medians count.
Without `GLIBC_TUNABLES` (scripts/benchmark.sh sets it) large buffers are faulted in anew by each call, which slows the
unfused formulations most: such times are refused.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from med3dvlm.benchmark.plain import plain_hidden_states, published_hidden_states
from med3dvlm.benchmark.timing import Times, alternate, machine, table
from med3dvlm.model.dcformer import VARIANTS, DCFormer
from med3dvlm.model.encoder import build_vision_encoder

VIT = {"vision_encoder": "vit3d", "dim": 768, "depth": 12, "patch_size": (16, 16, 16)}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["small"], choices=[*VARIANTS, "vit3d"], metavar="VARIANT",
                        help=f"of {', '.join([*VARIANTS, 'vit3d'])} (default: small)")  # fmt: skip
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--size", nargs=3, type=int, default=[128, 256, 256], metavar=("D", "H", "W"))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"],
                        help="cuda: the GPU path in bfloat16 against eager code and torch.compile of it")  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, default=None,
                        help="volumes, several on a GPU only (default: 1, on a GPU 1 8 64)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's choice")
    arguments = parser.parse_args(argv)
    arguments.batch = arguments.batch or ([1] if arguments.device == "cpu" else [1, 8, 64])
    if arguments.device == "cpu" and len(arguments.batch) > 1:
        parser.error("--batch takes one number on a CPU")
    return arguments


def build(variant: str, size: list[int], device: str = "cpu") -> nn.Module:
    """An encoder with random weights and layer scale 1, so that no part of a block drowns in rounding."""
    depth, height, width = size
    torch.manual_seed(0)
    with torch.device(device):
        config = VIT if variant == "vit3d" else {"vision_encoder": "dcformer", "vision_variant": variant}
        encoder = build_vision_encoder(SimpleNamespace(**config, input_size=(height, width, depth)))
    for name, parameter in encoder.named_parameters():
        if name.endswith(".scale"):
            nn.init.ones_(parameter)
    return encoder


def published(encoder: nn.Module, volume: Tensor) -> list[Tensor]:
    return published_hidden_states(encoder, volume) if isinstance(encoder, DCFormer) else encoder(volume)


def plain(encoder: nn.Module, volume: Tensor) -> list[Tensor]:
    return plain_hidden_states(encoder, volume) if isinstance(encoder, DCFormer) else encoder(volume)


def fused(encoder: nn.Module, volume: Tensor) -> list[Tensor]:
    return encoder(volume)


def call(encode: Callable, encoder: nn.Module, volume: Tensor, bfloat16: bool) -> list[Tensor]:
    with torch.autocast(volume.device.type, torch.bfloat16, enabled=bfloat16):
        return encode(encoder, volume)


def gradients_for(encoder: nn.Module, volume: Tensor, bfloat16: bool) -> list[Tensor]:
    """A gradient for every hidden state, as what follows the encoder would hand it back."""
    return [torch.full_like(state, 1 / state.numel()) for state in call(fused, encoder, volume, bfloat16)]


def step(
    encode: Callable, encoder: nn.Module, volume: Tensor, bfloat16: bool, gradients: dict[bool, list[Tensor]]
) -> None:
    """Forward and backward with the `gradients_for` this `bfloat16`."""
    torch.autograd.backward(call(encode, encoder, volume, bfloat16), gradients[bfloat16])
    encoder.zero_grad(set_to_none=True)


FORMS = {
    "published fp32": (published, False),
    "plain fp32": (plain, False),
    "fused fp32": (fused, False),
    "published bf16": (published, True),
    "plain bf16": (plain, True),
    "fused bf16": (fused, True),
}


KEPT = ["plain fp32", "fused fp32", "plain bf16", "fused bf16"]  # published keeps what plain keeps


def times_of(run: Callable, encoder: nn.Module, volume: Tensor, repeats: int) -> dict[str, Times]:
    """Times of all forms of `call` or `step`."""
    candidates = {
        name: lambda encode=encode, bfloat16=bfloat16: run(encode, encoder, volume, bfloat16)
        for name, (encode, bfloat16) in FORMS.items()
    }
    return alternate(candidates, repeats=repeats, warmup=2)


def inference_row(variant: str, arguments: argparse.Namespace, volume: Tensor) -> list[str]:
    encoder = build(variant, arguments.size).eval()
    with torch.inference_mode():
        expected = plain(encoder, volume)
        exact, rounded = fused(encoder, volume), call(fused, encoder, volume, True)
        times = times_of(call, encoder, volume, arguments.repeats)
    deviation = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(exact, expected, strict=True))
    distance = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(rounded, expected, strict=True))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return [variant, f"{parameters / 1e6:.1f}", f"{gigaflops(variant, arguments):.0f}", *milliseconds(times),
            *ratios(times, *((slow, fast) for slow in ("published fp32", "plain fp32")
                             for fast in ("fused fp32", "fused bf16"))),
            f"{deviation:.0e}", f"{distance:.0e}",
            *(peak_growth(variant, arguments, encode) for encode in (plain, fused))]  # fmt: skip


def training_row(variant: str, arguments: argparse.Namespace, volume: Tensor) -> list[str]:
    encoder = build(variant, arguments.size).train()
    kept = [f"{kept_bytes(*FORMS[form], encoder, volume) / 1e6:.0f}" for form in KEPT]
    gradients = {bfloat16: gradients_for(encoder, volume, bfloat16) for bfloat16 in (False, True)}
    times = times_of(partial(step, gradients=gradients), encoder, volume, arguments.repeats)
    pairs = [(f"{slow} {dtype}", f"fused {dtype}") for slow in ("published", "plain") for dtype in ("fp32", "bf16")]
    return [variant, *milliseconds(times), *ratios(times, *pairs), *kept]


def gigaflops(variant: str, arguments: argparse.Namespace) -> float:
    """Of the plain formulation's convolutions and products, counted without computing them."""
    encoder = build(variant, arguments.size, "meta").eval()
    volume = torch.empty(*arguments.batch, 1, *arguments.size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(encoder, volume)
    return counter.get_total_flops() / 1e9


def kept_bytes(encode: Callable, bfloat16: bool, encoder: nn.Module, volume: Tensor) -> int:
    """Bytes that one forward pass keeps for the backward pass, every storage once, weights and the input left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*encoder.parameters(), *encoder.buffers(), volume)}
    kept = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        call(encode, encoder, volume, bfloat16)
    return sum(kept.values())


def peak_growth(variant: str, arguments: argparse.Namespace, encode: Callable) -> str:
    """MB by which a fresh process grows at most while it encodes in fp32; weights and volume are there before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return f"{process.submit(_growth, variant, arguments.size, *arguments.batch, encode).result():.0f}"


def _growth(variant: str, size: list[int], batch: int, encode: Callable) -> float:
    encoder, volume = build(variant, size).eval(), torch.rand(batch, 1, *size)
    before = _high_water_mark()
    with torch.inference_mode():
        encode(encoder, volume)
    return _high_water_mark() - before


def _high_water_mark() -> float:
    """MB; `getrusage` would start at that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def milliseconds(times: dict[str, Times]) -> list[str]:
    return [f"{1e3 * time.median_wall:.0f}" for time in times.values()]


def ratios(times: dict[str, Times], *pairs: tuple[str, str]) -> list[str]:
    return [f"{times[slow].median_wall / times[fast].median_wall:.2f}" for slow, fast in pairs]


def ceilings() -> str:
    """What this machine reaches in the encoder's dominant operation, a dense 3-tap convolution over 64 channels."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.randn(32, 64, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(64, 64, 3, 1, dtype=dtype).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            times = alternate({"": lambda: F.conv2d(images, weight, None, 1, (1, 0))}, repeats=15, warmup=3)  # noqa: B023
        rates.append(2 * images.numel() * weight.numel() // 64 / min(times[""].wall) / 1e9)
    return "dense convolutions of oneDNN: {:.0f} GFLOP/s in fp32, {:.0f} in bf16".format(*rates)


def main(argv=None) -> int:
    """The command line; prints Markdown."""
    arguments = parse_arguments(argv)
    if arguments.device == "cuda":
        return main_gpu(arguments)
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        print("error: GLIBC_TUNABLES is not set; start this with `sh scripts/benchmark.sh encoder`", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    volume = torch.rand(*arguments.batch, 1, *arguments.size)
    print(f"{machine()}; {ceilings()}\nvolumes {list(volume.shape)}, medians of {arguments.repeats}, ms", flush=True)
    heads = {
        "inference": ["encoder", "M parameters", "GFLOP", *FORMS, "fp32 to published", "bf16 to published fp32",
                      "fp32 to plain", "bf16 to plain fp32", "largest deviation fp32", "relative L2 bf16",
                      "MB, plain fp32", "MB, fused fp32"],
        "training": ["encoder", *FORMS, "fp32 to published", "bf16 to published bf16", "fp32 to plain",
                     "bf16 to plain bf16", *(f"MB kept, {form}" for form in KEPT)],
    }  # fmt: skip
    rows = {"inference": inference_row, "training": training_row}
    for mode in arguments.modes:
        lines = [rows[mode](variant, arguments, volume) for variant in arguments.variants]
        print(f"\n{mode}\n\n{table(heads[mode], lines)}", flush=True)
    return 0


def main_gpu(arguments: argparse.Namespace) -> int:
    """The command line with `--device cuda`."""
    from med3dvlm.benchmark import encoder_gpu  # which imports this module

    reason = encoder_gpu.refusal(arguments.variants)
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    print(f"{machine()}\nvolumes of {arguments.size}, medians of {arguments.repeats}, ms", flush=True)
    for lines in encoder_gpu.report(arguments):
        print(lines, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
