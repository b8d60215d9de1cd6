"""Importers on tiny trees in the layouts of the data sets: what becomes a case, what is left out, what is refused."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3dvlm.data.sources import SourceError, SourceOptions, collect, recognise
from med3dvlm.data.sources.base import draw_split, file_name, known_split, read_table
from tests.helpers.tiny_data import write_slices, write_table


def write_nifti(path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5) * np.float32(value)
    nib.save(nib.Nifti1Image(array, np.diag([1, 1, 2, 1])), path)
    return path


def sources_of(collection) -> dict[str, list[str]]:
    return {case.folder: [item.name for item in case.items] for case in collection.cases}


def ct_rate(root, release: str = "_fixed") -> Path:
    base = root / "dataset"
    for name in ("train_1_a_1", "train_1_a_2", "train_2_a_1", "valid_1_a_1", "valid_9_b_1"):
        split, patient, scan, _ = name.split("_")
        folder = base / f"{split}{release}" / f"{split}_{patient}" / f"{split}_{patient}_{scan}"
        write_nifti(folder / f"{name}.nii.gz")
    reports = base / "radiology_text_reports"
    write_table(reports / "train_reports.csv", [
        ["train_1_a_1.nii.gz", "Clear lungs.\nNo nodule.", "Normal.", "x"],
        ["train_1_a_2.nii.gz", "Clear lungs.\nNo nodule.", "Normal.", "x"],
        ["train_2_a_1.nii.gz", "Not given.", "Not given.", "x"],
        ["train_77_a_1.nii.gz", "Elsewhere.", "Not given.", "x"],
    ], ["VolumeName", "Findings_EN", "Impressions_EN", "Other"])  # fmt: skip
    write_table(reports / "validation_reports.csv", [["valid_1_a_1.nii.gz", "A nodule.", "Not given."]],
                ["VolumeName", "Findings_EN", "Impressions_EN"])  # fmt: skip
    (base / "metadata").mkdir()
    (base / "metadata" / "no_chest_valid.txt").write_text("valid_9_b_1.nii.gz\n")
    write_table(base / "metadata" / "train_metadata.csv", [["train_1_a_1.nii.gz", "2", "-8192"],
                ["train_1_a_2.nii.gz", "1", "-1024"]], ["VolumeName", "RescaleSlope", "RescaleIntercept"])  # fmt: skip
    write_table(base / "metadata" / "validation_metadata.csv", [["valid_1_a_1.nii.gz", "1", "0"]],
                ["VolumeName", "RescaleSlope", "RescaleIntercept"])  # fmt: skip
    return root


RAD = ["Task", "Subtask", "VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice"]
RAD += ["Choice A", "Choice B", "Choice C", "Choice D"]


def test_ct_rate_cases_reports_and_what_is_left_out(tmp_path):
    found = collect(ct_rate(tmp_path), "auto", SourceOptions())
    assert found.kind == "ct-rate"
    assert sources_of(found) == {
        "train/train_1/train_1_a": ["train_1_a_1", "train_1_a_2"],
        "train/train_2/train_2_a": ["train_2_a_1"],
        "valid/valid_1/valid_1_a": ["valid_1_a_1"],
    }
    texts = {case.folder: case.text for case in found.cases}
    assert texts["train/train_1/train_1_a"] == "Clear lungs. No nodule. Impression: Normal."
    assert texts["train/train_2/train_2_a"] is None
    assert texts["valid/valid_1/valid_1_a"] == "A nodule."
    assert [case.split for case in found.cases] == ["train", "train", "validation"]
    assert [Path(file).name for file, reason in found.left_out if "no chest" in reason] == ["valid_9_b_1.nii.gz"]
    assert any("train_77_a_1" in note for note in found.notes) and any("train_2_a_1" in note for note in found.notes)
    assert all(item.rescale is None for case in found.cases for item in case.items)  # HU already


@pytest.mark.parametrize("folder", ["CT-RATE", "copy_fixed"])
def test_ct_rate_first_release_is_rescaled_by_its_metadata(tmp_path, folder):
    found = collect(ct_rate(tmp_path / folder, ""), "auto", SourceOptions())
    rescale = {item.name: item.rescale for case in found.cases for item in case.items}
    assert rescale == {"train_1_a_1": (2, -8192), "train_1_a_2": (1, -1024), "valid_1_a_1": (1, 0)}
    assert any("train_2_a_1" in file and "RescaleSlope" in reason for file, reason in found.left_out)


def test_ct_rate_fixed_release_goes_before_the_first(tmp_path):
    ct_rate(tmp_path, "_fixed")
    first = write_nifti(tmp_path / "dataset/train/train_1/train_1_a/train_1_a_1.nii.gz")
    found = collect(tmp_path, "ct-rate", SourceOptions())
    paths = [item.path for case in found.cases for item in case.items]
    assert first not in paths and len(paths) == 4
    assert any("there twice" in reason for _, reason in found.left_out)


def test_ct_rate_reports_that_differ_get_cases_of_their_own(tmp_path):
    reports = ct_rate(tmp_path) / "dataset/radiology_text_reports/train_reports.csv"
    text = reports.read_text()
    reports.write_text(text[::-1].replace("No nodule."[::-1], "A nodule."[::-1], 1)[::-1])
    found = collect(tmp_path, "ct-rate", SourceOptions())
    assert {c.folder: c.text for c in found.cases if "train_1" in c.folder} == {
        "train/train_1/train_1_a_1": "Clear lungs. No nodule. Impression: Normal.",
        "train/train_1/train_1_a_2": "Clear lungs. A nodule. Impression: Normal.",
    }


def test_ct_rate_names_the_column_it_misses_and_those_it_found(tmp_path):
    write_table(ct_rate(tmp_path) / "dataset/radiology_text_reports/validation_reports.csv", [["x", "y"]],
                ["VolumeName", "Findings"])  # fmt: skip
    message = "validation_reports.csv: lacks the columns Findings_EN, Impressions_EN; it has VolumeName, Findings"
    with pytest.raises(SourceError, match=message):
        collect(tmp_path, "ct-rate", SourceOptions())


def test_3d_rad_questions_over_ct_rate(tmp_path):
    rad = tmp_path / "rad"
    write_table(rad / "train/Task1_Anomaly/a.csv", [
        ["Task1", "-", "train_1_a_1.nii.gz", "Is there a nodule?", "No", "Close", "B", "Yes", "No", "-", "-"],
        ["Task1", "-", "train_1_a_2", "What is seen?", "Clear lungs", "Open", "-", "-", "-", "-", "-"],
        ["Task1", "-", "train_500_a_1.nii.gz", "?", "No", "Close", "B", "Yes", "No", "-", "-"],
    ], RAD)  # fmt: skip
    write_table(rad / "test/Task2/x/b.csv", [
        ["Task2", "-", "test_1_a_1.nii.gz", "Is there a nodule?", "Yes", "Close", "A", "Yes", "No", "-", "-"],
    ], RAD)  # fmt: skip
    write_table(rad / "valid_path.csv", [["a", "b"]], ["VolumeName", "Path"])
    found = collect(ct_rate(tmp_path / "ct"), "auto", SourceOptions(questions=rad))
    assert {split: len(rows) for split, rows in found.questions.items()} == {"train": 2, "test": 1}
    closed, open_ended = found.questions["train"]
    assert closed.image == "train/train_1/train_1_a/train_1_a_1" and closed.choices == ("Yes", "No", "", "")
    assert (closed.answer, closed.answer_choice, closed.question_type) == ("No", "B", "Task1")
    assert open_ended.choices == () and open_ended.answer_choice == ""
    assert found.questions["test"][0].image == "valid/valid_1/valid_1_a/valid_1_a_1"
    assert any("train_500_a_1" in note for note in found.notes)


def test_ct_rate_questions_of_its_own(tmp_path):
    talks = [
        {"image": "train_1_a_1.nii.gz", "conversations": [
            {"from": "human", "value": "<image>\nIs the heart large?<short_answer>"}, {"from": "gpt", "value": "No."},
            {"from": "human", "value": "<image> Write a report.<report_generation>"}, {"from": "gpt", "value": "..."}]},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello"}]},
    ]  # fmt: skip
    (ct_rate(tmp_path) / "dataset/vqa").mkdir()
    (tmp_path / "dataset/vqa/train_vqa.json").write_text(json.dumps(talks))
    (question,) = collect(tmp_path, "auto", SourceOptions()).questions["train"]
    assert (question.question, question.answer) == ("Is the heart large?", "No.")


def amos(root, **changes) -> Path:
    for name in ("imagesTr/amos_0001", "imagesTr/amos_7008", "imagesVa/amos_7008", "imagesVa/amos_0600"):
        write_nifti(root / f"{name}.nii.gz")
    reports = {
        "training": [{"image": "./imagesTr/amos_0001.nii.gz", "findings": "A cyst."}],
        "validation": [{"image": "amos_0600", "findings": {"liver": "Normal.", "kidney": "A stone."}}],
    }
    questions = {"training": [{"image": "amos_0001.nii.gz", "question": "Which organ?", "answer": "B",
                               "options": {"A": "Liver", "B": "Kidney"}} | changes], "validation": []}  # fmt: skip
    (root / "report_generation_train_val.json").write_text(json.dumps(reports))
    (root / "vqa_train_val.json").write_text(json.dumps(questions))
    return root


def test_amos_mm(tmp_path):
    found = collect(amos(tmp_path), "auto", SourceOptions())
    assert found.kind == "amos-mm"
    assert [(c.folder, c.split, c.text) for c in found.cases] == [
        ("train/amos_0001", "train", "A cyst."),
        ("validation/amos_0600", "validation", "Normal. A stone."),
        ("validation/amos_7008", "validation", None),
    ]
    assert "imagesVa" in str(found.cases[2].items[0].path)  # in both folders: validation
    (question,) = found.questions["train"]
    assert (question.answer, question.answer_choice, question.choices) == ("Kidney", "B", ("Liver", "Kidney", "", ""))


@pytest.mark.parametrize("changes, message", [
    ({"answer": "Spleen"}, "none of the options"),
    ({"question": None}, "lacks question; it has image, question, answer, options"),
    ({"image": 3}, "lacks image"),
    ({"options": {"1": "x"}}, "options A to D"),
])  # fmt: skip
def test_amos_mm_says_what_it_misses(tmp_path, changes, message):
    with pytest.raises(SourceError, match=message):
        collect(amos(tmp_path, **changes), "amos-mm", SourceOptions())


def test_a_tree_of_volumes_by_folder(tmp_path):
    for name in ("p1/visit/t1.nii.gz", "p1/visit/t2.nii.gz", "p2/scan.mha", "p2/scan.nii.gz", "p3/a b.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    write_slices(tmp_path / "p4/series", np.zeros((3, 4, 5), np.uint8))
    (tmp_path / "p4/text.txt").write_text("A report.")
    found = collect(tmp_path, "auto", SourceOptions())
    assert found.kind == "volumes"
    assert sources_of(found) == {
        "p1/visit": ["t1", "t2"], "p2": ["scan.mha", "scan.nii.gz"], "p3": ["a_b"], "p4": ["series"],
    }  # fmt: skip
    assert [case.group for case in found.cases] == ["p1", "p2", "p3", "p4"]
    assert found.cases[3].text_file == tmp_path / "p4/text.txt"


def test_flat_and_split_folders_and_reports_by_name(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_nifti(tmp_path / split / f"{split}_{name}.nii.gz")
    (tmp_path / "train/train_a.txt").write_text("Of a.")
    found = collect(tmp_path, "auto", SourceOptions())
    assert sorted(sources_of(found)) == ["test/test_a", "test/test_b", "train/train_a", "train/train_b"]
    assert {case.split for case in found.cases if case.folder.startswith("test")} == {"test"}
    assert next(c for c in found.cases if c.folder == "train/train_a").text_file == tmp_path / "train/train_a.txt"
    flat = collect(tmp_path / "train", "auto", SourceOptions())
    assert {(case.folder, case.group) for case in flat.cases} == {("train_a", "train_a"), ("train_b", "train_b")}


def test_pairs_are_one_volume_and_other_files_none(tmp_path):
    for name in ("a.hdr", "a.img", "notes.txt", "table.csv", "logo.png", ".hidden.nii"):
        (tmp_path / name).write_bytes(b"")
    assert sources_of(collect(tmp_path, "volumes", SourceOptions())) == {"a": ["a"]}


def test_hashed_names_of_volumes(tmp_path):
    write_nifti(tmp_path / "Jane Doe/scan_of_jane.nii.gz")
    options = SourceOptions(key_file=tmp_path.parent / "key", hash_ids=True)
    (case,) = collect(tmp_path, "volumes", options).cases
    assert case.hidden and "jane" not in f"{case.folder} {case.items[0].name}".lower()
    assert collect(tmp_path, "volumes", options).cases[0].folder == case.folder
    (tmp_path.parent / "key").unlink()
    assert collect(tmp_path, "volumes", options).cases[0].folder != case.folder


LIST = ["image", "report", "split", "case", "question", "answer", "choice_a", "choice_b", "answer_choice"]


def listed(tmp_path, *rows, columns=LIST) -> Path:
    for name in ("a.nii.gz", "b.nii.gz", "more/a.nii.gz"):
        write_nifti(tmp_path / name)
    return write_table(tmp_path / "list.csv", [[*row, *[""] * (len(columns) - len(row))] for row in rows], columns)


def test_a_list_of_volumes_reports_and_questions(tmp_path):
    path = listed(
        tmp_path, ["a.nii.gz", "Of a.", "train", "p1", "Which organ?", "Liver", "Kidney", "Liver", "B"],
        ["a.nii.gz", "", "", "", "What is seen?", "A cyst"], ["more/a.nii.gz", "Of a.", "training", "p1"],
        ["b.nii.gz", "Of b.", "val", "p2"],
    )  # fmt: skip
    assert recognise(path) == "list"
    found = collect(path, "auto", SourceOptions())
    assert sources_of(found) == {"p1": ["a", "more_a"], "p2": ["b"]}
    assert [(case.text, case.split) for case in found.cases] == [("Of a.", "train"), ("Of b.", "validation")]
    closed, open_ended = found.questions["train"]
    assert (closed.image, closed.choices, closed.answer_choice) == ("p1/a", ("Kidney", "Liver", "", ""), "B")
    assert open_ended.choices == ()


def test_a_list_with_other_names_and_as_json_lines(tmp_path):
    listed(tmp_path, ["a.nii.gz"])
    path = tmp_path / "list.jsonl"
    path.write_text('{"Datei": "a.nii.gz", "Befund": "Frei."}\n\n{"Datei": "b.nii.gz", "Befund": null}\n')
    for text in ("text", "report"):
        cases = collect(path, "list", SourceOptions(columns={"image": "Datei", text: "Befund"})).cases
        assert [(case.folder, case.text) for case in cases] == [("a", "Frei."), ("b", None)]
    with pytest.raises(SourceError, match="lacks the column image .*it has Datei, Befund"):
        collect(path, "list", SourceOptions())


@pytest.mark.parametrize("rows, message", [
    ([["c.nii.gz", "x"]], r"row 1: c\.nii\.gz does not exist"),
    ([["", "x"]], "row 1: names no image"),
    ([["a.nii.gz", "x", "holdout"]], "row 1: unknown split 'holdout'"),
    ([["a.nii.gz", "x", "train", "p1"], ["b.nii.gz", "x", "test", "p1"]], "row 1 and row 2: one case in the splits"),
    ([["a.nii.gz", "x"], ["a.nii.gz", "y"]], r"row 2: a\.nii\.gz has another text than in row 1"),
    ([["a.nii.gz", "x", "train", "p", "Which?", ""]], "row 1: a question without an answer"),
    ([["a.nii.gz", "x", "train", "p", "Which?", "Liver", "Kidney", "Liver", "A"]], "row 1: answer_choice 'A' is not"),
])  # fmt: skip
def test_a_list_is_checked_before_anything_is_done(tmp_path, rows, message):
    with pytest.raises(SourceError, match=message):
        collect(listed(tmp_path, *rows), "list", SourceOptions())


def test_m3d_with_one_case_in_both_folders_keeps_to_one_group(tmp_path):
    for split in ("ct_case", "ct_quizze"):
        write_slices(tmp_path / "M3D_Cap" / split / "000007/Axial", np.zeros((3, 4, 5), np.uint8))
    found = collect(tmp_path, "auto", SourceOptions())
    assert found.kind == "m3d"
    assert [(case.folder, case.group) for case in found.cases] == [
        ("ct_case/000007", "000007"),
        ("ct_quizze/000007", "000007"),
    ]


def test_nothing_known_says_what_was_looked_for(tmp_path):
    with pytest.raises(SourceError, match="M3D.*CT-RATE.*AMOS-MM.*list.*any volume"):
        collect(tmp_path, "auto", SourceOptions())
    with pytest.raises(SourceError, match="no such file or folder"):
        collect(tmp_path / "x", "auto", SourceOptions())


def test_cases_that_would_share_a_folder_are_refused(tmp_path):
    for name in ("a b", "a_b"):
        write_nifti(tmp_path / name / "x" / "scan.nii.gz")
    with pytest.raises(SourceError, match="a_b/x; rename"):
        collect(tmp_path, "auto", SourceOptions())


def test_splits_are_drawn_by_group_alone_and_in_proportion():
    drawn = [draw_split(f"patient {n}", (0.7, 0.1, 0.2)) for n in range(3000)]
    assert drawn == [draw_split(f"patient {n}", (0.7, 0.1, 0.2)) for n in range(3000)]
    shares = [drawn.count(split) / 3000 for split in ("train", "validation", "test")]
    assert np.allclose(shares, (0.7, 0.1, 0.2), atol=0.03)
    assert {draw_split(str(n), (1, 0, 0)) for n in range(100)} == {"train"}


def test_names_and_tables(tmp_path):
    assert file_name("Thórax / C+ (axial)") == "Thorax_C_axial" and file_name("../..") == "unnamed"
    assert known_split("Valid", "x") == "validation"
    (tmp_path / "t.csv").write_text("\ufeffa,b\n1,\n", encoding="utf-8")
    assert read_table(tmp_path / "t.csv", ("a",)) == [{"a": "1", "b": ""}]
    for name, text in (("x.jsonl", "[1]"), ("x.json", "{"), ("x.csv", "\xff")):
        (tmp_path / name).write_text(text, encoding="latin-1")
        with pytest.raises(SourceError, match=name):
            read_table(tmp_path / name, ("a",))
