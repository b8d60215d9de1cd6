import json

import numpy as np
import pytest

from med3dvlm.data.preprocess import PreprocessConfig
from med3dvlm.data.volume import VolumeError
from med3dvlm.evaluation import common


def test_own_images_without_baseline_and_none_when_blank():
    assert common.shown_images(["a", "b"], ["x", "y"], None, 0) == ["a", "b"]
    assert common.shown_images(["a", "b"], ["x", "y"], "blank", 0) == [None, None]


def test_shuffled_exchanges_between_different_answers_inside_a_group():
    rng = np.random.default_rng(0)
    answers = [str(a) for a in rng.integers(0, 3, 90)]
    groups = [i % 2 for i in range(90)]
    images = [f"{i}" for i in range(90)]

    shown = common.shown_images(images, answers, "shuffled", seed=3, groups=groups)

    assert sorted(shown) == sorted(images)  # an exchange: every image is shown once
    for row, image in enumerate(shown):
        assert answers[int(image)] != answers[row] and groups[int(image)] == groups[row]
    assert shown == common.shown_images(images, answers, "shuffled", seed=3, groups=groups)
    assert shown != common.shown_images(images, answers, "shuffled", seed=4, groups=groups)


def test_shuffled_does_what_can_be_done_when_one_answer_dominates():
    answers = ["yes"] * 8 + ["no", "No "]
    shown = common.shown_images([str(i) for i in range(10)], answers, "shuffled", seed=0)
    differ = sum(answers[int(image)].strip().lower() != answers[i].strip().lower() for i, image in enumerate(shown))
    assert differ == 4  # both "no" cases and two "yes" cases


def test_unreadable_image_names_manifest_row_and_file(tmp_path):
    path = str(tmp_path / "broken.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"no volume")
    batches = common.image_batches([path], {path: "M3D_Cap.json, row test[3]"}, PreprocessConfig(size=(4, 4, 4)), 2, 0)
    with pytest.raises(VolumeError, match=r"M3D_Cap.json, row test\[3\].*broken.nii.gz"):
        list(batches)


def test_blank_image_is_empty_and_of_the_models_size():
    ((paths, images),) = common.image_batches([None], {}, PreprocessConfig(size=(2, 3, 4)), 2, 0)
    assert paths == [None] and images.shape == (1, 1, 2, 3, 4) and not images.any()


def test_split_hash_follows_the_rows_and_not_the_place_of_the_data(tmp_path):
    def record(root, answer):
        args = common.argparse.Namespace(data_root=str(root))
        return common.split_record(args, "m.csv", [(str(root / "a.nii.gz"), "question", answer)])

    here = record(tmp_path / "here", "yes")
    assert here == record(tmp_path / "there", "yes")
    assert here["sha256"] != record(tmp_path / "here", "no")["sha256"]
    assert here["samples"] == 1 and here["images"] == 1


def test_files_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "result.json"
    common.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        common.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    common.write_csv(tmp_path / "t.csv", [("a", "b"), (None, 'with "quotes", and commas')])
    assert (tmp_path / "t.csv").read_text().splitlines()[1] == ',"with ""quotes"", and commas"'


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="test.csv: no rows"):
        common.require_samples([], "test.csv")
