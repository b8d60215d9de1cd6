"""The whole stem as one convolution, for inference: no activation stands between its four layers.

Each place g of the stem's grid sees 10 voxels as its own, 4 g and the three after it along each axis, and a constant 1
that carries every bias. Over these 11 phases the four layers are one kernel of 8 x 8 x 8 places, which the C++ kernels
apply by fast Fourier transforms (`native/fourier.cpp`).

That is exact inside of the grid. The plain layers see zeros outside of it where the one kernel has values: what leaves
the grid in an early layer comes back in a later one. As no layer reaches farther than one place, this concerns the
outermost three planes, and is a sum over the six faces of kernels that look at the outermost two: `Face`.

Shapes: B batch, D', H', W' the stem's grid, C channels, K phases (11) or columns (20, `stem.columns`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from med3dvlm.model.fused import stem
from med3dvlm.model.fused.axes import AXES, kernels_of
from med3dvlm.model.fused.native import kernels as native

PHASES, LENGTH = 11, 24  # of the transforms; these and the next two as in native/fourier.cpp
TILE, PAIRS = 16, 4  # places along an axis that one transform gives; pairs of tiles that are worked on together
PLACES = ("d", "h", "w")  # the order of a tensor's axes


def pays(volume: Tensor, dtype: torch.dtype, channels: int) -> bool:
    """Whether there are kernels for `FourierStem`, and the tiles that they work on are filled more than half.

    Args:
        volume: [B, 1, D, H, W].
        dtype: of the arithmetic.
        channels: of the stem.
    """
    sizes = [(n + 3) // 4 for n in volume.shape[2:]]
    pairs = len(volume) * -(-math.prod(-(-n // TILE) for n in sizes) // 2)  # of tiles of one sample
    places, capacity = len(volume) * math.prod(sizes), -(-pairs // PAIRS) * PAIRS * 2 * TILE**3
    return 2 * places > capacity and channels % 16 == 0 and native.take_dtype(dtype)


class FourierStem:
    """The stem's four layers with their present weights and running statistics."""

    def __init__(self, layers: nn.Sequential, dtype: torch.dtype):
        first = stem.first_layer(stem.tap_rows(layers[0]), stem.running_affine(layers[0]))  # [C, 20]
        folded = [stem.normalised(float64(kernels_of(layer)), stem.running_affine(layer)) for layer in layers[1:]]
        self.weights = spectra(compose(place_phases(first), folded)).to(dtype)
        self.faces = [Face(axis, high, first, folded) for axis in PLACES for high in (False, True)]

    def __call__(self, volume: Tensor) -> Tensor:
        """[B, 1, D, H, W] -> [B, D', H', W', C]."""
        volume = volume.float().contiguous()
        y = native.fourier(volume, self.weights)
        for face in self.faces:
            face.correct(y, volume)
        return y


class Face:
    """What the layers' zero padding changes near one side of the grid.

    Args:
        axis: to which the side is perpendicular.
        high: whether it is the side of the last place.
        first, layers: as of `compose`.
    """

    def __init__(self, axis: str, high: bool, first: Tensor, layers: list[tuple[dict[str, Tensor], Tensor]]):
        self.axis, self.high = PLACES.index(axis), high
        in_front = (axis, *(other for other in PLACES if other != axis))
        turned = []
        for kernels, bias in layers:
            # A tap before a place is how the place before acts on it: seen from the source, kernels are turned around.
            around = {place: kernels[of].flip(-1) for place, of in zip(PLACES, in_front, strict=True)}
            turned.append((around | {"d": kernels[axis]} if high else around, bias))
        free, planes = response(first, turned), range(2)
        changes = torch.stack([(response(first, turned, n) - free)[3 - n : 6 - n] for n in planes])  # in planes 0 to 2
        if high:  # where the first layer, too, finds voxels one place outside of the grid
            outside, (before, after) = torch.zeros_like(first), stem.SIDES[axis]
            outside[:, after : after + 3] = first[:, before : before + 3]
            changes[0] -= response(outside, [(kernels, 0 * bias) for kernels, bias in turned])[4:7]
        # Seen from the place that is changed, where does the source lie?
        changes = changes[:, :, 1:6, 1:6].flip(2, 3).permute(1, 2, 3, 0, 5, 4)  # [3 planes, 5, 5, 2 planes, 20, C]
        where = changes.any(-1).nonzero()  # [R, 5]
        self.weights = changes[tuple(where.T)].float()  # [R, C]
        self.where, self.counts = where[:, 1:].contiguous(), where[:, 0].bincount(minlength=3)

    def correct(self, y: Tensor, volume: Tensor) -> None:
        """Make y [B, D', H', W', C], the kernel's result for a volume, what the four layers give near this side."""
        native.correct_side(y, volume, self.axis, self.high, self.where, self.counts, self.weights)


