"""The dual encoder: volumes and reports in one feature space, trained contrastively.

Image feature: mean over the tokens of the encoder's last hidden state, linear map, unit norm. Text feature: first
token of the last layer, linear map, unit norm. State dict as in the published checkpoints: `vision_encoder`,
`language_encoder`, `mm_vision_proj`, `mm_language_proj`, and the loss's scalars: `t_prime` and `bias` (sigmoid) or
`logit_scale` (nce).

Source: Med3DVLM (arXiv 2503.20047), contrastive pre-training. Shapes: B batch, E width of the shared space.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from med3dvlm.configuration import CLIPConfig
from med3dvlm.model.encoder import build_vision_encoder
from med3dvlm.model.losses import info_nce_logits, info_nce_loss, siglip_logits, siglip_loss
from med3dvlm.model.published import PublishedLayout

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # of InfoNCE, as in CLIP


@dataclass
class CLIPOutput(ModelOutput):
    """Result of `CLIPModel.forward`: `logits` [B, B] has a row per image of this process and a column per text."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None


class CLIPModel(PublishedLayout, PreTrainedModel):
    """Image encoder and text encoder with one linear map each; built from the config alone, without network.

    Args:
        config: `loss_type` "sigmoid" or "nce" decides which scalars and which loss.
    """

    config_class = CLIPConfig
    published_architecture = "DEC_CLIP"
    main_input_name = "images"

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        if config.loss_type == "sigmoid":
            self.t_prime = nn.Parameter(torch.tensor(float(config.t_prime)))
            self.bias = nn.Parameter(torch.tensor(float(config.bias)))
        else:
            self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.vision_encoder = build_vision_encoder(config)
        text_config = config.text_encoder_config
        self.language_encoder = without_pooler(AutoModel.from_config(text_config, dtype=torch.get_default_dtype()))
        self.mm_vision_proj = nn.Linear(self.vision_encoder.channels[-1], config.hidden_size)
        self.mm_language_proj = nn.Linear(text_config.hidden_size, config.hidden_size)
        self.post_init()

    @classmethod
    def from_text_encoder(cls, name_or_path: str, **config_values) -> "CLIPModel":
        """A model to train: a pre-trained text encoder (local folder or hub name), everything else freshly initialised.

        Args:
            config_values: keys of `CLIPConfig` other than `text_config` and `language_model_name_or_path`.
        """
        text_encoder = without_pooler(AutoModel.from_pretrained(name_or_path, dtype=torch.get_default_dtype()))
        config = CLIPConfig(
            text_config=text_encoder.config, language_model_name_or_path=str(name_or_path), **config_values
        )
        model = cls(config)
        model.language_encoder = text_encoder
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every part has initialised itself, and transformers' rule would overwrite that."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Volumes [B, 1, D, H, W] in [0, 1] -> features [B, E], rows of unit norm."""
        hidden = self.vision_encoder(images.to(self.mm_vision_proj.weight.dtype))[-1]  # [B, tokens, C]
        return F.normalize(self.mm_vision_proj(hidden.mean(dim=1)), dim=-1)  # [B, E]

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids [B, T] with their mask (1 = attended) -> features [B, E], rows of unit norm."""
        hidden = self.language_encoder(input_ids, attention_mask=attention_mask).last_hidden_state  # [B, T, C]
        return F.normalize(self.mm_language_proj(hidden[:, 0]), dim=-1)  # [B, E]

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool = True,
    ) -> CLIPOutput:
        """Features of matching pairs (row i of images and texts), their logits and the contrastive loss.

        Args:
            images: [B, 1, D, H, W] in [0, 1].
            input_ids, attention_mask: [B, T].
            return_loss: without it `loss` is None; with several processes the loss is that of their global batch.
        """
        image_features = self.encode_image(images)  # [B, E]
        text_features = self.encode_text(input_ids, attention_mask)  # [B, E]
        if self.config.loss_type == "sigmoid":
            scalars, logits_of, loss_of = (self.t_prime, self.bias), siglip_logits, siglip_loss
        else:
            scalars, logits_of, loss_of = (self.logit_scale,), info_nce_logits, info_nce_loss
        return CLIPOutput(
            loss=loss_of(image_features, text_features, *scalars) if return_loss else None,
            logits=logits_of(image_features, text_features, *scalars),  # [B, B]
            image_features=image_features,
            text_features=text_features,
        )


def without_pooler(text_encoder: PreTrainedModel) -> PreTrainedModel:
    """Drop BERT's pooler, which nothing here uses: a parameter without a gradient would stop distributed training."""
    if getattr(text_encoder, "pooler", None) is not None:
        text_encoder.pooler = None
    return text_encoder
