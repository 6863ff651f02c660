"""One queue for visitors and clients: in order, with an estimate, and without those who have left."""

import threading

import pytest

from ov_decidiffusion.server.batching import ImageJob
from ov_decidiffusion.web.queue import Job, Queue, QueueIsFull


def of_server(client: str, prompt: str = "a fox", steps: int = 10) -> ImageJob:
    return ImageJob(client, steps, rows=[{"prompt": prompt, "seed": 0}], shared={"num_inference_steps": steps})


def begin(queue: Queue) -> list[ImageJob]:
    """What a server's worker begins when its turn comes, all that wait together."""
    return queue.next_of(ImageJob, lambda jobs: jobs, lambda: False)


def test_visitors_and_clients_are_served_in_the_order_in_which_they_came():
    queue = Queue()
    visitor, client, later = Job("visitor", 10), of_server("client"), Job("visitor", 10)
    begun = []
    for job in (visitor, client, later):
        queue.submit(job)
    worker = threading.Thread(target=lambda: begun.append(begin(queue)), daemon=True)
    worker.start()
    assert queue.ahead(visitor) == 0 and queue.ahead(later) == 2
    worker.join(0.2)
    assert not begun, "the client's turn has not come"
    queue.remove(visitor)
    worker.join(10)
    assert begun == [[client]] and queue.ahead(later) == 1
    queue.remove(client)
    assert queue.ahead(later) == 0 and queue.waiting == 0


def test_those_who_have_left_leave_at_once_and_count_for_nothing():
    queue = Queue(max_waiting=2)
    running, gone, waiting = Job("a", 10), of_server("b"), Job("c", 10)
    queue.submit(running)
    assert queue.ahead(running) == 0
    queue.submit(gone)
    queue.submit(waiting)
    with pytest.raises(QueueIsFull):
        queue.submit(Job("d", 10))
    queue.give_up(gone)
    assert queue.ahead(waiting) == 1 and gone.left
    queue.submit(Job("d", 10))
    queue.forget("c")
    assert waiting.left and queue.waiting == 1
    queue.give_up(running)  # which ends at its next step, and keeps its place until then
    assert queue.is_stopped(running) and queue.seconds_until(Job("e", 1)) == 0


def test_there_is_one_estimate_from_what_both_kinds_of_runs_took():
    queue = Queue()
    for _ in range(20):
        queue.measured(10, 20.0)  # two seconds a step
    client, visitor = of_server("client", steps=30), Job("visitor", 10)
    queue.submit(client)
    queue.submit(visitor)
    assert queue.seconds_until(visitor) == pytest.approx(60, rel=1e-3)
    client.done = 20
    assert queue.seconds_until(visitor) == pytest.approx(20, rel=1e-3)


def test_a_worker_that_ends_runs_what_is_there_first():
    queue, job = Queue(), of_server("client")
    queue.submit(job)
    assert queue.next_of(ImageJob, lambda jobs: jobs, lambda: True) == [job]
    queue.remove(job)
    queue.submit(Job("visitor", 10))
    assert queue.next_of(ImageJob, lambda jobs: jobs, lambda: True) == []
