"""Where METEOR's synonyms come from: a WordNet 3.0 that lies on this machine. Nothing is fetched."""

import os
import shutil
import tempfile
from pathlib import Path

import nltk

INSTALL_COMMAND = "apt-get install wordnet-base"
DEBIAN_FOLDER = Path("/usr/share/wordnet")

# WordNet 3.0 database files that nltk's reader opens.
_FILES = (
    "cntlist.rev",
    *(f"{kind}.{pos}" for kind in ("index", "data") for pos in ("adj", "adv", "noun", "verb")),
    *(f"{pos}.exc" for pos in ("adj", "adv", "noun", "verb")),
)

# The lexicographer files in their numeric order (WordNet manual, lexnames(5WN)); Debian ships no `lexnames` file.
_NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
_VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception "
    "possession social stative weather"
)
_LEXNAMES = (
    ["adj.all", "adj.pert", "adv.all"]
    + [f"noun.{name}" for name in _NOUNS.split()]
    + [f"verb.{name}" for name in _VERBS.split()]
    + ["adj.ppl"]
)
_CATEGORY = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}


def cache_folder() -> Path:
    """Folder for what we derive and can derive again: ``$XDG_CACHE_HOME/med3dvlm`` or ``~/.cache/med3dvlm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "med3dvlm"


def find_wordnet(debian_folder: Path = DEBIAN_FOLDER, cache: Path | None = None) -> str | None:
    """Make WordNet available to nltk and say where it lies.

    Looked for in nltk's own paths (``NLTK_DATA`` included), then in a private copy below ``cache`` made from Debian's
    package. It has to be a copy: nltk refuses links that leave its roots and files that others may write.

    Returns:
        the folder that holds ``corpora/wordnet``, or None when there is no WordNet (``INSTALL_COMMAND`` brings it).
    """
    root = (cache or cache_folder()) / "nltk_data"
    for path in [*nltk.data.path, str(root)]:
        if _is_complete(Path(path) / "corpora" / "wordnet"):
            break
    else:
        if not all((debian_folder / name).is_file() for name in _FILES):
            return None
        _copy_debian(debian_folder, root)
        path = str(root)
    if path not in nltk.data.path:
        nltk.data.path.append(path)
    return path


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (*_FILES, "lexnames"))


def _copy_debian(source: Path, root: Path) -> None:
    """Write ``root/corpora/wordnet``; it appears under its name only when it is whole."""
    corpora = root / "corpora"
    corpora.mkdir(parents=True, exist_ok=True, mode=0o755)
    temporary = Path(tempfile.mkdtemp(prefix=".wordnet-", dir=corpora))
    try:
        for name in _FILES:
            shutil.copyfile(source / name, temporary / name)
        lines = [f"{i:02d}\t{name}\t{_CATEGORY[name.split('.')[0]]}\n" for i, name in enumerate(_LEXNAMES)]
        (temporary / "lexnames").write_text("".join(lines), encoding="ascii")
        (temporary / "index.sense").touch()  # listed by nltk's reader, not used by METEOR
        for path in (root, corpora, temporary):
            path.chmod(0o755)
        for path in temporary.iterdir():
            path.chmod(0o644)
        if (corpora / "wordnet").exists():  # an incomplete one
            shutil.rmtree(corpora / "wordnet")
        os.replace(temporary, corpora / "wordnet")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
