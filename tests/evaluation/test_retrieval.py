import csv
import json

import numpy as np
import pytest

from med3dvlm.data.manifest import ManifestError
from med3dvlm.data.volume import VolumeError
from med3dvlm.evaluation import retrieval
from med3dvlm.model.weights import CheckpointError


def run(data_root, clip_folder, output, *more):
    return retrieval.main([
        "--model_name_or_path", str(clip_folder), "--data_root", str(data_root), "--output_dir", str(output),
        "--cap_data_path", str(data_root / "M3D_Cap_npy" / "M3D_Cap.json"), "--max_length", "32",
        "--batch_size", "4", "--device", "cpu", *more,
    ])  # fmt: skip


def test_pools_are_the_first_cases_of_one_matrix(data_root, clip_folder, tmp_path):
    summary = run(data_root, clip_folder, tmp_path, "--pool_sizes", "6", "4")
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    with np.load(tmp_path / "similarity.npz") as file:
        scores, series = file["scores"], file["series"]
    assert scores.shape == (6, 6) and np.abs(scores).max() <= 1 + 1e-5
    assert summary["pools"] == {
        "4": retrieval.named_scores(scores[:4, :4]),
        "6": retrieval.named_scores(scores),
    }
    assert summary["same_series"] == retrieval.same_series_scores(scores, list(series))
    assert summary["same_series"]["groups"] == 3 and summary["same_series"]["chance"] == 0.5  # pairs of one plane
    assert summary["split"]["samples"] == 6 and len(summary["split"]["sha256"]) == 64

    with open(tmp_path / "tiny-clip_eval_retrieval.csv", newline="") as file:
        table = dict(csv.reader(file))
    assert float(table["IR_1@4"]) == pytest.approx(summary["pools"]["4"]["image_to_text"]["R@1"], abs=1e-4)
    assert float(table["TR_5@6"]) == pytest.approx(summary["pools"]["6"]["text_to_image"]["R@5"], abs=1e-4)


def test_batch_size_does_not_change_the_scores(data_root, clip_folder, tmp_path):
    run(data_root, clip_folder, tmp_path / "a", "--pool_sizes", "6")
    run(data_root, clip_folder, tmp_path / "b", "--pool_sizes", "6", "--batch_size", "1")
    a, b = (np.load(tmp_path / name / "similarity.npz")["scores"] for name in "ab")
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_blank_images_are_at_chance(data_root, clip_folder, tmp_path):
    summary = run(data_root, clip_folder, tmp_path, "--pool_sizes", "6", "--baseline", "blank")
    assert summary["pools"]["6"]["text_to_image"]["R@1"] == pytest.approx(1 / 6)


def test_shuffled_exchanges_rows_of_the_matrix(data_root, clip_folder, tmp_path):
    run(data_root, clip_folder, tmp_path / "true", "--pool_sizes", "6")
    run(data_root, clip_folder, tmp_path / "control", "--pool_sizes", "6", "--baseline", "shuffled")
    true, control = (np.load(tmp_path / name / "similarity.npz")["scores"] for name in ("true", "control"))
    distance = np.abs(control[:, None] - true[None]).max(axis=2)  # [row of control, row of true]
    origin = distance.argmin(axis=1)
    assert distance.min(axis=1).max() < 1e-5
    assert sorted(origin) == list(range(6)) and all(origin[i] != i for i in range(6))


def test_pool_that_the_split_cannot_fill(data_root, clip_folder, tmp_path):
    with pytest.raises(ValueError, match="500: the split has 6 cases"):
        run(data_root, clip_folder, tmp_path, "--pool_sizes", "4", "500")
    assert retrieval.pool_sizes(None, 600) == [100, 500]
    assert retrieval.pool_sizes(None, 7) == [7]


def test_missing_and_unreadable_files_stop_the_evaluation(data_root, clip_folder, tmp_path):
    manifest = tmp_path / "M3D_Cap.json"
    good = json.loads((data_root / "M3D_Cap_npy" / "M3D_Cap.json").read_text())["test"]
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"cut off")
    for image, error in (("nowhere.nii.gz", ManifestError), (str(broken), VolumeError)):
        manifest.write_text(json.dumps({"test": [good[0], {**good[1], "image": image}]}))
        with pytest.raises(error, match=rf"M3D_Cap.json, row test\[1\].*{image.rsplit('/')[-1]}"):
            run(data_root, clip_folder, tmp_path / "out", "--cap_data_path", str(manifest))
    assert not (tmp_path / "out" / "summary.json").exists()


def test_same_series_needs_company():
    assert retrieval.same_series_scores(np.eye(2), ["Axial_a", "Axial_b"]) is None
    scores = retrieval.same_series_scores(np.eye(5), ["x", "y", "x", "z", "y"])
    assert scores["cases"] == 4 and scores["image_to_text"]["R@1"] == 1


@pytest.mark.parametrize("missing", ["--cap_data_path", "--model_name_or_path"])
def test_input_that_is_not_there_leaves_no_folder(data_root, clip_folder, tmp_path, missing):
    with pytest.raises((ManifestError, CheckpointError)):
        run(data_root, clip_folder, tmp_path / "out", missing, str(tmp_path / "absent"))
    assert not (tmp_path / "out").exists()
