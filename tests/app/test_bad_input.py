"""What people do wrong, and what others might try: each is a sentence, and the app goes on."""

import gzip
import http.client
import re
import socket
import time
import urllib.request

import nibabel as nib
import numpy as np
import pytest

from med3dvlm.app.volumes import write_for_browser
from tests.app.conftest import ask, open_scan, upload_error


def fetch(server, path, method="GET", body=None, **headers) -> tuple[int, bytes]:
    """Ask for exactly this path: clients would tidy it up first."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in {**headers, **({"content-length": len(body)} if body is not None else {})}.items():
        connection.putheader(name, str(value))
    connection.endheaders(body)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data


@pytest.fixture(scope="module")
def session(server):
    """A session without a browser."""
    session = server.sessions.of("no-browser")
    yield session
    server.sessions.end("no-browser")


def nifti(array, **header) -> bytes:
    image = nib.Nifti1Image(array, np.diag([-1, -1, 2, 1]))
    return gzip.compress(image.to_bytes())


def huge() -> bytes:
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    image.header.set_data_shape((30000, 30000, 3000))
    return image.header.binaryblock + b"\0" * 100


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("notes.txt", b"not a volume", "notes.txt"),
        ("corrupt.nii.gz", b"\x1f\x8b\x08 and then nothing", "corrupt.nii.gz: cannot be read"),
        ("empty.nii", b"", "nothing to read"),
        ("huge.nii", huge(), "huge.nii"),
        ("functional.nii.gz", nifti(np.zeros((4, 4, 4, 5), np.int16)), "5 volumes"),
        ("flat.nii.gz", nifti(np.zeros((6, 6, 6), np.int16)), "nothing to see"),
        ("<img src=x onerror=window.hacked=1>.nii.gz", b"no", "<img src=x onerror=window.hacked=1>.nii.gz"),
    ],
    ids=["text", "corrupt", "empty", "huge", "4D", "flat", "markup"],
)
def test_what_cannot_be_opened_is_said_and_the_scan_before_stays(page, tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    error = upload_error(page, tmp_path / name)
    assert expected in error and "Traceback" not in error and "/tmp" not in error
    assert page.inner_text(".facts .name") == "torso.nii.gz" and page.is_visible("[data-view=axial] canvas")
    assert page.evaluate("window.hacked") is None


def test_then_a_good_one(page, scan):
    open_scan(page, scan)
    assert not page.is_visible(".viewer .error")


def test_markup_in_a_file_name_is_text(page, scan, tmp_path):
    path = tmp_path / "<img src=x onerror=window.hacked=1> **b**.nii.gz"
    path.write_bytes(scan.read_bytes())
    open_scan(page, path)
    assert page.inner_text(".facts .name") == path.name
    assert page.locator(".viewer img").count() == 0 and page.evaluate("window.hacked") is None


def test_too_large_is_refused_before_and_during_the_upload(page, server, session, tmp_path):
    with open(tmp_path / "large.nii", "wb") as file:
        file.truncate(server.limit + 1)
    assert "Too large" in upload_error(page, tmp_path / "large.nii")
    url = f"/med3dvlm/upload/{session.token}/1?name=large.nii"
    status, text = fetch(server, url, "PUT", **{"content-length": server.limit + 1})
    assert status == 413 and b"Too large" in text
    part = b"x" * (server.limit // 2 + 1)
    assert fetch(server, url, "PUT", part)[0] == 204
    assert fetch(server, url, "PUT", part)[0] == 413  # the files of one scan count together
    assert not session.batch_folder(1).exists()


def test_an_aborted_upload_leaves_nothing(server, session):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"PUT /med3dvlm/upload/{session.token}/2?name=part.nii HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        connection.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + b"x" * 1000)
        wait_for(lambda: session.batch_folder(2).exists())
    wait_for(lambda: not session.batch_folder(2).exists())
    assert fetch(server, f"/med3dvlm/upload/{session.token}/3?name=next.nii", "PUT", b"all of it")[0] == 204


def test_an_upload_is_cancelled_in_the_browser(page, server, scan, tmp_path):
    with open(tmp_path / "slow.nii", "wb") as file:
        file.truncate(server.limit - 1)
    session = server.sessions.by_token(page.evaluate("window.med3dvlm.state.session"))
    network = page.context.new_cdp_session(page)
    throttled = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 200_000}
    network.send("Network.emulateNetworkConditions", throttled)
    page.set_input_files(".files", tmp_path / "slow.nii")
    page.click(".busy .cancel")
    network.send("Network.emulateNetworkConditions", {**throttled, "uploadThroughput": -1})
    assert not page.is_visible(".busy") and not page.is_visible(".problem")
    wait_for(lambda: len([*session.uploads.iterdir()]) == 1)  # that of the scan that is shown
    open_scan(page, scan)


def test_a_scan_that_is_chosen_while_another_is_read_is_opened_next(page, scan, tmp_path, monkeypatch):
    def slowly(*arguments):
        time.sleep(0.3)
        return write_for_browser(*arguments)

    (tmp_path / "second.nii.gz").write_bytes(scan.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("med3dvlm.app.opening.write_for_browser", slowly)
        page.set_input_files(".files", scan)
        page.wait_for_selector(".busy:has-text('Reading')")
        page.set_input_files(".files", tmp_path / "second.nii.gz")
        page.wait_for_function("document.querySelector('.name').textContent === 'second.nii.gz'")
    assert not page.is_visible(".problem")


def test_names_cannot_lead_out_of_the_session_folder(server, session):
    names = ("..%2F..%2Fescaped.nii", "%2Ftmp%2Fescaped.nii", "..%5C..%5Cescaped.nii", "..", "%00.nii", ".hidden")
    for name in (*names, "a%2F.%2F%2F..%2Fb", "%E7%89%87" * 150, "f%2F" * 300):
        assert fetch(server, f"/med3dvlm/upload/{session.token}/4?name={name}", "PUT", b"x")[0] == 204
    folder = session.batch_folder(4)
    written = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    ours = {"escaped.nii", "tmp/escaped.nii", "1_escaped.nii", "scan", "nii", "hidden", "a/b", "/".join("f" * 8)}
    assert {name for name in written if "\u7247" not in name} == ours
    assert fetch(server, f"/med3dvlm/upload/{session.token}/4?name=a%2Fb%2Fc", "PUT", b"x")[0] == 507  # "a/b" is a file
    assert not folder.exists()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file=http://example.com/",
        "/gradio_api/proxy=http://example.com/",
        "/gradio_api/upload",
        "/gradio_api/upload_progress?upload_id=1",
        "/gradio_api/stream/a/b/c/playlist.m3u8",
        "/gradio_api/runs",
        "/gradio_api/vibe-code",
        "/monitoring",
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc/passwd",
        "/med3dvlm/static/../page.py",
        "/med3dvlm/static/%2e%2e/page.py",
        "/med3dvlm/static//etc/passwd",
        "/med3dvlm/volume/TOKEN/../../../etc/passwd",
        "/med3dvlm/volume/TOKEN/..%2f..%2fetc%2fpasswd",
        "/med3dvlm/volume/TOKEN/uploads",
        "/med3dvlm/volume/TOKEN/scan",
        "/med3dvlm/volume/wrong/scan",
        "/med3dvlm/volume//scan",
    ],
)
def test_no_file_but_the_own_scan_can_be_had(server, session, path):
    status, data = fetch(server, path.replace("TOKEN", session.token))
    assert status in (404, 405) and b"root:" not in data and b"import" not in data


def test_not_even_a_file_of_a_session_through_gradio(server, session, page):
    other = server.sessions.by_token(page.evaluate("window.med3dvlm.state.session"))
    for path in (other.folder / "scan.nii", server.sessions.folder):
        assert fetch(server, f"/gradio_api/file={path}")[0] == 404
    assert fetch(server, f"/med3dvlm/volume/{other.token}/scan")[0] == 200
    assert other.folder.stat().st_mode & 0o077 == 0


def test_another_site_cannot_talk_to_the_app_under_its_own_name(server):
    assert fetch(server, "/", host="evil.example:7860")[0] == 400
    assert fetch(server, "/", host=f"localhost:{server.port}")[0] == 200


def test_an_error_that_nobody_foresaw_is_a_sentence_too(page, server, scan, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no memory left")

    session = server.sessions.by_token(page.evaluate("window.med3dvlm.state.session"))
    seen = session.chat.seen.image
    with monkeypatch.context() as patch:
        patch.setattr("med3dvlm.app.opening.write_for_browser", fail)
        assert "went wrong" in upload_error(page, scan)
        assert session.chat.seen.image is seen  # questions are about the scan that is still shown
        patch.setattr("med3dvlm.inference.chat.next_tokens", fail)
        assert "went wrong" in ask(page, "What is seen?")
    open_scan(page, scan)
    assert not page.is_visible(".viewer .error") and "went wrong" not in ask(page, "What is seen?")


def test_an_export_takes_nothing_but_pictures(server, session):
    broken = b'[{"data": "data:image/png;base64,A\\" x=y"}]'
    for body in (b"no json", b'{"a": 1}', b'[{"data": "data:text/html,<script>"}]', broken):
        status, text = fetch(server, f"/med3dvlm/export/{session.token}", "POST", body)
        assert status == 400 and b"cannot be used" in text
    assert fetch(server, "/med3dvlm/export/wrong", "POST", b"[]")[0] == 404


def test_the_page_names_no_outside_address(server):
    answer = urllib.request.urlopen(server.url)
    html, policy = answer.read().decode(), answer.headers["content-security-policy"]
    outside = r"""<[^>]+(?:src|href|content|action)\s*=\s*["']?(?:https?:)?//(?!127\.0\.0\.1)[^>]*>"""
    assert not re.findall(outside, html)
    assert "preconnect" not in html and "default-src 'self'" in policy and "http" not in policy


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
