"""Image-text retrieval with the dual encoder: R@1, R@5 and R@10 both ways among the first N cases of the test split.

    python -m med3dvlm.evaluation.retrieval --model_name_or_path M --data_root data --cap_data_path M3D_Cap.json

Everything is encoded once, whatever the number of pools. Because plane and phase alone already tell many cases apart,
retrieval is also reported among the cases of one series name (plane and phase). Writes ``<model>_eval_retrieval.csv``
(published names: IR image to text, TR text to image), ``similarity.npz`` and ``summary.json`` into ``--output_dir``.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from med3dvlm.data.collate import pad_sequences
from med3dvlm.data.datasets import PairDataset
from med3dvlm.data.files import atomic_path
from med3dvlm.data.manifest import CaptionRecord, check_files_exist, read_caption_manifest
from med3dvlm.evaluation import common
from med3dvlm.evaluation.command import RequestError, add_common_arguments, at_least, run
from med3dvlm.evaluation.controls import control_record, shown_images
from med3dvlm.evaluation.metrics import retrieval_metrics
from med3dvlm.inference import ImageTextEncoder, load_clip

PUBLISHED_POOLS = (100, 500, 1000, 2000)
TOP_K = (1, 5, 10)
DIRECTIONS = {"rows": "image_to_text", "columns": "text_to_image"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, model="./output/DCFormer_SigLIP")
    parser.add_argument("--cap_data_path", default="./data/M3D_Cap_npy/M3D_Cap.json")
    parser.add_argument("--split", default="test")
    parser.add_argument("--max_length", type=at_least(1), default=512, help="tokens of a report")
    parser.add_argument(
        "--pool_sizes",
        "--test_size",
        type=int,
        nargs="+",
        help=f"pools to search (default: those of {PUBLISHED_POOLS} that the split can fill)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Run the evaluation; returns the content of ``summary.json``."""
    args = parse_arguments(argv)
    records = read_caption_manifest(args.cap_data_path, args.data_root, args.split, check_files=False)
    common.require_samples(records, args.cap_data_path)
    sizes = pool_sizes(args.pool_sizes, len(records))
    records = records[: max(sizes)]
    check_files_exist(records)
    model = load_clip(args.model_name_or_path, args.device, args.dtype)

    pairs = PairDataset(records, model.tokenizer, args.max_length, model.preprocess)
    rows = [pairs.load_text(i) for i in range(len(pairs))]
    paths, reports = [record.image for record in records], [row["text"] for row in rows]
    shown = shown_images(paths, reports, args.baseline, args.seed)
    folder = common.output_folder(args, "retrieval")
    images = encode_images(model, records, shown, args.batch_size, args.num_workers)  # [N, width]
    texts = encode_texts(model, rows, args.batch_size)  # [N, width]
    scores = (images @ texts.T).numpy()  # [N, N], row: image

    summary = {
        "task": "retrieval",
        "model": args.model_name_or_path,
        "baseline": args.baseline,
        "seed": args.seed,
        "split": common.split_record(args, args.cap_data_path, list(zip(paths, reports, strict=True))),
        **control_record(paths, reports, args.baseline, shown),
        "max_length": args.max_length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "preprocessing": model.preprocess.to_dict(),
        "pools": {str(size): named_scores(scores[:size, :size]) for size in sizes},
        "same_series": same_series_scores(scores, [series_name(path) for path in paths]),
    }
    label = common.model_label(args.model_name_or_path)
    common.write_csv(folder / f"{label}_eval_retrieval.csv", published_rows(summary["pools"]))
    with atomic_path(folder / "similarity.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            scores=scores,
            images=np.array(paths),
            series=np.array([series_name(path) for path in paths]),
        )
    common.write_json(folder / "summary.json", summary)
    common.print_scores(summary, folder)
    return summary


