"""From each form of input to what training reads, end to end; and nothing that identifies a person on the way."""

import json
import logging
import os
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import MediaStorageDirectoryStorage

from med3dvlm.data import prepare
from med3dvlm.data.ledger import read_ledgers
from med3dvlm.data.manifest import read_caption_manifest, read_vqa_csv
from med3dvlm.data.preprocess import preprocess
from med3dvlm.data.presets import PreprocessConfig
from med3dvlm.data.profile import read_preparation
from med3dvlm.data.volume import load_volume
from tests.data.test_sources import RAD, amos, ct_rate, listed, write_nifti
from tests.helpers.dicom_files import image, save, write_series
from tests.helpers.tiny_data import write_slices, write_table

NAME, PATIENT = "Planted^Name", "PLANTED-ID"  # what the synthetic DICOM files say
SPLITS = ("train", "validation", "test")


def run(source, out, *options) -> int:
    return prepare.main(["--input_dir", str(source), "--output_dir", str(out), "--size", "4", "8", "8",
                         "--dtype", "uint8", "--num_workers", "1", *options])  # fmt: skip


def captions(out) -> dict[str, list]:
    """The records of each split, as training reads them: every file is there."""
    return {split: read_caption_manifest(out / "M3D_Cap.json", out.parent, split) for split in SPLITS}


def test_ct_rate_with_3d_rad(tmp_path):
    write_table(tmp_path / "rad/train/Task1/a.csv", [
        ["Task1", "-", "train_1_a_1.nii.gz", "Is there a nodule?", "No", "Close", "B", "Yes", "No", "-", "-"],
        ["Task1", "-", "train_1_a_1.nii.gz", "What is seen?", "None", "Open", "-", "-", "-", "-", "-"],
    ], RAD)  # fmt: skip
    out = tmp_path / "out"
    assert run(ct_rate(tmp_path / "ct"), out, "--questions", str(tmp_path / "rad")) == 0
    records = captions(out)
    assert {split: len(found) for split, found in records.items()} == {"train": 2, "validation": 1, "test": 0}
    assert records["train"][0].read_text() == "Clear lungs. No nodule. Impression: Normal."
    (closed,) = read_vqa_csv(out / "M3D_VQA_train.csv", tmp_path)
    assert closed.choices == ("Yes", "No", None, None) and closed.answer_choice == "B"
    (open_ended,) = read_vqa_csv(out / "M3D_VQA_open_train.csv", tmp_path)
    assert open_ended.answer == "None" and open_ended.image == closed.image == records["train"][0].image
    skipped = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert any("no chest" in line.get("reason", "") and line["status"] == "skipped" for line in skipped)


def test_ct_rate_values_become_hu_once(tmp_path):
    """A window tells: the first release is rescaled by its metadata, the fixed one is taken as it is."""
    level = ("--preset", "window", "--window", "60", "200")
    for release, (slope, intercept) in (("", (2, -8192)), ("_fixed", (1, 0))):
        root = ct_rate(tmp_path / f"ct{release}", release)
        next(root.rglob("train_1_a_2.nii.gz")).unlink()
        path = next(root.rglob("train_1_a_1.nii.gz"))
        stored = np.linspace(-50, 150, 60, dtype=np.float32).reshape(3, 4, 5)  # HU
        nib.save(nib.Nifti1Image((stored - intercept) / slope, np.diag([1, 1, 2, 1])), path)
        assert run(root, tmp_path / f"out{release}", *level, "--limit", "1") == 0
    values = [load_volume(tmp_path / out / "train/train_1/train_1_a/train_1_a_1.nii.gz").array for out in
              ("out", "out_fixed")]  # fmt: skip
    assert np.abs(values[0] - values[1]).max() <= 1 / 255 + 1e-6 and values[0].max() > 0.8


def test_amos_mm(tmp_path):
    out = tmp_path / "out"
    assert run(amos(tmp_path / "amos"), out) == 0
    assert {split: len(found) for split, found in captions(out).items()} == {"train": 1, "validation": 1, "test": 0}
    assert read_vqa_csv(out / "M3D_VQA_train.csv", tmp_path)[0].answer == "Kidney"


