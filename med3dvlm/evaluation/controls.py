"""The controls: what a model scores when it is shown images of other cases, or empty ones."""

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from med3dvlm.data.checks.leakage import case_of
from med3dvlm.evaluation.command import RequestError

REPORT = "text.txt"  # beside the images of a case, in every prepared data set with reports


def shown_images(
    images: Sequence[str],
    answers: Sequence[str],
    baseline: str | None,
    seed: int,
    groups: Sequence[int | str] | None = None,
) -> list[str | None]:
    """The image that each row shows: its own, an exchanged one, or None for an empty one.

    "shuffled" shows images of other cases, of rows whose answers differ as far as that works out, inside a group (a
    question type; None: all rows): see `_cases` and `_exchange`.

    Raises:
        RequestError: there is no other image to show.
    """
    if baseline is None:
        return list(images)
    if baseline == "blank":
        return [None] * len(images)
    if len(set(images)) == 1:
        raise RequestError(
            f"--baseline shuffled: all rows are about one image, {images[0]}; evaluate rows of other images too, or "
            "use --baseline blank"
        )
    rng = np.random.default_rng(seed)
    order = _exchange(_cases(images), _plain(answers), groups or [""] * len(images), rng)
    return [images[row] for row in order]


def control_record(
    images: Sequence[str],
    answers: Sequence[str],
    baseline: str | None,
    shown: Sequence[str | None],
    groups: Sequence[int | str] | None = None,
) -> dict[str, int]:
    """What a summary says about "shuffled": how many images were shown, and in how many rows the answer holds for them.

    images_shown: different ones; far fewer than there are make the control a weak one.
    """
    if baseline != "shuffled":
        return {}
    groups, answers = groups or [""] * len(images), _plain(answers)
    true = set(zip(images, groups, answers, strict=True))
    same = sum(row in true for row in zip(shown, groups, answers, strict=True))
    return {"images_shown": len(set(shown)), "same_answer": same}


def _cases(images: Sequence[str]) -> list[str]:
    """The case of each image: its folder, as a rule.

    A folder with more than half of all images, and without the report of a case, is a collection of cases, of which
    each image is one: the few images elsewhere would have to be shown for all of it. So is the only folder there is.
    """
    folders = {image: case_of(image) for image in images}
    largest, count = Counter(folders.values()).most_common(1)[0]
    inside = [image for image, folder in folders.items() if folder == largest]
    case = any((folder / REPORT).is_file() for folder in {Path(image).parent for image in inside})
    if count == len(folders) or (2 * count > len(folders) and not case):
        folders |= {image: image for image in inside}
    return [folders[image] for image in images]


def _plain(answers: Sequence[str]) -> list[str]:
    return [answer.strip().lower() for answer in answers]


def _exchange(
    cases: Sequence[Hashable], answers: Sequence[Hashable], groups: Sequence[Hashable], rng: np.random.Generator
) -> np.ndarray:
    """For each of N rows, of two cases or more, the row whose image it is shown, ``[N]``: never one of its own case.

    Images are exchanged inside a group, between rows of different cases and, wherever a swap can bring that about,
    different answers. Where one case has more than half of the rows of its group, the rest of them are shown images
    drawn from the other cases of the group, or of all groups where it has none.
    """
    cases, answers, groups = map(_codes, (cases, answers, groups))
    shown = np.arange(len(cases))
    for group in range(groups.max() + 1):
        rows = np.flatnonzero(groups == group)
        shown[rows] = rows[_permutation(cases[rows], answers[rows], rng)]
    for row in np.flatnonzero(cases[shown] == cases):
        other = cases != cases[row]
        near = other & (groups == groups[row])
        best = next(rows for rows in (near & (answers != answers[row]), near, other) if rows.any())
        shown[row] = rng.choice(np.flatnonzero(best))
    return shown


def _permutation(cases: np.ndarray, answers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random ``order`` ``[N]`` in which row i and row order[i] differ in case and answer, as far as swaps lead."""
    order = rng.permutation(len(cases))
    for keys in ((cases, answers), (cases,)):  # another case is worth more than another answer
        for i in range(len(order)):
            if all(key[order[i]] != key[i] for key in keys):
                continue
            right = [(key[order] != key[i]) & (key != key[order[i]]) for key in keys]  # for i, for the other row
            partners = np.flatnonzero(np.all(right, axis=0))
            if len(partners):
                j = rng.choice(partners)
                order[[i, j]] = order[[j, i]]
    return order


def _codes(values: Sequence[Hashable]) -> np.ndarray:
    """``[N]`` numbers, the same for the same value: 0 for the first one, then 1, 2, ..."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])
