"""What runs in OpenVINO's threads belongs to one process: refused after a fork, and ended before the process does."""

import atexit
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_users: list[int] = []  # the process that has used OpenVINO here
_there_are: "weakref.WeakSet[OfOneProcess]" = weakref.WeakSet()


class OfOneProcess:
    """Something that computes in OpenVINO's threads, for one thread of Python at a time.

    Raises:
        RuntimeError: in a process that was forked after OpenVINO was used.
    """

    def __init__(self) -> None:
        self._process = _users[0] if _users else os.getpid()
        self.refuse_forks()
        _users[:] = [self._process]
        self._running = threading.Lock()  # a compiled model has one infer request; a demo runs in another thread
        _there_are.add(self)

    def __reduce__(self) -> Any:
        raise TypeError("Compiled models cannot be pickled or copied: load the folder in each process.")

    @property
    def is_of_this_process(self) -> bool:
        """Whether it was not made before a fork."""
        return self._process == os.getpid()

    def refuse_forks(self) -> None:
        """OpenVINO's threads are not in a forked process, and waiting for them would last for ever."""
        if not self.is_of_this_process:
            raise RuntimeError(
                "OpenVINO was used in another process, before a fork, and cannot be used in this one: start processes "
                "with multiprocessing's 'spawn', and call from_pretrained in each."
            )

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """One thread at a time, of the process that it was made in."""
        self.refuse_forks()
        with self._running:
            yield

    def close(self) -> None:
        """Wait for what is going on, and refuse whatever comes later."""
        raise NotImplementedError


@atexit.register
def _close_all() -> None:
    """A process that ends while a thread of it computes would be aborted."""
    for one in list(_there_are):
        if one.is_of_this_process:
            one.close()
