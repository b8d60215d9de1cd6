"""The kernels as a shared library, compiled for this processor at the first use and kept in the user's cache folder.

They know nothing of torch's C++ interface: the compiler takes seconds, and the library serves every torch version. It
uses the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from torch.utils.data import get_worker_info

FOLDER = Path(__file__).parent
# Tuned for no processor: tuned for Zen, GCC 12 reads an operand from memory each time that it is used.
FLAGS = "-O3 -march=native -mtune=generic -fno-math-errno -fno-trapping-math -std=c++17 -fopenmp -fPIC -shared".split()
LIMIT = 300  # seconds
logger = logging.getLogger(__name__)


class CannotBuild(Exception):
    """Why there are no compiled kernels; the encoder then runs without."""


def wanted() -> bool:
    """Whether there are kernels and they are to be used: `MED3DVLM_FUSED=torch` does without."""
    return os.environ.get("MED3DVLM_FUSED") != "torch" and library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they are not to be had, which is logged."""
    try:
        return ctypes.CDLL(str(built()))
    except (CannotBuild, OSError) as error:
        logger.warning("DCFormer runs without compiled kernels, slower but to the same result: %s", error)
        return None


def built() -> Path:
    """The library's file, compiled now unless it is there; processes that start together wait for the first of them.

    Raises:
        CannotBuild: no compiler, it failed, or this is a worker of a data loader, which does not compile.
        OSError: the cache folder cannot be written.
    """
    folder, name = cache_folder(), f"kernels-{fingerprint()}"
    path = whole(folder, name)
    if path is not None:
        return path
    compiler = compiler_command()
    if get_worker_info() is not None:
        raise CannotBuild("workers of a data loader do not compile them")
    try:
        import fcntl
    except ImportError:
        raise CannotBuild("they are compiled on Linux and macOS only") from None
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = whole(folder, name)
        if path is None:
            logger.info("Compiling the encoder's kernels for this processor (once, some seconds), into %s", folder)
            path = compiled(folder, name, compiler)
    return path


def whole(folder: Path, name: str) -> Path | None:
    """The library of this name, which ends in its digest: one of which a part is missing would end the process."""
    return next((path for path in folder.glob(f"{name}-*.so") if path.stem == f"{name}-{digest(path)}"), None)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def compiler_command() -> list[str]:
    """The command that `CXX` names, which options may follow, or g++; CannotBuild if there is none."""
    wish = os.environ.get("CXX") or "g++"
    try:
        command = [wish] if shutil.which(wish) else shlex.split(wish)
    except ValueError as error:
        raise CannotBuild(f"CXX={wish}: {error}") from None
    if not command or shutil.which(command[0]) is None:
        raise CannotBuild(f"no C++ compiler ({wish}) on PATH")
    return command


def compiled(folder: Path, name: str, compiler: list[str]) -> Path:
    """Compile the sources beside this file to a shared library, which appears whole or not at all."""
    unfinished = folder / f"{name}.{os.getpid()}"
    command = [*compiler, *FLAGS, *map(str, sorted(FOLDER.glob("*.cpp"))), "-o", str(unfinished)]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT)
        if outcome.returncode:
            lines = outcome.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[-1])
            raise CannotBuild(f"{compiler[0]} failed ({outcome.returncode}): {reason}")
        with open(unfinished, "rb") as written:
            os.fsync(written.fileno())
        path = folder / f"{name}-{digest(unfinished)}.so"
        os.replace(unfinished, path)
        return path
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"{compiler[0]} took more than {LIMIT} s") from None
    finally:
        unfinished.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where the library is kept: below `XDG_CACHE_HOME` or `~/.cache`; CannotBuild if neither is known."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "med3dvlm"
    except RuntimeError:
        raise CannotBuild("this user has no home folder, and XDG_CACHE_HOME is not set") from None


def fingerprint() -> str:
    """Of the sources, the compiler and what this processor can do: a home folder may serve several machines."""
    parts = [os.environ.get("CXX") or "g++", *FLAGS, platform.system(), platform.machine()]
    digest = hashlib.sha256(" ".join(parts).encode())
    for source in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(source.read_bytes())
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        abilities = {line for line in lines if line.lower().startswith(("flags", "features"))}
        digest.update("".join(sorted(abilities)).encode())
    return digest.hexdigest()[:16]
