"""The work on one case of a preparation: its report, and each of its volumes. Runs in the worker processes.

Torch and MONAI are imported only for volumes that need them: slices with the published preset do not.
"""

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from med3dvlm.data.fast_slices import MEMORY, SlicePreparer
from med3dvlm.data.finished import is_finished, remove_leftovers
from med3dvlm.data.items import find_items, gathered, only_slices
from med3dvlm.data.ledger import DONE, FAILED, SKIPPED, Entry
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.profile import summarize
from med3dvlm.data.readers.archive import unpacked
from med3dvlm.data.readers.base import MAX_VOXELS, Reading
from med3dvlm.data.readers.dicom_series import dicom_files
from med3dvlm.data.scratch import slabs
from med3dvlm.data.sources.base import Case, Item
from med3dvlm.data.sources.dicom import read_header
from med3dvlm.data.volume import VolumeError, list_series, load_volume, write_prepared

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Options:
    """What all cases of a run share.

    root: input, which paths in the ledger are relative to. config: the pipeline. dtype: stored type.
    reading: keyword arguments of `load_volume`. memory: see `SlicePreparer`.
    """

    root: Path
    output: Path
    config: PreprocessConfig
    dtype: str
    reading: dict = field(default_factory=dict)
    memory: int = MEMORY

    @property
    def digest(self) -> str:
        """Stands for all that decides about the voxels of a result; the header of a file tells all but `reading`."""
        said = json.dumps([self.config.to_dict(), self.dtype, self.changed_reading], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:8]

    @property
    def changed_reading(self) -> dict:
        """The options of reading that are not the usual ones, and change what is read."""
        usual = vars(Reading())
        return {key: value for key, value in self.reading.items() if key != "max_voxels" and value != usual[key]}

    @property
    def streamed(self) -> bool:
        """Whether folders of slices go the fast way."""
        return self.config.name == "published" and not self.changed_reading.keys() & {"flip", "frame", "series"}


@dataclass(frozen=True)
class Task:
    """A case to work on. finished: results as they should be, if they are whole. handled: not to be looked at again."""

    case: Case
    finished: frozenset[str] = frozenset()
    handled: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Started:
    """Work on a volume begins; if its process dies, this is the one that it died of."""

    volume: str
    source: str


@dataclass(frozen=True)
class Finished:
    """A case is done."""


@dataclass(frozen=True)
class DiskFull:
    """Nothing more can be written; the run has to end."""

    reason: str


Message = Started | Entry | Finished | DiskFull


