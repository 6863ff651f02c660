"""Writing of files and folders: completely or not at all, by one process at a time, if there is room for them."""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

PARTIAL = re.compile(r"\.[0-9a-f]{8}(\.old)?\.partial")  # follows a folder's name while it is written


def check_disk(place: Path, needed: int, what: str, remedy: str = "free some space or choose another") -> None:
    """Check that a folder can be written to, and that its disk has enough room.

    Args:
        place: a folder, which need not exist yet.
        needed: number of bytes.
        what, remedy: what needs the room, and what to do, for the message.

    Raises:
        OSError: the message names the place, how much is needed, and how much is free.
    """
    place = place.absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise OSError(
            errno.EACCES, f"{what} goes to {place}, but {existing} is no folder that can be written to: {remedy}"
        )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {needed / 1e9:.2f} GB in {place}, where {free / 1e9:.2f} GB are free: {remedy}",
        )


@contextlib.contextmanager
def naming_a_full_disk(place: Path) -> Iterator[None]:
    """Explain failed writes of OpenVINO, which says "basic_ios::clear" when the disk is full."""
    try:
        yield
    except RuntimeError as error:
        if "basic_ios" not in str(error) and "write" not in str(error).lower():
            raise
        free = shutil.disk_usage(place).free
        raise OSError(
            errno.ENOSPC, f"Writing to {place} failed, {free / 1e6:.0f} MB are free there: {error}"
        ) from error


def is_free(folder: Path) -> bool:
    """Whether a new folder may be made here: there is nothing yet, or an empty folder.

    Raises:
        ValueError: there is a link that leads nowhere.
    """
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to {folder.readlink()}, which is not there: delete it or choose another.")
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextlib.contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Wait for other processes that make the same folder, and remove what killed processes left beside it."""
    place = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]
    user = getattr(os, "getuid", lambda: "user")()  # Windows lacks it
    lock = FileLock(Path(tempfile.gettempdir()) / f"ov_decidiffusion-{user}-{place}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another process is writing %s: waiting for it.", target)
        lock.acquire()
    try:
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
            if PARTIAL.fullmatch(left.name.removeprefix(f".{target.name}")):  # not one of a folder with a longer name
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def refuse_own_folder(target: Path) -> None:
    """Refuse to replace the current working directory, which this process would lose.

    Raises:
        ValueError: the message says what to do.
    """
    with contextlib.suppress(FileNotFoundError):  # the working directory is gone already
        if Path.cwd().is_relative_to(target.resolve()):
            raise ValueError(f"`model_dir` {target} is the folder that this runs in: run it from outside of it.")


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` to write into, which takes its place at the end; an error removes it.

    An existing folder is replaced. Use it within ``only_one``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old.partial")
    try:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            _write_through(file)
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def copy_folder(source: Path, target: Path, leave_out: Collection[str] = ()) -> None:
    """Copy a folder's files into a folder that can be written to, even if the source cannot.

    Args:
        source: the folder to copy.
        target: a new or an existing folder.
        leave_out: names of files and folders to leave out.
    """
    ignore = shutil.ignore_patterns(*leave_out)
    shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        folder.chmod(folder.stat().st_mode | stat.S_IRWXU)


def _write_through(file: Path) -> None:
    """Write a file through to the disk, so that a folder that exists is complete even after a power cut."""
    if file.is_file():
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())


def write_whole(file: Path, data: bytes) -> None:
    """Write a temporary file beside the target and move it there, so that there is never half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)  # left over if the disk was full, for example


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a settings file, completely or not at all."""
    write_whole(file, (json.dumps(content, indent=2, default=str) + "\n").encode())
