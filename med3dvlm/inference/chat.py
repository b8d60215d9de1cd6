"""Questions about one scan, which is read and encoded once."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from med3dvlm.data.manifest import CHOICE_LETTERS
from med3dvlm.data.prompts import CAPTION_PROMPTS, closed_answer, closed_question
from med3dvlm.inference.decoding import AnswerStream, choice_scores, next_tokens
from med3dvlm.inference.results import Answer, QuestionError, Sampling
from med3dvlm.inference.scans import Scan, Seen

if TYPE_CHECKING:
    from med3dvlm.inference.model import Med3DVLM


class Chat:
    """A conversation about one scan. Made by `Med3DVLM.chat`.

    Args:
        scan: see `Med3DVLM.see`; without one, `set_image` comes before the first question.
        remember: show earlier turns to the model. Off by default: models are trained on single questions about an
            image, and answer later questions better alone (docs/inference.md).
        reading: how the scan is read, as `load_volume` takes it.

    Attributes:
        history: the turns so far, `(question, Answer)`.
        seen: the scan as the model sees it, None before there is one.
    """

    def __init__(self, model: "Med3DVLM", scan: Scan | None = None, *, remember: bool = False, **reading):
        self.model, self.remember = model, remember
        self.history: list[tuple[str, Answer]] = []
        self.seen: Seen | None = None
        self._features: torch.Tensor | None = None  # [1, N, hidden]
        self._turns: list[torch.Tensor] = []  # token ids of each turn, as training writes it
        self._seconds_seeing = 0.0
        if scan is not None:
            self.set_image(scan, **reading)

    def set_image(self, scan: Scan, **reading) -> Seen:
        """Look at a scan, and start over. On an error the conversation goes on as it was.

        Raises:
            VolumeError: the scan cannot be read or used.
        """
        start = time.perf_counter()
        seen = self.model.see(scan, **reading)
        self._features, self.seen = self.model.encode(seen.image[None]), seen
        self._seconds_seeing = time.perf_counter() - start
        self.reset()
        return seen

    def reset(self) -> None:
        """Forget the turns so far, keep the scan."""
        self.history, self._turns = [], []

    def ask(
        self,
        question: str,
        kind: str = "vqa",
        max_new_tokens: int = 256,
        *,
        choices: Sequence[str] | None = None,
        sampling: Sampling | None = None,
    ) -> Answer:
        """The answer to a question; see `Med3DVLM.answer`."""
        if choices is not None:
            return self._choose(question, kind, choices)
        stream = self.stream(question, kind, max_new_tokens, sampling=sampling)
        for _ in stream:
            pass
        return stream.answer

    def report(
        self, prompt: str = CAPTION_PROMPTS[0], max_new_tokens: int = 256, *, sampling: Sampling | None = None
    ) -> Answer:
        """Describe the scan; see `Med3DVLM.report`."""
        return self.ask(prompt, "caption", max_new_tokens, sampling=sampling)

    def stream(
        self, question: str, kind: str = "vqa", max_new_tokens: int = 256, *, sampling: Sampling | None = None
    ) -> AnswerStream:
        """The answer piece by piece; it joins the history when it ends or is stopped.

        Raises:
            QuestionError: no scan yet, an empty question, or one that does not fit; before anything is generated.
        """
        started = time.perf_counter()
        ids = self._prompt(question, kind, max_new_tokens)  # [T]
        tokenizer = self.model.processor.tokenizer
        embeds = self._embed(ids)  # [1, T, H]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        steps = next_tokens(self.model.model, embeds, mask, max_new_tokens, tokenizer.eos_token_id, sampling)
        add = self._turn_adder(question, question, kind)
        return AnswerStream(steps, tokenizer, lambda **values: add(values["text"], **values), started)

    def _choose(self, question: str, kind: str, choices: Sequence[str]) -> Answer:
        """The most probable of the choices, and the probability of each.

        p(choice) is the product of the probabilities of the tokens of its answer, end token included, divided by the
        sum of these products over all choices.
        """
        started = time.perf_counter()
        choices = self.model.check_choices(choices)
        self.model.check_text(question)
        shown, answers = question, choices
        yes_no = {choice.strip().lower() for choice in choices} <= {"yes", "no"}
        if len(choices) <= len(CHOICE_LETTERS) and not yes_no:  # as training writes closed questions
            shown = closed_question(question, choices)
            answers = [closed_answer(letter, text) for letter, text in zip(CHOICE_LETTERS, choices, strict=False)]
        processor = self.model.processor
        turn = processor.turn(shown, kind)
        own = [processor.encode(turn, answer) for answer in answers]
        continuations = [row["input_ids"][row["labels"] >= 0].tolist() for row in own]
        ids = self._prompt(shown, kind, max(map(len, continuations)))
        scores = choice_scores(self.model.model, self._embed(ids), continuations)
        probabilities = torch.tensor(scores, dtype=torch.float64).softmax(dim=0).tolist()
        best = max(range(len(choices)), key=probabilities.__getitem__)
        return self._turn_adder(question, shown, kind)(
            answers[best],
            text=choices[best],
            tokens=len(continuations[best]),
            seconds=time.perf_counter() - started,
            probabilities=dict(zip(choices, probabilities, strict=True)),
        )

    def _prompt(self, question: str, kind: str, max_new_tokens: int) -> torch.Tensor:
        """Token ids [T] of the scan, the earlier turns where they are remembered, and the question."""
        if self.seen is None:
            raise QuestionError("there is no scan to ask about yet: set_image comes first")
        self.model.check_text(question)
        ids = torch.cat([*self._turns, self.model.processor.encode(self._text(question, kind))["input_ids"]])
        self.model.check_length(question, kind, len(ids), max_new_tokens)
        return ids

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] with the scan's features in their place -> [1, T, H]."""
        with torch.inference_mode():
            return self.model.model.embed(ids[None].to(self.model.device), image_features=self._features)

    def _text(self, question: str, kind: str) -> str:
        """The question as it follows the earlier turns, or the scan."""
        processor = self.model.processor
        return processor.turn(question, kind) if self._turns else processor.prompt(question, kind)

    def _turn_adder(self, question: str, shown: str, kind: str) -> Callable[..., Answer]:
        """A function that makes the `Answer` to a question and adds the turn to the conversation as it is now.

        It takes what the model said and the values of the `Answer`. `shown` is the question as the model read it.
        """
        history, turns, text = self.history, self._turns, self._text(shown, kind)
        preprocessing, warnings = self.model.processor.preprocess.to_dict(), self.seen.warnings

        def add(said: str, seconds: float, **values) -> Answer:
            seconds, self._seconds_seeing = seconds + self._seconds_seeing, 0.0
            answer = Answer(seconds=seconds, preprocessing=preprocessing, warnings=warnings, **values)
            if self.remember:
                turns.append(self.model.processor.encode(text, said)["input_ids"])
            history.append((question, answer))
            return answer

        return add