def test_a_list_and_the_record_of_how_it_was_prepared(tmp_path):
    question = ["Which organ?", "Liver", "Kidney", "Liver", "B"]
    path = listed(tmp_path / "in", ["a.nii.gz", "Of a.", "train", "p1", *question], ["b.nii.gz", "Of b.", "test", "p2"])
    out = tmp_path / "out"
    assert run(path, out) == 0
    assert {split: len(found) for split, found in captions(out).items()} == {"train": 1, "validation": 0, "test": 1}
    assert read_vqa_csv(out / "M3D_VQA_train.csv", tmp_path)[0].question == "Which organ?"
    config, profile = read_preparation(out)
    assert config == PreprocessConfig(size=(4, 8, 8)) and profile.cases == 2 and profile.spacing[0] == (2, 2)
    recorded = json.loads((out / "preparation.json").read_text())
    assert recorded["max_abs_error"] == pytest.approx(1 / 510 + 1e-6)
    assert (recorded["dtype"], recorded["cases"], recorded["volumes"], recorded["source"]) == ("uint8", 2, 2, "list")
    assert recorded["bytes"] == sum(file.stat().st_size for file in out.rglob("*.nii.gz"))


def test_a_list_that_names_another_file_makes_the_volume_anew(tmp_path):
    """Also where that file is older than the result, and where it cannot be read at first."""
    files = {name: write_nifti(tmp_path / name / "a.nii", value) for name, value in (("x", 1.0), ("y", 10.0))}
    sound, results = files["y"].read_bytes(), []
    for name, data, code in (("x", files["x"].read_bytes(), 0), ("y", sound[:50], 1), ("y", sound, 0), ("y", sound, 0)):
        files[name].write_bytes(data)
        os.utime(files[name], (1e9, 1e9))
        (tmp_path / "list.csv").write_text(f"image,report,case\n{name}/a.nii,A cyst.,1\n")
        assert run(tmp_path / "list.csv", tmp_path / "out", "--window", "300", "600") == code
        (file,) = (tmp_path / "out").rglob("*.nii.gz")
        results.append((file.stat().st_mtime_ns, load_volume(file).array.max()))
    assert results[0] == results[1] and results[2] == results[3]  # and then it stays
    assert results[0][1] < 0.2 and results[2][1] > 0.9


def test_a_mistake_in_a_list_stops_everything(tmp_path, capsys):
    assert run(listed(tmp_path / "in", ["a.nii.gz", "x"], ["zzz.nii.gz", "x"]), tmp_path / "out") == 1
    assert "row 2: zzz.nii.gz does not exist" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype, error", [("uint8", 1 / 510 + 1e-6), ("float16", 1e-5), ("float32", 1e-6)])
def test_any_volume_goes_through_the_shared_pipeline(tmp_path, dtype, error):
    write_nifti(tmp_path / "in/p1/scan.nii.gz")
    (tmp_path / "in/p1/text.txt").write_text("A report.")
    assert run(tmp_path / "in", tmp_path / "out", "--dtype", dtype, "--preset", "ct_wide") == 0
    expected = preprocess(load_volume(tmp_path / "in/p1/scan.nii.gz"), "ct_wide", (4, 8, 8))[0].numpy()
    volume = load_volume(next((tmp_path / "out").rglob("*.nii.gz")))
    assert volume.preparation == "ct_wide" and np.abs(volume.array - expected).max() <= error


def test_own_data_is_split_by_patient(tmp_path):
    for number in range(30):
        for scan in ("a", "b"):
            write_nifti(tmp_path / f"in/p{number:02d}/{scan}/scan.nii.gz")
            (tmp_path / f"in/p{number:02d}/{scan}/text.txt").write_text("A report.")
    assert run(tmp_path / "in", tmp_path / "out", "--split", "0.5", "0.2", "0.3") == 0
    patients = {split: {Path(r.image).parts[-3] for r in found} for split, found in captions(tmp_path / "out").items()}
    assert sum(map(len, captions(tmp_path / "out").values())) == 60 and all(patients.values())
    assert sum(map(len, patients.values())) == 30  # no patient in two of them


