"""DICOM as hospitals export it: any layout of folders, told apart by the headers of all files.

A study is a case, a patient a group, a series an item; the first two are named by keyed hashes, a series by modality
and number. Tables of contents (DICOMDIR) are passed over. Reports are `text.txt` files, or stand in a table by
accession number.
"""

import io
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from pydicom.datadict import tag_for_keyword
from pydicom.filereader import read_partial
from pydicom.uid import MediaStorageDirectoryStorage
from tqdm import tqdm

from med3dvlm.data.readers.base import VolumeError, decoding
from med3dvlm.data.readers.dicom_header import begins_as_dicom, parsing
from med3dvlm.data.sources.base import SPLIT_NAMES, Case, Item, SourceError, SourceOptions, as_bytes
from med3dvlm.data.sources.pseudonyms import Pseudonyms, pseudonyms
from med3dvlm.data.sources.spreadsheet import find_columns, read_table

# What a table of reports says -> the names under which it is looked for; `--columns` names others.
REPORT_COLUMNS = {"accession": ("accession number", "accession"), "text": ("report", "text", "findings")}
TAGS = ("PatientID", "StudyInstanceUID", "AccessionNumber", "SeriesInstanceUID", "Modality", "SeriesNumber")
LAST_TAG = max(tag_for_keyword(name) for name in TAGS)
HEADER_BYTES = (2**16, 2**22)  # what is read of a file: the tags above come early, but for large private elements


@dataclass(frozen=True)
class Header:
    """What tells files apart, as the bytes in the file; empty where it is missing."""

    patient: bytes = b""
    study: bytes = b""
    accession: bytes = b""
    series: bytes = b""
    modality: bytes = b""
    number: bytes = b""

    @property
    def empty(self) -> bool:
        """Whether nothing says which patient, study or series it is."""
        return not (self.patient or self.study or self.series)

    @property
    def label(self) -> str:
        """Modality and number of the series: CT_003. Anything else that stands in their place is not repeated."""
        modality = self.modality.decode() if re.fullmatch(rb"[A-Z]{2}", self.modality) else "series"
        return f"{modality}_{int(self.number):03d}" if re.fullmatch(rb"\d{1,6}", self.number) else modality


def read_header(path: Path) -> Header | None:
    """The header of a file, or of the first DICOM file in a zip; None for a table of contents.

    What is damaged or missing is empty.
    """
    header = Header()
    for amount in HEADER_BYTES:
        try:
            with parsing(path):
                header = _parse(_beginning(path, amount))
        except VolumeError:
            continue  # the reader will say what is wrong with it
        if header is None or header.study:
            break
    return header


def _beginning(path: Path, amount: int) -> bytes:
    if path.suffix.lower() != ".zip":
        with open(path, "rb") as stream:
            return stream.read(amount)
    with zipfile.ZipFile(path) as archive:
        with archive.open(next(member for member in archive.infolist() if _is_dicom_member(archive, member))) as stream:
            return stream.read(amount)


def _is_dicom_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    if member.is_dir() or member.filename.rpartition("/")[2].upper() == "DICOMDIR":
        return False
    with archive.open(member) as stream:
        return begins_as_dicom(stream.read(132))


def holds_dicom(path: Path) -> bool:
    """Whether a zip has DICOM in it; a damaged or encrypted one has none that could be read."""
    try:
        with decoding(path), zipfile.ZipFile(path) as archive:
            return any(_is_dicom_member(archive, member) for member in archive.infolist())
    except VolumeError:
        return False


def _parse(data: bytes) -> Header | None:
    tags = [tag_for_keyword(name) for name in TAGS]
    stream = io.BytesIO(data)
    found = read_partial(stream, stop_when=lambda tag, vr, length: tag > LAST_TAG, force=True, specific_tags=tags)
    if found.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return None
    # As bytes: nothing is parsed, so nothing about it can get into a warning.
    elements = (found.get_item(name) for name in TAGS)
    return Header(*(bytes(e.value or b"").strip(b" \0") if e is not None else b"" for e in elements))


def dicom_cases(files: list[Path], root: Path, options: SourceOptions) -> tuple[list[Case], list[str]]:
    """The cases of a tree, and notes. Raises SourceError for a table of reports that cannot be used."""
    names, reports = pseudonyms(options), _reports(options)
    progress = tqdm(files, desc="reading headers", unit="file", disable=len(files) < 10_000)
    headers = {file: header for file in progress if (header := read_header(file)) is not None}
    headers = _with_strays(headers)
    folders = {file: first_folder(file, root) for file in headers}
    by_folder = _one_patient_each(headers, folders)
    studies: dict[tuple[str, str, str], list[Path]] = defaultdict(list)
    for file, header in headers.items():
        split, folder = folders[file]
        patient = as_bytes(folder) if by_folder or not header.patient else header.patient
        study = names("study", header.study or str(file.parent.relative_to(root)), 8)
        studies[split, names("patient", patient or header.study), study].append(file)
    texts = _texts(studies, root)
    cases = [
        Case(
            f"{group}/{study}",
            _items(members, headers, names, root),
            text=_report_of([headers[file].accession for file in members], reports),
            text_file=texts[split, group, study],
            group=group,
            split=split,
            hidden=True,
        )
        for (split, group, study), members in studies.items()
    ]
    notes = _about_unused(reports.keys(), {header.accession for header in headers.values()})
    if by_folder:
        count = len(set(folders.values()))
        notes.append(f"all DICOM headers name one patient: the {count} folders of the input are taken for patients")
    return cases, notes