def pool_sizes(asked: Sequence[int] | None, available: int) -> list[int]:
    """The pools to report, ascending. Raises RequestError for one that the split cannot fill."""
    if asked is None:
        return [size for size in PUBLISHED_POOLS if size <= available] or [available]
    too_large = [size for size in asked if not 1 <= size <= available]
    if too_large:
        raise RequestError(f"--pool_sizes {' '.join(map(str, too_large))}: the split has {available} cases")
    return sorted(asked)


def encode_images(
    model: ImageTextEncoder,
    records: Sequence[CaptionRecord],
    shown: Sequence[str | None],
    batch_size: int,
    num_workers: int,
) -> torch.Tensor:
    """Features ``[N, width]`` of the image that each row shows; each image is read and encoded once."""
    where = {record.image: record.where for record in records}
    paths = list(dict.fromkeys(shown))
    batches = common.image_batches(paths, where, model.preprocess, batch_size, num_workers)
    with tqdm(total=len(paths), desc="images") as bar:
        features = []
        for names, images in batches:
            features.append(model.encode_images(images))
            bar.update(len(names))
    place = {path: i for i, path in enumerate(paths)}
    return torch.cat(features)[[place[path] for path in shown]]


def encode_texts(model: ImageTextEncoder, rows: Sequence[dict], batch_size: int) -> torch.Tensor:
    """Features ``[N, width]`` of the reports."""

    def collate(batch):
        ids = pad_sequences([row["input_ids"] for row in batch], model.tokenizer.pad_token_id)
        return ids, pad_sequences([row["attention_mask"] for row in batch], 0)

    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collate)
    return torch.cat([model.encode_texts(ids, mask) for ids, mask in tqdm(loader, desc="texts")])


def named_scores(scores: np.ndarray) -> dict[str, dict[str, float]]:
    """``{direction: {"R@k": recall, "P@k": precision, "F1@k": f1}}`` of one pool."""
    result = retrieval_metrics(scores, TOP_K)
    short = {"recall": "R", "precision": "P", "f1": "F1"}
    return {
        DIRECTIONS[side]: {f"{short[name]}@{k}": result[side][k][name] for name in short for k in TOP_K}
        for side in DIRECTIONS
    }


def series_name(path: str) -> str:
    """Plane and phase as M3D writes them into the name of a series: ``.../Axial_arterial_phase.nii.gz``."""
    return Path(path).name.split(".")[0]


def same_series_scores(scores: np.ndarray, series: Sequence[str]) -> dict | None:
    """R@1 among cases of one series name, averaged over all cases that have company; None where none has.

    ``chance`` is the R@1 of guessing.
    """
    members = defaultdict(list)
    for i, name in enumerate(series):
        members[name].append(i)
    groups = [rows for rows in members.values() if len(rows) > 1]
    if not groups:
        return None
    weights = np.array([len(rows) for rows in groups])
    recalls = {side: [] for side in DIRECTIONS}
    for rows in groups:
        result = retrieval_metrics(scores[np.ix_(rows, rows)], ks=(1,))
        for side in DIRECTIONS:
            recalls[side].append(result[side][1]["recall"])
    return {
        "groups": len(groups),
        "cases": int(weights.sum()),
        "chance": len(groups) / int(weights.sum()),
        **{DIRECTIONS[side]: {"R@1": float(np.average(recalls[side], weights=weights))} for side in DIRECTIONS},
    }


def published_rows(pools: dict[str, dict]) -> list[tuple[str, str]]:
    """Rows of the published table, which has no header: ``IR_1@100`` (recall), ``IAcc_1@100``; four digits."""
    return [
        (f"{letter}{name}_{k}@{size}", f"{scores[direction][f'R@{k}']:.4f}")
        for size, scores in pools.items()
        for name in ("R", "Acc")  # with one match per query both are the same number
        for k in TOP_K
        for letter, direction in (("I", "image_to_text"), ("T", "text_to_image"))
    ]


if __name__ == "__main__":
    run(main)
