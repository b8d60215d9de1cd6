"""Check of data sets: a clean one passes, and each defect that is planted is found, named and counted."""

import json
import re
import shutil
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
import torch

from med3dvlm.data import phantom, verify
from med3dvlm.data.checks.findings import KINDS
from med3dvlm.data.checks.leakage import case_of, similar_pairs
from med3dvlm.data.checks.texts import identifiers
from med3dvlm.data.checks.volumes import block_means, out_of_order, repeated_slices
from med3dvlm.data.manifest import check_closed, read_vqa_csv, rename_manifest
from med3dvlm.data.preprocess import PreprocessConfig
from med3dvlm.data.profile import DataProfile, write_preparation
from med3dvlm.data.volume import write_prepared
from tests.helpers.tiny_data import write_prepared_tree, write_table

CASES = 12


@pytest.fixture(scope="module")
def scans():
    return [phantom.render(phantom.draw_case(number, 0), 0) for number in range(CASES)]


@pytest.fixture(scope="module")
def clean(tmp_path_factory, scans):
    """A prepared data root of phantoms: cases 0 to 5 train, 6 and 7 validation, 8 to 11 test."""
    root = tmp_path_factory.mktemp("clean")
    phantom.write_tables(phantom.split_numbers(CASES), 0, root)
    (root / "M3D_Cap").rename(root / "M3D_Cap_npy")
    for manifest in (root / "M3D_Cap_npy" / "M3D_Cap.json", *(root / "M3D-VQA").glob("*.csv")):
        rename_manifest(manifest)
    for number, scan in enumerate(scans):
        case = phantom.draw_case(number, 0)
        folder = root / "M3D_Cap_npy" / "ct_case" / case.id
        write_prepared(folder / f"{case.series}.nii.gz", scan, "uint8")
        (folder / "text.txt").write_text(f"{phantom.report(case)} Series {number}.", encoding="utf-8")
    return root


@pytest.fixture
def tree(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "data")


def check(folder, *flags):
    """Exit status, results and page."""
    code = verify.main([str(folder), "--num_workers", "2", *flags])
    output = folder / "verify"
    return code, json.loads((output / "verify.json").read_text()), (output / "verify.html").read_text("utf-8")


def volume(tree, number):
    return next((tree / "M3D_Cap_npy" / "ct_case" / f"{number:06d}").glob("*.nii.gz"))


def text(tree, number):
    return tree / "M3D_Cap_npy" / "ct_case" / f"{number:06d}" / "text.txt"


def found(results, kind):
    return [finding for finding in results["findings"] if finding["kind"] == kind]


def test_a_clean_tree_passes(tree, capsys, monkeypatch):
    code, results, page = check(tree, "--strict")
    assert (code, results["findings"]) == (0, [])
    statistics = results["statistics"]
    assert statistics["volumes"] == statistics["reports"] == CASES
    assert statistics["volumes by split"] == {"train": 6, "validation": 2, "test": 4}
    assert statistics["questions by type"]["1"] == CASES and statistics["questions"] == 7 * CASES
    assert "no problem was found" in capsys.readouterr().out
    assert page.count("data:image/png;base64,") == 1  # the histograms
    assert verify.main([str(tree / "M3D_Cap_npy"), "--output", str(tree / "again")]) == 0
    assert json.loads((tree / "again" / "verify.json").read_text())["statistics"] == statistics
    monkeypatch.chdir(tree / "M3D_Cap_npy")
    assert verify.main(["."]) == 0
    assert json.loads((tree / "M3D_Cap_npy" / "verify" / "verify.json").read_text())["statistics"] == statistics


