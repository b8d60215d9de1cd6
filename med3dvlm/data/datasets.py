"""Data sets: image and report, image and question, image and several questions, image-text pairs.

An item never stands in for another one: what cannot be read raises an error that names manifest, row and file. Only
where `max_bad_samples` allows for it, an item is None instead, counted in `bad_samples`, and left out of its batch.

Images are handed on as they are stored, uint8 codes where they can be: `med3dvlm.data.augment.to_unit` converts and
augments a whole batch on the device.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset

from med3dvlm.data.codes import FileImages
from med3dvlm.data.manifest import CaptionRecord, ManifestError, VQARecord, check_closed, missing_hint
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.prompts import CAPTION_PROMPTS, closed_answer, closed_question
from med3dvlm.data.volume import VolumeError

ImageSource = Callable[[str], torch.Tensor]  # path -> [1, D, H, W], uint8 codes or float32 within 0..1
VQA_KINDS = ("closed", "open", "yes_no")


class SampleError(ValueError):
    """A record that cannot become an item; the message names manifest, row and reason."""


class ImageTextDataset(Dataset):
    """What all data sets share: records with images, randomness that can be repeated, bad samples.

    A subclass says in `load_text(index)` what an item holds besides its image.

    Args:
        records: one per item, with `image`, `where`.
        images: path -> `[1, D, H, W]`, a `FileImages` or an `ImageCache`.
        seed: of every random choice, together with the epoch and the index.
        augmented: let items say by which seed their image is to be augmented (`image_seed`).
        max_bad_samples: how many unreadable items may be skipped; 0 (evaluation always) raises for the first.
    """

    def __init__(self, records, images: ImageSource, seed: int = 0, augmented: bool = False, max_bad_samples: int = 0):
        self.records = records
        self.images = images
        self.seed = seed
        self.augmented = augmented
        self.max_bad_samples = max_bad_samples
        # In shared memory, so that the loader's worker processes see the epoch and report what they skip.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._bad = torch.zeros(len(records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict | None:
        """The item, or None where it is unreadable and may be skipped."""
        try:
            item = {**self.load_text(index), "image": self.load_image(index)}
        except (VolumeError, ManifestError, SampleError) as error:
            self._bad[index] = True
            if len(self.bad_samples) > self.max_bad_samples:
                allowance = f" ({self.max_bad_samples} bad samples allowed)" if self.max_bad_samples else ""
                raise type(error)(f"{error}{allowance}") from error
            return None
        if self.augmented:
            item["image_seed"] = self.random(index).getrandbits(31)
        return item

    def load_text(self, index: int) -> dict:
        """The item without its image: its tensors are 1-D and not padded."""
        raise NotImplementedError

    def load_image(self, index: int) -> torch.Tensor:
        """The image of an item as it is stored, `[1, D, H, W]`, only to be read.

        Raises VolumeError with manifest, row and file.
        """
        record = self.records[index]
        try:
            return self.images(record.image)
        except VolumeError as error:
            raise VolumeError(f"{record.where}: {error}{missing_hint(record.image)}") from error

    @property
    def bad_samples(self) -> list[str]:
        """The items skipped so far by this process and its loader's workers: manifest, row and file."""
        return [f"{self.records[i].where}: {self.records[i].image}" for i in self._bad.nonzero().flatten().tolist()]

    def set_epoch(self, epoch: int) -> None:
        """Let the next epoch draw other prompts, orders and augmentations."""
        self._epoch[0] = epoch

    def random(self, index: int) -> random.Random:
        """The generator of one item in one epoch."""
        return random.Random(f"{self.seed}|{int(self._epoch)}|{index}")


