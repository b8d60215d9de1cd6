"""Lists as people write them: with Excel, pandas or by hand, on Windows too. Read as meant, or refused by row."""

import json

import pytest

from med3dvlm.data.sources import SourceError, SourceOptions, collect, recognise
from med3dvlm.data.sources.base import file_name
from med3dvlm.data.sources.spreadsheet import read_table
from tests.data.test_sources import listed, sources_of, write_nifti
from tests.helpers.tiny_data import write_table

TABLE = [{"image": "a.nii.gz", "report": "Größe 4, 5 mm"}, {"image": "b.nii.gz", "report": ""}]


@pytest.fixture
def scans(tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        write_nifti(tmp_path / f"{name}.nii.gz", number + 1)
    return tmp_path


def of(scans, rows, heading, **options):
    return collect(write_table(scans / "list.csv", rows, heading), "list", SourceOptions(**options))


@pytest.mark.parametrize("name, content", [
    ("comma.csv", 'image,report\r\na.nii.gz,"Größe 4, 5 mm"\r\nb.nii.gz,\r\n'),
    ("semicolon.csv", "image;report\na.nii.gz;Größe 4, 5 mm\nb.nii.gz;\n"),
    ("tab.tsv", "image\treport\na.nii.gz\tGröße 4, 5 mm\nb.nii.gz\n"),
    ("mark.csv", '\ufeffimage,report\na.nii.gz,"Größe 4, 5 mm"\nb.nii.gz,nan\n'),
    ("empty rows and columns.csv", ' image ,report,,\n"a.nii.gz ","Größe 4, 5 mm",,\n,,,\n\nb.nii.gz\n,\n'),
    ("lines.jsonl", '{"image": "a.nii.gz", "report": "Größe 4, 5 mm"}\n\n{"image": "b.nii.gz", "report": NaN}\n'),
    ("list.json", '\ufeff[{"image": "a.nii.gz", "report": "Größe 4, 5 mm"}, {"image": "b.nii.gz", "report": null}]'),
])  # fmt: skip
def test_spellings_of_one_table(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_table(path, ("image", "report")) == TABLE


def test_an_excel_sheet(tmp_path):
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is missing: pip install -r requirements-cpu.txt")
    book = openpyxl.Workbook()
    for row in (["image", "report", "n"], ["a.nii.gz", "NA", 7], ["b.nii.gz", None, "007"]):
        book.active.append(row)
    book.save(tmp_path / "list.xlsx")
    assert [tuple(row.values()) for row in read_table(tmp_path / "list.xlsx")] == [
        ("a.nii.gz", "NA", "7"), ("b.nii.gz", "", "007"),
    ]  # fmt: skip
    (tmp_path / "list.xlsx").write_bytes((tmp_path / "list.xlsx").read_bytes()[:900])
    with pytest.raises(SourceError, match="cannot be read as a table"):
        read_table(tmp_path / "list.xlsx")


def test_what_json_may_hold(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": "x\u2028y\x85z", "b": 5.0, "c": 7}, ensure_ascii=False) + "\n")
    assert read_table(tmp_path / "x.jsonl") == [{"a": "x\u2028y\x85z", "b": "5", "c": "7"}]


@pytest.mark.parametrize("name, content, message", [
    ("x.csv", "image,report\na.nii.gz,A stone, 4 mm\n", "line 2: more cells than columns; texts with ','"),
    ("x.csv", 'image,report\na.nii.gz,"A stone\nb.nii.gz,No finding\n', "line 3: unexpected end of data"),
    ("x.csv", 'image,report\na.nii.gz,"A "large" stone"\n', "line 2: .*expected after"),
    ("x.csv", "image,report,report\na.nii.gz,x,y\n", "two columns report"),
    ("x.csv", "image,report\na.nii.gz,gro\xdf\n", "is not UTF-8 text .*; save it as UTF-8"),
    ("x.jsonl", '{"image": "a.nii.gz"}\n{"image": }\n', "line 2: Expecting value"),
    ("x.jsonl", '{"image": "a.nii.gz", "report": {"lung": ""}}\n', "row 1, report: expected a text .*found a dict"),
    ("x.json", '{"image": "a.nii.gz"}', "expected a list of objects"),
])  # fmt: skip
def test_a_table_that_would_be_misread_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(SourceError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize("name", ["PatientID", "patient id", "Patient_ID", "SUBJECT", "Case"])
def test_the_column_of_patients_is_found(scans, name):
    found = of(scans, [["a.nii.gz", "7"], ["b.nii.gz", "7"]], ["image", name])
    assert sources_of(found) == {"7": ["a", "b"]} and not found.notes


def test_patients_go_before_cases(scans):
    """Two cases of one patient: dividing them between splits would be a leak."""
    rows = [["c1", "p", "a.nii.gz", "x"], ["c2", "p", "b.nii.gz", "y"]]
    found = of(scans, rows, ["case_id", "patient_id", "image", "report"])
    assert {case.group for case in found.cases} == {"p"} and len(found.cases) == 2
    assert found.notes == ["columns that are not read: case_id (--columns gives them a meaning)"]
    assert {c.group for c in of(scans, rows, ["k", "p", "image", "t"], columns={"Patient ID": "p"}).cases} == {"p"}


def test_one_file_is_one_volume_however_it_is_written(scans):
    (scans / "more").mkdir()
    names = ["a.nii.gz", "./a.nii.gz", "more/../a.nii.gz", str(scans / "a.nii.gz"), ".\\a.nii.gz"]
    found = of(scans, [[name, "p1", f"Question {n}?", "yes"] for n, name in enumerate(names)],
               ["image", "patient", "question", "answer"])  # fmt: skip
    assert sources_of(found) == {"p1": ["a"]} and len(found.questions[""]) == len(names)
    with pytest.raises(SourceError, match=r"row 1: C:/scans/a.nii.gz does not exist"):
        of(scans, [["C:\\scans\\a.nii.gz"]], ["image"])


def test_texts_in_the_place_of_a_name_are_a_problem_not_a_crash(scans):
    with pytest.raises(SourceError, match="row 1: A long.*does not exist"):
        of(scans, [["A long report. " * 40]], ["image"])


QUESTION = ["image", "question", "answer", "choice a", "choice b", "Choice_C", "answer choice"]


@pytest.mark.parametrize("answer, choices, letter, expected", [
    ("liver", ["kidney", "liver", ""], "", ("liver", "B")),
    ("B", ["kidney", "liver", "NA"], "", ("liver", "B")),
    ("", ["kidney", "liver", ""], "A", ("kidney", "A")),
    ("No", ["Yes", "No", ""], "No", ("No", "B")),  # as in M3D's yes / no tables
    ("A", ["B", "A", ""], "", ("A", "B")),
    ("B", ["B", "A", ""], "A", ("B", "A")),
    ("None", ["None", "liver", ""], "A", ("None", "A")),
    ("a cyst", ["NA", "NA", "NA"], "", ("a cyst", "")),
])  # fmt: skip
def test_answer_and_letter_follow_from_each_other(scans, answer, choices, letter, expected):
    (question,) = of(scans, [["a.nii.gz", "Q?", answer, *choices, letter]], QUESTION).questions[""]
    assert (question.answer, question.answer_choice) == expected
    assert question.choices == (() if choices[0] == "NA" else tuple(c if c != "NA" else "" for c in choices) + ("",))


@pytest.mark.parametrize("row, message", [
    (["a.nii.gz", "Q?", "spleen", "kidney", "liver", "", ""], "row 1: answer_choice '' is not the choice 'spleen'"),
    (["a.nii.gz", "Q?", "liver", "kidney", "liver", "", "C"], "row 1: answer_choice 'C' is not the choice 'liver'"),
    (["a.nii.gz", "", "liver", "", "", "", ""], "row 1: an answer without a question"),
])  # fmt: skip
def test_answers_that_fit_nothing_are_refused(scans, row, message):
    with pytest.raises(SourceError, match=message):
        of(scans, [row], QUESTION)


def test_names_in_other_alphabets_stay_apart(scans):
    for name in ("患者甲", "患者乙", "Łuk", "Luk"):
        write_nifti(scans / f"{name}.nii.gz")
    found = of(scans, [[f"{name}.nii.gz"] for name in ("患者甲", "患者乙", "Łuk", "Luk")], ["image"])
    folders = [case.folder for case in found.cases]
    assert len(set(folders)) == 4 and folders[3] == "Luk" and all(folder.isascii() for folder in folders)
    assert file_name("Thórax") == "Thorax"  # nothing is lost but the accent


def test_hashed_names_of_a_list_do_not_depend_on_its_order(scans, tmp_path):
    options = {"hash_ids": True, "key_file": tmp_path / "key"}
    images = {}
    for rows in ([["a.nii.gz", "Jane"]], [["b.nii.gz", "Jane"], ["a.nii.gz", "Jane"]]):
        (case,) = of(scans, rows, ["image", "patient"], **options).cases
        images |= {item.name: {item.path.name} | images.get(item.name, set()) for item in case.items}
        assert "Jane" not in f"{case}".replace(str(scans), "")
    assert len(images) == 2 and all(len(paths) == 1 for paths in images.values())


def test_a_report_is_one_line(scans):
    (case,) = of(scans, [["a.nii.gz", 'First.\r\nSecond "line".\n']], ["image", "report"]).cases
    assert case.report() == 'First. Second "line".'


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
