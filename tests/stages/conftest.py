"""Sixteen phantoms and three tiny base models, made once for all tests of the stages."""

import pytest
import torch

from tests.helpers.tiny_stages import write_stages


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """`Stages`: runs the training stages on tiny data."""
    return write_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Sums in the same order whatever the machine, so that two runs can be compared to the bit; module fixtures too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