def _one_patient_each(headers: dict[Path, Header], folders: dict[Path, tuple[str, str]]) -> bool:
    """Whether folders tell patients apart: all headers name the same one, and no study lies in two folders."""
    places = {(header.study, folders[file]) for file, header in headers.items() if header.study}
    return (
        len({header.patient for header in headers.values()}) == 1
        and len(set(folders.values())) > 1
        and len(places) == len({study for study, _ in places})
    )


def _report_of(accessions: list[bytes], reports: dict[bytes, str]) -> str | None:
    """The report of a study; where its images have several accession numbers, those of all."""
    return " ".join(dict.fromkeys(reports[number] for number in accessions if number in reports)) or None


def _about_unused(reports: Set[bytes], studies: Set[bytes]) -> list[str]:
    """A note about the reports that have no study, by accession numbers; these stay untold."""
    unused = reports - studies
    if not unused:
        return []
    plain = {number.lstrip(b"0") for number in studies}
    zeros = sum(number.lstrip(b"0") in plain for number in unused)
    hint = f" ({zeros} would but for zeros in front: give the column as text)" if zeros else ""
    return [f"{len(unused)} reports of the table belong to no study here{hint}"]


def _with_strays(headers: dict[Path, Header]) -> dict[Path, Header]:
    """A damaged file gets the header of the one before it in its folder, so that the reader says what is wrong."""
    known: dict[Path, Header] = {}
    for file, header in headers.items():
        if not header.empty:
            known.setdefault(file.parent, header)
    last: dict[Path, Header] = {}
    mended = {}
    for file, header in headers.items():
        mended[file] = header if not header.empty else last.get(file.parent, known.get(file.parent, header))
        last[file.parent] = mended[file]
    return mended


def first_folder(file: Path, root: Path) -> tuple[str, str]:
    """The split that the first folder below the input names, if it does, and the folder of the patient, "" for none."""
    parts = list(file.relative_to(root).parts[:-1])
    split = SPLIT_NAMES.get(parts[0].lower(), "") if parts else ""
    parts = parts[1:] if split else parts
    return split, parts[0] if parts else ""


def _items(files: list[Path], headers: dict[Path, Header], names: Pseudonyms, root: Path) -> tuple[Item, ...]:
    """One item a series, or a zip. Equal labels within the study are told apart by a hash."""
    series: dict[bytes, list[Path]] = defaultdict(list)
    for file in files:
        zipped = file.suffix.lower() == ".zip"
        series[bytes(file.relative_to(root)) if zipped else headers[file].series].append(file)
    labels = {key: headers[members[0]].label for key, members in series.items()}
    count = Counter(labels.values())
    items = []
    for key, members in sorted(series.items(), key=lambda entry: (labels[entry[0]], entry[0])):
        name = labels[key] + (f"_{names('series', key, 6)}" if count[labels[key]] > 1 else "")
        archive = members[0].suffix.lower() == ".zip"
        items.append(
            Item(members[0], name, dicom=True) if archive
            else Item(members[0].parent, name, dicom=True, files=tuple(members))
        )  # fmt: skip
    return tuple(items)


def _texts(studies: dict[tuple, list[Path]], root: Path) -> dict[tuple, Path | None]:
    """The nearest `text.txt` beside or above the files of each study, if no other study lies there as well."""
    below: dict[Path, set[tuple]] = defaultdict(set)  # folder -> studies with files in it or below it
    for study, files in studies.items():
        for folder in {file.parent for file in files}:
            for above in (folder, *folder.parents):
                below[above].add(study)
                if above == root:
                    break
    texts: dict[tuple, Path | None] = dict.fromkeys(studies)
    for folder in sorted(below, key=lambda folder: len(folder.parts)):
        if len(below[folder]) == 1 and (folder / "text.txt").is_file():
            texts[next(iter(below[folder]))] = folder / "text.txt"  # a nearer one replaces one further up
    return texts


def _reports(options: SourceOptions) -> dict[bytes, str]:
    """Accession number -> report, of the table that `--reports` names."""
    if options.reports is None:
        return {}
    table = read_table(options.reports)
    columns = find_columns(options.reports, table, REPORT_COLUMNS, options.columns, ("accession", "text"))
    reports: dict[bytes, str] = {}
    rows: dict[bytes, int] = {}
    for number, row in enumerate(table, 1):
        accession = row.get(columns["accession"], "").encode()
        report = " ".join(row.get(columns["text"], "").split())
        if accession and report and reports.setdefault(accession, report) != report:
            raise SourceError(
                f"{options.reports}: two reports for one {columns['accession']}, in the rows {rows[accession]} and "
                f"{number}; join them, or leave one out"
            )
        rows.setdefault(accession, number)
    return reports
