"""Preparation: the golden volumes and texts, command line, parallel runs, interruptions, errors by file."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from med3dvlm.data import prepare
from med3dvlm.data.manifest import clean_report_text, rename_manifest
from med3dvlm.data.profile import read_preparation
from med3dvlm.data.volume import load_volume
from tests.helpers.tiny_data import GOLDEN_DATA, unpack_tree, write_slices

COMMAND = Path(prepare.__file__).parents[2] / "utls" / "m3d_cap_data_prepare_128.py"
SIZES = {"r16x32x32": (16, 32, 32), "r24x20x28": (24, 20, 28), "full": (128, 256, 256)}


def run(source, target, size=(4, 6, 8), *options):
    arguments = ["--input_dir", str(source), "--output_dir", str(target), "--size", *map(str, size), *options]
    return prepare.main([*arguments, *([] if "--num_workers" in options else ["--num_workers", "1"])])


@pytest.fixture
def raw(tmp_path):
    """Two cases with three series in both split folders."""
    rng = np.random.default_rng(0)
    series = ("ct_case/000001/Axial_C", "ct_case/000001/Sagittal_\u00c4", "ct_quizze/000002/Axial_C")
    for name in series:
        write_slices(tmp_path / "raw" / name, rng.integers(0, 255, (5, 7, 9), dtype=np.uint8))
    for case in ("ct_case/000001", "ct_quizze/000002"):
        text = "Title: x\n\nstudy_findings: A cyst\nin the liver.\n"
        (tmp_path / "raw" / case / "text.txt").write_text(text)
    return tmp_path / "raw"


@pytest.mark.parametrize("tag", SIZES)
def test_golden_volumes(tag, tmp_path):
    """Every recorded voxel, and the header of the published files."""
    unpack_tree("raw_slices_a.npz", tmp_path / "raw" / "ct_case")
    assert run(tmp_path / "raw", tmp_path / "out", SIZES[tag]) == 0
    headers = json.loads((GOLDEN_DATA / "prepared_a_headers.json").read_text())[tag]
    with np.load(GOLDEN_DATA / "prepared_a.npz") as golden:
        records = [name for name in golden.files if name.startswith(f"{tag}/")]
        assert len(records) == (4 if tag == "full" else 2)
        for record in records:
            name, _, part = record.removeprefix(f"{tag}/").partition("#")
            array = load_volume(tmp_path / "out" / "ct_case" / name).array
            found = {"": np.s_[:], "every8": np.s_[::8, ::8, ::8], "mid_slice_64": np.s_[64]}[part]
            assert np.abs(array[found] - golden[record]).max() <= 1e-6
    for name, expected in headers.items():
        with gzip.open(tmp_path / "out" / "ct_case" / name) as file:
            header = nib.Nifti1Header.from_fileobj(file, check=False)
        assert list(header.get_data_shape()) == expected["shape"]
        assert header.get_data_dtype() == expected["dtype"]
        assert header.get_best_affine().tolist() == expected["affine"]
        for key in ("scl_slope", "xyzt_units", "qform_code", "sform_code"):
            assert header[key] == expected[key], key


@pytest.mark.parametrize("case", json.loads((GOLDEN_DATA / "text_cleaning_a.json").read_text(encoding="utf-8")))
def test_golden_texts(case):
    assert clean_report_text(case["input"]) == case["output"]


def test_tree_texts_and_folded_names(raw, tmp_path):
    assert run(raw, tmp_path / "out", (4, 6, 8), "--dtype", "uint8") == 0
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == [
        "M3D_Cap.json", "ct_case/000001/Axial_C.nii.gz", "ct_case/000001/Sagittal_A.nii.gz", "ct_case/000001/text.txt",
        "ct_quizze/000002/Axial_C.nii.gz", "ct_quizze/000002/text.txt", "data_card.md", "ledger.jsonl",
        "preparation.json",
    ]  # fmt: skip
    assert (tmp_path / "out/ct_case/000001/text.txt").read_text() == "A cyst in the liver."
    _, profile = read_preparation(tmp_path / "out")
    assert (profile.modalities, profile.values, profile.cases) == (("CT",), "0..1", 3)  # M3D's pictures don't say CT
    image = nib.load(tmp_path / "out/ct_case/000001/Axial_C.nii.gz")
    assert image.get_data_dtype() == np.uint8 and image.shape == (8, 6, 4)


def test_two_processes_give_the_same_files(raw, tmp_path):
    assert run(raw, tmp_path / "one") == 0
    assert run(raw, tmp_path / "two", (4, 6, 8), "--num_workers", "2") == 0
    for file in (*(tmp_path / "one").rglob("*.nii.gz"), *(tmp_path / "one").rglob("*.txt")):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()


def test_finished_volumes_are_kept_and_others_redone(raw, tmp_path, capsys):
    out = tmp_path / "out"
    run(raw, out)
    first = {file: file.stat().st_mtime_ns for file in (*out.rglob("*.nii.gz"), *out.rglob("*.txt"))}
    damaged = out / "ct_case/000001/Axial_C.nii.gz"
    damaged.write_bytes(b"not a volume")
    assert run(raw, out) == 0
    assert "1 volumes written, 2 were finished before" in capsys.readouterr().out
    assert load_volume(damaged).array.shape == (4, 6, 8)
    assert all(file.stat().st_mtime_ns == time for file, time in first.items() if file != damaged)
    assert run(raw, out, (8, 8, 8), "--dtype", "uint8") == 0  # another form is not taken for finished
    assert "3 volumes written" in capsys.readouterr().out
    assert load_volume(damaged).array.shape == (8, 8, 8)


@pytest.mark.parametrize("changed", ["Axial_C", "Axial_C/2.png"])
def test_a_series_changed_since_is_prepared_again(raw, tmp_path, capsys, changed):
    run(raw, tmp_path / "out")
    target = tmp_path / "out/ct_case/000001/Axial_C.nii.gz"
    later = target.stat().st_mtime + 60
    os.utime(raw / "ct_case/000001" / changed, (later, later))
    assert run(raw, tmp_path / "out") == 0
    assert "1 volumes written, 2 were finished before" in capsys.readouterr().out


def test_manifest_follows_the_raw_one_but_a_renamed_copy_stays(raw, tmp_path):
    manifest, copy = raw / "M3D_Cap.json", tmp_path / "out/M3D_Cap.json"
    manifest.write_text('{"train": [{"image": "a.npy", "text": "a.txt"}]}')
    run(raw, tmp_path / "out")
    assert copy.read_bytes() == manifest.read_bytes()
    rename_manifest(copy)
    run(raw, tmp_path / "out")
    assert "a.nii.gz" in copy.read_text()
    manifest.write_text('{"train": [{"image": "b.npy", "text": "b.txt"}]}')
    later = copy.stat().st_mtime + 60
    os.utime(manifest, (later, later))
    run(raw, tmp_path / "out")
    assert copy.read_bytes() == manifest.read_bytes()


def test_an_interrupted_write_leaves_nothing_to_accept(raw, tmp_path, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    assert run(raw, tmp_path / "out") == 130
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["ledger.jsonl"]


def test_errors_by_file_name_and_the_rest_is_done(raw, tmp_path, capsys):
    (raw / "ct_case/000001/Axial_C/2.png").write_bytes(b"broken")
    (raw / "ct_case/000001/Scout").mkdir()
    write_slices(raw / "ct_case/000001/Blank", np.zeros((3, 4, 5), np.uint8))
    write_slices(raw / "ct_case/000001/Sagittal_A", np.eye(4, dtype=np.uint8)[None])  # clashes with Sagittal_Ä
    assert run(raw, tmp_path / "out") == 1
    message = capsys.readouterr().err
    for file in ("Axial_C/2.png", "000001/Scout", "000001/Blank", "000001/Sagittal_"):
        assert file in message
    assert "4 could not be prepared" in message
    written = {p.name for p in (tmp_path / "out").rglob("*.nii.gz")}
    assert written == {"Axial_C.nii.gz", "Sagittal_A.nii.gz"}


def test_case_without_a_report_is_noted(raw, tmp_path, capsys):
    (raw / "ct_case/000001/text.txt").unlink()
    assert run(raw, tmp_path / "out") == 0
    assert "000001/text.txt" in capsys.readouterr().out


def test_a_case_without_a_series_is_entered(raw, tmp_path):
    (raw / "ct_case/000009").mkdir()
    (raw / "ct_case/000009/text.txt").write_text("study_findings: A finding without a scan.")
    assert run(raw, tmp_path / "out") == 0
    lines = [json.loads(line) for line in (tmp_path / "out/ledger.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines if line["case"] == "ct_case/000009"] == ["holds no series"]


def test_no_case_is_an_error(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    assert run(tmp_path / "raw", tmp_path / "out") == 1
    assert "ct_case or ct_quizze" in capsys.readouterr().err


def test_published_folders_without_arguments(monkeypatch, tmp_path, raw):
    for name in ("M3D-Cap", "M3D_Cap"):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir(exist_ok=True)
        source = tmp_path / "data" / name
        raw.rename(source)
        arguments = prepare.parse_arguments([])
        assert (arguments.input_dir, arguments.output_dir) == (f"data/{name}", "data/M3D_Cap_npy")
        assert tuple(arguments.size) == (128, 256, 256) and arguments.dtype == "float32"
        source.rename(raw)


def test_command_runs_from_any_folder_without_pythonpath(raw, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(COMMAND), "--input_dir", str(raw), "--output_dir", "out", "--size", "2", "3", "4"]
    subprocess.run([*command, "--num_workers", "1"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert load_volume(tmp_path / "out/ct_quizze/000002/Axial_C.nii.gz").array.shape == (2, 3, 4)


@pytest.mark.parametrize("error, advice", [("RepositoryNotFoundError", "withdrawn"), ("GatedRepoError", "gated"),
                                           ("LocalEntryNotFoundError", "connection")])  # fmt: skip
def test_download_says_what_to_do(monkeypatch, tmp_path, error, advice):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(repo_id, repo_type, local_dir):
        assert (repo_id, repo_type, local_dir) == ("someone/M3D", "dataset", str(tmp_path / "raw"))
        kind = getattr(errors, error)
        if issubclass(kind, errors.HfHubHTTPError):
            raise kind("no", response=httpx.Response(404, request=httpx.Request("GET", "https://example.org")))
        raise kind("no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SystemExit, match=advice):
        run(tmp_path / "raw", tmp_path / "out", (4, 6, 8), "--download", "someone/M3D")


def test_palette_and_colour_slices_become_grey(tmp_path):
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5) * 10
    (tmp_path / "s").mkdir()
    Image.fromarray(grey).save(tmp_path / "s" / "0.png")
    Image.fromarray(grey).convert("RGB").save(tmp_path / "s" / "1.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "s" / "2.png")
    array = load_volume(tmp_path / "s").array
    assert all(np.array_equal(plane, grey.astype(np.float32) / np.float32(255)) for plane in array)
