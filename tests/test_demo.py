"""The command in this process: one question, piped questions, exit codes, bad input."""

import io
import json
import sys
from pathlib import Path

import pytest
from nibabel.testing import data_path

from med3dvlm import demo
from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.demo.output import COLUMNS
from med3dvlm.demo.terminal import printable
from tests.helpers.tiny_data import write_prepared_tree
from tests.helpers.tiny_model import TINY_SIZE, write_tiny_clip, write_tiny_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm"))


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    root = write_prepared_tree(tmp_path_factory.mktemp("data"), cases=2, size=TINY_SIZE)
    return str(next(root.glob("M3D_Cap_npy/ct_case/*/*.nii.gz")))


@pytest.fixture
def piped(monkeypatch):
    """Standard input that is a pipe with this text."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def arguments(model, scan, *more):
    return ["--model_name_or_path", model, "--image_path", str(scan), "--max_new_tokens", "5", "--device", "cpu", *more]


def ask(model, scan, *more):
    return demo.main(arguments(model, scan, "--question", "Where?", *more)).answers[0]


def test_prints_the_answer_and_the_notice(model, scan, capsys):
    answer = ask(model, scan)
    printed = capsys.readouterr().out
    assert f"question: Where?\nanswer: {answer.text}\n" in printed
    assert "preprocessing: published" in printed and "not a medical device" in printed.lower()
    assert "\033" not in printed


def test_report_and_empty_standard_input_ask_for_a_report(model, scan, capsys, piped):
    piped("")
    asked = [demo.main(arguments(model, scan, *flags)).answers for flags in (["--report"], [])]
    assert asked[0][0].text == asked[1][0].text and len(asked[1]) == 1
    assert capsys.readouterr().out.count(f"question: {CAPTION_PROMPTS[0]}") == 2


def test_each_piped_line_is_a_question(model, scan, capsys, piped):
    piped("Where?\n\n" + "liver " * 900 + "\nWhich plane is shown?\n")
    assert demo.run(arguments(model, scan)) == 1  # one of them is too long
    printed = capsys.readouterr()
    assert printed.out.count("question: ") == 2 and printed.out.count("research only") >= 1
    assert "error: the question has" in printed.err


def test_json_is_one_object_an_answer(model, scan, capsys, piped):
    piped("Where?\n" + "liver " * 900)
    assert demo.run(arguments(model, scan, "--json")) == 1
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert list(first) == list(second) == [*COLUMNS, "seconds"]
    assert first["seconds"] > 0 and first["error"] is None and second["answer"] is None
    assert first["question"] == "Where?" and first["tokens"] == 5 and first["image"] == scan
    assert first["preprocessing"]["preset"] == "published" and "research only" in first["notice"]
    assert "tokens" in second["error"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_bytes_and_any_locale(model, scan, capsys, monkeypatch, encoding):
    """Standard input is UTF-8 whatever the locale says; bytes that are no text are replaced, not an error."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Läsion?\n".encode() + b"wh\xffere?\n"), encoding))
    printed = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", printed)
    assert demo.run(arguments(model, scan, "--question", "bro\udcffken")) == 0  # as arguments of other bytes come in
    assert demo.run(arguments(model, scan)) == 0
    printed.flush()
    text = printed.buffer.getvalue().decode(encoding)
    for question in ("bro\N{REPLACEMENT CHARACTER}ken", "Läsion?", "wh\N{REPLACEMENT CHARACTER}ere?"):
        assert f"question: {question.encode(encoding, 'backslashreplace').decode(encoding)}\n" in text
    assert demo.run(arguments(model, "no\udcffwhere.nii.gz", "--question", "Where?")) == 1
    assert "where.nii.gz: no such file" in capsys.readouterr().err


def test_closed_standard_streams(model, scan, monkeypatch):
    """As a job scheduler may start it."""
    with monkeypatch.context() as closed:
        for name in ("stdin", "stdout", "stderr"):
            closed.setattr(sys, name, None)
        assert demo.run(arguments(model, scan)) == 0


