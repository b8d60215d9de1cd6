"""What goes into inference and comes out of it, and what can be wrong with the input."""

from dataclasses import dataclass

from med3dvlm.data.volume import VolumeError
from med3dvlm.model.published import DeviceError
from med3dvlm.model.weights import CheckpointError

NOTICE = "For research only. Not a medical device: do not use the answer for diagnosis or treatment."


class QuestionError(ValueError):
    """A question that cannot be asked; the message says why and what to do."""


class QuantizationError(ValueError):
    """A quantization that cannot be done on this machine; the message says what is missing."""


def check_text(text: str, what: str = "the question") -> None:
    """Raise QuestionError for what a tokenizer cannot take, or for nothing."""
    if not isinstance(text, str):
        raise QuestionError(f"{what} is no text: {text!r}")
    if not text.strip():
        raise QuestionError(f"{what} is empty: write one")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise QuestionError(f"{what} holds bytes that are no characters: write it in UTF-8")


# What users can put right: a scan, a model, a question, how the model is loaded.
BAD_INPUT = (VolumeError, CheckpointError, DeviceError, QuestionError, QuantizationError)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most probable token, the same every time; above 0 tokens are drawn, from a distribution
        that is the flatter the higher it is.
    top_p: only the most probable tokens whose probabilities sum up to this are drawn.
    seed: the same seed draws the same answer; any integer of 64 bits.

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
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer of 64 bits, not {self.seed}")


@dataclass(frozen=True)
class Answer:
    """What the model said, and how it came about. `str(answer)` is the text.

    text: the answer; with choices, the most probable one of them.
    tokens: generated (or scored), the end token included.
    seconds: wall time; of the first answer about a scan with its reading, preprocessing and encoding; in a batch, of
        all of it.
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

    def __str__(self) -> str:
        return self.text
