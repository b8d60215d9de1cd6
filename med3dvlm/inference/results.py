"""What goes into inference and comes out of it, and what can be wrong with the input."""

import os
from dataclasses import dataclass

import torch

from med3dvlm.data.volume import Volume, VolumeError
from med3dvlm.model.published import DeviceError
from med3dvlm.model.weights import CheckpointError

NOTICE = "For research only. Not a medical device: do not use the answer for diagnosis or treatment."

Scan = str | os.PathLike | Volume | torch.Tensor
"""A path of any form that `load_volume` reads, a `Volume`, or a preprocessed image `[1, D, H, W]` in [0, 1]."""


class QuestionError(ValueError):
    """A question that cannot be asked; the message says why and what to do."""


class QuantizationError(ValueError):
    """A quantization that cannot be done on this machine; the message says what is missing."""


# What users can put right: a scan, a model, a question, how the model is loaded.
BAD_INPUT = (VolumeError, CheckpointError, DeviceError, QuestionError, QuantizationError)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most probable token, the same every time; above 0 tokens are drawn, from a distribution
        that is the flatter the higher it is.
    top_p: only the most probable tokens whose probabilities sum up to this are drawn.
    seed: the same seed draws the same answer.

    Raises ValueError for values outside these ranges.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and up to 1, not {self.top_p}")


@dataclass(frozen=True)
class Answer:
    """What the model said, and how it came about.

    text: the answer; with choices, the most probable one of them.
    tokens: generated (or scored), the end token included.
    seconds: wall time; of the first answer about a scan with its reading, preprocessing and encoding.
    preprocessing: what the scan went through, as `PreprocessConfig.to_dict`.
    warnings: sentences a user should see, about the scan.
    probabilities: of each choice, where choices were given.
    finished: the model ended by itself; False where the token limit or `stop` ended the answer.
    """

    text: str
    tokens: int
    seconds: float
    preprocessing: dict
    warnings: tuple[str, ...] = ()
    probabilities: dict[str, float] | None = None
    finished: bool = True


@dataclass(frozen=True)
class Seen:
    """A scan as the model sees it.

    image: float32 `[1, D, H, W]` in [0, 1], the model's input.
    volume: what it was made from; None where a preprocessed image was given.
    warnings: sentences a user should see.
    """

    image: torch.Tensor
    volume: Volume | None = None
    warnings: tuple[str, ...] = ()
