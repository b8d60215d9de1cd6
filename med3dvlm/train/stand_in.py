"""Stands in for the pre-trained language models where none can be had: a tiny text encoder and a tiny Qwen2.

    python -m med3dvlm.train.stand_in --preset quickstart --data_root D --output_dir O

Reads the texts of the training split only, never an image. Writes `<output_dir>/text_encoder` for the contrastive stage
and `<output_dir>/language_model`, which is trained to do what any instruction-tuned model does: find a word among
lettered choices, and answer a question about a report that it is given. Real runs use ClinicalBERT and Qwen2.5 instead;
nothing else of the pipeline differs.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    set_seed,
)

from med3dvlm.data.collate import collate_vlm
from med3dvlm.data.manifest import read_caption_manifest, read_vqa_csv
from med3dvlm.data.prompts import CAPTION_PROMPTS, closed_answer, closed_question
from med3dvlm.model.packing import packed_attention_mask
from med3dvlm.train.arguments import DataArguments, StageTrainingArguments, arg, check_writable, parse_stage, run
from med3dvlm.train.trainer import log_to_console

logger = logging.getLogger("med3dvlm.train")  # also when run as __main__

ATTEMPTS = 3
REQUIRED_LETTER_ACCURACY = 0.95  # below it, later stages would be blamed for what the language model can't do


@dataclass
class StandInArguments:
    """Sizes of the models and the tables whose texts they learn from."""

    language_width: int = arg("Hidden size of the language model.", default=64)
    language_layers: int = arg("Layers of the language model.", default=4)
    text_encoder_width: int = arg("Hidden size of the text encoder.", default=64)
    vqa_data_train_path: str = arg("M3D-VQA training table.", default="./data/M3D-VQA/M3D_VQA_train.csv")
    vqa_yn_data_train_path: str = arg("M3D-VQA yes/no table.", default="./data/M3D-VQA/M3D_VQA_yn_train.csv")


# ------------------------------------------------------------------------------------------------ tokenizers


def language_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level pairs with the special tokens of Qwen2.5, learned from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def text_encoder_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Lower-case word pieces between [CLS] and [SEP], learned from the texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    )
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def write_text_encoder(texts: Sequence[str], width: int, folder: Path, steps: int = 200, batch: int = 64) -> None:
    """A DistilBERT of two layers and its tokenizer, trained to say from [CLS] which words a text holds.

    With random weights all texts have nearly the same [CLS] feature, and contrastive training takes minutes to find out
    what tells them apart.
    """
    tokenizer = text_encoder_tokenizer(texts)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=width,
        n_layers=2,
        n_heads=4,
        hidden_dim=2 * width,
        max_position_embeddings=128,
        dropout=0.0,
        attention_dropout=0.0,
    )
    model, head = DistilBertModel(config), torch.nn.Linear(width, len(tokenizer))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3)
    for _ in tqdm(range(steps), desc="text encoder", unit="step"):
        chosen = [texts[index] for index in torch.randint(len(texts), (batch,)).tolist()]
        inputs = tokenizer(chosen, padding=True, return_tensors="pt", return_token_type_ids=False)
        words = torch.zeros(batch, len(tokenizer)).scatter_(1, inputs["input_ids"], 1.0)  # [batch, vocabulary]
        logits = head(model(**inputs).last_hidden_state[:, 0])  # [batch, vocabulary]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, words) * len(tokenizer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def language_model(args: StandInArguments, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=args.language_width,
            intermediate_size=3 * args.language_width,
            num_hidden_layers=args.language_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            rope_theta=1e4,
            initializer_range=0.1,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


# ------------------------------------------------------------------------------------------------ exercises


class TextExercises(Dataset):
    """Exercises in text, from matching words to letters up to questions about a report. Item by seed and index.

    Every exercise is a sequence of independent turns, packed as in `med3dvlm.model.packing`; the report stands where
    the image tokens will. The first `matching_share` of the items are matching exercises only, the rest a mixture.
    """

    def __init__(self, tokenizer, reports, questions, yes_no, size: int, seed: int, matching_share: float = 0.3):
        self.tokenizer, self.size, self.seed, self.matching_share = tokenizer, size, seed, matching_share
        by_text: dict[str, list] = {}
        for record in [*questions, *yes_no]:
            by_text.setdefault(Path(record.image).parent.name, []).append(record)
        self.cases = [(report, by_text[case]) for case, report in reports.items() if case in by_text]
        answers: dict = {}
        for record in questions:
            answers.setdefault(record.question_type, set()).update(c for c in record.choices if c)
        self.pools = [sorted(words) for _, words in sorted(answers.items())]
        self.pools.append(sorted(set().union(*self.pools)))  # and all of them together
        self._ids: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}|{index}")
        if index < self.matching_share * self.size or rng.random() < 0.3:
            return self.pack("", [self.matching(rng) for _ in range(10)])
        report, records = rng.choice(self.cases)
        return self.pack(report, self.about(report, records, rng))

    def matching(self, rng: random.Random) -> tuple[str, str]:
        """ "liver Choices: A. lung B. liver" -> "B. liver", or the choices and a letter -> the word."""
        pool = rng.choice(self.pools)
        word = rng.choice(pool)
        others = [other for other in pool if other != word]
        rng.shuffle(others)
        # Often a near miss among them ("left lung", "right lung"): a word alone must not be enough.
        if rng.random() < 0.7:
            others.sort(key=lambda other: not set(other.split()) & set(word.split()))
        choices = [word, *others[: rng.choice((1, 2, 3))]]
        rng.shuffle(choices)
        letter = "ABCD"[choices.index(word)]
        if rng.random() < 0.75:
            return f" {closed_question(word, choices)}", closed_answer(letter, word)
        return f" {closed_question('', choices).strip()} {letter}", word

    def about(self, report: str, records, rng: random.Random) -> list[tuple[str, str]]:
        """Every question about a report, closed ones with their choices in a new order, and the report itself."""
        turns = [(rng.choice(CAPTION_PROMPTS), report)]
        for record in records:
            turns.append((f" {record.question}", record.answer))
            choices = [choice for choice in record.choices if choice]
            if len(choices) > 2:
                rng.shuffle(choices)
                letter = "ABCD"[choices.index(record.answer)]
                turns.append((f" {closed_question(record.question, choices)}", closed_answer(letter, record.answer)))
        return turns

    def pack(self, shared: str, turns: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
        """1-D tensors of a sequence: what all turns see, then the turns, labels on their answers."""
        input_ids = list(self.encode(shared)) if shared else []
        start = len(input_ids)
        labels, turn_ids, position_ids = [-100] * start, [0] * start, list(range(start))
        for number, (prompt, answer) in enumerate(turns, 1):
            asked, ids = self.encode(prompt), [*self.encode(f" {answer}"), self.tokenizer.eos_token_id]
            input_ids += asked + ids
            labels += [-100] * len(asked) + ids
            turn_ids += [number] * (len(asked) + len(ids))
            position_ids += range(start, start + len(asked) + len(ids))
        columns = {"input_ids": input_ids, "labels": labels, "turn_ids": turn_ids, "position_ids": position_ids}
        item = {name: torch.tensor(values) for name, values in columns.items()}
        return item | {"attention_mask": torch.ones_like(item["input_ids"])}

    def encode(self, text: str) -> list[int]:
        if text not in self._ids:  # few different texts: most of the time would go into encoding them again
            self._ids[text] = self.tokenizer(text)["input_ids"]
        return self._ids[text]

    def collate(self, items) -> dict[str, torch.Tensor]:
        """A batch for `Qwen2ForCausalLM`: input_ids, labels, position_ids [B, T], attention_mask [B, 1, T, T]."""
        batch = collate_vlm(items, self.tokenizer.pad_token_id)
        batch["attention_mask"] = packed_attention_mask(batch.pop("turn_ids"), torch.float32)
        return batch


@torch.no_grad()
def letter_accuracy(model: Qwen2ForCausalLM, exercises: TextExercises, samples: int = 64) -> float:
    """Share of right letters over closed questions about reports whose text the model is given."""
    rng, right, total = random.Random(exercises.seed), 0, 0
    letters = torch.tensor([exercises.encode(f" {letter}")[0] for letter in "ABCD"])
    for report, records in rng.sample(exercises.cases, min(samples, len(exercises.cases))):
        closed = [turn for turn in exercises.about(report, records, rng) if " Choices: " in turn[0]]
        batch = exercises.collate([exercises.pack(report, closed)])
        labels = batch.pop("labels")[:, 1:]  # [1, T - 1]
        predicted = model(**batch).logits[:, :-1].argmax(dim=-1)  # [1, T - 1]
        asked = torch.isin(labels, letters)
        right += (predicted[asked] == labels[asked]).sum().item()
        total += asked.sum().item()
    return right / total


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Write both models; returns the language model's letter accuracy on text and its training loss.

    Raises:
        RuntimeError: the language model does not bind words to letters well enough to be built on.
    """
    classes = (StandInArguments, DataArguments, StageTrainingArguments)
    model_args, data_args, training_args = parse_stage("stand_in", classes, argv, __doc__)
    log_to_console()
    check_writable(training_args.output_dir)
    set_seed(training_args.seed)
    output = Path(training_args.output_dir)

    captions = read_caption_manifest(data_args.cap_data_path, data_args.data_root, "train")
    questions = read_vqa_csv(model_args.vqa_data_train_path, data_args.data_root)
    yes_no = read_vqa_csv(model_args.vqa_yn_data_train_path, data_args.data_root)
    reports = {Path(record.image).parent.name: record.read_text() for record in captions}
    texts = [*reports.values(), *(f" {prompt}" for prompt in CAPTION_PROMPTS)]
    texts += [f" {closed_question(r.question, r.choices)}" for r in questions]
    texts += [f" {record.question} {record.answer}" for record in yes_no]
    write_text_encoder(list(reports.values()), model_args.text_encoder_width, output / "text_encoder")

    tokenizer = language_tokenizer(texts)
    size = training_args.max_steps * training_args.per_device_train_batch_size
    exercises = TextExercises(tokenizer, reports, questions, yes_no, size, training_args.seed)
    training_args.train_sampling_strategy = "sequential"  # easy exercises come first
    for attempt in range(ATTEMPTS):
        # Which circuits such a small model finds is a matter of its start: a poor one is not worth training longer.
        set_seed(training_args.seed + 1000 * attempt)
        model = language_model(model_args, tokenizer)
        loss = Trainer(model, training_args, exercises.collate, exercises).train().training_loss
        accuracy = letter_accuracy(model.eval(), exercises)
        logger.info("right letters for questions about a report, text only: %.1f%%", 100 * accuracy)
        if accuracy >= REQUIRED_LETTER_ACCURACY:
            model.save_pretrained(output / "language_model")
            tokenizer.save_pretrained(output / "language_model")
            return {"letter_accuracy": accuracy, "train_loss": loss}
    raise RuntimeError(
        f"the stand-in language model finds {accuracy:.0%} of the letters, expected {REQUIRED_LETTER_ACCURACY:.0%} "
        "before images make sense: train longer (--max_steps) or with another --seed"
    )


if __name__ == "__main__":
    run(main)
