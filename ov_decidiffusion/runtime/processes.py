"""What OpenVINO does to a process: its threads belong to it alone, and have to end before it; its locale is kept."""

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

PATIENCE = 60.0  # seconds for a step of a run
LATEST_END = 20.0  # seconds after which whoever waits for a thread that was stopped shall have it

# OpenVINO looks NumPy up when it is first handed numbers or asked for them, and waits in it for Python's lock: of two
# threads that come to it at once, each then has what the other waits for, for ever. An import is one thread's.
ops.constant(np.zeros(1, np.float32)).get_data()

_users: list[int] = []  # the process that has used OpenVINO here
_instances: "weakref.WeakSet[ProcessBound]" = weakref.WeakSet()


class ProcessBound:
    """Something that computes in OpenVINO's threads, for one thread of Python at a time.

    Raises:
        RuntimeError: in a process that was forked after OpenVINO was used.
    """

    def __init__(self) -> None:
        self._process = _users[0] if _users else os.getpid()
        self.refuse_forks()
        _users[:] = [self._process]
        self._running = threading.Lock()  # a compiled model has one infer request; a demo runs in another thread
        self._at_work: Counter[int] = Counter()  # calls, by thread
        self._work_ended, self._ending = threading.Condition(), False
        _instances.add(self)

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

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """One thread at a time, of the process that it was made in."""
        self.refuse_forks()
        with self._running:
            if not self._is_too_late():
                yield
                return
        self._park_thread()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Around all that computes, in torch too; the end of the process waits for it."""
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
        """A thread waits for the process's end here, where it is in Python and not in C++."""
        with self._work_ended:
            self._at_work.pop(threading.get_ident(), None)
            self._work_ended.notify_all()
        time.sleep(LATEST_END)
        raise RuntimeError("The process is ending.")

    def end(self) -> None:
        """Stop what is going on, for the process ends: no thread is in a model or in torch after it."""
        me = threading.get_ident()
        with self._work_ended:
            self._ending = True
            self._work_ended.wait_for(lambda: not any(n > 0 for one, n in self._at_work.items() if one != me), PATIENCE)
        self.close()

    def close(self) -> None:
        """Wait for what is going on, and refuse whatever comes later."""
        raise NotImplementedError


@atexit.register
def _end_all() -> None:
    """Python, when it ends, takes itself from daemon threads; one that then comes back from C++ aborts the process."""
    for one in list(_instances):
        if one.is_of_this_process:
            one.end()


class KeptLocale:
    """The locale of the process, over what OpenVINO compiles.

    To name what it keeps in a model cache, it sets the locale to "C" and back; two threads at once leave it at "C",
    and the process then reads texts as ASCII. It is put back when the last of them is done.
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
