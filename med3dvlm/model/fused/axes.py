"""One-dimensional convolutions of channels-last volumes, by axis, as 2D convolutions of images that are views.

Axes are named "h", "w" and "d" as in the state dict: branch `c1` runs along h, `c2` along w, `c3` along d. Kernels are
[C', C / groups, k] for any axis. Along h and w an image is one slice, along d it has the axes D and H * W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from med3dvlm.model.fused.onednn import Conv

AXES = ("h", "w", "d")


def convolutions(layer: nn.Module) -> dict[str, nn.Conv3d]:
    """The three convolutions of a decomposed layer by axis."""
    return {axis: conv for axis, (conv, _) in _branches(layer)}


def batch_norms(layer: nn.Module) -> dict[str, nn.BatchNorm3d]:
    """The three batch norms of a decomposed layer by axis."""
    return {axis: norm for axis, (_, norm) in _branches(layer)}


def _branches(layer: nn.Module) -> zip:
    """Each axis with its branch, a convolution and a batch norm."""
    return zip(AXES, (layer.c1, layer.c2, layer.c3), strict=True)


def kernels_of(layer: nn.Module) -> dict[str, Tensor]:
    """The kernels of a decomposed layer, [C', C / groups, k] per axis."""
    return {axis: conv.weight.flatten(2) for axis, conv in convolutions(layer).items()}


def images(x: Tensor, axis: str) -> Tensor:
    """[B, D, H, W, C] -> [B * D, H, W, C] along h and w, [B, D, H * W, C] along d; a view."""
    return x.flatten(2, 3) if axis == "d" else x.flatten(0, 1)


def as_2d(kernel: Tensor, axis: str) -> Tensor:
    """[C', C / groups, k] -> [C', C / groups, 1, k] along w, [C', C / groups, k, 1] along h and d."""
    return kernel.unsqueeze(-2 if axis == "w" else -1)


class AxisSum:
    """A sum of three one-dimensional convolutions with fixed weights: the second and third add to the first's result.

    What oneDNN is slow for in float32 is put in another way. A dense one along h takes a slice for one line, its taps a
    row apart (as fast in bfloat16). In float32 the outer taps along d of a layer that keeps its width are point-wise
    layers of volumes moved by a slice.

    Args:
        kernels: [C', C / groups, k] per axis.
        bias: [C'], or None.
        dtype: of the arithmetic.
        groups: 1 (dense), or C (depth-wise).
        shared_input: all three convolve the same volume. Then the centre taps of three kernels of length 3 are one tap.
    """

    def __init__(
        self,
        kernels: dict[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
        groups: int = 1,
        shared_input: bool = True,
    ):
        dilation, self.dense = 1, groups == 1
        if shared_input and kernels["w"].shape[-1] == 3:
            before, _, after = kernels["w"].split(1, dim=-1)
            centre = sum(kernel[..., 1:2] for kernel in kernels.values())
            outer = {axis: kernel[..., ::2] for axis, kernel in kernels.items()}
            kernels, dilation = outer | {"w": torch.cat([before, centre, after], dim=-1)}, 2
        self.along_w = Conv(as_2d(kernels["w"], "w"), bias, dtype, groups=groups)
        self.along_h = Conv(as_2d(kernels["h"], "w" if self.dense else "h"), None, dtype, dilation, groups)
        self.along_d = Conv(as_2d(kernels["d"], "d"), None, dtype, dilation, groups)
        self.from_neighbours = None
        if dilation == 2 and dtype == torch.float32 and self.dense and len(kernels["d"]) == kernels["d"].shape[1]:
            self.from_neighbours = [Conv(as_2d(tap, "d"), None, dtype) for tap in kernels["d"].split(1, dim=-1)]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, D, H, W, C] -> [B, D, H, W, C']."""
        return self.of({axis: x for axis in AXES})

    def of(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, D, H, W, C] per axis -> [B, D, H, W, C']."""
        y = self.along_w(images(inputs["w"], "w"))  # [B * D, H, W, C']
        pair, step = (y, images(inputs["h"], "h")), 1
        if self.dense:
            pair, step = (t.flatten(1, 2).unsqueeze(1) for t in pair), y.shape[2]  # [B * D, 1, H * W, .]
        self.along_h.add_to(*pair, step)
        y = y.unflatten(0, inputs["w"].shape[:2])  # [B, D, H, W, C']
        if self.from_neighbours is None or y.shape[1] == 1:
            self.along_d.add_to(images(y, "d"), images(inputs["d"], "d"))
            return y
        before, after = self.from_neighbours
        samples = zip(y.split(1), inputs["d"].split(1), strict=True)  # each is contiguous without a slice, too
        for total, x in samples:
            before.add_to(images(total[:, 1:], "d"), images(x[:, :-1], "d"))
            after.add_to(images(total[:, :-1], "d"), images(x[:, 1:], "d"))
        return y
