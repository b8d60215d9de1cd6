"""Who may import whom, what no module may do, and what lies at the top level: read from the sources, nothing is run."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("med3dvlm/**/*.py"), *ROOT.glob("utls/*.py"), *ROOT.glob("app.py")])

# A module may import what its longest matching prefix allows, and what is below an allowed prefix.
MAY_IMPORT = {
    "med3dvlm": {"configuration", "model", "data", "processing", "inference"},
    "med3dvlm.configuration": set(),
    "med3dvlm.model": {"configuration", "model"},
    "med3dvlm.model.losses": set(),
    "med3dvlm.data": {"configuration", "data"},
    "med3dvlm.processing": {"configuration", "data", "model.weights"},
    "med3dvlm.inference": {"configuration", "model", "data", "processing", "inference"},
    "med3dvlm.train": {"configuration", "model", "data", "processing", "train"},
    "med3dvlm.evaluation": {"inference", "data", "evaluation"},
    "med3dvlm.evaluation.metrics": set(),
    "med3dvlm.benchmark": {"configuration", "model", "data", "processing", "benchmark"},
    "med3dvlm.app": {"configuration", "inference", "data", "app"},
    "med3dvlm.app.random_weights": {"configuration", "model", "data", "processing"},
    "med3dvlm.demo": {"inference", "data", "demo"},
    "utls": {"data"},
    "app": {"inference", "data", "app"},
}
FORBIDDEN = {"torchvision": "its wheel breaks a CPU torch", "timm": "it needs torchvision"}

TOP_LEVEL = {
    ".ci", ".gitignore", "CITATION.cff", "LICENSE", "README.md", "docs", "env.yaml", "med3dvlm", "pyproject.toml",
    "requirements-cpu.txt", "requirements.txt", "scripts", "tests", "utls",
}  # fmt: skip
LATER = {"app.py"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Full names of everything that a file imports, at any depth of the file."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # "from med3dvlm.model import vlm" imports a module, "from med3dvlm.configuration import VLMConfig" a name.
            names |= {f"{source}.{alias.name}" if is_package(source) else source for alias in node.names}
    return names


def is_package(name: str) -> bool:
    return (ROOT.joinpath(*name.split(".")) / "__init__.py").exists()


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_keep_to_the_plan(path):
    name = module_name(path)
    rule = max((prefix for prefix in MAY_IMPORT if below(name, prefix)), key=len)
    allowed = {f"med3dvlm.{part}" for part in MAY_IMPORT[rule]}
    ours = {imported for imported in imports_of(path) if below(imported, "med3dvlm")}
    wrong = sorted(i for i in ours if not any(below(i, prefix) for prefix in allowed))
    assert not wrong, f"{name} imports {wrong}; as {rule} it may import {sorted(allowed)}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_module_does_what_the_house_rules_forbid(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & FORBIDDEN.keys(), {name: FORBIDDEN[name] for name in roots & FORBIDDEN.keys()}
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler) and catches_everything(node):
            assert any(isinstance(n, ast.Raise) for n in ast.walk(node)), f"{where} swallows an exception"
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert "trust_remote_code" not in keywords, f"{where} mentions trust_remote_code"
            if ast.unparse(node.func) == "torch.load":
                assert keywords.get("weights_only") == "True", f"{where} loads a pickle without weights_only=True"


def catches_everything(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_stay_readable(path):
    source = path.read_text()
    if path.is_relative_to(ROOT / "med3dvlm/model"):
        assert len(source.splitlines()) < 300, "a model file has fewer than 300 lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} has 80 lines or more"


def test_top_level_is_the_planned_one():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout with files in it")
    found = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert found - LATER == TOP_LEVEL


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_requirement_sets_agree():
    cpu, gpu = pins("requirements-cpu.txt"), pins("requirements.txt")
    assert set(gpu) - set(cpu) == {"torchvision", "wandb", "bitsandbytes"}
    assert cpu == {name: version for name, version in gpu.items() if name in cpu}


def test_everything_imported_is_required():
    """Names that we import belong to packages which both pyproject.toml and the requirements name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = sum(project["optional-dependencies"].values(), [])
    declared = {normal(re.split(r"[<>=~!\[ ]", line)[0]) for line in project["dependencies"] + optional}
    required = {normal(name) for name in pins("requirements-cpu.txt")}
    assert declared - required == {"wandb", "bitsandbytes", "triton"} and required - declared == set()

    roots = {name.split(".")[0] for path in SOURCES for name in imports_of(path)}
    third_party = roots - sys.stdlib_module_names - {"med3dvlm", "utls", ""}
    providers = packages_distributions()
    missing = {root for root in third_party if not {normal(name) for name in providers.get(root, [root])} & declared}
    assert not missing, f"imported but not declared: {sorted(missing)}"


def normal(name: str) -> str:
    return name.lower().replace("_", "-")
