"""Check a prepared data set before it is trained on: every volume, report and question, and what splits share.

python -m med3dvlm.data.verify data/M3D_Cap_npy
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from med3dvlm.data.checks.findings import ERROR, KINDS, WARNING, Finding
from med3dvlm.data.checks.inputs import Inputs, NothingToCheck, add_arguments, find_inputs, preparation_of
from med3dvlm.data.checks.leakage import case_leaks, image_leaks, patient_leaks
from med3dvlm.data.checks.page import results_page, three_planes
from med3dvlm.data.checks.texts import check_question, check_report, repeated_reports
from med3dvlm.data.checks.volumes import Reader, VolumeFacts, check_volume
from med3dvlm.data.command import run_command
from med3dvlm.data.files import write_bytes
from med3dvlm.data.readers.base import PUBLISHED_SIZE
from med3dvlm.data.volume import VolumeError

VERSION = 1  # of verify.json
CLEAN, PROBLEMS, WRONG_ARGUMENTS, INTERRUPTED = 0, 1, 2, 130
_THUMBNAILS, _SIDE = 60, 128

HELP = """Checks everything that a manifest (M3D_Cap.json) and the tables of questions (M3D_VQA_*.csv) name.
Nothing of the data is changed, and no word of a report, question or answer is printed or written to the results.
The pictures in verify.html are of the data: keep the results where the data may be kept."""

EXAMPLES = """examples:
  python -m med3dvlm.data.verify data/M3D_Cap_npy                # a prepared folder
  python -m med3dvlm.data.verify data                            # the root with M3D_Cap_npy and M3D-VQA
  python -m med3dvlm.data.verify data/hospital --strict --output results/check

written to --output:
  verify.json   every finding (severity, kind, file, row, detail), counts and statistics
  verify.html   the same to look at: histograms, and pictures of suspect volumes; needs no network

exit status:
  0  no error (with --strict: no warning either)
  1  errors (with --strict: or warnings)
  2  wrong arguments, nothing to check, or results that can't be written
  130  interrupted; nothing is written

errors:
{errors}

warnings:
{warnings}

