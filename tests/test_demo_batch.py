"""Many scans: a folder or a table, written row by row, killed and resumed."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from med3dvlm import demo
from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.demo.batch import scans_in
from med3dvlm.demo.output import COLUMNS, CommandError, ResultFile
from tests.helpers.commands import ROOT
from tests.helpers.tiny_data import write_prepared_tree, write_table
from tests.helpers.tiny_model import TINY_SIZE, write_tiny_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm"))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder with three scans (one of them broken) and things that are none."""
    root = write_prepared_tree(tmp_path_factory.mktemp("data"), cases=2, size=TINY_SIZE)
    folder = root / "M3D_Cap_npy" / "ct_case"
    (folder / "000000b").mkdir()
    (folder / "000000b" / "broken.nii.gz").write_bytes(b"no")
    (folder / "notes.md").write_text("none of the scans")
    return folder


NAMES = ["000000/Axial_C.nii.gz", "000000b/broken.nii.gz", "000001/Coronal_C.nii.gz"]


def arguments(model, path, *more):
    return ["--model_name_or_path", model, "--image_path", str(path), "--max_new_tokens", "5", "--device", "cpu",
            *map(str, more)]  # fmt: skip


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_folder_to_json_lines_passes_over_a_bad_scan(model, scans, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    assert demo.run(arguments(model, scans, "--question", "Where?", "--output", output)) == 1
    rows = read_lines(output)
    assert [row["image"] for row in rows] == NAMES
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert "broken.nii.gz" in rows[1]["error"] and rows[1]["answer"] is None
    assert rows[0]["answer"] == demo.main(arguments(model, scans / NAMES[0], "--question", "Where?")).answers[0].text
    assert all(row["question"] == "Where?" and "research only" in row["notice"] for row in rows)
    assert "2 of 3 answered" in capsys.readouterr().err


def test_table_to_csv(model, scans, tmp_path):
    table = write_table(
        tmp_path / "scans.csv",
        [
            [scans / NAMES[0], "Which plane?"],
            [os.path.relpath(scans / NAMES[2], tmp_path), ""],
            ["nowhere.nii", "Why?"],
        ],
        ("Image", "question"),
    )
    output = tmp_path / "answers.csv"
    choices = ("--choices", "axial", "coronal, oblique")
    assert demo.run(arguments(model, table, "--question", "Where?", "--output", output, *choices)) == 1
    rows = list(csv.DictReader(output.open(newline="")))
    assert tuple(rows[0]) == COLUMNS
    assert [row["question"] for row in rows] == ["Which plane?", "Where?", "Why?"]
    probabilities = json.loads(rows[0]["probabilities"])
    assert max(probabilities, key=probabilities.get) == rows[0]["answer"]
    assert "nowhere.nii: no such file" in rows[2]["error"]


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("image;question\n{0};Why?\n;Where?\n", "Why?"),  # as Excel writes it where the comma is the decimal mark
        ("Image Path, Question\n{0}, Why?\n,Where?\n", "Why?"),  # the names of M3D
        ("image\n{0}\n", "Describe the findings of this scan."),
    ],
)
def test_tables_as_people_write_them(model, scans, tmp_path, capsys, text, question):
    """A row without a scan is an error of its own: an empty path would be the table's own folder."""
    (tmp_path / "scans.csv").write_text(text.format(scans / NAMES[0]))
    shutil.copy(scans / NAMES[0], tmp_path / "only.nii.gz")
    assert demo.run(arguments(model, tmp_path / "scans.csv")) == ("Where?" in text)
    first, *empty = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["question"] == question and first["error"] is None
    assert all("names no scan" in row["error"] for row in empty)


def test_a_report_is_asked_for_whatever_the_table_asks(model, scans, tmp_path, capsys):
    table = write_table(tmp_path / "scans.csv", [[scans / NAMES[0], "Which plane?"]], ("image", "question"))
    assert demo.run(arguments(model, table, "--report")) == 0
    assert json.loads(capsys.readouterr().out)["question"] == CAPTION_PROMPTS[0]
    assert demo.run(arguments(model, table, "--choices", "axial", "coronal")) == 0
    write_table(table, [[scans / NAMES[0]]], ("image",))
    assert demo.run(arguments(model, table, "--choices", "axial", "coronal")) == 1
    assert "--choices needs a question" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_names_of_any_bytes(model, scans, tmp_path, capsys, ending):
    folder, output = tmp_path / "scans", tmp_path / f"answers.{ending}"
    folder.mkdir()
    for name in ("no\udcfftext.nii.gz", 'a "b",\nc.nii.gz', "-dash.nii.gz"):
        try:
            shutil.copy(scans / NAMES[0], folder / name)
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    command = arguments(model, folder, "--question", "Where?", "--output", output)
    assert demo.run(command) == 0
    whole = output.read_bytes()
    rows = read_lines(output) if ending == "jsonl" else list(csv.DictReader(output.open(encoding="utf-8", newline="")))
    names = [row["image"] for row in rows]
    assert names == ["-dash.nii.gz", 'a "b",\nc.nii.gz', "no\N{REPLACEMENT CHARACTER}text.nii.gz"]
    assert demo.run(command) == 0 and output.read_bytes() == whole


