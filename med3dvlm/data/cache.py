"""Images of a data set as one memory-mapped file, expanded once from the compressed archives.

    FOLDER/128x256x256-<hash of the preprocessing>/
        images.1.uint8    [slots, D, H, W], nothing else
        index.json        which slot holds which file, with its size and time of change; the preprocessing
        lock              held by the one process that builds

What the index doesn't list doesn't exist: a slot is listed after it has been written, and never written again. So a
builder may be killed at any moment, the next one goes on after the last published index, and training runs that use
the cache meanwhile keep seeing what they opened. A file that has changed gets a new slot.
"""

import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from med3dvlm.data.codes import FileImages, to_codes
from med3dvlm.data.files import write_bytes
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.volume import VolumeError

logger = logging.getLogger(__name__)

VERSION = 1
PUBLISH_SECONDS = 30  # a killed builder loses at most so much
SHOWN = 20  # unreadable images that are listed
GIB = 2**30
SPACE_ADVICE = "make room, name another folder, or train without --image_cache"


class CacheError(ValueError):
    """A cache that cannot be built or used; the message names the folder and what to do."""


@dataclass
class _Index:
    """What `index.json` holds. images: file (relative to the folder) -> slot, bytes, time of change in ns."""

    preprocess: dict
    generation: int = 1
    slots: int = 0
    images: dict[str, list[int]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        values = {"version": VERSION, "dtype": "uint8", **vars(self)}
        return json.dumps(values, ensure_ascii=False).encode("utf-8")


class ImageCache:
    """`cache(path)` is the image of a volume file: uint8 codes `[1, D, H, W]`, a read-only view of the map.

    A file that the cache doesn't hold is read itself. Copies for other processes (forked or spawned) open the map for
    themselves when they first need it. Writing into an image would end the process: stack it into a batch first.

    Args:
        folder: the cache, in which there is one folder for each preprocessing.
        config: the preprocessing; its size is that of the images.
    """

    def __init__(self, folder, config: PreprocessConfig):
        self.config = config
        self.files = FileImages(config)
        identity = json.dumps(config.to_dict(), sort_keys=True)
        size = "x".join(map(str, config.size))
        self.folder = Path(folder).absolute() / f"{size}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        self.bytes_per_image = int(np.prod(config.size))
        self.index = _Index(config.to_dict())
        self._map: torch.Tensor | None = None
        self.reload()

    def __call__(self, path) -> torch.Tensor:
        """`[1, D, H, W]`. Raises VolumeError for a file that is neither in the cache nor can be read."""
        entry = self.index.images.get(self.key(path))
        if entry is None:
            return self.files(path)
        if self._map is None:
            self._map = self._open()
        return self._map[entry[0]]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_map": None}

    @property
    def data_file(self) -> Path:
        return self.folder / f"images.{self.index.generation}.uint8"

    def reload(self) -> None:
        """Read the index again. Entries beyond the end of the data file, which was cut off, are forgotten.

        Raises CacheError where another version or another preprocessing wrote it.
        """
        file = self.folder / "index.json"
        if not file.is_file():
            return
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            known = (values.pop("version"), values.pop("dtype"), values["preprocess"])
            self.index = _Index(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{file}: is no index of an image cache ({error!r}); remove {self.folder}") from error
        if known != (VERSION, "uint8", self.config.to_dict()):
            raise CacheError(f"{file}: another version of this program wrote it; remove {self.folder}")
        stored = self.data_file.stat().st_size // self.bytes_per_image if self.data_file.is_file() else 0
        self.index.images = {key: entry for key, entry in self.index.images.items() if entry[0] < stored}
        self._map = None

    def missing(self, paths) -> list[str]:
        """Those of `paths` that the cache doesn't hold, or holds from before they changed; each once."""
        return [path for path in dict.fromkeys(paths) if self.index.images.get(self.key(path), [])[1:] != _state(path)]

    def key(self, path) -> str:
        """Under which the index lists a file."""
        return os.path.relpath(path, self.folder)

    def _open(self) -> torch.Tensor:
        """The whole map `[slots, 1, D, H, W]`, which takes address space and no memory."""
        try:
            with open(self.data_file, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CacheError(f"{self.data_file}: cannot be opened ({error}); if another process has built the cache "
                             "anew meanwhile, because its files changed, start again") from error  # fmt: skip
        slots = len(mapped) // self.bytes_per_image
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells that the memory is read-only, as it is meant to be
            flat = torch.frombuffer(mapped, dtype=torch.uint8, count=slots * self.bytes_per_image)
        return flat.view(slots, 1, *self.config.size)


def build_cache(
    folder, records, config: PreprocessConfig, max_bad_samples: int = 0, workers: int | None = None, quiet: bool = False
) -> ImageCache:
    """The cache in `folder` with the images of all `records`; what it lacks is read and written now, by one process.

    Others that want to build the same cache wait until that one has finished, or has died, and go on where it was.

    Args:
        records: have `image` and `where`, as those of `med3dvlm.data.manifest`.
        max_bad_samples: how many images may be unreadable. They are left out and met when it is their turn.
        workers: threads that read (default: one for each core).
        quiet: no progress bar.
    Raises:
        VolumeError: more unreadable images than allowed; names manifest, row and file of the first.
        CacheError: too little disk space, or `folder` cannot be written to.
    """
    cache = ImageCache(folder, config)
    where = {record.image: record.where for record in reversed(records)}  # of several, the first
    if cache.missing(where):
        with _only_builder(cache.folder):
            cache.reload()  # another process may have built it by now
            bad = _fill(cache, list(where), workers or len(os.sched_getaffinity(0)), quiet)
        for image, error in list(bad.items())[:SHOWN]:
            logger.warning("not in the image cache: %s: %s", where[image], error)
        if len(bad) > max_bad_samples:
            image, error = next(iter(bad.items()))
            more = f" (and {len(bad) - 1} more images)" if len(bad) > 1 else ""
            raise VolumeError(f"{where[image]}: {error}{more}")
    return cache


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Be the one process that builds. The system takes the lock from a process that dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    except OSError as error:
        raise CacheError(f"{folder}: the image cache cannot be written ({error}); name another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process builds this image cache, waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(cache: ImageCache, wanted: list[str], workers: int, quiet: bool) -> dict[str, VolumeError]:
    """Write those of `wanted` that are missing and publish them; returns what could not be read, and why."""
    paths, bad = cache.missing(wanted), {}
    for path in paths:
        cache.index.images.pop(cache.key(path), None)
    if cache.index.slots > 2 * len(cache.index.images):  # most slots are of files that have changed since: begin anew
        cache.index = _Index(cache.index.preprocess, cache.index.generation + 1)
        paths = wanted
    _require_space(cache, len(paths))
    logger.info("%s: adding %d volumes to the %d in the image cache", cache.folder, len(paths), len(cache.index.images))
    pool = ThreadPoolExecutor(workers)
    with _open_for_writing(cache) as file, tqdm(total=len(paths), desc="image cache", disable=quiet) as bar:
        try:
            jobs = {pool.submit(_write, cache, file, cache.index.slots + i, path): path for i, path in enumerate(paths)}
            published = time.monotonic()
            for job in as_completed(jobs):
                try:
                    cache.index.images[cache.key(jobs[job])] = job.result()
                except VolumeError as error:
                    bad[jobs[job]] = error
                bar.update()
                if time.monotonic() > published + PUBLISH_SECONDS:
                    _publish(cache, file)
                    published = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
        _publish(cache, file)
    for old in set(cache.folder.glob("images.*.uint8")) - {cache.data_file}:
        old.unlink()
    return bad


def _write(cache: ImageCache, file, slot: int, path: str) -> list[int]:
    """Write one image into its slot; returns its entry in the index."""
    state = _state(path)  # before reading: a change while it is read is noticed next time
    image = cache.files(path).numpy()  # [1, D, H, W]
    rest = memoryview(np.ascontiguousarray(image if image.dtype == np.uint8 else to_codes(image))).cast("B")
    offset = slot * cache.bytes_per_image
    try:
        while rest:
            written = os.pwrite(file.fileno(), rest, offset)
            rest, offset = rest[written:], offset + written
    except OSError as error:
        raise CacheError(f"{cache.data_file}: cannot be written ({error}); {SPACE_ADVICE}") from error
    return [slot, *state]


def _open_for_writing(cache: ImageCache):
    """The data file, without what a killed builder left behind its last slot."""
    file = os.fdopen(os.open(cache.data_file, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    file.truncate(cache.index.slots * cache.bytes_per_image)
    return file


def _publish(cache: ImageCache, file) -> None:
    """Let the index list what has been written, once that is on the disk."""
    os.fsync(file.fileno())
    index = cache.index
    index.slots = max([index.slots, *(entry[0] + 1 for entry in index.images.values())])
    write_bytes(cache.folder / "index.json", index.to_bytes())


def _require_space(cache: ImageCache, images: int) -> None:
    needed, free = images * cache.bytes_per_image, shutil.disk_usage(cache.folder).free
    if needed > free:
        raise CacheError(f"{cache.folder}: the image cache needs {needed / GIB:.1f} GiB more for {images} volumes, "
                         f"{free / GIB:.1f} GiB are free; {SPACE_ADVICE}")  # fmt: skip


def _state(path) -> list[int] | None:
    """By which a change of a file is noticed: bytes and time of change in ns; None where there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]