A case is a folder with volumes; ct_case/000006 and ct_quizze/000006 are the same one. Which cases belong to one patient
is known from patients.csv beside the manifest. Nearly the same image: the differences between neighbouring blocks of
8 x 8 x 8 correlate by more than 0.995, whatever brightness and contrast."""


def parser() -> argparse.ArgumentParser:
    """The command line of `verify`."""
    lists = {
        severity + "s": "\n".join(f"  {kind:16} {text}" for kind, (s, text) in KINDS.items() if s == severity)
        for severity in (ERROR, WARNING)
    }
    parser = argparse.ArgumentParser(
        prog="python -m med3dvlm.data.verify",
        description=HELP,
        epilog=EXAMPLES.format(**lists),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--output", type=Path, help="folder for the results (default: DIR/verify)")
    size = "shape of the volumes (default: as preparation.json says, else the most frequent)"
    parser.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help=size)
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings, too")
    parser.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1),
                        help="threads that read (default: %(default)s)")  # fmt: skip
    return parser


class Verification:
    """All checks of a data set.

    inputs: what to check. size: expected (D, H, W), None for the most frequent shape. read: volumes. workers: threads.
    After `run`: findings, statistics, values (for histograms).
    """

    def __init__(self, inputs: Inputs, size: tuple[int, int, int] | None, read: Reader, workers: int):
        self.inputs = inputs
        self.size = size
        self.read = read
        self.workers = workers
        self.findings: list[Finding] = list(inputs.findings)
        self.statistics: dict = {}
        self.values: dict[str, list[float]] = {}

    def run(self) -> None:
        self._check_volumes()
        self._check_reports()
        self._check_questions()
        self.findings += case_leaks(self.inputs.splits_of)
        self.findings += patient_leaks(self.inputs.splits_of, self.inputs.patient_of)
        order = {kind: number for number, kind in enumerate(KINDS)}
        self.findings.sort(key=lambda finding: order[finding.kind])  # stable: files stay in their order

    def _map(self, work: Callable, names: Sequence[str], what: str) -> list:
        """Results of `work(name)` in order, by several threads, with progress."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            return list(tqdm(pool.map(work, names), total=len(names), desc=what, unit="file"))
        finally:
            pool.shutdown(cancel_futures=True)

    def _check_volumes(self) -> None:
        inputs, names = self.inputs, sorted(self.inputs.splits_of)
        read: list[VolumeFacts] = self._map(
            lambda name: check_volume(inputs.path(name), name, self.read), names, "volumes"
        )
        facts = dict(zip(names, read, strict=True))
        opened = {name: fact for name, fact in facts.items() if fact.shape}
        shapes = Counter(fact.shape for fact in opened.values())
        expected = self.size or (shapes.most_common(1)[0][0] if shapes else None)
        for name, fact in facts.items():
            self.findings += fact.findings
            if fact.shape and fact.shape != expected:
                self.findings.append(Finding("shape", name, f"{_times(fact.shape)}, expected {_times(expected)}"))
        fingerprints = {name: fact.fingerprint for name, fact in opened.items() if fact.fingerprint is not None}
        self.findings += image_leaks(fingerprints, inputs.splits_of)
        self.statistics["volumes"] = len(names)
        self.statistics["volumes that open"] = len(opened)
        self.statistics["volumes that nothing names (not checked)"] = inputs.unnamed()
        self.statistics["volumes by split"] = dict(
            Counter(split for splits in inputs.splits_of.values() for split in sorted(splits))
        )
        self.statistics["volumes by label"] = dict(inputs.labels)
        self.statistics["patients"] = len(set(inputs.patient_of.values())) or "not known"
        self.statistics["volumes by shape (D x H x W)"] = {_times(shape): n for shape, n in shapes.most_common()}
        self.values["mean of a volume"] = [fact.mean for fact in opened.values()]
        self.values["share of voxels above 5%"] = [fact.filled for fact in opened.values()]

    def _check_reports(self) -> None:
        names = sorted(set(self.inputs.text_of.values()))
        reports = self._map(self._read_report, names, "reports")
        digests, lengths = {}, []
        for name, (found, digest, words) in zip(names, reports, strict=True):
            self.findings += found
            if digest is not None:
                digests[name] = digest
                lengths.append(words)
        self.findings += repeated_reports(digests)
        self.statistics["reports"] = len(names)
        self.statistics["words of a report: least, median, most"] = _spread(lengths)
        self.values["words of a report"] = lengths

    def _read_report(self, name: str) -> tuple[list[Finding], bytes | None, int]:
        """Findings, hash and number of words; no hash where there is no text."""
        try:
            text = self.inputs.path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return [Finding("missing_text", name, type(error).__name__)], None, 0
        found = check_report(text, name)
        words = text.split()
        empty = any(finding.kind == "empty_text" for finding in found)
        return found, None if empty else hashlib.sha256(" ".join(words).encode()).digest(), len(words)

    def _check_questions(self) -> None:
        types, letters, lengths = Counter(), Counter(), []
        for table, records in self.inputs.questions.items():
            for record in tqdm(records, desc=Path(table).name, unit="question", disable=len(records) < 10_000):
                self.findings += check_question(record, table)
                kind = record.question_type
                types[kind if isinstance(kind, int) else "(text)"] += 1
                letters[record.answer_choice if len(record.answer_choice) == 1 else "(text)"] += 1
                lengths.append(len(record.question.split()))
        self.statistics["questions"] = sum(map(len, self.inputs.questions.values()))
        self.statistics["words of a question: least, median, most"] = _spread(lengths)
        self.statistics["questions by table"] = {name: len(rows) for name, rows in self.inputs.questions.items()}
        self.statistics["questions by type"] = {str(kind): n for kind, n in types.most_common()}
        self.statistics["answers by choice"] = {letter: n for letter, n in sorted(letters.items())}
        self.values["words of a question"] = lengths

    def thumbnails(self) -> list[tuple[str, str, bytes]]:
        """Pictures of the first suspect volumes: file, kinds of findings, PNG. Those that don't open have none.

        One that does not open any more is a finding.
        """
        kinds: dict[str, list[str]] = {}
        for finding in self.findings:
            if finding.file in self.inputs.splits_of:
                kinds.setdefault(finding.file, []).append(finding.kind)
        pictures = []
        for name, found in kinds.items():
            if "missing_image" in found or "unreadable_image" in found:
                continue
            if len(pictures) == _THUMBNAILS:
                break
            try:
                array = self.read(self.inputs.path(name))
            except VolumeError as error:  # it opened a moment ago
                self.findings.append(Finding("unreadable_image", name, str(error)))
                continue
            pictures.append((name, ", ".join(found), three_planes(array, _SIDE)))
        return pictures

    def write(self, output: Path) -> None:
        """Write verify.json and verify.html."""
        inputs, pictures = self.inputs, self.thumbnails()
        counts = Counter(finding.kind for finding in self.findings)
        results = {
            "version": VERSION,
            "data_root": str(inputs.root),
            "manifest": str(inputs.manifest or ""),
            "tables": list(inputs.questions),
            "errors": sum(finding.severity == ERROR for finding in self.findings),
            "warnings": sum(finding.severity == WARNING for finding in self.findings),
            "counts": {kind: counts[kind] for kind in KINDS if counts[kind]},
            "statistics": self.statistics,
            "findings": [
                {"severity": f.severity, "kind": f.kind, "file": f.file, "row": f.row, "detail": f.detail}
                for f in self.findings
            ],
        }
        write_bytes(output / "verify.json", (json.dumps(results, indent=1) + "\n").encode())
        title = f"Check of {inputs.manifest or inputs.root}"
        page = results_page(title, self.findings, self.statistics, self.values, pictures)
        write_bytes(output / "verify.html", page.encode("utf-8", "replace"))


