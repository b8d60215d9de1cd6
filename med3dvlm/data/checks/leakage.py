"""What two splits share: cases by their folder, patients where it is known whose a case is, images by their look."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import PurePath

import numpy as np

from med3dvlm.data.checks.findings import Finding

# Two images are nearly the same where their fingerprints' differences correlate by more than this. Phantoms reach 0.982
# between two cases that differ; noise of 2% of the range leaves 0.9998 of a copy.
ALIKE = 0.995
_ROWS = 2048  # of the matrix of all pairs, at a time
_M3D_FOLDERS = ("ct_case", "ct_quizze")  # a case may be under both


def case_of(image: str) -> str:
    """The case of an image: the folders above it, without the data set's own, `ct_case` and `ct_quizze`."""
    parts = PurePath(image).parts[:-1]
    for name in _M3D_FOLDERS:
        if name in parts:
            return "/".join(parts[parts.index(name) + 1 :]) or name
    return "/".join(parts[1:] or parts) or image


def case_leaks(splits_of: dict[str, set[str]]) -> list[Finding]:
    """Findings about cases in more than one split. splits_of: image -> names of the splits that it is in."""
    return [_shared("case", case, images) for case, images in _divided(splits_of, case_of)]


def patient_leaks(splits_of: dict[str, set[str]], patient_of: dict[str, str]) -> list[Finding]:
    """Findings about patients whose cases are in several splits. patient_of: image -> patient, where that is known."""
    return [
        _shared("patient", patient, images)
        for patient, images in _divided({image: splits_of[image] for image in patient_of}, patient_of.__getitem__)
        if len({case_of(image) for image in images.values()}) > 1  # otherwise a finding of `case_leaks`
    ]


def _divided(splits_of: dict[str, set[str]], owner_of: Callable[[str], str]) -> list[tuple[str, dict[str, str]]]:
    """Owners (cases, patients) in more than one split, each with an image of every split."""
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for image, splits in splits_of.items():
        for split in splits:
            owners[owner_of(image)].setdefault(split, image)
    return [(owner, images) for owner, images in sorted(owners.items()) if len(images) > 1]


def _shared(what: str, owner: str, images: dict[str, str]) -> Finding:
    shown = ", ".join(f"{split}: {image}" for split, image in sorted(images.items()))
    return Finding(f"{what}_leak" if "train" in images else f"{what}_shared", owner, shown)


def image_leaks(fingerprints: dict[str, np.ndarray], splits_of: dict[str, set[str]]) -> list[Finding]:
    """Findings about images that look nearly the same. fingerprints: image -> `[8, 8, 8]` (see `block_means`).

    One finding an image, with the worst of its copies before it. Two images of the same case are not compared: in one
    split they may look the same, in two they are a finding of `case_leaks`.
    """
    names = sorted(fingerprints)
    worst: dict[str, tuple[int, str, str]] = {}
    for i, j in similar_pairs([fingerprints[name] for name in names]):
        first, second = names[i], names[j]
        rank, kind = _relation(splits_of[first], splits_of[second])
        if case_of(first) != case_of(second) and (second not in worst or rank < worst[second][0]):
            worst[second] = rank, kind, first
    return [Finding(kind, name, f"looks like {other}") for name, (_, kind, other) in sorted(worst.items())]


def _relation(first: set[str], second: set[str]) -> tuple[int, str]:
    pairs = {(a, b) for a in first for b in second if a != b}
    if any("train" in pair for pair in pairs):
        return 0, "image_leak"
    return (1, "image_shared") if pairs else (2, "image_repeated")


def similar_pairs(fingerprints: list[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Numbers (i, j), i < j, of fingerprints that are nearly the same, whatever brightness and contrast."""
    if not fingerprints:
        return
    blocks = np.stack(fingerprints)
    starts = range(0, len(blocks), _ROWS)
    for start in starts:
        rows = _directions(blocks[start : start + _ROWS])
        for other in starts[start // _ROWS :]:
            columns = rows if other == start else _directions(blocks[other : other + _ROWS])
            for i, j in zip(*np.nonzero(rows @ columns.T > ALIKE), strict=True):
                if start + i < other + j:
                    yield start + int(i), other + int(j)


def _directions(blocks: np.ndarray) -> np.ndarray:
    """Differences between neighbouring blocks as unit vectors, `[N, 8, 8, 8]` -> `[N, 1344]`."""
    blocks = blocks.astype(np.float32)
    steps = np.concatenate([np.diff(blocks, axis=axis).reshape(len(blocks), -1) for axis in (1, 2, 3)], axis=1)
    return steps / np.maximum(np.linalg.norm(steps, axis=1, keepdims=True), 1e-6)