def hospital(root) -> Path:
    """Two patients in folders named after them; the first has two studies, one of them with two series."""
    array = np.random.default_rng(0).integers(0, 900, (5, 12, 14)).astype(np.uint16)
    studies = [("Doe_Jane", "20240101", 1, ("S1", "S2")), ("Doe_Jane", "20240302", 2, ("S1",)),
               ("Roe_Max", "20230405", 3, ("S1",))]  # fmt: skip
    for patient, day, study, folders in studies:
        for number, series in enumerate(folders, 1):
            write_series(root / patient / day / series, array, PatientID=f"{PATIENT} {patient}", PatientName=NAME,
                         StudyInstanceUID=f"1.2.3.{study}", SeriesInstanceUID=f"1.2.3.{study}.{number}",
                         SeriesNumber=number, AccessionNumber=f"ACC{study}", SeriesDescription=f"of {NAME}",
                         StudyDate=day, names=[f"{patient}_{k}" for k in range(5)])  # fmt: skip
    return root


def everything_said(out: Path, capsys, caplog) -> str:
    """All names and contents that a run left, and all it printed."""
    said = capsys.readouterr()
    texts = [said.out, said.err, caplog.text]
    for path in out.rglob("*"):
        texts += [str(path.relative_to(out)), path.read_bytes().decode("latin-1") if path.is_file() else ""]
        if path.name.endswith(".nii.gz"):
            texts.append(nib.load(path).header.binaryblock.decode("latin-1"))
    return "\n".join(texts)


