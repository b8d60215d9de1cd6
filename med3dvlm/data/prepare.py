"""Prepare a data set: volumes of any form become small NIfTI files, reports become texts, and both get a manifest.

    python -m med3dvlm.data.prepare --input_dir IN --output_dir OUT --dtype uint8

The input is recognised: a raw M3D tree, CT-RATE, AMOS-MM, a list of volumes (CSV, JSONL), or a tree of any volumes,
such as a hospital's export of DICOM. `OUT/<case>/<series>.nii.gz` and `OUT/<case>/text.txt` are written,
`OUT/M3D_Cap.json` in the published layout, `OUT/M3D_VQA_*.csv`, `OUT/preparation.json`, which says how it was done, and
`OUT/data_card.md`. What is finished, made with the same options and newer than its source is not done again; every
volume is entered in `OUT/ledger.jsonl`. The run may be ended at any moment, however hard, and started again.
"""

import argparse
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from med3dvlm.data.command import run_command
from med3dvlm.data.download import download
from med3dvlm.data.finished import is_finished, remove_leftovers
from med3dvlm.data.items import find_items
from med3dvlm.data.ledger import DONE, FAILED, SKIPPED, Entry, Ledger, LedgerError, ledger_name, locked, read_ledgers
from med3dvlm.data.outputs import write_mapping, write_outputs
from med3dvlm.data.prepare_arguments import parse_arguments
from med3dvlm.data.sources import Collection, SourceError, SourceOptions, collect, refuse_overwriting
from med3dvlm.data.volume import VolumeError, reading_options
from med3dvlm.data.work import DISK_FULL, CaseWorker, DiskFull, Options, Started, Task
from med3dvlm.data.workers import Death, run_tasks

SHOWN = 20  # failures in the summary; the ledger has them all
INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


class Summary:
    """Counts what became of the volumes, and keeps the reasons of failures for the end."""

    def __init__(self):
        self.counts = Counter()
        self.bytes = 0
        self.failures: list[str] = []
        self.notes: list[str] = []

    def add(self, entry: Entry) -> None:
        if entry.status == FAILED:
            self.failures.append(f"{entry.source}: {entry.reason}")
        elif entry.status == SKIPPED and not entry.volume:
            self.notes.append(f"{entry.source}: {entry.reason}")
        else:
            self.counts[entry.status] += 1
            self.bytes += entry.bytes
        self.notes += [f"{entry.source}: {note}" for note in entry.notes]


class _Queue:
    """An iterator over tasks, to which others can be added while it is used."""

    def __init__(self, tasks: Iterator[Task]):
        self.tasks = tasks
        self.again: deque[Task] = deque()

    def __iter__(self):
        return self

    def __next__(self) -> Task:
        return self.again.popleft() if self.again else next(self.tasks)


def prepare(cases: list, options: Options, workers: int, ledger: Ledger, summary: Summary) -> str:
    """Prepare cases and enter every volume into the ledger. Returns why the run ended early, or "".

    workers: processes; this one alone where 1.
    """
    queue = _Queue(Task(case, finished) for case, finished in _with_finished(cases, options))
    running: dict[str, list[Started]] = {}  # case in work -> its volumes so far
    messages = run_tasks(partial(CaseWorker, options), queue, min(workers, max(1, len(cases))))
    progress = tqdm(total=len(cases), desc="preparing", unit="case", smoothing=0.05)
    with progress, closing(messages):
        for task, message in messages:
            folder = task.case.folder
            if isinstance(message, Started):
                running.setdefault(folder, []).append(message)
            elif isinstance(message, Entry):
                ledger.add(message)
                summary.add(message)
            elif isinstance(message, DiskFull):
                return f"the disk of {options.output} is full ({message.reason}): make room and start again"
            elif isinstance(message, Death):
                started = running.pop(folder, [])
                victim = started[-1] if started else Started("", folder)
                entry = Entry(folder, victim.volume, victim.source, FAILED, message.cause)
                ledger.add(entry)
                summary.add(entry)
                if started:  # the rest of the case is tried without what killed the worker
                    queue.again.append(replace(task, handled=task.handled | {one.volume for one in started}))
                else:
                    progress.update()
            else:  # Finished
                running.pop(folder, None)
                progress.update()
            if summary.failures:
                progress.set_postfix(failed=len(summary.failures), refresh=False)
    return ""


def _with_finished(cases: list, options: Options) -> Iterator[tuple]:
    """Each case with its results that the ledger knows to be made with these options and from the same file.

    One that it doesn't know, because a run was killed just before it was entered, is done again: what a data set's
    profile wants to know of it is in the ledger only.
    """
    lines = read_ledgers(options.output)
    known: dict[str, set[str]] = {}
    for volume, line in lines.items():
        if line.get("options") == options.digest:
            known.setdefault(line["case"], set()).add(volume)
    for case in cases:
        items = [item for item in case.items if not (case.hidden or item.dicom)]
        sources = {f"{case.folder}/{item.name}.nii.gz": os.path.relpath(item.path, options.root) for item in items}
        moved = {volume for volume, source in sources.items() if lines.get(volume, {}).get("source", source) != source}
        yield case, frozenset(known.get(case.folder, set()) - moved)


def chosen(collection: Collection, shard: tuple[int, int] | None, limit: int | None) -> list:
    """The cases of this run: every n-th for a shard, and of those the first `limit`."""
    cases = collection.cases
    if shard is not None:
        index, count = shard
        cases = cases[index % count :: count]
    return cases[:limit]


