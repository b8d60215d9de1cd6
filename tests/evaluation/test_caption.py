import csv
import json

import pytest

from med3dvlm.data.manifest import ManifestError
from med3dvlm.evaluation import caption, common
from med3dvlm.evaluation.command import RequestError
from med3dvlm.inference import QuestionError
from med3dvlm.model.weights import CheckpointError
from tests.helpers.metric_script import metric_script


def run(data_root, vlm_folder, output, *more):
    return caption.main([
        "--model_name_or_path", str(vlm_folder), "--data_root", str(data_root), "--output_dir", str(output),
        "--cap_data_path", str(data_root / "M3D_Cap_npy" / "M3D_Cap.json"), "--device", "cpu",
        "--max_new_tokens", "8", "--batch_size", "4", *more,
    ])  # fmt: skip


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_results_in_the_published_columns_and_with_all_that_repeats_them(data_root, vlm_folder, tmp_path, capsys):
    summary = run(data_root, vlm_folder, tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    with open(tmp_path / "tiny-vlm_eval_caption.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["Question", "Ground Truth", "pred", "bleu", "rouge1", "meteor", "bert_f1"]
    rows = predictions(tmp_path)
    assert len(table) == len(rows) == 6
    for cells, row in zip(table, rows, strict=True):
        assert cells["pred"] == row["prediction"] and cells["Ground Truth"] == row["answer"]
        assert row["shown"] == row["image"] and "M3D_Cap.json, row test[" in row["where"]
    assert rows[0]["answer"] == "Axial scan of case 6. A small lesion is seen."

    mean = sum(float(cells["rouge1"]) for cells in table) / 6
    assert summary["scores"]["rouge1"] == pytest.approx(mean)
    assert summary["scores"]["bert_f1"] is None and "--bertscore_model" in summary["missing"]["bert_f1"]
    assert summary["decoding"]["strategy"] == "greedy" and summary["decoding"]["max_new_tokens"] == 8
    assert summary["preprocessing"]["preset"] == "published" and summary["prompt"]["image_tokens"] == 6
    assert "distinct_outputs" in capsys.readouterr().out


def test_answers_do_not_depend_on_the_batch(data_root, vlm_folder, tmp_path):
    run(data_root, vlm_folder, tmp_path / "a")
    run(data_root, vlm_folder, tmp_path / "b", "--batch_size", "1", "--num_workers", "1")
    assert predictions(tmp_path / "a") == predictions(tmp_path / "b")


def test_a_prompt_that_cannot_be_asked_is_named(data_root, vlm_folder, tmp_path):
    with pytest.raises(QuestionError, match="--prompt: the question holds <im_patch>"):
        run(data_root, vlm_folder, tmp_path, "--prompt", "<im_patch> What is seen?")


def test_shuffled_shows_the_image_of_another_report(data_root, vlm_folder, tmp_path):
    summary = run(data_root, vlm_folder, tmp_path, "--baseline", "shuffled", "--limit", "4")
    rows = predictions(tmp_path)
    assert summary["baseline"] == "shuffled" and len(rows) == 4
    assert all(row["shown"] != row["image"] for row in rows)
    assert sorted(row["shown"] for row in rows) == sorted(row["image"] for row in rows)


def test_blank_image_gives_one_output(data_root, vlm_folder, tmp_path):
    summary = run(data_root, vlm_folder, tmp_path, "--baseline", "blank")
    assert summary["distinct_outputs"] == pytest.approx(1 / 6)


def test_missing_wordnet_is_said_with_the_command_that_brings_it(data_root, vlm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "find_wordnet", lambda: None)
    summary = run(data_root, vlm_folder, tmp_path, "--limit", "1")
    assert summary["scores"]["meteor"] is None and "apt-get install" in summary["missing"]["meteor"]
    with open(tmp_path / "tiny-vlm_eval_caption.csv", newline="") as file:
        assert next(csv.DictReader(file))["meteor"] == ""


@pytest.mark.parametrize("flag, name, message", [
    ("--bertscore_model", "/no/such/folder", "no such folder, and not to be had from the hub"),
    ("--extra_metric", "/no/such/metric", "no such folder, and not to be had from the hub"),
    ("--bertscore_model", "here", "cannot be loaded"),
    ("--extra_metric", "here", "cannot be loaded"),
])  # fmt: skip
def test_a_metric_that_cannot_be_had_is_named_before_any_answer(
    data_root, vlm_folder, tmp_path, monkeypatch, flag, name, message
):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "here.py").write_text("no python")
    name = str(tmp_path / name)  # an absolute name stays as it is
    monkeypatch.setattr("med3dvlm.inference.Med3DVLM.encode", lambda *_: pytest.fail("an image was encoded before"))
    with pytest.raises(RequestError, match=f"^{flag} {name}: {message} \\("):
        run(data_root, vlm_folder, tmp_path / "out", flag, name)
    assert not (tmp_path / "out").exists()


def test_a_metric_that_fails_loses_no_answers(data_root, vlm_folder, tmp_path):
    """A metric of numbers can be loaded, and finds out at the end that answers are texts."""
    run(data_root, vlm_folder, tmp_path / "scored")
    (tmp_path / "fails").mkdir()
    (tmp_path / "fails" / "fails.py").write_text(metric_script("fails", "raise RuntimeError('no numbers')"))
    run(data_root, vlm_folder, tmp_path / "out", "--limit", "2")
    with pytest.raises(RuntimeError, match="no numbers"):
        run(data_root, vlm_folder, tmp_path / "out", "--extra_metric", str(tmp_path / "fails"))
    kept, scored = predictions(tmp_path / "out"), predictions(tmp_path / "scored")
    assert len(kept) == 6 and all(row.items() >= answer.items() for row, answer in zip(scored, kept, strict=True))
    assert not (tmp_path / "out" / "summary.json").exists(), "the summary of the run before, of two answers"


@pytest.mark.parametrize("missing", ["--cap_data_path", "--model_name_or_path"])
def test_input_that_is_not_there_leaves_no_folder(data_root, vlm_folder, tmp_path, missing):
    with pytest.raises((ManifestError, CheckpointError)):
        run(data_root, vlm_folder, tmp_path / "out", missing, str(tmp_path / "absent"))
    assert not (tmp_path / "out").exists()
