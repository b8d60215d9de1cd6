"""Ask a model about scans, in the terminal.

    python -m med3dvlm.demo --model_name_or_path M --image_path scan.nii.gz --question "Which organ is abnormal?"
    python -m med3dvlm.demo --model_name_or_path M --image_path scan.nii.gz            # a chat
    echo "Which organ is abnormal?" | python -m med3dvlm.demo --model_name_or_path M --image_path scan.nii.gz
    python -m med3dvlm.demo --model_name_or_path M --image_path scans/ --output answers.csv

A scan is whatever `load_volume` reads: NIfTI, DICOM, NRRD, MetaImage, NumPy, a folder of slices, a zip. It goes through
the preprocessing that is stored beside the model. Questions and answers go to standard output; warnings, errors and
progress to standard error.
Exit codes: 0 all answered; 1 a scan, a question or the model could not be used (one line says why); 2 wrong arguments;
130 interrupted; 143 ended by SIGTERM. For research only, not a medical device.
"""

import io
import os
import sys


def main(argv: list[str] | None = None):
    """Do what the arguments ask for; returns an `Outcome`.

    Raises:
        VolumeError, CheckpointError, QuestionError (`BAD_INPUT`), CommandError: what the user can put right.
    """
    from med3dvlm.demo.command import main as command  # here: see `run`

    return command(argv)


def run(argv: list[str] | None = None) -> int:
    """The command: `main` with bad input as one line and an exit code."""
    try:
        _prepare_streams()
        # Loading takes seconds, in which an interrupt should end as quietly as later.
        from med3dvlm.demo.command import USER_ERRORS
        from med3dvlm.demo.terminal import printable, sentence

        try:
            return 1 if main(argv).failed else 0
        except BrokenPipeError:  # whoever read the answers has read enough; what is still in the buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except USER_ERRORS as error:
            print(f"error: {printable(sentence(error))}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _prepare_streams() -> None:
    """Let standard streams be there, where they were closed, and take any character, whatever their encoding."""
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),  # `terminal.readable` makes characters of what is no text
        ("stdout", "w", "backslashreplace"),
        ("stderr", "w", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
