"""Refuse what needs too much memory, and hand back what this process holds and does not need (on Linux)."""

import contextlib
import ctypes
import gc
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from ov_decidiffusion.errors import NotEnoughMemory

LIMIT_VARIABLE = "OV_DECIDIFFUSION_MEMORY_GB"
PICTURES, SMALLER = "Pictures of this `width` and `height`", "make smaller ones"
CONTROL_GROUP = Path("/sys/fs/cgroup")  # what a container sees of its own
MADV_PAGEOUT = 21  # since Linux 5.4; whatever lies at the addresses by then, none of it is lost


def check_memory(needed: int, what: str = PICTURES, instead: str = SMALLER) -> None:
    """Refuse what needs more memory than the machine has free.

    Args:
        needed: bytes, an estimate. ``OV_DECIDIFFUSION_MEMORY_GB`` says how many gigabytes may be used instead.
        what, instead: what needs them, and what can be done, for the message.

    Raises:
        NotEnoughMemory: a ValueError; says the estimate, and what to do.
        ValueError: the variable holds no number.
    """
    free = free_memory()
    if needed > free:
        raise NotEnoughMemory(
            f"{what} need about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: {instead}. "
            f"{LIMIT_VARIABLE} says how many gigabytes may be used where this is wrong."
        )


def free_memory() -> float:
    """Bytes that may still be used: what the machine and the container have left, or what the variable says.

    Raises:
        ValueError: the variable holds no number.
    """
    told = os.environ.get(LIMIT_VARIABLE)
    try:
        free = float(told) * 1e9 if told else min(psutil.virtual_memory().available, _left_in_container())
    except ValueError:
        free = math.nan
    if math.isnan(free):
        raise ValueError(f"{LIMIT_VARIABLE} must be a number of gigabytes, got {told!r}.")
    return free


def _left_in_container() -> float:
    """Bytes, by Linux's control groups; infinity where they set no limit.

    What files are kept in memory for is given back when it is needed (``Documentation/admin-guide/cgroup-v2.rst``).
    """
    try:
        most, used, details = ((CONTROL_GROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        kept = dict(line.split() for line in details.splitlines())["inactive_file"]
        return int(most) - int(used) + int(kept)
    except (OSError, ValueError, KeyError):  # no Linux, another version of them, or "max", which is none
        return math.inf


def peak_memory() -> int:
    """The most that this process has held in memory so far, in bytes.

    Linux hands ``ru_maxrss`` on from the process that started this one, so there it is read from the kernel's own
    account of this process's memory.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_freed_memory() -> None:
    """What Python no longer refers to, which it and glibc put off handing back."""
    gc.collect()
    trim_heap()


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Within it ``release_freed_memory`` looks at what is new only: a process with its modules holds a million objects,
    and looking through them takes a quarter of a second each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim_heap() -> None:
    """What has been freed already, which glibc puts off handing back; takes some hundredths of a second."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_mapped_weights(file: Path) -> None:
    """The pages of a weights file that OpenVINO has mapped: read again from the file if they are needed again.

    After a model's first run its weights are there a second time, packed for the processor.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError, ValueError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        path = str(file.resolve())
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, access, *_, name = line.split(maxsplit=5)
            if name == path and "w" not in access:
                begin, end = (int(address, 16) for address in addresses.split("-"))
                madvise(begin, end - begin, MADV_PAGEOUT)


@contextlib.contextmanager
def forgetting_mapped_weights(file: Path) -> Iterator[None]:
    """While a model packs its weights, forget their pages again and again: those not packed yet are read once more."""
    done = threading.Event()

    def keep_forgetting() -> None:
        while not done.wait(0.2):
            forget_mapped_weights(file)

    helper = threading.Thread(target=keep_forgetting, daemon=True)
    helper.start()
    try:
        yield
    finally:
        done.set()
        helper.join()
        forget_mapped_weights(file)
