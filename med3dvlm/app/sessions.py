"""One session for each browser tab: a folder of its own, a scan, a conversation. It ends when the tab is closed."""

import re
import secrets
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from med3dvlm.inference import AnswerStream, Chat, Med3DVLM

MAX_NAME, MAX_DEPTH = 200, 8  # bytes of a file's or folder's name, and how many of them a path may have


@dataclass(frozen=True)
class Choices:
    """How the files of an upload or example can be read: one of several series or volumes, or in another way.

    name: what is chosen. source: the files. labels, readings: for each choice what the page shows, and the options of
    `load_volume`. chosen: which of them is shown.
    """

    name: str
    source: Path
    labels: tuple[str, ...]
    readings: tuple[dict, ...]
    chosen: int = 0

    def shown(self) -> dict:
        """What the page is told of it."""
        return {"name": self.name, "labels": self.labels, "chosen": self.chosen}


class Session:
    """What belongs to one tab.

    Attributes:
        token: unguessable; whoever has it may upload, and fetch the scan. The page gets it, nobody else does.
        folder: for this session's files only; others may not enter it.
        chat: the conversation with the model.
        messages: what the page shows of it.
        scan: what the page knows about the opened scan, None before there is one; source: where it was read from;
            lists: what else its files hold.
        refused: what could be done about the files that could not be opened just now, None where nothing can.
        batch: the last upload that was read, or refused; received: bytes of each upload.
        stream: the answer that is being generated. opening: held while a scan is opened.
        stopped: the stop button was pressed since the last question. ended: the tab was closed.
        number: counts what the viewer was told, so that it knows what is new.
    """

    def __init__(self, folder: Path, model: Med3DVLM):
        self.token = secrets.token_urlsafe(32)
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.chat: Chat = model.chat()
        self.messages: list[dict] = []
        self.scan: dict | None = None
        self.source: Path | None = None
        self.lists: list[Choices] = []
        self.refused: Choices | None = None
        self.batch = 0
        self.received: dict[int, int] = {}
        self.stream: AnswerStream | None = None
        self.opening = threading.Lock()
        self.stopped = False
        self.ended = False
        self.number = 0

    @property
    def answering(self) -> bool:
        """Whether the last question still waits for its answer, or for the rest of it."""
        return bool(self.messages) and self.messages[-1]["state"] != "done"

    def shown(self, *notes: dict) -> list[dict]:
        """The messages for the page, with notes that are not kept. Copies: Gradio compares with what it sent before."""
        return [dict(message) for message in (*self.messages, *notes)]

    @property
    def uploads(self) -> Path:
        """Where the uploads lie, each in a folder of its own."""
        return self.folder / "uploads"

    def batch_folder(self, batch: int) -> Path:
        """Where the files of the batch-th upload lie."""
        return self.uploads / str(batch)

    def discard(self, batch: int) -> None:
        """Remove an upload that was broken off or refused."""
        self.received.pop(batch, None)
        shutil.rmtree(self.batch_folder(batch), ignore_errors=True)

    def tidy(self) -> None:
        """Remove uploads up to the last one that nothing needs any longer; everything where the tab was closed."""
        if self.ended:
            shutil.rmtree(self.folder, ignore_errors=True)
        needed = (self.source, self.refused and self.refused.source)
        for batch in [batch for batch in self.received if batch <= self.batch]:
            if self.batch_folder(batch) not in needed:
                self.discard(batch)

    def end(self) -> None:
        """The tab was closed: stop the answer, remove the files."""
        self.ended = True
        self.stop()
        self.tidy()

    def stop(self) -> None:
        """End the answer that is being generated, or that waits for its turn."""
        self.stopped = True
        if self.stream is not None:
            self.stream.stop()


def safe_path(name: str) -> Path:
    """A path as it may be used below a session's folder: relative, nothing hidden, no control characters, not long."""
    parts = (re.sub(r"[\x00-\x1f\x7f]", "", part).lstrip(".").strip() for part in re.split(r"[/\\]", name))
    kept = [part.encode()[-MAX_NAME:].decode(errors="ignore") for part in parts if part]
    return Path(*kept[-MAX_DEPTH:] or ["scan"])


class Sessions:
    """All sessions of a running app, below one folder that only this user may enter and that `close` removes."""

    def __init__(self, model: Med3DVLM):
        self.model = model
        self.folder = Path(tempfile.mkdtemp(prefix="med3dvlm-app-"))  # mode 0700
        self._by_tab: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, tab: str) -> Session:
        """The session of a tab (Gradio's session hash), begun when there is none."""
        with self._lock:
            if tab not in self._by_tab:
                self._by_tab[tab] = Session(self.folder, self.model)
            return self._by_tab[tab]

    def by_token(self, token: str) -> Session | None:
        with self._lock:
            known = list(self._by_tab.values())
        return next((s for s in known if secrets.compare_digest(s.token.encode(), token.encode())), None)

    def end(self, tab: str) -> None:
        """The tab was closed."""
        with self._lock:
            session = self._by_tab.pop(tab, None)
        if session is not None:
            session.end()

    def close(self) -> None:
        """The app ends: remove everything."""
        for tab in list(self._by_tab):
            self.end(tab)
        shutil.rmtree(self.folder, ignore_errors=True)
