import subprocess
import sys

import pytest

from med3dvlm.data.manifest import ManifestError
from med3dvlm.evaluation import caption, command, report, retrieval, vqa
from tests.helpers.commands import ROOT


@pytest.mark.parametrize("evaluation", [retrieval, caption, vqa])
@pytest.mark.parametrize("flag, value", [("--batch_size", "0"), ("--num_workers", "-1"), ("--batch_size", "two")])
def test_counts_that_cannot_be_are_refused_by_the_parser(evaluation, flag, value, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluation.main([flag, value])
    assert caught.value.code == 2
    assert f"argument {flag}: expected a whole number of" in capsys.readouterr().err


@pytest.mark.parametrize("evaluation", [caption, vqa])
def test_a_limit_that_would_drop_the_last_rows_is_refused(evaluation, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--limit", "-1"])
    assert "argument --limit: expected a whole number of 1 or more, found '-1'" in capsys.readouterr().err


def test_bad_input_ends_a_command_with_one_sentence_and_status_1(tmp_path):
    flags = ["--vqa_data_test_path", "absent.csv", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "med3dvlm.evaluation.vqa", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: absent.csv: cannot be read")
    with pytest.raises(ManifestError):
        vqa.main(flags)


def test_files_that_are_not_there_are_bad_input_and_mistakes_of_ours_are_not(tmp_path):
    with pytest.raises(SystemExit, match="error: .*stages.json"):
        command.run(lambda: report.main(["--run_dir", str(tmp_path)]))

    def mistake():
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="a mistake of ours"):
        command.run(mistake)
