import nltk
import pytest

from med3dvlm.evaluation import metrics, wordnet


def test_missing_wordnet_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nowhere")])
    assert wordnet.find_wordnet(debian_folder=tmp_path / "no_package", cache=tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()


def test_debian_files_are_copied_whole_with_lexnames(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    package = tmp_path / "package"
    package.mkdir()
    for name in wordnet._FILES:
        (package / name).write_text(name)
    cache = tmp_path / "cache"

    root = wordnet.find_wordnet(debian_folder=package, cache=cache)

    folder = cache / "nltk_data" / "corpora" / "wordnet"
    assert root == str(cache / "nltk_data") and nltk.data.path == [root]
    assert (folder / "data.noun").read_text() == "data.noun"
    lexnames = (folder / "lexnames").read_text().splitlines()
    assert len(lexnames) == 45  # lexnames(5WN)
    assert lexnames[0] == "00\tadj.all\t3" and lexnames[26] == "26\tnoun.state\t1" and lexnames[44] == "44\tadj.ppl\t3"
    assert [path.name for path in folder.parent.iterdir()] == ["wordnet"]  # nothing temporary is left
    for path in [folder, *folder.iterdir()]:
        assert path.stat().st_mode & 0o022 == 0  # nltk refuses what others may write


def test_meteor_counts_synonyms():
    if wordnet.find_wordnet() is None:
        pytest.skip(f"no WordNet on this machine; {wordnet.INSTALL_COMMAND} brings it")
    reference = "a physician saw the cyst"
    assert metrics.meteor("a doctor saw the cyst", reference) > metrics.meteor("a painter saw the cyst", reference)
    assert 0.99 < metrics.meteor(reference, reference) < 1
