"""The dual encoder: scans and texts in one space, and which text belongs to which scan."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from med3dvlm.data.preprocess import PreprocessConfig
from med3dvlm.data.profile import DataProfile
from med3dvlm.inference.model import DTYPES
from med3dvlm.inference.results import QuestionError, Scan
from med3dvlm.model.clip import CLIPModel
from med3dvlm.model.losses import info_nce_logits, siglip_logits
from med3dvlm.model.published import device_of
from med3dvlm.processing import load_preprocess, load_tokenizer, see


@dataclass(frozen=True)
class Ranking:
    """How well S scans and T texts belong together.

    similarity: float32 `[S, T]`, cosine, in [-1, 1].
    probabilities: float32 `[S, T]`: of each scan over the texts given, which sum up to 1; one of them is taken to be
        right. The softmax of similarity times the scale that training learned.
    order: `[S, T]`, the texts' numbers for each scan, the best first.
    """

    similarity: torch.Tensor
    probabilities: torch.Tensor
    order: torch.Tensor


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
        return self.model.encode_image(images.to(self.model.device, self.model.dtype)).float().cpu()

    @torch.inference_mode()
    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B, T]`` and their mask to features ``[B, width]``, float32 on the CPU."""
        device = self.model.device
        return self.model.encode_text(input_ids.to(device), attention_mask.to(device)).float().cpu()

    def embed_image(self, scan: Scan, **reading) -> torch.Tensor:
        """The feature ``[width]`` of one scan: a path, a `Volume`, or a preprocessed image ``[1, D, H, W]``.

        Raises:
            VolumeError: it cannot be read or used.
        """
        if not isinstance(scan, torch.Tensor):
            scan = see(scan, self.preprocess, self.training_data, **reading)[0]
        return self.encode_images(scan[None])[0]

    def embed_text(self, text: str) -> torch.Tensor:
        """The feature ``[width]`` of one text; what exceeds the text encoder's positions is cut off, as in training.

        Raises:
            QuestionError: the text is empty.
        """
        if not text.strip():
            raise QuestionError("the text is empty: write one")
        longest = getattr(self.model.config.text_encoder_config, "max_position_embeddings", None)
        tokens = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        return self.encode_texts(tokens["input_ids"], tokens["attention_mask"])[0]

    def rank(self, scans: Sequence[Scan], texts: Sequence[str], **reading) -> Ranking:
        """Compare each of S scans with each of T texts. Errors as in `embed_image` and `embed_text`."""
        images = torch.stack([self.embed_image(scan, **reading) for scan in scans])  # [S, width]
        words = torch.stack([self.embed_text(text) for text in texts])  # [T, width]
        model = self.model
        with torch.inference_mode():
            if model.config.loss_type == "sigmoid":
                logits = siglip_logits(images, words, model.t_prime.cpu(), model.bias.cpu())  # [S, T]
            else:
                logits = info_nce_logits(images, words, model.logit_scale.cpu())  # [S, T]
        return Ranking(images @ words.T, logits.softmax(dim=1), logits.argsort(dim=1, descending=True, stable=True))


def load_clip(name_or_path: str | os.PathLike, device: str = "auto", dtype: str = "auto") -> ImageTextEncoder:
    """Load a dual encoder with its tokenizer and preprocessing; arguments and errors as in `load_model`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    name = os.fspath(name_or_path)
    model = CLIPModel.from_pretrained(name, dtype=DTYPES[dtype])
    return ImageTextEncoder(model.to(device_of(device)), load_tokenizer(name), *load_preprocess(name, model.config))
