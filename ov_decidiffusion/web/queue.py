"""One queue in front of one pipeline: first come, first served, for the demo's visitors and for the server's clients.

Two runs at once would only slow each other down. Whoever submits a job runs it when its turn comes: a visitor's own
thread, or the server's worker, which may run several jobs of one kind together.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

MAX_WAITING = 32
FIRST_ESTIMATE = 0.05  # seconds for a step of one picture, until one was measured
LEARNED = 0.5  # share of the latest run in the estimate


class QueueIsFull(Exception):
    """Too many jobs are waiting.

    Attributes:
        seconds: after which it is worth trying again.
    """

    def __init__(self, seconds: float):
        super().__init__(f"too many requests are waiting, try again in {seconds:.0f} s")
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """A place in the queue.

    Attributes:
        client: who may stop it.
        work: in steps of one picture of the model's own size.
        done: of it, so far.
        begun: whether its turn has come.
        stopped: whether its client wants no more of it, or has left.
        left: whether nobody is there any more to see its pictures.
    """

    client: str | None  # None: a program that names no session
    work: float
    done: float = 0
    begun: bool = False
    stopped: bool = False
    left: bool = False


AJob = TypeVar("AJob", bound=Job)


class Queue:
    """The jobs that wait for one pipeline, and the one that it runs, in the order in which they came.

    Args:
        max_waiting: jobs that may wait.
    """

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self._changed = threading.Condition()
        self._jobs: list[Job] = []
        self._max_waiting = max_waiting
        self._seconds = FIRST_ESTIMATE
        self.closed = False

    def submit(self, job: Job) -> None:
        """Put a job at the end.

        Raises:
            QueueIsFull: come back later.
        """
        with self._changed:
            if self.waiting >= self._max_waiting:
                raise QueueIsFull(max(1.0, self._estimate(self._jobs)))
            self._jobs.append(job)
            self._changed.notify_all()

    def remove(self, job: Job) -> None:
        """Take a job out, finished or given up; those behind it move up at once."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            self._changed.notify_all()

    @contextmanager
    def place(self, job: Job) -> Iterator[Job]:
        """Submit a job, and remove it at the end.

        Raises:
            QueueIsFull: come back later.
        """
        self.submit(job)
        try:
            yield job
        finally:
            self.remove(job)

    @property
    def waiting(self) -> int:
        """Jobs whose turn has not come."""
        return sum(not job.begun for job in self._jobs)

    def ahead(self, job: Job, seconds: float = 0.0) -> int:
        """How many jobs are before one; waits up to so many seconds for its turn to come, or for its end."""
        with self._changed:
            if seconds:
                self._changed.wait_for(lambda: self._position(job) == 0 or self.is_stopped(job), seconds)
            position = self._position(job)
            job.begun = job.begun or position == 0
            return position

    def next_of(
        self, kind: type[AJob], together: Callable[[list[AJob]], list[AJob]], is_ending: Callable[[], bool]
    ) -> list[AJob]:
        """Wait until the first job is one of the caller's kind, and begin it with those that run together with it.

        Args:
            kind: of the caller's jobs.
            together: of the caller's waiting jobs in their order, those to begin now; the first is among them.
            is_ending: whether the caller takes no more jobs than those that are there; ``wake`` after it changed.

        Returns:
            the jobs to run; none when the caller or the queue has ended.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.closed
                    or isinstance(self._jobs[0] if self._jobs else None, kind)
                    or (is_ending() and not any(isinstance(job, kind) for job in self._jobs))
                )
            )
            waiting = [job for job in self._jobs if isinstance(job, kind)]
            if self.closed or not waiting:
                return []
            begun = together(waiting)
            for job in begun:
                job.begun = True
            return begun

    def wake(self) -> None:
        """Let those who wait look again at what they wait for."""
        with self._changed:
            self._changed.notify_all()

    def give_up(self, job: Job) -> None:
        """Nobody waits for a job any more: it leaves at once, or ends at its next step if it is running."""
        with self._changed:
            job.stopped = job.left = True
            if not job.begun:
                self.remove(job)
            self._changed.notify_all()

    def stop_all(self, kind: type[Job]) -> None:
        """End all jobs of a kind."""
        with self._changed:
            for job in [job for job in self._jobs if isinstance(job, kind)]:
                self.give_up(job)

    def seconds_until(self, job: Job) -> float:
        """About how long until a job's turn comes: what those before it still have to do."""
        with self._changed:
            return self._estimate(self._jobs[: self._position(job)])

    def others_of(self, job: Job) -> tuple[int, int]:
        """How many of the same client's jobs are before one, and how many are behind it."""
        with self._changed:
            own = [one for one in self._jobs if one.client == job.client and not one.stopped]
            before = own.index(job) if job in own else 0
            return before, max(0, len(own) - before - 1)

    def has_jobs(self, client: str | None) -> bool:
        """Whether anything of a client's waits or runs."""
        with self._changed:
            return any(job.client == client for job in self._jobs)

    def estimated_seconds(self, work: float) -> float:
        """About how long so much work takes, once its turn has come."""
        return work * self._seconds

    def measured(self, work: float, seconds: float) -> None:
        """Learn from a finished run how long a step of one picture takes."""
        self._seconds = (1 - LEARNED) * self._seconds + LEARNED * seconds / work

    def stop(self, client: str | None) -> None:
        """End what a client waits for, and nothing that it asks for later."""
        with self._changed:
            for job in self._jobs:
                job.stopped = job.stopped or job.client == client
            self._changed.notify_all()

    def forget(self, client: str | None) -> None:
        """A client has left: its jobs leave too, even those that nobody will resume."""
        with self._changed:
            for job in [job for job in self._jobs if job.client == client]:
                job.stopped = job.left = True
                self.remove(job)

    def close(self) -> None:
        """End everything."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def is_stopped(self, job: Job) -> bool:
        return self.closed or job.stopped

    def _position(self, job: Job) -> int:
        return self._jobs.index(job) if job in self._jobs else 0

    def _estimate(self, jobs: list[Job]) -> float:
        return sum(max(0, job.work - job.done) for job in jobs) * self._seconds
