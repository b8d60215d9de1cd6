"""What the tests of launchers and documents share: running the project's commands and asking them for their flags."""

import functools
import importlib
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_script(script, *arguments, cwd, timeout: float = 120, **variables) -> subprocess.CompletedProcess:
    """Run `sh <script> <arguments>` in `cwd`, with this Python as the active environment; timeout in seconds."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "NPROC", "HOSTFILE", "NNODES")}
    environment |= {"VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""} | variables
    command = ["sh", str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def dry_run(script, *arguments, cwd, **variables) -> list[str]:
    """The command that a launcher would run, as a list of arguments."""
    done = run_script(script, *arguments, cwd=cwd, MED3DVLM_DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@functools.cache
def flags_of(target: str, *subcommand: str) -> frozenset[str]:
    """The flags that a module ("med3dvlm.demo") or a script ("utls/rename_csv.py") shows with --help.

    The module is asked in this process, because starting Python and torch once for each of them takes a minute.
    """
    text = StringIO()
    try:
        with redirect_stdout(text):
            if target.endswith(".py"):
                runpy.run_path(str(ROOT / target))["main"]([*subcommand, "--help"])
            else:
                importlib.import_module(target).main([*subcommand, "--help"])
    except SystemExit as stop:
        assert not stop.code, f"{target} --help ended with {stop.code}"
    return frozenset(re.findall(r"(?<![\w-])--[A-Za-z]\w*(?:-\w+)*", text.getvalue()))


def flags_in(arguments: list[str]) -> list[str]:
    """The flags among the arguments of a command."""
    return [argument.split("=")[0] for argument in arguments if re.match(r"--[A-Za-z]", argument)]
