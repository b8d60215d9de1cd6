"""One server with a tiny model and one browser for all browser tests; every page watches for outside requests."""

import shutil
import time
from types import SimpleNamespace

import pytest

from tests.app.scans import write_torso
from tests.helpers.tiny_model import write_tiny_vlm

CHROMIUM = shutil.which("chromium")
# As Debian's chromium starts without a display, a GPU and a sandbox; WebGL 2 is then drawn by software.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--use-gl=angle", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader"]  # fmt: skip
LIMIT_GB = 0.02


@pytest.fixture(scope="session")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scans") / "torso.nii.gz"
    write_torso(path, shape=(24, 40, 48), spacing=(6.0, 4.0, 3.0))
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running app with its sessions; `url` ends in a slash."""
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'med3dvlm[app]'")
    from med3dvlm.app import main
    from med3dvlm.app.sessions import Sessions
    from med3dvlm.inference import load_model

    folder = write_tiny_vlm(tmp_path_factory.mktemp("models") / "tiny")
    args = main.parse_arguments(["--max_upload_gb", str(LIMIT_GB)])
    sessions = Sessions(load_model(folder, device="cpu"))
    page = main.launch(args, sessions, "models/tiny", "")
    yield SimpleNamespace(url=page.local_url, sessions=sessions, limit=int(LIMIT_GB * 1e9), port=page.server_port)
    page.close()
    sessions.close()
    assert not sessions.folder.exists()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def new_page(browser, server):
    """A function that opens the app in a window of its own; afterwards no page may have asked for anything outside."""
    contexts, outside, errors = [], [], []

    def open_page(width=1440, height=900, script=None):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20000)
        if script:
            page.add_init_script(script)
        page.on("request", lambda request: is_outside(request.url, server.url) and outside.append(request.url))
        page.on("websocket", lambda socket: outside.append(socket.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_function("window.med3dvlm && window.med3dvlm.state && document.querySelector('.log')")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not outside and not errors


def is_outside(url: str, server: str) -> bool:
    return not url.startswith((server, "data:", "blob:"))


@pytest.fixture(scope="module")
def page(new_page, scan):
    """A page with the torso opened in it."""
    page = new_page()
    open_scan(page, scan)
    return page


@pytest.fixture
def script(monkeypatch):
    """Set `.text` to what the model is to say, and `.pause` to the seconds that it takes for each token."""
    said = SimpleNamespace(text="", pause=0.0, tokenizer=None)

    def steps(model, embeds, mask, max_new_tokens, end, sampling=None):
        for token in said.tokenizer(said.text)["input_ids"][: max_new_tokens - 1]:
            time.sleep(said.pause)
            yield [token]
        yield [end]

    monkeypatch.setattr("med3dvlm.inference.chat.next_tokens", steps)
    return said


def open_scan(page, *paths) -> None:
    """Upload files and wait until they are shown."""
    number = page.evaluate("window.med3dvlm.number ?? 0")
    page.set_input_files(".files", [str(path) for path in paths])
    page.wait_for_function(f"(window.med3dvlm.number ?? 0) > {number} && document.querySelector('.busy').hidden")


def upload_error(page, *paths) -> str:
    """Upload files that can't be opened; returns the sentence about them."""
    page.set_input_files(".files", [str(path) for path in paths])
    return problem(page)


def problem(page) -> str:
    """Wait for the sentence about what could not be opened."""
    page.wait_for_selector(".problem")
    return page.inner_text(".problem .error")


def drop(page, *paths) -> None:
    """Drop files and folders of the machine onto the viewer, as a mouse would."""
    session = page.context.new_cdp_session(page)
    box = page.locator(".views").bounding_box()
    files = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": box["x"] + 90, "y": box["y"] + 90, "data": files})


def wait_for_scan(page, about: str) -> None:
    """Wait until a scan is shown whose description begins so."""
    page.wait_for_function(
        "(about) => document.querySelector('.facts .about').textContent.startsWith(about) && "
        "document.querySelector('.busy').hidden",
        arg=about,
    )


def ask(page, question: str) -> str:
    """Ask and wait for the end; returns the last message."""
    count = page.locator(".log article").count()
    page.fill("#question textarea", question)
    page.click("#ask")
    page.wait_for_function(
        f"document.querySelectorAll('.log article').length > {count} && !document.body.matches('[data-answering]')"
    )
    return page.locator(".log article p:first-child").last.inner_text()
