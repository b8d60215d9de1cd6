"""One page about a quickstart run: ``summary.json`` for programs, ``report.html`` (self-contained) for readers.

    python -m med3dvlm.evaluation.report --run_dir output/quickstart

Reads what the stages left in the run folder: ``stages.json``, ``<stage>/trainer_state.json`` and
``eval/{retrieval,caption,caption_shuffled,vqa_closed,vqa_closed_shuffled,vqa_open}/``.
"""

import argparse
import base64
import io
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from med3dvlm.data.phantom import ORGANS
from med3dvlm.data.volume import load_volume
from med3dvlm.evaluation.command import run
from med3dvlm.evaluation.common import write_json, write_text

BLUE, GREY, RED = "#2f6f9f", "#b8bec6", "#b3402f"
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#fff;max-width:960px;margin:2em auto;padding:0 1em}
h1{font-size:1.6em;margin-bottom:.2em} h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #d8dde3}
table{border-collapse:collapse;margin:.8em 0} td,th{padding:.25em .9em .25em 0;text-align:left;vertical-align:top}
th{border-bottom:1px solid #b8bec6;font-weight:600} td.n,th.n{text-align:right}
td:first-child{white-space:pre-wrap} img{max-width:100%}
.note{color:#5b6773} .case{margin:1.5em 0;padding:1em;border:1px solid #d8dde3;border-radius:6px}
.right{color:#2e7d4f} .wrong{color:#b3402f}
"""


def main(argv: list[str] | None = None) -> dict:
    """Write both files into the run folder and print the table; returns the content of ``summary.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", required=True, type=Path)
    parser.add_argument("--cases", type=int, default=4, help="held-out scans to show (default: %(default)s)")
    args = parser.parse_args(argv)
    run = Run(args.run_dir)
    summary = summarize(run)
    write_text(args.run_dir / "report.html", page(run, summary, args.cases))
    write_json(args.run_dir / "summary.json", summary)
    for row in result_rows(summary):
        print("  ".join(f"{cell:<34}" if i == 0 else f"{cell:>12}" for i, cell in enumerate(row)))
    print(f"written: {args.run_dir / 'summary.json'} and {args.run_dir / 'report.html'}")
    return summary


class Run:
    """The files of one run, read when they are needed.

    Raises:
        FileNotFoundError: a stage left no result.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.stages: dict[str, dict] = json.loads((folder / "stages.json").read_text())["stages"]
        self.seed: int = json.loads((folder / "stages.json").read_text())["seed"]

    def evaluation(self, name: str) -> dict:
        return json.loads((self.folder / "eval" / name / "summary.json").read_text())

    def predictions(self, name: str) -> list[dict]:
        lines = (self.folder / "eval" / name / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and training losses of every stage that trained, in the order of the stages."""
        curves = {}
        for file in self.folder.glob("*/trainer_state.json"):
            logs = [log for log in json.loads(file.read_text())["log_history"] if "loss" in log]
            curves[file.parent.name] = ([log["step"] for log in logs], [log["loss"] for log in logs])
        order = list(self.stages)
        return dict(sorted(curves.items(), key=lambda c: (order.index(c[0]) if c[0] in order else len(order), c[0])))


def named_organs(text: str, organs: Sequence[str] = ORGANS) -> set[str]:
    """Organs that a report calls abnormal: those in its sentences, the ones that say "normal" left out."""
    findings = [part for part in re.split(r"[.!?]", text.lower()) if not re.search(r"\bnormal\b", part)]
    return {organ for organ in organs if any(re.search(rf"\b{organ}s?\b", part) for part in findings)}


def organ_named_share(rows: Sequence[dict], organs: Sequence[str] = ORGANS) -> float:
    """Share of reports whose abnormal organs are exactly those of the true report."""
    return float(np.mean([named_organs(r["prediction"], organs) == named_organs(r["answer"], organs) for r in rows]))


def summarize(run: Run) -> dict:
    """All numbers of the run; shares between 0 and 1."""
    retrieval, vqa = run.evaluation("retrieval"), run.evaluation("vqa_closed")
    pool = min(retrieval["pools"], key=int)
    shuffled, caption = run.evaluation("vqa_closed_shuffled"), run.evaluation("caption")
    return {
        "seed": run.seed,
        "seconds": {name: stage["seconds"] for name, stage in run.stages.items()},
        "peak_mb": {name: stage["peak_mb"] for name, stage in run.stages.items()},
        "retrieval": {"pool": int(pool), **retrieval["pools"][pool], "same_series": retrieval["same_series"]},
        "vqa": {
            "closed_accuracy": vqa["closed_accuracy"],
            "by_type": vqa["by_type"],
            "published_rule": vqa["published_rule"],
            "shuffled": {"closed_accuracy": shuffled["closed_accuracy"], "by_type": shuffled["by_type"]},
            "open": run.evaluation("vqa_open")["scores"],
        },
        "caption": {
            "organ_named": organ_named_share(run.predictions("caption")),
            **caption["scores"],
            "distinct_outputs": caption["distinct_outputs"],
            "shuffled": {"organ_named": organ_named_share(run.predictions("caption_shuffled"))},
        },
    }


def result_rows(summary: dict) -> list[tuple[str, ...]]:
    """The table of results, as text: what, the model's value, the value with exchanged images or of guessing."""
    retrieval, vqa, caption = summary["retrieval"], summary["vqa"], summary["caption"]
    pool, series = retrieval["pool"], retrieval["same_series"]
    rows = [("held-out phantoms", "model", "control")]
    rows += [
        (f"retrieval {name.replace('_', ' ')}, R@1 of {pool}", percent(retrieval[name]["R@1"]), percent(1 / pool))
        for name in ("image_to_text", "text_to_image")
    ]
    if series:
        rows += [
            (
                f"  same plane and phase, {name.replace('_', ' ')}",
                percent(series[name]["R@1"]),
                percent(series["chance"]),
            )
            for name in ("image_to_text", "text_to_image")
        ]
    rows += [("closed questions", percent(vqa["closed_accuracy"]), percent(vqa["shuffled"]["closed_accuracy"]))]
    rows += [
        (f"  {name}", percent(value), percent(vqa["shuffled"]["by_type"][name]))
        for name, value in vqa["by_type"].items()
    ]
    rows += [
        ("reports naming the right organ", percent(caption["organ_named"]), percent(caption["shuffled"]["organ_named"]))
    ]
    return rows


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def page(run: Run, summary: dict, cases: int) -> str:
    """The whole page; pictures are embedded."""
    stages = [("stage", "seconds", "peak memory, MB")]
    stages += [(name, f"{s['seconds']:.0f}", f"{s['peak_mb']:.0f}") for name, s in run.stages.items()]
    stages += [("all", f"{sum(s['seconds'] for s in run.stages.values()):.0f}", "")]
    parts = [
        "<h1>Med3DVLM quickstart</h1>",
        f"<p class=note>Seed {run.seed}. Every number is from this run, on synthetic scans that no stage has seen. "
        "The models are tiny: this shows that the pipeline works, not what the published model can do. "
        "For research only, not a medical device.</p>",
        "<h2>Results</h2>",
        table(result_rows(summary)),
        "<p class=note>Control: images exchanged between cases whose answers differ, so that a model which looks at "
        "them must be wrong (guessing from the choices alone is right in a quarter to a third of the questions); for "
        "retrieval, guessing. The held-out scans are new, the words of their reports are not: most occur in training "
        "too.</p>",
        "<h2>Answers to closed questions</h2>",
        picture(accuracy_figure(summary["vqa"]), "accuracy per question type"),
        "<h2>Similarity of images and reports</h2>",
        picture(similarity_figure(run, summary["retrieval"]["pool"]), "similarity matrix"),
        "<h2>Held-out scans</h2>",
        "<p class=note>A generated report is green when it names the right organ.</p>",
        *case_sections(run, cases),
        "<h2>Training</h2>",
        picture(loss_figure(run.losses()), "training losses"),
        table(stages),
    ]
    title = "<title>Med3DVLM quickstart</title>"
    head = f'<!doctype html><html lang=en><head><meta charset="utf-8">{title}<style>{STYLE}</style></head>'
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table, its header the first row; all columns but the first are numbers."""
    lines = []
    for r, row in enumerate(rows):
        tag = "td" if r else "th"
        cells = (f"<{tag}{' class=n' if c else ''}>{escape(cell)}</{tag}>" for c, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def picture(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


def loss_figure(curves: dict[str, tuple[list[int], list[float]]]) -> Figure:
    figure = Figure(figsize=(3 * max(len(curves), 1), 2.6), layout="constrained")
    for i, (name, (steps, losses)) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), i + 1)
        axes.plot(steps, losses, color=BLUE, linewidth=1.2)
        axes.set(title=name, xlabel="step", ylabel="loss" if i == 0 else None)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def similarity_figure(run: Run, pool: int) -> Figure:
    with np.load(run.folder / "eval" / "retrieval" / "similarity.npz") as file:
        scores = file["scores"][:pool, :pool]
    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(scores, cmap="viridis")
    axes.set(xlabel="report", ylabel="image", title="cosine similarity; the diagonal is right")
    figure.colorbar(image, ax=axes, shrink=0.85)
    return figure


def accuracy_figure(vqa: dict) -> Figure:
    names = list(vqa["by_type"])
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for shift, label, values, color in (
        (-0.2, "model", vqa["by_type"], BLUE),
        (0.2, "images exchanged", vqa["shuffled"]["by_type"], GREY),
    ):
        bars = axes.bar(
            np.arange(len(names)) + shift, [100 * values[name] for name in names], 0.38, color=color, label=label
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.axhline(25, color=RED, linewidth=0.8, linestyle=":", label="guessing among four")
    axes.set(xticks=range(len(names)), xticklabels=names, ylim=(0, 112), ylabel="right, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return figure


def planes_figure(path: str) -> Figure:
    """The middle slice along each axis of a prepared volume."""
    array = load_volume(path).array  # [D, H, W]
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    for axis, name in enumerate("DHW"):
        axes = figure.add_subplot(1, 3, axis + 1)
        axes.imshow(array.take(array.shape[axis] // 2, axis=axis), cmap="gray", vmin=0, vmax=1, aspect="auto")
        axes.set_title(f"middle slice along {name}", fontsize=8)
        axes.axis("off")
    return figure


def case_sections(run: Run, count: int) -> list[str]:
    """A few scans with the true and the generated report, and the questions asked about them."""
    closed, opened = run.predictions("vqa_closed"), run.predictions("vqa_open")
    sections = []
    for row in run.predictions("caption")[:count]:
        same = named_organs(row["prediction"]) == named_organs(row["answer"])
        asked = [
            (q["question"], f"{q['answer_choice']}. {q['answer']}", q["prediction"], q["correct"])
            for q in closed
            if q["image"] == row["image"]
        ]
        asked += [
            (q["question"], q["answer"], q["prediction"], q["prediction"].lower() == q["answer"].lower())
            for q in opened
            if q["image"] == row["image"]
        ]
        lines = "".join(
            f"<tr><td>{escape(question)}</td><td>{escape(true)}</td>"
            f"<td class={'right' if right else 'wrong'}>{escape(said)}</td></tr>"
            for question, true, said, right in asked
        )
        sections.append(
            f"<div class=case>{picture(planes_figure(row['image']), 'three planes of the scan')}"
            f"<p><b>report</b> {escape(row['answer'])}</p>"
            f"<p><b>generated</b> <span class={'right' if same else 'wrong'}>{escape(row['prediction'])}</span></p>"
            f"<table><tr><th>question</th><th>answer</th><th>model</th></tr>{lines}</table></div>"
        )
    return sections


if __name__ == "__main__":
    run(main)
