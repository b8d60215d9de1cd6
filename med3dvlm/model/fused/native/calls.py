"""Calls of the compiled library with tensors, which it takes as addresses."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from med3dvlm.model.fused.native import build


def places_and_channels(x: Tensor) -> tuple[int, int]:
    """[.., C] -> the number of places, and C."""
    return x[..., 0].numel(), x.shape[-1]


def call(name: str, like: Tensor, *arguments: Tensor | int | bool | None) -> None:
    """Call a function of the library with `like`'s storage type first and the number of threads last."""
    function = getattr(build.library(), name)
    arguments = (like.dtype == torch.bfloat16, *arguments, torch.get_num_threads())
    if function.argtypes is None:  # set once: what an argument may be follows from its position
        function.argtypes, function.restype = [_type_of(argument) for argument in arguments], None
    function(*(_address(argument) if isinstance(argument, Tensor) else argument for argument in arguments))


def _type_of(argument: Tensor | int | bool | None) -> type:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_bool if isinstance(argument, bool) else ctypes.c_long


def _address(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError(f"kernels take contiguous tensors, found strides {tensor.stride()} of {tensor.shape}")
    return tensor.data_ptr()
