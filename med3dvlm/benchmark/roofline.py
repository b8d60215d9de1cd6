"""What DCFormer's GPU path has to move and to compute, by formula: nothing is run, nothing is measured.

    python -m med3dvlm.benchmark.roofline --variant small --bandwidth 3350 --products 989

Bytes count every tensor once in each kernel that reads or writes it: neighbours come from the cache, weights as well
(that is what the kernels are built for; a cache that is too small makes more). Products are those of the tensor cores;
depth-wise convolutions run on the other units and are limited by bytes. No kernel can take less time than its bytes at
the GPU's bandwidth, nor than its products at its matrix rate; launches, GELU and everything small are left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import NamedTuple

from med3dvlm.benchmark.timing import table
from med3dvlm.model.dcformer import VARIANTS, Variant

COLUMNS, BYTES = 20, 2  # of the stem's image-to-column; of a bfloat16
VOLUME = 4 * 7 / 16  # bytes read of each voxel in float32: of the planes and lines that the strided kernels meet
FUSED = 256  # widest level whose feed-forward part is one kernel (`triton_feed_forward.WIDEST`)


class Part(NamedTuple):
    """A kernel, or a few that follow each other: GB moved, and GFLOP of products (a multiplication and an addition)."""

    name: str
    gigabytes: float
    gigaflop: float = 0.0

    def least_seconds(self, bandwidth: float, rate: float) -> float:
        """With GB/s and GFLOP/s."""
        return max(self.gigabytes / bandwidth, self.gigaflop / rate)


def part(name: str, positions: int, values: float, products: float = 0) -> Part:
    """From bfloat16 values moved, and multiplications done, at each position."""
    return Part(name, positions * values * BYTES / 1e9, 2 * positions * products / 1e9)


def levels(variant: Variant, batch: int, size: tuple[int, int, int]) -> list[int]:
    """Positions of the five levels, all volumes of the batch together."""
    grid = [(n - 1) // 4 + 1 for n in size]
    positions = [batch * math.prod(grid)]
    for pooled in variant.pool:
        grid = [(n - 1) // 2 + 1 for n in grid] if pooled else grid
        positions.append(batch * math.prod(grid))
    return positions


def inference(variant: Variant, batch: int, size: tuple[int, int, int]) -> list[Part]:
    """Parts of one call with volumes of size (D, H, W)."""
    positions, c = levels(variant, batch, size), variant.channels
    voxels = batch * math.prod(size)
    parts = [Part("columns", (VOLUME * voxels + COLUMNS * BYTES * positions[0]) / 1e9),
             part("stem, layers 1 and 2", positions[0], COLUMNS + c[0], 7 * COLUMNS * c[0]),
             part("stem, layers 3 and 4", positions[0], 4 * c[0], 2 * 7 * c[0] ** 2)]  # fmt: skip
    for stage in range(1, len(c)):
        p, width, inner, blocks = positions[stage], c[stage], *sizes_of(variant, stage)
        parts += [
            entry(variant, positions, stage),
            part(f"stage {stage}, depth-wise", p, blocks * 2 * width),
            part(f"stage {stage}, feed-forward", p, blocks * forward_values(width, inner), blocks * 2 * width * inner),
        ]
    return parts


def training(variant: Variant, batch: int, size: tuple[int, int, int]) -> list[Part]:
    """Parts of a forward and a backward pass; the volume wants no gradient."""
    positions, c = levels(variant, batch, size), variant.channels
    first, columns = c[0], COLUMNS
    parts = inference(variant, batch, size)[:1]
    parts += [
        part("statistics of the columns", positions[0], columns * 13),  # 2 bytes read, 3 times 8 of float64
        # forward: x twice, y; backward: x, dy; x, dy, 3 dz; x, 3 dz for the taps; and for the input 3 dz, dx
        part("stem, layers 1 and 2", positions[0], 5 * columns + 9 * first, (4 * 9 + 7) * columns * first),
        part("stem, layers 3 and 4", positions[0], 2 * 18 * first, 2 * (5 * 9 + 7) * first**2),
    ]
    for stage in range(1, len(c)):
        p, width, inner, blocks = positions[stage], c[stage], *sizes_of(variant, stage)
        forward, again = forward_values(width, inner), 7 * width + 11 * inner  # libraries, inner values repeated
        start = entry(variant, positions, stage)
        back = part("", p, 2 * width + 7 * c[stage - 1], 2 * width * c[stage - 1])  # places of maxima have 8 bytes
        back_bytes = back.gigabytes + BYTES * positions[stage - 1] * c[stage - 1] / 1e9 * variant.pool[stage - 1]
        parts += [
            Part(start.name, start.gigabytes + back_bytes, start.gigaflop + back.gigaflop),
            part(f"stage {stage}, depth-wise", p, blocks * 14 * width),
            part(f"stage {stage}, feed-forward", p, blocks * (forward + again), blocks * 7 * width * inner),
        ]
    return parts


def sizes_of(variant: Variant, stage: int) -> tuple[int, int]:
    """Inner width of the feed-forward part, and number of blocks."""
    return variant.mlp_ratios[stage - 1] * variant.channels[stage], variant.depths[stage - 1]


def entry(variant: Variant, positions: list[int], stage: int) -> Part:
    """Pooling and the point-wise layer at the start of a stage."""
    before, width = variant.channels[stage - 1], variant.channels[stage]
    pooling = (positions[stage - 1] + positions[stage]) * before * BYTES / 1e9 * variant.pool[stage - 1]
    layer = part("", positions[stage], before + width, before * width)
    return Part(f"stage {stage}, entry", pooling + layer.gigabytes, layer.gigaflop)


def forward_values(width: int, inner: int) -> int:
    """Values that the feed-forward part moves at a position, by one kernel or by libraries."""
    return 3 * width if width <= FUSED else 5 * width + 4 * inner


def least_milliseconds(parts: list[Part], bandwidth: float, rate: float) -> float:
    """With GB/s and TFLOP/s; each part at the limit that it meets first."""
    return 1e3 * sum(one.least_seconds(bandwidth, 1e3 * rate) for one in parts)


def described(one: Part, *limits: float) -> str:
    return f"{one.gigabytes:.3f} / {one.gigaflop:.1f} / {least_milliseconds([one], *limits):.3f}"


def main(argv=None) -> int:
    """The command line; prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="small", choices=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--size", nargs=3, type=int, default=[128, 256, 256], metavar=("D", "H", "W"))
    parser.add_argument("--bandwidth", type=float, required=True, help="of the GPU's memory, GB/s")
    parser.add_argument("--products", type=float, required=True, help="of its tensor cores in bf16, TFLOP/s")
    arguments = parser.parse_args(argv)
    limits = arguments.bandwidth, arguments.products
    print(f"DCFormer-{arguments.variant}, bf16, {arguments.bandwidth:g} GB/s, {arguments.products:g} TFLOP/s: computed")
    for mode in (inference, training):
        calls = [mode(VARIANTS[arguments.variant], batch, arguments.size) for batch in arguments.batches]
        rows = [[same[0].name, *(described(one, *limits) for one in same)] for same in zip(*calls, strict=True)]
        total = [f"{least_milliseconds(parts, *limits):.3f}" for parts in calls]
        heads = [f"batch {batch}: GB / GFLOP / least ms" for batch in arguments.batches]
        print(f"\n{table([mode.__name__, *heads], [*rows, ['least time, all', *total]])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
