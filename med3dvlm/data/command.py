"""How a command ends: on bad input, and when it is told to end."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

TERMINATED = 128 + signal.SIGTERM  # the exit code that shells give a program that SIGTERM ended


def run_command(main: Callable[[], Any], bad_input: tuple[type[Exception], ...] = ()) -> Any:
    """Run a program and return what it returns.

    An error of these kinds, which users can put right, ends it with one sentence and exit status 1; others are ours,
    and keep their traceback. Ctrl-C ends it with exit status 130, SIGTERM and a closed terminal as `end_tidily` says.
    """
    end_tidily()
    try:
        return main()
    except bad_input as error:
        # The message of a loader's process is a traceback, whose last line has the error's own.
        sys.exit(f"error: {str(error).rpartition(f'{type(error).__name__}: ')[2].strip()}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def end_tidily() -> None:
    """Let SIGTERM and SIGHUP end this process as `sys.exit` does: its temporary folders, which hold scans, are removed.

    A signal that somebody chose to ignore (nohup) stays ignored. Called in the main thread.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return  # one of several that train waits for the others in native code, where it would not notice
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit)


def _exit(number: int, _) -> None:
    for other in (signal.SIGTERM, signal.SIGHUP):  # they often come twice, and the second must not stop the tidying up
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)
