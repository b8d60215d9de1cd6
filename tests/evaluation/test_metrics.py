import math

import numpy as np
import pytest

from med3dvlm.data.prompts import closed_answer
from med3dvlm.evaluation import metrics
from tests.helpers.golden import load_golden, rule_uniform
from tests.helpers.metric_script import metric_script
from tests.helpers.tiny_model import write_tiny_text_encoder


@pytest.mark.parametrize("name", ["retrieval_a", "retrieval_zero"])
def test_retrieval_equals_golden(name):
    record, _ = load_golden(f"metrics/{name}")
    n = record["n"]
    boost = record["boost"] * np.eye(n) * rule_uniform(f"{name}|diag", (n, n))
    scores = (rule_uniform(f"{name}|scores", (n, n)) + boost).astype(np.float32)
    result = metrics.retrieval_metrics(scores)
    for key, expected in record["values"].items():
        direction, k = key.split("@")
        assert result[direction][int(k)] == pytest.approx(expected, abs=1e-6), key


def test_retrieval_of_constant_scores_is_chance():
    result = metrics.retrieval_metrics(np.zeros((20, 20)), ks=(1, 5))
    assert result["rows"][1]["recall"] == pytest.approx(1 / 20)
    assert result["columns"][5]["recall"] == pytest.approx(5 / 20)


def test_retrieval_list_longer_than_pool_finds_everything():
    assert metrics.retrieval_metrics(-np.eye(3), ks=(10,))["rows"][10]["recall"] == 1


@pytest.mark.parametrize("scores", [np.zeros((2, 3)), np.zeros((0, 0)), np.array([[np.nan]])])
def test_retrieval_refuses_what_is_no_similarity_matrix(scores):
    with pytest.raises(ValueError, match="square|finite"):
        metrics.retrieval_metrics(scores)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C. liver", "C"),
        (" (B) left lung", "B"),
        ("D", "D"),
        ("A: axial", "A"),
        ("B) cyst", "B"),
        ("A mass in the liver", None),
        ("liver C.", None),
        ("E. none", None),
        ("", None),
        ("CT. of the liver", None),
        ("A. B. C. D.", None),
        ("A. B.", None),
        ("(A) liver (B) lung", None),
        ("C. liver C. liver", "C"),
        ("A. hepatitis B.", "A"),
    ],
)
def test_parse_choice(text, letter):
    assert metrics.parse_choice(text) == letter


@pytest.mark.parametrize(
    "choice", ["liver", "C. difficile colitis", "Vitamin D. level", "hepatitis C. infection", "A. B.", " B) x", ""]
)
def test_the_true_answer_is_right_whatever_its_text(choice):
    choices = [choice, None, "another", choice]
    assert metrics.parse_choice(closed_answer("A", choice), choices) == "A"
    assert metrics.parse_choice(f" {closed_answer('D', choice)} ", choices) == "D"
    assert metrics.parse_choice("A. liver B. lung", ["liver", "lung"]) is None
    assert metrics.parse_choice("D. liver", ["liver"]) == "D"  # a letter that was not offered is wrong, not nothing


def test_published_rule_accepts_a_list_of_all_letters():
    assert all(metrics.published_choice_match("A. B. C. D.", letter) for letter in "ABCD")
    assert not metrics.published_choice_match("liver", "C")
    assert not metrics.published_choice_match("anything.", "")


def test_bleu_is_unigram_precision_with_brevity_penalty():
    assert metrics.bleu1("a cyst in the liver", "a cyst in the liver") == pytest.approx(1)
    assert metrics.bleu1("a cyst", "a cyst in the liver") == pytest.approx(math.exp(1 - 5 / 2))
    assert metrics.bleu1("the liver has a stone", "a cyst in the liver") == pytest.approx(3 / 5)
    assert metrics.bleu1("", "a cyst") == 0
    assert metrics.bleu1("nothing", "a cyst") == 0


def test_rouge_is_f_measure_of_unigrams():
    precision, recall = 2 / 3, 2 / 5
    expected = 2 * precision * recall / (precision + recall)
    assert metrics.rouge1("Cyst liver stone", "a cyst in the liver") == pytest.approx(expected)
    assert metrics.rouge1("", "a cyst") == 0


def test_text_metrics_keep_order_and_name_what_is_missing():
    scores = metrics.text_metrics(["a cyst", "x"], ["a cyst", "a cyst"], use_meteor=False)
    assert tuple(scores) == metrics.TEXT_METRICS
    assert scores["bleu"] == pytest.approx([1, 0])
    assert scores["meteor"] is None and scores["bert_f1"] is None


def test_distinct_share():
    assert metrics.distinct_share(["a", "a ", "b", "b"]) == 0.5
    assert metrics.distinct_share([]) == 0


FIRST_WORD = """\
hits = [p.split()[0] == r.split()[0] for p, r in zip(predictions, references)]
return {"first_word": sum(hits) / len(hits), "note": "text results are left out"}
"""


def test_extra_metric_from_a_local_folder(tmp_path):
    folder = tmp_path / "first_word"
    folder.mkdir()
    (folder / "first_word.py").write_text(metric_script("first_word", FIRST_WORD))
    assert metrics.extra_metric(str(folder), ["a b", "c"], ["a x", "d"]) == {"first_word": 0.5}


def test_bertscore_with_a_local_model(tmp_path):
    folder = str(write_tiny_text_encoder(tmp_path / "encoder"))
    long = "a cyst in the liver " * 60  # exceeds the model's 64 positions: cut, not crashed
    predictions, references = ["a cyst", "", "a stone", long], ["a cyst", "a cyst", "a cyst", long]
    same, empty, other, cut = metrics.bert_f1(predictions, references, folder)
    assert same == pytest.approx(1, abs=1e-5) and cut == pytest.approx(1, abs=1e-5)
    assert empty == 0 and other < same
    columns = metrics.text_metrics(predictions[:1], references[:1], use_meteor=False, bertscore_model=folder)
    assert columns["bert_f1"] == pytest.approx([1], abs=1e-5)
