"""A hospital's DICOM export with its table of reports: who goes with which report, and names in every field planted."""

import gzip
import logging
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from med3dvlm.data import convert
from med3dvlm.data.sources import SourceError, SourceOptions, collect
from tests.data.test_sources import write_nifti
from tests.helpers.dicom_files import AXIAL, image, save, write_series
from tests.helpers.tiny_data import write_table

NAME, NUMBER, BIRTHDAY = "Zwetschgenmus", "83746519", "19670314"
NEEDED = {  # what the reader goes by, and what says which files belong together
    "SOPClassUID", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData",
    "SamplesPerPixel", "PhotometricInterpretation", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "RescaleSlope", "RescaleIntercept", "Modality", "ImageType", "StudyInstanceUID", "SeriesInstanceUID",
    "NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "FloatPixelData",
    "DoubleFloatPixelData", "PixelPaddingValue", "SpectroscopyData",
}  # fmt: skip
TEXTS = {"PN", "LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE"}


def plant(dataset: Dataset) -> int:
    """Put a name, a number or a birthday into every element that takes one. Returns into how many."""
    person = Dataset()
    person.PatientName, person.PatientID, person.PatientBirthDate = NAME, NUMBER, BIRTHDAY
    count = 0
    for keyword, tag in keyword_dict.items():
        vr = dictionary_VR(tag)
        values = {"CS": NAME.upper(), "UI": f"1.2.{NUMBER}", "DA": BIRTHDAY, "SQ": Sequence([person]), "IS": NUMBER}
        values |= dict.fromkeys(TEXTS, NAME)
        if keyword and keyword not in NEEDED and tag >> 16 >= 8 and vr in values:
            setattr(dataset, keyword, values[vr])
            count += 1
    block = dataset.private_block(0x0009, f"{NAME} GEMS", create=True)
    block.add_new(1, "PN", NAME)
    block.add_new(2, "SQ", Sequence([person]))
    return count


def write_planted(dataset: Dataset, folder: Path, study: str, modality: str = "CT") -> None:
    """Write a series of three slices whose headers are those of `dataset`."""
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"1.2.{NUMBER}.{study}", f"1.2.{NUMBER}.{study}.1"
    dataset.PatientID, dataset.Modality = f"{NAME} {study}", modality
    for k in range(3):
        dataset.ImagePositionPatient = [0, 0, k]
        save(folder / f"{NAME}_{k}.dcm", dataset)


def everything_in(folder: Path) -> str:
    """Names and contents of all files, unpacked."""
    texts = []
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        data += gzip.decompress(data) if path.name.endswith(".gz") else b""
        texts.append(f"{path.relative_to(folder)}\n{data.decode('latin-1')}")
    return "\n".join(texts)


@pytest.mark.filterwarnings("ignore:Unknown encoding")  # pydicom's, when the planted file is written
def test_nothing_of_a_header_gets_out(tmp_path, capfd, caplog):
    """Whatever the field: in files, names, messages, warnings and logs."""
    caplog.set_level(logging.DEBUG)
    tree = tmp_path / "in" / f"{NAME}_Hans"
    dataset = image(np.arange(48, dtype=np.uint16).reshape(6, 8), ImageOrientationPatient=AXIAL)
    assert plant(dataset) > 2000
    write_planted(dataset, tree / "whole", "1")
    write_planted(dataset, tree / "other modality", "2", NAME.upper())
    write_planted(dataset, tree / "cut", "3")
    (tree / "cut" / f"{NAME}_2.dcm").write_bytes((tree / "cut" / f"{NAME}_2.dcm").read_bytes()[:3000])
    with zipfile.ZipFile(tmp_path / "in" / f"{NAME}.zip", "w") as archive:
        for file in sorted((tree / "whole").iterdir()):
            archive.write(file, f"{NAME}/{file.name}")
    write_nifti(tree / f"{NAME}.nii.gz")
    (tree / f"{NAME}.npy").write_bytes(b"broken")
    reports = write_table(tmp_path / "reports.csv", [[NAME, "Clear."], ["other", "x"]], ["AccessionNumber", "report"])
    out = tmp_path / "out"
    caplog.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert run(tmp_path / "in", out, "--reports", str(reports)) == 1  # some are broken
    said = "".join([*capfd.readouterr(), caplog.text, *(str(warning.message) for warning in warned)])
    volumes = [path.name for path in out.rglob("*.nii.gz")]
    assert len(volumes) >= 4 and "series.nii.gz" in volumes and (out / "ledger.jsonl").read_text().count("failed") >= 2
    said = (said.replace(str(tmp_path), "") + everything_in(out)).lower()
    for secret in (NAME[:6], NUMBER, BIRTHDAY):
        assert secret.lower() not in said, said[max(said.find(secret.lower()) - 300, 0) :][:600]
    assert next(out.rglob("text.txt")).read_text() == "Clear."
    assert (tmp_path / "out.key").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.key", "reports.csv"]  # no mapping


