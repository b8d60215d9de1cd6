"""Preparing and loading volumes, timed against the plain formulations: `sh scripts/benchmark.sh data`."""

import argparse
import os
import subprocess
import sys

from med3dvlm.benchmark import loading, preparation
from med3dvlm.benchmark.timing import machine


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--cases", type=int, default=3, help="raw cases to prepare (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions (default: %(default)s)")
    parser.add_argument("--only", choices=("preparation", "loading"), help="one of the parts (default: both)")
    arguments = parser.parse_args(argv)
    if min(arguments.cases, arguments.repeats) < 1:
        parser.error("--cases and --repeats are at least 1")
    return arguments


def preparation_report(cases: int, repeats: int) -> str:
    """The report of `med3dvlm.benchmark.preparation`, from a process of its own without GLIBC_TUNABLES.

    The launchers of training set that variable, and `scripts/benchmark.sh` with them; a preparation runs without it.
    It would speed up the plain way, by reusing its large buffers.
    """
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", preparation.__name__, "--cases", str(cases), "--repeats", str(repeats)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(argv=None) -> int:
    """The command line; prints Markdown."""
    arguments = parse_arguments(argv)
    print(machine(), flush=True)
    if arguments.only != "loading":
        print(f"\n{preparation_report(arguments.cases, arguments.repeats)}", flush=True)
    if arguments.only != "preparation":
        print(f"\n{loading.report(arguments)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
