"""Prepare a raw M3D tree: slice folders become small NIfTI volumes, reports become clean texts.

`<input>/<ct_case|ct_quizze>/<id>/<series>/<n>.png` and `.../<id>/text.txt` become
`<output>/<ct_case|ct_quizze>/<id>/<series>.nii.gz` and `.../<id>/text.txt`. What is finished, and newer than its
source, is not done again, and an interruption leaves no partial file.
"""

import argparse
import gzip
import os
import struct
import sys
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from med3dvlm.data.files import write_bytes
from med3dvlm.data.manifest import clean_report_text
from med3dvlm.data.volume import VolumeError, load_volume, write_prepared

SPLIT_FOLDERS = ("ct_case", "ct_quizze")
DEFAULT_INPUTS = ("data/M3D-Cap", "data/M3D_Cap")
DEFAULT_OUTPUT = "data/M3D_Cap_npy"
MANIFEST = "M3D_Cap.json"
NIFTI_DTYPES = {"float32": 16, "uint8": 2}  # codes of the NIfTI-1 standard


@dataclass(frozen=True)
class PrepareJob:
    """One case: where it lies, where its results go, and their form."""

    source: Path
    target: Path
    size: tuple[int, int, int]
    dtype: str


@dataclass
class PrepareReport:
    """What was done: volumes written, volumes that were finished before, and `file: reason` for notes and errors."""

    written: int = 0
    finished: int = 0
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, other: "PrepareReport") -> None:
        self.written += other.written
        self.finished += other.finished
        self.notes += other.notes
        self.errors += other.errors


def fold_name(name: str) -> str:
    """A series name in ASCII, accents dropped, as the published preparation names its files."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")


def prepare_dataset(input_dir, output_dir, size=(128, 256, 256), dtype="float32", num_workers=None) -> PrepareReport:
    """Prepare every case below `input_dir`, several at a time.

    size: (D, H, W) of the results. dtype: "float32" or "uint8" (a quarter of the size, steps of 1/255).
    num_workers: processes; all CPU cores where None, this process alone where 1.
    Raises FileNotFoundError where `input_dir` holds no case; an unreadable series goes to the report's errors instead.
    """
    jobs = [
        PrepareJob(case, Path(output_dir) / case.parent.name / case.name, tuple(size), dtype)
        for case in find_cases(input_dir)
    ]
    workers = min(num_workers or os.cpu_count() or 1, len(jobs))
    report = PrepareReport()
    progress = tqdm(total=len(jobs), desc="preparing", unit="case")
    with progress:
        for result in _run(jobs, workers):
            report.add(result)
            progress.update()
    return report


def _run(jobs: list[PrepareJob], workers: int):
    if workers == 1:
        yield from map(prepare_case, jobs)
        return
    # Fresh processes: a fork of a process that already runs threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        yield from pool.map(prepare_case, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # the cases run in parallel already


def raw_root(input_dir) -> Path:
    """The folder that holds `ct_case` and `ct_quizze`: the data set's repository has it one level down."""
    root = Path(input_dir)
    nested = not any((root / name).is_dir() for name in SPLIT_FOLDERS) and (root / "M3D_Cap").is_dir()
    return root / "M3D_Cap" if nested else root


def copy_manifest(input_dir, output_dir) -> None:
    """Bring `M3D_Cap.json` along where there is one. A copy that is newer than it (renamed since, say) stays."""
    target = Path(output_dir) / MANIFEST
    found = [path for path in (raw_root(input_dir) / MANIFEST, Path(input_dir) / MANIFEST) if path.is_file()]
    if found and not is_newer(target, found[0]):
        write_bytes(target, found[0].read_bytes())


def find_cases(input_dir) -> list[Path]:
    """The case folders of a raw tree, in order. Raises FileNotFoundError where there are none."""
    root = raw_root(input_dir)
    splits = [root / name for name in SPLIT_FOLDERS if (root / name).is_dir()]
    cases = [case for split in splits for case in sorted(split.iterdir()) if case.is_dir()]
    if not cases:
        raise FileNotFoundError(
            f"{input_dir} holds no case: expected {' or '.join(SPLIT_FOLDERS)}, with one folder a case in it "
            "(unpack archives first)"
        )
    return cases


