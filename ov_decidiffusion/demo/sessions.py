"""The pictures of each of the demo's visitors, kept as long as the visitor stays."""

import re
import secrets
import shutil
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

MAX_PICTURES = 100  # of one visitor; the oldest are deleted
MAX_FILMS = 10  # pictures of one visitor whose steps are kept
MAX_SOURCES = 100_000_000  # bytes in memory of one visitor's source pictures and masks; the oldest are dropped
IDLE_SECONDS = 3600  # idle time after which a visitor's pictures are deleted
NAME_LENGTH = 60


@dataclass(frozen=True)
class SavedImage:
    """A picture of a visitor's session.

    Attributes:
        path: its PNG file, which holds its settings too.
        arguments: the arguments of the call that makes it again, without its source picture.
        caption: the details shown with it.
        source, mask: the source picture and the mask that it was made from, or None.
        beliefs: the clean latents [1, 4, h, w] that the U-Net predicted at each step, for a film; empty for older
            pictures.
        id: the page's name for it.
    """

    path: Path
    arguments: dict[str, Any]
    caption: str
    source: Image.Image | None = None
    mask: Image.Image | None = None
    beliefs: tuple[Any, ...] = ()
    id: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass
class Session:
    """One visitor's pictures, the newest first, with their sources and masks, so that they can be used again."""

    folder: Path
    pictures: list[SavedImage] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)
    ended: bool = False
    keeps_sources: bool = True
    editing: tuple[Image.Image, Image.Image | None] | None = None  # source and mask in the page's form, for a reload
    outputs: Path | None = None  # folder for copies that are kept
    lock: threading.Lock = field(default_factory=threading.Lock)

    def save(
        self,
        picture: Image.Image,
        arguments: dict[str, Any],
        caption: str,
        source: Image.Image | None = None,
        mask: Image.Image | None = None,
        beliefs: tuple[Any, ...] = (),
    ) -> SavedImage | None:
        """Write a picture under a descriptive name; returns None if the session has ended meanwhile."""
        with self.lock:
            if self.ended:
                return None
            self.folder.mkdir(parents=True, exist_ok=True)
            path = _free_name(self.folder, arguments)
            picture.save(path)
            if self.outputs is not None:
                self.outputs.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, _free_name(self.outputs, arguments))
            if not self.keeps_sources:
                source, mask, beliefs = None, None, ()
            self.pictures.insert(0, SavedImage(path, arguments, caption, source, mask, beliefs))
            if len(self.pictures) > MAX_FILMS:
                self.pictures[MAX_FILMS] = replace(self.pictures[MAX_FILMS], beliefs=())
            for old in self.pictures[MAX_PICTURES:]:
                old.path.unlink(missing_ok=True)
            del self.pictures[MAX_PICTURES:]
            self._let_sources_go()
            return self.pictures[0]

    def by_id(self, picture_id: Any) -> SavedImage | None:
        """The picture with this id, or None if it is no longer kept."""
        return next((one for one in self.pictures if one.id == picture_id), None)

    def all_in_one(self) -> Path:
        """A ZIP file of all pictures, written again at each request."""
        with self.lock:
            file = self.folder / "pictures.zip"
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
                for one in self.pictures:
                    archive.write(one.path, one.path.name)
            return file

    def _let_sources_go(self) -> None:
        """Drop the sources of older pictures beyond ``MAX_SOURCES``; pictures of one call share theirs."""
        held: dict[int, int] = {}
        for i, one in enumerate(self.pictures):
            for picture in (one.source, one.mask):
                if picture is not None:
                    held[id(picture)] = picture.width * picture.height * len(picture.getbands())
            if i and sum(held.values()) > MAX_SOURCES:
                self.pictures[i] = replace(one, source=None, mask=None)

    def end(self) -> None:
        """Delete the pictures, and save no further ones."""
        with self.lock:
            self.ended = True
            shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """The sessions of all visitors, by tokens that only their browsers know.

    A visitor's pictures are deleted after ``idle_seconds`` without a visit, and all pictures when the process ends.

    Args:
        idle_seconds: time without a visit after which a session ends.
        outputs: a folder for copies of the pictures made in browsers, which are kept.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS, outputs: Path | None = None) -> None:
        self._outputs = outputs
        self._folder = tempfile.TemporaryDirectory(prefix="ov_decidiffusion-sessions-", ignore_cleanup_errors=True)
        self._sessions: dict[tuple[str, str], Session] = {}  # by ("browser", token) or ("program", its connection)
        self._lock = threading.Lock()
        self._idle_seconds, self._closed = idle_seconds, threading.Event()
        threading.Thread(target=self._watch, name="sessions", daemon=True).start()

    def of(self, token: Any) -> tuple[str, Session]:
        """A token and its session; both are new if the token is unknown."""
        known = isinstance(token, str) and ("browser", token) in self._sessions
        token = token if known else secrets.token_urlsafe(24)
        return token, self._enter("browser", token)

    def of_program(self, client: str | None) -> Session:
        """The session of a program, which lasts as long as its connection."""
        return self._enter("program", client or secrets.token_hex(8), keeps_sources=False)

    def end_program(self, client: str | None) -> None:
        """End the session of a program that has left, and delete its pictures."""
        with self._lock:
            self._drop(("program", client or ""))

    def _enter(self, kind: str, name: str, keeps_sources: bool = True) -> Session:
        with self._lock:
            folder = Path(self._folder.name) / secrets.token_hex(8)
            new = Session(folder, keeps_sources=keeps_sources, outputs=self._outputs if kind == "browser" else None)
            session = self._sessions.setdefault((kind, name), new)
            session.seen = time.monotonic()
            return session

    def _watch(self) -> None:
        while not self._closed.wait(self._idle_seconds / 10):
            with self._lock:
                before = time.monotonic() - self._idle_seconds
                for key in [key for key, session in self._sessions.items() if session.seen < before]:
                    self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            session.end()

    def close(self) -> None:
        """Delete all pictures."""
        self._closed.set()
        with self._lock:
            for key in list(self._sessions):
                self._drop(key)
            self._folder.cleanup()


def _free_name(folder: Path, arguments: dict[str, Any]) -> Path:
    """A descriptive file name that is not taken in a folder."""
    name = telling_name(arguments.get("prompt") or "", arguments.get("seed"))
    path, count = folder / f"{name}.png", 1
    while path.exists():
        count += 1
        path = folder / f"{name}-{count}.png"
    return path


def telling_name(prompt: str, seed: Any) -> str:
    """A file's name for a picture: "a red fox in the snow" and 1234 make "a-red-fox-in-the-snow-1234"."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    short = words if len(words) <= NAME_LENGTH else words[:NAME_LENGTH].rsplit("-", 1)[0]
    number = f"-{seed}" if isinstance(seed, int) else ""
    return f"{short or 'picture'}{number}"
