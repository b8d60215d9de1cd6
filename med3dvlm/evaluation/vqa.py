"""Question answering: closed questions (four choices) by accuracy, open ones by the text metrics.

    python -m med3dvlm.evaluation.vqa --model_name_or_path M --data_root data --vqa_data_test_path T.csv --close_ended

Writes ``<model>_eval_close_vqa.csv`` or ``..._open_vqa.csv`` (published columns), ``predictions.jsonl`` (before
scoring, and again with the scores) and ``summary.json`` into ``--output_dir``. A closed answer is right when it starts
with the right letter ("C. liver"); the published rule (letter and full stop anywhere) is reported beside it.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from med3dvlm.data.manifest import check_closed, check_files_exist, read_vqa_csv
from med3dvlm.data.prompts import QUESTION_TYPES, closed_question
from med3dvlm.evaluation import common
from med3dvlm.evaluation.command import add_common_arguments, add_text_arguments, at_least, run
from med3dvlm.evaluation.controls import control_record, shown_images
from med3dvlm.evaluation.metrics import TEXT_METRICS, distinct_share, parse_choice, published_choice_match
from med3dvlm.inference import load_model

CLOSED_HEADER = ("Question Type", "Question", "Answer", "Answer Choice", "Pred", "Correct")
OPEN_HEADER = ("Question Type", "Question", "Answer", "Pred", *TEXT_METRICS)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, model="./models/Med3DVLM-Qwen-2.5-7B")
    add_text_arguments(parser)
    parser.add_argument("--vqa_data_test_path", default="./data/M3D-VQA/M3D_VQA_test.csv")
    parser.add_argument("--close_ended", action="store_true", help="offer the choices and score the letter")
    parser.add_argument("--limit", type=at_least(1), help="only the first N questions")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Run the evaluation; returns the content of ``summary.json``."""
    args = parse_arguments(argv)
    task = "close_vqa" if args.close_ended else "open_vqa"
    samples = read_samples(args)
    common.check_metrics(args, bertscore=not args.close_ended)
    model = load_model(args.model_name_or_path, args.device, args.dtype)
    common.check_questions(model, [(s.question, s.where) for s in samples], "vqa", args.max_new_tokens)

    images, answers = [s.image for s in samples], [s.answer for s in samples]
    types = [s.question_type for s in samples]
    shown = shown_images(images, answers, args.baseline, args.seed, types)
    folder = common.output_folder(args, task)
    predictions = common.answer_samples(
        model, samples, shown, "vqa", args.batch_size, args.max_new_tokens, args.num_workers
    )
    common.write_answers(folder, samples, shown, predictions)
    score = score_closed if args.close_ended else score_open
    columns, scores = score(args, samples, predictions)
    summary = {
        "task": task,
        **common.run_record(args, model, samples, args.vqa_data_test_path),
        **control_record(images, answers, args.baseline, shown, types),
        **scores,
        "distinct_outputs": distinct_share(predictions),
    }

    label = common.model_label(args.model_name_or_path)
    common.write_json_lines(folder / "predictions.jsonl", common.sample_records(samples, shown, predictions, columns))
    write_table(folder / f"{label}_eval_{task}.csv", args.close_ended, samples, predictions, columns)
    common.write_json(folder / "summary.json", summary)
    common.print_scores(summary, folder)
    return summary


def read_samples(args: argparse.Namespace) -> list[common.Sample]:
    """The rows of the table as questions; a closed one carries its choices in its text."""
    records = read_vqa_csv(args.vqa_data_test_path, args.data_root, check_files=False)[: args.limit]
    common.require_samples(records, args.vqa_data_test_path)
    check_files_exist(records)
    if args.close_ended:
        check_closed(records)
    return [
        common.Sample(
            image=record.image,
            question=closed_question(record.question, record.choices) if args.close_ended else record.question,
            answer=record.answer,
            where=record.where,
            question_type=record.question_type,
            answer_choice=record.answer_choice,
            choices=record.choices,
        )
        for record in records
    ]


def score_closed(
    args: argparse.Namespace, samples: Sequence[common.Sample], predictions: Sequence[str]
) -> tuple[dict[str, list], dict]:
    """Per-sample columns and accuracies, overall and per question type."""
    parsed = [parse_choice(text, sample.choices) for text, sample in zip(predictions, samples, strict=True)]
    columns = {
        "choice": parsed,
        "correct": [int(p == s.answer_choice) for p, s in zip(parsed, samples, strict=True)],
        "correct_published": [
            int(published_choice_match(p, s.answer_choice)) for p, s in zip(predictions, samples, strict=True)
        ],
    }
    answers = [f"{sample.answer_choice}. {sample.answer}" for sample in samples]
    return columns, {
        "closed_accuracy": float(np.mean(columns["correct"])),
        "by_type": mean_by_type(samples, columns["correct"]),
        "published_rule": {
            "closed_accuracy": float(np.mean(columns["correct_published"])),
            "by_type": mean_by_type(samples, columns["correct_published"]),
        },
        "without_choice": parsed.count(None) / len(parsed),
        "questions_by_type": {name: len(rows) for name, rows in rows_by_type(samples).items()},
        "extra": common.extra_scores(args, predictions, answers),
    }


def score_open(
    args: argparse.Namespace, samples: Sequence[common.Sample], predictions: Sequence[str]
) -> tuple[dict, dict]:
    """Per-sample columns and text metrics, overall and per question type."""
    columns, summary = common.score_texts(args, predictions, [sample.answer for sample in samples])
    per_metric = {name: mean_by_type(samples, values) for name, values in columns.items() if values is not None}
    summary["by_type"] = {
        name: {metric: means[name] for metric, means in per_metric.items()} for name in rows_by_type(samples)
    }
    summary["questions_by_type"] = {name: len(rows) for name, rows in rows_by_type(samples).items()}
    return columns, summary


def rows_by_type(samples: Sequence[common.Sample]) -> dict[str, list[int]]:
    """Row numbers per question type, types in their numeric order."""
    rows = defaultdict(list)
    for i, sample in enumerate(samples):
        rows[sample.question_type].append(i)
    return {QUESTION_TYPES.get(key, str(key)): rows[key] for key in sorted(rows, key=str)}


def mean_by_type(samples: Sequence[common.Sample], values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.mean([values[i] for i in rows])) for name, rows in rows_by_type(samples).items()}


def write_table(
    path, closed: bool, samples: Sequence[common.Sample], predictions: Sequence[str], columns: dict
) -> None:
    """The published table; ``Correct`` is 1 where the answer starts with the right letter."""
    rows = [CLOSED_HEADER if closed else OPEN_HEADER]
    for i, (sample, text) in enumerate(zip(samples, predictions, strict=True)):
        start = (sample.question_type, sample.question, sample.answer)
        rest = (
            (sample.answer_choice, text, columns["correct"][i]) if closed else (text, *common.score_cells(columns, i))
        )
        rows.append((*start, *rest))
    common.write_csv(path, rows)


if __name__ == "__main__":
    run(main)
