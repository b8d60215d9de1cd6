"""Contact sheet: the right cases with their texts, escaped, the same for the same seed."""

import pytest

from med3dvlm.data import preview
from med3dvlm.data.checks.inputs import find_inputs
from tests.helpers.tiny_data import write_prepared_tree


@pytest.fixture
def tree(tmp_path):
    return write_prepared_tree(tmp_path / "data", cases=12)


def test_a_page_with_planes_reports_and_questions(tree, capsys):
    assert preview.main([str(tree), "--cases", "4", "--side", "32"]) == 0
    page = (tree / "preview.html").read_text("utf-8")
    assert str(tree / "preview.html") in capsys.readouterr().out
    assert page.count("<section>") == page.count("data:image/png;base64,") == 4
    assert page.count("A small lesion is seen.") == 4
    assert page.count("Which plane is shown?") == 4 + sum(page.count(f"<p>{s}</p>") for s in ("validation", "test"))
    assert "A. Axial  B. Coronal  C. Sagittal" in page
    assert {f"<p>{split}</p>" in page for split in ("train", "validation", "test")} == {True}


def test_the_sample_is_seeded_and_spread_over_splits(tree):
    inputs = find_inputs(tree)
    drawn = preview.draw(inputs, 6, 0)
    assert drawn == preview.draw(inputs, 6, 0) != preview.draw(inputs, 6, 1)
    assert [split for split, _ in drawn].count("train") == 2 and len({image for _, image in drawn}) == 6
    assert len(preview.draw(inputs, 100, 0)) == 12  # each case once, also the ones in two splits


def test_texts_are_escaped_and_bad_files_said(tree, capsys):
    folders = sorted((tree / "M3D_Cap_npy" / "ct_case").iterdir())
    for folder in folders:
        (folder / "text.txt").write_text("<script>alert(1)</script> & more")
    next(folders[0].glob("*.nii.gz")).write_bytes(b"no volume")
    next(folders[1].glob("*.nii.gz")).unlink()
    (folders[2] / "text.txt").unlink()
    assert preview.main([str(tree), "--cases", "12", "--output", str(tree / "look.html")]) == 1
    page, err = (tree / "look.html").read_text("utf-8"), capsys.readouterr().err
    assert "<script" not in page and page.count("&lt;script&gt;") == 11
    assert page.count("class=error") == err.count("warning: ") == 3
    assert "alert" not in err


def test_wrong_arguments(tree, tmp_path, capsys):
    assert preview.main([str(tmp_path / "absent")]) == 2
    (tree / "M3D_Cap_npy" / "M3D_Cap.json").write_text("{")
    for table in (tree / "M3D-VQA").iterdir():
        table.unlink()
    assert preview.main([str(tree)]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    for flags in (["--cases", "0"], ["--side", "3"]):
        with pytest.raises(SystemExit):
            preview.main([str(tree), *flags])
