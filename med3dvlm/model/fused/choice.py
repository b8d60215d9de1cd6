"""Which path encodes a volume: the fastest that equals the plain one for this device, dtype and mode.

    encoder.fused = "cpu"       the default: the fused path on CPU, the plain code elsewhere
    encoder.fused = "auto"      the Triton kernels on a GPU as well (tested in Triton's interpreter, not yet on a GPU)
    encoder.fused = "off"       the plain code
    set_fused(model, "auto")    for every encoder inside a model
    MED3DVLM_FUSED=0            the plain code everywhere in this process
    MED3DVLM_FUSED=torch        fused paths, but without the compiled kernels of `native` on CPU

A path is a class that folds weights for inference and a function for a step of training. What it cannot take goes to
the plain code, and the log says so once per reason, but where torch compiles, traces or transforms.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as any_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from med3dvlm.model.fused import inference, onednn, training, triton_choice
from med3dvlm.model.fused.native import kernels as native

MODES = ("cpu", "auto", "off")
logger = logging.getLogger(__name__)


def set_fused(model: nn.Module, mode: str) -> None:
    """Set the mode of every encoder in a model; ValueError for a mode not in `MODES`."""
    if mode not in MODES:
        raise ValueError(f"unknown mode of the fused encoder {mode!r}; known: {', '.join(MODES)}")
    for module in model.modules():
        if hasattr(module, "fused_cache"):
            module.fused = mode


def choose(encoder: nn.Module, volume: Tensor) -> Callable[[Tensor], list[Tensor]] | None:
    """What encodes this volume [B, 1, D, H, W] instead of the plain code, or None."""
    if encoder.fused == "off" or _wish() == "0" or observed():
        return None
    if volume.device.type != "cpu" and encoder.fused == "cpu":
        return None
    tensors, reason = plain_tensors(encoder)
    if volume.device.type not in ("cpu", "cuda"):
        reason = f"no path for {volume.device.type}"
    if not reason:
        dtype = compute_dtype(encoder, volume)
        reason = refusal_of_mode(encoder, volume, dtype, tensors) or refusal_of_device(encoder, volume, dtype)
    if reason:
        _log_once(f"DCFormer takes its plain path: {reason}")
        return None
    if volume.device.type == "cpu":
        if encoder.fused == "auto":
            _log_once("DCFormer: no GPU, so no Triton kernels; the CPU's fused path is taken")
        fold, train = inference.FoldedEncoder, training.encode
    else:
        from med3dvlm.model.fused import triton_encoder  # Triton need not be installed

        fold, train = triton_encoder.FoldedEncoder, triton_encoder.encode
    if encoder.training:
        return functools.partial(train, encoder, dtype)
    return functools.partial(_infer, encoder, fold, dtype, tensors)


def _wish() -> str:
    """What the environment asks for."""
    wish = os.environ.get("MED3DVLM_FUSED", "")
    if wish not in ("", "0", "torch"):
        _log_once(f"MED3DVLM_FUSED={wish} changes nothing; known are 0 and torch", logging.WARNING)
    return wish


def observed() -> bool:
    """Whether torch follows every operation, which kernels would escape: while it compiles, traces or counts, for
    forward-mode gradients, function transforms, and hooks on all modules.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any_module._has_any_global_hook()
    )


