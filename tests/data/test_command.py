"""Commands that are told to end leave no scan in the folder for temporary files."""

import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from med3dvlm.data.command import run_command
from tests.helpers.commands import ROOT
from tests.helpers.tiny_data import write_slices

# Reading what a zip holds takes a minute, here and in the workers, which import this file as their main module.
SLOW = """
import runpy, signal, sys, time
from med3dvlm.data import readers
from med3dvlm.data.readers import dicom

readers._decode_folder = dicom.looks_like_dicom = lambda *_: time.sleep(60)
if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup or in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__")
"""
COMMANDS = {
    "volume": ("med3dvlm.data.volume", "in/a.zip"),
    "prepare": ("med3dvlm.data.prepare", "--input_dir", "in", "--output_dir", "out", "--num_workers", "1"),
    "workers": ("med3dvlm.data.prepare", "--input_dir", "in", "--output_dir", "out", "--num_workers", "2"),
    "demo": ("med3dvlm.demo", "--image_path", "in/a.zip", "--list-series"),
}


def unpacked_in(folder) -> list:
    return list((folder / "tmp").glob("med3dvlm-*"))


@pytest.fixture
def reading(tmp_path):
    """Starts a command, and waits until it reads the contents of a zip. Ends it where a test fails."""
    temporary, started = tmp_path / "tmp", []
    for folder in (temporary, tmp_path / "in"):
        folder.mkdir()
    for name in ("a", "b"):
        with zipfile.ZipFile(tmp_path / f"in/{name}.zip", "w") as archive:
            archive.writestr(f"Doe_Jane/Doe_Jane_1970_{name}.nii", bytes(1000))
    (tmp_path / "slow.py").write_text(SLOW)

    def start(name, count=1):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
        command = [sys.executable, str(tmp_path / "slow.py"), *COMMANDS[name]]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
        started.append(process)
        wait_until(lambda: sum(any(folder.iterdir()) for folder in unpacked_in(tmp_path)) == count)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # as it should be
        process.wait()


def wait_until(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_removes_what_it_unpacked(reading, tmp_path, number):
    process = reading("volume")
    process.send_signal(number)
    assert process.wait(60) == 128 + number and not unpacked_in(tmp_path)


@pytest.mark.parametrize("name", ["prepare", "workers", pytest.param("demo", marks=pytest.mark.slow)])
def test_so_do_the_other_commands_that_unpack_scans(reading, tmp_path, name):
    process = reading(name, 2 if name == "workers" else 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and not unpacked_in(tmp_path)


@pytest.mark.slow
def test_the_whole_group_is_told_to_end(reading, tmp_path):
    """As by a scheduler; workers hear of it twice."""
    process = reading("workers", 2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143 and not unpacked_in(tmp_path)


def test_workers_end_when_their_parent_is_gone(reading, tmp_path):
    process = reading("workers", 2)
    process.kill()
    process.wait()
    wait_until(lambda: not unpacked_in(tmp_path))


def test_an_interrupt_ends_the_workers_at_once(reading, tmp_path):
    process = reading("workers", 2)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130 and time.monotonic() - start < 25
    assert not unpacked_in(tmp_path)


def test_killed_outright_it_leaves_no_name(reading, tmp_path):
    process = reading("volume")
    process.kill()
    process.wait()
    [folder] = unpacked_in(tmp_path)
    assert [path.name for path in folder.rglob("*")] == ["1.nii"]


def test_a_signal_that_is_ignored_stays_ignored():
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        assert run_command(lambda: signal.getsignal(signal.SIGHUP)) == signal.SIG_IGN
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_an_archive_of_several_files_keeps_their_names(tmp_path):
    """Slices go by them, and headers refer to them."""
    from med3dvlm.data.readers.archive import unpacked

    write_slices(tmp_path / "slices", np.zeros((3, 4, 5), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in (tmp_path / "slices").iterdir():
            archive.write(file, file.name)
    with unpacked(tmp_path / "a.zip", 1000) as folder:
        assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "slices").iterdir()}
