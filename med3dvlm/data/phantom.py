"""Synthetic scans with reports and questions, written the way a user of M3D has them on disk.

A case is a body with paired organs, a spine, an aorta and one lesion. Organ, side, kind and size of the lesion, the
plane in which the slices were cut and the contrast phase are drawn independently, so no answer follows from another
one. Geometry (position and size of every structure) and noise differ from case to case; splits share no case.

    python -m med3dvlm.data.phantom --output data/phantom --cases 4000 --seed 0

Layout written below ``--output`` (published M3D layout, see docs/data.md)::

    M3D_Cap/ct_case/<id>/<Plane_phase>/<n>.png   8-bit slices, n from 0
    M3D_Cap/ct_case/<id>/text.txt                report, as downloaded
    M3D_Cap/M3D_Cap.json                         {"train": [{"image", "text"}], "validation": ..., "test": ...}
    M3D-VQA/M3D_VQA_{train,val,test}.csv         five question types, with choices
    M3D-VQA/M3D_VQA_yn_{train,val,test}.csv      yes/no questions
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from med3dvlm.data.command import run_command
from med3dvlm.data.files import write_bytes
from med3dvlm.data.manifest import CAPTION_MANIFEST

PLANES = ("axial", "coronal", "sagittal")
PHASES = ("unenhanced", "arterial", "venous", "delayed")
ORGANS = ("lung", "liver", "kidney", "hip")
SIDES = ("left", "right")
KINDS = ("cyst", "abscess", "calcification")
SIZES = ("small", "medium", "large")

# Answers that occur only as wrong choices, so that every question has four.
_PLANE_CHOICES = (*PLANES, "oblique")
_KIND_CHOICES = (*KINDS, "hernia")

_SLICES, _ROWS, _COLUMNS = 36, 72, 72  # size of a raw series
# Organ centres of the right side: (superior->inferior, anterior->posterior, right->left), unit body [-1, 1].
_CENTRES = {
    "lung": (-0.62, -0.05, -0.45),
    "liver": (-0.12, -0.3, -0.45),
    "kidney": (0.22, 0.4, -0.42),
    "hip": (0.66, 0.0, -0.42),
}
_RADII = {"lung": (0.28, 0.46, 0.34), "liver": (0.24, 0.4, 0.36), "kidney": (0.27, 0.32, 0.3), "hip": (0.24, 0.4, 0.32)}
# Grey values 0..1 by phase, in the order of PHASES: contrast agent moves from the aorta through organs to the outflow.
_GREY = {
    "aorta": (0.30, 0.98, 0.70, 0.45),
    "lung": (0.42, 0.44, 0.46, 0.44),
    "liver": (0.42, 0.46, 0.62, 0.52),
    "kidney": (0.42, 0.62, 0.58, 0.48),
    "hip": (0.48, 0.48, 0.50, 0.52),
}
_BODY, _SPINE, _BRIGHT, _DARK = 0.24, 0.80, 1.0, 0.04
_LESION_RADIUS = {"small": 0.15, "medium": 0.20, "large": 0.26}  # of the body's half axis
_NOISE = 0.02


@dataclass(frozen=True)
class Case:
    """What one synthetic case shows. ``number`` is unique over all splits and seeds its geometry."""

    number: int
    plane: str
    phase: str
    organ: str
    side: str
    kind: str
    size: str

    @property
    def id(self) -> str:
        return f"{self.number:06d}"

    @property
    def series(self) -> str:
        """Series folder name in the published style, such as ``Axial_arterial_phase``."""
        return f"{self.plane.capitalize()}_{self.phase}_phase"

    @property
    def location(self) -> str:
        return f"{self.side} {self.organ}"


def draw_case(number: int, seed: int) -> Case:
    """The attributes of case ``number``: every one uniform and independent of the others."""
    rng = np.random.default_rng([seed, number, 0])
    values = [str(rng.choice(options)) for options in (PLANES, PHASES, ORGANS, SIDES, KINDS, SIZES)]
    return Case(number, *values)


def _ellipsoid(grid: Sequence[np.ndarray], centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Normalised distance from the centre, [Z, Y, X]: below 1 inside the ellipsoid, in units of its radius."""
    z, y, x = (((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radii, strict=True))
    return np.sqrt(z + y + x)


def render(case: Case, seed: int) -> np.ndarray:
    """The case as uint8 slices ``[slices, rows, columns]`` in the order of its plane.

    Axial slices run from superior to inferior with rows from anterior to posterior and columns from the patient's
    right to left; coronal from anterior to posterior with rows from superior to inferior; sagittal from right to left
    with columns from anterior to posterior.
    """
    rng = np.random.default_rng([seed, case.number, 1])
    # The body axis (0 down, 1 back, 2 left) that each axis of the array follows.
    order = {"axial": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 0, 1)}[case.plane]
    grid: list[np.ndarray] = [None] * 3
    for array_axis, (body_axis, n) in enumerate(zip(order, (_SLICES, _ROWS, _COLUMNS), strict=True)):
        line = ((np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1) * 1.08  # a margin of air around the body
        grid[body_axis] = line.reshape([-1 if i == array_axis else 1 for i in range(3)])
    phase = PHASES.index(case.phase)

    def jitter(scale: float, n: int = 3) -> np.ndarray:
        return rng.uniform(-scale, scale, n).astype(np.float32)

    body = _ellipsoid(grid, (0, 0, 0), 1 + jitter(0.04)) < 1
    volume = np.where(body, np.float32(_BODY), np.float32(0))
    for organ in ORGANS:
        for side in SIDES:
            mirror = np.array([1, 1, -1 if side == "left" else 1], np.float32)
            centre = np.array(_CENTRES[organ], np.float32) * mirror + jitter(0.04)
            radii = np.array(_RADII[organ], np.float32) * (1 + jitter(0.1))
            volume[(_ellipsoid(grid, centre, radii) < 1) & body] = _GREY[organ][phase]
            if (organ, side) == (case.organ, case.side):
                lesion_centre = centre + jitter(0.3) * radii
    spine, aorta = np.array([0.55, 0.0]) + jitter(0.02, 2), np.array([0.2, 0.05]) + jitter(0.02, 2)
    for centre, radius, value in ((spine, 0.15, _SPINE), (aorta, 0.10, _GREY["aorta"][phase])):
        tube = _ellipsoid((np.float32(0), grid[1], grid[2]), (0, *centre), (1, radius, radius)) < 1
        volume[np.broadcast_to(tube, volume.shape) & body] = value

    radius = _LESION_RADIUS[case.size] * (1 + jitter(0.05, 1)[0])
    distance = _ellipsoid(grid, lesion_centre, (radius,) * 3)
    if case.kind == "abscess":  # a bright rim around a dark core
        volume[distance < 1] = _BRIGHT
        volume[distance < 0.62] = _DARK
    else:
        volume[distance < 1] = _DARK if case.kind == "cyst" else _BRIGHT
    noise = rng.standard_normal(volume.shape, dtype=np.float32) * _NOISE
    volume = np.where(body, np.clip(volume + noise, 0.01, 1), 0)  # air stays exactly 0, as in windowed exports
    return np.rint(volume * 255).astype(np.uint8)


def report(case: Case) -> str:
    """The findings of the case as a radiologist's text; wording varies with the case number."""
    rng = np.random.default_rng([case.number, 2])
    finding = rng.choice([
        f"There is a {case.size} {case.kind} in the {case.location}.",
        f"A {case.size} {case.kind} is seen in the {case.location}.",
        f"The {case.location} shows a {case.size} {case.kind}.",
    ])
    return f"{case.plane.capitalize()} images, {case.phase} phase. {finding} The other organs are normal."


def raw_text(case: Case) -> str:
    """``text.txt`` as it is downloaded: several keyed parts, of which the preparation keeps the findings."""
    rng = np.random.default_rng([case.number, 3])
    sex = rng.choice(["Male", "Female"])
    return (
        f"Title: Phantom case {case.id}\n\npresentation: Synthetic case, no patient.\n\n"
        f"patient: Age: {rng.integers(20, 90)} Gender: {sex}\n\nstudy_findings: \n{report(case)}\n"
    )


def questions(case: Case) -> list[dict]:
    """Rows of the M3D-VQA table for one case: five types, each with four choices of which one is right."""
    rng = np.random.default_rng([case.number, 4])
    here = f"{case.location}"
    mirrored = f"{SIDES[1 - SIDES.index(case.side)]} {case.organ}"  # the side alone must be able to decide
    # Another organ with both of its sides: from the choices alone, each is as likely as the others.
    other = str(rng.choice([organ for organ in ORGANS if organ != case.organ]))
    asked = [
        (1, "Which plane is shown?", case.plane, _PLANE_CHOICES),
        (2, "Which contrast phase is shown?", case.phase, PHASES),
        (3, "Which organ is abnormal?", case.organ, ORGANS),
        (4, "What kind of lesion is present?", case.kind, _KIND_CHOICES),
        (5, "Where is the lesion?", here, (here, mirrored, *(f"{side} {other}" for side in SIDES))),
    ]
    return [_question_row(case, rng, *q) for q in asked]


def yes_no_questions(case: Case) -> list[dict]:
    """One question answered Yes and one answered No, about the organ, the side or the kind of the lesion."""
    rng = np.random.default_rng([case.number, 5])
    wrong_kind = str(rng.choice([k for k in KINDS if k != case.kind]))
    wrong_organ = str(rng.choice([o for o in ORGANS if o != case.organ]))
    pairs = [
        (3, "Is the {} abnormal?", case.organ, wrong_organ),
        (4, "Is there a {}?", case.kind, wrong_kind),
        (5, "Is the lesion on the {} side?", case.side, SIDES[1 - SIDES.index(case.side)]),
    ]
    rows = []
    for answer, index in zip(("Yes", "No"), rng.choice(len(pairs), 2, replace=False), strict=True):
        kind, template, right, wrong = pairs[index]
        question = template.format(right if answer == "Yes" else wrong)
        rows.append(_row(case, kind, question, ["Yes", "No", "", ""], answer))
    return rows


def _question_row(case: Case, rng, question_type: int, question: str, answer: str, choices: Sequence[str]) -> dict:
    return _row(case, question_type, question, list(rng.permutation(list(choices))), answer)


def _row(case: Case, question_type: int, question: str, choices: list[str], answer: str) -> dict:
    folder = f"M3D_Cap_npy/ct_case/{case.id}"
    return {
        "Image Path": f"{folder}/{case.series}.npy",
        "Text": f"{folder}/text.txt",
        "Question Type": question_type,
        "Question": question,
        **{f"Choice {letter}": choice for letter, choice in zip("ABCD", choices, strict=True)},
        "Answer": answer,
        "Answer Choice": "ABCD"[choices.index(answer)],
    }


def write_case(number: int, seed: int, root: Path) -> None:
    """Slices and ``text.txt`` of one case below ``root`` (the folder that holds M3D_Cap): the whole case or nothing."""
    case = draw_case(number, seed)
    folder = root / "M3D_Cap" / "ct_case" / case.id
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside ct_case, whose every folder is a case to the preparation.
    with TemporaryDirectory(prefix=f".{case.id}.", suffix=".partial", dir=root / "M3D_Cap") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        (new / case.series).mkdir(parents=True)
        for n, pixels in enumerate(render(case, seed)):
            Image.fromarray(pixels).save(new / case.series / f"{n}.png", compress_level=1)
        (new / "text.txt").write_text(raw_text(case), encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)  # a folder replaces an empty one only
        os.replace(new, folder)


def split_numbers(cases: int) -> dict[str, range]:
    """Case numbers of each split: 2% validation and 8% test (at least 2 and 4), the rest training."""
    test, validation = max(4, cases * 8 // 100), max(2, cases * 2 // 100)
    train = cases - test - validation
    if train < 1:
        raise ValueError(f"--cases {cases} leaves no training case: at least 7 are needed")
    return {"train": range(train), "validation": range(train, train + validation), "test": range(cases - test, cases)}


def caption_manifest(splits: dict[str, range], seed: int) -> str:
    """Text of ``M3D_Cap.json``, with the published paths that still end in ``.npy``."""

    def entry(case: Case) -> dict[str, str]:
        folder = f"M3D_Cap_npy/ct_case/{case.id}"
        return {"image": f"{folder}/{case.series}.npy", "text": f"{folder}/text.txt"}

    entries = {split: [entry(draw_case(number, seed)) for number in numbers] for split, numbers in splits.items()}
    return json.dumps(entries, indent=1)


def write_tables(splits: dict[str, range], seed: int, root: Path) -> None:
    """``M3D_Cap.json`` and the M3D-VQA tables."""
    for split, numbers in splits.items():
        cases = [draw_case(number, seed) for number in numbers]
        name = {"validation": "val"}.get(split, split)
        for table, rows_of in ((name, questions), (f"yn_{name}", yes_no_questions)):
            rows = [row for case in cases for row in rows_of(case)]
            # As published: choices that do not exist are left empty in the yes/no files.
            write_bytes(root / "M3D-VQA" / f"M3D_VQA_{table}.csv", pd.DataFrame(rows).to_csv().encode("utf-8"))
    write_bytes(root / "M3D_Cap" / CAPTION_MANIFEST, caption_manifest(splits, seed).encode("utf-8"))


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Write the data set; returns the number of cases of each split.

    Raises:
        ValueError: too few cases.
        FileExistsError: the folder holds another data set, whose cases would mix with these.
    """
    parser = argparse.ArgumentParser(
        prog="python -m med3dvlm.data.phantom",
        description="Write synthetic scans with reports and questions in the raw M3D layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", required=True, type=Path, help="folder that will hold M3D_Cap and M3D-VQA")
    parser.add_argument("--cases", type=int, default=4000, help="number of cases over all splits")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)

    splits = split_numbers(args.cases)
    manifest = args.output / "M3D_Cap" / CAPTION_MANIFEST
    if manifest.exists() and manifest.read_text(encoding="utf-8") != caption_manifest(splits, args.seed):
        raise FileExistsError(f"{args.output} holds another data set; name another --output")
    args.output.mkdir(parents=True, exist_ok=True)
    write = partial(write_case, seed=args.seed, root=args.output)
    with ProcessPoolExecutor(args.num_workers) as pool:
        done = pool.map(write, range(args.cases), chunksize=16)
        for _ in tqdm(done, total=args.cases, desc="phantom cases", unit="case"):
            pass
    write_tables(splits, args.seed, args.output)
    counts = {split: len(numbers) for split, numbers in splits.items()}
    print(f"{args.output}: {counts}")
    return counts


if __name__ == "__main__":
    run_command(main, (OSError,))
