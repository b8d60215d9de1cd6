"""What holds for every test: the --slow option, two markers, torch's threads, Triton's interpreter where no GPU is."""

import os
from pathlib import Path

import pytest

if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks when it is imported, by whichever test comes first


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_threads():
    """Code that computes on one thread, as the preparation does, leaves the next tests theirs."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _has_cuda() -> bool:
    import torch  # here, so that collecting tests which need no torch stays quick

    return torch.cuda.is_available()
