"""Chooses the image encoder that a configuration names."""

from torch import nn

from med3dvlm.model.dcformer import DCFormer
from med3dvlm.model.vit3d import ViT3D

ENCODERS = ("dcformer", "vit3d")


def build_vision_encoder(config) -> nn.Module:
    """Build the encoder of a `CLIPConfig` (its `vision_encoder`) or a `VLMConfig` (its `vision_tower`).

    Every encoder maps volumes [B, 1, D, H, W] to a list of hidden states [B, tokens, channels], low to high level, and
    has `channels` (one width per hidden state), `token_grid(level)` and `num_tokens(level)`.

    Args:
        config: also has `input_size` (H, W, D) and `vision_variant` (dcformer) or `dim`, `depth`, `patch_size` (vit3d).
    Raises:
        ValueError: unknown encoder or variant.
    """
    name = config.vision_encoder if hasattr(config, "vision_encoder") else config.vision_tower
    if name == "dcformer":
        return DCFormer.from_variant(config.vision_variant, config.input_size)
    if name == "vit3d":
        return ViT3D(config.input_size, config.patch_size, config.dim, config.depth)
    raise ValueError(f"unknown vision encoder {name!r}; known: {', '.join(ENCODERS)}")