def summary(verification: Verification) -> str:
    """The table for the terminal: what was checked, and each kind of finding with its count and first file."""
    lines = [f"{name:>12}: {verification.statistics[name]}" for name in ("volumes", "reports", "questions")]
    counts = Counter(finding.kind for finding in verification.findings)
    for kind, count in counts.items():
        first = next(finding for finding in verification.findings if finding.kind == kind)
        row = f", row {first.row}" if first.row else ""
        lines.append(f"{first.severity:>12}: {kind:16} {count:>7}  e.g. {first.file}{row}")
    return "\n".join(lines if counts else [*lines, "no problem was found"])


def _times(shape) -> str:
    return " x ".join(map(str, shape))


def _spread(numbers: list[int]) -> str:
    return f"{min(numbers)}, {int(np.median(numbers))}, {max(numbers)}" if numbers else "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set; returns the exit status."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.num_workers < 1:
        arguments.error("--num_workers must be at least 1")
    if args.size and min(args.size) < 1:
        arguments.error("--size must be three positive numbers")
    output = args.output or Path(args.folder, "verify")
    try:
        inputs = find_inputs(args.folder, args.manifest, args.tables, args.data_root)
        config = preparation_of(inputs)
        size = tuple(args.size) if args.size else config.size if config else None
        output.mkdir(parents=True, exist_ok=True)  # rather now than after hours of reading
        verification = Verification(inputs, size, Reader(size or PUBLISHED_SIZE, config), args.num_workers)
        verification.run()
        verification.write(output)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    except (NothingToCheck, OSError) as error:  # OSError: no place for the results
        print(f"error: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS
    print(summary(verification))
    print(f"{output / 'verify.html'}, {output / 'verify.json'}")
    severities = {finding.severity for finding in verification.findings}
    return PROBLEMS if ERROR in severities or (args.strict and severities) else CLEAN


if __name__ == "__main__":
    sys.exit(run_command(main))
