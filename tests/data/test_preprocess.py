"""The pipeline from a volume to the model's input."""

import argparse
import json
import re
import subprocess
import sys
import unicodedata

import nibabel as nib
import numpy as np
import pytest
import torch

from med3dvlm.data.preprocess import build_pipeline, preprocess
from med3dvlm.data.presets import (
    PRESETS,
    WINDOWS,
    PreprocessConfig,
    add_preprocess_arguments,
    check_preparation,
    preprocess_config,
)
from med3dvlm.data.profile import DataProfile
from med3dvlm.data.volume import Volume, VolumeError, load_volume
from tests.helpers.commands import ROOT
from tests.helpers.memory import growth
from tests.helpers.tiny_data import GOLDEN_DATA, unpack_tree

SIZE = (8, 16, 12)
SMALL = "r16x32x32/"  # recorded whole, at this size


def hu_volume():
    """Air at -1000, a block of water and fat (D 2..7, H 3..9, W 2..8), in it a block of bone and a spot of metal."""
    array = np.full((9, 14, 11), -1000, np.float32)
    array[2:8, 3:10, 2:9] = np.linspace(-100, 60, 6, dtype=np.float32)[:, None, None]
    array[4:6, 5:7, 4:6] = 800
    array[5, 6, 5] = 3000
    return array


def test_published_preset_equals_the_golden_volume(tmp_path):
    """Raw slices through reader and pipeline, against the recorded output of the published preparation."""
    unpack_tree("raw_slices_a.npz", tmp_path)
    folders = [path for path in tmp_path.glob("*/*") if path.is_dir()]
    names = [unicodedata.normalize("NFKD", folder.name).encode("ascii", "ignore").decode() for folder in folders]
    series = {f"{SMALL}{f.parent.name}/{name}.nii.gz": f for f, name in zip(folders, names, strict=True)}
    with np.load(GOLDEN_DATA / "prepared_a.npz") as golden:
        for record in (name for name in golden.files if name.startswith(SMALL)):
            image = preprocess(load_volume(series.pop(record)), size=(16, 32, 32))
            assert np.abs(image[0].numpy() - golden[record]).max() <= 1e-6
    assert not series


def test_published_preset_equals_the_monai_transforms():
    """Min-max, crop to the foreground and resize by plain tensor arithmetic and MONAI's own transforms."""
    from monai.transforms import Compose, CropForeground, Resize

    array = hu_volume()
    scaled = torch.from_numpy(array) - array.min()
    scaled = (scaled / scaled.max())[None]
    resize = Resize(SIZE, mode="trilinear", align_corners=False)
    reference = Compose([CropForeground(select_fn=lambda x: x > 0), resize])(scaled).as_tensor()
    image = preprocess(array, "published", SIZE)
    assert type(image) is torch.Tensor and image.shape == (1, *SIZE) and image.dtype == torch.float32
    assert image.is_contiguous() and torch.equal(image, reference)
    assert image.min() >= 0 and image.max() <= 1


def test_intensity_scale_and_offset_do_not_matter_to_the_published_preset():
    array = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32)
    first, second = (preprocess(a, "published", (4, 5, 6)) for a in (array, array * 3000 - 1024))
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_maps_its_ends_to_0_and_1(name):
    level, width = WINDOWS[name]
    values = np.array([-3000, level - width / 2, level - width / 4, level, level + width / 2, 3000], np.float32)
    array = np.broadcast_to(values, (3, 4, 6)).copy()
    found = preprocess(array, name, (3, 4, 6), crop=False)[0, 0, 0]
    assert torch.allclose(found, torch.tensor([0, 0, 0.25, 0.5, 1, 1]), atol=1e-6)
    same = preprocess(array, "window", (3, 4, 6), window=(level, width), crop=False)[0, 0, 0]
    assert torch.equal(same, found)


def test_windows_show_what_min_max_flattens():
    """160 HU of soft tissue: 4 % of the grey levels beside metal and air, 40 % of the abdomen window."""
    spread = {}
    for preset in ("published", "ct_abdomen"):
        image = preprocess(hu_volume(), preset, (9, 14, 11), crop=False)[0]
        spread[preset] = (image[7, 4, 3] - image[2, 4, 3]).item()
    assert spread["published"] == pytest.approx(0.04) and spread["ct_abdomen"] == pytest.approx(0.4)


