"""What the evaluation commands share: batched answers, result files, what makes a score repeatable."""

import argparse
import csv
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from med3dvlm.data.augment import to_unit
from med3dvlm.data.codes import FileImages
from med3dvlm.data.files import write_bytes
from med3dvlm.data.manifest import ManifestError
from med3dvlm.data.preprocess import PreprocessConfig
from med3dvlm.data.volume import VolumeError
from med3dvlm.evaluation import metrics
from med3dvlm.evaluation.command import RequestError
from med3dvlm.evaluation.wordnet import INSTALL_COMMAND, find_wordnet
from med3dvlm.inference import QuestionError


@dataclass(frozen=True)
class Sample:
    """One question about one image. ``where`` names manifest and row; ``question`` has no image tokens."""

    image: str
    question: str
    answer: str
    where: str
    question_type: int | str = ""
    answer_choice: str = ""
    choices: tuple[str | None, ...] = ()


def require_samples(records: Sequence, manifest: str) -> None:
    """Raise ManifestError when there is nothing to evaluate."""
    if not records:
        raise ManifestError(f"{manifest}: no rows to evaluate")


def output_folder(args: argparse.Namespace, name: str) -> Path:
    """``--output_dir``, or ``output/eval_<name>[_<baseline>]``; made when it is not there."""
    folder = Path(args.output_dir or f"output/eval_{name}" + (f"_{args.baseline}" if args.baseline else ""))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Images(Dataset):
    """Preprocessed images ``[1, D, H, W]`` by path; None is an empty image."""

    def __init__(self, paths: Sequence[str | None], where: dict[str, str], config: PreprocessConfig):
        self.paths, self.where, self.size = paths, where, config.size
        self.read = FileImages(config)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.paths[index]
        if path is None:
            return torch.zeros(1, *self.size)
        try:
            return to_unit(self.read(path)[None])[0]
        except VolumeError as error:
            raise VolumeError(f"{self.where[path]}: {error}") from error


def image_batches(
    paths: Sequence[str | None], where: dict[str, str], config: PreprocessConfig, batch_size: int, num_workers: int
):
    """Batches ``(paths, images [B, 1, D, H, W])`` in the given order. ``where`` maps a path to manifest and row.

    Raises:
        VolumeError: an image cannot be read; the message names manifest, row and file. Nothing is skipped.
    """
    loader = DataLoader(_Images(paths, where, config), batch_size=batch_size, num_workers=num_workers)
    for i, images in enumerate(loader):
        yield paths[i * batch_size : (i + 1) * batch_size], images


def check_questions(model, questions: Iterable[tuple[str, str]], kind: str, max_new_tokens: int) -> None:
    """Raise QuestionError for the first question that the model cannot be asked.

    questions: text and where it stands. All are checked before the first one is answered, which may be hours earlier.
    """
    where_of: dict[str, str] = {}  # tables repeat their questions
    for question, where in questions:
        where_of.setdefault(question, where)
    for question, where in where_of.items():
        try:
            model.check_question(question, kind, max_new_tokens)
        except QuestionError as error:
            raise QuestionError(f"{where}: {error}") from error


def check_metrics(args: argparse.Namespace, bertscore: bool = True) -> None:
    """Load what ``--extra_metric`` and, where it is used, ``--bertscore_model`` name, before anything is answered.

    Raises RequestError where one cannot be loaded.
    """
    wanted = [("--extra_metric", name, (metrics.load_extra, name)) for name in args.extra_metric]
    if bertscore and args.bertscore_model:
        load = (metrics.load_bertscore, args.bertscore_model, args.bertscore_layers)
        wanted.append(("--bertscore_model", args.bertscore_model, load))
    for flag, name, (load, *values) in wanted:
        try:
            load(*values)
        except Exception as error:  # code of others, and the errors of the hub's client: they have no base in common
            what = "cannot be loaded" if os.path.exists(name) else "no such folder, and not to be had from the hub"
            raise RequestError(f"{flag} {name}: {what} ({' '.join(str(error).split())})") from error


def answer_samples(
    model,
    samples: Sequence[Sample],
    shown: Sequence[str | None],
    kind: str,
    batch_size: int,
    max_new_tokens: int,
    num_workers: int = 0,
) -> list[str]:
    """Greedy answers, one per sample. Each image is read and encoded once, whatever the number of its questions."""
    rows_of: dict[str | None, list[int]] = defaultdict(list)
    where = {}
    for row, (path, sample) in enumerate(zip(shown, samples, strict=True)):
        rows_of[path].append(row)
        where.setdefault(sample.image, sample.where)
    answers = [""] * len(samples)
    with tqdm(total=len(samples), desc="answers", unit="question") as bar:
        for paths, images in image_batches(list(rows_of), where, model.processor.preprocess, batch_size, num_workers):
            features = model.encode(images)  # [images, tokens, hidden]
            rows = [(row, i) for i, path in enumerate(paths) for row in rows_of[path]]
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                texts = model.answer_features(
                    features[[i for _, i in batch]],
                    [samples[row].question for row, _ in batch],
                    kind,
                    max_new_tokens,
                )
                for (row, _), text in zip(batch, texts, strict=True):
                    answers[row] = text
                bar.update(len(batch))
    return answers