class QuestionDataset(ImageTextDataset):
    """Items with one question and its answer. A subclass says in `question(index)` which.

    An item holds input_ids, labels, attention_mask (1-D, int64), image `[1, D, H, W]`, and as text question, answer,
    question_type, answer_choice and image_path.
    """

    def __init__(self, records, processor, max_length: int, images: ImageSource | None = None, **options):
        super().__init__(records, images or FileImages(processor.preprocess), **options)
        self.processor = processor
        self.max_length = max_length

    kind = "vqa"

    def question(self, index: int) -> dict:
        """question (without image tokens), answer, question_type and answer_choice of an item."""
        raise NotImplementedError

    def checked_question(self, index: int) -> dict:
        """As `question`. Raises SampleError where a text holds the token that stands for the image."""
        asked = self.question(index)
        for part in ("question", "answer"):
            if self.processor.image_token in asked[part]:
                raise SampleError(f"{self.records[index].where}: its {part} holds {self.processor.image_token}, "
                                  "which stands for the scan: remove it")  # fmt: skip
        return asked

    def load_text(self, index: int) -> dict:
        asked = self.checked_question(index)
        prompt = self.processor.prompt(asked["question"], self.kind)
        return {
            **_encoded(self.records[index], self.processor.encode, prompt, asked["answer"], self.max_length),
            **asked,
            "question": prompt,
            "image_path": self.records[index].image,
        }


class CaptionDataset(QuestionDataset):
    """Reports: the question is a prompt drawn from `prompts`, the answer the text file of the case."""

    kind = "caption"

    def __init__(self, records: list[CaptionRecord], processor, max_length: int, prompts=CAPTION_PROMPTS, **options):
        super().__init__(records, processor, max_length, **options)
        self.prompts = prompts

    def question(self, index: int) -> dict:
        prompt = self.random(index).choice(self.prompts)
        answer = self.records[index].read_text()
        return {"question": prompt, "answer": answer, "question_type": "Caption", "answer_choice": ""}

    @property
    def lengths(self) -> list[int]:
        """A measure of the texts' lengths, for grouping by length: bytes of the reports, read from the folder only.

        A missing report counts as 0 where bad samples are allowed: reading its item counts it among them.
        """
        paths = (Path(record.text_path) for record in self.records)
        return [0 if self.max_bad_samples and not path.exists() else path.stat().st_size for path in paths]


class VQADataset(QuestionDataset):
    """Questions of an M3D-VQA table. kind: "closed" lists the choices and answers with the letter, "open" and "yes_no"
    ask and answer in plain words.

    An item of a closed question without choices raises ManifestError.
    """

    def __init__(self, records: list[VQARecord], processor, max_length: int, kind: str = "closed", **options):
        if kind not in VQA_KINDS:
            raise ValueError(f"kind must be one of {', '.join(VQA_KINDS)}, not {kind!r}")
        super().__init__(records, processor, max_length, **options)
        self.closed = kind == "closed"

    def question(self, index: int) -> dict:
        record = self.records[index]
        question, answer = record.question, record.answer
        if self.closed:
            check_closed([record])
            question = closed_question(question, record.choices)
            answer = closed_answer(record.answer_choice, answer)
        return {
            "question": question,
            "answer": answer,
            "question_type": record.question_type,
            "answer_choice": record.answer_choice,
        }

    @property
    def lengths(self) -> list[int]:
        """A measure of the texts' lengths, for grouping by length: characters of question and answer."""
        return [len(r.question) + len(r.answer) + sum(len(c or "") for c in r.choices) for r in self.records]


