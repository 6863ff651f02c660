"""Who is at the demo: a line in front of the one pipeline, wishes to stop, and each visitor's pictures."""

import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

MAX_WAITING = 32
MAX_PICTURES = 100  # of one visitor; the oldest go
MAX_SOURCES = 100_000_000  # bytes of what one visitor's pictures were made from, as they lie in memory; the oldest go
IDLE_SECONDS = 3600  # after which a visitor's pictures are deleted
NAME_LENGTH = 60


class LineIsFull(Exception):
    """There are too many visitors in the line."""


@dataclass(eq=False)
class Ticket:
    """A place in the line.

    Attributes:
        session: of the browser that waits.
        work: in steps of one picture.
        done: of it, so far.
        stopped: whether the visitor wants no more of it, or has left.
        left: whether nobody is there any more to see it.
    """

    session: str
    work: int
    done: int = 0
    stopped: bool = False
    left: bool = False


class Line:
    """First come, first served: two pictures at once would only slow each other down."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets: list[Ticket] = []
        self._seconds = 0.5  # for one step of one picture, from what was measured
        self.closed = False

    @contextmanager
    def place(self, session: str, work: int) -> Iterator[Ticket]:
        """Join the line, and leave it at the end.

        Raises:
            LineIsFull: come back later.
        """
        ticket = Ticket(session, work)
        with self._changed:
            if len(self._tickets) > MAX_WAITING:
                raise LineIsFull
            self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            self._leave(ticket)

    def ahead(self, ticket: Ticket, seconds: float = 0.0) -> int:
        """How many are before a ticket; waits so long for its turn to come, or for its end."""

        def count() -> int:
            return self._tickets.index(ticket) if ticket in self._tickets else 0

        with self._changed:
            if seconds:
                self._changed.wait_for(lambda: count() == 0 or self.is_stopped(ticket), seconds)
            return count()

    def wait_for(self, ticket: Ticket) -> float:
        """About how many seconds until its turn: what those before it still have to do."""
        with self._changed:
            before = self._tickets[: self._tickets.index(ticket)] if ticket in self._tickets else []
            return sum(max(0, one.work - one.done) for one in before) * self._seconds

    def measured(self, work: int, seconds: float) -> None:
        """Learn from a finished run how long a step takes."""
        self._seconds = 0.5 * self._seconds + 0.5 * seconds / work

    def stop(self, session: str) -> None:
        """End what a session waits for, and nothing that it asks for later."""
        with self._changed:
            for ticket in self._tickets:
                ticket.stopped = ticket.stopped or ticket.session == session
            self._changed.notify_all()

    def forget(self, session: str) -> None:
        """A visitor has left: nobody waits for what is made for them, even if it is never gone on with."""
        with self._changed:
            for ticket in [ticket for ticket in self._tickets if ticket.session == session]:
                ticket.stopped = ticket.left = True
                self._leave(ticket)

    def close(self) -> None:
        """End everything."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def is_stopped(self, ticket: Ticket) -> bool:
        return self.closed or ticket.stopped

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
            self._changed.notify_all()


@dataclass(frozen=True)
class Kept:
    """A picture of a visitor's sitting.

    Attributes:
        path: of the PNG file, with its settings inside.
        arguments: of the call that makes it again, but for its source picture.
        caption: what is said of it.
        source, mask: what it was made from, or None.
    """

    path: Path
    arguments: dict[str, Any]
    caption: str
    source: Image.Image | None = None
    mask: Image.Image | None = None


