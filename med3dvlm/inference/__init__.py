"""Load a model and ask it about a scan:

    model = load_model("models/Med3DVLM-Qwen-2.5-7B")
    print(model.answer("scan.nii.gz", "Which organ is abnormal?").text)

One code path for evaluation, demo and app:

- `results`: what goes in and comes out: `Answer`, `Sampling`, `Seen`, and the errors that a user can put right;
- `decoding`: token by token, greedy or sampled; `AnswerStream`; the probability of given choices;
- `chat`: questions about one scan, which is encoded once;
- `model`: `load_model` and `Med3DVLM`; `quantize`: its weights in 8 or 4 bits;
- `clip`: `load_clip` and the dual encoder.
"""

from med3dvlm.inference.chat import Chat
from med3dvlm.inference.clip import ImageTextEncoder, Ranking, load_clip
from med3dvlm.inference.decoding import AnswerStream
from med3dvlm.inference.model import DTYPES, Med3DVLM, load_model
from med3dvlm.inference.quantize import QUANTIZATIONS
from med3dvlm.inference.results import (
    BAD_INPUT,
    NOTICE,
    Answer,
    CheckpointError,
    QuantizationError,
    QuestionError,
    Sampling,
    Seen,
    VolumeError,
)

__all__ = [
    "BAD_INPUT",
    "DTYPES",
    "NOTICE",
    "QUANTIZATIONS",
    "Answer",
    "AnswerStream",
    "Chat",
    "CheckpointError",
    "ImageTextEncoder",
    "Med3DVLM",
    "QuantizationError",
    "QuestionError",
    "Ranking",
    "Sampling",
    "Seen",
    "VolumeError",
    "load_clip",
    "load_model",
]