def prepare_case(job: PrepareJob) -> PrepareReport:
    """Prepare the text and every series of one case."""
    report = PrepareReport()
    text = job.source / "text.txt"
    if text.is_file():
        try:
            cleaned = clean_report_text(text.read_text(encoding="utf-8")).encode("utf-8")
            target = job.target / "text.txt"
            if not target.is_file() or target.read_bytes() != cleaned:
                write_bytes(target, cleaned)
        except UnicodeDecodeError as error:
            report.errors.append(f"{text}: not UTF-8 text ({error})")
    else:
        report.notes.append(f"{text}: missing, the case has no report")

    names: dict[str, str] = {}
    for series in sorted(folder for folder in job.source.iterdir() if folder.is_dir()):
        name = fold_name(series.name)
        if not name or name in names:
            clash = f"{name!r}, as that of {names[name]!r}" if name else "empty"
            report.errors.append(f"{series}: its name in ASCII is {clash}; rename the folder")
            continue
        names[name] = series.name
        target = job.target / f"{name}.nii.gz"
        if is_finished(target, series, job.size, job.dtype):
            report.finished += 1
            continue
        try:
            _prepare_series(series, target, job)
            report.written += 1
        except VolumeError as error:
            report.errors.append(str(error))
    return report


def _prepare_series(series: Path, target: Path, job: PrepareJob) -> None:
    from med3dvlm.data.preprocess import preprocess  # brings torch, which only the working processes need

    image = preprocess(load_volume(series), preset="published", size=job.size)  # [1, D, H, W]
    write_prepared(target, image[0].numpy(), job.dtype)


def is_newer(target: Path, *sources: Path) -> bool:
    """Whether `target` is there, and none of the sources has been changed after it."""
    return target.is_file() and max(path.stat().st_mtime_ns for path in sources) <= target.stat().st_mtime_ns


def is_finished(path: Path, series: Path, size, dtype: str) -> bool:
    """Whether `path` is a prepared volume of this size and kind, made after the last change of its series.

    Only its header is read: writing is atomic.
    """
    if not is_newer(path, series, *series.iterdir()):
        return False
    try:
        with gzip.open(path) as file:
            header = file.read(80)
    except (OSError, EOFError):
        return False  # not ours, or damaged: it is written anew
    if len(header) < 80:
        return False
    dims = struct.unpack_from("<4h", header, 40)  # number of axes, then i, j, k
    code = struct.unpack_from("<h", header, 70)[0]
    return dims == (3, *reversed(size)) and code == NIFTI_DTYPES[dtype]


def download(repo_id: str, folder) -> None:
    """Fetch a data set repository into `folder`. Raises SystemExit that says what to do where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        snapshot_download(repo_id, repo_type="dataset", local_dir=folder)
    except GatedRepoError as error:
        raise SystemExit(
            f"{repo_id} is gated: accept its terms on its page, run `hf auth login`, and start again"
        ) from error
    except RepositoryNotFoundError as error:
        raise SystemExit(
            f"{repo_id} is not there, or not visible to you. M3D-Cap has been withdrawn from its original host; the "
            f"README names other ways in. Data that you have already: put them under {folder} and leave --download out."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SystemExit(
            f"{repo_id} could not be fetched ({type(error).__name__}: {error}). Check the connection (or HF_ENDPOINT), "
            "then start again: what has arrived is kept."
        ) from error


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prepare a raw M3D-Cap tree: slice folders to NIfTI, reports to text.")
    inputs = f"raw tree with {' and/or '.join(SPLIT_FOLDERS)} (default: {' or '.join(DEFAULT_INPUTS)})"
    parser.add_argument("--input_dir", help=inputs)
    parser.add_argument("--output_dir", default=DEFAULT_OUTPUT, help="the prepared tree (default: %(default)s)")
    size = "size of the prepared volumes (default: 128 256 256)"
    parser.add_argument("--size", type=int, nargs=3, default=(128, 256, 256), metavar=("D", "H", "W"), help=size)
    dtype = "stored type (default: %(default)s); uint8 takes a quarter of the space"
    parser.add_argument("--dtype", choices=sorted(NIFTI_DTYPES), default="float32", help=dtype)
    parser.add_argument("--num_workers", type=int, help="processes (default: all CPU cores)")
    parser.add_argument("--download", metavar="REPO_ID", help="fetch this data set repository into --input_dir first")
    arguments = parser.parse_args(argv)
    if arguments.input_dir is None:
        arguments.input_dir = next((d for d in DEFAULT_INPUTS if Path(d).is_dir()), DEFAULT_INPUTS[0])
    if min(arguments.size) < 1:
        parser.error(f"--size takes three positive numbers, not {arguments.size}")
    return arguments


def main(argv=None) -> int:
    """The command line. Returns the exit code: 0 where everything was prepared, 1 where a file was not."""
    arguments = parse_arguments(argv)
    if arguments.download:
        download(arguments.download, arguments.input_dir)
    try:
        report = prepare_dataset(
            arguments.input_dir, arguments.output_dir, tuple(arguments.size), arguments.dtype, arguments.num_workers
        )
        copy_manifest(arguments.input_dir, arguments.output_dir)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    if report.notes:
        print(f"{len(report.notes)} notes, the first: {report.notes[0]}")
    print(f"{report.written} volumes written, {report.finished} were finished before: {arguments.output_dir}")
    if report.errors:
        print(f"{len(report.errors)} could not be prepared:", *report.errors, sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
