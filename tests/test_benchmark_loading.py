"""The loading benchmark compares ways to the same images, and prints every table. No times are asserted."""

from argparse import Namespace

import pytest
import torch

from med3dvlm.benchmark import loading
from med3dvlm.data.augment import to_unit
from med3dvlm.data.presets import PreprocessConfig

SIZE = (16, 64, 64)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    values = {"PUBLISHED_SIZE": SIZE, "CONFIG": PreprocessConfig("published", SIZE), "VOLUMES": 2, "STEPS": 1,
              "SECONDS": 0.05}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(loading, name, value)


def test_all_ways_lead_to_the_same_images(tmp_path):
    sources = loading.write_sources(tmp_path)
    images = {name: to_unit(read(paths[1])[None]) for name, (read, paths) in sources.ways.items()}
    expected = torch.from_numpy(loading.volume(1))[None, None]
    for name, image in images.items():
        assert (image - expected).abs().max() <= (1 / 510 + 1e-6 if "ours" in name else 0), name
    assert torch.equal(images[loading.OURS], images[loading.CACHE])


def test_the_report_has_every_row():
    text = loading.report(Namespace(repeats=1))
    assert [text.count(f"| {name}") for name in (loading.PLAIN, loading.NIBABEL, loading.OURS, loading.CACHE)] == [
        3, 1, 3, 4]  # fmt: skip
    assert text.count("| --- |") >= 3
