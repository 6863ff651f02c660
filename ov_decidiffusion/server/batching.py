"""Requests of many clients -> runs of one pipeline: a bounded queue, in which what fits together runs together."""

import contextlib
import json
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ov_decidiffusion.pipeline import OVStableDiffusionPipeline


class QueueIsFull(Exception):
    """There are too many requests waiting.

    Attributes:
        seconds: after which it is worth trying again.
    """

    def __init__(self, seconds: float):
        super().__init__(f"too many requests are waiting, try again in {seconds:.0f} s")
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """The pictures that one request asks for.

    Attributes:
        rows: of each picture its ``prompt``, ``negative_prompt`` and ``seed``, and for edits ``image`` and perhaps
            ``mask_image``.
        shared: the other arguments of ``pipe.denoise``.
        future: of the finished pictures, in the order of the rows.
        cancelled: whether nobody waits for them any more.
    """

    rows: list[dict[str, Any]]
    shared: dict[str, Any]
    future: "Future[list[Image.Image]]" = field(default_factory=Future)
    cancelled: bool = False

    @property
    def kind(self) -> str:
        """Jobs of one kind can run together."""
        given = sorted(name for name, value in self.rows[0].items() if value is not None and "image" in name)
        return json.dumps([self.shared, given], sort_keys=True, default=str)


class Batcher:
    """A thread that takes jobs from a queue and runs them, several at a time where they are of one kind.

    Every picture has a seed of its own, so it is the one that it would be alone.

    Args:
        pipe: the pipeline.
        max_waiting: jobs that may wait.
        max_batch: pictures that run together at most; more of one job run one lot after the other.
    """

    def __init__(self, pipe: OVStableDiffusionPipeline, max_waiting: int = 64, max_batch: int = 4):
        self._pipe, self._max_waiting, self._max_batch = pipe, max_waiting, max_batch
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._closed = False
        self._seconds = 1.0  # for one picture, from what was measured
        self._thread = threading.Thread(target=self._work, name="pictures", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue.

        Raises:
            QueueIsFull: come back later.
            RuntimeError: it was closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("The server is being stopped.")
            if len(self._waiting) >= self._max_waiting:
                raise QueueIsFull(max(1.0, self.seconds_to_wait()))
            self._waiting.append(job)
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    def seconds_to_wait(self) -> float:
        """About how long a new job would wait."""
        return self._seconds * sum(len(job.rows) for job in [*self._running, *self._waiting])

    def close(self, timeout: float = 60) -> None:
        """Take no more jobs, and run those that are there, for so many seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        for job in [*self._running, *self._waiting]:
            job.cancelled = True
        self._thread.join(10)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._running = self._take()
            if self._running:
                self._run(self._running)
            self._running = []

    def _take(self) -> list[Job]:
        """The first job that somebody waits for, and others of its kind as far as there is room."""
        taken: list[Job] = []
        left: deque[Job] = deque()
        room = self._max_batch
        for job in self._waiting:
            if job.cancelled:
                job.future.cancel()
            elif not taken or (job.kind == taken[0].kind and len(job.rows) <= room):
                taken.append(job)
                room -= len(job.rows)
            else:
                left.append(job)
        self._waiting = left
        return taken

    def _run(self, jobs: list[Job]) -> None:
        try:
            pictures = self._pictures(jobs)
        except Exception as error:
            if len(jobs) > 1 and isinstance(error, (ValueError, FloatingPointError)):
                for job in jobs:  # one of them is wrong, and the others are not to suffer
                    self._run([job])
                return
            for job in jobs:
                _settle(job, error)
            return
        for job in jobs:
            if pictures is None:
                job.future.cancel()
            else:
                _settle(job, [pictures.pop(0) for _ in job.rows])

    def _pictures(self, jobs: list[Job]) -> list[Image.Image] | None:
        """Those of all jobs one after the other; None where nobody waits for any."""
        rows, pictures = [row for job in jobs for row in job.rows], []
        start = time.perf_counter()
        for begin in range(0, len(rows), self._max_batch):
            made = self._run_together(rows[begin : begin + self._max_batch], jobs)
            if made is None:
                return None
            pictures += made
        self._seconds = 0.7 * self._seconds + 0.3 * (time.perf_counter() - start) / len(rows)
        return pictures

    def _run_together(self, rows: list[dict[str, Any]], jobs: list[Job]) -> list[Image.Image] | None:
        arguments = dict(jobs[0].shared)
        for name in ("prompt", "seed", "image", "mask_image"):
            if rows[0].get(name) is not None:
                arguments[name] = [row[name] for row in rows]
        if any(row.get("negative_prompt") for row in rows):
            arguments["negative_prompt"] = [row.get("negative_prompt") or "" for row in rows]
        for step in self._pipe.denoise(**arguments):
            if all(job.cancelled for job in jobs):
                return None
            last = step
        return self._pipe.finish(last)


def _settle(job: Job, result: list[Image.Image] | Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # whoever asked has given it up meanwhile
        if isinstance(result, Exception):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
