import csv
import json
from argparse import Namespace

import pytest

from med3dvlm.data.manifest import ManifestError
from med3dvlm.evaluation import vqa
from med3dvlm.evaluation.command import RequestError
from med3dvlm.evaluation.common import Sample
from med3dvlm.inference import QuestionError
from tests.helpers.tiny_data import write_table


def run(data_root, vlm_folder, output, *more):
    return vqa.main([
        "--model_name_or_path", str(vlm_folder), "--data_root", str(data_root), "--output_dir", str(output),
        "--vqa_data_test_path", str(data_root / "M3D-VQA" / "M3D_VQA_test.csv"), "--device", "cpu",
        "--max_new_tokens", "6", "--batch_size", "4", *more,
    ])  # fmt: skip


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def sample(question_type, letter, answer="liver"):
    return Sample("a.nii.gz", "Which?", answer, "table, row 0", question_type, letter)


def test_closed_accuracy_is_strict_and_the_published_rule_stands_beside_it():
    samples = [sample(1, "A"), sample(1, "B"), sample(3, "C"), sample(3, "D")]
    said = ["A. axial", "It is B. coronal", "D. lung", "A. B. C. D."]
    columns, scores = vqa.score_closed(Namespace(extra_metric=[]), samples, said)
    assert columns["correct"] == [1, 0, 0, 0] and columns["correct_published"] == [1, 1, 0, 1]
    assert scores["closed_accuracy"] == 0.25 and scores["by_type"] == {"plane": 0.5, "organ": 0.0}
    assert scores["published_rule"] == {"closed_accuracy": 0.75, "by_type": {"plane": 1.0, "organ": 0.5}}
    assert scores["without_choice"] == 0.5


def test_a_true_answer_that_holds_a_letter_is_right(data_root, tmp_path):
    image = read_csv(data_root / "M3D-VQA" / "M3D_VQA_test.csv")[0]["Image Path"]
    texts = ["normal", "C. difficile colitis", "Vitamin D. level", "NA"]
    path = write_table(tmp_path / "t.csv", [[image, "", 4, "Q?", *texts, texts[n], "ABC"[n]] for n in range(3)])
    samples = vqa.read_samples(Namespace(vqa_data_test_path=path, data_root=data_root, limit=None, close_ended=True))
    said = [f"{sample.answer_choice}. {sample.answer}" for sample in samples]
    assert vqa.score_closed(Namespace(extra_metric=[]), samples, said)[1]["closed_accuracy"] == 1


def test_open_scores_are_given_per_type():
    args = Namespace(extra_metric=[], bertscore_model=None, bertscore_layers=None)
    _, scores = vqa.score_open(args, [sample(1, "A"), sample("other", "B", "a cyst")], ["liver", "liver"])
    assert scores["by_type"]["plane"]["rouge1"] == 1 and scores["by_type"]["other"]["rouge1"] == 0
    assert scores["scores"]["rouge1"] == 0.5


def test_closed_results_in_the_published_columns(data_root, vlm_folder, tmp_path):
    summary = run(data_root, vlm_folder, tmp_path, "--close_ended")
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    table = read_csv(tmp_path / "tiny-vlm_eval_close_vqa.csv")
    assert list(table[0]) == ["Question Type", "Question", "Answer", "Answer Choice", "Pred", "Correct"]
    assert table[0]["Question"] == "Which plane is shown? Choices: A. Axial B. Coronal C. Sagittal"
    right = [int(row["Correct"]) for row in table]
    assert summary["closed_accuracy"] == pytest.approx(sum(right) / len(right))
    assert summary["questions_by_type"] == {"plane": 6}


def test_open_results_in_the_published_columns(data_root, vlm_folder, tmp_path):
    summary = run(data_root, vlm_folder, tmp_path)
    table = read_csv(tmp_path / "tiny-vlm_eval_open_vqa.csv")
    assert list(table[0]) == ["Question Type", "Question", "Answer", "Pred", "bleu", "rouge1", "meteor", "bert_f1"]
    assert table[0]["Question"] == "Which plane is shown?" and len(table) == 6
    assert set(summary["by_type"]) == {"plane"}