def test_without_output_rows_are_printed(model, scans, capsys):
    assert demo.run(arguments(model, scans)) == 1
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["image"] for row in rows] == NAMES and all(list(row) == [*COLUMNS, "seconds"] for row in rows)
    assert rows[0]["preprocessing"]["preset"] == "published"
    log = printed.err.splitlines()
    assert log[0] == f"1 of 3: {NAMES[0]}" and log[1].startswith(f"2 of 3: {NAMES[1]}: error: ") and len(log) == 4


def test_a_second_start_does_what_is_missing_only(model, scans, tmp_path, monkeypatch):
    for name in ("answers.jsonl", "answers.csv"):
        output = tmp_path / name
        command = arguments(model, scans, "--question", "Where?", "--output", output)
        assert demo.run(command) == 1
        whole = output.read_bytes()
        lines = whole.splitlines(keepends=True)
        output.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # as if killed while the last row was written
        assert demo.run(command) == 1
        assert output.read_bytes() == whole
        with monkeypatch.context() as patch:
            patch.setattr("med3dvlm.demo.command.load", lambda _: pytest.fail("nothing is left to do"))
            assert demo.run(command) == 1
        assert output.read_bytes() == whole


def test_another_question_is_added_and_counted_by_itself(model, scans, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    for question, rows in (("Where?", 3), ("Why?", 6), ("Where?", 6)):
        assert demo.run(arguments(model, scans, "--question", question, "--output", output)) == 1
        assert "2 of 3 answered" in capsys.readouterr().err and len(read_lines(output)) == rows
    table = write_table(tmp_path / "good.csv", [[scans / NAMES[0]]], ("image",))
    assert demo.run(arguments(model, table, "--question", "Where?", "--output", tmp_path / "good.jsonl")) == 0


def test_another_model_in_the_same_folder_is_another_model(scans, tmp_path, capsys):
    output, folder = tmp_path / "answers.jsonl", tmp_path / "vlm"
    write_tiny_vlm(folder)
    command = arguments(str(folder), scans / "000001", "--output", output)
    assert demo.run(command) == demo.run(command) == 0
    whole = output.read_bytes()
    write_tiny_vlm(folder, seed=1)
    assert demo.run(command) == 1
    assert "comes from a run with another model" in capsys.readouterr().err and output.read_bytes() == whole


def test_killed_and_resumed_equals_undisturbed(model, scans, tmp_path):
    table = write_table(
        tmp_path / "scans.csv",
        [[scans / NAMES[i % 3], f"Question {i // 2}?"] for i in range(30)],  # some stand there twice
        ("image", "question"),
    )
    command = arguments(model, table, "--max_new_tokens", "40", "--temperature", "1", "--output")
    output, undisturbed = tmp_path / "answers.jsonl", tmp_path / "undisturbed.jsonl"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "med3dvlm.demo", *command, str(output)], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and (not output.exists() or output.read_bytes().count(b"\n") < 4)
    ):
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= output.read_bytes().count(b"\n") < 30
    assert demo.run([*command, str(output)]) == demo.run([*command, str(undisturbed)]) == 1
    assert output.read_bytes() == undisturbed.read_bytes()


