"""The addresses that Gradio doesn't have, and a guard in front of those that it has.

Uploads and scans go through addresses that hold a session's token; Gradio's own file routes are not served at all.
"""

import re
from importlib.resources import files
from pathlib import Path

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from med3dvlm.app.export import check_pictures, conversation_page
from med3dvlm.app.sessions import Session, Sessions, safe_path

STATIC = files("med3dvlm.app") / "static"
PREFIX = "/med3dvlm"
VOLUMES = {"scan": "scan.nii", "model": "model.nii"}
MAX_EXPORT = 20_000_000  # bytes of pictures

# What the page needs of Gradio. Its routes for files, uploads, recordings, proxies and development are not in it.
SERVED = re.compile(
    r"(?!.*\.\.)/(?:|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|login/?|logout|(?:assets|static|svelte)/.*"
    r"|gradio_api/(?:queue/(?:join|data)|heartbeat/\w+|run/predict|cancel|startup-events|info/?|login_check/?|app_id/?)"
    r"|med3dvlm/.*)"
)
# No part of the page may come from, or be sent to, anywhere else.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
OUTSIDE = re.compile(rb"<(?:link|meta|script)\b[^>]*\bhttps?://[^>]*>(?:\s*</script>)?", re.IGNORECASE)


class Guard:
    """ASGI middleware: only what the page needs, only under a local name, and pages without outside addresses.

    hosts: names under which the app may be reached; None for any. A page of another site that resolves its own name to
    127.0.0.1 would otherwise be allowed to talk to this one.
    """

    def __init__(self, app, hosts: tuple[str, ...] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        host = re.sub(r":\d+$", "", dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and host not in self.hosts:
            return await PlainTextResponse("This app answers under localhost only.", 400)(scope, receive, send)
        if not SERVED.fullmatch(scope["path"]):
            return await PlainTextResponse("Not found.", 404)(scope, receive, send)
        await self.app(scope, receive, _Cleaned(send))


class _Cleaned:
    """`send` of one response: adds the headers; HTML is held back until complete and loses its outside addresses."""

    def __init__(self, send):
        self.send, self.start, self.body = send, None, b""

    async def __call__(self, message):
        if message["type"] == "http.response.start":
            headers = [(k, v) for k, v in message["headers"] if k.decode("latin-1") not in HEADERS]
            headers += [(k.encode(), v.encode()) for k, v in HEADERS.items()]
            message = {**message, "headers": headers}
            if dict(headers).get(b"content-type", b"").startswith(b"text/html"):
                self.start = message
                return
        if self.start is None or message["type"] != "http.response.body":
            return await self.send(message)
        self.body += message.get("body", b"")
        if not message.get("more_body"):
            body = OUTSIDE.sub(b"", self.body)
            headers = [(k, v) for k, v in self.start["headers"] if k != b"content-length"]
            await self.send({**self.start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await self.send({"type": "http.response.body", "body": body})


def routes(sessions: Sessions, limit: int, model_name: str) -> list:
    """What is added to Gradio's addresses. limit: bytes that one upload may have."""

    async def upload(request: Request) -> Response:
        session = _session(request)
        if session is None:
            return PlainTextResponse("This page has expired. Reload it.", 404)
        batch = request.path_params["batch"]
        left = limit - session.received.get(batch, 0)
        try:
            target = _free(session.batch_folder(batch) / safe_path(request.query_params.get("name", "")))
            target.parent.mkdir(parents=True, exist_ok=True)
            if int(request.headers.get("content-length", 0)) > left or not await _receive(request, target, left):
                session.discard(batch)
                return PlainTextResponse(f"Too large: at most {limit / 1e9:.1f} GB can be opened.", 413)
        except ClientDisconnect:  # cancelled in the browser
            session.discard(batch)
            return Response(status_code=499)
        except OSError as error:  # a full disk, a file and a folder of the same name
            session.discard(batch)
            return PlainTextResponse(f"The files could not be stored: {error.strerror}.", 507)
        session.received[batch] = limit - left + target.stat().st_size
        return Response(status_code=204)

    async def volume(request: Request) -> Response:
        session = _session(request)
        name = VOLUMES.get(request.path_params["which"])
        if session is None or name is None or not (session.folder / name).is_file():
            return PlainTextResponse("No such scan.", 404)
        # no-store: a scan must not stay in the browser's cache on disk
        return FileResponse(
            session.folder / name, media_type="application/octet-stream", headers={"cache-control": "no-store"}
        )

    async def export(request: Request) -> Response:
        session = _session(request)
        if session is None:
            return PlainTextResponse("This page has expired. Reload it.", 404)
        if int(request.headers.get("content-length", MAX_EXPORT + 1)) > MAX_EXPORT:
            return PlainTextResponse("The pictures are too large.", 413)
        try:
            pictures = check_pictures(await request.json())
        except ValueError as error:
            return PlainTextResponse(f"The pictures cannot be used: {error}.", 400)
        page = conversation_page(session.messages, session.scan, model_name, pictures)
        return Response(page, media_type="text/html", headers={"cache-control": "no-store"})

    def _session(request: Request) -> Session | None:
        return sessions.by_token(request.path_params["token"])

    return [
        Mount(f"{PREFIX}/static", StaticFiles(directory=str(STATIC))),
        Route(PREFIX + "/upload/{token}/{batch:int}", upload, methods=["PUT"]),
        Route(PREFIX + "/volume/{token}/{which}", volume, methods=["GET"]),
        Route(PREFIX + "/export/{token}", export, methods=["POST"]),
    ]


async def _receive(request: Request, target, left: int) -> bool:
    """Write the body to a file; False as soon as it has more than `left` bytes."""
    with open(target, "xb") as file:
        async for part in request.stream():
            left -= len(part)
            if left < 0:
                return False
            file.write(part)
    return True


def _free(target: Path) -> Path:
    """A path that no file has yet: slices of two series may have the same names."""
    named, count = target, 1
    while target.exists():
        target, count = named.with_name(f"{count}_{named.name}"), count + 1
    return target
