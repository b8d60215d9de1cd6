"""Configurations of the two models, under the published key names.

`CLIPConfig` (model_type "dec_clip") describes the dual encoder, `VLMConfig` (model_type "vlm_qwen") the language model.
Both read a published `config.json` as it is, and write one that published code and other transformers versions
can read: the rotary base as `rope_theta`, the dtype as `torch_dtype`.
"""

import math
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, Qwen2Config

IMAGE_TOKEN = "<im_patch>"
IMAGE_SPLICES = ("published", "placeholder")

# The published text encoder (medicalai/ClinicalBERT): what a config without `text_config` means.
PUBLISHED_TEXT_CONFIG = {"model_type": "distilbert", "vocab_size": 119547, "dim": 768, "n_layers": 6, "n_heads": 12,
                         "hidden_dim": 3072, "max_position_embeddings": 512}  # fmt: skip


def _published_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Rename the keys that transformers 5 introduced (`dtype`, `rope_parameters`) to the published ones."""
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return config


class CLIPConfig(PreTrainedConfig):
    """The dual encoder: a 3D image encoder and a text encoder that share one feature space.

    Args:
        vision_encoder: "dcformer" or "vit3d".
        vision_variant: DCFormer variant, one of the names in `med3dvlm.model.dcformer.VARIANTS`.
        input_size: volume size (H, W, D) in voxels.
        dim, depth, patch_size: width, blocks and patch of the ViT-3D; DCFormer's follow from its variant.
        hidden_size: width of the shared space.
        loss_type: "sigmoid" (SigLIP) or "nce" (CLIP).
        t_prime, bias: start values of the loss (log scale, offset); the SigLIP paper's where absent.
        text_config: a transformers config, or one as a dict with its `model_type`; kept as a config object. None is a
            published config, which has no such key: loading takes the sizes from the weights, building from
            the config alone takes the published encoder (see `text_encoder_config`).
        language_model_name_or_path: where the text encoder and its tokenizer came from; a record.

    Raises:
        ValueError: `text_config` without a `model_type` that transformers knows, or an unknown `loss_type`.
    """

    model_type = "dec_clip"

    def __init__(
        self,
        vision_encoder: str = "dcformer",
        vision_variant: str = "small",
        input_size: tuple[int, int, int] | list[int] = (256, 256, 128),
        dim: int = 768,
        depth: int = 12,
        patch_size: tuple[int, int, int] | list[int] = (16, 16, 16),
        hidden_size: int = 768,
        mlp_depth: int = 2,
        loss_type: str = "sigmoid",
        t_prime: float = math.log(10),
        bias: float = -10.0,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        language_model_name_or_path: str = "medicalai/ClinicalBERT",
        **kwargs: Any,
    ):
        if loss_type not in ("sigmoid", "nce"):
            raise ValueError(f"loss_type must be 'sigmoid' or 'nce', got {loss_type!r}")
        self.vision_encoder = vision_encoder
        self.vision_variant = vision_variant
        self.input_size = list(input_size)
        self.dim = dim
        self.depth = depth
        self.patch_size = list(patch_size)
        self.hidden_size = hidden_size
        self.mlp_depth = mlp_depth
        self.loss_type = loss_type
        self.t_prime = t_prime
        self.bias = bias
        self.text_config = _text_config_object(text_config)
        self.language_model_name_or_path = language_model_name_or_path
        super().__init__(**kwargs)

    @property
    def text_encoder_config(self) -> PreTrainedConfig:
        """Config of the text encoder to build: `text_config`, or the published one where the config has none."""
        return self.text_config if self.text_config is not None else _text_config_object(PUBLISHED_TEXT_CONFIG)

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds, under published keys."""
        config = _published_keys(super().to_diff_dict())
        if config.get("text_config") is None:
            config.pop("text_config", None)
        return config


def _text_config_object(text_config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig | None:
    """A transformers config from its dict form; a config object and None pass unchanged."""
    if text_config is None or isinstance(text_config, PreTrainedConfig):
        return text_config
    values = dict(text_config)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"text_config needs the 'model_type' of a transformers text encoder, got {model_type!r}")
    return CONFIG_MAPPING[model_type](**values)


