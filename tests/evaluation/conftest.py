"""A data root and two tiny models, made once for all evaluation tests."""

import pytest

from tests.helpers.tiny_data import write_prepared_tree
from tests.helpers.tiny_model import TINY_SIZE, write_tiny_clip, write_tiny_vlm


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """12 cases, 6 of them in the test split."""
    return write_prepared_tree(tmp_path_factory.mktemp("data"), cases=12, size=TINY_SIZE)


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory):
    return write_tiny_vlm(tmp_path_factory.mktemp("models") / "tiny-vlm")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip")
