"""How files and folders come about: whole or not at all, by one writer at a time, where there is room for them."""

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

PARTIAL = re.compile(r"\.[0-9a-f]{8}(\.old)?\.partial")  # behind a folder's name, while it is written


def check_disk(place: Path, needed: int, what: str, remedy: str = "free some space or choose another") -> None:
    """Refuse what has no room, or lies where nothing can be written.

    Args:
        place: a folder, which need not be there yet.
        needed: bytes.

    Raises:
        OSError: names the place; how much is needed, and how much is free.
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
    """OpenVINO says "basic_ios::clear" when there is no more room."""
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
    """Whether a new folder may be made there: nothing is there, or an empty folder.

    Raises:
        ValueError: a link is there that leads nowhere.
    """
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to {folder.readlink()}, which is not there: delete it or choose another.")
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextlib.contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Wait for other processes that make the same folder, and remove what a killed one left beside it."""
    place = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]
    user = getattr(os, "getuid", lambda: "user")()  # which Windows lacks
    lock = FileLock(Path(tempfile.gettempdir()) / f"ov_decidiffusion-{user}-{place}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another process is writing %s: waiting for it.", target)
        lock.acquire()
    try:
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
            if PARTIAL.fullmatch(left.name.removeprefix(f".{target.name}")):  # and not of a folder named longer
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def refuse_own_folder(target: Path) -> None:
    """A new folder takes the place of an empty or older one, which a process that is in it would lose.

    Raises:
        ValueError: says what to do.
    """
    with contextlib.suppress(FileNotFoundError):  # the process's own is gone already
        if Path.cwd().is_relative_to(target.resolve()):
            raise ValueError(f"`model_dir` {target} is the folder that this runs in: run it from outside of it.")


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` to write into, which takes its place at the end; after an error, nothing stays.

    A folder that is there already is replaced. To be used within ``only_one``.
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
    """Copy a folder's files into one that can be written to, also where the source's cannot.

    Args:
        target: new, or there already.
        leave_out: names of files and folders.
    """
    ignore = shutil.ignore_patterns(*leave_out)
    shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        folder.chmod(folder.stat().st_mode | stat.S_IRWXU)


def _write_through(file: Path) -> None:
    """To the disk, so that a folder which is there is whole after a power cut too."""
    if file.is_file():
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())


def write_whole(file: Path, data: bytes) -> None:
    """Write beside the file's place and move it there: never half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)  # of a full disk, say


def write_json(file: Path, content: dict[str, Any]) -> None:
    """A settings file, whole or not at all."""
    write_whole(file, (json.dumps(content, indent=2, default=str) + "\n").encode())