def test_each_image_is_encoded_once_for_all_its_questions(data_root, vlm_folder, tmp_path, monkeypatch):
    rows = read_csv(data_root / "M3D-VQA" / "M3D_VQA_test.csv")
    image = rows[0]["Image Path"]
    table = [[image, "", n, f"Question {n}?", "x", "y", "NA", "NA", "x", "A"] for n in range(1, 6)]
    table.append([rows[1]["Image Path"], "", 1, "Another?", "x", "y", "NA", "NA", "None", "B"])
    path = write_table(tmp_path / "questions.csv", table)
    encoded = []
    encode = vqa.load_model(str(vlm_folder), "cpu").__class__.encode
    monkeypatch.setattr(
        "med3dvlm.inference.Med3DVLM.encode", lambda self, images: encoded.append(len(images)) or encode(self, images)
    )
    together = run(data_root, vlm_folder, tmp_path / "a", "--vqa_data_test_path", str(path))
    assert sum(encoded) == 2 and together["split"]["images"] == 2
    run(data_root, vlm_folder, tmp_path / "b", "--vqa_data_test_path", str(path), "--batch_size", "1")
    a, b = (read_csv(tmp_path / name / "tiny-vlm_eval_open_vqa.csv") for name in "ab")
    assert a == b
    assert [row["Question"] for row in a] == [row[3] for row in table]  # in the order of the table
    assert a[-1]["Answer"] == "None"  # an answer, not a missing cell


def test_shuffled_images_come_from_other_answers(data_root, vlm_folder, tmp_path):
    summary = run(data_root, vlm_folder, tmp_path, "--close_ended", "--baseline", "shuffled")
    assert summary["same_answer"] == 0
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    answer_of = {row["image"]: row["answer"] for row in rows}
    assert all(answer_of[row["shown"]] != row["answer"] for row in rows)


def test_an_open_table_is_no_closed_one(data_root, vlm_folder, tmp_path):
    image = read_csv(data_root / "M3D-VQA" / "M3D_VQA_test.csv")[0]["Image Path"]
    path = write_table(tmp_path / "t.csv", [[image, "", 1, "Q?", "NA", "NA", "NA", "NA", "x", ""]])
    with pytest.raises(ManifestError, match="t.csv, row 0 .*it has none"):
        run(data_root, vlm_folder, tmp_path, "--vqa_data_test_path", str(path), "--close_ended")
    run(data_root, vlm_folder, tmp_path, "--vqa_data_test_path", str(path))


@pytest.mark.parametrize("question, reason", [("Is it <im_patch>?", "holds <im_patch>"), ("why " * 600, r"\d+ fit")])
def test_a_question_that_cannot_be_asked_is_named_before_any_answer(
    data_root, vlm_folder, tmp_path, monkeypatch, question, reason
):
    image = read_csv(data_root / "M3D-VQA" / "M3D_VQA_test.csv")[0]["Image Path"]
    rows = [[image, "", 1, text, "x", "y", "NA", "NA", "x", "A"] for text in ("Fine?", question, question)]
    path = write_table(tmp_path / "t.csv", rows)
    monkeypatch.setattr("med3dvlm.inference.Med3DVLM.encode", lambda *_: pytest.fail("an image was encoded before"))
    with pytest.raises(QuestionError, match=rf"t.csv, row 1 \(line 3\): the question .*{reason}"):
        run(data_root, vlm_folder, tmp_path, "--vqa_data_test_path", str(path), "--close_ended")


def test_missing_file_is_named_with_manifest_and_row(data_root, vlm_folder, tmp_path):
    path = write_table(tmp_path / "t.csv", [["nowhere.nii.gz", "", 1, "Q?", "x", "y", "NA", "NA", "x", "A"]])
    with pytest.raises(ManifestError, match="t.csv, row 0.*nowhere.nii.gz"):
        run(data_root, vlm_folder, tmp_path, "--vqa_data_test_path", str(path))


@pytest.mark.parametrize("flags", [["--close_ended"], []])
def test_answers_are_there_before_they_are_scored(data_root, vlm_folder, tmp_path, monkeypatch, flags):
    def fails(*_):
        assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 6
        raise ZeroDivisionError

    monkeypatch.setattr(vqa, "score_closed" if flags else "score_open", fails)
    with pytest.raises(ZeroDivisionError):
        run(data_root, vlm_folder, tmp_path / "out", *flags)


def test_bertscore_is_not_loaded_for_letters(data_root, vlm_folder, tmp_path):
    absent = ["--bertscore_model", "/no/such/folder"]
    assert "closed_accuracy" in run(data_root, vlm_folder, tmp_path, "--close_ended", *absent)
    with pytest.raises(RequestError, match="^--bertscore_model /no/such/folder: no such folder"):
        run(data_root, vlm_folder, tmp_path, *absent)


def test_a_table_that_is_not_there_leaves_no_folder(data_root, vlm_folder, tmp_path):
    with pytest.raises(ManifestError):
        run(data_root, vlm_folder, tmp_path / "out", "--vqa_data_test_path", str(tmp_path / "absent.csv"))
    assert not (tmp_path / "out").exists()
