"""Manifests: reading, missing files, renaming."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from med3dvlm.data import manifest
from med3dvlm.data.manifest import ManifestError, read_caption_manifest, read_vqa_csv, rename_manifest
from tests.helpers.tiny_data import VQA_COLUMNS, write_prepared_tree, write_table

COMMAND = Path(manifest.__file__).parents[2] / "utls" / "rename_csv.py"
ROW = ["a.nii.gz", "a, \"b\"\nsecond line", 4, "What is it?", "cyst", "None", "NA", "", "None", "B"]


@pytest.fixture
def root(tmp_path):
    return write_prepared_tree(tmp_path / "root")


def rename_main():
    spec = importlib.util.spec_from_file_location("rename_csv", COMMAND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_caption_records(root):
    records = read_caption_manifest(root / "M3D_Cap_npy/M3D_Cap.json", root, "test")
    assert [Path(r.image).is_file() for r in records] == [True, True]
    assert records[1].row == "test[1]" and "case 3" in records[1].read_text()


def test_cells_are_text(tmp_path):
    """"None" and "NA" are words; only as a choice does "NA", or nothing, mean that there is none."""
    (tmp_path / "a.nii.gz").touch()
    (record,) = read_vqa_csv(write_table(tmp_path / "q.csv", [ROW]), tmp_path)
    assert record.choices == ("cyst", "None", None, None)
    assert (record.answer, record.answer_choice, record.question_type) == ("None", "B", 4)
    answer = ROW[:8] + ["NA", "C"]
    (record,) = read_vqa_csv(write_table(tmp_path / "q.csv", [answer]), tmp_path)
    assert record.answer == "NA"


@pytest.mark.parametrize("choices, answer, chosen, expected", [
    (["cyst", "NA", "NA", "NA"], "NA", "B", ("cyst", "NA", None, None)),  # a right choice that reads so is one
    (["cyst", "NA", "NA", "NA"], "NA ", " B", ("cyst", "NA", None, None)),
    (["cyst", "NA", "NA", "NA"], "cyst", "A", ("cyst", None, None, None)),
    (["cyst", "NA", "NA", "NA"], "mass", "B", ("cyst", None, None, None)),  # a contradiction
    (["cyst", "", "", ""], "", "B", ("cyst", None, None, None)),
])  # fmt: skip
def test_the_right_choice_may_read_na(tmp_path, choices, answer, chosen, expected):
    table = write_table(tmp_path / "q.csv", [[*ROW[:4], *choices, answer, chosen]])
    assert read_vqa_csv(table, tmp_path, check_files=False)[0].choices == expected


@pytest.mark.parametrize("choices, chosen, letter", [
    (["Yes", "No", "", ""], "Yes", "A"), (["Yes", "No", "", ""], " no. ", "B"), (["Yes", "No", "", ""], "B", "B"),
    (["Yes", "yes", "", ""], "Yes", "Yes"), (["Yes", "No", "", ""], "Maybe", "Maybe"),  # none, or not one alone
    (["B", "A", "", ""], "A", "A"), (["B", "C", "", ""], "b", "b"),  # a letter is a letter, or nobody knows
    (["Yes", " ", "", ""], "", ""), (["Yes", "NA", "", ""], "NA", "NA"),
])  # fmt: skip
def test_a_choice_named_by_its_text_gets_its_letter(tmp_path, choices, chosen, letter):
    table = write_table(tmp_path / "q.csv", [[*ROW[:4], *choices, "Yes", chosen]])
    (record,) = read_vqa_csv(table, tmp_path, check_files=False)
    assert record.answer_choice == letter
    if letter in record.letters:
        manifest.check_closed([record])


def test_index_and_note_columns_and_byte_order_mark(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    path = write_table(tmp_path / "q.csv", [[7, *ROW, "a note"]], ["", *VQA_COLUMNS, "Note"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_vqa_csv(path, tmp_path)[0].question == "What is it?"


def test_missing_files_are_named_with_manifest_and_row(root):
    json_path, csv_path = root / "M3D_Cap_npy/M3D_Cap.json", root / "M3D-VQA/M3D_VQA_test.csv"
    record = read_vqa_csv(csv_path, root)[1]
    Path(record.image).unlink()
    with pytest.raises(ManifestError, match=r"M3D_VQA_test\.csv, row 1 \(line 3\): .*000003/Axial_C\.nii\.gz"):
        read_vqa_csv(csv_path, root)
    with pytest.raises(ManifestError, match=r"M3D_Cap\.json, row test\[1\]: .*000003/Axial_C\.nii\.gz"):
        read_caption_manifest(json_path, root, "test")
    assert len(read_vqa_csv(csv_path, root, check_files=False)) == 2
    (root / "M3D_Cap_npy/ct_case/000002/text.txt").unlink()
    with pytest.raises(ManifestError, match=r"000002/text\.txt does not exist \(and 1 more\)"):
        read_caption_manifest(json_path, root, "test")


def test_forgotten_renaming_is_pointed_out(root):
    path = root / "M3D_Cap_npy/M3D_Cap.json"
    path.write_text(path.read_text().replace(".nii.gz", ".npy"))
    with pytest.raises(ManifestError, match="utls/rename_csv.py"):
        read_caption_manifest(path, root, "train")


@pytest.mark.parametrize("content, reason", [
    ("{", "cannot be read"), ("[]", "expected a list under 'test', found list"), ('{"train": []}', "found train"),
    ('{"test": [{"image": "x"}]}', r"row test\[0\]"),
])  # fmt: skip
def test_bad_json(tmp_path, content, reason):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(ManifestError, match=reason):
        read_caption_manifest(tmp_path / "m.json", tmp_path, "test")


def test_bad_csv(tmp_path):
    with pytest.raises(ManifestError, match="cannot be read"):
        read_vqa_csv(tmp_path / "none.csv", tmp_path)
    with pytest.raises(ManifestError, match="lacks the columns Question Type, Answer Choice"):
        read_vqa_csv(write_table(tmp_path / "q.csv", [], ["Image Path", "Question", "Answer"]), tmp_path)
    with pytest.raises(ManifestError, match=r"row 0 \(line 3\): ends before the column Answer"):
        read_vqa_csv(write_table(tmp_path / "q.csv", [ROW[:6]]), tmp_path)
    with pytest.raises(ManifestError, match=r"q.csv, row 1 \(line 5\): more cells than columns; .* quotes$"):
        read_vqa_csv(write_table(tmp_path / "q.csv", [[*ROW, "", ""], [*ROW, "more"]]), tmp_path)


def test_no_error_repeats_what_a_manifest_says_about_a_patient(tmp_path):
    """A report with commas and without quotes moves its pieces into other columns, and no heading makes a row one."""
    (tmp_path / "commas.csv").write_text(f"{','.join(VQA_COLUMNS)}\na,,1,Where?,a,b,,,A mass, in Secret,B\n")
    (tmp_path / "moved.csv").write_text(f"{','.join(VQA_COLUMNS)}\na,,1,Where,is it?,a,b,,,Secret\n")
    (tmp_path / "heading.csv").write_text("a,,1,How is Secret?,a,b,,,b,B\n")
    for name in ("commas", "moved", "heading"):
        with pytest.raises(ManifestError) as error:
            manifest.check_closed(read_vqa_csv(tmp_path / f"{name}.csv", tmp_path, check_files=False))
        assert f"{name}.csv" in str(error.value) and "Secret" not in str(error.value)
    (tmp_path / "m.json").write_text('{"train": [{"image": "a", "report": "Secret"}]}')
    with pytest.raises(ManifestError, match=r"row train\[0\]") as error:
        read_caption_manifest(tmp_path / "m.json", tmp_path, "train")
    assert "Secret" not in str(error.value)


@pytest.mark.parametrize("letter", ["C", "E", "NA", "", "a", "(A)", "AB"])
def test_a_closed_question_names_one_of_its_choices(tmp_path, letter):
    table = write_table(tmp_path / "q.csv", [ROW, [*ROW[:9], letter], [*ROW[:9], letter]])
    records = read_vqa_csv(table, tmp_path, check_files=False)
    manifest.check_closed(records[:1])
    shown = repr(letter) if len(letter) <= 2 else f"(a text of {len(letter)} characters)"
    expected = f"q.csv, row 1 (line 5): Answer Choice {shown} is none of its choices (A, B) (and 1 more)"
    with pytest.raises(ManifestError, match=re.escape(expected)):
        manifest.check_closed(records)


def test_a_table_without_choices_is_not_closed(tmp_path):
    table = write_table(tmp_path / "q.csv", [[*ROW[:4], "NA", "", "NA", "NA", "cyst", "A"]])
    with pytest.raises(ManifestError, match=r"q.csv, row 0 .*it has none\).*LoRA stage .*--vqa_yn_data.*--close_ended"):
        manifest.check_closed(read_vqa_csv(table, tmp_path, check_files=False))


def test_rename_changes_the_path_column_only(tmp_path):
    """Other text that mentions .npy, quotes, line breaks and "NA" stay; a second run changes nothing."""
    text = "stored as x.npy, \"quoted\"\nmore"
    row = ["ct_case/1/A.npy.npy", text, 1, "Is it x.npy?", "a.npy", "NA", "None", "", "x.npy", "A"]
    path = write_table(tmp_path / "q.csv", [row, ["b.nii.gz", *row[1:]]])
    expected = write_table(tmp_path / "e.csv", [["ct_case/1/A.npy.nii.gz", *row[1:]], ["b.nii.gz", *row[1:]]])
    assert rename_manifest(path) == 1
    assert path.read_bytes() == expected.read_bytes()
    assert rename_manifest(path) == 0
    assert path.read_bytes() == expected.read_bytes()


def test_rename_json(tmp_path):
    data = {"train": [{"image": "M3D_Cap_npy/ct_case/1/X.npy", "text": "M3D_Cap_npy/ct_case/1/text.npy"}], "test": []}
    (tmp_path / "m.json").write_text(json.dumps(data))
    assert rename_manifest(tmp_path / "m.json") == 1
    data["train"][0]["image"] = "M3D_Cap_npy/ct_case/1/X.nii.gz"
    assert json.loads((tmp_path / "m.json").read_text()) == data
    before = (tmp_path / "m.json").read_bytes()
    assert rename_manifest(tmp_path / "m.json") == 0 and (tmp_path / "m.json").read_bytes() == before


def test_rename_command_takes_both_forms_files_and_folders(tmp_path, capsys):
    main = rename_main()
    for name in ("a.csv", "b.csv", "folder/c.csv"):
        write_table(tmp_path / name, [["x.npy", *ROW[1:]]])
    (tmp_path / "folder/m.json").write_text('{"train": [{"image": "x.npy", "text": "t"}]}')
    paths = [str(tmp_path / name) for name in ("a.csv", "b.csv", "folder")]
    assert main([paths[0], "--csv_path", *paths[1:]]) == 0
    assert capsys.readouterr().out.count("1 paths changed") == 4
    assert main(["--csv_path", *paths]) == 0
    assert capsys.readouterr().out.count("0 paths changed") == 4
    assert main([str(tmp_path / "missing.csv")]) == 1
    assert "missing.csv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


def test_a_byte_order_mark_stays_and_does_not_matter(tmp_path, capsys):
    (tmp_path / "q.csv").write_bytes(b'\xef\xbb\xbf"Image Path","Answer"\r\n"a.npy","x.npy"\r\n')
    (tmp_path / "m.json").write_bytes(b'\xef\xbb\xbf{"train": [{"image": "a.npy", "text": "t"}]}')
    assert rename_main()([str(tmp_path)]) == 0 and capsys.readouterr().out.count("1 paths changed") == 2
    assert (tmp_path / "q.csv").read_bytes() == b"\xef\xbb\xbfImage Path,Answer\r\na.nii.gz,x.npy\r\n"


def test_other_files_in_a_folder_of_manifests_are_no_failure(tmp_path, capsys):
    write_table(tmp_path / "unmatched.csv", [["a", "b"]], ["name", "reason"])
    (tmp_path / "preparation.json").write_text('{"dtype": "uint8"}')
    write_table(tmp_path / "q.csv", [["x.npy", *ROW[1:]]])
    assert rename_main()(["--csv_path", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.count("paths changed") == 1 and not said.err
    assert rename_main()([str(tmp_path / "unmatched.csv")]) == 1  # a file that is named should be one
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        rename_main()([str(tmp_path / "empty")])


@pytest.mark.parametrize("name", ["q.csv", "m.json"])
def test_a_manifest_that_cannot_be_replaced_is_a_sentence(tmp_path, name, monkeypatch, capsys):
    write_table(tmp_path / "q.csv", [["x.npy", *ROW[1:]]])
    (tmp_path / "m.json").write_text('{"train": [{"image": "x.npy", "text": "t"}]}')

    def read_only(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    assert rename_main()(["--csv_path", str(tmp_path / name)]) == 1
    assert f"{name}: cannot be renamed ([Errno 13] Permission denied)" in capsys.readouterr().err


def test_interrupted_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_table(tmp_path / "q.csv", [["x.npy", *ROW[1:]]])
    before = path.read_bytes()

    def full_disk(source, target):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(ManifestError, match="no space left"):
        rename_manifest(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["q.csv"]


def test_rename_keeps_the_first_backup_and_says_what_points_to_nothing(tmp_path, capsys):
    for name in ("x/a.nii.gz", "x/b.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    rows = [[f"x/{name}.npy", "", 1, "?", *"ABCD", "A", "A"] for name in ("a", "a", "b", "gone")]
    path = write_table(tmp_path / "tables" / "M3D_VQA_train.csv", rows)
    before, main = path.read_bytes(), rename_main()
    assert main([str(path)]) == 0
    assert "4 paths changed, 1 of 4 point to no file" in capsys.readouterr().out
    assert path.with_name("M3D_VQA_train.csv.bak").read_bytes() == before
    assert main(["--csv_path", str(path.parent), "--data_root", str(tmp_path / "elsewhere")]) == 0
    assert "0 paths changed, 4 of 4 point to no file" in capsys.readouterr().out
    assert path.with_name("M3D_VQA_train.csv.bak").read_bytes() == before
