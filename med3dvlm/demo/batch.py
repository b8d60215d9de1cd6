"""Many scans: a folder or a table of them, answered one after the other."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size

from tqdm import tqdm

from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.data.readers import ENDINGS, header_of, volume_files
from med3dvlm.data.readers.dicom_header import is_dicom_file
from med3dvlm.data.readers.slices import slice_files
from med3dvlm.data.sources.base import SourceError
from med3dvlm.data.sources.spreadsheet import TABLE_ENDINGS, find_columns, read_table
from med3dvlm.data.sources.table import COLUMNS as TABLE_COLUMNS
from med3dvlm.data.volume import VolumeError, reading_options
from med3dvlm.demo.output import CommandError, ResultFile, record_of
from med3dvlm.demo.terminal import Terminal, printable, readable, sentence
from med3dvlm.inference import NOTICE, Chat, Med3DVLM, QuestionError


@dataclass(frozen=True)
class Job:
    """One question about one scan.

    image: as the output names it; path: where it lies, None where a table names none; kind: "vqa" or "caption".
    """

    image: str
    path: Path | None
    question: str
    kind: str


def find_jobs(args: argparse.Namespace) -> list[Job] | None:
    """What to do for each scan of a folder or a table; None where `--image_path` is one scan.

    A folder is one scan where slices or DICOM files lie directly in it, where a series is named, or where only one scan
    is found in it and no `--output` is given. Otherwise, and with `--batch`, it is a folder of scans.
    Raises:
        VolumeError: nothing there, or one scan beside others. CommandError: a table that cannot be used.
    """
    if args.image_path is None:
        return None
    path, many = Path(args.image_path), args.batch or args.output
    if not path.exists():  # a large model takes long to load
        raise VolumeError(f"{path}: no such file or folder")
    if path.name.lower().endswith(TABLE_ENDINGS) and not path.is_dir():
        return _jobs_of_table(path, args)
    if path.is_dir() and (args.batch or not (args.series or holds_one_scan(path))):
        scans = list(scans_in(path))
        if len(scans) > 1 or (scans and many):
            return [_job(scan.relative_to(path).as_posix(), scan, "", args) for scan in scans]
        if many:
            raise VolumeError(f"{path}: holds no scans ({', '.join(ENDINGS)}, or folders of DICOM or slices)")
    elif path.is_dir() and not args.series and (volumes := volume_files(path)):
        found = ", ".join(volume.name for volume in volumes[:10])
        choice = "give the path of one of them, or --batch for all volume files and folders of slices or DICOM"
        raise VolumeError(f"{path}: holds {found} beside slices or DICOM files; {choice}")
    return [_job(args.image_path, path, "", args)] if many else None


def holds_one_scan(folder: Path) -> bool:
    """Slices or DICOM files lie directly in the folder."""
    return bool(slice_files(folder)) or any(is_dicom_file(file) for file in _visible(folder) if file.is_file())


def scans_in(folder: Path, seen: set[str] | None = None) -> Iterator[Path]:
    """Volume files and folders that hold one scan, at any depth, in the order of their names.

    Links are followed, but no folder is read twice. One that cannot be read counts as a scan, which says so when its
    turn comes. seen: the folders so far.
    """
    seen = {os.path.realpath(folder)} if seen is None else seen
    for entry in _visible(folder):
        if entry.is_dir():
            real = os.path.realpath(entry)
            if real not in seen:
                seen.add(real)
                yield from [entry] if _is_one_scan(entry) else scans_in(entry, seen)
        elif entry.name.lower().endswith(ENDINGS):
            header = header_of(entry)
            if header is None or not header.exists():  # otherwise it stands for both
                yield entry


def _is_one_scan(folder: Path) -> bool:
    try:
        return holds_one_scan(folder)
    except OSError:  # reading the scan fails in the same way
        return True


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _job(image: str, path: Path | None, question: str, args: argparse.Namespace) -> Job:
    """question: of a table, "" where it has none."""
    question = "" if args.report else question or args.question
    return Job(readable(image), path, question or CAPTION_PROMPTS[0], "vqa" if question else "caption")


def _jobs_of_table(path: Path, args: argparse.Namespace) -> list[Job]:
    """The rows of a table. Paths in it are relative to its folder; where it has no question, --question is asked."""
    usual = {key: TABLE_COLUMNS[key] for key in ("image", "question")}
    try:
        rows = read_table(path)
        columns = find_columns(path, rows, usual, {}, ())
    except SourceError as error:
        raise CommandError(str(error)) from error
    if not rows:
        raise CommandError(f"{path}: has no rows")
    if "image" not in columns:
        raise CommandError(f"{path}: lacks the column image; it has {', '.join(rows[0])}")
    asked = ((row.get(columns["image"], ""), row.get(columns.get("question"), "")) for row in rows)
    return [_job(image, path.parent / image if image else None, question, args) for image, question in asked]


def answer_scans(jobs: list[Job], load: Callable[[], Med3DVLM], args: argparse.Namespace, terminal: Terminal) -> int:
    """Answer every job that the output does not hold yet; returns how many rows, old and new, have an error.

    load: gives the model; called only where something is left to do.
    """
    wanted = Counter((job.image, job.question) for job in jobs)
    if args.output is None:
        failed = 0
        # Rows that are printed on a terminal show by themselves how far they are.
        for row in _with_progress(_rows(load(), jobs, args), len(jobs), 0, shown=not sys.stdout.isatty()):
            terminal.json(row)
            failed += bool(row["error"])
    else:
        with ResultFile(args.output, settings_of(args)) as results:
            left = _not_done(jobs, results.done)
            rows = _rows(load(), left, args) if left else ()
            for row in _with_progress(rows, len(jobs), len(jobs) - len(left)):
                results.append(row)
            failed = (results.failed & wanted).total()  # the file may hold more than was asked for now
    terminal.say(f"{len(jobs) - failed} of {len(jobs)} answered{f': {args.output}' if args.output else ''}. {NOTICE}")
    return failed


def _with_progress(rows: Iterable[dict], total: int, done: int, shown: bool = True) -> Iterator[dict]:
    """The rows, and on standard error how far they are: a bar on a terminal, a line each in a log; and what failed."""
    columns, lines = get_terminal_size()  # 80 x 24 where a terminal does not say, on which tqdm would show nothing
    with tqdm(total=total, initial=done, desc="scans", unit="answer", ncols=columns, nrows=lines,
              miniters=1, disable=None if shown else True) as bar:  # fmt: skip
        for number, row in enumerate(rows, done + 1):
            yield row
            bar.update()
            if shown and (bar.disable or row["error"]):
                failure = f": error: {row['error']}" if row["error"] else ""
                bar.write(printable(f"{number} of {total}: {row['image']}{failure}"), file=sys.stderr)


def _not_done(jobs: list[Job], done: Counter) -> list[Job]:
    """The jobs in their order, without as many of each as are done."""
    done = done.copy()
    left = []
    for job in jobs:
        key = (job.image, job.question)
        if done[key]:
            done[key] -= 1
        else:
            left.append(job)
    return left


def _rows(model: Med3DVLM, jobs: list[Job], args: argparse.Namespace) -> Iterator[dict]:
    """One row a job. What is wrong with a scan or a question becomes its `error`. A scan with several questions in
    consecutive rows is read once.
    """
    chat, looked_at = Chat(model), None
    for job in jobs:
        try:
            if job.path is None:
                raise VolumeError("this row of the table names no scan")
            if args.choices and job.kind == "caption":
                raise QuestionError("--choices needs a question to choose the answer of")
            if job.path != looked_at:
                looked_at = None
                chat.set_image(job.path, **reading_options(args))
                looked_at = job.path
            answer = chat.ask(job.question, job.kind, args.max_new_tokens, choices=args.choices, sampling=args.sampling)
            row = record_of(job.image, job.question, answer)
        except (VolumeError, QuestionError, OSError) as error:
            row = record_of(job.image, job.question, error=sentence(error))
        yield row


def settings_of(args: argparse.Namespace) -> dict:
    """What the rows of an output depend on: a run with other settings does not go on with it."""
    names = (
        *("device", "dtype", "quantization", "max_new_tokens", "temperature", "top_p", "seed", "choices"),
        *("preset", "window", "keep_aspect", "no_crop"),
    )
    model, written = args.model_name_or_path, None
    if os.path.isdir(model):  # the same folder may hold another model by now
        model = os.path.abspath(model)
        written = max((file.stat().st_mtime_ns for file in Path(model).iterdir()), default=0)
    return {
        "model": [model, written],
        "input": os.path.abspath(args.image_path),
        "reading": reading_options(args),
        **{name: getattr(args, name) for name in names},
        "notice": NOTICE,
    }
