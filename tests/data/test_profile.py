"""What is recorded about training data, and what is said about scans that are unlike it."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from med3dvlm.data import phantom
from med3dvlm.data.preprocess import preprocess
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.profile import (
    PUBLISHED_PROFILE,
    DataProfile,
    input_warnings,
    kind_of_values,
    read_preparation,
    summarize,
    write_preparation,
)
from med3dvlm.data.volume import Volume, load_volume, write_prepared

PUBLISHED, ABDOMEN = PreprocessConfig(size=(16, 16, 16)), PreprocessConfig("ct_abdomen", (16, 16, 16))
SPACING = (2.5, 0.8, 0.8)


def ct(low=-1024, high=1500, modality="CT", spacing=SPACING, slices=30, seed=0, **options):
    """Half air, half soft tissue around 40 HU, some bone, cut off at `low` and `high`."""
    rng = np.random.default_rng(seed)
    array = rng.normal(40, 30, (slices, 32, 32)).astype(np.float32)
    array[:, :16] = -1000
    array[:, 20:22, 10:14] = 900
    array[0, 0, 0], array[0, 0, 1] = -1024, 1500
    return Volume(array.clip(low, high), spacing, "ct.nii", "canonical", modality=modality, units="", **options)


def mr(modality="", seed=0):
    array = np.random.default_rng(seed).gamma(2, 200, (30, 32, 32)).astype(np.float32)
    return Volume(array, (3.0, 1.0, 1.0), "mr.nii", "canonical", modality=modality)


def slices(brightest=1.0):
    """8-bit grey, as a folder of slices is read."""
    array = np.random.default_rng(0).integers(0, 256, (30, 32, 32)).astype(np.float32) / np.float32(255)
    array[3, 3, 3] = brightest
    return Volume(array, path="series")


def profile_of(*volumes):
    return DataProfile.from_summaries([summarize(volume) for volume in volumes])


HU_PROFILE = profile_of(*(ct(seed=seed) for seed in range(3)))


def test_profile_of_ct():
    profile = profile_of(ct(), ct(spacing=(5.0, 0.7, 0.7), slices=20), ct(spacing=(1.0, 0.6, 0.6), slices=120))
    assert (profile.cases, profile.modalities, profile.values) == (3, ("CT",), "HU")
    assert profile.slices == (20, 120)
    assert np.allclose(profile.spacing, [(1, 5), (0.6, 0.8), (0.6, 0.8)], rtol=0.05)
    low, *_, high = profile.percentiles
    assert low == -1000 and 300 < high <= 900


def test_profile_of_slices_and_of_a_mixture():
    profile = profile_of(slices())
    assert (profile.modalities, profile.values, profile.spacing) == ((), "0..1", ())
    mixed = profile_of(mr("MR"), mr("MR"), ct())
    assert mixed.modalities == ("MR", "CT") and mixed.values == "counts"
    assert DataProfile.from_summaries([]) == DataProfile() and str(DataProfile()) == "unknown"


def test_summary_of_raw_8_bit_slices_equals_that_of_the_volume():
    """What the fast path has is an array of bytes; the sample must not depend on who asks."""
    array = np.random.default_rng(0).integers(0, 256, (40, 60, 60), dtype=np.uint8)
    volume = Volume(array.astype(np.float32) / np.float32(255))
    found, expected = summarize(array, scale=1 / 255), summarize(volume)
    assert np.allclose(found.pop("percentiles"), expected.pop("percentiles"), atol=1e-3)
    assert found == expected
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("low, high, units, kind", [
    (-1000, 900, "", "HU"), (-160, 240, "HU", "HU"), (-160, 240, "", "counts"), (0, 1, "", "0..1"),
    (0, 255, "", "counts"), (0, 3000, "", "counts"), (-3, 4, "", "counts"),
])  # fmt: skip
def test_kinds_of_values(low, high, units, kind):
    assert kind_of_values(low, high, units) == kind


@pytest.mark.parametrize("profile", [PUBLISHED_PROFILE, HU_PROFILE, DataProfile(), profile_of(mr(), slices())])
def test_profile_round_trip(profile):
    assert DataProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    for wrong in ({"version": 2}, {"age": 50}):
        with pytest.raises(ValueError, match="update"):
            DataProfile.from_dict({**profile.to_dict(), **wrong})


def test_preparation_record(tmp_path):
    assert read_preparation(tmp_path) is None
    write_preparation(tmp_path, ABDOMEN, HU_PROFILE, dtype="uint8", volumes=3)
    assert read_preparation(tmp_path) == (ABDOMEN, HU_PROFILE)
    assert json.loads((tmp_path / "preparation.json").read_text())["dtype"] == "uint8"
    for text in ("{", "[]", '{"preprocess": {"preset": "none"}, "training_data": {}}', '{"training_data": {}}'):
        (tmp_path / "preparation.json").write_text(text)
        with pytest.raises(ValueError, match=r"preparation.json: cannot be used .*prepare the folder again"):
            read_preparation(tmp_path)


QUIET = [
    ("published checkpoint, slices", slices(), PUBLISHED, PUBLISHED_PROFILE),
    ("published checkpoint, HU through a window", ct(), ABDOMEN, PUBLISHED_PROFILE),
    ("published checkpoint, CT that was windowed", ct(-160, 240), PUBLISHED, PUBLISHED_PROFILE),
    ("published checkpoint, 8-bit NIfTI", Volume(slices().array * 255, SPACING, "x.nii", "canonical"), PUBLISHED,
     PUBLISHED_PROFILE),
    ("HU model, its own data", ct(seed=9), ABDOMEN, HU_PROFILE),
    ("HU model trained by min-max", ct(seed=9), PUBLISHED, HU_PROFILE),
    ("HU model, slightly other voxels", ct(spacing=(3.5, 0.6, 0.6)), ABDOMEN, HU_PROFILE),
    ("MR model, its own data", mr("MR", seed=9), PreprocessConfig("mr"), profile_of(mr("MR"))),
    ("MR model, NIfTI that says nothing", mr(seed=9), PreprocessConfig("mr"), profile_of(mr("MR"))),
    ("unknown training data", ct(), ABDOMEN, DataProfile()),
    ("CT without air", Volume(ct().array[:, 16:].clip(-120, 2000), SPACING), PUBLISHED, PUBLISHED_PROFILE),
    ("CT with few bright voxels, cut off at 0",
     Volume(ct().array.clip(0, 200) + 500 * (np.arange(30) == 7)[:, None, None] * np.eye(32, dtype="f4"), SPACING),
     ABDOMEN, DataProfile(values="HU")),
    ("brain CT within its window", ct(0, 80), PreprocessConfig("ct_brain", (16, 16, 16)), HU_PROFILE),
    ("brain CT that says HU", Volume(ct(0, 90).array, SPACING, modality="CT", units="HU"),
     PreprocessConfig("ct_brain", (16, 16, 16)), HU_PROFILE),
    ("few slices, as in training", ct(slices=5), ABDOMEN, profile_of(ct(slices=5))),
]  # fmt: skip


@pytest.mark.parametrize("name, volume, config, profile", QUIET, ids=[row[0] for row in QUIET])
def test_no_false_alarms(name, volume, config, profile):
    assert input_warnings(volume, config, profile) == ()
    preprocess(volume, config)


LOUD = [
    ("raw HU, model of windowed slices", ct(), PUBLISHED, PUBLISHED_PROFILE,
     r"values are HU, the model was trained on slices .* min-max over all 2524 HU leaves soft tissue \(400 HU\) 16% of "
     r"the grey levels\. A window comes closer .* preset ct_abdomen"),
    ("MR says the file", mr("MR"), PUBLISHED, PUBLISHED_PROFILE, "the scan is MR, the model was trained on CT"),
    ("MR by its values", mr(), PUBLISHED, PUBLISHED_PROFILE, "intensities look like MR, the model was trained on CT"),
    ("MR by its values, interpolated", Volume(mr().array - 10, SPACING), PUBLISHED, PUBLISHED_PROFILE,
     "intensities look like MR, the model was trained on CT"),
    ("CT, MR model", ct(modality=""), PreprocessConfig("mr"), profile_of(mr("MR")),
     "intensities look like CT, the model was trained on MR"),
    ("PET", Volume(mr().array, SPACING, orientation="canonical", modality="PT"), PUBLISHED, PUBLISHED_PROFILE,
     "the scan is PET, the model was trained on CT"),
    ("CT without intercept", Volume(ct().array + 1024, SPACING, modality="CT"), ABDOMEN, HU_PROFILE,
     "preset ct_abdomen expects HU, but nothing lies far below 0"),
    ("8-bit NIfTI, HU model", Volume(slices().array * 255, SPACING), ABDOMEN, HU_PROFILE,
     r"values lie within 0\.\.255, as 8-bit grey or labels do, and seem to be no HU, which the model was trained on"),
    ("8-bit NIfTI, HU model by min-max", Volume(slices().array * 255, SPACING), PUBLISHED, HU_PROFILE,
     "seem to be no HU, which the model was trained on"),
    ("label mask, window", Volume((slices().array * 117).round(), SPACING), ABDOMEN, PUBLISHED_PROFILE,
     r"within 0\.\.117, .* no HU, which preset ct_abdomen expects: give the original"),
    ("slices, HU model", slices(), PUBLISHED, HU_PROFILE, "values lie within 0..1, the model was trained on HU"),
    ("thick slices", ct(spacing=(10.0, 0.8, 0.8)), ABDOMEN, HU_PROFILE,
     r"voxels are 10 x 0.8 x 0.8 mm \(D H W\), those of the training data 2.5..2.5 x 0.8..0.8 x 0.8..0.8 mm"),
    ("keep_aspect without spacing", slices(), PreprocessConfig(keep_aspect=True), PUBLISHED_PROFILE,
     "the file has no spacing: voxels are taken for cubes"),
    ("few slices", ct(slices=5), ABDOMEN, HU_PROFILE, "only 5 slices: what the model sees between them is interp"),
    ("wrong window", ct(), PreprocessConfig("window", window=(1000, 200)), HU_PROFILE,
     "99 % of the voxels share 0.0% of the grey levels: hardly anything lies in the HU window 900..1100"),
    ("one bright voxel", slices(brightest=300), PUBLISHED, DataProfile(),
     r"share 0.3% of the grey levels: a few extreme voxels \(metal, padding\) take the rest"),
    ("nearly constant", Volume(np.full((20, 30, 30), 0.5, np.float32), prepared=True), PUBLISHED, PUBLISHED_PROFILE,
     "99 % of the voxels share 0.0% of the grey levels: is this the right file"),
    ("prepared otherwise", Volume(slices().array, prepared=True, preparation="mr"), ABDOMEN, HU_PROFILE,
     "was prepared as 'mr', the model expects 'ct_abdomen'"),
]  # fmt: skip


@pytest.mark.parametrize("name, volume, config, profile, sentence", LOUD, ids=[row[0] for row in LOUD])
def test_what_is_unlike_the_training_data_is_said_once(name, volume, config, profile, sentence):
    found = input_warnings(volume, config, profile)
    assert len(found) == 1
    assert re.search(sentence, found[0]), found[0]


def test_a_model_accepts_its_own_phantoms(tmp_path):
    """Raw slices of the quickstart's phantoms, and the same prepared, in all planes."""
    summaries, series = [], []
    for number in range(6):
        case = phantom.draw_case(number, 0)
        folder = tmp_path / str(number)
        folder.mkdir()
        for n, pixels in enumerate(phantom.render(case, 0)):
            Image.fromarray(pixels).save(folder / f"{n}.png")
        series.append(folder)
        summaries.append(summarize(load_volume(folder)))
    profile = DataProfile.from_summaries(summaries)
    assert profile.values == "0..1" and profile.slices == (36, 36)
    config = PreprocessConfig(size=(32, 64, 64))
    for folder in series:
        raw = load_volume(folder)
        assert input_warnings(raw, config, profile) == input_warnings(raw, config, PUBLISHED_PROFILE) == ()
        for dtype in ("float32", "uint8"):
            write_prepared(folder / "x.nii.gz", preprocess(raw, config)[0].numpy(), dtype, config.name)
            prepared = load_volume(folder / "x.nii.gz")
            assert prepared.prepared and prepared.preparation == "published"
            assert input_warnings(prepared, config, profile) == ()