def test_crop_goes_to_what_lies_above_the_floor():
    array = np.full((6, 6, 6), -1000, np.float32)
    array[1:5, 2:6, 0:3] = np.arange(-150, -150 + 48 * 5, 5, dtype=np.float32).reshape(4, 4, 3)
    array[0, 0, 0] = -161  # just below the floor of ct_abdomen
    cropped = preprocess(array, "ct_abdomen", (4, 4, 3))[0]
    expected = torch.from_numpy((array[1:5, 2:6, 0:3] + 160) / 400)
    assert torch.allclose(cropped, expected, atol=1e-6)
    whole = preprocess(array, "ct_abdomen", (6, 6, 6), crop=False)[0]
    assert torch.allclose(whole[1:5, 2:6, 0:3], expected, atol=1e-6) and whole[0].max() == 0


def test_mr_preset_clips_outliers():
    rng = np.random.default_rng(0)
    array = rng.uniform(0, 500, (20, 20, 20)).astype(np.float32)
    array[3, 3, 3] = 60_000
    image = preprocess(array, "mr", (20, 20, 20), crop=False)[0]
    low, high = np.percentile(array, (0.5, 99.5))
    assert np.allclose(image, np.clip((array - low) / (high - low), 0, 1), atol=1e-5)
    assert preprocess(array, "published", (20, 20, 20)).median() < 0.01 < 0.4 < image.median()


def test_keep_aspect_scales_by_millimetres_and_pads():
    """A block of 40 x 60 x 20 mm in 16 x 16 x 16 voxels: 3.75 mm each, so 11 x 16 x 5 voxels, the rest background."""
    volume = Volume(np.linspace(100, 200, 10 * 30 * 20, dtype=np.float32).reshape(10, 30, 20), spacing=(4.0, 2.0, 1.0))
    image = preprocess(volume, "window", (16, 16, 16), window=(100, 200), keep_aspect=True)[0]
    inside = [axis.nonzero().flatten() for axis in ((image > 0).any(2).any(1), (image > 0).any(2).any(0),
                                                    (image > 0).any(1).any(0))]  # fmt: skip
    assert [len(along) for along in inside] == [11, 16, 5]
    assert [(along[0] + 16 - 1 - along[-1]).item() for along in inside] == [5, 0, 11]
    assert all(abs(along[0] - (15 - along[-1])) <= 1 for along in inside)  # in the middle
    assert image[tuple(slice(along[0], along[-1] + 1) for along in inside)].min() >= 0.5
    stretched = preprocess(volume, "window", (16, 16, 16), window=(100, 200))[0]
    assert stretched.min() >= 0.5


def test_keep_aspect_follows_the_crop():
    """Air around the body takes no part of the grid."""
    array = np.full((20, 40, 40), -1000, np.float32)
    array[5:15, 10:30, 10:30] = 40
    array[7, 15, 15] = 50
    image = preprocess(Volume(array, spacing=(2.0, 1.0, 1.0)), "ct_abdomen", (20, 20, 20), keep_aspect=True)
    assert image.min() >= 0.49


def test_prepared_volume_passes_unchanged_or_is_only_resized():
    array = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32) * 0.5  # min-max would stretch it
    volume = Volume(array, prepared=True)
    for preset in ("published", "ct_abdomen", "mr"):
        assert torch.equal(preprocess(volume, preset, (4, 5, 6)), torch.from_numpy(array)[None])
    assert torch.equal(preprocess(array, "prepared", (4, 5, 6)), torch.from_numpy(array)[None])
    larger = preprocess(volume, "published", (8, 10, 12))
    assert larger.shape == (1, 8, 10, 12) and larger.max() <= 0.5


def test_prepared_volumes_need_no_monai():
    """Its import takes seconds, and training only reads prepared volumes."""
    code = (
        "import sys; import numpy as np; from med3dvlm.data.preprocess import preprocess\n"
        "from med3dvlm.data.volume import Volume\n"
        "preprocess(Volume(np.zeros((2, 3, 4), np.float32), prepared=True))\n"
        "sys.exit('monai' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:Divide by zero")
