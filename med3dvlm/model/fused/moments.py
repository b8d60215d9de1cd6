"""Means and second moments of the stem's columns, from which batch statistics of the first two layers follow.

A layer that is linear in x has outputs k x, whose mean is k E[x] and whose mean square is k E[x x'] k'. For the first
layer x are the columns at one place, for a branch of the second those at a place and its two neighbours along one axis;
beyond the grid they are zero. In float64: the variance is a difference of nearly equal numbers where voxels are bright.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from med3dvlm.model.fused.axes import AXES
from med3dvlm.model.fused.native import kernels as native

CHUNKS = 64


class Moments(NamedTuple):
    """Averages over all places of the grid, float64; neighbours are ordered before, here, after."""

    mean: Tensor  # [C]
    second: Tensor  # [C, C]
    shifted_mean: dict[str, Tensor]  # [3 * C] per axis
    shifted_second: dict[str, Tensor]  # [3 * C, 3 * C] per axis


def along_axes(x: Tensor) -> Moments:
    """Moments of [B, D, H, W, C]."""
    count, channels = x[..., 0].numel(), x.shape[-1]
    x = x if native.take_places(x) else x.double()
    total, here = x.sum((0, 1, 2, 3), dtype=torch.float64), product(x.reshape(-1, channels), x.reshape(-1, channels))
    means, seconds = {}, {}
    for axis in AXES:
        dim = {"d": 1, "h": 2, "w": 3}[axis]
        lines = x.flatten(0, dim - 1).flatten(2, -2) if axis != "w" else x.flatten(0, 2).unsqueeze(2)  # [N, size, M, C]
        first, last = lines[:, 0].reshape(-1, channels), lines[:, -1].reshape(-1, channels)
        means[axis] = torch.cat([total - last.double().sum(0), total, total - first.double().sum(0)]) / count
        one, two = along_lines(lines, 1), along_lines(lines, 2)
        rows = [
            [here - product(last, last), one, two],
            [one.T, here, one],
            [two.T, one.T, here - product(first, first)],
        ]
        seconds[axis] = torch.cat([torch.cat(row, dim=1) for row in rows]) / count
    return Moments(total / count, here / count, means, seconds)


def along_lines(lines: Tensor, step: int) -> Tensor:
    """Sum of x[n, i, m] x[n, i + step, m]' over lines [N, size, M, C] -> [C, C].

    Pairs at this distance in memory, which need no copy, less those that reach from one line into the next.
    """
    _, size, inner, channels = lines.shape
    if size <= step:
        return lines.new_zeros(channels, channels, dtype=torch.float64)
    flat, distance = lines.reshape(-1, channels), step * inner
    across = product(lines[:-1, size - step :].reshape(-1, channels), lines[1:, :step].reshape(-1, channels))
    return product(flat[:-distance], flat[distance:]) - across


def product(a: Tensor, b: Tensor) -> Tensor:
    """a' b of [P, C] twice -> [C, C] in float64, without a kernel in partial sums that make a batched product."""
    if native.take_places(a):
        return native.second_moments(a, b)
    length = len(a) // CHUNKS * CHUNKS
    chunked = [t[:length].reshape(CHUNKS, -1, t.shape[-1]) for t in (a, b)]
    return torch.bmm(chunked[0].transpose(1, 2), chunked[1]).sum(0) + a[length:].T @ b[length:]


def of_products(rows: Tensor, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [N] of the products rows [N, C] times x, for x with these moments."""
    means = rows @ mean
    return means, ((rows @ second) * rows).sum(1) - means.square()
