"""How a command ends on bad input, and when it is interrupted."""

import sys
from collections.abc import Callable


def run_command(main: Callable[[], object], bad_input: tuple[type[Exception], ...]) -> None:
    """Run a program: an error of these kinds, which users can put right, ends it with one sentence and exit status 1.

    Other errors are ours, and keep their traceback. Ctrl-C ends it with exit status 130.
    """
    try:
        main()
    except bad_input as error:
        # The message of a loader's process is a traceback, whose last line has the error's own.
        sys.exit(f"error: {str(error).rpartition(f'{type(error).__name__}: ')[2].strip()}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
