"""From a volume and a question to the model's input. Saved beside the weights.

The only place that knows how many image tokens stand for a volume, and that expands them.
"""

import json
import os
from pathlib import Path

import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from med3dvlm.configuration import IMAGE_TOKEN, CLIPConfig, VLMConfig
from med3dvlm.data.collate import IGNORED_LABEL, pad_sequences
from med3dvlm.data.files import write_bytes
from med3dvlm.data.preprocess import preprocess
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.profile import PUBLISHED_PROFILE, DataProfile, input_warnings
from med3dvlm.data.volume import Volume, load_volume
from med3dvlm.model.weights import CheckpointError, checkpoint_errors

PROCESSOR_FILE = "processor_config.json"
# What stands between the image tokens and the text: published training has a space before a question only.
SEPARATORS = {"vqa": " ", "caption": ""}
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def load_tokenizer(folder):
    """The tokenizer of a local folder or a hub name.

    Where its files don't name a class of its own, `tokenizer.json` is the whole tokenizer and taken as it is.
    AutoTokenizer would go by the model type in `config.json` instead: beside a `qwen2` model it rebuilds any tokenizer
    as a byte-level one, beside our dual encoder as CLIP's, and the same text silently gets other ids. Only a model
    type of transformers' own with the vocabulary of that type (as older hub folders have it) is left to it.
    A dual encoder without a tokenizer takes the one of `language_model_name_or_path` in its config.

    Raises:
        CheckpointError: no tokenizer there.
    """
    kind = _read_json(folder, "tokenizer_config.json").get("tokenizer_class")
    if kind in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if kind is not None:
        return AutoTokenizer.from_pretrained(folder)
    found = [name for name in VOCABULARY_FILES if _file(folder, name)]
    config = _read_json(folder, "config.json")
    ours = config.get("model_type") in (CLIPConfig.model_type, VLMConfig.model_type)
    if found == ["tokenizer.json"] or (ours and "tokenizer.json" in found):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if found and not ours:
        return AutoTokenizer.from_pretrained(folder)
    advice = "put tokenizer.json and tokenizer_config.json of its language model there"
    if config.get("model_type") != CLIPConfig.model_type:
        raise CheckpointError(f"{folder}: holds no tokenizer; {advice}")
    with checkpoint_errors(f"{folder}: holds no tokenizer ({advice}), and that of its config"):
        return load_tokenizer(CLIPConfig.from_dict(config).language_model_name_or_path)


def save_preprocess(folder, config: PreprocessConfig, training_data: DataProfile | None = None, **more) -> None:
    """Write `processor_config.json` into a model's folder: its pipeline, what is known of its training data, and `more`
    (for a language model, what `VLMProcessor` needs besides).
    """
    known = {} if training_data is None else {"training_data": training_data.to_dict()}
    values = {**more, "preprocess": config.to_dict(), **known}
    write_bytes(Path(folder) / PROCESSOR_FILE, (json.dumps(values, indent=2) + "\n").encode("utf-8"))


def load_preprocess(folder, config=None) -> tuple[PreprocessConfig, DataProfile]:
    """The pipeline of a model (language model or dual encoder) and the profile of its training data.

    A published checkpoint has no `processor_config.json`: it takes the published pipeline, at the `input_size` of its
    `config` (read from the folder where None), and the profile of M3D.
    Raises CheckpointError where neither is there, or the file cannot be used.
    """
    with checkpoint_errors(folder):
        values = _read_json(folder, PROCESSOR_FILE)
        if values:
            profile = DataProfile.from_dict(values.get("training_data", {}))
            return PreprocessConfig.from_dict(values["preprocess"]), profile
        values = config.to_dict() if config is not None else _read_json(folder, "config.json")
        if not values.get("input_size"):
            raise CheckpointError(f"{folder}: neither {PROCESSOR_FILE} nor input_size in its config.json")
        height, width, depth = values["input_size"]
        return PreprocessConfig("published", (depth, height, width)), PUBLISHED_PROFILE


def see(source, config: PreprocessConfig, training_data: DataProfile, **reading):
    """A scan as a model sees it.

    source: a path of any form that `load_volume` reads (with its keywords as `reading`), or a `Volume`.
    Returns the image `[1, D, H, W]` within 0..1, the `Volume`, and sentences that a user should see: those of reading,
    and what makes the volume unlike the training data.
    Raises VolumeError for what cannot be used.
    """
    volume = _read(source, config, reading)
    return preprocess(volume, config), volume, volume.warnings + input_warnings(volume, config, training_data)


