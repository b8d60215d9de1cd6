from pathlib import Path

import pytest
from nibabel.testing import data_path

from med3dvlm import demo
from tests.helpers.tiny_data import write_prepared_tree
from tests.helpers.tiny_model import TINY_SIZE, write_tiny_clip, write_tiny_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm"))


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    root = write_prepared_tree(tmp_path_factory.mktemp("data"), cases=2, size=TINY_SIZE)
    return str(next(root.glob("M3D_Cap_npy/ct_case/*/*.nii.gz")))


def arguments(model, scan):
    return ["--model_name_or_path", model, "--image_path", scan, "--question", "Where?", "--max_new_tokens", "5",
            "--device", "cpu"]  # fmt: skip


def test_prints_the_answer_and_the_notice(model, scan, capsys):
    answer = demo.main(arguments(model, scan))
    printed = capsys.readouterr().out
    assert "question: Where?" in printed and answer.text in printed
    assert "published" in printed  # which preprocessing the scan went through
    assert "not a medical device" in printed.lower()


def test_without_a_question_a_report_is_asked_for(model, scan, capsys):
    demo.main(["--model_name_or_path", model, "--image_path", scan, "--max_new_tokens", "2", "--device", "cpu"])
    assert f"question: {demo.CAPTION_PROMPTS[0]}" in capsys.readouterr().out


def test_third_party_scan_in_another_orientation(model, capsys):
    path = Path(data_path) / "anatomical.nii"
    if not path.is_file():
        pytest.skip("nibabel was installed without its test data")
    assert demo.run(arguments(model, str(path))) == 0
    assert "answer:" in capsys.readouterr().out


def test_exit_codes_and_one_line_about_bad_input(model, scan, tmp_path, capsys):
    assert demo.run(arguments(model, scan)) == 0
    capsys.readouterr()
    (tmp_path / "broken.nii.gz").write_bytes(b"no")
    clip = str(write_tiny_clip(tmp_path / "clip"))
    for name, image, expected in (
        (model, str(tmp_path / "nowhere.nii.gz"), "nowhere.nii.gz: no such file"),
        (model, str(tmp_path / "broken.nii.gz"), "broken.nii.gz"),
        (clip, scan, "expected a checkpoint of type vlm_qwen"),
    ):
        assert demo.run(arguments(name, image)) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and expected in error and "\n" not in error
    with pytest.raises(SystemExit) as wrong:
        demo.run(["--image_path", scan])
    assert wrong.value.code == 2
