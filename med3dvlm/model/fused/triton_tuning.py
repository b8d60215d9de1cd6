"""How functions run on a GPU: in the fastest of several ways, or compiled by torch.

A way is the size of a Triton kernel's tiles, or a library's function; each is timed at the first call. In Triton's
interpreter (TRITON_INTERPRET=1) and under `torch.use_deterministic_algorithms` the first is taken untimed: ways round
differently, and what a stopwatch chooses need not be the same in the next run.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
import triton.testing
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from med3dvlm.model.fused import triton_kernels

Way = TypeVar("Way")
INTERPRETED = not isinstance(triton_kernels.sum_kernel, triton.JITFunction)
_chosen: dict[tuple, object] = {}


def tuned(name: str, x: Tensor, weight: Tensor, ways: list[Way], run: Callable[[Way], Tensor]) -> Tensor:
    """`run` with the fastest way for this device, dtype and order of magnitude of x [.., C], and size of the weight."""
    with torch.cuda.device_of(x):  # Triton launches on the current one
        if len(ways) == 1 or INTERPRETED or torch.are_deterministic_algorithms_enabled():
            return run(ways[0])
        key = (name, x.device, x.dtype, weight.shape, (x.numel() // x.shape[-1]).bit_length())
        if key not in _chosen:
            _chosen[key] = fastest(ways, run)
        return run(_chosen[key])


def compiled_for(x: Tensor, function: Callable, *sizes: int) -> Callable:
    """A function as compiled for a GPU, with a form of its own for these sizes; as it is for tensors elsewhere."""
    return _compiled(function, sizes) if x.is_cuda and not INTERPRETED else function


@functools.cache
def _compiled(function: Callable, sizes: tuple[int, ...]) -> Callable:
    """torch remembers for each code object, by file, line and name, which sizes vary, and compiles it eight times only.

    As one function for all widths it would soon run uncompiled, and until then with widths that are no constants.
    """
    name = "_".join([function.__name__, *map(str, sizes)])
    code = function.__code__.replace(co_name=name, co_qualname=name)
    return torch.compile(types.FunctionType(code, function.__globals__, name, function.__defaults__))


def try_out(device: torch.device) -> None:
    """Compile and run a small kernel; RuntimeError, OSError or SubprocessError say why that is impossible."""
    one = torch.zeros(1, device=device)
    try:
        with torch.cuda.device_of(one):
            triton_kernels.trial_kernel[(1,)](one)
    except TritonError as error:
        raise RuntimeError(str(error)) from error
    if one.item() != 1:
        raise RuntimeError("a kernel that writes 1 did not")


def fastest(ways: list[Way], run: Callable[[Way], Tensor]) -> Way:
    """The way in which `run` takes the least time; those that the GPU has no room for are left out."""
    return min(ways, key=lambda way: _milliseconds(run, way))


def _milliseconds(run: Callable[[Way], Tensor], way: Way) -> float:
    try:
        return triton.testing.do_bench(lambda: run(way), warmup=5, rep=20, return_mode="median")
    except OutOfResources:  # this GPU has too few registers or too little shared memory for the tile
        return float("inf")