def test_choices_and_sampling(model, scan, capsys):
    answer = ask(model, scan, "--choices", "liver", "left lung")
    printed = capsys.readouterr().out
    assert f"answer: {answer.text}" in printed and f"{answer.probabilities['left lung']:.4f}  left lung" in printed
    drawn = [ask(model, scan, "--temperature", "1", "--seed", seed).text for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_quantization(model, scan):
    assert ask(model, scan, "--quantization", "int8").tokens == 5


def test_third_party_scan_in_another_orientation(model, capsys):
    path = Path(data_path) / "anatomical.nii"
    if not path.is_file():
        pytest.skip("nibabel was installed without its test data")
    assert demo.run(arguments(model, str(path), "--question", "Where?")) == 0
    assert "answer:" in capsys.readouterr().out


def test_reading_flags_reach_the_reader(model, capsys):
    path = Path(data_path) / "functional.nii"
    if not path.is_file():
        pytest.skip("nibabel was installed without its test data")
    assert demo.run(arguments(model, str(path), "--question", "Where?")) == 1
    assert "--frame" in capsys.readouterr().err
    assert demo.run(arguments(model, str(path), "--question", "Where?", "--frame", "1")) == 0


def test_preprocessing_flags_change_what_the_model_sees(model, scan, capsys):
    path = Path(data_path) / "anatomical.nii"
    if not path.is_file():
        pytest.skip("nibabel was installed without its test data")
    assert ask(model, path, "--keep_aspect").preprocessing["keep_aspect"]
    assert ask(model, path, "--window", "40", "400").preprocessing["preset"] == "window"
    assert "preprocessing: window" in capsys.readouterr().out


def test_exit_codes_and_one_line_about_bad_input(model, scan, tmp_path, capsys):
    (tmp_path / "broken.nii.gz").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    clip = str(write_tiny_clip(tmp_path / "clip"))
    for name, image, expected in (
        (model, str(tmp_path / "nowhere.nii.gz"), "nowhere.nii.gz: no such file"),
        (model, str(tmp_path / "broken.nii.gz"), "broken.nii.gz"),
        (model, str(tmp_path / "empty"), "empty"),
        (clip, scan, "expected a checkpoint of type vlm_qwen"),
        (str(tmp_path / "empty"), scan, "no config.json"),
        (str(tmp_path / "no/such/model"), scan, "no/such/model: no such folder; name a folder"),
    ):
        assert demo.run(arguments(name, image, "--question", "Where?")) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and expected in error and "\n" not in error


def test_a_device_that_is_not_there_is_one_sentence(model, scan, capsys):
    assert demo.run(arguments(model, scan, "--question", "Where?", "--device", "nosuch")) == 1
    assert "device nosuch cannot be used here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--image_path", "scan.nii.gz"],
        ["--model_name_or_path", "m", "--question", " "],
        ["--model_name_or_path", "m", "--question", "a", "--report"],
        ["--model_name_or_path", "m", "--output", "answers.txt"],
        ["--model_name_or_path", "m", "--choices", "liver"],
        ["--model_name_or_path", "m", "--temperature", "-1"],
        ["--model_name_or_path", "m", "--preset", "published", "--window", "40", "400"],
        ["--model_name_or_path", "m", "--temperature", "inf"],
        ["--model_name_or_path", "m", "--top_p", "nan"],
        ["--model_name_or_path", "m", "--seed", "9" * 30],
        ["--model_name_or_path", "m", "--choices", "liver", "liver "],
        ["--model_name_or_path", "m", "--choices", "liver", " "],
        ["--model_name_or_path", "m", "--window", "40", "0"],
        ["--model_name_or_path", "m", "--preset", "window"],
        ["--model_name_or_path", "m", "--preset", "prepared", "--keep_aspect"],
        ["--model_name_or_path", "m", "--image_path", ""],
        ["--list-series"],
    ],
)
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.run(wrong)
    usage, error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "error:" in error and "--image_path SCAN" in usage


def test_flags_that_do_not_fit_the_model(tmp_path, scan, capsys):
    folder = write_tiny_vlm(tmp_path / "vlm")
    values = json.loads((folder / "processor_config.json").read_text())
    values["preprocess"]["preset"] = "prepared"
    (folder / "processor_config.json").write_text(json.dumps(values))
    assert demo.run(arguments(str(folder), scan, "--question", "Where?", "--keep_aspect")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the model is made for prepared") and "keep_aspect" in error


def test_choices_need_a_question(model, scan, capsys, piped):
    piped("")
    assert demo.run(arguments(model, scan, "--choices", "liver", "lung")) == 1
    assert "--choices needs a question" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(model, scan, capsys, monkeypatch):
    monkeypatch.setattr("med3dvlm.demo.command.load_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert demo.run(arguments(model, scan, "--question", "Where?")) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_list_series_shows_what_a_folder_holds(capsys):
    from pydicom.data import get_testdata_file

    file = get_testdata_file("CT_small.dcm", download=False)
    if file is None:
        pytest.skip("pydicom was installed without its test data")
    assert demo.run(["--image_path", file, "--list-series"]) == 0
    assert "CT" in capsys.readouterr().out


def test_control_characters_are_not_printed():
    assert printable("no\udcffwhere") == "no\N{REPLACEMENT CHARACTER}where"
    assert printable("a\x1b[31m\x9b2J\x07b\tc\nµ肝") == "a\N{REPLACEMENT CHARACTER}[31m" + (
        "\N{REPLACEMENT CHARACTER}2J\N{REPLACEMENT CHARACTER}b\tc\nµ肝"
    )