def export(root: Path, **accessions: str) -> Path:
    """A series of each study; study -> accession number."""
    array = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    for number, (study, accession) in enumerate(accessions.items()):
        write_series(root / study, array, PatientID=study, AccessionNumber=accession, StudyInstanceUID=f"1.2.{number}")
    return root


def run(root: Path, out: Path, *flags: str) -> int:
    return convert.main(["--input_dir", str(root), "--output_dir", str(out), "--size", "4", "8", "8", "--num_workers",
                         "1", *flags])  # fmt: skip


def texts_of(root: Path, table: Path, key: Path, **columns) -> tuple[dict[str, str | None], list[str]]:
    """The report of each folder, and the notes."""
    found = collect(root, "auto", SourceOptions(reports=table, key_file=key, columns=columns))
    return {case.items[0].path.name: case.text for case in found.cases}, found.notes


def test_reports_by_accession_number_as_text(tmp_path):
    root = export(tmp_path / "in", a="00123", b="123", c="", d="A 5 ")
    table = write_table(tmp_path / "r.csv", [["00123", "One."], ["123", "Two."], ["A 5", "Three."], ["", "Four."]],
                        ["Accession_Number", "Findings"])  # fmt: skip
    texts, notes = texts_of(root, table, tmp_path / "key")
    assert texts == {"a": "One.", "b": "Two.", "c": None, "d": "Three."} and notes == []


def test_a_study_with_two_accession_numbers_has_both_reports(tmp_path):
    root = export(tmp_path / "in", a="1")
    array = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    uids = {"StudyInstanceUID": "1.2.0", "SeriesInstanceUID": "1.9"}
    write_series(root / "a2", array, PatientID="a", AccessionNumber="2", **uids)  # one study: folders are no patients
    table = write_table(tmp_path / "r.csv", [["1", "Chest."], ["2", "Abdomen."]], ["AccessionNumber", "report"])
    assert texts_of(root, table, tmp_path / "key") == ({"a": "Chest. Abdomen."}, [])


def test_lost_zeros_are_pointed_out_without_a_number(tmp_path):
    root = export(tmp_path / "in", a="00123", b="7")
    (tmp_path / "r.jsonl").write_text('{"Nr": 123, "Befund": "One."}\n{"Nr": 8, "Befund": "Two."}\n')
    texts, notes = texts_of(root, tmp_path / "r.jsonl", tmp_path / "key", accession="Nr", report="Befund")
    assert not any(texts.values())
    (note,) = notes
    assert note.startswith("2 reports of the table belong to no study here (1 would but for zeros in front")
    assert "123" not in note


@pytest.mark.parametrize("rows, columns, message", [
    ([["1", "x"], ["1", "y"]], {}, "two reports for one AccessionNumber, in the rows 1 and 2"),
    ([["1", "x"]], {"accession": "Nr"}, "lacks the column Nr; it has AccessionNumber, report"),
    ([["1", "x"]], {"image": "report"}, "--columns: image is none of accession, text"),
])  # fmt: skip
def test_tables_of_reports_that_cannot_be_used(tmp_path, rows, columns, message):
    root = export(tmp_path / "in", a="1")
    table = write_table(tmp_path / "r.csv", rows, ["AccessionNumber", "report"])
    with pytest.raises(SourceError, match=message):
        texts_of(root, table, tmp_path / "key", **columns)


def test_archives_of_files_without_a_preamble(tmp_path):
    """As some systems export: the data set begins at once."""
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in/x.zip", "w") as archive:
        for file in sorted(export(tmp_path / "files", a="1").rglob("*.dcm")):
            archive.writestr(file.name, file.read_bytes()[132:])
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").rglob("*.nii.gz")] == ["CT.nii.gz"]


def test_other_files_of_a_patient_stay_with_the_patient(tmp_path):
    export(tmp_path / "in", p1="1", p2="2")
    write_nifti(tmp_path / "in/p1/more.nii.gz")
    cases = collect(tmp_path / "in", "auto", SourceOptions(key_file=tmp_path / "key")).cases
    dicom, _, other = cases
    assert len(cases) == 3 and other.group == dicom.group and "p1" not in f"{other.folder} {other.group}"


def test_a_mapping_that_was_there_is_made_private(tmp_path):
    root, mapping = export(tmp_path / "in", a="1"), tmp_path / "new" / "map.csv"
    for _ in range(2):
        assert run(root, tmp_path / "out", "--mapping_file", str(mapping)) == 0
        assert mapping.stat().st_mode & 0o777 == 0o600
        mapping.chmod(0o644)


def test_a_key_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    root, key = export(tmp_path / "in", a="1"), tmp_path / "new" / "key"
    names = {collect(root, "auto", SourceOptions(key_file=key)).cases[0].folder for _ in range(2)}
    assert len(names) == 1 and [path.name for path in key.parent.iterdir()] == ["key"]
    assert key.stat().st_mode & 0o777 == 0o600