def describe(collection: Collection, cases: list, options: Options) -> str:
    """What a run would do."""
    counts = Counter()
    for case in cases:
        counts["reports"] += case.text is not None or (case.text_file is not None and case.text_file.is_file())
        for item, problem in find_items(case):
            if problem:
                counts["failing"] += 1
            elif item.dicom:
                counts["series of DICOM or archives, which are opened when it is their turn"] += 1
            else:
                target = options.output / case.folder / f"{item.name}.nii.gz"
                counts[
                    "finished" if is_finished(target, [item.path], options.config, options.dtype) else "to prepare"
                ] += 1
    volumes = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "reports") or "none"
    splits = Counter(case.split for case in cases if case.split)
    lines = [
        f"input    {collection.root}: {collection.kind}",
        f"cases    {len(cases)} of {len(collection.cases)}, {counts['reports']} with a report",
        f"volumes  {volumes}",
        f"splits   {', '.join(f'{n} {split}' for split, n in splits.items()) or 'drawn by patient or case'}",
        f"output   {options.output}: {options.config}, {options.dtype}",
    ]
    questions = sum(map(len, collection.questions.values()))
    lines += [f"asked    {questions} questions"] if questions else []
    lines += [f"left out {file}: {reason}" for file, reason in collection.left_out[:SHOWN]]
    lines += [f"note     {note}" for note in collection.notes]
    return "\n".join(lines)


def main(argv=None) -> int:
    """The command line. Returns the exit code: 0 where everything was prepared, 1 where something was not."""
    return carry_out(parse_arguments(argv), run)


def carry_out(arguments: argparse.Namespace, run: Callable[[argparse.Namespace, Collection, Options], int]) -> int:
    """Find out what the input holds, and `run`. Returns its exit code, or 1, with a sentence on stderr, for bad input.

    run: what is done with the arguments, what was found, and the options of the work.
    """
    if arguments.download:
        download(arguments.download, arguments.input_dir)
    given = ("questions", "reports", "key_file", "hash_ids", "dry_run")
    source = SourceOptions(columns=dict(arguments.columns), **{name: getattr(arguments, name) for name in given})
    try:
        collection = collect(Path(arguments.input_dir), arguments.source, source)
        output = Path(arguments.output_dir).resolve()
        refuse_overwriting(collection, output)
        options = Options(collection.root, output, arguments.config, arguments.dtype, reading_options(arguments))
        return run(arguments, collection, options)
    except (SourceError, LedgerError, VolumeError) as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(_about(error, arguments), file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command starts again", file=sys.stderr)
        return INTERRUPTED
    return 1


def _about(error: OSError, arguments: argparse.Namespace) -> str:
    """A sentence, without names of files in the input, which may be those of patients."""
    if error.errno in DISK_FULL:
        return f"the disk of {arguments.output_dir} is full: make room and start again"
    name = error.filename or arguments.output_dir
    inside = Path(name).resolve().is_relative_to(Path(arguments.input_dir).resolve())
    return f"{'a file of the input' if inside else name}: {error.strerror or error}"


def run(arguments: argparse.Namespace, collection: Collection, options: Options) -> int:
    """Prepare what was found, and write what belongs to it. Returns the exit code."""
    output = options.output
    cases = chosen(collection, arguments.shard, arguments.limit)
    if arguments.dry_run:
        print(describe(collection, cases, options))
        return 0
    summary, start, interrupted, ended = Summary(), time.monotonic(), False, ""
    notes = list(collection.notes)
    with Ledger(output / ledger_name(arguments.shard)) as ledger:
        if arguments.shard is None:
            remove_leftovers(output)
        if arguments.mapping_file is not None:
            write_mapping(collection, arguments.mapping_file)
        if arguments.shard is None or arguments.shard[0] % arguments.shard[1] == 0:  # once for all shards
            for file, reason in collection.left_out:
                ledger.add(Entry("", "", file, SKIPPED, reason))
        try:
            ended = prepare(cases, options, arguments.num_workers or os.cpu_count() or 1, ledger, summary)
        except KeyboardInterrupt:
            interrupted = True
        if not ended and not interrupted:
            with locked(output):  # the last of several shards sees the lines of all
                notes += write_outputs(collection, options, tuple(arguments.split))
    notes += [f"{len(collection.left_out)} files left out, with the reasons in the ledger"] * bool(collection.left_out)
    report(summary, notes, output, time.monotonic() - start)
    if interrupted:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    if ended:
        print(ended, file=sys.stderr)
    return 1 if ended or summary.failures else 0


def report(summary: Summary, notes: list[str], output: Path, seconds: float) -> None:
    """Print what a run did; failures go to stderr. notes: about the data set; the summary has those about volumes."""
    if summary.notes:
        print(f"{len(summary.notes)} notes about cases, the first: {summary.notes[0]}")
    for note in notes:
        print(f"note: {note}")
    written, finished = summary.counts[DONE], summary.counts[SKIPPED]
    size = f"{summary.bytes / 1e6:.1f} MB" if summary.bytes < 1e10 else f"{summary.bytes / 1e9:.1f} GB"
    print(f"{written} volumes written, {finished} were finished before, {size}, {seconds:.0f} s: {output}")
    if summary.failures:
        more = len(summary.failures) - SHOWN
        shown = summary.failures[:SHOWN] + ([f"and {more} more, in the ledger"] if more > 0 else [])
        print(f"{len(summary.failures)} could not be prepared:", *shown, sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
