import json

import pytest

from med3dvlm.data.manifest import ManifestError
from med3dvlm.data.preprocess import PreprocessConfig
from med3dvlm.data.volume import VolumeError
from med3dvlm.evaluation import common


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
    with pytest.raises(ManifestError, match="test.csv: no rows"):
        common.require_samples([], "test.csv")
