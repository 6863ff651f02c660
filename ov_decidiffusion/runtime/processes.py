"""Using OpenVINO safely in a process: its threads do not survive a fork, must end before the process does, and may
change its locale."""

import atexit
import contextlib
import locale
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from openvino import opset13 as ops

PATIENCE = 60.0  # seconds to wait for a step of a run
LATEST_END = 20.0  # seconds after which a stopped thread raises an error, so that nobody waits for it longer

# OpenVINO imports NumPy when it first passes numbers in or out, and waits for Python's lock meanwhile: two threads that
# do so at once deadlock. It is done here because a module is imported by one thread only.
ops.constant(np.zeros(1, np.float32)).get_data()

_users: list[int] = []  # the id of the process that has used OpenVINO
_instances: "weakref.WeakSet[ProcessBound]" = weakref.WeakSet()


class ProcessBound:
    """Base class for what computes in OpenVINO's threads, for one Python thread at a time.

    Raises:
        RuntimeError: this process was forked after OpenVINO was used.
    """

    def __init__(self) -> None:
        self._process = _users[0] if _users else os.getpid()
        self.refuse_forks()
        _users[:] = [self._process]
        self._running = threading.Lock()  # a compiled model has one infer request; a demo runs in another thread
        self._at_work: Counter[int] = Counter()  # number of calls by thread
        self._work_ended, self._ending = threading.Condition(), False
        _instances.add(self)

    def __reduce__(self) -> Any:
        raise TypeError("Compiled models cannot be pickled or copied: load the folder in each process.")

    @property
    def is_of_this_process(self) -> bool:
        """Whether it was made in this process, and not before a fork."""
        return self._process == os.getpid()

    def refuse_forks(self) -> None:
        """Refuse a forked process: it lacks OpenVINO's threads, and would wait for them for ever."""
        if not self.is_of_this_process:
            raise RuntimeError(
                "OpenVINO was used in another process, before a fork, and cannot be used in this one: start processes "
                "with multiprocessing's 'spawn', and call from_pretrained in each."
            )

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Let one thread at a time in, and only in the process that made this."""
        self.refuse_forks()
        with self._running:
            if not self._is_too_late():
                yield
                return
        self._park_thread()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Use it around all computing, torch's included: the end of the process waits for it."""
        self.refuse_forks()
        me = threading.get_ident()
        with self._work_ended:
            self._at_work[me] += 1
        if self._is_too_late():
            self._park_thread()
        try:
            yield
        finally:
            with self._work_ended:
                self._at_work[me] -= 1
                self._work_ended.notify_all()
            if self._is_too_late():
                self._park_thread()

    def _is_too_late(self) -> bool:
        return self._ending and threading.current_thread() is not threading.main_thread()

    def _park_thread(self) -> None:
        """Let the thread wait here for the process's end, in Python and not in C++."""
        with self._work_ended:
            self._at_work.pop(threading.get_ident(), None)
            self._work_ended.notify_all()
        time.sleep(LATEST_END)
        raise RuntimeError("The process is ending.")

    def end(self) -> None:
        """Stop all computing, because the process ends: after it, no thread is in a model or in torch."""
        me = threading.get_ident()
        with self._work_ended:
            self._ending = True
            self._work_ended.wait_for(lambda: not any(n > 0 for one, n in self._at_work.items() if one != me), PATIENCE)
        self.close()

    def close(self) -> None:
        """Wait for running work, and refuse later work."""
        raise NotImplementedError


@atexit.register
def _end_all() -> None:
    """At Python's end, daemon threads lose the interpreter; one that then returns from C++ aborts the process."""
    for one in list(_instances):
        if one.is_of_this_process:
            one.end()


class KeptLocale:
    """Keeps the locale of the process while OpenVINO compiles.

    To name the files of its model cache, OpenVINO sets the locale to "C" and back. If two threads do so at once, it can
    stay "C", and the process then reads text as ASCII. So it is restored when the last of them is done.
    """

    def __init__(self):
        self._lock, self._inside, self._before = threading.Lock(), 0, ""

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._before = locale.setlocale(locale.LC_ALL)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and locale.setlocale(locale.LC_ALL) == "C":
                    with contextlib.suppress(locale.Error):
                        locale.setlocale(locale.LC_ALL, self._before)


LOCALE = KeptLocale()
