"""The dual encoder: scans and texts in one space, and which text belongs to which scan."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.profile import DataProfile
from med3dvlm.data.volume import Volume
from med3dvlm.inference.results import QuestionError, check_text
from med3dvlm.inference.scans import Scan, Seen, look
from med3dvlm.model.clip import CLIPModel
from med3dvlm.model.losses import info_nce_logits, siglip_logits


@dataclass(frozen=True)
class Ranking:
    """How well S scans and T texts belong together.

    similarity: float32 `[S, T]`, cosine, in [-1, 1].
    probabilities: float32 `[S, T]`: of each scan over the texts given, which sum up to 1; one of them is taken to be
        right. The softmax of similarity times the scale that training learned.
    order: `[S, T]`, the texts' numbers for each scan, the best first.
    warnings: for each scan, sentences a user should see.
    """

    similarity: torch.Tensor
    probabilities: torch.Tensor
    order: torch.Tensor
    warnings: tuple[tuple[str, ...], ...]


class ImageTextEncoder:
    """The dual encoder with its tokenizer and preprocessing: unit-norm features of images and texts.

    Args:
        model: CLIPModel, put into eval mode.
        tokenizer: of the text encoder.
        preprocess: the PreprocessConfig that training used.
        training_data: what is known of the volumes it used.
    """

    def __init__(self, model: CLIPModel, tokenizer, preprocess: PreprocessConfig, training_data: DataProfile):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.preprocess, self.training_data = preprocess, training_data

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.inference_mode()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed volumes ``[B, 1, D, H, W]`` to features ``[B, width]``, float32 on the CPU."""
        return _unit(self.model.encode_image(images.to(self.model.device, self.model.dtype)))

    @torch.inference_mode()
    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B, T]`` and their mask to features ``[B, width]``, float32 on the CPU."""
        device = self.model.device
        return _unit(self.model.encode_text(input_ids.to(device), attention_mask.to(device)))

    def see(self, scan: Scan, **reading) -> Seen:
        """A scan as the model sees it, with warnings; see `Med3DVLM.see`."""
        return look(scan, self.preprocess, self.training_data, **reading)

    def embed_image(self, scan: Scan, **reading) -> torch.Tensor:
        """The feature ``[width]`` of one scan: a path, a `Volume`, or a preprocessed image ``[1, D, H, W]``.

        Raises:
            VolumeError: it cannot be read or used.
        """
        return self.encode_images(self.see(scan, **reading).image[None])[0]

    def embed_text(self, text: str) -> torch.Tensor:
        """The feature ``[width]`` of one text; what exceeds the text encoder's positions is cut off, as in training.

        Raises:
            QuestionError: the text is empty, or none.
        """
        check_text(text, "the text")
        longest = getattr(self.model.config.text_encoder_config, "max_position_embeddings", None)
        tokens = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        return self.encode_texts(tokens["input_ids"], tokens["attention_mask"])[0]

    def rank(self, scans: Sequence[Scan], texts: Sequence[str], **reading) -> Ranking:
        """Compare each of S scans with each of T texts; one scan or text alone is taken for a list of one.

        Errors as in `embed_image` and `embed_text`.
        """
        scans = [scans] if isinstance(scans, str | os.PathLike | Volume) else list(scans)
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not scans or not texts:
            raise QuestionError("there is nothing to rank: give one scan and one text at least")
        words = torch.stack([self.embed_text(text) for text in texts])  # [T, width]
        images, warnings = [], []
        for scan in scans:
            seen = self.see(scan, **reading)
            images.append(self.encode_images(seen.image[None])[0])
            warnings.append(seen.warnings)
        images = torch.stack(images)  # [S, width]
        model = self.model
        with torch.inference_mode():
            if model.config.loss_type == "sigmoid":
                logits = siglip_logits(images, words, model.t_prime.cpu(), model.bias.cpu())  # [S, T]
            else:
                logits = info_nce_logits(images, words, model.logit_scale.cpu())  # [S, T]
        order = logits.argsort(dim=1, descending=True, stable=True)
        return Ranking(images @ words.T, logits.softmax(dim=1), order, tuple(warnings))


def _unit(features: torch.Tensor) -> torch.Tensor:
    """[B, width] as float32 on the CPU, of unit norm again: in few bits they are off by a thousandth."""
    return F.normalize(features.float(), dim=-1).cpu()
