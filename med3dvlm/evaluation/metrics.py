"""Scores as pure functions on arrays and strings. Nothing of ours is imported, nothing is fetched.

Texts are scored one by one and averaged, as the published evaluation does: BLEU with unigrams only, ROUGE-1, METEOR
and BERTScore's F1. All values lie in [0, 1].
"""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

TEXT_METRICS = ("bleu", "rouge1", "meteor", "bert_f1")  # the published column names


def retrieval_metrics(scores: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict[int, dict[str, float]]]:
    """Retrieval scores of a square similarity matrix whose i-th row belongs to its i-th column.

    Args:
        scores: ``[N, N]``; rows are queries of the direction "rows", columns of the direction "columns".
        ks: sizes of the result list.

    Returns:
        ``{"rows" | "columns": {k: {"recall", "precision", "f1", "accuracy"}}}``. With one match per query recall and
        accuracy are the same and precision is recall / k. Equal scores share the places that they fill, so that a
        model which gives every pair the same score is at chance and not at the mercy of the sorting order.

    Raises:
        ValueError: the matrix is not square, empty, or not finite.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or scores.size == 0:
        raise ValueError(f"expected a square matrix of similarities, found shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("the similarities are not all finite numbers: the features hold NaN or infinity")
    return {name: {k: _scores_at(matrix, k) for k in ks} for name, matrix in (("rows", scores), ("columns", scores.T))}


def _scores_at(scores: np.ndarray, k: int) -> dict[str, float]:
    match = np.diagonal(scores)[:, None]  # [N, 1]
    better = (scores > match).sum(axis=1)
    equal = (scores == match).sum(axis=1)  # the match itself included
    recall = float(np.clip((k - better) / equal, 0, 1).mean())
    precision = recall / k
    f1 = 2 * precision * recall / (precision + recall) if recall else 0.0
    return {"recall": recall, "precision": precision, "f1": f1, "accuracy": recall}


def parse_choice(text: str, choices: Sequence[str | None] = ()) -> str | None:
    """The letter A to D that an answer starts with (``"C. liver"``, ``"(C) liver"``, ``"C"``), otherwise None.

    None also where another lettered choice follows (``"A. B. C. D."``, ``"A. liver B. lung"``): that chooses nothing.
    A letter that ends the text belongs to the answer (``"A. hepatitis B."``), and so does what a choice itself holds:
    with ``choices`` (the texts of A to D, None for a missing one) ``"C. Vitamin D. level"`` is C where that is C.
    """
    for letter, choice in zip("ABCD", choices, strict=False):
        if choice is not None and text.rstrip(" .").split() == f"{letter}. {choice}".rstrip(" .").split():
            return letter
    match = re.match(r"\s*\(?([A-D])(?:[.):]|\s*$)", text)
    if match is None:
        return None
    other = rf"\(?(?!{match[1]})[A-D][.):]"
    return None if re.search(rf"^\s*{other}|\s{other}\s+\S", text[match.end() :]) else match[1]


def published_choice_match(text: str, letter: str) -> bool:
    """The published rule: letter and full stop occur anywhere, so ``"A. B. C. D."`` is right for every question."""
    return bool(letter) and f"{letter}." in text


def distinct_share(texts: Sequence[str]) -> float:
    """Share of different texts among all: 1 / N when a model always says the same."""
    return len({text.strip() for text in texts}) / len(texts) if texts else 0.0


def bleu1(prediction: str, reference: str) -> float:
    """Unigram BLEU of one sentence with brevity penalty (the published evaluation's ``max_order=1``)."""
    return _bleu().sentence_score(prediction.strip(), [reference.strip()]).score / 100


def rouge1(prediction: str, reference: str) -> float:
    """F-measure of shared unigrams, lower case, no stemming."""
    return _rouge().score(reference.strip(), prediction.strip())["rouge1"].fmeasure


def meteor(prediction: str, reference: str) -> float:
    """METEOR of one pair (alpha 0.9, beta 3, gamma 0.5). nltk has to find WordNet, see ``evaluation.wordnet``."""
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(_words(reference), _words(prediction)))


def bert_f1(
    predictions: Sequence[str], references: Sequence[str], model_folder: str, num_layers: int | None = None
) -> list[float]:
    """BERTScore F1 of each pair, see `load_bertscore`. An empty prediction scores 0."""
    scored = [i for i, (p, r) in enumerate(zip(predictions, references, strict=True)) if p.strip() and r.strip()]
    result = [0.0] * len(predictions)
    if scored:
        scorer = load_bertscore(model_folder, num_layers)
        *_, f1 = scorer.score([predictions[i] for i in scored], [references[i] for i in scored])
        for i, value in zip(scored, f1.tolist(), strict=True):
            result[i] = value
    return result


@cache
def load_bertscore(model_folder: str, num_layers: int | None = None):
    """The scorer with a model from a local folder, loaded once.

    ``num_layers`` None takes the layer that BERTScore's authors tuned for a folder of the model's own name
    (``roberta-large``: 17), otherwise the last one.
    """
    from bert_score import BERTScorer
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder)
    name = str(model_folder).rstrip("/").rsplit("/", 1)[-1]
    num_layers = num_layers or model2layers.get(name, config.num_hidden_layers)
    scorer = BERTScorer(model_type=str(model_folder), num_layers=num_layers)
    # A folder without a stated length would let the tokenizer pass texts that are longer than the position table.
    limit = getattr(config, "max_position_embeddings", 512) - (2 if config.model_type == "roberta" else 0)
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, limit)
    return scorer


def extra_metric(name_or_folder: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Any metric of the ``evaluate`` library, see `load_extra`: its numeric results."""
    result = load_extra(name_or_folder).compute(predictions=list(predictions), references=list(references))
    return {key: float(value) for key, value in result.items() if np.isscalar(value) and not isinstance(value, str)}


@cache
def load_extra(name_or_folder: str):
    """A metric of the ``evaluate`` library, by its hub name or from a local folder or script, loaded once."""
    import evaluate

    return evaluate.load(name_or_folder)


def text_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    use_meteor: bool,
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
) -> dict[str, list | None]:
    """Per-pair scores under the published column names; None for a metric that is not available here."""
    pairs = list(zip(predictions, references, strict=True))
    return {
        "bleu": [bleu1(p, r) for p, r in pairs],
        "rouge1": [rouge1(p, r) for p, r in pairs],
        "meteor": [meteor(p, r) for p, r in pairs] if use_meteor else None,
        "bert_f1": bert_f1(predictions, references, bertscore_model, bertscore_layers) if bertscore_model else None,
    }


@cache
def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=1, smooth_method="none", effective_order=True)


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=False)


def _words(text: str) -> list[str]:
    """Penn-treebank tokens. Sentences are split at end marks, also of abbreviations ("Dr."), unlike in the published
    evaluation: nltk's trained splitter needs a download.
    """
    from nltk.tokenize import word_tokenize

    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    return [word for sentence in sentences for word in word_tokenize(sentence, preserve_line=True)]