def test_each_defect_of_a_volume_is_named(tree, scans, capsys):
    alternating = np.empty_like(scans[0])
    alternating[0::2], alternating[1::2] = scans[0][:18], scans[0][18:]
    twice = scans[1].copy()
    twice[10:13] = twice[9]
    speck = np.zeros_like(scans[4])
    speck[9, 9, 9:12] = 255
    write_prepared(volume(tree, 0), alternating, "uint8")
    write_prepared(volume(tree, 1), twice, "uint8")
    write_prepared(volume(tree, 2), np.full_like(scans[2], 7), "uint8")
    write_prepared(volume(tree, 3), scans[3][:, :, 3:], "uint8")
    write_prepared(volume(tree, 4), speck, "uint8")
    volume(tree, 5).write_bytes(volume(tree, 5).read_bytes()[:-400])
    missing = volume(tree, 6)
    missing.unlink()
    stored = scans[7].astype(np.float32).T - 100
    nib.save(nib.Nifti1Image(stored, np.diag([-1, -1, 1, 1])), volume(tree, 7))
    code, results, page = check(tree)
    assert code == 1
    planted = ("slice_order", "slices_repeated", "constant", "shape", "near_empty", "unreadable_image", "missing_image",
               "range")  # fmt: skip
    expected = {kind: number for number, kind in enumerate(planted)}
    assert results["counts"] == dict.fromkeys([kind for kind in KINDS if kind in expected], 1)
    for kind, number in expected.items():
        [finding] = found(results, kind)
        assert f"ct_case/{number:06d}/" in finding["file"] and finding["severity"] == KINDS[kind][0]
    assert "3 of 36" in found(results, "slices_repeated")[0]["detail"]
    assert "36 x 72 x 69, expected 36 x 72 x 72" in found(results, "shape")[0]["detail"]
    assert "-100 .. 155" in found(results, "range")[0]["detail"]
    assert page.count("<figure>") == 6  # what does not open has no picture
    out = capsys.readouterr().out
    assert all(re.search(rf"{KINDS[kind][0]}: {kind} +1 ", out) for kind in expected)


def test_texts_and_identifiers(tree, capsys):
    text(tree, 0).unlink()
    text(tree, 1).write_bytes(b"\xff\xfe\x00")
    text(tree, 2).write_text(" .\n")
    text(tree, 3).write_text("Seen by Dr. Zebrowski on 12.03.2019, MRN: 5550123, zeb@example.org")
    text(tree, 9).write_text(text(tree, 4).read_text())
    code, results, page = check(tree)
    assert code == 1
    assert results["counts"] == {"missing_text": 2, "empty_text": 1, "text_repeated": 1, "identifier": 1}
    [identifier] = found(results, "identifier")
    assert identifier["file"].endswith("000003/text.txt")
    assert identifier["detail"].split(", ") == [
        "1 date", "1 long number", "1 name after a title", "1 e-mail address", "1 labelled field"
    ]  # fmt: skip
    everything = capsys.readouterr().out + page + json.dumps(results)
    assert not re.search("Zebrowski|5550123|example.org|2019", everything)


@pytest.mark.parametrize("kind, harmless, telling", [
    ("date", "ratio 12/5, L3-4-5, 3.5 mm, 45.13.2019", "on 2019-03-12 and 3 March 2019, 1/2/21"),
    ("date", "in May 2019, segments 2/3/4, marks 4-5-6", "12-MAR-2019"),
    ("date", "the 12th of 30", "2019-03-12T10:15"),
    ("date", "12. Woche 2019", "12. März 2019"),
    ("long number", "12345 HU and 0.1234567", "no 1234567"),
    ("long number", "1.2345678 mm", "Acc.No.1234567."),
    ("long number", "12-34-56", "123-45-6789"),
    ("telephone number", "+ 3 cm, +12", "call +49 151 2345678"),
    ("telephone number", "100 200-300", "(555) 123-4567"),
    ("name after a title", "MR angiography, Dr. said", "Mrs. A. Smith"),
    ("name after a title", "DR Chest, MRS Spectroscopy", "DR. SMITH"),
    ("name after a title", "Frau geht", "Frau Dr. med. von Özdemir"),
    ("name after a title", "Dr.", "Dr.O'Neil"),
    ("e-mail address", "lesion @ L3", "a.b@c.org"),
    ("labelled field", "patient: 50 years; accession", "Patient name: x"),
])  # fmt: skip
def test_identifier_patterns(kind, harmless, telling):
    assert kind not in identifiers(harmless)
    assert kind in identifiers(telling)