class GroupedQADataset(ImageTextDataset):
    """Several questions about one image in one sequence, so that the encoder runs once for all of them.

    Image tokens, first question, answer, end token, second question, answer, end token, ...; labels only on answers
    and end tokens. Every turn is learned as if it stood alone (turn_ids, position_ids: see `med3dvlm.model.packing`).
    Which questions, and in which order, is drawn anew in each epoch.

    Args:
        datasets: `CaptionDataset` and `VQADataset`, whose items of the same image are grouped.
        questions_per_image: the most turns in a sequence; later ones that don't fit `max_length` are left out.
    """

    def __init__(
        self,
        datasets: list[QuestionDataset],
        max_length: int,
        questions_per_image: int = 5,
        images: ImageSource | None = None,
        **options,
    ):
        groups: dict[str, list[tuple[QuestionDataset, int]]] = {}
        for dataset in datasets:
            for index, record in enumerate(dataset.records):
                groups.setdefault(record.image, []).append((dataset, index))
        self.groups = list(groups.values())
        self.processor = datasets[0].processor
        self.max_length = max_length
        self.questions_per_image = questions_per_image
        records = [dataset.records[index] for dataset, index in (group[0] for group in self.groups)]
        super().__init__(records, images or FileImages(self.processor.preprocess), **options)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for dataset in {id(dataset): dataset for group in self.groups for dataset, _ in group}.values():
            dataset.set_epoch(epoch)

    def load_text(self, index: int) -> dict:
        group = self.groups[index]
        drawn = self.random(index).sample(group, min(self.questions_per_image, len(group)))
        asked = [(dataset.kind, dataset.checked_question(number)) for dataset, number in drawn]
        # The image comes before the first question only.
        prompts = [(self.processor.turn if i else self.processor.prompt)(q["question"], kind)
                   for i, (kind, q) in enumerate(asked)]  # fmt: skip
        turns = [(prompt, q["answer"]) for prompt, (_, q) in zip(prompts, asked, strict=True)]
        return {
            **_encoded(self.records[index], self.processor.encode_turns, turns, self.max_length),
            "question": "\n".join(prompts),
            "answer": "\n".join(q["answer"] for _, q in asked),
            "question_type": "Grouped",
            "answer_choice": "",
            "image_path": self.records[index].image,
        }


class PairDataset(ImageTextDataset):
    """Image-text pairs of the contrastive stage: image `[1, D, H, W]`, text, and its input_ids and attention_mask.

    A report that exceeds `max_length` tokens is shortened by `shorten_report`, with random sentences where `shuffled`
    (training), with those that come first where not.
    """

    def __init__(
        self,
        records: list[CaptionRecord],
        tokenizer,
        max_length: int,
        preprocess_config: PreprocessConfig,
        shuffled: bool = False,
        images: ImageSource | None = None,
        **options,
    ):
        super().__init__(records, images or FileImages(preprocess_config), **options)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.shuffled = shuffled

    def load_text(self, index: int) -> dict:
        rng = self.random(index) if self.shuffled else None
        text = shorten_report(self.records[index].read_text(), self.tokenizer, self.max_length, rng)
        ids = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return {
            "text": text,
            "input_ids": torch.tensor(ids, dtype=torch.long),
            "attention_mask": torch.ones(len(ids), dtype=torch.long),
            "question_type": "Image_text_retrieval",
            "image_path": self.records[index].image,
        }


def shorten_report(text: str, tokenizer, max_tokens: int, rng: random.Random | None = None) -> str:
    """Shorten a report to about `max_tokens` tokens by whole sentences, as the published contrastive stage does.

    The first sentence (up to the first ".") stays. Further ones follow in the order of the text, or in random order
    with `rng`, as long as those added have at most `max_tokens` tokens together: special tokens are counted with each,
    the first sentence is not, and no sentence comes twice. The tokenizer may still have to truncate the result.
    """

    def count(part: str) -> int:
        return len(tokenizer(part)["input_ids"])

    if count(text) <= max_tokens:
        return text
    first, *others = text.split(".")
    if rng is not None:
        rng.shuffle(others)
    chosen, used = [first], 0
    for sentence in others:
        tokens = count(sentence)
        if used + tokens <= max_tokens and sentence not in chosen:
            chosen.append(sentence)
            used += tokens
    return ".".join(chosen)


def _encoded(record, encode, *arguments) -> dict[str, torch.Tensor]:
    """Tokenise, and let an error about the text name the record."""
    try:
        return encode(*arguments)
    except ValueError as error:
        raise SampleError(f"{record.where}: {error}") from error
