"""Means and second moments of the stem's columns, from which batch statistics of the first two layers follow.

A layer that is linear in x has outputs k x, whose mean is k E[x] and whose mean square is k E[x x'] k'. For the first
layer x are the columns at one place, for a branch of the second those at a place and its two neighbours along one axis;
beyond the grid they are zero. In float64: the variance is a difference of nearly equal numbers where voxels are bright.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from med3dvlm.model.fused.axes import AXES
from med3dvlm.model.fused.native import kernels as native

CHUNK = 512  # places of one product in a batch, which is several times as fast as one product over all


class Moments(NamedTuple):
    """Averages over all places of the grid, float64; neighbours are ordered before, here, after."""

    mean: Tensor  # [C]
    second: Tensor  # [C, C]
    shifted_mean: dict[str, Tensor]  # [3 * C] per axis
    shifted_second: dict[str, Tensor]  # [3 * C, 3 * C] per axis


def along_axes(x: Tensor) -> Moments:
    """Moments of [B, D, H, W, C], of which the last channel is 1: products with it are sums.

    For gradients of x, which few want, they are computed again: what torch would keep is in float64.
    """
    if x.requires_grad:
        return checkpoint(_along_axes, x, use_reentrant=False, preserve_rng_state=False)
    return _along_axes(x)


def _along_axes(x: Tensor) -> Moments:
    x = x if native.take_moments(x) else x.double()
    count, channels = x[..., 0].numel(), x.shape[-1]
    here = product(x.reshape(-1, channels), x.reshape(-1, channels))
    means, seconds = {}, {}
    for axis in AXES:
        dim = {"d": 1, "h": 2, "w": 3}[axis]
        lines = x.flatten(0, dim - 1).flatten(2, -2) if axis != "w" else x.flatten(0, 2).unsqueeze(2)  # [N, size, M, C]
        first, last = (product(ends, ends) for ends in (lines[:, i].reshape(-1, channels) for i in (0, -1)))
        one, two = along_lines(lines, 1), along_lines(lines, 2)
        rows = [[here - last, one, two], [one.T, here, one], [two.T, one.T, here - first]]
        means[axis] = torch.cat([rows[i][i][:, -1] for i in range(3)]) / count
        seconds[axis] = torch.cat([torch.cat(row, dim=1) for row in rows]) / count
    return Moments(here[:, -1] / count, here / count, means, seconds)


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
    """a' b of [P, C] twice -> [C, C] in float64."""
    if native.take_moments(a):
        return native.second_moments(a, b)
    length = len(a) // CHUNK * CHUNK
    chunked = [t[:length].reshape(-1, CHUNK, t.shape[-1]) for t in (a, b)]
    return torch.bmm(chunked[0].transpose(1, 2), chunked[1]).sum(0) + a[length:].T @ b[length:]


def of_products(rows: Tensor, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [N] of the products rows [N, C] times x, for x with these moments."""
    means = rows @ mean
    return means, ((rows @ second) * rows).sum(1) - means.square()
