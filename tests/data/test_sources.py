"""Importers on tiny trees in the layouts of the data sets: what becomes a case, what is left out, what is refused."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3dvlm.data.sources import SourceError, SourceOptions, collect
from med3dvlm.data.sources.base import draw_split, file_name, known_split
from med3dvlm.data.sources.spreadsheet import read_table
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


def test_ct_rate_tables_may_leave_the_ending_out(tmp_path):
    for table in (ct_rate(tmp_path, "") / "dataset").rglob("*.csv"):
        table.write_text(table.read_text().replace(".nii.gz", ""))
    (tmp_path / "dataset/metadata/no_chest_valid.txt").write_text("valid_9_b_1\n")
    found = collect(tmp_path, "auto", SourceOptions())
    assert [c.folder for c in found.cases if c.text] == ["train/train_1/train_1_a", "valid/valid_1/valid_1_a"]
    assert len(found.cases) == 2


def test_a_closed_question_without_choices_is_an_open_one(tmp_path):
    """And so is one without the letter of a choice."""
    start = ["Task1", "-", "train_1_a_1.nii.gz", "Is there a nodule?", "No", "Close"]
    ends = ["-", "-", "-", "-", "-"], ["-", "Yes", "No", "-", "-"], ["C", "Yes", "No", "-", "-"]
    table = write_table(tmp_path / "a.csv", [[*start, *end] for end in ends], RAD)
    found = collect(ct_rate(tmp_path / "ct"), "auto", SourceOptions(questions=table)).questions["train"]
    assert [(question.choices, question.answer_choice, question.answer) for question in found] == [((), "", "No")] * 3


def test_ct_rate_questions_of_its_own(tmp_path):
    talks = [
        {"image": "train_1_a_1.nii.gz", "conversations": [
            {"from": "human", "value": "<image>\nIs the heart large?<short_answer>"}, {"from": "gpt", "value": "No."},
            {"from": "human", "value": "<image> Write a report.<report_generation>"}, {"from": "gpt", "value": "..."}]},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello"}]},
    ]  # fmt: skip
    (ct_rate(tmp_path) / "dataset/vqa").mkdir()
    (tmp_path / "dataset/vqa/train_vqa.json").write_text(json.dumps(talks))
    found = collect(tmp_path, "auto", SourceOptions())
    (question,) = found.questions["train"]
    assert (question.question, question.answer) == ("Is the heart large?", "No.")
    assert any(note.startswith("2 entries of CT-RATE's vqa") for note in found.notes)


@pytest.mark.parametrize("talks", [
    "{", '{"a": 1}', "[3]", '[{"image": "x"}]', '[{"image": 3, "conversations": []}]',
    '[{"image": "x", "conversations": [{"from": "human", "value": 3}]}]',
])  # fmt: skip
def test_ct_rate_questions_of_another_form_are_refused(tmp_path, talks):
    (ct_rate(tmp_path) / "dataset/vqa").mkdir()
    (tmp_path / "dataset/vqa/valid_vqa.json").write_text(talks)
    with pytest.raises(SourceError, match="valid_vqa.json: expected a list"):
        collect(tmp_path, "auto", SourceOptions())


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
    ({"options": {"A": 1, "B": 2}}, "options A to D"),
])  # fmt: skip
def test_amos_mm_says_what_it_misses(tmp_path, changes, message):
    with pytest.raises(SourceError, match=message):
        collect(amos(tmp_path, **changes), "amos-mm", SourceOptions())


@pytest.mark.parametrize("form, flag", [
    ("volumes", {"questions": Path("x")}), ("volumes", {"reports": Path("x")}), ("volumes", {"columns": {"a": "x"}}),
    ("list", {"reports": Path("x")}), ("ct-rate", {"hash_ids": True}), ("amos-mm", {"columns": {"image": "x"}}),
])  # fmt: skip
def test_an_option_without_a_use_is_refused(tmp_path, form, flag):
    """What is asked for and would not happen: a table that is not read, names that are not hidden."""
    make = {"volumes": lambda p: write_nifti(p / "p/a.nii").parents[1], "list": lambda p: listed(p, ["a.nii.gz"]),
            "ct-rate": ct_rate, "amos-mm": amos}  # fmt: skip
    with pytest.raises(SourceError, match=f"--{next(iter(flag))}"):
        collect(make[form](tmp_path), "auto", SourceOptions(**flag))


LIST = ["image", "report", "split", "case", "question", "answer", "choice_a", "choice_b", "answer_choice"]


def listed(tmp_path, *rows, columns=LIST) -> Path:
    for name in ("a.nii.gz", "b.nii.gz", "more/a.nii.gz"):
        write_nifti(tmp_path / name)
    return write_table(tmp_path / "list.csv", [[*row, *[""] * (len(columns) - len(row))] for row in rows], columns)


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
