"""The ledger: appended to, never torn for its readers, never written by two runs."""

import json

import pytest

from med3dvlm.data.ledger import DONE, FAILED, SKIPPED, Entry, Ledger, LedgerError, ledger_name, read_ledgers


def entry(volume="c/a.nii.gz", status=DONE, **values) -> Entry:
    return Entry("c", volume, "in/a", status, **values)


def test_lines_are_appended_and_the_latest_counts(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.add(entry(status=FAILED, reason="broken"))
        ledger.add(entry("c/b.nii.gz", bytes=5))
    first = (tmp_path / "ledger.jsonl").read_text()
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.add(entry(seconds=0.5, bytes=7, options="abc"))
        ledger.add(entry(status=SKIPPED, reason="finished before"))
    text = (tmp_path / "ledger.jsonl").read_text()
    assert text.startswith(first) and len(text.splitlines()) == 4
    latest = read_ledgers(tmp_path)
    assert latest["c/b.nii.gz"]["bytes"] == 5
    assert latest["c/a.nii.gz"]["status"] == SKIPPED
    assert latest["c/a.nii.gz"]["options"] == "abc"  # what it was made with stays known
    assert list(json.loads(text.splitlines()[0])) == ["time", "case", "volume", "source", "status", "reason"]


def test_a_torn_last_line_is_closed_and_ignored(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.add(entry("c/a.nii.gz"))
        ledger.add(entry("c/b.nii.gz"))
    for cut in (1, 20, 60):
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        assert list(read_ledgers(tmp_path)) == ["c/a.nii.gz"]
        with Ledger(path) as ledger:
            ledger.add(entry("c/c.nii.gz"))
        assert "c/c.nii.gz" in read_ledgers(tmp_path)
        path.write_bytes(whole)


def test_shards_have_files_of_their_own(tmp_path):
    with Ledger(tmp_path / ledger_name((0, 2))) as one, Ledger(tmp_path / ledger_name((1, 2))) as other:
        one.add(entry("c/a.nii.gz", status=FAILED))
        other.add(entry("c/b.nii.gz"))
        one.add(entry("c/a.nii.gz"))
    assert {volume: line["status"] for volume, line in read_ledgers(tmp_path).items()} == {
        "c/a.nii.gz": DONE,
        "c/b.nii.gz": DONE,
    }


def test_a_second_run_with_the_same_ledger_is_refused(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl"):
        with pytest.raises(LedgerError, match=r"ledger\.jsonl: another preparation"):
            Ledger(tmp_path / "ledger.jsonl")
    Ledger(tmp_path / "ledger.jsonl").close()
