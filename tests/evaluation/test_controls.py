import numpy as np
import pytest

from med3dvlm.evaluation.command import RequestError
from med3dvlm.evaluation.controls import control_record, shown_images


def case_of(image):
    return image.rpartition("/")[0]


def test_own_images_without_baseline_and_none_when_blank():
    assert shown_images(["a", "b"], ["x", "y"], None, 0) == ["a", "b"]
    assert shown_images(["a", "b"], ["x", "y"], "blank", 0) == [None, None]
    assert control_record(["a"], ["x"], "blank", [None]) == {}


def test_shuffled_exchanges_between_different_answers_inside_a_group():
    rng = np.random.default_rng(0)
    answers = [str(a) for a in rng.integers(0, 3, 90)]
    groups = [i % 2 for i in range(90)]
    images = [f"{i}" for i in range(90)]

    shown = shown_images(images, answers, "shuffled", seed=3, groups=groups)

    assert sorted(shown) == sorted(images)  # an exchange: every image is shown once
    for row, image in enumerate(shown):
        assert answers[int(image)] != answers[row] and groups[int(image)] == groups[row]
    assert shown == shown_images(images, answers, "shuffled", seed=3, groups=groups)
    assert shown != shown_images(images, answers, "shuffled", seed=4, groups=groups)
    assert control_record(images, answers, "shuffled", shown, groups) == {"images_shown": 90, "same_answer": 0}


def test_shuffled_does_what_can_be_done_when_one_answer_dominates():
    answers, images = ["yes"] * 8 + ["no", "No "], [str(i) for i in range(10)]
    shown = shown_images(images, answers, "shuffled", seed=0)
    differ = sum(answers[int(image)].strip().lower() != answers[i].strip().lower() for i, image in enumerate(shown))
    assert differ == 4  # both "no" cases and two "yes" cases
    assert control_record(images, answers, "shuffled", shown) == {"images_shown": 10, "same_answer": 6}


@pytest.mark.parametrize("seed", range(20))
def test_no_row_is_shown_its_own_case(seed):
    """Two questions of a type about an image, two images a case: siblings are no exchange."""
    images = [f"ct/{i // 4}/{i // 2}.nii.gz" for i in range(16)]
    shown = shown_images(images, ["liver", "spleen"] * 8, "shuffled", seed, groups=[3] * 16)
    assert sorted(shown) == sorted(images)
    assert not [i for i in range(16) if case_of(shown[i]) == case_of(images[i])]


def test_a_case_that_fills_its_group_is_shown_images_of_others():
    images = ["ct/1/a", "ct/1/a", "ct/1/b", "ct/2/a", "ct/1/a", "ct/3/a"]
    groups = [1, 1, 1, 1, 2, 3]  # one case has most of group 1, and is alone in group 2
    shown = shown_images(images, ["x", "y", "z", "x", "x", "x"], "shuffled", 0, groups)
    assert not [i for i in range(6) if case_of(shown[i]) == case_of(images[i])]
    assert shown[:3] == ["ct/2/a"] * 3 and shown[4] in ("ct/2/a", "ct/3/a")


def test_images_of_one_folder_are_cases_and_one_image_alone_is_refused():
    images = ["scans/a", "scans/a", "scans/b", "scans/c"]
    shown = shown_images(images, list("xyxy"), "shuffled", 0)
    assert all(a != b for a, b in zip(images, shown, strict=True))
    with pytest.raises(RequestError, match="all rows are about one image, scans/a"):
        shown_images(["scans/a"] * 2, ["x", "y"], "shuffled", 0)


def test_a_folder_of_most_images_is_no_case():
    """Scans in a folder a hospital: by folders, the five of the other one would be shown for all the rest."""
    images = [f"siteA/{i}" for i in range(95)] + [f"siteB/{i}" for i in range(5)]
    answers = [str(i) for i in range(100)]
    shown = shown_images(images, answers, "shuffled", 0)
    assert sorted(shown) == sorted(images)
    assert all(a != b for a, b in zip(images, shown, strict=True))
    assert control_record(images, answers, "shuffled", shown) == {"images_shown": 100, "same_answer": 0}


@pytest.mark.parametrize("report, same_case", [(True, 0), (False, 5)])
def test_a_folder_with_the_report_of_a_case_is_one_whatever_its_size(tmp_path, report, same_case):
    """Series of one patient are no images of other cases: the first rows of a table may be about hardly another one."""
    (tmp_path / "1").mkdir()
    if report:
        (tmp_path / "1" / "text.txt").touch()
    images = [f"{tmp_path}/1/{i}" for i in range(6)] + [f"{tmp_path}/2/0"]
    shown = shown_images(images, list("abcdefg"), "shuffled", 0)
    assert sum(case_of(a) == case_of(b) for a, b in zip(images, shown, strict=True)) == same_case
