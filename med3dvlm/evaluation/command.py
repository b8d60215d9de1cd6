"""The evaluations as commands: the flags that they share, and how bad input ends them."""

import argparse
from collections.abc import Callable

from med3dvlm.data.command import run_command
from med3dvlm.data.manifest import ManifestError
from med3dvlm.inference import BAD_INPUT, DTYPES

BASELINES = ("shuffled", "blank")


class RequestError(ValueError):
    """Flags that ask for what the data cannot give; the message says which, and what to do."""


def run(main: Callable[[], object]) -> None:
    """An evaluation as a program: what users can put right ends it with one sentence and exit status 1."""
    run_command(main, (*BAD_INPUT, ManifestError, RequestError, OSError))


def at_least(least: int) -> Callable[[str], int]:
    """A type of flags: whole numbers from `least` on."""

    def number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, found {text!r}")
        return int(text)

    return number


def add_common_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """Flags of every evaluation, with the published names where there are some."""
    parser.add_argument("--model_name_or_path", default=model, help="local folder or hub name (default: %(default)s)")
    parser.add_argument("--data_root", default="./data", help="folder that the paths in the manifest start from")
    parser.add_argument("--output_dir", help="one folder per run (default: below output/, named after the evaluation)")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="images, and questions, per forward pass")
    parser.add_argument("--num_workers", type=at_least(0), default=0, help="processes that read images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="auto", help="auto: as stored")
    parser.add_argument(
        "--baseline", choices=BASELINES, help="control: images of other cases, whose answers differ, or empty ones"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the exchange (decoding is greedy)")


def add_text_arguments(parser: argparse.ArgumentParser, max_new_tokens: int = 256) -> None:
    """Flags of the evaluations that generate text."""
    parser.add_argument("--max_new_tokens", type=at_least(1), default=max_new_tokens)
    parser.add_argument("--bertscore_model", help="local model folder; BERTScore is left out without one")
    parser.add_argument(
        "--bertscore_layers", type=at_least(1), help="layer to take (default: as BERTScore's authors tuned it)"
    )
    parser.add_argument(
        "--extra_metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a metric of the evaluate library, by hub name or local folder; may be repeated",
    )
