"""Starting the app: which model, which port, what is refused; and what it leaves behind."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from med3dvlm.app import main
from med3dvlm.app.opening import find_examples
from med3dvlm.inference import load_model
from tests.helpers.commands import ROOT
from tests.helpers.tiny_model import write_tiny_clip, write_tiny_vlm


def test_without_a_model_random_weights_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(main, "QUICKSTART", tmp_path)
    model, name, random = main.choose_model(main.parse_arguments([]))
    assert name == "random weights" and "mean nothing" in random
    assert model.processor.preprocess.size == (128, 256, 256)
    assert "scripts/quickstart.sh" in capsys.readouterr().err


def test_the_quickstarts_model_is_taken_where_there_is_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(main, "QUICKSTART", tmp_path)
    write_tiny_vlm(tmp_path / "model")
    _, name, random = main.choose_model(main.parse_arguments(["--device", "cpu"]))
    assert "quickstart" in name and random == ""
    (tmp_path / "model/model.safetensors").unlink()
    _, name, random = main.choose_model(main.parse_arguments([]))
    assert name == "random weights" and "left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--share"], ["--max_upload_gb", "0"], ["--port", "x"], ["--port", "0"], ["--port", "65536"],
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, monkeypatch, capsys):
    monkeypatch.delenv(main.PASSWORD_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as stop:
        main.parse_arguments(arguments)
    assert stop.value.code == 2
    assert "password" in capsys.readouterr().err or arguments != ["--share"]


def test_sharing_takes_the_password_from_the_environment(monkeypatch):
    monkeypatch.setenv(main.PASSWORD_VARIABLE, "secret")
    args = main.parse_arguments(["--share"])
    assert args.share and args.password == "secret"


def test_port_from_the_environment(monkeypatch):
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7999")
    assert main.parse_arguments([]).port == 7999
    assert main.parse_arguments(["--port", "8001"]).port == 8001
    monkeypatch.setenv("GRADIO_SERVER_PORT", "many")
    with pytest.raises(SystemExit):
        main.parse_arguments([])


def test_a_device_that_is_not_there_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(main, "QUICKSTART", tmp_path)
    write_tiny_vlm(tmp_path / "model")
    assert main.run(["--device", "nonsense"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: device nonsense") and "\n" not in error


def test_a_port_that_is_taken_is_one_sentence(monkeypatch, tmp_path, capsys):
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'med3dvlm[app]'")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        model = write_tiny_vlm(tmp_path / "vlm")
        assert main.run(["--port", str(port), "--device", "cpu", "--model_name_or_path", str(model)]) == 1
    error = capsys.readouterr().err.strip()
    assert f"port {port} is taken" in error and "\n" not in error
    assert not [*tmp_path.glob("med3dvlm-app-*")]


def test_models_that_cannot_be_used_are_one_sentence(tmp_path, capsys):
    incomplete = write_tiny_vlm(tmp_path / "vlm")
    (incomplete / "model.safetensors").unlink()
    clip = write_tiny_clip(tmp_path / "clip")
    for folder in (tmp_path / "nowhere", incomplete, clip):
        assert main.run(["--model_name_or_path", str(folder)]) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(main, "find_spec", lambda name: None)
    assert main.run([]) == 1
    assert "pip install" in capsys.readouterr().err


def test_examples(tmp_path):
    assert find_examples(tmp_path / "samples", tmp_path / "quickstart") == []
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/chest.nii.gz").write_bytes(b"")
    (tmp_path / "samples/README.md").write_text("no scan")
    data = tmp_path / "quickstart/data"
    (data / "M3D_Cap_npy").mkdir(parents=True)
    cases = [{"image": f"M3D_Cap_npy/{number}.nii.gz"} for number in range(5)]
    (data / "M3D_Cap_npy/M3D_Cap.json").write_text(json.dumps({"test": cases}))
    for number in (0, 1):
        (data / f"M3D_Cap_npy/{number}.nii.gz").write_bytes(b"")
    found = [example.name for example in find_examples(tmp_path / "samples", tmp_path / "quickstart")]
    assert found == ["chest.nii.gz", "Phantom 1", "Phantom 2"]


def test_the_vendored_viewer_is_the_one_that_its_note_names():
    folder = Path(main.__file__).parent / "static/niivue"
    digest = hashlib.sha256((folder / "niivue.umd.js").read_bytes()).hexdigest()
    assert digest in (folder / "VERSION").read_text()
    assert "Redistribution" in (folder / "LICENSE").read_text()


@pytest.mark.slow
def test_app_py_without_arguments_serves_a_page_and_cleans_up(tmp_path):
    """Random weights or the quickstart's model, whatever is there; ended as a service manager ends it."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "GRADIO_SERVER_PORT": "7979"}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                page = urllib.request.urlopen("http://127.0.0.1:7979/").read()
                break
            except OSError:
                assert app.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        assert b"Med3DVLM" in page
        assert [*tmp_path.glob("med3dvlm-app-*")]
        app.send_signal(signal.SIGTERM)
        assert app.wait(timeout=30) == 0
        assert not [*tmp_path.glob("med3dvlm-app-*")]
    finally:
        app.kill()


def test_answers_of_random_weights_say_so(monkeypatch, tmp_path):
    """Through the page's own code, without a browser."""
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'med3dvlm[app]'")
    from med3dvlm.app.page import Page
    from med3dvlm.inference import Answer, Sampling

    model = load_model(write_tiny_vlm(tmp_path / "vlm"), device="cpu")
    page = Page(model, None, "random weights", main.RANDOM, [], 1)
    facts = page._facts(Answer("words", 3, 1.0, {}), Sampling(), stopped=False)
    assert facts["notes"] == [main.RANDOM] and "Research only" in facts["facts"]

    messages = [{"text": "Why?"}, {"text": ""}]
    session = SimpleNamespace(messages=messages, answering=True, stream=None, chat=None, shown=lambda: messages[-1])
    monkeypatch.setattr(page, "_session", lambda request: session)
    (shown,) = page.answer(None, 1.0, 8, 0, None)  # a field of numbers that was emptied
    assert 'A field under "Sampling" is empty' in str(shown)