def test_a_file_of_another_run_is_left_alone(model, scans, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    command = arguments(model, scans / "000001", "--output", output)
    assert demo.run(command) == 0
    whole = output.read_bytes()
    assert demo.run([*command, "--seed", "1", "--question", "Where?"]) == 1
    assert "comes from a run with another seed" in capsys.readouterr().err
    (tmp_path / "notes.csv").write_text("mine\n")
    assert demo.run(arguments(model, scans, "--output", tmp_path / "notes.csv")) == 1
    assert "no run to go on with" in capsys.readouterr().err
    assert output.read_bytes() == whole and (tmp_path / "notes.csv").read_text() == "mine\n"


@pytest.mark.parametrize("text", ["\ufeffImage;Question\nscan;Why?\n", "image,question\nscan,Why?\n"])
def test_a_file_that_another_program_rewrote_is_left_alone(model, scans, tmp_path, capsys, text):
    output = tmp_path / "answers.csv"
    command = arguments(model, scans / "000001", "--output", output)
    assert demo.run(command) == 0
    output.write_text(text, encoding="utf-8")
    assert demo.run(command) == 1
    assert "answers.csv: lacks columns" in capsys.readouterr().err and output.read_text(encoding="utf-8") == text


def test_an_output_that_cannot_be_written(model, scans, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo.run(arguments(model, scans / "000001", "--output", tmp_path / "file" / "answers.csv")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'file' / 'answers.csv'} cannot be written: ")
    assert "partial" not in error and error.count("\n") == 1


def test_two_runs_at_a_time_do_not_share_a_file(model, scans, tmp_path, capsys):
    output = tmp_path / "new folder" / "answers.csv"
    with ResultFile(output, {"seed": 0}):
        before = output.read_bytes()
        assert demo.run(arguments(model, scans / "000001", "--output", output)) == 1
        assert f"another run writes {output}" in capsys.readouterr().err and output.read_bytes() == before
    with ResultFile(output, {"seed": 0}) as results:
        assert not results.done


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_cut_anywhere_is_completed(tmp_path, ending):
    rows = [dict.fromkeys(COLUMNS) | {"image": f"scan {i}", "question": 'a "quoted"\nline, µ\u2028', "answer": answer}
            for i, answer in enumerate(["one\nline, \"two\"", "", "three\r\n"])]  # fmt: skip
    rows[1]["error"] = "broken"
    path = tmp_path / f"rows.{ending}"

    def append_missing():
        with ResultFile(path, {"seed": 0}) as results:
            for row in rows:
                if not results.done[row["image"], row["question"]]:
                    results.append(row)
            return results.failed.total()

    assert append_missing() == 1
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert append_missing() == 1
        assert path.read_bytes() == whole, cut
    path.write_bytes(b"{no json}\n" + whole)
    if ending == "jsonl":
        with pytest.raises(CommandError, match="not readable"):
            append_missing()


@pytest.mark.parametrize(
    ("text", "message"), [("scan,question\na,b\n", "lacks the column image"), ("image\n", "no rows"), ("", "no rows")]
)
def test_tables_that_cannot_be_used(model, tmp_path, capsys, text, message):
    (tmp_path / "scans.csv").write_text(text)
    assert demo.run(arguments(model, tmp_path / "scans.csv")) == 1
    assert message in capsys.readouterr().err


def test_what_is_a_scan_in_a_folder(scans, tmp_path):
    """DICOM files or slices directly in a folder make it one scan; pairs and hidden files count once or not at all."""
    shutil.copytree(scans, tmp_path / "nifti")
    for name in ("patient/series 1/1", "patient/series 2/1.dcm"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(get_testdata_file("CT_small.dcm", download=False), tmp_path / name)
    (tmp_path / "png").mkdir()
    for name in ("png/1.png", "scan.zip", "pair.hdr", "pair.img", ".hidden.nii", "notes.txt", "scan.NRRD"):
        (tmp_path / name).touch()
    found = [scan.relative_to(tmp_path).as_posix() for scan in scans_in(tmp_path)]
    assert found == [*(f"nifti/{name}" for name in NAMES), "pair.hdr", "patient/series 1", "patient/series 2", "png",
                     "scan.NRRD", "scan.zip"]  # fmt: skip


def test_no_folder_is_read_twice(scans, tmp_path):
    shutil.copytree(scans, tmp_path / "scans")
    for name, target in (("000000/loop", ".."), ("zz", "000001"), ("here", "."), ("gone", "nowhere")):
        (tmp_path / "scans" / name).symlink_to(target)
    found = [scan.relative_to(tmp_path / "scans").as_posix() for scan in scans_in(tmp_path / "scans")]
    assert found == NAMES


def test_a_folder_that_cannot_be_read_is_an_error_of_its_own(model, scans, monkeypatch, capsys):
    listed = Path.iterdir

    def iterdir(folder):
        if folder.name == "000000b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert demo.run(arguments(model, scans)) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [NAMES[0], "000000b", NAMES[2]]
    assert [row["error"] is None for row in rows] == [True, False, True] and "Permission denied" in rows[1]["error"]


def test_volumes_beside_slices_need_a_choice(model, scans, tmp_path, capsys, monkeypatch):
    """A stray picture does not make one scan of them; the sentence says how to ask about all."""
    for name in ("a.nii.gz", "b.nii.gz"):
        shutil.copy(scans / NAMES[0], tmp_path / name)
    (tmp_path / "logo.png").touch()
    with monkeypatch.context() as patch:
        patch.setattr("med3dvlm.demo.command.load", lambda _: pytest.fail("not before there is something to do"))
        assert demo.run(arguments(model, tmp_path, "--question", "Where?", "--output", tmp_path / "out/a.csv")) == 1
    error = capsys.readouterr().err
    assert "holds a.nii.gz, b.nii.gz beside slices or DICOM files" in error and "--batch" in error
    assert demo.run(arguments(model, tmp_path, "--question", "Where?", "--batch")) == 0
    assert [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()] == ["a.nii.gz", "b.nii.gz"]


def test_a_folder_with_one_scan_is_one_scan_unless_told_otherwise(model, scans, capsys):
    folder = scans / "000001"
    assert len(demo.main(arguments(model, folder, "--question", "Where?")).answers) == 1
    assert demo.run(arguments(model, folder, "--question", "Where?", "--batch")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["image"] == "Coronal_C.nii.gz"
    assert demo.run(arguments(model, folder / "Coronal_C.nii.gz", "--question", "Where?", "--batch")) == 0
