"""From a prompt to words, token by token: greedy or sampled, as a whole or streamed; and the probability of choices.

Every answer is made by `next_tokens`, one generator: what is streamed is what is returned, and leaving the loop early
stops the model. Shapes: B batch, T tokens of the prompt, H width of the language model, V vocabulary.
"""

import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from med3dvlm.inference.results import Answer, Sampling
from med3dvlm.model.vlm import VLMForCausalLM


def next_tokens(
    model: VLMForCausalLM,
    embeds: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    end: int,
    sampling: Sampling | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of each of B rows, until all of them have ended or `max_new_tokens` steps were made.

    Args:
        embeds: [B, T, H], padded on the left; attention_mask: [B, T], 1 where attended.
        end: id of the end token; it is yielded too, what follows it in its row means nothing.
        sampling: None is greedy. Each row draws from a generator of its own, so a batch answers as single rows do.
    """
    choose = _chooser(sampling or Sampling(), len(embeds))
    inputs, mask = {"inputs_embeds": embeds}, attention_mask
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # [B, T]
    cache = DynamicCache(config=model.config)
    ended = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
    for _ in range(max_new_tokens):
        with torch.inference_mode():  # not around the yield: a stream may be left at any token
            output = model(**inputs, attention_mask=mask, position_ids=positions, past_key_values=cache,
                           use_cache=True, logits_to_keep=1)  # fmt: skip
            ids = choose(output.logits[:, -1])  # [B]
            ended = ended | (ids == end)
            inputs = {"input_ids": ids[:, None]}
            mask = F.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1  # [B, 1]
        yield ids.tolist()
        if ended.all():
            return


def _chooser(sampling: Sampling, rows: int) -> Callable[[Tensor], Tensor]:
    """A function from logits [B, V] to chosen ids [B]."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(dim=-1)
    # On the CPU, so that a seed means the same on every device.
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in range(rows)]

    def draw(logits: Tensor) -> Tensor:
        shifted = logits.cpu().double()  # [B, V]
        shifted -= shifted.amax(dim=-1, keepdim=True)  # the largest is 0, so that no temperature is too low
        probabilities = (shifted / sampling.temperature).softmax(dim=-1)
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it have not reached top_p, so the first one always does.
        ordered[ordered.cumsum(dim=-1) - ordered >= sampling.top_p] = 0
        drawn = torch.stack(
            [torch.multinomial(row, 1, generator=g) for row, g in zip(ordered, generators, strict=True)]
        )
        return ids.gather(1, drawn)[:, 0].to(logits.device)

    return draw


@torch.inference_mode()
def choice_scores(model: VLMForCausalLM, embeds: Tensor, continuations: list[list[int]]) -> list[float]:
    """Log-probability of each continuation (token ids, the end token included) of the prompt `embeds` [1, T, H].

    The prompt runs once; its keys and values are then shared by all continuations, which run as one batch.
    """
    cache = DynamicCache(config=model.config)
    first = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # [1, 1, V]
    count, longest = len(continuations), max(map(len, continuations))
    ids = torch.zeros(count, longest, dtype=torch.long, device=embeds.device)
    scored = torch.zeros(count, longest, device=embeds.device)
    for row, continuation in enumerate(continuations):
        ids[row, : len(continuation)] = torch.tensor(continuation)
        scored[row, : len(continuation)] = 1
    logits = first.expand(count, -1, -1)
    if longest > 1:
        cache.batch_repeat_interleave(count)
        later = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits  # [C, longest - 1, V]
        logits = torch.cat([logits, later], dim=1)  # [C, longest, V]
    log_probabilities = logits.float().log_softmax(dim=-1).gather(2, ids[:, :, None])[:, :, 0]  # [C, longest]
    return (log_probabilities * scored).sum(dim=1).tolist()


class AnswerStream:
    """An answer in pieces, as it is generated:

        for piece in stream:
            print(piece, end="", flush=True)
        print(stream.answer.seconds)

    The pieces joined are `answer.text`. The model works when the next piece is asked for, in the thread that asks: an
    error of the model reaches the caller, and who stops asking stops the model.

    Args:
        steps: tokens, one at a time, as `next_tokens` yields them for one row.
        tokenizer: turns them into text; its end token ends the answer.
        complete: makes the answer from its `text`, `tokens`, `seconds` and `finished`.
        started: `time.perf_counter()` from which the seconds count.
    """

    def __init__(self, steps: Iterator[list[int]], tokenizer, complete: Callable[..., Answer], started: float):
        self._steps, self._tokenizer, self._complete, self._started = steps, tokenizer, complete, started
        self._ids: list[int] = []
        self._sent = ""
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # of what was said and of the answer
        self._answer: Answer | None = None

    def __iter__(self) -> "AnswerStream":
        return self

    def __next__(self) -> str:
        while self._answer is None and not self._stopped.is_set():
            piece = self._take(next(self._steps, None))
            if piece:
                return piece
        self._finish()
        raise StopIteration

    @property
    def answer(self) -> Answer | None:
        """The whole answer once the stream has ended or was stopped; None before."""
        if self._stopped.is_set():
            self._finish()
        return self._answer

    def stop(self) -> None:
        """End the answer after the token that is being generated. Any thread may call it, at any time."""
        self._stopped.set()

    def _take(self, step: list[int] | None) -> str:
        """The piece that a token completes, "" for none. None ends the answer, with what was held back until then."""
        with self._lock:
            if self._answer is not None:  # stopped and asked for in another thread meanwhile
                return ""
            self._ids += step or []
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True).strip()
            if step is not None and (text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(self._sent)):
                return ""  # a character of which only some bytes have come yet
            piece, self._sent = text[len(self._sent) :], text
            if step is None:
                self._answer = self._completed()
            return piece

    def _finish(self) -> None:
        with self._lock:
            if self._answer is None:
                self._answer = self._completed()

    def _completed(self) -> Answer:
        return self._complete(
            text=self._sent,
            tokens=len(self._ids),
            seconds=time.perf_counter() - self._started,
            finished=self._tokenizer.eos_token_id in self._ids[-1:],
        )