def test_a_hospital_export_says_nothing_about_who(tmp_path, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    root, out = hospital(tmp_path / "in"), tmp_path / "out"
    broken = root / "Roe_Max/20230405/S1/Roe_Max_2"
    broken.write_bytes(broken.read_bytes()[:900])  # an error that names files
    (root / "Doe_Jane/20240302/S1/text.txt").write_text("A cyst.")
    table = write_table(tmp_path / "reports.csv", [["ACC1", "No finding."]], ["AccessionNumber", "report"])
    mapping = tmp_path / "mapping.csv"
    assert run(root, out, "--reports", str(table), "--mapping_file", str(mapping)) == 1
    latest = read_ledgers(out)
    assert sorted(line["status"] for line in latest.values()) == ["done", "done", "done", "failed"]
    text = everything_said(out, capsys, caplog)
    for secret in ("Planted", "PLANTED", "Doe", "Jane", "Roe_Max", "ACC1", "1.2.3.", "20240101", "20230405"):
        assert secret not in text, secret
    reports = sorted(file.read_text() for file in out.rglob("text.txt"))
    assert reports == ["A cyst.", "No finding."]
    patients = {folder.name for folder in out.iterdir() if folder.is_dir()}
    assert len(patients) == 1  # the other patient's only volume failed
    assert sum(len(found) for found in captions(out).values()) == 3
    assert "Roe_Max" in mapping.read_text() and mapping.stat().st_mode & 0o777 == 0o600
    key = tmp_path / "out.key"
    assert key.stat().st_mode & 0o777 == 0o600 and key.read_text().strip() not in text


def test_names_of_a_hospital_export_depend_on_the_key_only(tmp_path):
    root = hospital(tmp_path / "in")
    folders = []
    for out, key in (("one", "key"), ("two", "key"), ("three", "other")):
        assert run(root, tmp_path / out, "--key_file", str(tmp_path / key)) == 0
        folders.append(sorted(str(p.relative_to(tmp_path / out)) for p in (tmp_path / out).rglob("*.nii.gz")))
    assert folders[0] == folders[1] != folders[2] and len(folders[0]) == 4
    assert run(root, tmp_path / "one", "--key_file", str(tmp_path / "key")) == 0  # a restart finds its results
    assert [line["status"] for line in read_ledgers(tmp_path / "one").values()] == ["skipped"] * 4


def test_a_bad_key_file_is_refused(tmp_path, capsys):
    (tmp_path / "key").write_text("secret")
    assert run(hospital(tmp_path / "in"), tmp_path / "out", "--key_file", str(tmp_path / "key")) == 1
    assert "is no key file" in capsys.readouterr().err


def test_a_dry_run_makes_no_key(tmp_path):
    assert run(hospital(tmp_path / "in"), tmp_path / "out", "--dry_run") == 0
    assert not (tmp_path / "out.key").exists() and not (tmp_path / "out").exists()


def export(folder, patient: int, study: int, series: int = 1, prefix: str = "", **tags) -> Path:
    array = np.random.default_rng(study).integers(0, 900, (4, 6, 8)).astype(np.uint16)
    return write_series(folder, array, PatientID=f"p{patient}", StudyInstanceUID=f"1.2.{study}", SeriesNumber=series,
                        SeriesInstanceUID=f"1.2.{study}.{series}", AccessionNumber=f"A{study}",
                        names=[f"{prefix}{study}_{series}_{k}" for k in range(4)], **tags)  # fmt: skip


def test_studies_are_told_apart_whatever_the_folders(tmp_path):
    """Everything in one folder; a disc with DICOMDIR and a dose report at its top; one study in several folders."""
    reports = write_table(tmp_path / "r.csv", [[f"A{n}", f"Report {n}."] for n in (1, 2, 3)],
                          ["AccessionNumber", "report"])  # fmt: skip
    layouts = {
        "flat": ["", "", ""], "disc": ["DICOM/ST1", "DICOM/ST2", "DICOM/ST3"], "scattered": ["x", "y", "x"],
    }  # fmt: skip
    trees = {}
    for layout, folders in layouts.items():
        root = tmp_path / layout
        for (patient, study), folder in zip([(1, 1), (1, 2), (2, 3)], folders, strict=True):
            export(root / folder, patient, study)
            export(root / (folder + "b" if layout == "scattered" else folder), patient, study, series=2)
        if layout == "disc":
            table = Dataset()
            table.SOPClassUID, table.SOPInstanceUID = MediaStorageDirectoryStorage, "1.2.3.4"
            save(root / "DICOMDIR", table)
            dose = image(np.zeros((2, 2), np.uint16), PatientID="p2", StudyInstanceUID="1.2.3", SeriesInstanceUID="1.9",
                         AccessionNumber="A3", Modality="SR")  # fmt: skip
            del dose.PixelData
            save(root / "dose", dose)
        out = tmp_path / f"out_{layout}"
        assert run(root, out, "--reports", str(reports), "--key_file", str(tmp_path / "key")) == 0
        trees[layout] = {
            str(path.relative_to(out)): (path.parent / "text.txt").read_text() for path in out.rglob("*.nii.gz")
        }
    assert trees["flat"] == trees["disc"] == trees["scattered"]
    assert sorted(trees["flat"].values()) == [f"Report {n}." for n in (1, 1, 2, 2, 3, 3)]
    assert {Path(name).name for name in trees["flat"]} == {"CT_001.nii.gz", "CT_002.nii.gz"}
    assert len({Path(name).parts[0] for name in trees["flat"]}) == 2  # patients
    values = [load_volume(tmp_path / "out_flat" / name).array for name in trees["flat"]]
    assert len({value.tobytes() for value in values}) == 3  # one for each study


def test_a_report_above_several_studies_belongs_to_none(tmp_path):
    export(tmp_path / "in/p1/a", 1, 1)
    export(tmp_path / "in/p1/b", 1, 2)
    (tmp_path / "in/p1/text.txt").write_text("Of which?")
    (tmp_path / "in/p1/b/text.txt").write_text("Of b.")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert [file.read_text() for file in (tmp_path / "out").rglob("text.txt")] == ["Of b."]


def test_damaged_files_cost_no_other_case(tmp_path, capsys):
    for study in (1, 2, 3):
        export(tmp_path / f"in/{study}", study, study)
    for study, kept in ((1, 60), (2, 700)):  # not even a header; a header without pixels
        file = tmp_path / f"in/{study}/{study}_1_3"
        file.write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 500 if study == 1 else file.read_bytes()[:kept])
    run(tmp_path / "in", tmp_path / "out")
    latest = read_ledgers(tmp_path / "out")
    assert [line["status"] for line in latest.values()].count("done") == 3
    assert len({line["case"] for line in latest.values()}) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_a_study_of_damaged_files_only_has_failed(tmp_path, capsys):
    export(tmp_path / "in/1", 1, 1)
    (file, *others) = sorted(export(tmp_path / "in/2", 2, 2).iterdir())
    for other in others:
        other.unlink()
    file.write_bytes(file.read_bytes()[:700])  # a header without pixels
    assert run(tmp_path / "in", tmp_path / "out") == 1
    lines = [json.loads(line) for line in (tmp_path / "out/ledger.jsonl").read_text().splitlines()]
    (failed,) = [line for line in lines if line["status"] == "failed"]
    assert "cannot be parsed" in failed["reason"] and "1 could not be prepared" in capsys.readouterr().err


