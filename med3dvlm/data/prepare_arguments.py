"""The command line of `med3dvlm.data.prepare`."""

import argparse
from pathlib import Path

from med3dvlm.data.presets import PUBLISHED_SIZE, PreprocessConfig, add_preprocess_arguments, preprocess_config
from med3dvlm.data.sources import SOURCES
from med3dvlm.data.volume import PREPARED_ERROR, add_reading_arguments

DEFAULT_INPUTS = ("data/M3D-Cap", "data/M3D_Cap")
DEFAULT_OUTPUT = "data/M3D_Cap_npy"


PURPOSE = "Prepare a data set: volumes of any form become small NIfTI files, with reports and a manifest."


def parse_arguments(argv=None, purpose: str = PURPOSE) -> argparse.Namespace:
    """Parse and check; `config`, the pipeline, is added to what was given. purpose: the first line of --help."""
    parser = argparse.ArgumentParser(description=purpose)
    inputs = f"data set, folder or list (default: {' or '.join(DEFAULT_INPUTS)})"
    parser.add_argument("--input_dir", "--input", help=inputs)
    parser.add_argument("--output_dir", default=DEFAULT_OUTPUT, help="the prepared tree (default: %(default)s)")
    source = "form of the input (default: it is recognised)"
    parser.add_argument("--source", choices=["auto", *SOURCES], default="auto", help=source)
    size = "size of the prepared volumes (default: 128 256 256)"
    parser.add_argument("--size", type=int, nargs=3, default=PUBLISHED_SIZE, metavar=("D", "H", "W"), help=size)
    dtype = "stored type (default: %(default)s); uint8 takes a quarter of the space or less"
    parser.add_argument("--dtype", choices=sorted(PREPARED_ERROR), default="float32", help=dtype)
    parser.add_argument("--num_workers", type=int, help="processes (default: all CPU cores)")
    parser.add_argument("--limit", type=int, help="only the first so many cases")
    shard = "this run is number i of n that share the work, for cluster arrays; i from 0 or from 1"
    parser.add_argument("--shard", type=_shard, metavar="i/n", help=shard)
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, write nothing")
    split = "shares of the splits where the source has none; a patient is never divided (default: %(default)s)"
    parser.add_argument("--split", type=float, nargs=3, default=(0.8, 0.1, 0.1), metavar=("TRAIN", "VAL", "TEST"),
                        help=split)  # fmt: skip
    parser.add_argument("--download", metavar="REPO_ID", help="fetch this data set repository into --input_dir first")
    parser.add_argument("--questions", type=Path, help="with CT-RATE: 3D-RAD's folder, or one of its tables")
    reports = "with DICOM: a table of reports, with the columns AccessionNumber and report"
    parser.add_argument("--reports", type=Path, help=reports)
    columns = "what the columns of a list, or of --reports, are called, for example image=Path text=Befund"
    parser.add_argument("--columns", nargs="+", action="extend", type=_column, default=[], metavar="NAME=COLUMN",
                        help=columns)  # fmt: skip
    key = "secret behind the names of DICOM cases, made where there is none (default: <output_dir>.key)"
    parser.add_argument("--key_file", type=Path, help=key)
    parser.add_argument("--hash_ids", action="store_true", help="hash the names of cases that are no DICOM as well")
    mapping = "also write which case stands for which files; keep it as you keep the key"
    parser.add_argument("--mapping_file", type=Path, help=mapping)
    add_preprocess_arguments(parser)
    add_reading_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.input_dir is None:
        arguments.input_dir = next((d for d in DEFAULT_INPUTS if Path(d).is_dir()), DEFAULT_INPUTS[0])
    if min(arguments.size) < 1:
        parser.error(f"--size takes three positive numbers, not {arguments.size}")
    if min(arguments.split) < 0 or abs(sum(arguments.split) - 1) > 1e-6:
        parser.error(f"--split takes three shares with the sum 1, not {arguments.split}")
    if any(number is not None and number < 1 for number in (arguments.num_workers, arguments.limit)):
        parser.error("--num_workers and --limit are at least 1")
    output = Path(arguments.output_dir).resolve()
    arguments.key_file = arguments.key_file or output.with_name(f"{output.name}.key")
    for flag in ("key_file", "mapping_file"):
        file = getattr(arguments, flag)
        if file is not None and file.resolve().is_relative_to(output):
            parser.error(f"--{flag} has to lie outside the output: who gets the data must not get it")
    try:
        arguments.config = preprocess_config(arguments, PreprocessConfig(size=tuple(arguments.size)))
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(count) > 0 and int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected i/n, such as 3/8, not {text!r}")
    return int(index), int(count)


def _column(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise argparse.ArgumentTypeError(f"expected NAME=COLUMN, not {text!r}")
    return name, column
