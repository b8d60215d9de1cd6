"""Questions and answers in a real browser: streaming, stopping, templates, sampling, export, two people at once."""

import re
import time
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.inference import NOTICE
from tests.app.conftest import ask, open_scan

EVIL = "<img src=x onerror='window.hacked=1'> **bold** [link](javascript:alert(1)) <script>window.hacked=1</script>"


@pytest.fixture(autouse=True)
def afresh(page, server, script):
    script.tokenizer = server.sessions.model.processor.tokenizer
    with page.expect_response("**/run/predict"):
        page.click("#reset")
    page.wait_for_selector(".log .hint")


def test_an_answer_streams_and_says_how_it_came_about(page, script):
    script.text = " ".join(["A large cyst is seen in the liver."] * 4)
    script.pause = 0.03  # a letter; 4 s in all, so that a browser that stands still for a second sees parts of it
    page.fill("#question textarea", "What is seen?")
    page.locator("#question textarea").press("Enter")
    lengths = []
    while page.evaluate("document.body.matches('[data-answering]') || !document.querySelector('.log .assistant')"):
        lengths.append(len(page.evaluate("document.querySelector('.log .assistant p')?.textContent ?? ''")))
        time.sleep(0.02)
    assert len(set(lengths)) > 4 and lengths == sorted(lengths)
    message = page.inner_text(".log .assistant")
    assert script.text in message
    assert "Research only" in message and re.search(r"\d+ tokens in \d+\.\d+ s", message) and "greedy" in message
    assert page.input_value("#question textarea") == ""


def test_history_stays_and_can_be_left_behind(page, script):
    for number in (1, 2):
        script.text = f"answer {number}"
        assert ask(page, f"question {number}") == f"answer {number}"
    texts = page.locator(".log article p:first-child").all_inner_texts()
    assert texts == ["question 1", "answer 1", "question 2", "answer 2"]
    page.click("#reset")
    page.wait_for_selector(".log .hint")
    assert page.locator(".log article").count() == 0


def test_stop(page, script):
    script.text, script.pause = "a word " * 60, 0.05
    page.fill("#question textarea", "Go on")
    page.click("#ask")
    page.wait_for_function("document.querySelector('.log .assistant p')?.textContent.length > 3")
    page.click("#stop")
    page.wait_for_selector(".log .assistant footer", timeout=3000)
    message = page.inner_text(".log .assistant")
    assert "Stopped." in message and len(message) < 300
    page.click("#stop")  # nothing to stop: does nothing
    script.text, script.pause = "the next", 0
    assert ask(page, "And now?") == "the next"


def test_templates_ask_what_the_model_was_trained_on(page, script, server, monkeypatch):
    script.text = "fine"
    kinds = []
    session = server.sessions.by_token(page.evaluate("window.med3dvlm.state.session"))
    stream = session.chat.stream
    monkeypatch.setattr(session.chat, "stream", lambda q, kind, *a, **k: kinds.append(kind) or stream(q, kind, *a, **k))
    labels = page.locator("#templates button").all_inner_texts()
    assert labels == ["Report", "Plane", "Phase", "Organ", "Abnormality", "Location"]
    for label in ("Report", "Organ"):
        page.click(f"#templates >> text={label}")
        page.wait_for_function("document.querySelector('#question textarea').value")
        assert ask(page, page.input_value("#question textarea")) == "fine"
        page.fill("#question textarea", "")
    assert page.locator(".log .user p").first.inner_text() == CAPTION_PROMPTS[0]
    assert kinds == ["caption", "vqa"]


def test_sampling_settings_reach_the_model(new_page, scan, script):
    page = new_page()
    open_scan(page, scan)
    script.text = "one two three four five six seven"
    page.click("#sampling button")
    page.wait_for_timeout(500)  # Gradio sets the values once more while the panel opens
    for label, value in (("Temperature", "0.7"), ("Top-p", "0.5"), ("Longest answer", "4")):
        page.locator(f"#sampling input[type=number][aria-label*='{label}']").fill(value)
        slider = f"#sampling input[type=range][aria-label*='{label}']"
        page.wait_for_function(
            "([slider, value]) => document.querySelector(slider).value === value", arg=[slider, value]
        )
    page.get_by_label("Seed").fill("3")
    page.keyboard.press("Tab")
    ask(page, "How?")
    message = page.inner_text(".log .assistant")
    assert "temperature 0.7, top-p 0.5, seed 3" in message and "4 tokens" in message
    page.get_by_label("Seed").fill("1" + "0" * 30)
    page.keyboard.press("Tab")
    assert "seed must be" in ask(page, "And now?")


def test_what_cannot_be_asked_is_said(page, script):
    assert "question is empty" in ask(page, "   ")
    text = ask(page, "why " * 2000)
    assert re.search(r"the question has \d+ tokens, \d+ fit", text)
    assert "Longest answer" in text and "max_new_tokens" not in text  # the name that it has on the page
    script.text = "fine"
    assert ask(page, "And this?") == "fine"


def test_a_question_without_a_scan(new_page):
    assert ask(new_page(), "What?") == "Open a scan first, then ask about it."


def test_markup_in_questions_and_answers_is_text(page, script):
    script.text = EVIL
    assert ask(page, EVIL) == EVIL
    assert page.locator(".log .user p").inner_text() == EVIL
    assert page.locator(".log img, .log script, .log a, .log strong").count() == 0
    assert page.evaluate("window.hacked") is None


def test_export_is_one_file_that_needs_nothing_else(page, script, tmp_path):
    script.text = EVIL
    ask(page, "Is it <b>large</b>?")
    with page.expect_download() as download:
        page.click("#export")
    html = tmp_path.joinpath("saved.html")
    download.value.save_as(html)
    text = html.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == 3 and "torso.nii.gz" in text and NOTICE in text
    assert "Is it &lt;b&gt;large&lt;/b&gt;?" in text and "<script" not in text and "<img src=x" not in text
    assert not re.search(r"""<[^>]*(src|href)=["'](?!data:)""", text)
    axial = Image.open(BytesIO(b64decode(re.search(r"base64,([^\"]+)", text)[1]))).convert("L")
    assert axial.size == (461 + 48, 512 + 48)  # 144 x 160 mm, and room for the letters
    left, right = np.asarray(axial)[:, :20], np.asarray(axial)[:, -20:]
    assert left.max() > 200 and right.max() > 200  # the letters R and L


def test_two_people_at_once(page, new_page, script, server, scan, tmp_path):
    other = new_page()
    name = tmp_path / "other.nii.gz"
    name.write_bytes(scan.read_bytes())
    open_scan(other, name)
    mine, theirs = (p.evaluate("window.med3dvlm.state.session") for p in (page, other))
    assert mine != theirs
    script.text, script.pause = "slow " * 6, 0.02
    for who, question in ((page, "mine?"), (other, "theirs?")):
        who.fill("#question textarea", question)
        who.click("#ask")
    for who, question in ((page, "mine?"), (other, "theirs?")):
        who.wait_for_selector(".log .assistant footer")
        assert who.locator(".log .user p").all_inner_texts() == [question]
        assert who.locator(".log .assistant p").first.inner_text() == "slow " * 5 + "slow"
    folders = [server.sessions.by_token(token).folder for token in (mine, theirs)]
    assert folders[0] != folders[1] and all((folder / "scan.nii").is_file() for folder in folders)
    other.close()
    deadline = time.monotonic() + 10
    while folders[1].exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folders[1].exists() and folders[0].exists()
    assert server.sessions.by_token(theirs) is None
