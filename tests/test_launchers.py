"""The launchers: portable shell, flags that their targets know, and an environment that is set up once."""

import importlib
import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, dry_run, flags_in, flags_of, run_script

LAUNCHED = {
    "train_clip": "med3dvlm.train.clip",
    "pretrain_mm_projector": "med3dvlm.train.vlm",
    "finetune_lora": "med3dvlm.train.vlm",
    "merge_lora_weights_and_save_hf_model": "med3dvlm.train.merge",
    "eval_clip": "med3dvlm.evaluation.retrieval",
    "eval_caption": "med3dvlm.evaluation.caption",
    "eval_vqa": "med3dvlm.evaluation.vqa",
    "demo": "med3dvlm.demo",
}
TRAINING = ["train_clip", "pretrain_mm_projector", "finetune_lora"]
SHELL_FILES = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/slurm/*.sbatch")])


def module_and_arguments(command: list[str]) -> tuple[str, list[str]]:
    """Split the printed command behind the name of our module."""
    position = next(i for i, argument in enumerate(command) if argument.startswith("med3dvlm."))
    return command[position], command[position + 1 :]


# --- the shell --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
@pytest.mark.parametrize("shell", ["sh", "dash"])
def test_is_valid_posix_shell(shell, path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_tests():
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci/run")]).returncode == 0
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec sh scripts/test.sh")


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_defaults_are_known_and_users_flags_come_last(name, tmp_path):
    command = dry_run(f"scripts/{name}.sh", "--seed", "7", "--note=two words", cwd=tmp_path)
    module, arguments = module_and_arguments(command)
    assert module == LAUNCHED[name]
    assert arguments[-3:] == ["--seed", "7", "--note=two words"]
    unknown = set(flags_in(arguments[:-3])) - flags_of(module)
    assert not unknown, f"{module} does not know {sorted(unknown)}"


# stage of parse_stage; epochs, batch per device, learning rate and weight decay of the published launchers
RECIPES = {
    "train_clip": ("clip", 100, 64, 1e-4, 0.1),
    "pretrain_mm_projector": ("vlm", 3, 16, 1e-4, 0.0),
    "finetune_lora": ("vlm", 5, 8, 5e-5, 0.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_launcher_and_module_defaults_are_the_published_recipe(name, tmp_path):
    from med3dvlm.train import arguments

    stage, *recipe = RECIPES[name]
    classes = {
        "clip": (arguments.CLIPModelArguments, arguments.PairDataArguments, arguments.CLIPTrainingArguments),
        "vlm": (arguments.VLMModelArguments, arguments.QADataArguments, arguments.VLMTrainingArguments),
    }[stage]
    launched = module_and_arguments(dry_run(f"scripts/{name}.sh", cwd=tmp_path))[1]
    bare = ["--lora_enable", "True"] if name == "finetune_lora" else []
    for argv in (launched, bare):
        *_, training = arguments.parse_stage(stage, classes, argv, name)
        found = (training.num_train_epochs, training.per_device_train_batch_size, training.learning_rate)
        assert [*found, training.weight_decay] == recipe
        assert training.lr_scheduler_type == "cosine" and training.warmup_ratio == 0.03


@pytest.mark.parametrize("name", LAUNCHED)
def test_defaults_do_not_depend_on_the_working_directory(name, tmp_path):
    _, arguments = module_and_arguments(dry_run(f"scripts/{name}.sh", cwd=tmp_path))
    paths = [a for a in arguments if "/data" in a or "/output" in a or "/models" in a]
    assert paths and all(Path(path).is_relative_to(ROOT) for path in paths)


def test_launcher_starts_its_module_from_another_directory(tmp_path):
    done = run_script("scripts/merge_lora_weights_and_save_hf_model.sh", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--model_with_lora" in done.stdout


def test_console_commands_lead_to_functions():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name
        assert f"`{name}`" in (ROOT / "README.md").read_text()


def test_test_script_passes_its_arguments_on(fake_checkout):
    done = fake_checkout("-k", "some thing")
    assert done.stdout.splitlines() == ["-m", "pytest", "-q", "-k", "some thing"]


# --- processes and devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINING)
def test_one_process_on_cpu(name, tmp_path):
    command = dry_run(f"scripts/{name}.sh", cwd=tmp_path)
    assert command[1:3] == ["-m", LAUNCHED[name]]
    assert "--deepspeed" not in command


def test_two_cpu_processes_use_deepspeed(tmp_path):
    command = dry_run("scripts/train_clip.sh", cwd=tmp_path, NPROC="2")
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert command[command.index("--nproc_per_node") + 1] == "2"
    assert command[command.index("--deepspeed") + 1] == str(ROOT / "scripts/zero2.json")
    assert command[command.index("--use_cpu") + 1] == "True"


def test_all_visible_gpus_are_used(tmp_path):
    command = dry_run("scripts/finetune_lora.sh", cwd=tmp_path, CUDA_VISIBLE_DEVICES="1,2,5")
    assert command[command.index("--nproc_per_node") + 1] == "3"
    assert "--use_cpu" not in command
    single = dry_run("scripts/finetune_lora.sh", cwd=tmp_path, CUDA_VISIBLE_DEVICES="1")
    assert single[1:3] == ["-m", "med3dvlm.train.vlm"]


def test_host_file_and_deepspeed_configuration(tmp_path):
    command = dry_run("scripts/train_clip.sh", cwd=tmp_path, HOSTFILE="hosts", DEEPSPEED_CONFIG="mine.json")
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts"]
    assert command[command.index("--deepspeed") + 1] == "mine.json"


def test_several_nodes(tmp_path):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "2345"}
    command = dry_run("scripts/train_clip.sh", cwd=tmp_path, CUDA_VISIBLE_DEVICES="0,1", **nodes)
    for flag, value in [("--nnodes", "2"), ("--node_rank", "1"), ("--master_addr", "node0"), ("--nproc_per_node", "2")]:
        assert command[command.index(flag) + 1] == value


@pytest.mark.parametrize("script", ["train_clip", "finetune_lora"])
def test_slurm_scripts_call_an_existing_launcher(script):
    text = (ROOT / f"scripts/slurm/{script}.sbatch").read_text()
    assert f"exec sh scripts/{script}.sh" in text
    for variable in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        assert variable in text and variable in (ROOT / "scripts/lib/env.sh").read_text()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configuration_leaves_sizes_to_the_trainer(stage):
    config = json.loads((ROOT / f"scripts/zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    sizes = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
    assert all(config[size] == "auto" for size in sizes)
    assert config["bf16"]["enabled"] == "auto"


# --- the environment --------------------------------------------------------------------------------------------------

# An interpreter that only pretends: it says a version, "makes" environments by copying itself, and logs pip's calls.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-c import sys"*) echo "$FAKE_VERSION" ;;
    "-c import ensurepip"*) exit "${VENV_STATUS:-0}" ;;
    -V) echo "Python $FAKE_VERSION.1" ;;
    "-m venv --clear "*) echo "venv" >>"$LOG"; mkdir -p "$4/bin"; rm -f "$4"/.installed-*
        { echo "#!/bin/sh"; echo "FAKE_VERSION=$FAKE_VERSION"; tail -n +2 "$0"; } >"$4/bin/python"
        chmod +x "$4/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install"*) echo "pip install" >>"$LOG"; exit "${PIP_STATUS:-0}" ;;
    *) printf '%s\\n' "$@" ;;
esac
"""


@pytest.fixture
def fake_checkout(tmp_path):
    """A copy of the scripts beside a pretended interpreter; calling it runs scripts/test.sh there."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "requirements-cpu.txt").write_text("torch==2.13.0\n")
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run(*arguments, **variables):
        environment = os.environ | {"PYTHON": str(python), "LOG": str(tmp_path / "log"), "FAKE_VERSION": "3.12"}
        command = ["sh", str(tmp_path / "scripts/test.sh"), *arguments]
        environment = {k: v for k, v in (environment | variables).items() if v is not None}
        return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60)

    run.folder = tmp_path
    run.log = lambda: (tmp_path / "log").read_text().splitlines()
    return run


def test_second_start_installs_nothing(fake_checkout):
    assert fake_checkout().returncode == 0
    assert fake_checkout.log() == ["venv", "pip install"]
    assert fake_checkout().returncode == 0
    assert fake_checkout(PYTHON=None).returncode == 0
    assert fake_checkout.log() == ["venv", "pip install"]


def test_changed_requirements_are_installed(fake_checkout):
    fake_checkout()
    (fake_checkout.folder / "requirements-cpu.txt").write_text("torch==2.14.0\n")
    fake_checkout()
    assert fake_checkout.log() == ["venv", "pip install", "pip install"]


def test_failed_installation_is_not_taken_as_done(fake_checkout):
    failed = fake_checkout(PIP_STATUS="1")
    assert failed.returncode != 0 and "pip could not install" in failed.stderr
    assert fake_checkout().returncode == 0
    assert fake_checkout.log() == ["venv", "pip install", "pip install"]


def test_python_picks_the_interpreter(fake_checkout):
    fake_checkout()
    assert "made again" in fake_checkout(FAKE_VERSION="3.13").stderr
    assert fake_checkout.log() == ["venv", "pip install"] * 2


@pytest.mark.parametrize("version, message", [("3.10", "is Python 3.10; 3.11, 3.12 or 3.13 is needed"), ("", "needed")])
def test_unsupported_python_is_refused(fake_checkout, version, message):
    done = fake_checkout(FAKE_VERSION=version)
    assert done.returncode == 1 and message in done.stderr
    assert not (fake_checkout.folder / ".venv").exists()


def test_missing_interpreter_is_named(fake_checkout):
    done = fake_checkout(PYTHON="no-such-python")
    assert done.returncode == 1 and "PYTHON=no-such-python does not start" in done.stderr


def test_missing_system_package_is_named_with_the_command_that_installs_it(fake_checkout):
    done = fake_checkout(VENV_STATUS="1")
    assert done.returncode == 1
    assert "apt-get install -y python3.12-venv" in done.stderr
    assert not (fake_checkout.folder / ".venv").exists()


def test_half_made_environment_is_made_again(fake_checkout):
    (fake_checkout.folder / ".venv/bin").mkdir(parents=True)
    assert fake_checkout().returncode == 0
    assert fake_checkout.log() == ["venv", "pip install"]


def test_the_benchmark_says_what_it_can_time(tmp_path):
    done = run_script("scripts/benchmark.sh", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "sh scripts/benchmark.sh encoder" in done.stdout