def test_choices_and_answers_that_disagree(tree):
    image = f"M3D_Cap_npy/ct_case/000000/{volume(tree, 0).name}"
    rows = [
        [image, "", 1, "Which plane?", "Axial", "Coronal", "NA", "", "coronal. ", "B"],  # the same, as it is compared
        [image, "", 1, "Yes or no?", "Yes", "No", "", "", "No", "No"],  # the letter is the text, as in yes / no tables
        [image, "", 1, "Open?", "NA", "NA", "NA", "NA", "None", ""],
        [image, "", 1, "Which plane?", "Axial", "Coronal", "NA", "", "Axial", "B"],
        [image, "", 1, "Which plane?", "Axial", "Coronal", "NA", "", "Axial", "C"],
        [image, "", 1, "Which plane?", "Axial", "Axial", "NA", "", "Axial", "A"],
        [image, "", 1, "", "Axial", "Coronal", "NA", "", "Axial", "A"],
        [image, "", 1, "Which plane?", "Axial", "Coronal", "NA", "", "Axial", " A"],  # blanks around a letter are none
    ]
    table = write_table(tree / "M3D-VQA" / "M3D_VQA_train.csv", rows)
    check_closed(read_vqa_csv(table, tree)[:2])  # which agrees
    code, results, _ = check(tree)
    assert code == 1
    assert results["counts"] == {"empty_text": 1, "answer_letter": 1, "answer_text": 1, "same_choices": 1}
    rows = {(finding["kind"], finding["row"].split()[0]) for finding in results["findings"]}
    assert rows == {("answer_text", "3"), ("answer_letter", "4"), ("same_choices", "5"), ("empty_text", "6")}
    assert {finding["file"] for finding in results["findings"]} == {"M3D-VQA/M3D_VQA_train.csv"}


def test_leaks_between_splits(tree, scans):
    manifest = tree / "M3D_Cap_npy" / "M3D_Cap.json"
    data = json.loads(manifest.read_text())
    data["test"].append(data["train"][0])  # a case in two splits
    manifest.write_text(json.dumps(data))
    noise = np.random.default_rng(0).normal(0, 4, scans[1].shape)
    copy = np.clip(scans[1] * 0.8 + noise, 0, 255).astype(np.uint8)
    write_prepared(volume(tree, 8), copy, "uint8")  # train 1 again, darker and noisy, as a test case
    write_prepared(volume(tree, 10), scans[9], "uint8")  # a test case twice
    write_prepared(volume(tree, 7), scans[11], "uint8")  # validation and test
    code, results, page = check(tree)
    assert code == 1
    assert results["counts"] == {"case_leak": 1, "image_leak": 1, "image_shared": 1, "image_repeated": 1}
    assert found(results, "case_leak")[0]["file"] == "000000"
    for kind, first, second in (("image_leak", 1, 8), ("image_repeated", 9, 10), ("image_shared", 7, 11)):
        [finding] = found(results, kind)
        assert f"{second:06d}" in finding["file"] and f"{first:06d}" in finding["detail"]
    assert page.count("<figure>") == 3


def test_cases_of_one_patient_in_two_splits(tree):
    """Known from patients.csv, as preparation writes it: two cases that share nothing but the patient."""
    patients = tree / "M3D_Cap_npy" / "patients.csv"
    rows = [[f"ct_case/{number:06d}", owner] for number, owner in enumerate("aabcdeffgghb")]
    write_table(patients, rows, ["case", "patient"])  # b: 2 train, 11 test; f: validation; g: test
    code, results, _ = check(tree)
    assert code == 1 and results["counts"] == {"patient_leak": 1}
    [leak] = found(results, "patient_leak")
    assert leak["file"] == "b" and "test: M3D_Cap_npy/ct_case/000011/" in leak["detail"]
    assert results["statistics"]["patients"] == 8
    write_table(patients, [*rows[:2], *([row[0], "z"] for row in rows[7:9])], ["case", "patient"])
    assert check(tree)[:2][1]["counts"] == {"patient_shared": 1}
    patients.write_text("a,b\n1,2\n")
    assert "lacks" in found(check(tree)[1], "manifest")[0]["detail"]


