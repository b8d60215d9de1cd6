"""Preparation under bad circumstances: killed, interrupted, full disk, dying workers, shards, other options."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from med3dvlm.data import fast_slices, prepare, work
from med3dvlm.data.ledger import Ledger, read_ledgers
from med3dvlm.data.volume import load_volume
from med3dvlm.data.workers import Death
from tests.helpers.tiny_data import write_slices

SIZE = ("--size", "8", "16", "16", "--dtype", "uint8")


@pytest.fixture
def raw(tmp_path):
    """Six cases with two series each."""
    rng = np.random.default_rng(0)
    for case in range(6):
        folder = tmp_path / "raw" / "ct_case" / f"{case:06d}"
        for series in ("Axial", "Coronal"):
            write_slices(folder / series, rng.integers(0, 255, (5, 20, 30), dtype=np.uint8))
        (folder / "text.txt").write_text(f"study_findings: Finding number {case}.")
    return tmp_path / "raw"


def run(raw, out, *options):
    workers = () if "--num_workers" in options else ("--num_workers", "1")
    return prepare.main(["--input_dir", str(raw), "--output_dir", str(out), *SIZE, *workers, *options])


def results(out) -> dict[str, bytes]:
    """The prepared volumes and texts."""
    files = (*out.rglob("*.nii.gz"), *out.rglob("text.txt"))
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def statuses(out) -> list[str]:
    return [json.loads(line)["status"] for line in (out / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3])
def test_killed_at_any_moment_and_started_again(raw, tmp_path, workers, delay):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "med3dvlm.data.prepare", "--input_dir", str(raw), "--output_dir", str(out), *SIZE]
    process = subprocess.Popen([*command, "--num_workers", workers], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out / "ledger.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (out / "ct_case/000003").mkdir(parents=True, exist_ok=True)
    (out / "ct_case/000003/.Axial.nii.gz.abc.partial").write_bytes(b"half")
    (out / ".M3D_Cap.json.abc.partial").write_bytes(b"half")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.nii.gz")}
    assert run(raw, out) == 0
    assert run(raw, tmp_path / "undisturbed") == 0
    assert results(out) == results(tmp_path / "undisturbed") and len(results(out)) == 18
    assert not list(out.rglob("*.partial"))
    again = [file for file, at in before.items() if file.stat().st_mtime_ns != at]
    assert len(again) <= int(workers)  # only what was missing is done, and what a worker had not yet entered
    assert (out / "M3D_Cap.json").read_text().replace("out/", "undisturbed/") == (
        tmp_path / "undisturbed/M3D_Cap.json"
    ).read_text()


def test_a_second_run_skips_and_says_so(raw, tmp_path, capsys):
    run(raw, tmp_path / "out")
    assert run(raw, tmp_path / "out") == 0
    assert statuses(tmp_path / "out") == ["done"] * 12 + ["skipped"] * 12
    assert "0 volumes written, 12 were finished before" in capsys.readouterr().out


def test_ctrl_c_ends_cleanly_and_the_next_run_goes_on(raw, tmp_path, monkeypatch, capsys):
    real, calls = work.write_prepared, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(work, "write_prepared", interrupted)
    assert run(raw, tmp_path / "out") == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(raw, tmp_path / "out") == 0
    assert "9 volumes written, 3 were finished before" in capsys.readouterr().out


def test_a_full_disk_ends_the_run_and_nothing_has_a_final_name(raw, tmp_path, monkeypatch, capsys):
    real, calls = os.replace, []

    def full(source, target):
        if str(target).endswith(".nii.gz"):
            calls.append(target)
            if len(calls) > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run(raw, tmp_path / "out") == 1
    assert "is full" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 3 and not list((tmp_path / "out").rglob("*.partial"))
    lines = [json.loads(line) for line in (tmp_path / "out/ledger.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done"] * 3 + ["failed"]  # the others were not tried
    assert "No space left" in lines[-1]["reason"]
    assert run(raw, tmp_path / "out") == 0 and len(results(tmp_path / "out")) == 18


class DyingWorker(work.CaseWorker):
    """Its process dies of the series Axial of case 2, as if memory had run out."""

    def _prepared(self, item, reading):
        if "000002/Axial" in str(item.path):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._prepared(item, reading)


def test_a_killed_worker_costs_its_volume_only(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "CaseWorker", DyingWorker)
    assert run(raw, tmp_path / "out", "--num_workers", "2") == 1
    error = capsys.readouterr().err
    assert "1 could not be prepared" in error and "000002/Axial" in error and "SIGKILL" in error
    latest = read_ledgers(tmp_path / "out")
    failed = [volume for volume, line in latest.items() if line["status"] == "failed"]
    assert failed == ["ct_case/000002/Axial.nii.gz"] and len(latest) == 12
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 11
    manifest = json.loads((tmp_path / "out/M3D_Cap.json").read_text())
    images = [entry["image"] for entries in manifest.values() for entry in entries]
    assert len(images) == 11 and "out/ct_case/000002/Axial.nii.gz" not in images


def test_a_death_before_any_volume_is_a_failure_of_the_case(raw, tmp_path, monkeypatch, capsys):
    def deadly(make, tasks, count):
        for task in tasks:
            yield task, Death(0, "its process was ended by SIGKILL")

    monkeypatch.setattr(prepare, "run_tasks", deadly)
    assert run(raw, tmp_path / "out") == 1
    assert "6 could not be prepared" in capsys.readouterr().err


@pytest.mark.parametrize("shards", [("0/2", "1/2"), ("1/2", "2/2")])
def test_shards_share_the_work_and_the_last_one_lists_all(raw, tmp_path, shards):
    run(raw, tmp_path / "whole")
    for shard in shards:
        assert run(raw, tmp_path / "out", "--shard", shard) == 0
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    ledgers = sorted((tmp_path / "out").glob("ledger-*of2.jsonl"))
    assert [len(file.read_text().splitlines()) for file in ledgers] == [6, 6]
    for name in ("M3D_Cap.json", "preparation.json"):
        text = (tmp_path / "whole" / name).read_text().replace("whole/", "out/")
        assert (tmp_path / "out" / name).read_text() == text


def test_limit_takes_the_first_cases_and_the_rest_can_follow(raw, tmp_path):
    assert run(raw, tmp_path / "out", "--limit", "2") == 0
    assert sorted(p.name for p in (tmp_path / "out/ct_case").iterdir()) == ["000000", "000001"]
    assert run(raw, tmp_path / "out") == 0 and len(results(tmp_path / "out")) == 18


def test_a_dry_run_counts_and_writes_nothing(raw, tmp_path, capsys):
    run(raw, tmp_path / "out", "--limit", "1")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run(raw, tmp_path / "out", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "m3d" in said and "6 of 6, 6 with a report" in said and "2 finished" in said and "10 to prepare" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_volume_that_a_kill_kept_out_of_the_ledger_is_done_again(raw, tmp_path, capsys):
    """Its file has its final name; what the profile wants to know of it was lost."""
    out = tmp_path / "out"
    run(raw, out)
    before, recorded = results(out), (out / "preparation.json").read_text()
    ledger = out / "ledger.jsonl"
    lost = "ct_case/000000/Axial.nii.gz"
    kept = [line for line in ledger.read_text().splitlines() if json.loads(line)["volume"] != lost]
    ledger.write_text("\n".join(kept) + "\n")
    capsys.readouterr()
    assert run(raw, out) == 0
    assert "1 volumes written, 11 were finished before" in capsys.readouterr().out
    assert results(out) == before and (out / "preparation.json").read_text() == recorded


@pytest.mark.parametrize("options", [("--dtype", "float16"), ("--size", "4", "8", "8"), ("--preset", "mr"),
                                     ("--no_crop",), ("--flip", "D")])  # fmt: skip
def test_results_of_other_options_are_done_again(raw, tmp_path, capsys, options):
    out = tmp_path / "out"
    run(raw, out)
    old = results(out)
    capsys.readouterr()
    assert run(raw, out, *options) == 0
    assert "12 volumes written, 0 were finished before" in capsys.readouterr().out
    assert run(raw, out, *options) == 0
    assert "0 volumes written, 12 were finished before" in capsys.readouterr().out
    assert all(data != old[name] for name, data in results(out).items() if name.endswith(".gz"))
    recorded = json.loads((out / "preparation.json").read_text())
    assert recorded["reading"] == ({"flip": "D"} if "--flip" in options else {})
    assert run(raw, out) == 0 and results(out) == old


def test_flip_reverses_an_axis(raw, tmp_path):
    run(raw, tmp_path / "out")
    run(raw, tmp_path / "flipped", "--flip", "D")
    name = "ct_case/000000/Axial.nii.gz"
    one, other = (load_volume(tmp_path / folder / name).array for folder in ("out", "flipped"))
    assert np.abs(one - other[::-1]).max() <= 1 / 255 + 1e-6


def test_a_second_run_at_the_same_time_is_refused(raw, tmp_path, capsys):
    with Ledger(tmp_path / "out/ledger.jsonl"):
        assert run(raw, tmp_path / "out") == 1
    assert "another preparation" in capsys.readouterr().err


def test_results_do_not_depend_on_the_memory_for_slices(raw, tmp_path, monkeypatch):
    run(raw, tmp_path / "out")
    small = fast_slices.SlicePreparer((8, 16, 16), memory=700)  # one of five slices is kept
    for series in ("Axial", "Coronal"):
        stored = load_volume(tmp_path / f"out/ct_case/000001/{series}.nii.gz").array
        assert np.array_equal(np.rint(stored * 255), small(raw / f"ct_case/000001/{series}").array)


@pytest.mark.parametrize("arguments, message", [
    (("--shard", "3/2"), "expected i/n"), (("--shard", "2"), "expected i/n"), (("--split", "1", "1", "1"), "sum 1"),
    (("--limit", "0"), "at least 1"), (("--size", "0", "8", "8"), "positive"), (("--columns", "image"), "NAME=COLUMN"),
    (("--key_file", "out/key", "--output_dir", "out"), "outside the output"),
    (("--preset", "ct_lung", "--window", "1", "2"), "--window"),
])  # fmt: skip
def test_arguments_that_make_no_sense(capsys, arguments, message):
    with pytest.raises(SystemExit):
        prepare.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_the_help_names_every_source(capsys):
    with pytest.raises(SystemExit):
        prepare.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("m3d", "ct-rate", "amos-mm", "list", "volumes"))
