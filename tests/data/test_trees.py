"""Trees of any volumes: what becomes a case and whose it is, what it is called, which links are followed."""

import os
from pathlib import Path

import numpy as np
import pytest

from med3dvlm.data.sources import SourceError, SourceOptions, collect
from med3dvlm.data.sources.base import draw_split
from tests.data.test_sources import sources_of, write_nifti
from tests.helpers.tiny_data import write_slices


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


def test_links_to_folders_are_followed_once(tmp_path):
    write_nifti(tmp_path / "elsewhere/p1/a.nii.gz")
    (tmp_path / "in").mkdir()
    links = {"p1": "../elsewhere/p1", "p1_again": "../elsewhere/p1", "loop": ".", "gone": "nowhere"}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    assert sources_of(collect(tmp_path / "in", "auto", SourceOptions())) == {"p1": ["a"]}


def test_the_folder_of_the_patients(tmp_path):
    """`in/images/<patient>` is as good as `in/<patient>`; a lone case or split is no folder of patients."""

    def groups(*names: str, text: str = "") -> tuple[list, bool]:
        root = tmp_path / f"in{len(list(tmp_path.iterdir()))}"
        for name in names:
            write_nifti(root / name)
        if text:
            (root / text).write_text("A report.")
        found = collect(root, "volumes", SourceOptions())
        return [(case.group, case.split) for case in found.cases], any("below one folder" in n for n in found.notes)

    assert groups("images/p1/a.nii", "images/p2/a.nii") == ([("p1", ""), ("p2", "")], True)
    assert groups("p1/a.nii", "p1/b.nii", text="p1/text.txt") == ([("p1", "")], False)
    assert groups("train/p1/a.nii", "train/p2/a.nii") == ([("p1", "train"), ("p2", "train")], False)


def test_a_folder_of_slices_has_its_report_in_it(tmp_path):
    write_slices(tmp_path / "p1", np.zeros((3, 4, 5), np.uint8))
    (tmp_path / "p1/text.txt").write_bytes("\ufeffA report.".encode())
    (case,) = collect(tmp_path, "auto", SourceOptions()).cases
    assert case.report() == "A report."


def test_pairs_are_one_volume_and_other_files_none(tmp_path):
    for name in ("a.hdr", "a.img", "notes.txt", "table.csv", "logo.png", ".hidden.nii"):
        (tmp_path / name).write_bytes(b"")
    assert sources_of(collect(tmp_path, "volumes", SourceOptions())) == {"a": ["a"]}


def test_hashed_names_of_volumes(tmp_path, monkeypatch):
    write_nifti(tmp_path / "Jane Doe/scan_of_jane.nii.gz")
    options = SourceOptions(key_file=tmp_path.parent / "key", hash_ids=True)
    (case,) = collect(tmp_path, "volumes", options).cases
    assert case.hidden and "jane" not in f"{case.folder} {case.items[0].name} {case.group}".lower()
    monkeypatch.chdir(tmp_path.parent)
    (again,) = collect(Path(tmp_path.name), "volumes", options).cases  # however the path is written
    assert (again.folder, again.items[0].name) == (case.folder, case.items[0].name)
    for name in ("Jane Doe/a.nii.gz", "Max/a.nii.gz"):  # another file, in front of it
        write_nifti(tmp_path / name)
    more, _ = collect(tmp_path, "volumes", options).cases
    assert [item.path.name for item in more.items if item.name == case.items[0].name] == ["scan_of_jane.nii.gz"]
    (tmp_path.parent / "key").unlink()
    assert collect(tmp_path, "volumes", options).cases[0].folder != case.folder


def test_cases_that_would_share_a_folder_are_refused(tmp_path):
    for name in ("a b", "a_b"):
        write_nifti(tmp_path / name / "x" / "scan.nii.gz")
    with pytest.raises(SourceError, match="a_b/x; give them other names"):
        collect(tmp_path, "auto", SourceOptions())


@pytest.mark.parametrize("hash_ids", [False, True])
def test_names_of_folders_that_are_no_utf8(tmp_path, hash_ids):
    """As old Windows shares have them: no crash, and two of them stay two patients."""
    for name in (b"M\xfcller", b"M\xf6ller"):
        folder = os.fsencode(tmp_path) + b"/in/" + name
        os.makedirs(folder)
        os.rename(write_nifti(tmp_path / "a.nii.gz"), folder + b"/a.nii.gz")
    options = SourceOptions(hash_ids=hash_ids, key_file=tmp_path / "key")
    cases = collect(tmp_path / "in", "auto", options).cases
    assert len({case.folder for case in cases}) == len({case.group for case in cases}) == 2
    assert all(case.folder.isascii() and draw_split(case.group, (1, 0, 0)) == "train" for case in cases)