def test_labels_are_counted_and_repeated_entries_told(tree):
    manifest = tree / "M3D_Cap_npy" / "M3D_Cap.json"
    data = json.loads(manifest.read_text())
    data["train"].append(data["train"][2])
    manifest.write_text(json.dumps(data))
    images = [entry["image"] for entry in data["train"][:3]]
    rows = [[images[0], "1", "0"], [images[1], "1", ""], [images[2], "0", "2"]]
    write_table(manifest.with_name("labels.csv"), rows, ["Image Path", "Nodule", "Cyst"])
    code, results, page = check(tree)
    assert code == 1 and results["counts"] == {"manifest": 1, "image_repeated": 1}
    assert results["statistics"]["volumes by label"] == {"Nodule": 2} and "volumes by label" in page
    assert "Cyst: expected 0, 1" in found(results, "manifest")[0]["detail"]
    assert found(results, "image_repeated")[0]["detail"] == "listed 2 times in train"


def test_warnings_fail_only_when_strict(tmp_path):
    root = write_prepared_tree(tmp_path)  # its validation and test cases are the same
    code, results, _ = check(root)
    assert code == 0 and results["counts"] == {"case_shared": 2}
    assert check(root, "--strict")[0] == 1


def test_the_size_of_preparation_json_is_what_shapes_are_compared_with(tree, scans):
    folder = tree / "M3D_Cap_npy"
    write_preparation(folder, PreprocessConfig(size=(36, 72, 64)), DataProfile())
    assert check(tree)[1]["counts"] == {"shape": CASES}
    assert check(tree, "--size", "36", "72", "72")[0] == 0
    # A link to an original goes through the pipeline, as in training; here to HU.
    write_preparation(folder, PreprocessConfig("ct_wide", size=(36, 72, 72)), DataProfile())
    np.save(tree / "original.npy", scans[0].astype(np.float32) * 4 - 500)
    target = volume(tree, 0)
    manifest = folder / "M3D_Cap.json"
    manifest.write_text(manifest.read_text().replace(target.name, "linked.npy", 1))
    for table in (tree / "M3D-VQA").glob("*.csv"):
        table.unlink()
    target.with_name("linked.npy").symlink_to(tree / "original.npy")
    assert check(tree)[0] == 0


def test_wrong_arguments(tree, tmp_path, capsys, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in ([empty], [tmp_path / "absent"], [tree / "M3D_Cap_npy" / "M3D_Cap.json"],
                      [tree, "--manifest", tmp_path / "no.json"]):  # fmt: skip
        assert verify.main([str(argument) for argument in arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(verify.Verification, "run", lambda self: pytest.fail("hours of reading for nothing"))
    assert verify.main([str(tree), "--output", str(tmp_path / "file" / "x")]) == 2
    monkeypatch.undo()
    for flags in (["--num_workers", "0"], ["--size", "1", "2", "0"], []):
        with pytest.raises(SystemExit) as stopped:
            verify.main([str(tree), *flags] if flags else [])
        assert stopped.value.code == 2
    (tree / "M3D_Cap_npy" / "preparation.json").write_text("{")
    assert verify.main([str(tree)]) == 2 and "preparation.json" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    "{", "[]", '{"train": 3}', '{"train": [{"image": "Secret"}]}', '{"train": ["Secret"]}',
    '{"train": [{"image": 3, "text": "x"}]}',
])  # fmt: skip
def test_a_broken_manifest_is_a_finding(tree, content):
    (tree / "M3D_Cap_npy" / "M3D_Cap.json").write_text(content)
    (tree / "M3D-VQA" / "M3D_VQA_val.csv").write_text("a,Is Secret well?\n1,2\n")  # no header but a question
    code, results, _ = check(tree)
    assert code == 1 and len(found(results, "manifest")) == 2
    assert "Secret" not in json.dumps(results)
    for finding in found(results, "manifest"):  # results are handed on: nothing of where the data lie
        assert finding["detail"] and str(tree) not in finding["detail"]


def test_a_table_that_cannot_be_opened_is_named_without_its_folder(tree):
    """The system's own message has the path in it."""
    (tree / "M3D-VQA" / "M3D_VQA_val.csv").unlink()
    (tree / "M3D-VQA" / "M3D_VQA_val.csv").mkdir()
    [finding] = found(check(tree)[1], "manifest")
    assert "cannot be read" in finding["detail"] and str(tree) not in finding["detail"]


def test_a_byte_order_mark_does_not_matter(tree):
    manifest = tree / "M3D_Cap_npy" / "M3D_Cap.json"
    before = check(tree)[1]
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())
    code, results, _ = check(tree)
    assert code == 0 and results["statistics"] == before["statistics"]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]


