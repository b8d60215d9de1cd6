"""The benchmark of preparation times what it says, and its two ways give the same volumes."""

import pytest

from med3dvlm.benchmark import data, preparation


def rows_of(report: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if "|" in line]
    return {line[0]: line for line in lines[2:]} | {"header": lines[0]}


@pytest.mark.parametrize("repeats", [1])
def test_report_of_preparation(monkeypatch, repeats):
    monkeypatch.setattr(preparation, "SLICES", 6)
    monkeypatch.setattr(preparation, "WIDTH", 48)
    monkeypatch.setattr(preparation, "PUBLISHED_SIZE", (8, 16, 16))
    rows = rows_of(preparation.report(cases=2, repeats=repeats))
    assert list(rows)[:-1] == ["plain", "ours, uint8", "ours, float16", "ours, float32"]
    difference = {name: float(row[-1]) for name, row in rows.items() if name != "header"}
    assert difference["ours, uint8"] <= 1 / 510 + 2e-6
    assert difference["ours, float16"] <= 1e-5 and difference["ours, float32"] <= 1e-6
    column = rows["header"].index("size ratio")
    assert float(rows["ours, uint8"][column]) > 1


def test_the_child_runs_without_the_tuning_of_trainings(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    seen = {}

    def run(command, env, **options):
        seen.update(command=command, env=env)
        return type("Done", (), {"stdout": "table"})()

    monkeypatch.setattr(data.subprocess, "run", run)
    assert data.preparation_report(2, 3) == "table"
    assert "GLIBC_TUNABLES" not in seen["env"] and "med3dvlm.benchmark.preparation" in seen["command"]


@pytest.mark.parametrize("flags", [["--cases", "0"], ["--repeats", "-1"], ["--only", "nothing"]])
def test_flags_that_make_no_sense(flags):
    with pytest.raises(SystemExit):
        data.parse_arguments(flags)
