"""A contact sheet of a prepared data set: three planes, report and questions of some volumes, for a person to look at.

python -m med3dvlm.data.preview data/M3D_Cap_npy --cases 24
"""

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tqdm import tqdm

from med3dvlm.data.checks.inputs import Inputs, NothingToCheck, add_arguments, find_inputs, preparation_of
from med3dvlm.data.checks.leakage import case_of
from med3dvlm.data.checks.page import document, picture, three_planes
from med3dvlm.data.checks.volumes import Reader
from med3dvlm.data.command import run_command
from med3dvlm.data.files import write_bytes
from med3dvlm.data.manifest import CHOICE_LETTERS, VQARecord, missing_hint
from med3dvlm.data.volume import VolumeError

_WRONG_ARGUMENTS = 2
_SIDE, _MOST_SIDE = 192, 1024

HELP = """Writes a page with some volumes of a prepared data set, one of a case, spread evenly over the splits: the
middle slices across D, H and W, the report, and the questions with their choices and answers. What to look for: which
way up the images are, whether windows show what the texts speak of, whether texts and
images belong together.
The page holds texts and pictures of the data: keep it where the data may be kept. It loads nothing from elsewhere."""

EXAMPLES = """examples:
  python -m med3dvlm.data.preview data/M3D_Cap_npy                        # data/M3D_Cap_npy/preview.html
  python -m med3dvlm.data.preview data --cases 60 --seed 3 --output look.html

exit status:
  0  written
  1  written, but some files on it don't open: it says which
  2  wrong arguments, nothing to show, or the page can't be written"""


def parser() -> argparse.ArgumentParser:
    """The command line of `preview`."""
    parser = argparse.ArgumentParser(
        prog="python -m med3dvlm.data.preview",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--output", type=Path, help="file to write (default: DIR/preview.html)")
    parser.add_argument("--cases", type=int, default=24, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one, another sample (default: %(default)s)")
    parser.add_argument("--side", type=int, default=_SIDE, help="pixels of a picture (default: %(default)s)")
    return parser


def draw(inputs: Inputs, count: int, seed: int) -> list[tuple[str, str]]:
    """(split, image) of at most `count` cases: as many of each split as there are, one image a case, seeded."""
    rng = random.Random(seed)
    waiting: dict[str, list[str]] = defaultdict(list)
    for image in sorted(inputs.splits_of):
        for split in sorted(inputs.splits_of[image]) or [""]:
            waiting[split].append(image)
    for images in waiting.values():
        rng.shuffle(images)
    chosen: dict[str, tuple[str, str]] = {}  # case -> split and image
    while any(waiting.values()):
        for split, images in waiting.items():
            while images and case_of(images[-1]) in chosen:
                images.pop()
            if images and len(chosen) < count:
                chosen[case_of(images[-1])] = split, images[-1]
        if len(chosen) == count:
            break
    return sorted(chosen.values(), key=lambda item: (list(waiting).index(item[0]), item[1]))


def preview(inputs: Inputs, count: int, seed: int, side: int) -> tuple[str, list[str]]:
    """The page, and a line about each file on it that does not open."""
    asked: dict[str, list[VQARecord]] = defaultdict(list)
    for records in inputs.questions.values():
        for record in records:
            asked[inputs.name(record.image)].append(record)
    config = preparation_of(inputs)
    read = Reader(config.size, config) if config else Reader()
    chosen, sections, problems = draw(inputs, count, seed), [], []
    for split, image in tqdm(chosen, desc="cases", unit="case"):
        parts = [f"<section><h2>{escape(image)}</h2><p>{escape(split or 'no split')}</p>"]
        try:
            parts.append(picture(three_planes(read(_existing(inputs, image)), side), image))
        except VolumeError as error:
            problems.append(str(error))
            parts.append(f"<p class=error>{escape(str(error))}</p>")
        text, problem = _report(inputs, image)
        problems += [problem] if problem else []
        parts.append(f"<p class={'error' if problem else 'text'}>{escape(problem or text)}</p>")
        parts += [f"<ol>{''.join(map(_question, asked[image]))}</ol>" if asked[image] else "", "</section>"]
        sections.append("\n".join(parts))
    shown = f"{len(chosen)} of {len(inputs.splits_of)} volumes, seed {seed}. Middle slices across D, H and W."
    return document(f"Preview of {inputs.manifest or inputs.root}", [f"<p>{shown}</p>", *sections]), problems


def _existing(inputs: Inputs, image: str) -> Path:
    path = inputs.path(image)
    if not path.exists():
        raise VolumeError(f"{path} does not exist{missing_hint(str(path))}")
    return path


def _report(inputs: Inputs, image: str) -> tuple[str, str]:
    """The report, and what is wrong with it."""
    if image not in inputs.text_of:
        return "(no report)", ""
    path = inputs.path(inputs.text_of[image])
    try:
        return path.read_text(encoding="utf-8"), ""
    except (OSError, UnicodeDecodeError) as error:
        return "", f"{path}: cannot be read ({type(error).__name__})"


def _question(record: VQARecord) -> str:
    choices = [f"{letter}. {text}" for letter, text in zip(CHOICE_LETTERS, record.choices, strict=False) if text]
    listed = f"<br>{escape('  '.join(choices))}" if choices else ""
    answer = ". ".join(part for part in (record.answer_choice, record.answer) if part)
    return f"<li>{escape(record.question)}{listed}<br><b>{escape(answer)}</b></li>"


def main(argv: Sequence[str] | None = None) -> int:
    """Write a contact sheet; returns the exit status."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.cases < 1:
        arguments.error("--cases must be at least 1")
    if not 16 <= args.side <= _MOST_SIDE:
        arguments.error(f"--side must lie within 16..{_MOST_SIDE}")
    output = args.output or Path(args.folder, "preview.html")
    try:
        inputs = find_inputs(args.folder, args.manifest, args.tables, args.data_root)
        if not inputs.splits_of:
            raise NothingToCheck("; ".join(finding.detail for finding in inputs.findings))
        page, problems = preview(inputs, args.cases, args.seed, args.side)
        write_bytes(output, page.encode("utf-8", "replace"))
    except (NothingToCheck, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _WRONG_ARGUMENTS
    for line in [*(f"{finding.file}: {finding.detail}" for finding in inputs.findings), *problems]:
        print(f"warning: {line}", file=sys.stderr)
    print(output)
    return 1 if problems or inputs.findings else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