def test_names_are_escaped_on_the_page_and_nothing_is_loaded(tree, scans):
    odd = "<script>alert(1)<img src=x>"
    path = volume(tree, 0)
    write_prepared(path.with_name(f"{odd}.nii.gz"), np.zeros_like(scans[0]), "uint8")
    manifest = tree / "M3D_Cap_npy" / "M3D_Cap.json"
    manifest.write_text(manifest.read_text().replace(path.name, f"{odd}.nii.gz", 1))
    code, results, page = check(tree)
    assert code == 1 and odd in found(results, "constant")[0]["file"]
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.tags
    assert tags.links and all(link.startswith("data:image/png;base64,") for link in tags.links)


def test_slices_out_of_order_are_seen_through_the_resize(scans):
    def resized(scan, depth):
        scan = torch.from_numpy(scan.astype(np.float32))[None, None]
        return torch.nn.functional.interpolate(scan, (depth, 72, 72), mode="trilinear")[0, 0].numpy()

    for scan in scans[:4]:
        for slices in (60, 100, 128, 200):
            ordered = resized(scan, slices)
            alternating = np.empty_like(ordered)
            alternating[0::2], alternating[1::2] = ordered[: slices // 2], ordered[slices // 2 :]
            assert not out_of_order(resized(ordered, 128))
            assert out_of_order(resized(alternating, 128))
            shuffled, thirds = np.random.default_rng(0).permutation(slices), np.argsort(np.arange(slices) % 3)
            for order in (shuffled, thirds):
                assert out_of_order(ordered[order]) and out_of_order(resized(ordered[order], 128))
        assert repeated_slices(resized(scan, 300)) == 0  # the ends of an enlarged volume repeat
    assert not out_of_order(np.random.default_rng(0).random((40, 20, 20), np.float32))


def test_even_slices_before_the_odd_ones_are_seen_where_all_is_smooth():
    coarse = torch.from_numpy(np.random.default_rng(0).random((1, 1, 7, 8, 8)))
    smooth = torch.nn.functional.interpolate(coarse, (64, 48, 48), mode="trilinear")[0, 0].numpy()
    assert not out_of_order(smooth)
    assert out_of_order(smooth[np.argsort(np.arange(64) % 2, kind="stable")])


def test_fingerprints(scans):
    array = np.random.default_rng(0).random((16, 24, 40), np.float32)
    np.testing.assert_allclose(block_means(array), array.reshape(8, 2, 8, 3, 8, 5).mean((1, 3, 5)), rtol=1e-5)
    assert block_means(array[:5, :3, :1]).shape == (8, 8, 8)
    prints = [block_means(scan) for scan in scans]
    assert list(similar_pairs(prints)) == []
    assert list(similar_pairs([*prints, prints[3] * 0.5 + 0.1])) == [(3, CASES)]


def test_cases_are_folders():
    assert case_of("M3D_Cap_npy/ct_case/000006/a.nii.gz") == "000006"
    assert case_of("x/M3D_Cap_npy/ct_quizze/000006/b.nii.gz") == "000006"
    assert case_of("rate/train/train_1/train_1_a/v.nii.gz") == "train/train_1/train_1_a"
