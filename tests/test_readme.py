"""What README and docs tell the reader to type exists: scripts, modules, flags, files, names."""

import ast
import importlib
import re
import shlex
import tomllib

import pytest

from tests.helpers.commands import ROOT, dry_run, flags_in, flags_of

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SETUP_SCRIPTS = ("scripts/quickstart.sh", "scripts/test.sh")
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:sh|python|pip|conda|sbatch) ")


def commands() -> list[tuple[str, str]]:
    """(document, command) of every line of a ```sh block and of every inline `code` that is a command."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S)
        lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        found += [(document.name, line) for line in lines if line]
        found += [(document.name, code) for code in inline if COMMAND.match(code) and "..." not in code]
    return sorted(set(found))


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables set in front of a command, and its words."""
    words = shlex.split(command)
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    return variables, words


def test_documents_name_commands():
    assert len(commands()) > 20
    assert all(COMMAND.match(command) for _, command in commands())


@pytest.mark.parametrize("document, command", commands(), ids=lambda value: value)
def test_command_exists_and_knows_its_flags(document, command, tmp_path):
    variables, words = words_of(command)
    program, rest = words[0], words[1:]
    if program == "sh":
        assert (ROOT / rest[0]).is_file()
        for name in variables:
            assert name in (ROOT / "scripts/lib/env.sh").read_text()
        if rest[0] not in SETUP_SCRIPTS:  # those two install before anything else; test_launchers.py covers them
            printed = dry_run(*rest, cwd=tmp_path, **variables)
            module = next(argument for argument in printed if argument.startswith("med3dvlm."))
            assert not set(flags_in(rest)) - flags_of(module)
    elif program == "python":
        target, arguments = (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
        subcommand = [word for word in arguments[:1] if word.isidentifier()]
        assert not set(flags_in(arguments)) - flags_of(target, *subcommand)
    elif program in ("pip", "conda"):
        files = [word for word in rest if word.endswith((".txt", ".yaml"))]
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        installs = [["install", "."], *(["install", f".[{extra}]"] for extra in extras)]
        assert all((ROOT / file).is_file() for file in files) and (files or rest in installs)
    else:
        assert program == "sbatch" and (ROOT / rest[0]).is_file()


def test_checkpoint_parts_are_the_documented_ones():
    from med3dvlm.model.checkpoint import PARTS

    sentence = re.search(r"^`--part` is (.*)\.$", (ROOT / "README.md").read_text(), flags=re.M)
    assert set(re.findall(r"`(\w+)`", sentence[1])) == set(PARTS)


def anchors_of(document):
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), target


def test_python_examples_use_existing_names():
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_readme_says_what_must_be_said():
    text = (ROOT / "README.md").read_text()
    first = re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S)[:2]
    assert [block.strip() for block in first] == [f"sh {script}" for script in SETUP_SCRIPTS]
    for sentence in ("not a medical device", "withdrawn", "None of them was measured with this code"):
        assert sentence in text
