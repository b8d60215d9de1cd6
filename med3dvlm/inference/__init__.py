"""Load a model and ask it about a scan:

    model = load_model("models/Med3DVLM-Qwen-2.5-7B")
    print(model.answer("scan.nii.gz", "Which organ is abnormal?").text)

One code path for evaluation, demo and app:

- `scans`: what a model is shown, and how it sees it;
- `results`: `Answer`, `Sampling`, and the errors that a user can put right;
- `decoding`: token by token, greedy or sampled; `AnswerStream`; the probability of given choices;
- `chat`: questions about one scan, which is encoded once;
- `model`: `Med3DVLM`; `clip`: the dual encoder;
- `loading`: `load_model` and `load_clip`; `quantize`: weights in 8 or 4 bits.
"""

from med3dvlm.inference.chat import Chat
from med3dvlm.inference.clip import ImageTextEncoder, Ranking
from med3dvlm.inference.decoding import AnswerStream
from med3dvlm.inference.loading import DTYPES, load_clip, load_model, usable_device
from med3dvlm.inference.model import Med3DVLM
from med3dvlm.inference.quantize import QUANTIZATIONS
from med3dvlm.inference.results import (
    BAD_INPUT,
    NOTICE,
    Answer,
    CheckpointError,
    DeviceError,
    QuantizationError,
    QuestionError,
    Sampling,
    VolumeError,
)
from med3dvlm.inference.scans import Seen

__all__ = [
    "BAD_INPUT",
    "DTYPES",
    "NOTICE",
    "QUANTIZATIONS",
    "Answer",
    "AnswerStream",
    "Chat",
    "CheckpointError",
    "DeviceError",
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
    "usable_device",
]