def compute_dtype(encoder: nn.Module, volume: Tensor) -> torch.dtype:
    """The dtype of the plain code's convolutions: autocast's, which leaves float64 alone, or that of the weights."""
    dtype = next(encoder.parameters()).dtype
    if torch.is_autocast_enabled(volume.device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(volume.device.type)
    return dtype


def refusal_of_mode(encoder: nn.Module, volume: Tensor, dtype: torch.dtype, tensors: list[Tensor]) -> str:
    """What no path takes, whatever the device; empty if there is nothing."""
    gradients = torch.is_grad_enabled() and (volume.requires_grad or any(t.requires_grad for t in tensors))
    if gradients != encoder.training:
        return "training mode without gradients" if encoder.training else "gradients in evaluation mode"
    if encoder.training and smallest_count(encoder, volume) < 2:
        return "batch norm needs more than one value per channel"
    if any(tensor.device != volume.device for tensor in tensors):
        return f"the volume is on {volume.device}, the weights are not"
    if volume.dtype != dtype and not torch.is_autocast_enabled(volume.device.type):
        return f"the volume is {volume.dtype}, the weights are {dtype}"
    return ""


def refusal_of_device(encoder: nn.Module, volume: Tensor, dtype: torch.dtype) -> str:
    """What the path of the volume's device does not take; empty if it takes the call."""
    if volume.device.type == "cuda":
        return triton_choice.refusal(encoder, volume, dtype)
    return "" if onednn.takes(native.multiplied(dtype)) else f"oneDNN does not take {dtype} here"


def smallest_count(encoder: nn.Module, volume: Tensor) -> int:
    """Places of the batch at the last level, over which its batch norms average."""
    sizes = [(n - 1) // 4 + 1 for n in volume.shape[2:]]
    for pooled in encoder.variant.pool:
        sizes = [(n - 1) // 2 + 1 for n in sizes] if pooled else sizes
    return len(volume) * math.prod(sizes)


def plain_tensors(encoder: nn.Module) -> tuple[list[Tensor], str]:
    """The encoder's parameters and buffers, and what keeps them from being all that its result depends on."""
    tensors: list[Tensor] = []
    for module, form in zip(_modules(encoder), encoder.built, strict=False):  # a difference in number is one in form
        state = vars(module)
        hooks = state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]
        if module is not encoder and (hooks or state["_backward_pre_hooks"] or "forward" in state):
            return tensors, "layers have hooks"
        found = {name: t for name, t in (*state["_parameters"].items(), *state["_buffers"].items()) if t is not None}
        if form != form_of(module, found):
            what = type(module).__name__ if state["_modules"] else module
            return tensors, f"a layer was replaced or its settings were changed: {what}"
        if state["training"] != encoder.training:
            return tensors, "some layers are in training mode and some are not"
        for tensor in found.values():
            if hasattr(tensor, "ds_id") or type(tensor) not in (nn.Parameter, Tensor):
                return tensors, "the weights are sharded"
            if tensor.is_inference():
                return tensors, "the weights were made in inference mode, where changes cannot be noticed"
        tensors += found.values()
    return tensors, ""


def forms_of(encoder: nn.Module) -> list[tuple]:
    """What decides on the result besides the values of tensors, layer by layer. That of a new encoder is `built`."""
    found = []
    for module in _modules(encoder):
        names = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        found.append(form_of(module, names))
    return found


def form_of(module: nn.Module, tensors: Iterable[str]) -> tuple:
    """The class of one layer, the names of those inside it, its settings, the names of its own tensors."""
    layers = [name for name, layer in vars(module)["_modules"].items() if layer is not None]
    return type(module), layers, _settings(type(module))(module), set(tensors)


def _modules(encoder: nn.Module) -> Iterator[nn.Module]:
    """As `encoder.modules()`, which takes several times as long, but level by level."""
    modules = [encoder]
    for module in modules:
        yield module
        modules += [layer for layer in vars(module)["_modules"].values() if layer is not None]


@functools.cache
def _settings(kind: type) -> Callable[[nn.Module], object]:
    for base, names in _SETTINGS.items():
        if issubclass(kind, base):
            return attrgetter(*names)
    return lambda module: None


_SETTINGS = {
    nn.Conv3d: ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm3d: ("eps", "momentum", "track_running_stats"),
    nn.MaxPool3d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.GELU: ("approximate",),
}


@functools.cache
def _log_once(message: str, level: int = logging.INFO) -> None:
    logger.log(level, message)


class Cache:
    """Folded weights and what they were folded from.

    The sources are kept, so that no other tensor can come to lie at the address of one that was replaced. Writes
    through `.data` and by collectives (`all_reduce`, `broadcast`) are seen by a sample of numbers.
    """

    def __init__(self, tensors: list[Tensor], folded: Callable[[Tensor], list[Tensor]]):
        self.sources = [tensor.detach() for tensor in tensors]
        self.states, self.folded = states_of(tensors), folded
        # Those elsewhere would have to be waited for.
        on_cpu = [tensor for tensor in self.sources if tensor.device.type == "cpu"]
        self.some = [tensor[(slice(16), *[0] * (tensor.ndim - 1))] for tensor in on_cpu if tensor.ndim]
        self.sample = self._look()

    def is_current(self, tensors: list[Tensor]) -> bool:
        """Whether the present tensors are those that were folded, unchanged."""
        return self.states == states_of(tensors) and torch.equal(self.sample, self._look())

    def _look(self) -> Tensor:
        """Up to 16 numbers of each tensor on the CPU, as bytes: a NaN equals itself."""
        return torch.cat(self.some).view(torch.uint8) if self.some else torch.empty(0)


def states_of(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Addresses and version counters."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


def drop_stale(encoder: nn.Module) -> None:
    """Let go of folded weights that no longer are the encoder's."""
    tensors, _ = plain_tensors(encoder)
    encoder.fused_cache = {d: cache for d, cache in encoder.fused_cache.items() if cache.is_current(tensors)}


def _infer(encoder: nn.Module, fold: type, dtype: torch.dtype, tensors: list[Tensor], volume: Tensor) -> list[Tensor]:
    """[B, 1, D, H, W] -> the hidden states, in the dtypes that the plain code returns."""
    with torch.no_grad(), torch.autocast(volume.device.type, enabled=False):
        cache = encoder.fused_cache.get(dtype)
        if cache is None or not cache.is_current(tensors):
            cache = encoder.fused_cache[dtype] = Cache(tensors, fold(encoder, dtype))
        stem_state, *states = cache.folded(volume)
    residual = torch.promote_types(dtype, next(encoder.parameters()).dtype)
    return [stem_state.to(dtype), *(state.to(residual) for state in states)]
