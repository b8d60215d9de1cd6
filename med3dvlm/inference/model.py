"""The language model with its processor: load it, show it scans, ask it."""

import os
from collections.abc import Sequence

import torch

from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.data.volume import VolumeError
from med3dvlm.inference.chat import Chat
from med3dvlm.inference.decoding import AnswerStream, next_tokens
from med3dvlm.inference.quantize import check_quantization, load_quantized
from med3dvlm.inference.results import Answer, QuestionError, Sampling, Scan, Seen
from med3dvlm.model.published import device_of
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.processing import VLMProcessor

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Med3DVLM:
    """A language model with its processor; inference only.

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

    @property
    def context(self) -> int:
        """The longest sequence, image tokens and answer included."""
        return min(self.model.config.max_position_embeddings, self.processor.tokenizer.model_max_length)

    # ---------------------------------------------------------------- one scan

    def see(self, scan: Scan, **reading) -> Seen:
        """A scan as the model sees it.

        Args:
            scan: a path, a `Volume`, or a preprocessed image `[1, D, H, W]` in [0, 1].
            reading: how a path is read (series, frame, resample, nan, flip), as `load_volume` takes it.
        Raises:
            VolumeError: it cannot be read, or is of no use to the model.
            ValueError: `reading` for what has been read already.
        """
        if not isinstance(scan, torch.Tensor):
            return Seen(*self.processor.see(scan, **reading))
        if reading:
            raise ValueError(f"{', '.join(reading)}: options of reading belong to a path, not to an image")
        if tuple(scan.shape) != (1, *self.processor.preprocess.size):
            expected = [1, *self.processor.preprocess.size]
            raise VolumeError(f"expected a preprocessed image {expected}, found a tensor {list(scan.shape)}")
        return Seen(scan)

    def answer(
        self,
        scan: Scan,
        question: str,
        kind: str = "vqa",
        max_new_tokens: int = 256,
        *,
        choices: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        **reading,
    ) -> Answer:
        """Answer one question about one scan.

        Args:
            scan, reading: see `see`.
            kind: "vqa" or "caption", the two forms of the published prompt.
            choices: two or more answers to choose from. Up to four are listed in the question as published
                ("Choices: A. liver B. spleen"), and "A. liver" is what is scored; more are not listed, and scored as
                they are. Nothing is generated, so `sampling` and `max_new_tokens` mean nothing then.
            sampling: None is greedy.
        Raises:
            VolumeError: see `see`.
            QuestionError: empty, too long (the message says how many tokens fit), or choices that are none.
        """
        chat = self.chat(scan, **reading)
        return chat.ask(question, kind, max_new_tokens, choices=choices, sampling=sampling)

    def report(
        self,
        scan: Scan,
        prompt: str = CAPTION_PROMPTS[0],
        max_new_tokens: int = 256,
        *,
        sampling: Sampling | None = None,
        **reading,
    ) -> Answer:
        """Describe a scan: `answer` to a prompt in the form that reports were trained with."""
        return self.answer(scan, prompt, "caption", max_new_tokens, sampling=sampling, **reading)

    def stream(
        self,
        scan: Scan,
        question: str,
        kind: str = "vqa",
        max_new_tokens: int = 256,
        *,
        sampling: Sampling | None = None,
        **reading,
    ) -> AnswerStream:
        """As `answer`, piece by piece. Errors of scan and question come at once, not with the first piece."""
        return self.chat(scan, **reading).stream(question, kind, max_new_tokens, sampling=sampling)

    def chat(self, scan: Scan | None = None, *, remember: bool = False, **reading) -> Chat:
        """A conversation about one scan, which is read and encoded once; see `Chat`."""
        return Chat(self, scan, remember=remember, **reading)

    # ---------------------------------------------------------------- batches

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed volumes ``[B, 1, D, H, W]`` to image tokens ``[B, N, hidden]``, to be asked about many times."""
        return self.model.encode_images(images.to(self.device, self.dtype))

    def answer_batch(
        self,
        scans: torch.Tensor | Sequence[Scan] | None = None,
        questions: Sequence[str] = (),
        kind: str = "vqa",
        max_new_tokens: int = 256,
        image_features: torch.Tensor | None = None,
        *,
        sampling: Sampling | None = None,
        **reading,
    ) -> list[str]:
        """The texts of answers to ``questions``, the i-th about the i-th scan, generated together.

        Args:
            scans: preprocessed volumes ``[B, 1, D, H, W]``, or a list of what `see` takes; or
            image_features: ``[B, N, hidden]`` from `encode`.
            kind: "vqa" or "caption", the two forms of the published prompt.
            sampling: None is greedy. Each row is drawn with the same seed, as if it were asked alone.

        Raises:
            ValueError: the numbers of images and questions differ, or neither or both kinds of image were given.
            VolumeError, QuestionError: see `answer`.
        """
        if (scans is None) == (image_features is None):
            raise ValueError("give either scans or image_features")
        count = len(scans) if image_features is None else len(image_features)
        if count != len(questions):
            raise ValueError(f"expected one image per question, found {count} images and {len(questions)} questions")
        tokenizer = self.processor.tokenizer
        batch = self.processor(list(questions), kind=kind)  # [B, T], left-padded
        for question, length in zip(questions, batch["attention_mask"].sum(dim=1).tolist(), strict=True):
            self.check_question(question, length, max_new_tokens)
        if image_features is None:
            image_features = self.encode(torch.stack([self.see(scan, **reading).image for scan in scans]))
        with torch.inference_mode():
            mask = batch["attention_mask"].to(self.device)
            embeds = self.model.embed(batch["input_ids"].to(self.device), mask, image_features=image_features)
        steps = list(next_tokens(self.model, embeds, mask, max_new_tokens, tokenizer.eos_token_id, sampling))
        rows = [_until(tokenizer.eos_token_id, ids) for ids in zip(*steps, strict=True)]
        return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def check_question(self, question: str, length: int, max_new_tokens: int) -> None:
        """Raise QuestionError for a question that is empty, holds an image token, or is too long.

        length: tokens of the whole prompt, of which the question is the last part.
        """
        if not question.strip():
            raise QuestionError("the question is empty: write one")
        if self.processor.image_token in question:
            raise QuestionError(
                f"the question holds {self.processor.image_token}, which stands for the scan: remove it"
            )
        if max_new_tokens < 1:
            raise QuestionError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
        if length + max_new_tokens > self.context:
            own = len(self.processor.tokenizer(self.processor.turn(question))["input_ids"])
            fit = max(0, self.context - max_new_tokens - (length - own))
            raise QuestionError(
                f"the question has {own} tokens, {fit} fit: the model's context is {self.context} tokens, "
                f"{length - own} are taken by the scan and earlier turns and {max_new_tokens} kept for the answer; "
                "shorten the question, or lower max_new_tokens"
            )


def _until(end: int, ids: Sequence[int]) -> Sequence[int]:
    """Token ids up to the first end token, without it."""
    return ids[: ids.index(end)] if end in ids else ids


def load_model(
    name_or_path: str | os.PathLike, device: str = "auto", dtype: str = "auto", quantization: str | None = None
) -> Med3DVLM:
    """Load a language model with its processor from a local folder or a hub name.

    Args:
        device: "auto" takes the first GPU where there is one.
        dtype: "auto" keeps the dtype of the stored tensors; or "float32", "bfloat16", "float16".
        quantization: None; "int8", on every device; "4bit", on a CUDA device with bitsandbytes. Of the language
            model's blocks only: encoder, projector, embeddings and output layer keep their dtype.

    Raises:
        CheckpointError: not a complete checkpoint of this architecture.
        ValueError: a dtype or quantization that is not known; `QuantizationError` where it cannot be done here.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    target = device_of(device)
    check_quantization(quantization, target)
    name = os.fspath(name_or_path)
    if quantization is None:
        model = VLMForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], device_map=target)
    else:
        model = load_quantized(name, quantization, DTYPES[dtype], target)
    return Med3DVLM(model, VLMProcessor.from_pretrained(name, config=model.config))
