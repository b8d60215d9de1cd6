"""Run one stage of the quickstart as a child process and record what it took in `stages.json`.

    python scripts/lib/stage.py RUN_DIR SEED NAME [COMMAND ARGUMENT...]
    python scripts/lib/stage.py --lock RUN_DIR DESCRIPTOR

Without a command: exit code 0 if the stage is done, 1 if not. A stage recorded with the same command is not run again.
Seconds are wall time; peak memory is that of the process and its children together, looked at five times a second.
SIGINT and SIGTERM are passed to the command, which is also ended when the calling script is gone.

With --lock: lock a file that the calling script has open, until script and stage have ended. Exit code 1 where
another run holds the lock.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ENDINGS = (signal.SIGINT, signal.SIGTERM)


def read_record(file: Path, seed: int) -> dict:
    """The record of a run; a new one where there is none. Exits where the folder holds a run with another seed."""
    if not file.is_file():
        return {"seed": seed, "stages": {}}
    record = json.loads(file.read_text())
    if record["seed"] != seed:
        sys.exit(f"{file.parent} holds a run with seed {record['seed']}; for {seed} name another folder (--output)")
    return record


def write_record(file: Path, record: dict) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, file)


def memory_of_tree(process: psutil.Process) -> int:
    """Bytes that a process and its children hold (what they share is counted once per process)."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:  # it ended between being listed and being asked
            continue
    return total


def lock(folder: str, descriptor: str) -> int:
    try:
        fcntl.flock(int(descriptor), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another run is using {folder}; wait for it, end it, or name another folder (--output)")
    return 0


def run(command: list[str]) -> tuple[int, float, float]:
    """Exit code, seconds and peak megabytes of a command."""
    start, peak, script = time.monotonic(), 0, os.getppid()
    child = subprocess.Popen(command, close_fds=False)  # the file that is locked stays open in it
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # they are waited for below
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            peak = max(peak, memory_of_tree(process))
        except psutil.NoSuchProcess:
            pass  # it has just ended: poll() will say so
        sent = signal.sigtimedwait(ENDINGS, 0.2)
        if sent and sent.si_pid:  # Ctrl-C, which nobody sends, reaches the command by itself
            child.send_signal(sent.si_signo)
        if script not in (None, os.getppid()):
            child.terminate()
            script = None  # once is enough
    return child.returncode, time.monotonic() - start, peak / 2**20


def main() -> int:
    if sys.argv[1] == "--lock":
        return lock(*sys.argv[2:])
    folder, seed, name, *command = sys.argv[1:]
    file = Path(folder) / "stages.json"
    record = read_record(file, int(seed))
    done = record["stages"].get(name)
    if not command:
        return 0 if done else 1
    if done and done["command"] == command:
        print(f"== {name}: done before, in {done['seconds']:.0f} s", flush=True)
        return 0
    print(f"== {name}", flush=True)
    code, seconds, peak = run(command)
    if code:
        print(f"== {name} failed with exit code {code} after {seconds:.0f} s; start again to go on", flush=True)
        return code
    record["stages"][name] = {"seconds": round(seconds, 1), "peak_mb": round(peak), "command": command}
    write_record(file, record)
    print(f"== {name}: {seconds:.0f} s, peak memory {peak:.0f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
