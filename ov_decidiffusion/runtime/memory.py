"""Refuse what needs too much memory, and return unused memory of this process to the system (on Linux)."""

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
CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container's own control group
MADV_PAGEOUT = 21  # since Linux 5.4; it loses no data, even if the addresses have been reused by then


def check_memory(needed: int, what: str = PICTURES, instead: str = SMALLER) -> None:
    """Refuse what needs more memory than the machine has free.

    The environment variable ``OV_DECIDIFFUSION_MEMORY_GB`` sets another limit than the free memory, in gigabytes.

    Args:
        needed: an estimate in bytes.
        what, instead: what needs the memory, and what to do instead, for the message.

    Raises:
        NotEnoughMemory: a ValueError; the message has the estimate, and says what to do.
        ValueError: the environment variable holds no number.
    """
    free = free_memory()
    if needed > free:
        raise NotEnoughMemory(
            f"{what} need about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: {instead}. "
            f"If this is wrong, set {LIMIT_VARIABLE} to the number of gigabytes that may be used."
        )


def free_memory() -> float:
    """Bytes that may still be used: what is free in the machine and the container, or what the variable allows.

    Raises:
        ValueError: the environment variable holds no number.
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
    """Free bytes within the limit of Linux's control group; infinity if there is no limit.

    The inactive file cache counts as free: the kernel reclaims it when memory is needed
    (``Documentation/admin-guide/cgroup-v2.rst``).
    """
    try:
        most, used, details = ((CONTROL_GROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        kept = dict(line.split() for line in details.splitlines())["inactive_file"]
        return int(most) - int(used) + int(kept)
    except (OSError, ValueError, KeyError):  # not Linux, another cgroup version, or "max", which means no limit
        return math.inf


def peak_memory() -> int:
    """The peak memory of this process so far, in bytes.

    On Linux a process inherits ``ru_maxrss`` from the one that started it, so there the peak is read from
    ``/proc/self/status``.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_freed_memory() -> None:
    """Return to the system what Python no longer refers to, which Python and glibc keep for a while."""
    gc.collect()
    trim_heap()


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Within it, ``release_freed_memory`` examines only new objects: with all modules imported, a process has a million
    objects, and examining them takes a quarter of a second each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim_heap() -> None:
    """Return to the system what has been freed but glibc still keeps; takes some hundredths of a second."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_mapped_weights(file: Path) -> None:
    """Drop the memory pages of a weights file that OpenVINO has mapped; they are read again if needed.

    After a model's first run its weights are in memory a second time, packed for the processor.
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
    """While a model packs its weights, keep dropping their pages; pages not packed yet are read from the file again."""
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