def response(first: Tensor, layers: list[tuple[dict[str, Tensor], Tensor]], plane: int | None = None) -> Tensor:
    """What layers make of the columns at one place, [7, 7, 7, C, 20] around it.

    Args:
        first: the first layer [C, 20].
        layers: kernels as seen from the source, the side's axis as "d" with the grid behind it, and biases.
        plane: how many planes lie between the place and the side, outside of which there are zeros; or no side.
    """
    field = first[None, None, None]
    for reach, (kernels, bias) in enumerate(layers, 1):
        field = spread(field, kernels)
        field[reach, reach, reach, :, stem.VALID] += bias
        if plane is not None:
            field[: max(reach - plane, 0)] = 0
    return field


def float64(kernels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels per axis in float64."""
    return {axis: kernel.double() for axis, kernel in kernels.items()}


def place_phases(first: Tensor) -> Tensor:
    """The first layer over the columns [C, 20] -> over the phases of a place and of those before it, [2, 2, 2, C, K].

    A voxel before the centre is a phase of the place before: 4 g - 1 = 4 (g - 1) + 3.
    """
    kernel = first.new_zeros(2, 2, 2, len(first), PHASES)
    here = kernel[1, 1, 1]
    here[:, 0], here[:, PHASES - 1] = first[:, stem.CENTRE], first[:, stem.VALID]
    for axis, slot in {"w": 1, "h": 4, "d": 7}.items():
        before, after = stem.SIDES[axis]
        here[:, slot : slot + 3] = first[:, after : after + 3]
        place = [0 if axis == other else 1 for other in PLACES]
        kernel[tuple(place)][:, slot : slot + 3] = first[:, before : before + 3]
    return kernel


def compose(kernel: Tensor, layers: list[tuple[dict[str, Tensor], Tensor]]) -> Tensor:
    """A kernel [2, 2, 2, C, K] followed by layers, each [C', C, 3] per axis and a bias [C'] -> [8, 8, 8, C', K]."""
    for kernels, bias in layers:
        kernel = spread(kernel, kernels)
        centre = len(kernel) // 2
        kernel[centre, centre, centre, :, PHASES - 1] += bias
    return kernel


def spread(kernel: Tensor, kernels: dict[str, Tensor]) -> Tensor:
    """[n_D, n_H, n_W, C, K] -> [n_D + 2, n_H + 2, n_W + 2, C', K], a decomposed layer after a kernel."""
    sizes = kernel.shape[:3]
    result = kernel.new_zeros(*(n + 2 for n in sizes), len(kernels["w"]), kernel.shape[-1])
    centre = sum(kernels[axis][..., 1] for axis in AXES)
    result[1:-1, 1:-1, 1:-1] = centre @ kernel
    for axis in AXES:
        for tap in (0, 2):
            start = [tap if axis == other else 1 for other in PLACES]
            part = tuple(slice(i, i + n) for i, n in zip(start, sizes, strict=True))
            result[part] += kernels[axis][..., tap] @ kernel
    return result


def spectra(kernel: Tensor) -> Tensor:
    """A kernel [8, 8, 8, C, K], of places -4 to 3 -> what `native.fourier` takes, float32."""
    places = -torch.arange(-4, 4, device=kernel.device) % LENGTH
    d, h, w = torch.meshgrid(places, places, places, indexing="ij")
    channels = kernel.shape[3]
    circle = kernel.new_zeros(channels, PHASES, LENGTH, LENGTH, LENGTH)
    circle[:, :, d, h, w] = kernel.permute(3, 4, 0, 1, 2)
    values = torch.fft.rfftn(circle, dim=(2, 3, 4), norm="forward").to(torch.complex64)  # [C, K, 24, 24, 13]
    lanes = native.lanes()
    values = torch.view_as_real(values).unflatten(0, (-1, lanes))  # [C / lanes, lanes, K, 24, 24, 13, 2]
    return values.permute(0, 5, 4, 3, 2, 6, 1).contiguous()  # [C / lanes, 13, 24, 24, K, 2, lanes]