class SequenceTooLongError(ValueError):
    """A question that fills the whole sequence, so that nothing of the answer is left to learn from."""


class VLMProcessor:
    """Tokenizer, number of image tokens and preprocessing of one model.

    Args:
        tokenizer: a transformers tokenizer. `<im_patch>` is added where it is missing, and the end token serves as
            pad token where there is none.
        num_image_tokens: tokens that stand for one volume, as many as the projector gives.
        preprocess: what a volume goes through on its way to the model.
        training_data: what is known of the volumes that the model learned from; None is nothing.
    """

    def __init__(
        self,
        tokenizer,
        num_image_tokens: int,
        preprocess: PreprocessConfig,
        image_token: str = IMAGE_TOKEN,
        training_data: DataProfile | None = None,
    ):
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(image_token, normalized=False, special=True)], special_tokens=True)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.preprocess = preprocess
        self.training_data = training_data or DataProfile()
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    @property
    def image_tokens(self) -> str:
        """The text that stands for one volume."""
        return self.image_token * self.num_image_tokens

    def prompt(self, question: str, kind: str = "vqa") -> str:
        """Image tokens and question as one text. kind: "vqa" or "caption" (no space before the text)."""
        return self.image_tokens + self.turn(question, kind)

    def turn(self, question: str, kind: str = "vqa") -> str:
        """A further question about a volume that the sequence has shown already."""
        if kind not in SEPARATORS:
            raise ValueError(f"kind must be one of {', '.join(SEPARATORS)}, not {kind!r}")
        return SEPARATORS[kind] + question

    def encode(self, prompt: str, answer: str | None = None, max_length: int | None = None) -> dict[str, torch.Tensor]:
        """Tokenise one prompt, with an answer for training or without one for generation.

        Returns 1-D tensors input_ids, attention_mask and, with an answer, labels: -100 on the prompt, then the answer
        and one end token, whose attention mask is 0 as published (nothing follows it). What exceeds `max_length` is
        cut off, the end token first.
        Raises SequenceTooLongError where the prompt alone fills `max_length`.
        """
        if answer is None:
            ids = self.tokenizer(prompt)["input_ids"]
            self._check_length(len(ids), max_length)
            return _tensors(input_ids=ids, attention_mask=[1] * len(ids))
        ids, asked = self._answered(prompt, answer)
        self._check_length(asked, max_length)
        return _tensors(
            input_ids=ids[:max_length],
            attention_mask=([1] * (len(ids) - 1) + [0])[:max_length],
            labels=([IGNORED_LABEL] * asked + ids[asked:])[:max_length],
        )

    def encode_turns(self, turns, max_length: int) -> dict[str, torch.Tensor]:
        """Pack several questions and answers about one volume into one sequence (see `med3dvlm.model.packing`).

        turns: `(prompt, answer)`, of which the first prompt holds the image tokens. Where the first turn exceeds
        `max_length`, it is cut off as in `encode`; a later one that doesn't fit as a whole is left out.
        Returns input_ids, attention_mask, labels (on answers and end tokens only), turn_ids (0 on the image tokens,
        then 1, 2, ...) and position_ids (each turn counts on from the image tokens).
        Raises SequenceTooLongError where the first prompt alone fills `max_length`.
        """
        shared = self.num_image_tokens
        input_ids, labels, turn_ids, position_ids = [], [], [0] * shared, list(range(shared))
        for prompt, answer in turns:
            ids, asked = self._answered(prompt, answer)
            if not input_ids:
                self._check_length(asked, max_length)
                ids = ids[:max_length]
            own = len(ids) if input_ids else len(ids) - shared
            if len(input_ids) + len(ids) <= max_length:
                input_ids += ids
                labels += [IGNORED_LABEL] * asked + ids[asked:]
                turn_ids += [turn_ids[-1] + 1] * own
                position_ids += range(shared, shared + own)
        return _tensors(
            input_ids=input_ids,
            attention_mask=[1] * len(input_ids),
            labels=labels,
            turn_ids=turn_ids,
            position_ids=position_ids,
        )

    def __call__(self, questions, volumes=None, kind: str = "vqa") -> dict[str, torch.Tensor]:
        """A batch for generation, padded on the left.

        questions: B texts without image tokens. volumes: B of what `load_image` takes, or `[1, D, H, W]` tensors.
        Returns input_ids and attention_mask `[B, longest]` and, with volumes, images `[B, 1, D, H, W]`.
        """
        rows = [self.encode(self.prompt(question, kind)) for question in questions]
        batch = {
            "input_ids": pad_sequences([row["input_ids"] for row in rows], self.tokenizer.pad_token_id, "left"),
            "attention_mask": pad_sequences([row["attention_mask"] for row in rows], 0, "left"),
        }
        if volumes is not None:
            images = [v if isinstance(v, torch.Tensor) else self.load_image(v) for v in volumes]
            if len(images) != len(rows):
                raise ValueError(f"one volume a question: {len(rows)} questions, {len(images)} volumes")
            batch["images"] = torch.stack(images)
        return batch

    def load_image(self, source, **reading) -> torch.Tensor:
        """The model's input `[1, D, H, W]` of a path or of a `Volume`. Raises VolumeError for what cannot be used."""
        return preprocess(_read(source, self.preprocess, reading), self.preprocess)

    def see(self, source, **reading):
        """Image, `Volume` and warnings of a path or of a `Volume`: see the function `see`."""
        return see(source, self.preprocess, self.training_data, **reading)

    def save_pretrained(self, folder) -> None:
        """Write the tokenizer's files and `processor_config.json` into `folder`."""
        self.tokenizer.save_pretrained(folder)
        own = {"image_token": self.image_token, "num_image_tokens": self.num_image_tokens}
        save_preprocess(folder, self.preprocess, self.training_data, **own)

    @classmethod
    def from_pretrained(cls, folder, config=None) -> "VLMProcessor":
        """Read a processor from a local folder or a hub name.

        A published model has no `processor_config.json`: the number of image tokens and the size then come from its
        `config` (read from the folder where None), and the preprocessing is the published one.
        Raises CheckpointError where neither says how many image tokens there are, or a file cannot be used.
        """
        with checkpoint_errors(f"{folder}: its tokenizer"):
            tokenizer = load_tokenizer(folder)
        with checkpoint_errors(folder):
            values = _read_json(folder, PROCESSOR_FILE)
            if not values:
                values = config.to_dict() if config is not None else _read_json(folder, "config.json")
            count = values.get("num_image_tokens") or values.get("proj_out_num")
            if not count:
                raise CheckpointError(
                    f"{folder}: neither num_image_tokens in {PROCESSOR_FILE} nor proj_out_num in its config.json"
                )
            steps, training_data = load_preprocess(folder, config)
            return cls(tokenizer, count, steps, values.get("image_token", IMAGE_TOKEN), training_data)

    def _answered(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Ids of prompt, space, answer and end token, and how many of them the prompt takes."""
        ids = self.tokenizer(f"{prompt} {answer}")["input_ids"] + [self.tokenizer.eos_token_id]
        return ids, len(self.tokenizer(prompt)["input_ids"])

    def _check_length(self, asked: int, max_length: int | None) -> None:
        if max_length is not None and asked >= max_length:
            raise SequenceTooLongError(
                f"the question has {asked} tokens ({self.num_image_tokens} of them for the image) and leaves no room "
                f"for an answer in a sequence of {max_length}; raise the maximum length or shorten the question"
            )


def _read(source, config: PreprocessConfig, reading: dict) -> Volume:
    if isinstance(source, str | os.PathLike):
        return load_volume(source, **{"prepared_size": config.size, **reading})
    if reading:
        raise ValueError(f"{', '.join(reading)}: options of reading belong to a path, not to a volume that was read")
    return source


def _read_json(folder, name: str) -> dict:
    """A json file of a local folder or a hub name; empty where it has none."""
    file = _file(folder, name)
    if not file:
        return {}
    with checkpoint_errors(file):
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))


def _file(folder, name: str) -> str | None:
    return cached_file(folder, name, _raise_exceptions_for_missing_entries=False)


def _tensors(**lists) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, dtype=torch.long) for name, values in lists.items()}
