"""The quickstart's frame: its arguments, and the record by which an interrupted run goes on."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.commands import ROOT, run_script

STAGE = ROOT / "scripts/lib/stage.py"


@pytest.fixture
def run_stage(tmp_path):
    """Calls stage.py for a run folder, as the quickstart does."""

    def run(name, *command, seed=0):
        arguments = [sys.executable, str(STAGE), str(tmp_path), str(seed), name, *command]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=60)

    return run


def append(file, exit_code=0):
    """A command that leaves a line in a file each time it runs."""
    return [sys.executable, "-c", f"open({str(file)!r}, 'a').write('ran\\n'); raise SystemExit({exit_code})"]


def record(folder):
    return json.loads((folder / "stages.json").read_text())


# ---------------------------------------------------------------- arguments


def test_help_says_what_it_does_and_how_to_call_it(tmp_path):
    done = run_script("scripts/quickstart.sh", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "sh scripts/quickstart.sh [--seed S] [--output DIR]" in done.stdout
    assert "report.html" in done.stdout and "summary.json" in done.stdout
    assert "set -eu" not in done.stdout and "#" not in done.stdout


def test_there_is_no_dry_run(tmp_path):
    done = run_script("scripts/quickstart.sh", cwd=tmp_path, MED3DVLM_DRY_RUN="1")
    assert done.returncode == 1 and "has no dry run" in done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--sed", "1"], "unknown argument --sed"),
    (["output"], "unknown argument output"),
    (["--seed", "one"], "--seed takes a number, not 'one'"),
    (["--seed", "-1"], "--seed takes a number, not '-1'"),
    (["--seed="], "--seed takes a number, not ''"),
    (["--seed"], "--seed needs a number"),
    (["--output"], "--output needs a folder"),
])  # fmt: skip
def test_wrong_arguments_are_named_before_anything_is_done(tmp_path, arguments, message):
    done = run_script("scripts/quickstart.sh", *arguments, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts whose environment is this one, so that nothing is installed."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "requirements-cpu.txt").write_text("")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    def start(*arguments):
        # An installation that was finished: the stamp that setup_venv compares with.
        version = subprocess.run([python, "-V"], capture_output=True, text=True).stdout.strip()
        with open(tmp_path / "requirements-cpu.txt") as file:
            sum_ = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True).stdout.strip()
        (tmp_path / ".venv/.installed-requirements-cpu.txt").write_text(f"{sum_} {version}\n")
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "PYTHONPATH")}
        command = ["sh", str(tmp_path / "scripts/quickstart.sh"), *arguments]
        return subprocess.Popen(command, cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True)  # fmt: skip

    def run(*arguments):
        process = start(*arguments)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    run.start, run.folder = start, tmp_path
    return run


def write_finished(folder, seed):
    folder.mkdir(parents=True)
    stages = {"ask_scan": {"seconds": 1.0, "peak_mb": 10, "command": ["true"]}}  # the last one
    (folder / "stages.json").write_text(json.dumps({"seed": seed, "stages": stages}))


def test_a_finished_run_says_so_and_runs_nothing(checkout):
    output = checkout.folder / "out"
    write_finished(output, seed=2)
    before = (output / "stages.json").read_bytes()
    done = checkout("--seed", "2", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "Finished before" in done.stderr and str(output / "report.html") in done.stderr
    assert [file.name for file in output.iterdir()] == ["stages.json"]
    assert (output / "stages.json").read_bytes() == before


def test_a_finished_run_with_another_seed_is_refused(checkout):
    output = checkout.folder / "out"
    write_finished(output, seed=2)
    done = checkout("--seed=1", "--output", str(output))
    assert done.returncode != 0 and "holds a run with seed 2; for 1 name another folder" in done.stderr
    assert "Finished" not in done.stderr


def test_the_default_folder_is_below_the_checkout(checkout):
    write_finished(checkout.folder / "output/quickstart", seed=0)
    done = checkout()
    assert done.returncode == 0 and str(checkout.folder / "output/quickstart/report.html") in done.stderr


def test_a_stage_that_fails_stops_the_run(checkout):
    """There is no package in this checkout, so the first stage fails."""
    done = checkout("--output", str(checkout.folder / "out"))
    assert done.returncode != 0
    assert "== phantom failed with exit code 1" in done.stdout and "== prepare" not in done.stdout
    assert not (checkout.folder / "out/stages.json").exists()


# ---------------------------------------------------------------- at the same time, and ended

# Says that it has started and, a moment after it was told to end, by what.
PATIENT = """
import os, signal, sys, time
told = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: told.append(signal.Signals(number).name))
open(sys.argv[1], "w").write(str(os.getpid()))
end = time.monotonic() + 30
while not told and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.5)
open(sys.argv[1], "a").write(" " + " ".join(told))
"""


def wait_until(happened, seconds=30):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def text_of(file):
    return file.read_text() if file.exists() else ""


def test_a_second_run_in_the_same_folder_is_refused(checkout):
    output = checkout.folder / "out"
    output.mkdir()
    with open(output / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = checkout("--output", str(output))
    assert done.returncode == 1 and f"another run is using {output}" in done.stderr and "== phantom" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_ends_its_stage_and_holds_the_folder_until_then(checkout, number):
    output, log = checkout.folder / "out", checkout.folder / "log"
    package = checkout.folder / "med3dvlm/data"
    package.mkdir(parents=True)
    (package / "phantom.py").write_text(PATIENT.replace("sys.argv[1]", repr(str(log))))
    first = checkout.start("--output", str(output))
    wait_until(lambda: text_of(log))
    first.send_signal(number)
    first.wait(20)
    with open(output / ".lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    wait_until(lambda: text_of(log).endswith(" SIGTERM"))
    wait_until(lambda: not os.path.exists(f"/proc/{text_of(log).split()[0]}"))
    assert first.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_that_is_told_to_end_passes_it_on_and_waits(tmp_path, number):
    log = tmp_path / "log"
    command = [sys.executable, str(STAGE), str(tmp_path), "0", "clip", sys.executable, "-c", PATIENT, str(log)]
    stage = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: text_of(log))
    stage.send_signal(number)
    _, error = stage.communicate(timeout=20)
    assert log.read_text().endswith(f" {number.name}") and error == b""


# ---------------------------------------------------------------- the record


def test_a_stage_runs_once_and_is_recorded(run_stage, tmp_path):
    command = append(tmp_path / "log")
    first, second = run_stage("clip", *command), run_stage("clip", *command)
    assert first.returncode == second.returncode == 0
    assert (tmp_path / "log").read_text() == "ran\n"
    assert "== clip: done before" in second.stdout
    entry = record(tmp_path)["stages"]["clip"]
    assert record(tmp_path)["seed"] == 0 and entry["command"] == command
    assert entry["seconds"] >= 0 and entry["peak_mb"] >= 0


def test_without_a_command_it_says_whether_the_stage_is_done(run_stage, tmp_path):
    assert run_stage("clip").returncode == 1 and not (tmp_path / "stages.json").exists()
    run_stage("clip", *append(tmp_path / "log"))
    assert run_stage("clip").returncode == 0 and run_stage("lora").returncode == 1
    assert (tmp_path / "log").read_text() == "ran\n"


def test_the_last_stage_of_the_script_is_the_one_that_means_finished():
    """Otherwise a finished run would start again, or an unfinished one would be taken for finished."""
    text = (ROOT / "scripts/quickstart.sh").read_text()
    finished = re.search(r"^if stage (\w+); then", text, re.MULTILINE).group(1)
    names = re.findall(r"^(?:python_stage|stage|train_vlm|evaluate_\w+|ask) (\w+)", text, re.MULTILINE)
    assert len(names) > 10 and names[-1] == finished


def test_another_command_under_the_same_name_runs(run_stage, tmp_path):
    run_stage("clip", *append(tmp_path / "log"))
    run_stage("clip", *append(tmp_path / "log"), "--more")
    assert (tmp_path / "log").read_text() == "ran\n" * 2
    assert record(tmp_path)["stages"]["clip"]["command"][-1] == "--more"


def test_a_failure_passes_its_exit_code_on_and_is_not_recorded(run_stage, tmp_path):
    run_stage("first", *append(tmp_path / "log"))
    failed = run_stage("second", *append(tmp_path / "log", exit_code=3))
    assert failed.returncode == 3 and "== second failed with exit code 3" in failed.stdout
    assert "start again to go on" in failed.stdout
    assert set(record(tmp_path)["stages"]) == {"first"}
    run_stage("second", *append(tmp_path / "log"))
    assert set(record(tmp_path)["stages"]) == {"first", "second"}
    assert (tmp_path / "log").read_text() == "ran\n" * 3


def test_a_killed_stage_fails(run_stage, tmp_path):
    done = run_stage("clip", sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode != 0 and not (tmp_path / "stages.json").exists()


def test_another_seed_is_refused(run_stage, tmp_path):
    run_stage("clip", *append(tmp_path / "log"), seed=1)
    refused = run_stage("lora", *append(tmp_path / "log"), seed=2)
    assert refused.returncode == 1
    assert f"{tmp_path} holds a run with seed 1; for 2 name another folder (--output)" in refused.stderr
    assert (tmp_path / "log").read_text() == "ran\n" and set(record(tmp_path)["stages"]) == {"clip"}


def test_memory_of_children_counts(run_stage, tmp_path):
    """A parent that only waits, and a child with 200 MB for a second."""
    child = "import time; held = bytearray(200 * 2**20); held[::4096] = b'1' * len(held[::4096]); time.sleep(1)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    assert run_stage("big", *command).returncode == 0
    assert record(tmp_path)["stages"]["big"]["peak_mb"] > 200


def test_the_record_is_replaced_as_a_whole(run_stage, tmp_path):
    run_stage("clip", *append(tmp_path / "log"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "stages.json"]
