"""Many scans: a folder or a table of them, answered one after the other."""

import argparse
import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.data.readers import READERS
from med3dvlm.data.readers.dicom_header import is_dicom_file
from med3dvlm.data.readers.slices import slice_files
from med3dvlm.data.volume import VolumeError, reading_options
from med3dvlm.demo.output import COLUMNS, OutputError, ResultFile, json_line
from med3dvlm.demo.terminal import Terminal
from med3dvlm.inference import NOTICE, Chat, Med3DVLM, QuestionError, Sampling

SCAN_ENDINGS = (*(ending for endings in READERS for ending in endings), ".zip")


@dataclass(frozen=True)
class Job:
    """One question about one scan. image: as the output names it; path: where it lies; kind: "vqa" or "caption"."""

    image: str
    path: Path
    question: str
    kind: str


def find_jobs(args: argparse.Namespace) -> list[Job] | None:
    """What to do for each scan of a folder or a table; None where `--image_path` is one scan.

    A folder is one scan where slices or DICOM files lie directly in it, where a series is named, or where only one scan
    is found in it and no `--output` is given. Otherwise, and with `--batch`, it is a folder of scans.
    Raises:
        VolumeError: nothing there. OutputError: a table that cannot be used.
    """
    path = Path(args.image_path) if args.image_path else None
    many = args.batch or args.output
    if path is not None and path.name.lower().endswith(".csv"):
        return _jobs_of_table(path, args)
    if path is not None and path.is_dir() and (args.batch or not (args.series or holds_one_scan(path))):
        scans = list(scans_in(path))
        if len(scans) > 1 or (scans and many):
            return [_job(scan.relative_to(path).as_posix(), scan, None, args) for scan in scans]
        if many:
            raise VolumeError(f"{path}: holds no scans ({', '.join(SCAN_ENDINGS)}, or folders of DICOM or slices)")
    if many and path is not None:
        return [_job(args.image_path, path, None, args)]
    return None


def holds_one_scan(folder: Path) -> bool:
    """Slices or DICOM files lie directly in the folder."""
    return bool(slice_files(folder)) or any(is_dicom_file(file) for file in _visible(folder) if file.is_file())


def scans_in(folder: Path) -> Iterator[Path]:
    """Volume files and folders that hold one scan, at any depth, in the order of their names."""
    for entry in _visible(folder):
        if entry.is_dir():
            yield from [entry] if holds_one_scan(entry) else scans_in(entry)
        elif entry.name.lower().endswith(SCAN_ENDINGS) and not _is_second_half(entry):
            yield entry


def _is_second_half(file: Path) -> bool:
    """The voxels of an Analyze or NIfTI pair: its `.hdr` stands for both."""
    name, image, rest = file.name.lower().rpartition(".img")
    return bool(image) and file.with_name(file.name[: len(name)] + f".hdr{rest}").exists()


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _job(image: str, path: Path, question: str | None, args: argparse.Namespace) -> Job:
    question = question or args.question
    return Job(image, path, question or CAPTION_PROMPTS[0], "vqa" if question else "caption")


def _jobs_of_table(path: Path, args: argparse.Namespace) -> list[Job]:
    """The rows of a CSV file. Paths in it are relative to its folder; where it has no question, --question is asked."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
            if "image" not in names:
                raise OutputError(f"{path}: lacks the column image; found {', '.join(names) or 'nothing'}")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise OutputError(f"{path}: cannot be read as CSV ({error})") from error
    if not rows:
        raise OutputError(f"{path}: has no rows")
    question = names.get("question", "question")  # a column that is not there is empty
    asked = ((row[names["image"]] or "", (row.get(question) or "").strip()) for row in rows)
    return [_job(image, path.parent / image, text, args) for image, text in asked]


def answer_scans(jobs: list[Job], load: Callable[[], Med3DVLM], args: argparse.Namespace, terminal: Terminal) -> int:
    """Answer every job that the output does not hold yet; returns how many rows, old and new, have an error.

    load: gives the model; called only where something is left to do.
    """
    if args.output is None:
        failed = 0
        for row in _rows(load(), jobs, args):
            print(json_line(row), end="", flush=True)
            failed += bool(row["error"])
    else:
        with ResultFile(args.output, settings_of(args)) as results:
            left = _not_done(jobs, results.done)
            # disable=None: no progress bar where standard error is not a terminal
            with tqdm(total=len(jobs), initial=len(jobs) - len(left), desc="scans", unit="answer", disable=None) as bar:
                for row in _rows(load(), left, args) if left else ():
                    results.append(row)
                    bar.update()
            failed = results.failed
    terminal.say(f"{len(jobs) - failed} of {len(jobs)} answered{f': {args.output}' if args.output else ''}. {NOTICE}")
    return failed


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
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    for job in jobs:
        row = dict.fromkeys(COLUMNS) | {"image": job.image, "question": job.question, "notice": NOTICE}
        try:
            if job.path != looked_at:
                looked_at = None
                chat.set_image(job.path, **reading_options(args))
                looked_at = job.path
            answer = chat.ask(job.question, job.kind, args.max_new_tokens, choices=args.choices, sampling=sampling)
            row |= {
                "answer": answer.text,
                "tokens": answer.tokens,
                "finished": answer.finished,
                "probabilities": answer.probabilities,
                "warnings": list(answer.warnings),
            }
        except (VolumeError, QuestionError, OSError) as error:
            row["error"] = str(error)
        yield row


def settings_of(args: argparse.Namespace) -> dict:
    """What the rows of an output depend on: a run with other settings does not go on with it."""
    names = (
        *("device", "dtype", "quantization", "max_new_tokens", "temperature", "top_p", "seed", "choices"),
        *("preset", "window", "keep_aspect", "no_crop"),
    )
    model = args.model_name_or_path
    return {
        "model": os.path.abspath(model) if os.path.isdir(model) else model,
        "input": os.path.abspath(args.image_path),
        "reading": reading_options(args),
        **{name: getattr(args, name) for name in names},
        "notice": NOTICE,
    }
