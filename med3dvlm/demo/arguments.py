"""The flags of the command."""

import argparse

import med3dvlm.demo
from med3dvlm.data.presets import add_preprocess_arguments, preprocess_config
from med3dvlm.data.volume import add_reading_arguments
from med3dvlm.demo.terminal import readable
from med3dvlm.inference import DTYPES, QUANTIZATIONS, Sampling


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, and `sampling` made of some of them. Leaves with exit code 2 where they are missing or don't fit."""
    parser = argparse.ArgumentParser(
        prog="python -m med3dvlm.demo",
        usage="%(prog)s --model_name_or_path M --image_path SCAN [--question TEXT | --report] [...]; --help lists all",
        description=med3dvlm.demo.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_name_or_path", help="local folder or hub name")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="auto", help="auto: as stored")
    parser.add_argument("--quantization", choices=QUANTIZATIONS[1:], help="int8: any device; 4bit: CUDA, bitsandbytes")

    ask = parser.add_argument_group("what is asked")
    ask.add_argument(
        "--image_path", help="a scan; or many: a folder of scans, or a CSV file with the columns image[, question]"
    )
    ask.add_argument(
        "--question", type=readable, help="one question; without it: a chat, or the lines of standard input"
    )
    ask.add_argument("--report", action="store_true", help="ask for a report instead")
    ask.add_argument(
        "--choices", nargs="+", type=readable, metavar="TEXT", help="answers to choose from: gives their probabilities"
    )
    ask.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy, above it tokens are drawn")
    ask.add_argument("--top_p", type=float, default=1.0, help="draw from the most probable tokens up to this sum")
    ask.add_argument("--seed", type=int, default=0, help="the same seed draws the same answer (default: %(default)s)")
    ask.add_argument("--remember", action="store_true", help="show earlier turns of the chat to the model")

    results = parser.add_argument_group("output")
    results.add_argument("--json", action="store_true", help="one JSON object a line for each answer")
    results.add_argument(
        "--output", help="results of many scans, .jsonl or .csv; started again, only what is missing is done"
    )
    results.add_argument("--batch", action="store_true", help="take a folder for a folder of scans in any case")

    add_preprocess_arguments(parser)
    add_reading_arguments(parser)
    parser.add_argument("--list-series", "--list_series", action="store_true", help="list the DICOM series and stop")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with exit code 2 where flags are missing or contradict each other."""
    if args.image_path == "":
        parser.error("--image_path is empty: name a scan")
    if args.list_series:
        if not args.image_path:
            parser.error("--list-series needs --image_path")
        return
    if not args.model_name_or_path:
        parser.error("the following arguments are required: --model_name_or_path")
    if args.question is not None and args.report:
        parser.error("--question and --report: give one of them")
    if args.question is not None and not args.question.strip():
        parser.error("--question is empty: write one, or leave it out")
    if args.output and not args.output.lower().endswith((".jsonl", ".csv")):
        parser.error(f"--output ends with .jsonl or .csv, not {args.output}")
    if args.max_new_tokens < 1:
        parser.error("--max_new_tokens must be 1 or more")
    try:
        args.sampling = Sampling(args.temperature, args.top_p, args.seed)
        preprocess_config(args)
    except ValueError as error:
        parser.error(str(error))
    choices = {choice.strip() for choice in args.choices or ()}
    if args.choices and (args.report or "" in choices or len(choices) < max(2, len(args.choices))):
        parser.error("--choices takes two or more different texts, and a question")
