"""Phantoms: repeatable, independent in all attributes, and showing what their reports say."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from med3dvlm.data import phantom
from med3dvlm.data.phantom import KINDS, ORGANS, PHASES, PLANES, SIDES, SIZES, Case, draw_case, render

ATTRIBUTES = {"plane": PLANES, "phase": PHASES, "organ": ORGANS, "side": SIDES, "kind": KINDS, "size": SIZES}
CASES = 2000
# The axes of a volume of each plane, as body axes: 0 superior-inferior, 1 anterior-posterior, 2 right-left.
AXES = {"axial": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 0, 1)}


def write(folder, cases=8, seed=0):
    phantom.main(["--output", str(folder), "--cases", str(cases), "--seed", str(seed), "--num_workers", "1"])
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("phantoms")


@pytest.fixture(scope="module")
def files(folder):
    return write(folder)


def body(case: Case, seed=0) -> np.ndarray:
    """The rendered grey values 0..1 with the body's axes: [superior-inferior, anterior-posterior, right-left]."""
    volume = render(case, seed).astype(np.float32) / 255
    return volume.transpose([AXES[case.plane].index(axis) for axis in range(3)])


def changed(case: Case, **attributes) -> Case:
    return dataclasses.replace(case, **attributes)


def region(volume: np.ndarray) -> np.ndarray:
    """Coordinates -1..1 of every voxel along the body's axes, [Z, Y, X, 3]."""
    lines = [(np.arange(n) + 0.5) / n * 2 - 1 for n in volume.shape]
    return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1)


# ---------------------------------------------------------------- repeatable


def test_the_same_seed_gives_the_same_bytes(files, tmp_path):
    assert write(tmp_path) == files


def test_another_seed_gives_other_cases(files, tmp_path):
    other = write(tmp_path, seed=1)
    assert other["M3D_Cap/M3D_Cap.json"] != files["M3D_Cap/M3D_Cap.json"]
    assert {draw_case(n, 0) for n in range(50)} != {draw_case(n, 1) for n in range(50)}
    case = draw_case(3, 0)
    assert not np.array_equal(render(case, 0), render(case, 1)), "the geometry follows the seed too"


def test_more_cases_leave_the_images_of_the_first_as_they_are(files, tmp_path):
    more = write(tmp_path, cases=10)
    slices = [name for name in files if name.endswith((".png", ".txt"))]
    assert slices and all(more[name] == files[name] for name in slices)


def test_an_interrupted_run_is_completed_by_another_one(files, tmp_path):
    for number in range(5):
        phantom.write_case(number, 0, tmp_path)
    (tmp_path / "M3D_Cap/ct_case/000004/text.txt").unlink()
    damaged = next((tmp_path / "M3D_Cap/ct_case/000003").glob("*/7.png"))
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert write(tmp_path) == files


