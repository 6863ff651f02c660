"""Loading: what the models are compiled with."""

import os
import subprocess
import sys

import pytest

PLACES_OF_THREADS = """
import contextlib, os, sys, threading
from ov_decidiffusion import OVStableDiffusionPipeline

pipe = OVStableDiffusionPipeline.from_pretrained(sys.argv[1], ov_config={"PERF_COUNT": False})
places, is_over = set(), threading.Event()

def look():
    while not is_over.is_set():
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # it has ended
                places.add(tuple(sorted(os.sched_getaffinity(int(thread)))))

looking = threading.Thread(target=look)
looking.start()
pipe("a fox", num_inference_steps=4)
is_over.set()
looking.join()
print(*places)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="an interface of Linux")
def test_threads_go_where_there_is_room_so_that_several_processes_share_a_machine(model_dir, tmp_path):
    processors = range(os.cpu_count() or 1)  # all of them, and not only those of this test process
    command = [sys.executable, "-c", PLACES_OF_THREADS, model_dir]
    done = subprocess.run(
        command,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},  # so that the precisions are measured in this process too
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, processors),
    )
    assert done.stdout.strip() == str(tuple(processors))
