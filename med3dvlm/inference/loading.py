"""Load a model for inference: the weights, what is saved beside them, and whether both belong together."""

import os

import torch

from med3dvlm.configuration import CLIPConfig, VLMConfig
from med3dvlm.inference.clip import ImageTextEncoder
from med3dvlm.inference.model import Med3DVLM
from med3dvlm.inference.quantize import check_quantization, load_quantized
from med3dvlm.inference.results import CheckpointError, DeviceError
from med3dvlm.model.clip import CLIPModel
from med3dvlm.model.published import device_of
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.model.weights import checkpoint_errors
from med3dvlm.processing import VLMProcessor, load_preprocess, load_tokenizer

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name_or_path: str | os.PathLike,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
) -> Med3DVLM:
    """Load a language model with its processor from a local folder or a hub name.

    Args:
        device: "auto" takes the first GPU where there is one.
        dtype: "auto" keeps the dtype of the stored tensors; or "float32", "bfloat16", "float16".
        quantization: None; "int8", on every device; "4bit", on a CUDA device with bitsandbytes. Of the language
            model's blocks only: encoder, projector, embeddings and output layer keep their dtype.

    Raises:
        CheckpointError: not a complete checkpoint of this architecture, or of parts that don't belong together.
        DeviceError: a device that is not there.
        ValueError: a dtype or quantization that is not known; `QuantizationError` where it cannot be done here.
    """
    kept, target = dtype_of(dtype), usable_device(device)
    check_quantization(quantization, target)
    name = os.fspath(name_or_path)
    if quantization is None:
        model = VLMForCausalLM.from_pretrained(name, dtype=kept, device_map=target)
    else:
        model = load_quantized(name, quantization, kept, target)
    processor = VLMProcessor.from_pretrained(name, config=model.config)
    check_parts(model, processor, name)
    return Med3DVLM(model, processor)


def load_clip(
    name_or_path: str | os.PathLike, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> ImageTextEncoder:
    """Load a dual encoder with its tokenizer and preprocessing; arguments and errors as in `load_model`."""
    kept, target = dtype_of(dtype), usable_device(device)
    name = os.fspath(name_or_path)
    model = CLIPModel.from_pretrained(name, dtype=kept, device_map=target)
    with checkpoint_errors(name):
        tokenizer, (preprocess, training_data) = load_tokenizer(name), load_preprocess(name, model.config)
    check_same(name, "the size of the image (D, H, W)", preprocess.size, image_size(model.config))
    return ImageTextEncoder(model, tokenizer, preprocess, training_data)


def dtype_of(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of a name of `DTYPES`, or of one of torch's own; None where the stored one is kept."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[name]


def usable_device(device: str | torch.device) -> torch.device:
    """A device that computes. Raises DeviceError for one that is not there, or for "meta", which holds no numbers."""
    target = device_of(device)
    if target.type == "meta":
        raise DeviceError("device meta holds no numbers: nothing can be answered there")
    return target


def check_parts(model: VLMForCausalLM, processor: VLMProcessor, name: str) -> None:
    """Raise CheckpointError where the files of a folder are of different models, before the first question fails."""
    config, tokenizer = model.config, processor.tokenizer
    facts = {  # what -> as processor and tokenizer have it, as the model has it
        "the number of image tokens": (processor.num_image_tokens, model.num_image_tokens),
        "the size of the image (D, H, W)": (processor.preprocess.size, image_size(config)),
    }
    if config.image_splice == "placeholder":
        facts[f"the id of {processor.image_token}"] = (processor.image_token_id, config.image_token_id)
    for what, (found, expected) in facts.items():
        check_same(name, what, found, expected)
    if len(tokenizer) > config.vocab_size:
        check_same(name, "the number of tokens", len(tokenizer), config.vocab_size)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{name}: its tokenizer has no end token, so no answer would end; put the tokenizer_config.json of its "
            "language model there"
        )


def image_size(config: CLIPConfig | VLMConfig) -> tuple[int, int, int]:
    """(D, H, W) of a model's images; its config has H, W, D."""
    height, width, depth = config.input_size
    return depth, height, width


def check_same(name: str, what: str, found, expected) -> None:
    """Raise CheckpointError where the processor's files of a checkpoint say something else than its model."""
    if found != expected:
        raise CheckpointError(
            f"{name}: {what} is {found} in the files of its processor and tokenizer, {expected} in its model; take all "
            "files from one checkpoint"
        )