def score_texts(args: argparse.Namespace, predictions: Sequence[str], references: Sequence[str]) -> tuple[dict, dict]:
    """Per-sample columns and the summary entries ``scores``, ``missing`` and ``extra`` of the text metrics."""
    columns = metrics.text_metrics(
        predictions,
        references,
        use_meteor=find_wordnet() is not None,
        bertscore_model=args.bertscore_model,
        bertscore_layers=args.bertscore_layers,
    )
    how = {
        "meteor": f"no WordNet on this machine; `{INSTALL_COMMAND}` brings it",
        "bert_f1": "not asked for; --bertscore_model FOLDER names a local model",
    }
    summary = {
        "scores": {name: None if values is None else float(np.mean(values)) for name, values in columns.items()},
        "missing": {name: how[name] for name, values in columns.items() if values is None},
        "extra": extra_scores(args, predictions, references),
    }
    return columns, summary


def extra_scores(args: argparse.Namespace, predictions: Sequence[str], references: Sequence[str]) -> dict[str, dict]:
    """Results of every ``--extra_metric``, by its name."""
    return {name: metrics.extra_metric(name, predictions, references) for name in args.extra_metric}


def score_cells(columns: dict[str, Sequence | None], row: int) -> list:
    """The text scores of one row in the order of the published columns; None where a metric is missing."""
    return [columns[name] and columns[name][row] for name in metrics.TEXT_METRICS]


def run_record(args: argparse.Namespace, model, samples: Sequence[Sample], manifest: str) -> dict:
    """What a reader needs to repeat the numbers: model, prompts, decoding, preprocessing and the exact rows."""
    return {
        "model": args.model_name_or_path,
        "baseline": args.baseline,
        "seed": args.seed,
        "split": split_record(args, manifest, [(s.image, s.question, s.answer) for s in samples]),
        "prompt": {"example": samples[0].question, "image_tokens": model.processor.num_image_tokens},
        "decoding": {
            "strategy": "greedy",
            "max_new_tokens": args.max_new_tokens,
            "batch_size": args.batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "preprocessing": model.processor.preprocess.to_dict(),
    }


def split_record(args: argparse.Namespace, manifest: str, rows: Sequence[Sequence[str]]) -> dict:
    """Manifest, counts, and the SHA-256 of the evaluated rows ``(image, texts ...)`` in order.

    Images count relative to the data root, so the hash is the same wherever the data lies.
    """
    rows = [(Path(os.path.relpath(image, args.data_root)).as_posix(), *texts) for image, *texts in rows]
    digest = hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
    return {"manifest": str(manifest), "samples": len(rows), "images": len({row[0] for row in rows}), "sha256": digest}


def sample_records(
    samples: Sequence[Sample],
    shown: Sequence[str | None],
    predictions: Sequence[str],
    columns: dict[str, Sequence | None],
) -> list[dict]:
    """Everything about each sample, for ``predictions.jsonl``; ``columns`` are per-sample scores."""
    scores = {name: values for name, values in columns.items() if values is not None}
    return [
        {**asdict(sample), "shown": image, "prediction": text, **{name: values[i] for name, values in scores.items()}}
        for i, (sample, image, text) in enumerate(zip(samples, shown, predictions, strict=True))
    ]


def write_answers(
    folder: Path, samples: Sequence[Sample], shown: Sequence[str | None], predictions: Sequence[str]
) -> None:
    """Write ``predictions.jsonl`` without scores, so that no failure of scoring loses the answers.

    The summary of an older run goes: it is not about these answers.
    """
    (folder / "summary.json").unlink(missing_ok=True)
    write_json_lines(folder / "predictions.jsonl", sample_records(samples, shown, predictions, {}))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file that appears under its name only when it is whole."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: str | os.PathLike, rows: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(path: str | os.PathLike, rows: Sequence[Sequence]) -> None:
    """A table, its header the first row; None becomes an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    write_text(path, buffer.getvalue())


def model_label(name_or_path: str) -> str:
    """The last part of a model's name or path: how published result files start."""
    return Path(name_or_path).resolve().name if os.path.exists(name_or_path) else name_or_path.rsplit("/", 1)[-1]


def print_scores(summary: dict, folder: Path) -> None:
    """The numbers of a summary, one a line, and where the files lie."""
    for name, value in _flat({key: value for key, value in summary.items() if key not in _RUN_KEYS}):
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    print(f"written to {folder}")


_RUN_KEYS = ("model", "seed", "split", "prompt", "decoding", "preprocessing")


def _flat(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        elif value is not None:
            yield f"{prefix}{key}", value
