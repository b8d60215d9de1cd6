"""Complete checkpoints of a few hundred thousand parameters, made in a moment through the public classes.

Weights are random but always the same. They fit the data of `tests.helpers.tiny_data` written with `size=TINY_SIZE`.
"""

from pathlib import Path

import torch
from transformers import DistilBertConfig, DistilBertModel, Qwen2Config, Qwen2ForCausalLM

from med3dvlm.configuration import CLIPConfig, VLMConfig
from med3dvlm.data.preprocess import PreprocessConfig
from med3dvlm.model.clip import CLIPModel
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.processing import VLMProcessor
from tests.helpers.tiny_data import clip_tokenizer, vlm_tokenizer

TINY_SIZE = (32, 64, 64)  # D, H, W: DCFormer's last two hidden states have 4 and 1 tokens
TINY_ENCODER = {"vision_variant": "nano", "input_size": [64, 64, 32]}  # H, W, D
TINY_TEXT = {"vocab_size": 424, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
TINY_LANGUAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 64, "max_position_embeddings": 512}  # fmt: skip
TINY_PROJECTORS = {
    "linear": {},
    "mlp": {},
    "mhsa": {"num_heads": 4},
    "low_high_mlp": {"low_input_size": 128, "high_input_size": 256},
    "mixer": {"low_input_size": [4, 128], "high_input_size": [1, 256], "low_output_size": [6, 4],
              "high_output_size": [3, 2]},
}  # fmt: skip


def tiny_vlm_config(projector: str = "mixer", **overrides) -> VLMConfig:
    """Placeholder splice, golden tokenizer; `overrides` are keys of `VLMConfig`."""
    tokenizer = vlm_tokenizer()
    values = {
        "vision_tower": "dcformer",
        **TINY_ENCODER,
        **TINY_LANGUAGE,
        "vocab_size": len(tokenizer),
        "mm_projector_type": projector,
        "mm_hidden_size": 256,
        **TINY_PROJECTORS[projector],
        "image_splice": "placeholder",
        "image_token_id": tokenizer.convert_tokens_to_ids("<im_patch>"),
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return VLMConfig(**{**values, **overrides})


def write_tiny_vlm(folder, projector: str = "mixer", seed: int = 0, **overrides) -> Path:
    """A full language model folder with tokenizer and processor."""
    model = _seeded(seed, lambda: VLMForCausalLM(tiny_vlm_config(projector, **overrides)))
    model.config.proj_out_num = model.num_image_tokens
    model.save_pretrained(folder)
    steps = PreprocessConfig("published", TINY_SIZE)
    VLMProcessor(vlm_tokenizer(), model.num_image_tokens, steps).save_pretrained(folder)
    return Path(folder)


def write_tiny_clip(folder, seed: int = 0, **overrides) -> Path:
    """A dual encoder folder with tokenizer; `overrides` are keys of `CLIPConfig`."""
    values = {**TINY_ENCODER, "hidden_size": 32, "text_config": {"model_type": "distilbert", **TINY_TEXT}}
    _seeded(seed, lambda: CLIPModel(CLIPConfig(**{**values, **overrides}))).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return Path(folder)


def write_tiny_language_model(folder, seed: int = 0, **overrides) -> Path:
    """A plain Qwen2 folder with tokenizer, to build a `VLMForCausalLM` on; `overrides` are keys of `Qwen2Config`."""
    tokenizer = vlm_tokenizer()
    values = {**TINY_LANGUAGE, "vocab_size": 424, "tie_word_embeddings": False, "bos_token_id": None,
              "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    _seeded(seed, lambda: Qwen2ForCausalLM(Qwen2Config(**{**values, **overrides}))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_tiny_text_encoder(folder, seed: int = 0) -> Path:
    """A plain DistilBERT folder with tokenizer, to start the contrastive stage from."""
    _seeded(seed, lambda: DistilBertModel(DistilBertConfig(**TINY_TEXT))).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return Path(folder)


def _seeded(seed: int, build) -> torch.nn.Module:
    """Build a module with weights that follow from the seed, leaving the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()