def test_a_killed_run_leaves_no_half_case(tmp_path, monkeypatch):
    def killed(case):
        raise KeyboardInterrupt

    phantom.write_case(0, 0, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    monkeypatch.setattr(phantom, "raw_text", killed)  # all slices are written by then
    for number in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            phantom.write_case(number, 0, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()} == before


def test_another_data_set_is_not_mixed_with_or_written_over(files, tmp_path):
    write(tmp_path)
    for other in ({"seed": 1}, {"cases": 9}):
        with pytest.raises(FileExistsError, match="holds another data set; name another --output"):
            write(tmp_path, **other)
    assert write(tmp_path) == files


# ---------------------------------------------------------------- layout


def test_a_case_lies_where_m3d_has_it(folder, files):
    manifest = json.loads(files["M3D_Cap/M3D_Cap.json"])
    assert {split: len(entries) for split, entries in manifest.items()} == {"train": 2, "validation": 2, "test": 4}
    entries = [entry for split in manifest.values() for entry in split]
    for number, entry in enumerate(entries):
        case = draw_case(number, 0)
        assert entry == {"image": f"M3D_Cap_npy/ct_case/{number:06d}/{case.series}.npy",
                         "text": f"M3D_Cap_npy/ct_case/{number:06d}/text.txt"}  # fmt: skip
        series = folder / "M3D_Cap" / "ct_case" / f"{number:06d}" / case.series
        names = sorted((file.name for file in series.iterdir()), key=lambda name: int(name.split(".")[0]))
        assert names == [f"{slice}.png" for slice in range(36)]
        with Image.open(series / "0.png") as image:
            assert image.mode == "L" and image.size == (72, 72)
        text = (series.parent / "text.txt").read_text()
        assert text.startswith("Title: ") and phantom.report(case) in text.partition("study_findings:")[2]


def test_tables_have_the_published_columns_and_five_question_types(folder):
    columns = ["Unnamed: 0", "Image Path", "Text", "Question Type", "Question", "Choice A", "Choice B", "Choice C",
               "Choice D", "Answer", "Answer Choice"]  # fmt: skip
    for split, count in (("train", 2), ("val", 2), ("test", 4)):
        closed = pd.read_csv(folder / f"M3D-VQA/M3D_VQA_{split}.csv", keep_default_na=False)
        yes_no = pd.read_csv(folder / f"M3D-VQA/M3D_VQA_yn_{split}.csv", keep_default_na=False)
        assert closed.columns.tolist() == yes_no.columns.tolist() == columns
        assert collections.Counter(closed["Question Type"]) == {n: count for n in (1, 2, 3, 4, 5)}
        assert len(yes_no) == 2 * count and set(yes_no["Answer"]) == {"Yes", "No"}
        assert (yes_no[["Choice A", "Choice B", "Choice C", "Choice D"]] == ["Yes", "No", "", ""]).all(axis=None)


def test_splits_share_no_case():
    for cases in (7, 16, 100, 4000):
        splits = phantom.split_numbers(cases)
        numbers = [number for split in splits.values() for number in split]
        assert sorted(numbers) == list(range(cases))
        assert all(len(split) for split in splits.values())
    assert {split: len(numbers) for split, numbers in splits.items()} == {"train": 3600, "validation": 80, "test": 320}


@pytest.mark.parametrize("cases", [0, 1, 6])
def test_too_few_cases_are_an_error(cases, tmp_path):
    with pytest.raises(ValueError, match=f"--cases {cases} leaves no training case: at least 7"):
        phantom.main(["--output", str(tmp_path / "data"), "--cases", str(cases)])
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------- attributes


@pytest.fixture(scope="module")
def drawn():
    return [draw_case(number, 0) for number in range(CASES)]


def chi_square(counts, expected) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_is_uniform(drawn, name):
    values = ATTRIBUTES[name]
    counts = collections.Counter(getattr(case, name) for case in drawn)
    assert set(counts) == set(values)
    freedom = len(values) - 1
    assert chi_square(counts.values(), CASES / len(values)) < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("first, second", list(itertools.combinations(ATTRIBUTES, 2)))
def test_attributes_are_independent_of_each_other(drawn, first, second):
    pairs = list(itertools.product(ATTRIBUTES[first], ATTRIBUTES[second]))
    counts = collections.Counter((getattr(case, first), getattr(case, second)) for case in drawn)
    freedom = len(pairs) - 1
    assert chi_square((counts[pair] for pair in pairs), CASES / len(pairs)) < freedom + 4 * (2 * freedom) ** 0.5


def test_there_are_enough_values():
    assert len(ORGANS) >= 4 and len(KINDS) >= 3 and len(SIDES) == 2 and len(SIZES) >= 3
    assert len(PLANES) >= 3 and len(PHASES) >= 2


# ---------------------------------------------------------------- questions and reports


def test_choices_hold_the_answer_once_under_its_letter(drawn):
    for case in drawn[:300]:
        for row in phantom.questions(case):
            choices = [row[f"Choice {letter}"] for letter in "ABCD"]
            assert len(set(choices)) == 4 and choices.count(row["Answer"]) == 1
            assert choices["ABCD".index(row["Answer Choice"])] == row["Answer"]


def test_answers_are_what_the_case_is_and_letters_say_nothing(drawn):
    letters = collections.Counter()
    for case in drawn:
        answers = {row["Question Type"]: row["Answer"] for row in phantom.questions(case)}
        assert answers == {1: case.plane, 2: case.phase, 3: case.organ, 4: case.kind, 5: f"{case.side} {case.organ}"}
        letters.update(row["Answer Choice"] for row in phantom.questions(case))
    assert all(abs(count / sum(letters.values()) - 0.25) < 0.02 for count in letters.values())


def test_the_side_alone_can_decide_where_a_lesion_is(drawn):
    other = {"left": "right", "right": "left"}
    for case in drawn[:300]:
        choices = [phantom.questions(case)[4][f"Choice {letter}"] for letter in "ABCD"]
        assert f"{other[case.side]} {case.organ}" in choices


def test_yes_and_no_questions_are_answered_rightly(drawn):
    for case in drawn[:300]:
        rows = phantom.yes_no_questions(case)
        assert [row["Answer"] for row in rows] == ["Yes", "No"]
        for row in rows:
            asked = {3: case.organ, 4: case.kind, 5: case.side}[row["Question Type"]]
            assert (f" {asked}" in row["Question"]) == (row["Answer"] == "Yes")
            assert row["Answer Choice"] == {"Yes": "A", "No": "B"}[row["Answer"]]


def test_reports_name_every_attribute_in_several_wordings(drawn):
    wordings = set()
    for case in drawn[:300]:
        text = phantom.report(case)
        values = [getattr(case, name) for name in ATTRIBUTES]
        assert all(value in text.lower() for value in values)
        for value in sorted(values, key=len, reverse=True):
            text = text.lower().replace(value, "*")
        wordings.add(text)
        others = [organ for organ in ORGANS if organ != case.organ]
        assert not any(organ in phantom.report(case) for organ in others)
    assert len(wordings) >= 3


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("organ, side", list(itertools.product(ORGANS, SIDES)))
def test_the_lesion_lies_in_its_organ_on_its_side(organ, side):
    """Against the same case with the lesion on the other side, so that only the two places differ."""
    other = "left" if side == "right" else "right"
    for number, kind in enumerate(KINDS):
        case = Case(number, "axial", "venous", organ, side, kind, "medium")
        here = body(case)
        expected = np.array(phantom._CENTRES[organ]) * [1, 1, -1 if side == "left" else 1]
        bright = here > 0.9 if kind != "cyst" else (here < 0.09) & (here > 0)
        # The spine is bright as well, but near the middle.
        place = region(here)
        found = place[bright & (np.abs(place[..., 2]) > 0.12)].mean(axis=0) * 1.08
        assert np.abs(found - expected).max() < 0.25, (found, expected)
        assert (found[2] > 0) == (side == "left"), "columns run from the patient's right to left"
        assert np.linalg.norm(found - expected) < np.linalg.norm(found - expected * [1, 1, -1])
        mirrored = body(changed(case, side=other))
        difference = np.abs(here - mirrored) > 0.2
        sides = region(here)[difference][:, 2] > 0
        assert 0.2 < sides.mean() < 0.8, "the difference lies on both sides: here and there"


@pytest.mark.parametrize("plane", PLANES)
def test_kinds_look_different(plane):
    """At the lesion's centre and in its rim, in every plane."""
    core, rim = {}, {}
    for kind in KINDS:
        case = Case(4, plane, "unenhanced", "liver", "right", kind, "large")
        volume = body(case)
        small = body(changed(case, kind="cyst"))
        inside = (small < 0.09) & (small > 0)
        place = region(volume)
        centre = place[inside].mean(axis=0)
        distance = np.linalg.norm((place - centre), axis=-1) / 0.26 * 1.08
        core[kind] = float(np.median(volume[distance < 0.4]))
        rim[kind] = float(np.median(volume[(distance > 0.75) & (distance < 0.9)]))
    assert core["cyst"] < 0.1 and rim["cyst"] < 0.1
    assert core["calcification"] > 0.9 and rim["calcification"] > 0.9
    assert core["abscess"] < 0.1 and rim["abscess"] > 0.9


def test_larger_lesions_are_larger():
    case = Case(6, "coronal", "arterial", "kidney", "left", "cyst", "small")
    volumes = [body(changed(case, size=size)) for size in SIZES]
    counts = [int(((volume < 0.09) & (volume > 0)).sum()) for volume in volumes]
    assert counts[0] * 1.6 < counts[1] and counts[1] * 1.6 < counts[2], counts


def test_planes_show_the_same_body_along_other_axes():
    case = Case(7, "axial", "venous", "hip", "left", "abscess", "medium")
    shapes, bodies = {}, {}
    for plane in PLANES:
        shapes[plane] = render(changed(case, plane=plane), 0)
        bodies[plane] = body(changed(case, plane=plane))
    assert all(volume.shape == (36, 72, 72) for volume in shapes.values())
    for first, second in itertools.combinations(PLANES, 2):
        assert np.abs(shapes[first].astype(int) - shapes[second]).mean() > 8
        # Halving the finer axes of either gives the same body.
        coarse = [b.reshape(36, b.shape[0] // 36, 36, b.shape[1] // 36, 36, b.shape[2] // 36).mean((1, 3, 5))
                  for b in (bodies[first], bodies[second])]  # fmt: skip
        assert np.abs(coarse[0] - coarse[1]).mean() < 0.03


def test_phases_differ_in_the_aorta_and_the_organs():
    """In a healthy region: contrast agent shows, the rest of the body stays."""
    case = Case(8, "axial", "unenhanced", "lung", "left", "cyst", "small")
    volumes = {phase: body(changed(case, phase=phase)) for phase in PHASES}
    place = region(volumes["venous"]) * 1.08
    aorta = np.linalg.norm(place[..., 1:] - [0.2, 0.05], axis=-1) < 0.05
    aorta &= np.abs(place[..., 0]) < 0.6
    greys = {phase: float(np.median(volume[aorta])) for phase, volume in volumes.items()}
    assert greys["unenhanced"] < greys["delayed"] < greys["venous"] < greys["arterial"]
    assert min(abs(a - b) for a, b in itertools.combinations(greys.values(), 2)) > 0.1
    spine = np.linalg.norm(place[..., 1:] - [0.55, 0.0], axis=-1) < 0.08
    spine &= np.abs(place[..., 0]) < 0.5
    assert np.ptp([np.median(volume[spine]) for volume in volumes.values()]) < 0.02


def test_air_is_exactly_0_and_the_body_is_not():
    """Preparation crops to what is above 0."""
    volume = body(Case(9, "axial", "delayed", "lung", "right", "cyst", "large"))
    corners = np.ix_((0, -1), (0, -1), (0, -1))
    assert (volume[corners] == 0).all() and 0.3 < (volume > 0).mean() < 0.6


def test_geometry_differs_from_case_to_case():
    first, second = (body(Case(n, "axial", "venous", "liver", "left", "cyst", "small")) for n in (10, 11))
    assert np.abs(first - second).mean() > 0.02
