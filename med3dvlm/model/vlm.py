"""Qwen2.5 that sees volumes: an image encoder and a projector turn a volume into tokens of the language model.

Notable:
- the language model is transformers' own `Qwen2ForCausalLM`; this file adds the image path and what trains when;
- image features enter in one of two ways, chosen by `config.image_splice`: at the `<im_patch>` positions (what we
  train), or where the published code writes them, so that published checkpoints answer as published;
- `freeze(stage)` is the only place that says what trains; what is frozen stays in eval mode;
- image features can be computed once (`encode_images`) and passed to any number of `forward` or `generate` calls.

Shapes: B batch, T sequence, N image tokens, H width of the language model.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from med3dvlm.configuration import VLMConfig
from med3dvlm.model.encoder import build_vision_encoder
from med3dvlm.model.packing import packed_attention_mask
from med3dvlm.model.projector import build_projector, check_projector_sizes, projector_tokens, takes_two_streams
from med3dvlm.model.published import PublishedLayout, cast, check_model_type, local_folder, main_dtype
from med3dvlm.model.splice import splice_as_published, splice_at_placeholders
from med3dvlm.model.weights import load_strict, parameters_on_meta, read_weights, resize_rows

logger = logging.getLogger(__name__)

# Parts that train in each stage (as published); LoRA matrices train in the "lora" stage too.
STAGES = {
    "projector": ("projector", "embeddings"),
    "lora": ("image encoder", "projector", "embeddings", "lm_head"),
    "all": ("image encoder", "projector", "embeddings", "language blocks", "final norm", "lm_head"),
}


class VisionTower(nn.Module):
    """Holds the encoder under the published name `vision_tower.vision_tower`."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.vision_tower = build_vision_encoder(config)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 1, D, H, W] -> hidden states [B, tokens, channels], low to high level."""
        return self.vision_tower(images.to(next(self.parameters()).dtype))


