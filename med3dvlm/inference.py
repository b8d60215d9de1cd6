"""Load a model and ask it about a scan:

    model = load_model("models/Med3DVLM-Qwen-2.5-7B")
    print(model.answer("scan.nii.gz", "Which organ is abnormal?").text)

One code path for evaluation, demo and app.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from med3dvlm.data.preprocess import PreprocessConfig
from med3dvlm.data.volume import Volume, VolumeError, load_volume
from med3dvlm.model.clip import CLIPModel
from med3dvlm.model.published import device_of
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.model.weights import CheckpointError
from med3dvlm.processing import VLMProcessor, load_tokenizer

NOTICE = "For research only. Not a medical device: do not use the answer for diagnosis or treatment."
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BAD_INPUT = (VolumeError, CheckpointError)  # what users can put right: a scan or a model that cannot be used


@dataclass(frozen=True)
class Answer:
    """What the model said, and how it came about."""

    text: str
    tokens: int  # generated, the end token included
    seconds: float  # preprocessing included, and reading where a path was given
    preprocessing: dict
    warnings: tuple[str, ...]


class Med3DVLM:
    """A language model with its processor; inference only, greedy decoding.

    Args:
        model: VLMForCausalLM, put into eval mode.
        processor: the VLMProcessor that was saved beside the weights.
    """

    def __init__(self, model: VLMForCausalLM, processor: VLMProcessor):
        self.model = model.eval()
        self.processor = processor

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed volumes ``[B, 1, D, H, W]`` to image tokens ``[B, N, hidden]``, to be asked about many times."""
        return self.model.encode_images(images.to(self.device, self.dtype))

    @torch.inference_mode()
    def generate(
        self,
        image_features: torch.Tensor,
        questions: Sequence[str],
        kind: str = "vqa",
        max_new_tokens: int = 256,
        streamer=None,
    ) -> list[list[int]]:
        """New token ids per question, cut after the end token. ``image_features``: ``[B, N, hidden]`` of `encode`."""
        tokenizer = self.processor.tokenizer
        batch = self.processor(list(questions), kind=kind)
        end = tokenizer.eos_token_id
        ids = self.model.generate(
            input_ids=batch["input_ids"].to(self.device),  # [B, T], left-padded
            attention_mask=batch["attention_mask"].to(self.device),
            image_features=image_features,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=streamer,
        )
        rows = ids.tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    def answer_batch(
        self,
        images: torch.Tensor | Sequence[str | os.PathLike] | None = None,
        questions: Sequence[str] = (),
        kind: str = "vqa",
        max_new_tokens: int = 256,
        image_features: torch.Tensor | None = None,
    ) -> list[str]:
        """Answers to ``questions``, the i-th about the i-th image.

        Args:
            images: preprocessed volumes ``[B, 1, D, H, W]``, or paths of volume files; or
            image_features: ``[B, N, hidden]`` from `encode`.
            kind: "vqa" or "caption", the two forms of the published prompt.

        Raises:
            ValueError: the numbers of images and questions differ, or neither or both kinds of image were given.
            VolumeError: a file cannot be read as a volume.
        """
        if (images is None) == (image_features is None):
            raise ValueError("give either images or image_features")
        count = len(images) if image_features is None else len(image_features)
        if count != len(questions):
            raise ValueError(f"expected one image per question, found {count} images and {len(questions)} questions")
        if image_features is None:
            if not isinstance(images, torch.Tensor):
                images = torch.stack([self.processor.load_image(path) for path in images])
            image_features = self.encode(images)
        rows = self.generate(image_features, questions, kind, max_new_tokens)
        return [text.strip() for text in self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def answer(
        self,
        image: str | os.PathLike | Volume | torch.Tensor,
        question: str,
        kind: str = "vqa",
        max_new_tokens: int = 256,
        streamer=None,
    ) -> Answer:
        """Answer one question about one scan: a path, a `Volume`, or a preprocessed image ``[1, D, H, W]``.

        Raises:
            VolumeError: the file cannot be read as a volume.
        """
        start = time.perf_counter()
        warnings = ()
        if isinstance(image, str | os.PathLike):
            image = load_volume(image)
        if isinstance(image, Volume):
            image, warnings = self.processor.load_image(image), image.warnings  # [1, D, H, W]
        ids = self.generate(self.encode(image[None]), [question], kind, max_new_tokens, streamer)[0]
        return Answer(
            text=self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
            tokens=len(ids),
            seconds=time.perf_counter() - start,
            preprocessing=self.processor.preprocess.to_dict(),
            warnings=warnings,
        )


class ImageTextEncoder:
    """The dual encoder with its tokenizer and preprocessing: unit-norm features of images and texts.

    Args:
        model: CLIPModel, put into eval mode.
        tokenizer: of the text encoder.
        preprocess: the PreprocessConfig that training used.
    """

    def __init__(self, model: CLIPModel, tokenizer, preprocess: PreprocessConfig):
        self.model, self.tokenizer, self.preprocess = model.eval(), tokenizer, preprocess

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


def load_model(name_or_path: str, device: str = "auto", dtype: str = "auto") -> Med3DVLM:
    """Load a language model with its processor from a local folder or a hub name.

    Args:
        device: "auto" takes the first GPU where there is one.
        dtype: "auto" keeps the dtype of the stored tensors; or "float32", "bfloat16", "float16".

    Raises:
        CheckpointError: not a complete checkpoint of this architecture.
    """
    model = VLMForCausalLM.from_pretrained(name_or_path, dtype=DTYPES[dtype])
    processor = VLMProcessor.from_pretrained(name_or_path, config=model.config)
    return Med3DVLM(model.to(device_of(device)), processor)


def load_clip(name_or_path: str, device: str = "auto", dtype: str = "auto") -> ImageTextEncoder:
    """Load a dual encoder with its tokenizer; arguments and errors as in `load_model`.

    Its preprocessing is the published one at the model's input size: prepared volumes pass unchanged.
    """
    model = CLIPModel.from_pretrained(name_or_path, dtype=DTYPES[dtype])
    height, width, depth = model.config.input_size
    preprocess = PreprocessConfig("published", (depth, height, width))
    return ImageTextEncoder(model.to(device_of(device)), load_tokenizer(name_or_path), preprocess)
