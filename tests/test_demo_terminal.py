"""The command in a terminal (a pseudo-terminal) and in real pipes."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest

from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.demo.arguments import parse_arguments
from med3dvlm.demo.interactive import Conversation
from med3dvlm.demo.terminal import BOLD, Terminal, typed_path
from med3dvlm.inference import load_model
from tests.helpers.commands import ROOT
from tests.helpers.tiny_data import write_prepared_tree
from tests.helpers.tiny_model import TINY_SIZE, write_tiny_vlm

# Makes its standard input the controlling terminal, so that Ctrl-C is a signal; then becomes the command. Tests that
# run in the background may have been told to ignore that signal, which children inherit.
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "med3dvlm.demo", *sys.argv[1:]])
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm"))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    root = write_prepared_tree(tmp_path_factory.mktemp("data"), cases=2, size=TINY_SIZE)
    return sorted(map(str, root.glob("M3D_Cap_npy/ct_case/*/*.nii.gz")))


class Session:
    """The command at the other end of a pseudo-terminal."""

    def __init__(self, *arguments: str):
        self.terminal, inner = pty.openpty()
        command = [sys.executable, "-c", IN_TERMINAL, *arguments]
        environment = {key: value for key, value in ENVIRONMENT.items() if key != "NO_COLOR"}
        self.process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment)
        os.close(inner)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def read(self, seconds: float) -> str:
        """What is printed next."""
        assert select.select([self.terminal], [], [], max(0, seconds))[0], "nothing more is printed"
        try:
            return os.read(self.terminal, 65536).decode(errors="replace")
        except OSError:  # how Linux says that the other end is closed
            pytest.fail("the command has ended")

    def until(self, awaited: str, seconds: float = 60) -> str:
        """Everything printed from now on until `awaited` has come."""
        printed, end = "", time.monotonic() + seconds
        while awaited not in printed:
            printed += self.read(end - time.monotonic())
        return printed

    def interrupt(self) -> str:
        """Ctrl-C, and everything until the command says that it was interrupted.

        Repeated where nothing comes: `input` does not notice a signal between its prompt and its wait for a key.
        """
        self.type("\x03")
        for _ in range(20):
            if select.select([self.terminal], [], [], 3)[0]:
                break
            self.type("\x03")
        return self.until("interrupted")

    def end(self) -> int:
        """The exit code as a shell gives it."""
        code = self.process.wait(timeout=60)
        os.close(self.terminal)
        return 128 - code if code < 0 else code


@pytest.fixture
def session():
    """Starts sessions, and ends those that a failing test leaves behind."""
    started = []

    def start(*arguments: str) -> Session:
        started.append(Session(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_chat(session, scans, tmp_path):
    model = str(write_tiny_vlm(tmp_path / "vlm", max_position_embeddings=8192))
    chat = session("--model_name_or_path", model, "--image_path", scans[0], "--max_new_tokens", "8000")
    start = chat.until("\n> ")
    assert "research only" in start and os.path.basename(scans[0]) in start and BOLD in start
    for line, answer in (
        ("Where?", None),
        ("/help", "/image PATH"),
        ("/nothing", "/nothing is no command; /help lists them"),
        ("/Repotr", "did you mean /report?"),
        ("/image", "/image needs the path"),
        (f"/save {tmp_path / 'vlm' / 'config.json' / 'chat.txt'}", "cannot be written"),
        ("What is <im_patch>?", "holds <im_patch>"),
        ("/image nowhere.nii.gz", "nowhere.nii.gz: no such file"),
        (f"/image '{scans[1]}'", os.path.basename(scans[1])),
        ("/reset", "starts over"),
        ("/report", None),
        (f"/save {tmp_path / 'chat.json'}", "2 turns written"),
        (f"/save {tmp_path / 'chat.json'}", "exists, name another file"),
        (f"/save {tmp_path / 'chat.txt'}", "2 turns written"),
    ):
        chat.type(line + "\n")
        if answer is None:  # an answer that would take minutes streams, and Ctrl-C stops it, not the chat
            chat.until("\n")  # the echo of the question
            for _ in range(5):
                chat.read(60)
            chat.type("\x03")
            answer = "cut off. For research only"
        assert answer in chat.until("\n> "), line
    assert "Traceback" not in chat.interrupt()
    assert chat.end() == 130
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [turn["question"] for turn in saved] == ["Where?", CAPTION_PROMPTS[0]]
    assert [turn["image"] for turn in saved] == scans
    assert all(1 <= turn["tokens"] < 8000 and not turn["finished"] for turn in saved)
    text = (tmp_path / "chat.txt").read_bytes().decode()
    assert "research only" in text and saved[0]["answer"] in text


@pytest.mark.slow
def test_many_scans_show_how_far_they_are_and_end_cleanly(session, model, scans, tmp_path):
    """In a terminal that does not say how large it is, too."""
    (tmp_path / "scans.csv").write_text("image,question\n" + "".join(f"{scans[i % 2]},{i}?\n" for i in range(400)))
    output = tmp_path / "answers.jsonl"
    batch = session("--model_name_or_path", model, "--image_path", str(tmp_path / "scans.csv"), "--device", "cpu",
                    "--output", str(output))  # fmt: skip
    batch.until("/400 [")
    deadline = time.monotonic() + 120
    while (not output.exists() or output.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "Traceback" not in batch.interrupt()
    assert batch.end() == 130
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert 3 <= len(rows) < 400 and [row["question"] for row in rows] == [f"{i}?" for i in range(len(rows))]


class Lines:
    """What is typed, in place of `input`; an exception is raised."""

    def __init__(self, *lines):
        self.lines = iter(lines)

    def __call__(self, prompt):
        line = next(self.lines)
        if isinstance(line, BaseException):
            raise line
        return line


def test_what_is_typed_ends_no_chat(model, scans, tmp_path, capsys, monkeypatch):
    """Bytes that are no text, the home of nobody, an interrupt while a scan is read."""
    args = parse_arguments(["--model_name_or_path", model, "--max_new_tokens", "3"])
    chat = Conversation(load_model(model, device="cpu"), args, Terminal())
    monkeypatch.chdir(tmp_path)
    see, interrupted = chat.chat.model.see, [KeyboardInterrupt()]
    monkeypatch.setattr(
        chat.chat.model, "see",
        lambda scan, **reading: (_ for _ in ()).throw(interrupted.pop()) if interrupted else see(scan, **reading),
    )  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(scans[0], tmp_path / "at home.nii.gz")
    lines = ["Where?", "/report", f"/image {scans[0]}", "/image ~/at home.nii.gz", "wh\udcffere",
             "/save ~no-such-user/a.txt", "/quit please", "never read"]  # fmt: skip
    monkeypatch.setattr("builtins.input", Lines(*lines))
    assert len(chat.run()) == 1
    printed = capsys.readouterr().out
    assert printed.count("No scan yet: /image PATH") == 3 and "\nstopped\n" in printed
    assert "at home.nii.gz: 32x64x64 voxels" in printed and "1 turns written to ~no-such-user/a.txt" in printed
    monkeypatch.setattr("builtins.input", Lines(EOFError()))
    assert len(chat.run()) == 1


@pytest.mark.slow
def test_an_interrupt_ends_a_single_answer(session, model, scans):
    command = session("--model_name_or_path", model, "--image_path", scans[0], "--question", "Where?",
                      "--max_new_tokens", "400", "--device", "cpu")  # fmt: skip
    command.until("answer:")
    assert "Traceback" not in command.interrupt()
    assert command.end() == 130


@pytest.mark.slow
def test_an_interrupt_while_loading(session, model, scans):
    command = session("--model_name_or_path", model, "--image_path", scans[0], "--question", "Where?")
    time.sleep(1.0)  # in the middle of the imports
    assert "Traceback" not in command.interrupt()
    assert command.end() == 130


@pytest.mark.slow
def test_pipes(model, scans):
    flags = f"--model_name_or_path {model} --image_path {scans[0]} --max_new_tokens 20 --device cpu"
    line = f'echo "Where?" | {sys.executable} -m med3dvlm.demo {flags}'
    done = subprocess.run(line, shell=True, env=ENVIRONMENT, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"question: Where?" in done.stdout and b"\033" not in done.stdout + done.stderr
    line = f"yes Where? | head -50 | {sys.executable} -m med3dvlm.demo {flags} | head -2"
    done = subprocess.run(line, shell=True, env=ENVIRONMENT, capture_output=True, timeout=120)
    assert done.stdout.startswith(b"question: Where?") and b"Traceback" not in done.stderr and not done.stderr


def test_a_path_as_terminals_write_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my scan (1).nii", "a\\ b.nii", "it's.nii"):
        (tmp_path / name).touch()
    escaped = f"{tmp_path}/my\\ scan\\ \\(1\\).nii"
    for typed in (escaped, f"{tmp_path}/my scan (1).nii", f"'{tmp_path}/my scan (1).nii'", "~/my\\ scan\\ \\(1\\).nii"):
        assert typed_path(typed) == f"{tmp_path}/my scan (1).nii"
    assert typed_path(f"{tmp_path}/it\\'s.nii") == f"{tmp_path}/it's.nii"
    for typed in ("a\\ b.nii", "gone\\ by.nii", "new\\", "my\\ scan two"):  # as typed: there, or nowhere
        assert typed_path(f"{tmp_path}/{typed}") == f"{tmp_path}/{typed}"


def test_no_colours_where_they_are_not_wanted(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Terminal().styled("a", BOLD) != "a"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Terminal().styled("a", BOLD) == "a"