class VLMForCausalLM(PublishedLayout, Qwen2ForCausalLM):
    """The language model with images (Med3DVLM paper; key names of the published checkpoints).

    Raises:
        ValueError: the projector's sizes don't fit the encoder's hidden states for `config.input_size`.
    """

    config_class = VLMConfig
    published_architecture = "VLMQwenForCausalLM"

    def __init__(self, config: VLMConfig):
        super().__init__(config)
        self._add_vision(config)

    def _add_vision(self, config: VLMConfig) -> None:
        """Build the image path, freshly initialised."""
        self.model.vision_tower = VisionTower(config)
        self.model.mm_projector = build_projector(config)
        encoder = self.model.vision_tower.vision_tower
        top = len(encoder.channels) - 1
        check_projector_sizes(config, encoder)
        self.num_image_tokens = projector_tokens(config, encoder.num_tokens(top - 1), encoder.num_tokens(top))

    # ---------------------------------------------------------------- images into the sequence

    def encode_images(self, images: Tensor) -> Tensor:
        """Volumes [B, 1, D, H, W] in [0, 1] -> image tokens [B, N, H]."""
        if images.ndim != 5 or images.shape[1] != 1:
            raise ValueError(f"images must be [batch, 1, depth, height, width], got {list(images.shape)}")
        hidden = self.model.vision_tower(images)  # five times [B, tokens, channels]
        return self.model.mm_projector(hidden[-2:] if takes_two_streams(self.config) else hidden[-1])  # [B, N, H]

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Tensor | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, T], with images [B, 1, D, H, W] or their features [B, N, H] -> embeddings [B, T, H].

        Raises:
            ValueError: a row has no room for the image tokens, or another number of `<im_patch>` tokens.
        """
        embeds = self.get_input_embeddings()(input_ids)  # [B, T, H]
        if image_features is None and images is not None:
            image_features = self.encode_images(images)
        if image_features is None:
            return embeds
        if len(image_features) != len(input_ids):
            raise ValueError(f"{len(input_ids)} rows of text, but images for {len(image_features)}")
        image_features = image_features.to(embeds.device, embeds.dtype)
        if self.config.image_splice == "placeholder":
            return splice_at_placeholders(embeds, image_features, input_ids == self.config.image_token_id)
        return splice_as_published(embeds, image_features, attention_mask)

    # ---------------------------------------------------------------- forward and generate

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | None = None,
        image_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        turn_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary] and, with labels [B, T] (-100: not counted), the mean next-token cross-entropy.

        Args:
            input_ids: [B, T]; attention_mask: [B, T], 1 where attended.
            images: [B, 1, D, H, W] in [0, 1], or image_features: [B, N, H] of `encode_images`; neither: text only.
            turn_ids, position_ids: [B, T] of independent questions about one image, see `med3dvlm.model.packing`.
        Raises:
            ValueError: see `embed`.
        """
        if images is not None or image_features is not None:
            if input_ids is None:
                raise ValueError("images need input_ids: the place of the image tokens is read from them")
            inputs_embeds = self.embed(input_ids, attention_mask, images, image_features)
            input_ids = None
        if turn_ids is not None:
            attention_mask = packed_attention_mask(turn_ids, self.dtype)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """New tokens [B, new] only, for prompts [B, T] (left-padded, with their mask) and images as in `forward`.

        `kwargs` go to transformers' `generate` (max_new_tokens, do_sample, eos_token_id, pad_token_id, streamer, ...).
        """
        # Given embeddings instead of ids, transformers returns (and streams) only what comes after them.
        embeds = self.embed(input_ids, attention_mask, images, image_features)
        return super().generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    # ---------------------------------------------------------------- what trains

    def _parts(self) -> dict[str, nn.Module]:
        return {
            "image encoder": self.model.vision_tower,
            "projector": self.model.mm_projector,
            "embeddings": self.model.embed_tokens,
            "language blocks": self.model.layers,
            "final norm": self.model.norm,
            "lm_head": self.lm_head,
        }

    def freeze(self, stage: str) -> dict[str, tuple[int, int]]:
        """Set what trains in a stage ("projector", "lora" or "all") and log it; adapters must have been added before.

        Tied embeddings train as the lm_head too, since both are one tensor.

        Returns:
            Per part its numbers of (trainable, frozen) parameters; a tied tensor counts as embeddings.
        Raises:
            ValueError: unknown stage.
        """
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
        parts = self._parts()
        trained = {id(p) for name in STAGES[stage] for p in parts[name].parameters()}
        if stage == "lora":
            trained |= {id(p) for name, p in self.named_parameters() if "lora_" in name}
        for parameter in self.parameters():
            parameter.requires_grad = id(parameter) in trained
        counts, seen = {}, set()
        for name, part in parts.items():
            own = [p for p in part.parameters() if id(p) not in seen]
            seen |= {id(p) for p in own}
            trainable = sum(p.numel() for p in own if p.requires_grad)
            counts[name] = (trainable, sum(p.numel() for p in own) - trainable)
            logger.info("stage %s: %s: %d parameters train, %d are frozen", stage, name, *counts[name])
        self.train(self.training)
        return counts

    def train(self, mode: bool = True) -> "VLMForCausalLM":
        """As `nn.Module.train`, but parts without a trainable parameter stay in eval mode (batch norm, dropout)."""
        super().train(mode)
        for part in self._parts().values():
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        for layer in self.model.layers:
            # A decoder layer checkpoints in train mode only; the flag of the layer itself does nothing else.
            layer.training = mode and (layer.training or layer.gradient_checkpointing)
        return self

    # ---------------------------------------------------------------- from a plain language model

    @classmethod
    def from_language_model(
        cls, name_or_path: str, config_overrides: dict[str, Any] | None = None, dtype: torch.dtype | str = "auto"
    ) -> "VLMForCausalLM":
        """Build on a Qwen2 checkpoint (folder or hub name): its weights, a new image encoder and a new projector.

        The embeddings are resized to `config_overrides["vocab_size"]` rows (default: one more), the row of `<im_patch>`
        (`config_overrides["image_token_id"]`, default: the last) becomes the mean of all others, as published.

        Args:
            config_overrides: keys of `VLMConfig`; `image_splice` defaults to "placeholder" here.
            dtype: of the whole model; "auto" is the dtype of the stored language model.
        Raises:
            CheckpointError: not a Qwen2 model, or weights that don't fit its config.
            ValueError: sizes that don't fit (see the class).
        """
        folder = local_folder(name_or_path)
        check_model_type(folder, "qwen2")
        language = cast(read_weights(folder), dtype)
        language.setdefault("lm_head.weight", language["model.embed_tokens.weight"])  # tied: stored once
        dtype = main_dtype(language.values())
        base = Qwen2Config.from_pretrained(folder)
        values = {"image_splice": "placeholder", **base.to_dict(), "vocab_size": base.vocab_size + 1}
        values |= config_overrides or {}
        for key in ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype"):
            values.pop(key, None)
        config = cls.config_class(**values, dtype=dtype)
        config.name_or_path = str(name_or_path)
        with parameters_on_meta():
            model = cls(config)
        model._add_vision(config)
        model.model.vision_tower.to(dtype)
        model.model.mm_projector.to(dtype)
        config.proj_out_num = model.num_image_tokens

        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            language[key] = resize_rows(language[key], config.vocab_size, config.image_token_id)
        image_path = {key: value for key, value in model.state_dict().items() if not value.is_meta}
        load_strict(model, {**image_path, **language}, str(name_or_path), assign=True)
        model.tie_weights()
        # Of the base's generation settings only the end tokens: its sampling penalties would blur greedy answers.
        stored = (folder / "generation_config.json").is_file()
        settings = GenerationConfig.from_pretrained(folder) if stored else base
        model.generation_config.eos_token_id = settings.eos_token_id
        model.generation_config.pad_token_id = settings.pad_token_id
        return model.eval()


def lora_target_modules(model: nn.Module) -> list[str]:
    """Full paths of the Linear layers that get LoRA matrices: those of the language blocks, as published."""
    excluded = ("vision_tower", "mm_projector", "embed_tokens", "lm_head")
    return sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in excluded)
    )
