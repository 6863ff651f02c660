"""One queue in front of one pipeline: first come, first served, for the demo's visitors and for the server's clients.

Two runs at once would only slow each other down. A job is run by whoever submitted it when its turn comes: a visitor's
own thread, or the server's worker, which may run several jobs of one kind together.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

MAX_WAITING = 32
FIRST_ESTIMATE = 0.05  # seconds for one step of one picture, until a run was measured
LEARNED = 0.5  # weight of the latest run in the estimate


class QueueIsFull(Exception):
    """Too many jobs are waiting.

    Attributes:
        seconds: time after which it is worth trying again.
    """

    def __init__(self, seconds: float):
        super().__init__(f"too many requests are waiting, try again in {seconds:.0f} s")
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """A place in the queue.

    Attributes:
        client: the client that may stop it.
        work: its amount of work, in steps of one picture of the model's own size.
        done: the work done so far.
        begun: whether its turn has come.
        stopped: whether its client has stopped it, or has left.
        left: whether nobody is there any more to see its pictures.
    """

    client: str | None  # None: a program without a session
    work: float
    done: float = 0
    begun: bool = False
    stopped: bool = False
    left: bool = False


AJob = TypeVar("AJob", bound=Job)


class Queue:
    """The jobs that wait for one pipeline, and those that it runs, in the order of their arrival.

    Args:
        max_waiting: number of jobs that may wait.
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
            QueueIsFull: too many jobs are waiting.
        """
        with self._changed:
            if self.waiting >= self._max_waiting:
                raise QueueIsFull(max(1.0, self._estimate(self._jobs)))
            self._jobs.append(job)
            self._changed.notify_all()

    def remove(self, job: Job) -> None:
        """Take out a job that is finished or abandoned; those after it move up at once."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            self._changed.notify_all()

    @contextmanager
    def place(self, job: Job) -> Iterator[Job]:
        """Submit a job, and remove it at the end.

        Raises:
            QueueIsFull: too many jobs are waiting.
        """
        self.submit(job)
        try:
            yield job
        finally:
            self.remove(job)

    @property
    def waiting(self) -> int:
        """The number of jobs whose turn has not come."""
        return sum(not job.begun for job in self._jobs)

    def ahead(self, job: Job, seconds: float = 0.0) -> int:
        """The number of jobs before this one; waits up to ``seconds`` for its turn to come, or for its end."""
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
            kind: the class of the caller's jobs.
            together: chooses, among the caller's waiting jobs in order, those to begin now, including the first.
            is_ending: whether the caller will take only the jobs already in the queue; call ``wake`` when it changes.

        Returns:
            the jobs to run; an empty list when the caller or the queue has ended.
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
        """Let all waiting threads check their condition again."""
        with self._changed:
            self._changed.notify_all()

    def give_up(self, job: Job) -> None:
        """Abandon a job: it leaves at once, or ends at its next step if it is running."""
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
        """About how long it takes until a job's turn comes: the remaining work of the jobs before it."""
        with self._changed:
            return self._estimate(self._jobs[: self._position(job)])

    def others_of(self, job: Job) -> tuple[int, int]:
        """How many of the same client's jobs are before this one, and how many after it."""
        with self._changed:
            own = [one for one in self._jobs if one.client == job.client and not one.stopped]
            before = own.index(job) if job in own else 0
            return before, max(0, len(own) - before - 1)

    def has_jobs(self, client: str | None) -> bool:
        """Whether any job of a client waits or runs."""
        with self._changed:
            return any(job.client == client for job in self._jobs)

    def estimated_seconds(self, work: float) -> float:
        """About how long an amount of work takes, once its turn has come."""
        return work * self._seconds

    def measured(self, work: float, seconds: float) -> None:
        """Update the estimate for one step of one picture from a finished run."""
        self._seconds = (1 - LEARNED) * self._seconds + LEARNED * seconds / work

    def stop(self, client: str | None) -> None:
        """End a client's current jobs, but none that it submits later."""
        with self._changed:
            for job in self._jobs:
                job.stopped = job.stopped or job.client == client
            self._changed.notify_all()

    def forget(self, client: str | None) -> None:
        """Remove all jobs of a client that has left, even those whose run nobody will resume."""
        with self._changed:
            for job in [job for job in self._jobs if job.client == client]:
                job.stopped = job.left = True
                self.remove(job)

    def close(self) -> None:
        """End all jobs."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def is_stopped(self, job: Job) -> bool:
        return self.closed or job.stopped

    def _position(self, job: Job) -> int:
        return self._jobs.index(job) if job in self._jobs else 0

    def _estimate(self, jobs: list[Job]) -> float:
        return sum(max(0, job.work - job.done) for job in jobs) * self._seconds