@pytest.mark.parametrize("volume, options, reason", [
    (Volume(np.full((2, 3, 4), 7, np.float32), path="flat.nii"), {}, "flat.nii: all values are 7"),
    (np.ones((2, 3), np.float32), {}, r"array: expected \[D, H, W\], found shape \(2, 3\)"),
    (Volume(np.array([[[0, 2]]], np.float32), path="x.nii", prepared=True), {}, "x.nii: prepared values lie within"),
    (np.array([[[-1, 1]]], np.float32), {"preset": "prepared"}, "found -1..1; use the published preset"),
    # 8-bit slices hold 0..1: a HU window would leave a thousandth of the grey levels of them
    (np.array([[[0, 1]]], np.float32), {"preset": "ct_abdomen"}, "values 0..1 show nothing in the HU window -160..240"),
    (np.array([[[300, 900]]], np.float32), {"preset": "ct_brain"}, "nothing in the HU window 0..80"),
    (np.eye(40, dtype=np.float32)[None] * (np.arange(40) == 3), {"preset": "mr"}, "nearly all of its values are the"),
])  # fmt: skip
def test_unusable_values_are_named(volume, options, reason):
    with pytest.raises(VolumeError, match=reason):
        preprocess(volume, size=(2, 3, 4), **options)


@pytest.mark.parametrize("config", [
    PreprocessConfig("published", (32, 64, 64)),
    PreprocessConfig("ct_lung", keep_aspect=True),
    PreprocessConfig("window", window=(40, 350.5), crop=False),
    PreprocessConfig("mr"),
    PreprocessConfig("prepared"),
])  # fmt: skip
def test_config_round_trip(config):
    assert PreprocessConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["version"] == 2
    assert "x".join(map(str, config.size)) in str(config) and config.preset in str(config)


def test_files_of_version_1_are_read():
    """As the checkpoints of the first release hold them."""
    old = {"preset": "published", "size": [32, 64, 64], "version": 1}
    assert PreprocessConfig.from_dict(old) == PreprocessConfig("published", (32, 64, 64))


@pytest.mark.parametrize("values, reason", [
    ({"preset": "lung"}, "unknown preprocessing 'lung'; known are published"),
    ({"size": [1, 2]}, "three positive numbers"), ({"size": [0, 2, 3]}, "three positive numbers"),
    ({"version": 3}, "version 3: this software knows up to 2"), ({"clip": 1}, "unknown keys clip"),
    ({"preset": "window"}, "takes a level and a width"), ({"preset": "mr", "window": [40, 400]}, "none of their own"),
    ({"preset": "window", "window": [40, 0]}, "a width above 0"), ({"preset": "window", "window": [40]}, "a level and"),
    ({"preset": "window", "window": [float("nan"), 1]}, "a level and"),
    ({"preset": "prepared", "crop": False}, "only resized"),
])  # fmt: skip
def test_config_refusals(values, reason):
    with pytest.raises(ValueError, match=reason):
        PreprocessConfig.from_dict(values)


def test_names_tell_pipelines_apart():
    """Prepared files record the name: printable ASCII of at most 50 characters, without the size."""
    configs = [
        PreprocessConfig(preset, window=window, keep_aspect=keep, crop=crop)
        for preset in PRESETS
        for window in ([(-600, 1500), (40.5, 400)] if preset == "window" else [None])
        for keep in (False, True)
        for crop in (True, False)
        if preset != "prepared"
    ]
    names = {config.name for config in configs}
    assert len(names) == len(configs) and max(map(len, names)) <= 50 and all(name.isascii() for name in names)
    assert PreprocessConfig().name == PreprocessConfig(size=(4, 4, 4)).name == "published"
    assert PreprocessConfig("window", window=(40, 400), crop=False).name == "window 40 400 no_crop"


def test_a_preparation_that_differs_is_reported():
    expected = PreprocessConfig("ct_abdomen")
    array = np.zeros((2, 3, 4), np.float32)
    assert check_preparation("ct_abdomen", expected) is None
    assert check_preparation(Volume(array, prepared=True, preparation="ct_abdomen"), expected) is None
    assert check_preparation(Volume(array), expected) is None  # goes through the pipeline
    assert "prepared as 'published', the model expects 'ct_abdomen'" in check_preparation("published", expected)
    assert "does not say how" in check_preparation(Volume(array, prepared=True), expected)
    assert check_preparation("", PreprocessConfig()) is None  # published files record nothing
    assert "prepared as 'mr'" in check_preparation("mr", PreprocessConfig())
    assert check_preparation("mr", PreprocessConfig("prepared")) is None


@pytest.mark.parametrize("flags, expected", [
    ("", {}),
    ("--preset ct_lung --no_crop", {"preset": "ct_lung", "crop": False}),
    ("--window -600 1500 --keep_aspect", {"preset": "window", "window": (-600, 1500), "keep_aspect": True}),
    ("--preset window --window 40 400", {"preset": "window", "window": (40, 400)}),
])  # fmt: skip
def test_flags_choose_a_pipeline(flags, expected):
    parser = argparse.ArgumentParser()
    add_preprocess_arguments(parser)
    args = parser.parse_args(flags.split())
    assert preprocess_config(args) == PreprocessConfig(**expected)
    assert preprocess_config(args, PreprocessConfig(size=(4, 5, 6))) == PreprocessConfig(size=(4, 5, 6), **expected)


