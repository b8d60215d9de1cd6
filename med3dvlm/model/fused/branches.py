"""Three parallel convolutions, each with a batch norm on the statistics of the batch, summed: forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.model.fused.axes import AXES, AxisSum, as_2d, batch_norms, convolutions, images
from med3dvlm.model.fused.native import kernels as native

PARAMETERS = 12  # of a layer


def parameters_of(layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """What `Branches` takes of a layer: kernels in `dtype`, biases, weights and shifts of batch norms, three each."""
    convs, norms = convolutions(layer).values(), batch_norms(layer).values()
    return [
        *(conv.weight.flatten(2).to(dtype) for conv in convs),
        *(conv.bias for conv in convs),
        *(norm.weight.to(norm.running_mean.dtype) for norm in norms),
        *(norm.bias.to(norm.running_mean.dtype) for norm in norms),
    ]


def update_running(layer: nn.Module, mean: Iterable[Tensor], var: Iterable[Tensor], count: int) -> None:
    """Let the batch norms of a layer see a batch.

    Args:
        mean: [C] per axis, of the convolution without its bias.
        var: [C] per axis, biased.
        count: places that they are taken over.
    """
    three = zip(convolutions(layer).values(), batch_norms(layer).values(), mean, var, strict=True)
    for conv, norm, of_axis, spread in three:
        dtype = norm.running_mean.dtype
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_((of_axis + conv.bias.detach()).to(dtype), norm.momentum)
        norm.running_var.lerp_((spread * (count / (count - 1))).to(dtype), norm.momentum)


class Branches:
    """The arithmetic of a decomposed layer in training, on the tensors of `parameters_of`.

    Biases of the convolutions have no effect here: the batch norms take them away. Their gradient is 0.
    """

    def __init__(self, groups: int, parameters: tuple[Tensor, ...]):
        self.groups = groups
        three = [dict(zip(AXES, parameters[i : i + 3], strict=True)) for i in range(0, PARAMETERS, 3)]
        self.kernels, self.biases, self.weights, self.shifts = three

    def convolve(self, x: Tensor) -> dict[str, Tensor]:
        """[B, D, H, W, C] -> [B, D, H, W, C'] per axis."""
        outputs = {}
        for axis in AXES:
            weight = as_2d(self.kernels[axis], axis).contiguous(memory_format=torch.channels_last)
            padding = (weight.shape[2] // 2, weight.shape[3] // 2)
            y = F.conv2d(images(x, axis).movedim(-1, 1), weight, None, 1, padding, 1, self.groups)
            outputs[axis] = y.movedim(1, -1).reshape(*x.shape[:-1], -1).contiguous()
        return outputs

    def measure(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Branch outputs as of `convolve`, their mean and their biased variance, [3, C'] each."""
        z = self.convolve(x)
        means, variances = zip(*(mean_and_variance(z[axis], self.weights[axis].dtype) for axis in AXES), strict=True)
        return z, torch.stack(means), torch.stack(variances)

    def normalised_sum(self, z: dict[str, Tensor], mean: Tensor, inverse_std: Tensor) -> Tensor:
        """Branch outputs -> the sum of their batch norms, [B, D, H, W, C']."""
        scales = {axis: self.weights[axis] * inverse_std[i] for i, axis in enumerate(AXES)}
        shift = sum(self.shifts[axis] - scales[axis] * mean[i] for i, axis in enumerate(AXES))
        dtype = z["h"].dtype
        y = torch.addcmul(shift.to(dtype), z["h"], scales["h"].to(dtype))
        for axis in ("w", "d"):
            y.addcmul_(z[axis], scales[axis].to(dtype))
        return y

    def backward(
        self, dy: Tensor, x: Tensor, z: dict[str, Tensor], mean: Tensor, inverse_std: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the input [B, D, H, W, C] and of the parameters, in order, from that of the sum."""
        dz, d_weights, d_shifts = {}, [], []
        for i, axis in enumerate(AXES):
            statistics = (None, None, mean[i], inverse_std[i])  # running ones are not used
            gradient, d_weight, d_shift = torch.ops.aten.native_batch_norm_backward(
                _flat(dy), _flat(z[axis]), self.weights[axis], *statistics, True, 0.0, [True, True, True]
            )
            dz[axis] = gradient.movedim(1, -1).reshape(dy.shape)
            d_weights.append(d_weight)
            d_shifts.append(d_shift)
        d_kernels = [kernel_gradient(dz[axis], x, self.kernels[axis], axis, self.groups) for axis in AXES]
        back = {axis: transposed(kernel, self.groups) for axis, kernel in self.kernels.items()}
        dx = AxisSum(back, None, dy.dtype, self.groups, shared_input=False).of(dz)
        return dx, [*d_kernels, *(torch.zeros_like(bias) for bias in self.biases.values()), *d_weights, *d_shifts]


class NativeBranches(Branches):
    """The same by the C++ kernels: dense kernels of length 3 and depth-wise ones, float32 or bfloat16."""

    def convolve(self, x: Tensor) -> dict[str, Tensor]:
        return {axis: native.convolve(x, self.kernels[axis], axis)[0] for axis in AXES}

    def measure(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        z, sums = zip(*(native.convolve(x, self.kernels[axis], axis) for axis in AXES), strict=True)
        mean, square = (torch.stack(sums) / x[..., 0].numel()).unbind(1)  # [3, C']
        dtype = self.weights["h"].dtype
        variance = (square - mean.square()).clamp(min=0)
        return dict(zip(AXES, z, strict=True)), mean.to(dtype), variance.to(dtype)

    def normalised_sum(self, z: dict[str, Tensor], mean: Tensor, inverse_std: Tensor) -> Tensor:
        scale = self._stacked(self.weights) * inverse_std  # [3, C']
        shift = (self._stacked(self.shifts) - scale * mean).sum(0)
        return native.normalised_sum([z[axis] for axis in AXES], scale.float(), shift.float())

    def backward(
        self, dy: Tensor, x: Tensor, z: dict[str, Tensor], mean: Tensor, inverse_std: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        count, dtype = x[..., 0].numel(), inverse_std.dtype
        mean, inverse_std = mean.double(), inverse_std.double()
        total, *with_z = native.gradient_sums(dy, [z[axis] for axis in AXES], mean.float())
        d_weights = inverse_std * torch.stack(with_z)  # [3, C']
        scale = self._stacked(self.weights) * inverse_std
        of_z = -scale * inverse_std * d_weights / count
        affine = torch.stack([scale, of_z, -scale * total / count - of_z * mean], dim=1).float()  # [3, 3, C']
        dx, d_kernels = None, []
        for i, axis in enumerate(AXES):  # the gradient of a branch's output is affine[i] of dy and z
            kernel, combined = self.kernels[axis], (z[axis], affine[i])
            back = native.prepare(transposed(kernel, self.groups))
            dx, d_kernel = native.gradients(x, dy, combined, kernel, back, axis, add_to=dx)
            d_kernels.append(d_kernel)
        no_effect = [torch.zeros_like(bias) for bias in self.biases.values()]
        return dx, [*d_kernels, *no_effect, *d_weights.to(dtype), *[total.to(dtype)] * len(AXES)]

    def _stacked(self, of_axes: dict[str, Tensor]) -> Tensor:
        return torch.stack([of_axes[axis] for axis in AXES])


def branches_of(groups: int, parameters: tuple[Tensor, ...]) -> Branches:
    """The fastest `Branches` for these parameters."""
    kernel = parameters[0]
    return (NativeBranches if native.take(kernel.dtype, kernel, groups) else Branches)(groups, parameters)


def mean_and_variance(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of [B, D, H, W, C] over all places, in `dtype`.

    torch sums channels-last tensors in one go, and over 100,000 float32 values loses two digits. Every 64th place is
    given to it as a channel of its own, and what it finds is put together in float64.
    """
    channels = x.shape[-1]
    parts = math.gcd(x[..., 0].numel(), 64)
    unused = x.new_zeros(parts * channels, dtype=dtype)  # running statistics, whose dtype is that of the result
    found = torch.batch_norm_update_stats(_flat(x.reshape(1, -1, 1, 1, parts * channels)), unused, unused, 0.0)
    means, variances = (part.double().view(parts, channels) for part in found)
    mean = means.mean(0)
    return mean.to(dtype), (variances + (means - mean).square()).mean(0).to(dtype)


def transposed(kernel: Tensor, groups: int = 1) -> Tensor:
    """The kernel that takes a gradient back through the convolution with [C', C / groups, k]; groups are 1 or C."""
    return kernel.flip(2) if groups > 1 else kernel.flip(2).transpose(0, 1)


def kernel_gradient(dz: Tensor, x: Tensor, kernel: Tensor, axis: str, groups: int = 1) -> Tensor:
    """The gradient [C', C / groups, k] of a kernel from a convolution's output gradient and input, [B, D, H, W, .].

    oneDNN is fast for depth-wise kernels along the first axis of an image that is no shorter than they are, and for
    dense ones, along d, in volumes.
    """
    kernel = kernel.contiguous()
    if groups > 1:
        before, size, behind = native.lines(x, axis)
        dtype = native.multiplied(x.dtype)
        pair = [t.reshape(before, size, behind, -1).to(dtype) for t in (dz, x)]
        weight = kernel.unsqueeze(-1).to(dtype)
        if size < kernel.shape[-1]:
            pair = [F.pad(t, (0, 0, 0, 0, 0, kernel.shape[-1] - size)) for t in pair]
    elif axis == "d":
        pair, weight = (dz, x), kernel[..., None, None]
    else:
        pair, weight = (images(t, axis) for t in (dz, x)), as_2d(kernel, axis)
    padding = [size // 2 for size in weight.shape[2:]]
    ones, zeros = [1] * len(padding), [0] * len(padding)
    gradients = torch.ops.aten.convolution_backward(
        *(t.movedim(-1, 1) for t in pair), weight, None, ones, padding, ones, False, zeros, groups, [False, True, False]
    )
    return gradients[1].reshape(kernel.shape).to(kernel.dtype)


def _flat(x: Tensor) -> Tensor:
    """[B, D, H, W, C] -> [1, C, B * D * H * W, 1], a view: the form of channels-last in which batch norm is fast."""
    return x.reshape(1, -1, 1, x.shape[-1]).movedim(-1, 1)
