"""Report generation: describe every image of the test split, compare with its report.

    python -m med3dvlm.evaluation.caption --model_name_or_path M --data_root data --cap_data_path M3D_Cap.json

Writes ``<model>_eval_caption.csv`` (published columns), ``predictions.jsonl`` (before scoring, and again with the
scores) and ``summary.json``.
"""

import argparse

from med3dvlm.data.manifest import check_files_exist, read_caption_manifest
from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.evaluation import common
from med3dvlm.evaluation.command import add_common_arguments, add_text_arguments, at_least, run
from med3dvlm.evaluation.controls import control_record, shown_images
from med3dvlm.evaluation.metrics import TEXT_METRICS, distinct_share
from med3dvlm.inference import load_model

CSV_HEADER = ("Question", "Ground Truth", "pred", *TEXT_METRICS)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, model="./models/Med3DVLM-Qwen-2.5-7B")
    add_text_arguments(parser)
    parser.add_argument("--cap_data_path", default="./data/M3D_Cap_npy/M3D_Cap.json")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--limit", type=at_least(1), default=1000, help="the first N of the split (published: %(default)s)"
    )
    parser.add_argument("--prompt", default=CAPTION_PROMPTS[0], help="asked about every image (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Run the evaluation; returns the content of ``summary.json``."""
    args = parse_arguments(argv)
    records = read_caption_manifest(args.cap_data_path, args.data_root, args.split, check_files=False)[: args.limit]
    common.require_samples(records, args.cap_data_path)
    check_files_exist(records)
    samples = [common.Sample(r.image, args.prompt, r.read_text().strip(), r.where) for r in records]
    images, references = [sample.image for sample in samples], [sample.answer for sample in samples]
    common.check_metrics(args)
    model = load_model(args.model_name_or_path, args.device, args.dtype)
    common.check_questions(model, [(args.prompt, "--prompt")], "caption", args.max_new_tokens)

    shown = shown_images(images, references, args.baseline, args.seed)
    folder = common.output_folder(args, "caption")
    predictions = common.answer_samples(
        model, samples, shown, "caption", args.batch_size, args.max_new_tokens, args.num_workers
    )
    common.write_answers(folder, samples, shown, predictions)
    columns, scores = common.score_texts(args, predictions, references)
    summary = {
        "task": "caption",
        **common.run_record(args, model, samples, args.cap_data_path),
        **control_record(images, references, args.baseline, shown),
        **scores,
        "distinct_outputs": distinct_share(predictions),
    }

    label = common.model_label(args.model_name_or_path)
    common.write_json_lines(folder / "predictions.jsonl", common.sample_records(samples, shown, predictions, columns))
    rows = [
        (sample.question, sample.answer, text, *common.score_cells(columns, i))
        for i, (sample, text) in enumerate(zip(samples, predictions, strict=True))
    ]
    common.write_csv(folder / f"{label}_eval_caption.csv", [CSV_HEADER, *rows])
    common.write_json(folder / "summary.json", summary)
    common.print_scores(summary, folder)
    return summary


if __name__ == "__main__":
    run(main)