@dataclass
class Sitting:
    """One visitor's pictures, the newest first; what they were made from is kept for who may go on from it."""

    folder: Path
    pictures: list[Kept] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)
    ended: bool = False
    keeps_sources: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(
        self,
        picture: Image.Image,
        arguments: dict[str, Any],
        caption: str,
        source: Image.Image | None = None,
        mask: Image.Image | None = None,
    ) -> Kept | None:
        """Write a picture under a telling name; none where the sitting has ended meanwhile."""
        with self.lock:
            if self.ended:
                return None
            self.folder.mkdir(parents=True, exist_ok=True)
            name = telling_name(arguments.get("prompt") or "", arguments.get("seed"))
            path, count = self.folder / f"{name}.png", 1
            while path.exists():
                count += 1
                path = self.folder / f"{name}-{count}.png"
            picture.save(path)
            made_from = (source, mask) if self.keeps_sources else ()
            self.pictures.insert(0, Kept(path, arguments, caption, *made_from))
            for old in self.pictures[MAX_PICTURES:]:
                old.path.unlink(missing_ok=True)
            del self.pictures[MAX_PICTURES:]
            self._let_sources_go()
            return self.pictures[0]

    def _let_sources_go(self) -> None:
        """Of older pictures, beyond ``MAX_SOURCES``; pictures of one call share theirs."""
        held: dict[int, int] = {}
        for i, one in enumerate(self.pictures):
            for picture in (one.source, one.mask):
                if picture is not None:
                    held[id(picture)] = picture.width * picture.height * len(picture.getbands())
            if i and sum(held.values()) > MAX_SOURCES:
                self.pictures[i] = replace(one, source=None, mask=None)

    def end(self) -> None:
        """Delete the pictures, and keep no more."""
        with self.lock:
            self.ended = True
            shutil.rmtree(self.folder, ignore_errors=True)


class Sittings:
    """The sittings of all visitors, by tokens that only their browsers know.

    The pictures of whoever was not seen for ``idle_seconds`` are deleted, and all of them with the process.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ov_decidiffusion-sittings-", ignore_cleanup_errors=True)
        self._sittings: dict[str, Sitting] = {}
        self._lock = threading.Lock()
        self._idle_seconds, self._closed = idle_seconds, threading.Event()
        threading.Thread(target=self._watch, name="sittings", daemon=True).start()

    def of(self, token: Any) -> tuple[str, Sitting]:
        """The sitting that a token stands for, or a new one with a token of its own."""
        known = isinstance(token, str) and token in self._sittings
        return self._enter(token if known else secrets.token_urlsafe(24))

    def of_session(self, session: str) -> Sitting:
        """The sitting of a program, which lasts as long as its session."""
        return self._enter(f"session {session}", keeps_sources=False)[1]

    def end_session(self, session: str) -> None:
        """A program has left: its pictures are deleted."""
        with self._lock:
            self._drop(f"session {session}")

    def _enter(self, token: str, keeps_sources: bool = True) -> tuple[str, Sitting]:
        with self._lock:
            new = Sitting(Path(self._folder.name) / secrets.token_hex(8), keeps_sources=keeps_sources)
            sitting = self._sittings.setdefault(token, new)
            sitting.seen = time.monotonic()
            return token, sitting

    def _watch(self) -> None:
        while not self._closed.wait(self._idle_seconds / 10):
            with self._lock:
                before = time.monotonic() - self._idle_seconds
                for token in [token for token, sitting in self._sittings.items() if sitting.seen < before]:
                    self._drop(token)

    def _drop(self, token: str) -> None:
        sitting = self._sittings.pop(token, None)
        if sitting is not None:
            sitting.end()

    def close(self) -> None:
        """Delete all pictures."""
        self._closed.set()
        with self._lock:
            for token in list(self._sittings):
                self._drop(token)
            self._folder.cleanup()


def telling_name(prompt: str, seed: Any) -> str:
    """A file's name for a picture: "a red fox in the snow" and 1234 make "a-red-fox-in-the-snow-1234"."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    short = words if len(words) <= NAME_LENGTH else words[:NAME_LENGTH].rsplit("-", 1)[0]
    number = f"-{seed}" if isinstance(seed, int) else ""
    return f"{short or 'picture'}{number}"