class VLMConfig(Qwen2Config):
    """Qwen2.5 with an image encoder and a projector; every key of `Qwen2Config` is accepted as well.

    Args:
        vision_tower: "dcformer" or "vit3d"; vision_variant: the DCFormer variant.
        input_size: volume size (H, W, D) in voxels; dim, depth, patch_size: of the ViT-3D.
        mm_projector_type: "linear", "mlp", "low_high_mlp", "mixer" or "mhsa"; see `build_projector` for its sizes.
        mm_hidden_size: width of the encoder's last hidden state.
        low_input_size, high_input_size: `[tokens, channels]` of the two streams (mixer), or their channels
            (low_high_mlp); absent: those of the published encoder and volume size.
        low_output_size, high_output_size: tokens after each mixer layer.
        proj_out_num: number of image tokens; a record for the processor, the model computes its own.
        image_splice: "placeholder" writes image features at the `<im_patch>` positions (what we train), "published"
            writes them at positions 1..N after the first attended token. Published configs have no such key.
        image_token_id: id of `<im_patch>`; absent means the last row of the vocabulary, as published.

    Raises:
        ValueError: unknown `image_splice`.
    """

    model_type = "vlm_qwen"

    def __init__(
        self,
        vision_tower: str = "dcformer",
        vision_variant: str = "small",
        input_size: tuple[int, int, int] | list[int] = (256, 256, 128),
        dim: int = 768,
        depth: int = 12,
        patch_size: tuple[int, int, int] | list[int] = (16, 16, 16),
        vision_select_layer: int = -2,
        vision_select_feature: str = "cls_patch",
        mm_projector_type: str = "mixer",
        mm_mlp_depth: int = 2,
        mm_hidden_size: int = 768,
        low_input_size: list[int] | int | None = None,
        high_input_size: list[int] | int | None = None,
        low_output_size: list[int] | int = (192, 128),
        high_output_size: list[int] | int = (64, 128),
        proj_out_num: int = 256,
        image_splice: str | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.vision_tower = vision_tower
        self.vision_variant = vision_variant
        self.input_size = list(input_size)
        self.dim = dim
        self.depth = depth
        self.patch_size = _as_list(patch_size)
        # Read by published code only: its encoder returns all hidden states, as ours does.
        self.vision_select_layer = vision_select_layer
        self.vision_select_feature = vision_select_feature
        self.mm_projector_type = mm_projector_type
        self.mm_mlp_depth = mm_mlp_depth
        self.mm_hidden_size = mm_hidden_size
        low, high = (384, 768) if mm_projector_type == "low_high_mlp" else ([256, 384], [32, 768])
        self.low_input_size = low if low_input_size is None else _as_list(low_input_size)
        self.high_input_size = high if high_input_size is None else _as_list(high_input_size)
        self.low_output_size = _as_list(low_output_size)
        self.high_output_size = _as_list(high_output_size)
        self.proj_out_num = proj_out_num
        self.image_splice = "published" if image_splice is None else image_splice
        if self.image_splice not in IMAGE_SPLICES:
            raise ValueError(f"image_splice must be one of {', '.join(IMAGE_SPLICES)}, got {image_splice!r}")
        super().__init__(**kwargs)
        self.image_token_id = self.vocab_size - 1 if image_token_id is None else image_token_id

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds, under published keys."""
        return _published_keys(super().to_diff_dict())


def _as_list(value: Any) -> Any:
    """Tuples as lists, so that a config equals itself after a round trip through JSON; numbers pass unchanged."""
    return list(value) if isinstance(value, (tuple, list)) else value


# Defaults per training stage, chosen by `--preset`. "published" is the dataclass defaults of med3dvlm.train.arguments;
# "quickstart" is a tiny model for 32x64x64 phantoms that trains in minutes on two CPU cores (docs/decisions.md).
_QUICKSTART_VISION = {"vision_variant": "phantom", "input_size": [64, 64, 32]}
_QUICKSTART_TRAINING = {
    "adam_beta2": 0.98,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 1,
}
_QUICKSTART_VLM = _QUICKSTART_VISION | _QUICKSTART_TRAINING | {
    "mm_projector_type": "mixer",
    "low_output_size": [32, 16],
    "high_output_size": [8, 8],
    "model_max_length": 512,
    "questions_per_image": 13,
    "per_device_train_batch_size": 32,
}
# The stand-in for pre-trained language models is the same in both: published runs have no use for it.
_STAND_IN = {
    "max_steps": 600,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "warmup_ratio": 0.05,
    "adam_beta2": 0.98,
    "logging_steps": 25,
    "save_strategy": "no",
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "published": {"stand_in": _STAND_IN, "clip": {}, "projector": {}, "lora": {}},
    "quickstart": {
        "stand_in": _STAND_IN,
        "clip": _QUICKSTART_VISION | _QUICKSTART_TRAINING | {
            "hidden_size": 64,
            "max_length": 64,
            "per_device_train_batch_size": 32,
            "max_steps": 400,
            "learning_rate": 2e-3,
            "text_learning_rate": 1e-5,
            "weight_decay": 0.05,
            "t_prime": 3.0,
            "bias": -5.0,
        },
        "projector": _QUICKSTART_VLM | {"max_steps": 120, "learning_rate": 2e-3},
        "lora": _QUICKSTART_VLM | {"max_steps": 150, "learning_rate": 1e-3, "lora_dropout": 0.0},
    },
}  # fmt: skip