def test_flags_change_a_checkpoints_pipeline():
    parser = argparse.ArgumentParser()
    add_preprocess_arguments(parser)
    base = PreprocessConfig("window", (4, 5, 6), window=(40, 400), keep_aspect=True)
    assert preprocess_config(parser.parse_args([]), base) == base
    changed = preprocess_config(parser.parse_args(["--preset", "ct_lung"]), base)
    assert changed == PreprocessConfig("ct_lung", (4, 5, 6), keep_aspect=True)
    with pytest.raises(ValueError, match="--window is a preset of its own, it can't change ct_lung"):
        preprocess_config(parser.parse_args(["--preset", "ct_lung", "--window", "1", "2"]))
    with pytest.raises(ValueError, match="takes a level and a width"):
        preprocess_config(parser.parse_args(["--preset", "window"]))


def test_the_documentation_has_every_preset_and_its_examples_work(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "data.md").read_text()
    for name in PRESETS:
        row = re.search(rf"^\| `{name}` \| (.*) \|$", text, re.MULTILINE)
        assert row, name
        if name in WINDOWS:
            level, width = WINDOWS[name]
            assert row[1] == f"HU {level - width // 2}..{level + width // 2} (level {level}, width {width})"
    values = json.loads(re.search(r"```json\n(\{\"image_token.*?)```", text, re.DOTALL)[1])
    assert PreprocessConfig.from_dict(values["preprocess"]).to_dict() == values["preprocess"]
    assert DataProfile.from_dict(values["training_data"]).to_dict() == values["training_data"]
    array = np.random.default_rng(0).normal(0, 300, (6, 7, 8))
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], found)
    assert found["image"].shape == (1, 128, 256, 256)


@pytest.mark.parametrize("preset", ["published", "mr", "ct_abdomen", "window"])
@pytest.mark.parametrize("crop, keep_aspect", [(True, False), (False, False), (True, True)])
def test_planes_taken_one_by_one_change_no_bit(monkeypatch, preset, crop, keep_aspect):
    """Against the whole pipeline as one Compose; the body lies away from all edges, so that cropping matters."""
    from monai.data import MetaTensor

    monkeypatch.setattr("med3dvlm.data.scratch.PART", 2000)
    array = np.random.default_rng(0).normal(30, 300, (21, 18, 20)).astype(np.float32)
    for face in (np.s_[:3], np.s_[-2:], np.s_[:, :2], np.s_[:, -4:], np.s_[:, :, :5], np.s_[:, :, -1:]):
        array[face] = -1500  # the minimum
    window = (40.1, 333.3) if preset == "window" else None
    config = PreprocessConfig(preset, (8, 16, 12), window, keep_aspect, crop)
    affine = torch.diag(torch.tensor([3.0, 0.7, 0.8, 1.0], dtype=torch.float64))
    expected = build_pipeline(config)(MetaTensor(torch.from_numpy(array.clip(-1500))[None], affine=affine)).as_tensor()
    before = array.copy()
    assert torch.equal(preprocess(Volume(array, (3.0, 0.7, 0.8)), config), expected.clamp(0, 1))
    assert np.array_equal(array, before)  # a caller's volume stays as it is


def test_a_large_volume_is_not_copied():
    """MONAI's stages on the whole volume took 12 bytes a voxel besides the volume itself."""
    setup = (
        "import numpy as np, monai.transforms; from med3dvlm.data.preprocess import preprocess\n"
        "array = np.random.default_rng(0).random((160, 400, 400), dtype=np.float32); array[0] = 0\n"
        "preprocess(array[:9], size=(8, 16, 16))"
    )
    assert growth(setup, "preprocess(array, size=(8, 16, 16))") < 2 * 160 * 400 * 400


def test_pipeline_is_a_monai_compose_made_once():
    from monai.transforms import Compose, CropForeground, ScaleIntensityRange

    pipeline = build_pipeline(PreprocessConfig("ct_lung"))
    assert isinstance(pipeline, Compose) and build_pipeline(PreprocessConfig("ct_lung")) is pipeline
    assert [type(t) for t in pipeline.transforms[:2]] == [ScaleIntensityRange, CropForeground]
    with pytest.raises(ValueError, match="no pipeline"):
        build_pipeline(PreprocessConfig("prepared"))
