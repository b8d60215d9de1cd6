"""The stem's first two layers as one: without an activation between them they compose exactly.

The first layer sees 19 distinct voxels around its centre (7 along each axis, the centre is shared). Laid out as
columns, with a 20th that is 1, both layers together are one sum of 3-tap convolutions over 20 channels. The 20th
channel carries every constant. Outside of the grid all 20 are zero, so the zero padding of the second layer, which
comes after the first one's batch norm, stays exact at the borders.

Shapes: B batch, D', H', W' the stem's grid, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.model.fused.axes import batch_norms, convolutions, kernels_of

STRIDE, TAPS = 4, 7
VALID = 19  # the column that is 1
CENTRE = 3  # the column that the three axes share
SIDES = {"w": (0, 4), "h": (7, 10), "d": (13, 16)}  # where the three taps before the centre start, and those after it


class Affine(NamedTuple):
    """A batch norm with known statistics, the bias of the convolution before it included: y = scale * z + shift."""

    scale: Tensor  # [C]
    shift: Tensor  # [C]


def columns(volume: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, D, H, W] -> [B, D', H', W', 20], what the first layer's kernels see at each place of the stem's grid."""
    volume, half = volume[:, 0], TAPS // 2

    def taps(lines: Tensor, dim: int) -> Tensor:
        """[B, .., N, ..] -> [B, .., N', .., 7], N and N' in this place."""
        return F.pad(lines, (0, 0) * (3 - dim) + (half, half)).to(dtype).unfold(dim, TAPS, STRIDE)

    along_w = taps(volume[:, ::STRIDE, ::STRIDE], 3)  # [B, D', H', W', 7]
    along_h = taps(volume[:, ::STRIDE, :, ::STRIDE], 2)
    along_d = taps(volume[:, :, ::STRIDE, ::STRIDE], 1)
    sides = [taps[..., part] for taps in (along_h, along_d) for part in (slice(half), slice(half + 1, None))]
    return torch.cat([along_w, *sides, torch.ones_like(along_w[..., :1])], dim=-1)


def tap_rows(layer: nn.Module) -> dict[str, Tensor]:
    """The kernels of the stem's first layer as rows [C, 20] over the columns, per axis, float64."""
    rows = {}
    for axis, kernel in kernels_of(layer).items():
        taps, (before, after) = kernel[:, 0].double(), SIDES[axis]  # [C, 7]
        rows[axis] = row = taps.new_zeros(len(taps), VALID + 1)
        row[:, before : before + 3], row[:, CENTRE], row[:, after : after + 3] = taps[:, :3], taps[:, 3], taps[:, 4:]
    return rows


def first_layer(rows: dict[str, Tensor], norms: dict[str, Affine]) -> Tensor:
    """The stem's first layer with its batch norms as a matrix [C, 20] over the columns, from its `tap_rows`."""
    return sum(norms[axis].scale[:, None] * rows[axis] + F.pad(norms[axis].shift[:, None], (VALID, 0)) for axis in rows)


def second_layer(layer: nn.Module, first: Tensor) -> dict[str, Tensor]:
    """The second layer's kernels over the columns, before its batch norm and without biases: [C', 20, 3] per axis."""
    return {
        axis: torch.einsum("omt,mc->oct", kernel.to(first.dtype), first) for axis, kernel in kernels_of(layer).items()
    }


def normalised(kernels: dict[str, Tensor], norms: dict[str, Affine]) -> tuple[dict[str, Tensor], Tensor]:
    """Batch norm folded into kernels [C', C, k] per axis -> (kernels, bias [C'])."""
    scaled = {axis: kernel * norms[axis].scale[:, None, None] for axis, kernel in kernels.items()}
    return scaled, sum(norm.shift for norm in norms.values())


def constant_into_columns(kernels: dict[str, Tensor], bias: Tensor) -> dict[str, Tensor]:
    """Kernels [C', 20, 3] whose centre also adds the bias [C'], by way of the column that is 1."""
    along_w = kernels["w"]
    place = torch.zeros_like(along_w)
    place[:, VALID, 1] = 1
    return kernels | {"w": along_w + place * bias[:, None, None]}


def running_affine(layer: nn.Module) -> dict[str, Affine]:
    """The batch norms of a decomposed layer with their running statistics, in float64."""
    affine = {}
    for axis, norm in batch_norms(layer).items():
        mean, var = norm.running_mean.double(), norm.running_var.double()
        affine[axis] = affine_of(norm, convolutions(layer)[axis].bias.double(), mean, var)
    return affine


def affine_of(norm: nn.BatchNorm3d, bias: Tensor | float, mean: Tensor, var: Tensor) -> Affine:
    """The batch norm of z + bias with the mean and variance [C] of that sum."""
    scale = norm.weight.to(var.dtype) * (var + norm.eps).rsqrt()
    return Affine(scale, norm.bias.to(var.dtype) + scale * (bias - mean))
