"""Turns the requests of many clients into runs of one pipeline; requests with equal settings run together."""

import contextlib
import json
import threading
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ov_decidiffusion.generation.presets import PRESETS
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.web.queue import Job, Queue


@dataclass(eq=False)
class ImageJob(Job):
    """The pictures that one request asks for.

    Attributes:
        rows: for each picture its ``prompt``, ``negative_prompt`` and ``seed``, and for edits ``image`` and optionally
            ``mask_image``.
        shared: the other arguments of ``pipe.denoise``.
        future: resolves to the finished pictures, in the order of the rows.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    future: "Future[list[Image.Image]]" = field(default_factory=Future)

    @property
    def kind(self) -> str:
        """A text that is equal for jobs that can run together."""
        given = sorted(name for name, value in self.rows[0].items() if value is not None and "image" in name)
        return json.dumps([self.shared, given], sort_keys=True, default=str)


class Batcher:
    """A thread that runs the server's jobs when their turn comes, and several together if they are of one kind.

    Every picture has a seed of its own, so it is the same as if it were made alone.

    Args:
        pipe: the pipeline.
        queue: the queue that the jobs wait in; the demo's visitors may wait in it too.
        max_batch: largest number of pictures that run together; a larger job runs in several batches.
    """

    def __init__(self, pipe: OVStableDiffusionPipeline, queue: Queue, max_batch: int = 4):
        self._pipe, self.queue, self._max_batch = pipe, queue, max_batch
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="pictures", daemon=True)
        self._thread.start()

    def make_job(self, client: str, rows: list[dict[str, Any]], shared: dict[str, Any]) -> ImageJob:
        """A job for pictures, whose work is the number of steps that they take."""
        preset = PRESETS.get(shared.get("preset") or "exact", {})
        steps = shared.get("num_inference_steps") or preset.get("num_inference_steps")
        return ImageJob(
            client, (steps or self._pipe.defaults["num_inference_steps"]) * len(rows), rows=rows, shared=shared
        )

    def submit(self, job: ImageJob) -> None:
        """Put a job at the end of the queue.

        Raises:
            QueueIsFull: too many jobs are waiting.
            RuntimeError: ``close`` was called.
        """
        if self._closed:
            raise RuntimeError("The server is being stopped.")
        self.queue.submit(job)

    def close(self, timeout: float = 60) -> None:
        """Take no more jobs, and finish the waiting ones, for at most ``timeout`` seconds."""
        self._closed = True
        self.queue.wake()
        self._thread.join(timeout)
        self.queue.stop_all(ImageJob)
        self._thread.join(10)

    def _work(self) -> None:
        while jobs := self.queue.next_of(ImageJob, self._together, lambda: self._closed):
            try:
                self._run(jobs)
            finally:
                for job in jobs:
                    self.queue.remove(job)

    def _together(self, jobs: list[ImageJob]) -> list[ImageJob]:
        """The first job, and others of its kind as long as there is room."""
        first, *others = jobs
        taken, room = [first], self._max_batch - len(first.rows)
        for job in others:
            if job.kind == first.kind and len(job.rows) <= room:
                taken.append(job)
                room -= len(job.rows)
        return taken

    def _run(self, jobs: list[ImageJob]) -> None:
        try:
            pictures = self._pictures(jobs)
        except Exception as error:
            if len(jobs) > 1 and isinstance(error, (ValueError, FloatingPointError)):
                for job in jobs:  # one of them is wrong, and must not harm the others
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

    def _pictures(self, jobs: list[ImageJob]) -> list[Image.Image] | None:
        """The pictures of all jobs, one job after the other; None if nobody waits for any."""
        rows, pictures = [row for job in jobs for row in job.rows], []
        lots = [rows[begin : begin + self._max_batch] for begin in range(0, len(rows), self._max_batch)]
        start = time.perf_counter()
        for number, lot in enumerate(lots):
            made = self._run_together(lot, jobs, number, len(lots))
            if made is None:
                return None
            pictures += made
        self.queue.measured(sum(job.work for job in jobs), time.perf_counter() - start)
        return pictures

    def _run_together(
        self, rows: list[dict[str, Any]], jobs: list[ImageJob], number: int, lots: int
    ) -> list[Image.Image] | None:
        arguments = dict(jobs[0].shared)
        for name in ("prompt", "seed", "image", "mask_image"):
            if rows[0].get(name) is not None:
                arguments[name] = [row[name] for row in rows]
        if any(row.get("negative_prompt") for row in rows):
            arguments["negative_prompt"] = [row.get("negative_prompt") or "" for row in rows]
        step = None
        for step in self._pipe.denoise(**arguments):
            if all(self.queue.is_stopped(job) for job in jobs):
                return None
            for job in jobs:
                job.done = round(job.work * (number + (step.index + 1) / step.total) / lots)
        assert step is not None  # a run has at least one step
        pictures = self._pipe.finish(step)
        assert isinstance(pictures, list)
        return pictures


def _settle(job: ImageJob, result: list[Image.Image] | Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # the client has abandoned it meanwhile
        if isinstance(result, Exception):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
