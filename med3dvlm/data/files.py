"""Atomic writing: a reader finds the old file or the whole new one, never a part."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path, mode: int | None = None):
    """Yield a temporary path beside `path`; on success it replaces `path`, on an error it is removed.

    mode: of the file (default: as readable as any other).
    The temporary name starts with a dot and ends in `.partial`, so no reader of ours takes it for a finished file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    try:
        os.chmod(temporary, 0o666 & ~_umask() if mode is None else mode)  # mkstemp makes private files
        yield Path(temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_bytes(path, data: bytes) -> None:
    """Write `data` to `path` atomically, making the folder where needed."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