class CaseWorker:
    """`worker(task)` does the work and yields what happens. `DiskFull` follows the entry of its victim."""

    def __init__(self, options: Options):
        self.options = options
        self.slices = SlicePreparer(options.config.size, options.dtype == "uint8", options.memory)

    def __call__(self, task: Task) -> Iterator[Message]:
        case = task.case
        remove_leftovers(self.options.output / case.folder)
        if not task.handled:
            yield from self._report(case)
        items = list(find_items(case))
        if not items:
            yield Entry(case.folder, "", case.folder, SKIPPED, "holds no series")
        for item, problem in items:
            if problem:
                yield self._entry(case, item, "", FAILED, problem)
            elif item.dicom:
                yield from self._opened(task, item)
            else:
                yield from self._volume(task, item, self.options.reading)
        yield Finished()

    def _report(self, case: Case) -> Iterator[Entry | DiskFull]:
        """Write the text, or let go of one that is no more."""
        source = case.folder if case.hidden or case.text_file is None else _relative(case.text_file, self.options.root)
        try:
            if not case.write_report(self.options.output):
                yield Entry(case.folder, "", source, SKIPPED, "missing, the case has no report")
        except (UnicodeDecodeError, OSError) as error:
            yield Entry(case.folder, "", source, FAILED, f"the report can't be read or written ({_reason(error)})")
            yield from _if_full(error)

    def _opened(self, task: Task, item: Item) -> Iterator[Message]:
        """Every usable stack of a DICOM series, or of a zip; what is none is left out, with the reason."""
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(self._folder(item))
                found = list_series(folder)
                several = 0 if item.files else len({read_header(file).study for file in dicom_files(folder)})
            except (VolumeError, OSError) as error:
                yield self._entry(task.case, item, "", FAILED, _reason(error))
                yield from _if_full(error)
                return
            if several > 1:
                yield self._entry(task.case, item, "", FAILED, f"holds {several} studies: unpack it")
                return
            usable = 0
            for series in found:
                usable += series.usable
                name = item.name if usable < 2 else f"{item.name}_{usable}"
                one = replace(item, path=folder, name=name, files=item.files or (item.path,))
                if series.usable:
                    yield from self._volume(task, one, self.options.reading | {"series": series.number})
                elif series.damaged:
                    yield self._entry(task.case, one, "", FAILED, series.reason)
                else:
                    yield self._entry(task.case, one, "", SKIPPED, f"left out: {series.reason}")

    def _folder(self, item: Item):
        """A context manager: a temporary folder with the files of an item, and no others."""
        if item.files:
            return gathered(item.files)
        return unpacked(item.path, self.options.reading.get("max_voxels", MAX_VOXELS))

    def _volume(self, task: Task, item: Item, reading: dict) -> Iterator[Message]:
        case, options = task.case, self.options
        volume = f"{case.folder}/{item.name}.nii.gz"
        target = options.output / volume
        if volume in task.handled:
            return
        yield Started(volume, self._source(case, item))
        sources = item.files or [item.path]
        if volume in task.finished and is_finished(target, sources, options.config, options.dtype):
            yield self._entry(case, item, volume, SKIPPED, "finished before", bytes=target.stat().st_size)
            return
        start = time.perf_counter()
        try:
            array, summary, notes = self._prepared(item, reading)
            write_prepared(target, array, options.dtype, options.config.name)
        except (VolumeError, MemoryError, OSError) as error:
            yield self._entry(case, item, volume, FAILED, _reason(error))
            yield from _if_full(error)
            return
        seconds = round(time.perf_counter() - start, 3)
        notes = tuple(self._text(case, item, note) for note in notes)
        yield self._entry(case, item, volume, DONE, seconds=seconds, bytes=target.stat().st_size,
                          options=options.digest, summary=summary, notes=notes)  # fmt: skip

    def _prepared(self, item: Item, reading: dict) -> tuple[np.ndarray, dict, tuple[str, ...]]:
        """The prepared array, what the profile of the data wants to know, and notes."""
        if self.options.streamed and only_slices(item.path):
            done = self.slices(item.path)
            if done is not None:
                return done.array, summarize(done.sample, scale=1 / 255) | {"shape": list(done.shape)}, done.notes
        import torch

        from med3dvlm.data.preprocess import preprocess

        torch.set_num_threads(1)  # cases run in parallel already
        volume = load_volume(item.path, **reading, scratch=self.options.output)
        if item.rescale is not None:
            slope, intercept = (np.float32(number) for number in item.rescale)
            for part in slabs(volume.array):  # in place: a copy would take as much again
                np.multiply(part, slope, out=part)
                np.add(part, intercept, out=part)
            volume = replace(volume, units="HU", modality="CT")
        image = preprocess(volume, self.options.config)  # [1, D, H, W]
        return image[0].numpy(), summarize(volume), volume.warnings

    def _source(self, case: Case, item: Item) -> str:
        return f"{case.folder}/{item.name}" if case.hidden else _relative(item.path, self.options.root)

    def _entry(self, case: Case, item: Item, volume: str, status: str, reason: str = "", **values) -> Entry:
        return Entry(case.folder, volume, self._source(case, item), status, self._text(case, item, reason), **values)

    def _text(self, case: Case, item: Item, text: str) -> str:
        """A message with paths relative to the input, or, where they may name a patient, without them."""
        source = self._source(case, item)
        text = text.replace(str(item.path), source).removeprefix(f"{source}: ")
        if not case.hidden:
            return text.replace(f"{self.options.root}{os.sep}", "")
        parts = Path(_relative(item.path, self.options.root)).parts
        names = [path.name for path in item.path.rglob("*")] if item.path.is_dir() else []
        names = {name for name in (*parts, *names) if len(name) > 2 and not name.isdecimal()}  # numbers are our links
        for name in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", "[name]", text)
        return text


def _relative(path: Path, root: Path) -> str:
    return os.path.relpath(path, root).encode("utf-8", "backslashreplace").decode()  # names need not be UTF-8


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} (errno {error.errno})"
    return str(error)


def _if_full(error: Exception) -> Iterator[DiskFull]:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        yield DiskFull(_reason(error))
