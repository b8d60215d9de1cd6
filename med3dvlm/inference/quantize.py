"""The language model's blocks in 8 bits (any device, no further library) or in 4 bits (CUDA, bitsandbytes).

What sees the image (encoder, projector) and what reads and writes words (embeddings, lm_head) stays as it is: together
a small part of the weights of a large model.

8 bits are weight-only: each row of a weight matrix is divided by its largest value and rounded to -127..127, inputs and
sums keep their dtype, however unevenly the inputs are distributed. Source of 4 bits: NF4 of QLoRA (arXiv 2305.14314).
"""

import re
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.inference.results import QuantizationError
from med3dvlm.model.vlm import VLMForCausalLM, lora_target_modules

QUANTIZATIONS = (None, "int8", "4bit")
BLOCK_WEIGHT = re.compile(r"model\.layers\.\d+\..*_proj\.weight")
# Up to this many rows torch's kernel on 8-bit weights is faster than expanding them to bfloat16 first (measured).
FEW_ROWS = 4
ROWS_AT_ONCE = 256


def check_quantization(quantization: str | None, device: torch.device) -> None:
    """Raise ValueError for an unknown name, QuantizationError for what this machine cannot do."""
    if quantization not in QUANTIZATIONS:
        known = ", ".join(map(str, QUANTIZATIONS))
        raise ValueError(f"quantization must be one of {known}, not {quantization!r}")
    if quantization == "4bit" and (device.type != "cuda" or find_spec("bitsandbytes") is None):
        raise QuantizationError(
            "4bit needs a CUDA device and bitsandbytes (pip install bitsandbytes); int8 works on every device"
        )


def load_quantized(name: str, quantization: str, dtype: torch.dtype | None, device: torch.device) -> VLMForCausalLM:
    """Load a language model with quantized blocks onto `device`.

    8 bits: each tensor is converted as it is read, so that the unquantized model is never in memory. 4 bits: each
    layer is converted as it moves to the device.

    Raises:
        CheckpointError: see `VLMForCausalLM.from_pretrained`.
    """
    if quantization == "int8":
        return VLMForCausalLM.from_pretrained(name, quantizer=Int8Quantizer(dtype), device_map=device)
    model = VLMForCausalLM.from_pretrained(name, dtype=dtype)
    return blocks_to_4bit(model, device).to(device)


class Int8Linear(nn.Module):
    """A linear layer with weights in 8 bits: `[..., in] -> [..., out]`, y = (x Wq^T) * scale + bias.

    Args, kept as buffers: weight int8 [out, in]; scale [out] and bias [out] or None, in the dtype of the inputs.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [M, in]
        if len(rows) <= FEW_ROWS and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)  # [M, out]
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale  # [M, out]
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


def to_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] as int8, and in `dtype` the scale [out] of its rows (1 for a row of zeros).

    Values are rounded after division by the scale as it is stored, so they are off by half a step at most.
    """
    quantized = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=dtype)
    # In blocks: temporary matrices between those that stay would leave holes in memory, three times the model's size.
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        block = weight[rows].to(torch.float32, copy=True)  # [rows, in]
        scale[rows] = block.abs().amax(dim=1) / 127
        scale[rows] = torch.where(scale[rows] == 0, 1, scale[rows])
        quantized[rows] = block.div_(scale[rows].float()[:, None]).round_().clamp_(-127, 127)
    return quantized, scale


class Int8Quantizer:
    """For `from_pretrained(quantizer=)`: linear layers of the language blocks become `Int8Linear`.

    Args:
        dtype: of what stays floating-point; None keeps the stored one.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype

    def convert(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        if not BLOCK_WEIGHT.fullmatch(key):
            return {key: tensor.to(dtype, copy=True)}
        weight, scale = to_int8(tensor, dtype)
        return {key: weight, f"{key.removesuffix('weight')}scale": scale}

    def prepare(self, model: VLMForCausalLM) -> None:
        for name in lora_target_modules(model):
            linear = model.get_submodule(name)
            weight = torch.empty(linear.weight.shape, dtype=torch.int8, device="meta")
            scale = torch.empty(len(weight), device="meta")
            bias = None if linear.bias is None else torch.empty_like(scale)
            model.set_submodule(name, Int8Linear(weight, scale, bias))


def blocks_to_4bit(model: VLMForCausalLM, device: torch.device) -> VLMForCausalLM:
    """Replace the linear layers of the language blocks by bitsandbytes' NF4 ones, one after the other."""
    import bitsandbytes as bnb  # here: an optional package

    for name in lora_target_modules(model):
        linear = model.get_submodule(name)
        small = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=small)
        small.bias = linear.bias
        model.set_submodule(name, small.to(device))  # moving is what quantizes
    return model
