import json
import re

import numpy as np
import pytest

from med3dvlm.data.volume import write_prepared
from med3dvlm.evaluation import report

ORGANS = ("lung", "liver", "kidney", "hip")
TYPES = ("plane", "phase", "organ", "abnormality", "location")


def test_only_abnormal_organs_count():
    text = "Axial images. The left kidney shows a small cyst. The lung, liver and hip are normal."
    assert report.named_organs(text, ORGANS) == {"kidney"}
    assert report.named_organs("Abnormal livers! Nothing in the rest", ORGANS) == {"liver"}
    assert report.named_organs("All normal.", ORGANS) == set()


def test_organ_share_wants_exactly_the_right_organ():
    rows = [
        {"answer": "A cyst in the liver.", "prediction": "The liver shows a cyst. The lung is normal."},
        {"answer": "A cyst in the liver.", "prediction": "The lung shows a cyst. The liver is normal."},
        {"answer": "A cyst in the liver.", "prediction": "Liver, lung, kidney and hip."},  # naming all is no answer
        {"answer": "A cyst in the liver.", "prediction": ""},
    ]
    assert report.organ_named_share(rows, ORGANS) == 0.25


@pytest.fixture
def run_dir(tmp_path):
    """A run folder as the stages leave it, with invented numbers."""
    volume = np.linspace(0, 1, 4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    image = str(tmp_path / "scan.nii.gz")
    write_prepared(image, volume, "uint8")
    stages = {name: {"seconds": 10.0, "peak_mb": 900} for name in ("prepare", "clip", "lora")}
    logs = [{"loss": 2.0, "step": 10}, {"loss": 1.0, "step": 20}, {"train_runtime": 3.0, "step": 20}]
    by_type = dict.fromkeys(TYPES, 0.8)
    question = {"image": image, "question": "Which <organ>?", "answer": "liver", "answer_choice": "B"}
    reports = [{"image": image, "answer": "A cyst in the liver.", "prediction": "The liver shows a cyst."}]
    caption = {"scores": {"bleu": 0.5, "rouge1": 0.4, "meteor": None, "bert_f1": None}, "distinct_outputs": 0.9}
    files = {
        "stages.json": {"seed": 7, "stages": stages},
        "clip/trainer_state.json": {"log_history": logs},
        "lora/trainer_state.json": {"log_history": logs},
        "eval/retrieval/summary.json": {
            "pools": {
                "256": {"image_to_text": {"R@1": 0.2}, "text_to_image": {"R@1": 0.3}},
                "64": {"image_to_text": {"R@1": 0.4}, "text_to_image": {"R@1": 0.5}},
            },
            "same_series": {"chance": 0.1, "image_to_text": {"R@1": 0.3}, "text_to_image": {"R@1": 0.35}},
        },
        "eval/caption/summary.json": caption,
        "eval/caption_shuffled/summary.json": caption,
        "eval/vqa_closed/summary.json": {
            "closed_accuracy": 0.8,
            "by_type": by_type,
            "published_rule": {"closed_accuracy": 0.81, "by_type": by_type},
        },
        "eval/vqa_closed_shuffled/summary.json": {"closed_accuracy": 0.3, "by_type": dict.fromkeys(TYPES, 0.3)},
        "eval/vqa_open/summary.json": {"scores": {"bleu": 0.5}},
        "eval/caption/predictions.jsonl": reports,
        "eval/caption_shuffled/predictions.jsonl": [{**reports[0], "prediction": "The lung shows a cyst."}],
        "eval/vqa_closed/predictions.jsonl": [{**question, "prediction": "C. <lung>", "correct": 0}],
        "eval/vqa_open/predictions.jsonl": [{**question, "prediction": "Liver"}],
    }
    run = tmp_path / "run"
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        rows = content if name.endswith(".jsonl") else [content]
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(run / "eval" / "retrieval" / "similarity.npz", scores=np.eye(64, dtype=np.float32))
    return run


def test_summary_holds_the_promised_numbers(run_dir, capsys):
    summary = report.main(["--run_dir", str(run_dir)])
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert summary["seed"] == 7 and summary["seconds"] == {"prepare": 10.0, "clip": 10.0, "lora": 10.0}
    assert summary["retrieval"]["pool"] == 64  # the smallest pool that was asked for
    assert summary["retrieval"]["image_to_text"]["R@1"] == 0.4
    assert summary["retrieval"]["text_to_image"]["R@1"] == 0.5
    assert summary["vqa"]["closed_accuracy"] == 0.8 and set(summary["vqa"]["by_type"]) == set(TYPES)
    assert summary["vqa"]["shuffled"] == {"closed_accuracy": 0.3, "by_type": dict.fromkeys(TYPES, 0.3)}
    assert summary["caption"]["organ_named"] == 1.0
    assert summary["caption"]["shuffled"] == {"organ_named": 0.0}
    assert re.search(r"closed questions +80.0 % +30.0 %", capsys.readouterr().out)


def test_page_needs_no_other_file_and_escapes_what_models_say(run_dir):
    report.main(["--run_dir", str(run_dir)])
    page = (run_dir / "report.html").read_text()
    assert page.count("<img") == 4  # accuracy, similarity, one scan, losses
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    assert "C. &lt;lung&gt;" in page and "<lung>" not in page
    assert "<td class=wrong>C. &lt;lung&gt;" in page and "<td class=right>Liver" in page


def test_missing_stage_is_named(run_dir):
    (run_dir / "eval" / "vqa_open" / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="vqa_open"):
        report.main(["--run_dir", str(run_dir)])
    assert not (run_dir / "summary.json").exists() and not (run_dir / "report.html").exists()
