"""`convert`: links and manifests where the originals will do, preparation where not; leaks refused; the data card."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3dvlm.data import convert, prepare
from med3dvlm.data.manifest import read_caption_manifest, read_vqa_csv
from med3dvlm.data.profile import read_preparation
from med3dvlm.data.sources import SourceError, SourceOptions, collect
from tests.data.test_sources import amos, ct_rate, listed, write_nifti
from tests.helpers.dicom_files import write_series
from tests.helpers.tiny_data import write_slices, write_table

SPLITS = ("train", "validation", "test")


def run(source, out, *options) -> int:
    return convert.main(["--input_dir", str(source), "--output_dir", str(out), "--size", "4", "8", "8",
                         "--num_workers", "1", *options])  # fmt: skip


def captions(out) -> dict[str, list]:
    return {split: read_caption_manifest(out / "M3D_Cap.json", out.parent, split) for split in SPLITS}


def card(out) -> str:
    return (out / "data_card.md").read_text()


def row(out, name: str) -> list[str]:
    """Cells of a row of a table in the data card."""
    line = next(line for line in card(out).splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def snapshot(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_a_list_becomes_links_manifests_and_a_card(tmp_path, capsys):
    path = listed(
        tmp_path / "in", ["a.nii.gz", "Of a.", "train", "p1", "Which organ?", "Liver", "Kidney", "Liver", "B"],
        ["a.nii.gz", "", "", "", "What is seen?", "A cyst"], ["b.nii.gz", "Of b, two.", "test", "p2"],
    )  # fmt: skip
    out = tmp_path / "data/own"
    assert run(path, out, "--preset", "ct_wide") == 0
    (record,) = captions(out)["train"]
    assert Path(record.image).resolve() == (tmp_path / "in/a.nii.gz").resolve() and record.read_text() == "Of a."
    assert read_vqa_csv(out / "M3D_VQA_train.csv", out.parent)[0].image == record.image
    assert read_vqa_csv(out / "M3D_VQA_open_train.csv", out.parent)[0].answer == "A cyst"
    config, profile = read_preparation(out)
    assert config.preset == "ct_wide" and profile.cases == 2 and profile.spacing[0] == (2, 2)
    assert row(out, "patients") == ["1", "0", "1", "2"] and row(out, "questions") == ["2", "0", "0", "2"]
    for sentence in (
        "2 reports of 2 to 3 words",
        "1 with choices, 1 open",
        "By the source.",
        "B 1",
        "0 whose letter does not stand for the answer",
    ):
        assert sentence in card(out)
    assert "2 volumes of 2 cases linked, 2 of them opened" in capsys.readouterr().out


def test_a_second_run_changes_nothing_and_keeps_what_was_filled_in(tmp_path):
    path, out = listed(tmp_path / "in", ["a.nii.gz", "Of a.", "train"]), tmp_path / "own"
    assert run(path, out) == 0
    text = card(out).partition("To be filled in")[0] + "CC BY 4.0.\n"
    (out / "data_card.md").write_text(text)
    before = snapshot(out)
    assert (
        run(path, out) == 0 and snapshot(out) == before and card(out).endswith("## Licence and consent\n\nCC BY 4.0.\n")
    )


def test_tables_and_texts_of_an_earlier_run_go_when_they_are_true_no_more(tmp_path):
    """The same question in the tables of two splits would be a leak that only the history of the folder explains."""
    question, choices = ["Which organ?", "Liver"], ["Kidney", "Liver", "B"]
    first = ["a.nii.gz", "Of a.", "test", "p1", *question, *choices]
    path, out = listed(tmp_path / "in", first, ["b.nii.gz", "Of b.", "test", "p1"]), tmp_path / "own"
    assert run(path, out) == 0 and (out / "patients.csv").read_text() == "case,patient\np1/a,p1\np1/b,p1\n"
    assert len(read_vqa_csv(out / "M3D_VQA_test.csv", tmp_path)) == 1
    columns = ["image", "report", "split", "case", "question", "answer"]
    write_table(path, [["a.nii.gz", "", "train", "p1", *question]], columns)
    assert run(path, out) == 0
    tables = {table.name: len(table.read_text().splitlines()) for table in out.glob("*.csv")}
    assert tables == {"M3D_VQA_train.csv": 1, "M3D_VQA_open_train.csv": 2}
    listed(tmp_path / "in", ["a.nii.gz", "Of a.", "train", "p1"])
    assert run(path, out) == 0 and (out / "p1/text.txt").read_text() == "Of a."
    listed(tmp_path / "in", ["a.nii.gz", "", "train", "p1"])
    assert run(path, out) == 0 and not (out / "p1/text.txt").exists()


def test_results_never_take_the_place_of_originals(tmp_path, capsys):
    """With the input as output, the volume of p1 would be replaced by its prepared one, and its report by a line."""
    original = write_nifti(tmp_path / "tree/p1/scan.nii.gz")
    (tmp_path / "tree/p1/text.txt").write_text("study_findings: One.\nTwo.")
    write_nifti(tmp_path / "tree/p2/scan.nii.gz")
    table = write_table(tmp_path / "tree/list.csv", [["p1/scan.nii.gz", "x", "p1"]], ["image", "report", "patient"])
    before = snapshot(tmp_path / "tree")
    for source, out in ((original.parents[1], "tree"), (original.parents[1], "tree/out"), (table, "tree")):
        for main in (prepare.main, convert.main):
            assert main(["--input_dir", str(source), "--output_dir", str(tmp_path / out)]) == 1
            assert "lies in the input" in capsys.readouterr().err
    assert snapshot(tmp_path / "tree") == before
    assert run(table, tmp_path / "tree/own") == 0  # beside the scans of a list is no harm


def test_what_cannot_be_written_is_a_sentence(tmp_path, capsys):
    path = listed(tmp_path / "in", ["a.nii.gz", "Of a."])
    (tmp_path / "file").write_text("")
    for flags in (["file/out"], ["file"], ["out", "--hash_ids", "--key_file", str(tmp_path / "file/key")]):
        for main in (prepare.main, convert.main):
            assert main(["--input_dir", str(path), "--output_dir", str(tmp_path / flags[0]), *flags[1:]]) == 1
            assert str(tmp_path / "file") in capsys.readouterr().err


def test_preparation_replaces_links_and_a_link_never_replaces_a_prepared_volume(tmp_path, capsys):
    path, out = listed(tmp_path / "in", ["a.nii.gz", "Of a.", "train"]), tmp_path / "own"
    original = (tmp_path / "in/a.nii.gz").read_bytes()
    assert run(path, out) == 0
    flags = ["--input_dir", str(path), "--output_dir", str(out), "--size", "4", "8", "8", "--num_workers", "1"]
    assert prepare.main(flags) == 0
    (record,) = captions(out)["train"]
    assert not Path(record.image).is_symlink() and nib.load(record.image).shape == (8, 8, 4)
    assert (tmp_path / "in/a.nii.gz").read_bytes() == original
    assert run(path, out) == 1 and "is a file, not a link" in capsys.readouterr().err
    assert nib.load(record.image).shape == (8, 8, 4)


def test_patients_are_never_divided_and_stay_where_they_are_when_data_are_added(tmp_path):
    def table(count: int) -> Path:
        for number in range(count):
            for scan in "ab":
                write_nifti(tmp_path / f"in/{number:02d}{scan}.nii.gz")
        rows = [[f"{n:02d}{scan}.nii.gz", f"Of {n} {scan}.", f"p{n}"] for n in range(count) for scan in "ab"]
        return write_table(tmp_path / "in/list.csv", rows, ["image", "report", "patient"])

    def patients(name: str, count: int) -> dict[str, str]:
        assert run(table(count), tmp_path / name, "--split", "0.5", "0.2", "0.3") == 0
        found = [(Path(r.image).parts[-3], split) for split, rs in captions(tmp_path / name).items() for r in rs]
        assert len(found) == 2 * count and len(set(found)) == count
        return dict(found)

    few, many = patients("few", 12), patients("many", 24)
    assert few == {patient: many[patient] for patient in few} and set(many.values()) == set(SPLITS)
    assert sum(map(int, row(tmp_path / "many", "patients")[:3])) == 24 and "0.5 / 0.2 / 0.3" in card(tmp_path / "many")


@pytest.mark.parametrize("rows, message", [
    ([["a.nii.gz", "x", "train", "p1"], ["b.nii.gz", "x", "test", "p1"]], "one case in the splits"),
    ([["a.nii.gz", "x", "train", "p1"], ["./a.nii.gz", "x", "test", "p2"]], "a.nii.gz has another case than in row 1"),
    ([["a.nii.gz", "x", "", "p1"], ["link.nii.gz", "x", "", "p2"]], "belongs to two patients, of p1 and of p2"),
])  # fmt: skip
def test_leaks_of_a_list_are_refused(tmp_path, capsys, rows, message):
    path = listed(tmp_path / "in", *rows)
    (tmp_path / "in/link.nii.gz").symlink_to("a.nii.gz")
    assert run(path, tmp_path / "out") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_patient_below_two_split_folders_is_refused(tmp_path):
    for split in ("train", "test"):
        write_nifti(tmp_path / split / "p1" / f"{split}_scan" / "a.nii.gz")
    with pytest.raises(SourceError, match=r"1 patients have cases in several splits.*\(test\).*\(train\)"):
        collect(tmp_path, "volumes", SourceOptions())


def test_a_dicom_patient_below_two_split_folders_is_refused_without_a_name(tmp_path, capsys):
    for number, split in enumerate(("train", "test")):
        write_series(tmp_path / "in" / split / f"Doe_Jane_{number}", np.arange(60, dtype=np.uint16).reshape(3, 4, 5),
                     PatientID="Doe^Jane", StudyInstanceUID=f"1.2.{number}")  # fmt: skip
    write_series(tmp_path / "in/test/Roe_Max", np.ones((3, 4, 5), np.uint16), PatientID="Roe", StudyInstanceUID="1.3")
    assert run(tmp_path / "in", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "1 patients have cases in several splits" in said and "Doe" not in said and "Jane" not in said


def test_hashed_names_are_prepared_because_a_link_would_tell_them(tmp_path, capsys):
    path = listed(tmp_path / "in", ["a.nii.gz", "Of a.", "train", "Jane"])
    assert run(path, tmp_path / "out", "--hash_ids") == 0
    assert "links would show them" in capsys.readouterr().out
    found = list((tmp_path / "out").rglob("*"))
    assert not any(path.is_symlink() or "Jane" in str(path) for path in found) and "Jane" not in card(tmp_path / "out")
    assert (tmp_path / "out.key").stat().st_mode & 0o777 == 0o600


def test_ct_rate_labels_questions_and_unmatched_names(tmp_path):
    base = ct_rate(tmp_path / "ct") / "dataset"
    write_table(base / "multi_abnormality_labels/train_predicted_labels.csv", [
        ["train_1_a_1.nii.gz", "1", "0"], ["train_1_a_2.nii.gz", "1", "1.0"], ["train_88_a_1.nii.gz", "0", "0"],
    ], ["VolumeName", "Lung nodule", "Emphysema"])  # fmt: skip
    out = tmp_path / "data/ct"
    assert run(tmp_path / "ct", out) == 0
    found = captions(out)
    assert {split: len(records) for split, records in found.items()} == {"train": 2, "validation": 1, "test": 0}
    lines = (out / "labels.csv").read_text().splitlines()
    assert lines[0] == "Image Path,Lung nodule,Emphysema" and len(lines) == 3
    assert lines[2] == "ct/train/train_1/train_1_a/train_1_a_2.nii.gz,1,1"
    assert row(out, "Lung nodule") == ["2", "0", "0"] and row(out, "Emphysema") == ["1", "0", "0"]
    assert set((out / "unmatched.csv").read_text().splitlines()[1:]) == {
        "train_2_a_1.nii.gz,volumes have no report", "train_77_a_1.nii.gz,reports have no volume here",
        "train_88_a_1,rows of labels have no volume here",
        "dataset/valid_fixed/valid_9/valid_9_b/valid_9_b_1.nii.gz,\"no chest scan, by CT-RATE's list\"",
    }  # fmt: skip
    assert np.array_equal(nib.load(found["train"][0].image).get_fdata(), nib.load(found["train"][1].image).get_fdata())


def test_wrong_labels_are_refused(tmp_path, capsys):
    base = ct_rate(tmp_path / "ct") / "dataset"
    table = base / "multi_abnormality_labels/train_predicted_labels.csv"
    write_table(table, [["train_1_a_1.nii.gz", "2"]], ["VolumeName", "Lung nodule"])
    assert run(tmp_path / "ct", tmp_path / "out") == 1
    assert "expected 0 or 1, found Lung nodule '2'" in capsys.readouterr().err


def test_the_first_release_of_ct_rate_is_prepared_because_its_values_are_no_hu(tmp_path, capsys):
    assert run(ct_rate(tmp_path / "ct", ""), tmp_path / "out") == 0
    assert "HU only after rescaling" in capsys.readouterr().out
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*.nii.gz"))
    assert row(tmp_path / "out", "volumes") == ["2", "1", "0", "3"]


def test_amos_questions_of_training_about_a_validation_case_are_left_out(tmp_path):
    out = tmp_path / "out"
    assert run(amos(tmp_path / "amos", image="amos_7008.nii.gz"), out) == 0
    assert read_vqa_csv(out / "M3D_VQA_train.csv", tmp_path) == []
    assert "1 questions of the train split are about cases of another" in card(out)


def test_slices_and_options_of_reading_need_preparation(tmp_path, capsys):
    write_slices(tmp_path / "in/p1/series", np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    (tmp_path / "in/p1/text.txt").write_text("A report.")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert run(listed(tmp_path / "list", ["a.nii.gz", "x"]), tmp_path / "flipped", "--flip", "D") == 0
    said = capsys.readouterr().out
    assert "this input has folders" in said and "without --flip" in said
    assert json.loads((tmp_path / "flipped/preparation.json").read_text())["reading"] == {"flip": "D"}


def test_the_card_of_a_raw_m3d_tree_counts_by_its_manifest(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        case = tmp_path / f"in/ct_case/{number:06d}"
        write_slices(case / "Axial", rng.integers(0, 255, (3, 6, 7), dtype=np.uint8))
        (case / "text.txt").write_text("study_findings: A finding.")
    entry = {"image": "M3D_Cap_npy/ct_case/000000/Axial.npy", "text": "M3D_Cap_npy/ct_case/000000/text.txt"}
    (tmp_path / "in/M3D_Cap.json").write_text(json.dumps({"train": [], "validation": [], "test": [entry]}))
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert row(tmp_path / "out", "cases") == ["0", "0", "1", "2", "3"] and "in none" in card(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.csv"))  # M3D's tables come with it


def test_a_volume_that_does_not_open_and_a_dry_run_leave_nothing(tmp_path, capsys):
    path = listed(tmp_path / "in", ["a.nii.gz", "x"])
    assert run(path, tmp_path / "out", "--dry_run") == 0 and "would link 1 volumes" in capsys.readouterr().out
    (tmp_path / "in/a.nii.gz").write_bytes(b"no gzip")
    assert run(path, tmp_path / "out") == 1
    assert "a.nii.gz" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run(path, tmp_path / "out", "--shard", "0/2") == 1 and "--shard" in capsys.readouterr().err