def test_a_patient_in_folders_and_in_an_archive_is_one(tmp_path):
    reports = write_table(tmp_path / "r.csv", [[f"A{n}", f"Report {n}."] for n in (1, 2, 3)],
                          ["AccessionNumber", "report"])  # fmt: skip
    export(tmp_path / "in/one", 1, 1)
    export(tmp_path / "in/other", 2, 3)
    zipped = export(tmp_path / "files", 1, 2)
    with zipfile.ZipFile(tmp_path / "in/more.zip", "w") as archive:
        for file in sorted(zipped.iterdir()):
            archive.write(file, f"Planted/{file.name}")
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, "--reports", str(reports)) == 0
    found = {(file.parent / "text.txt").read_text(): file.relative_to(out).parts[0] for file in out.rglob("*.nii.gz")}
    assert found["Report 1."] == found["Report 2."] != found["Report 3."]


def test_two_reports_for_one_study_are_refused(tmp_path, capsys):
    export(tmp_path / "in", 1, 1)
    table = write_table(tmp_path / "r.csv", [["A1", "One."], ["A1", "Two."]], ["AccessionNumber", "report"])
    assert run(tmp_path / "in", tmp_path / "out", "--reports", str(table)) == 1
    assert "two reports for one AccessionNumber" in capsys.readouterr().err


def test_headers_without_patients_go_by_folder(tmp_path, capsys):
    array = np.arange(120, dtype=np.uint16).reshape(3, 5, 8)
    for number in range(3):
        write_series(tmp_path / f"in/case{number}", array, PatientID="ANON", StudyInstanceUID=f"1.2.{number}")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert len({path.parts[-3] for path in (tmp_path / "out").rglob("*.nii.gz")}) == 3
    assert "headers name one patient" in capsys.readouterr().out


def test_archives_of_dicom_and_of_others(tmp_path):
    series = write_series(tmp_path / "series", np.arange(120, dtype=np.uint16).reshape(3, 5, 8))
    scan = write_nifti(tmp_path / "scan.nii.gz")
    (tmp_path / "in").mkdir()
    for name, files in (("dicom", sorted(series.iterdir())), ("nifti", [scan])):
        with zipfile.ZipFile(tmp_path / f"in/{name}.zip", "w") as archive:
            for file in files:
                archive.write(file, file.name)
    assert run(tmp_path / "in", tmp_path / "out") == 0
    volumes = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.nii.gz"))
    assert len(volumes) == 2 and not any(name in str(volumes) for name in ("dicom", "nifti", "scan"))
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert [line["status"] for line in read_ledgers(tmp_path / "out").values()] == ["skipped"] * 2


def test_an_archive_of_two_studies_is_refused(tmp_path, capsys):
    export(tmp_path / "files", 1, 1)
    export(tmp_path / "files", 1, 2)
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in/Planted.zip", "w") as archive:
        for file in sorted((tmp_path / "files").iterdir()):
            archive.write(file, f"Planted/{file.name}")
    assert run(tmp_path / "in", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "holds 2 studies: unpack it" in said and "Planted" not in said


def test_m3d_without_a_manifest_gets_one_and_keeps_cases_together(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        for split in ("ct_case", "ct_quizze"):
            case = tmp_path / f"in/{split}/{number:06d}"
            write_slices(case / "Axial", rng.integers(0, 255, (3, 6, 7), dtype=np.uint8))
            (case / "text.txt").write_text("study_findings: A finding.")
    assert run(tmp_path / "in", tmp_path / "out", "--split", "0.5", "0", "0.5") == 0
    ids = {split: {Path(r.image).parts[-2] for r in found} for split, found in captions(tmp_path / "out").items()}
    assert not ids["train"] & ids["test"] and len(ids["train"] | ids["test"]) == 12
