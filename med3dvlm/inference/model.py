"""The language model with its processor: show it scans, ask it. `med3dvlm.inference.loading` loads it."""

import os
import time
from collections.abc import Sequence

import torch

from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.data.volume import Volume
from med3dvlm.inference.chat import Chat
from med3dvlm.inference.decoding import AnswerStream, next_tokens
from med3dvlm.inference.results import Answer, QuestionError, Sampling, check_text
from med3dvlm.inference.scans import Scan, Seen, look
from med3dvlm.model.vlm import VLMForCausalLM
from med3dvlm.processing import VLMProcessor


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
        """The longest sequence, image tokens and answer included.

        The tokenizer's own limit does not count: training code often stores there what it cut its samples off at, of
        which image and answer take everything.
        """
        return self.model.config.max_position_embeddings

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
        return look(scan, self.processor.preprocess, self.processor.training_data, **reading)

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
        scans: Scan | Sequence[Scan] | Sequence[tuple[Scan, str]],
        questions: Sequence[str] | str | None = None,
        kind: str = "vqa",
        max_new_tokens: int = 256,
        *,
        sampling: Sampling | None = None,
        **reading,
    ) -> list[Answer]:
        """Answers that are generated together. A scan that stands there several times is read and encoded once.

        Args:
            scans, questions: scans (or preprocessed volumes ``[B, 1, D, H, W]``) and as many questions, the i-th about
                the i-th scan; or one question about all scans, or one scan (no tensor) and all questions about it.
                Without questions: pairs ``(scan, question)``.
            kind: "vqa" or "caption", the two forms of the published prompt.
            sampling: None is greedy. Each row is drawn with the same seed, as if it were asked alone.

        Raises:
            ValueError: the numbers of scans and questions differ, or what should be pairs are none.
            VolumeError, QuestionError: see `answer`; of any of them, before anything is generated.
        """
        started = time.perf_counter()
        pairs = _pairs(scans, questions)
        for _, question in pairs:
            self.check_text(question)
        looked_at: dict = {}  # which scan -> warnings, and its features [N, hidden]
        rows = []
        for scan, _ in pairs:
            key = os.fspath(scan) if isinstance(scan, str | os.PathLike) else id(scan)
            if key not in looked_at:
                seen = self.see(scan, **reading)
                looked_at[key] = seen.warnings, self.encode(seen.image[None])[0]
            rows.append(looked_at[key])
        if not rows:
            return []
        features = torch.stack([features for _, features in rows])  # [B, N, hidden]
        said = self._generate(features, [question for _, question in pairs], kind, max_new_tokens, sampling)
        seconds, preprocessing = time.perf_counter() - started, self.processor.preprocess.to_dict()
        return [
            Answer(self._text(ids), len(ids), seconds, preprocessing, warnings, finished=self._has_ended(ids))
            for ids, (warnings, _) in zip(said, rows, strict=True)
        ]

    def answer_features(
        self, image_features: torch.Tensor, questions: Sequence[str], kind: str = "vqa", max_new_tokens: int = 256
    ) -> list[str]:
        """The texts of greedy answers to B questions about images that `encode` has seen, ``[B, N, hidden]``.

        Raises:
            ValueError: the numbers of images and questions differ. QuestionError: see `answer`.
        """
        if len(image_features) != len(questions):
            raise ValueError(f"found {len(image_features)} images and {len(questions)} questions")
        return [self._text(ids) for ids in self._generate(image_features, questions, kind, max_new_tokens)]

    def _generate(
        self,
        image_features: torch.Tensor,
        questions: Sequence[str],
        kind: str,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> list[Sequence[int]]:
        """The tokens of B answers, each up to its end token."""
        for question in questions:
            self.check_text(question)
        batch = self.processor(list(questions), kind=kind)  # [B, T], left-padded
        for question, length in zip(questions, batch["attention_mask"].sum(dim=1).tolist(), strict=True):
            self.check_length(question, kind, length, max_new_tokens)
        with torch.inference_mode():
            mask = batch["attention_mask"].to(self.device)
            embeds = self.model.embed(batch["input_ids"].to(self.device), mask, image_features=image_features)
        end = self.processor.tokenizer.eos_token_id
        steps = list(next_tokens(self.model, embeds, mask, max_new_tokens, end, sampling))
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in zip(*steps, strict=True)]

    def _text(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _has_ended(self, ids: Sequence[int]) -> bool:
        return ids[-1] == self.processor.tokenizer.eos_token_id

    # ---------------------------------------------------------------- what can be asked

    def check_text(self, text: str, what: str = "the question") -> None:
        """Raise QuestionError unless this can be said to the model."""
        check_text(text, what)
        if self.processor.image_token in text:
            raise QuestionError(f"{what} holds {self.processor.image_token}, which stands for the scan: remove it")

    def check_question(self, question: str, kind: str, max_new_tokens: int) -> None:
        """Raise QuestionError for what cannot be asked about one scan: see `check_text` and `check_length`."""
        self.check_text(question)
        length = len(self.processor.encode(self.processor.prompt(question, kind))["input_ids"])
        self.check_length(question, kind, length, max_new_tokens)

    def check_choices(self, choices: Sequence[str]) -> list[str]:
        """The choices as a list. Raises QuestionError unless they are two or more different texts."""
        choices = [choices] if isinstance(choices, str) else list(choices)
        for choice in choices:
            self.check_text(choice, "a choice")
        if len({choice.strip() for choice in choices}) < max(2, len(choices)):
            raise QuestionError("choices must be a list of two or more different texts")
        return choices

    def check_length(self, question: str, kind: str, length: int, max_new_tokens: int) -> None:
        """Raise QuestionError for a question that leaves no room for its answer.

        length: tokens of the whole prompt, of which the question is the last part.
        """
        if max_new_tokens < 1:
            raise QuestionError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
        if length + max_new_tokens > self.context:
            own = len(self.processor.tokenizer(self.processor.turn(question, kind))["input_ids"])
            fit = max(0, self.context - max_new_tokens - (length - own))
            raise QuestionError(
                f"the question has {own} tokens, {fit} fit: the model's context is {self.context} tokens, "
                f"{length - own} are taken by the scan and earlier turns and {max_new_tokens} kept for the answer; "
                "shorten the question, or lower max_new_tokens"
            )


def _pairs(scans, questions) -> list[tuple[Scan, str]]:
    """Scans with their questions; see `Med3DVLM.answer_batch`."""
    if questions is None:
        pairs = list(scans)
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise ValueError("without questions, a batch is a list of pairs (scan, question)")
        return pairs
    one_question, one_scan = isinstance(questions, str), isinstance(scans, str | os.PathLike | Volume)
    questions = [questions] if one_question else list(questions)
    scans = [scans] * len(questions) if one_scan else list(scans)
    questions *= len(scans) if one_question else 1
    if len(scans) != len(questions):
        raise ValueError(f"expected one scan per question, found {len(scans)} scans and {len(questions)} questions")
    return list(zip(scans, questions, strict=True))
