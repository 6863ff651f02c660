"""What breaks when it is used hard and long: ``python -m benchmarks.soak``, about half an hour on two cores.

Kills of conversions and quantizations, many clients of one demo at once, hundreds of pictures in one process, the
fuzzing tests at length, and a full disk. Prints one table and writes it to ``results/soak.md``.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from gradio_client import Client
from PIL import Image

from benchmarks.report import machine_facts, table
from benchmarks.runs import RESULTS
from ov_decidiffusion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.folder import describe_files, quantized_sibling, verify_model_dir
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from training.evaluate import choose_cases
from training.oracle import read_picture

ROOT = Path(__file__).parent.parent
CLIENTS = 36  # more than may wait
MAX_GROWTH_OF_DEMO = 60e6  # bytes, after the warm-up
MAX_GROWTH_OF_PROCESS = 40e6
FUZZERS = ("test_arguments.py", "test_images.py", "test_hostile.py")


@dataclass
class Row:
    """One line of the table."""

    what: str
    tried: int
    held: int
    note: str = ""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ov_decidiffusion", *arguments]


def killed(arguments: list[str], after: float) -> None:
    """Start a command and kill it, unless it is quicker."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


def kills(work: Path, make: list[str], target: Path, count: int, rng: random.Random) -> Row:
    """Kill a maker of a folder at any moment: there is no folder then or a whole one, and the next run ends in it."""
    start = time.perf_counter()
    subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
    seconds, expected, held = time.perf_counter() - start, describe_files(target), 0
    for _ in range(count):
        shutil.rmtree(target)
        killed(make, rng.uniform(0.1, 1.0) * seconds)
        if target.exists():
            verify_model_dir(target)
        subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
        left = [path.name for path in target.parent.iterdir() if path.name.endswith(".partial")]
        held += describe_files(target) == expected and not left
    return Row(f"kill -9 of {make[3]}, and the next run", count, held, "byte-identical folders, nothing left behind")


@contextmanager
def serving(model_dir: Path, work: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A demo in a process of its own: its address and the process."""
    process = subprocess.Popen(
        command("demo", "--model-dir", str(model_dir), "--inference-precision", "f32"),
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(work), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = next(line for line in process.stdout if "http://127.0.0.1" in line).split()[-1]
    threading.Thread(target=process.stdout.read, daemon=True).start()
    try:
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def clients(model_dir: Path, work: Path, seconds: float) -> list[Row]:
    """Many clients of one demo: each gets the picture that it asked for, or is told that too many are waiting."""
    cases = sum(choose_cases(60).values(), [])
    count = {"pictures": 0, "right": 0, "left": 0, "busy": 0}
    lock = threading.Lock()

    def tell(**found: int) -> None:
        with lock:
            for name, value in found.items():
                count[name] += value

    def visit(address: str, number: int, until: float) -> None:
        rng = random.Random(number)
        folder = work / f"client-{number}"
        client = Client(address, verbose=False, download_files=str(folder))
        while time.time() < until:
            case = rng.choice(cases)
            arguments = {"prompt": case.caption, "negative_prompt": "", "seed": case.seed, "num_inference_steps": 12}
            job = client.submit(**arguments, api_name="/text_to_image")
            what = rng.random()
            if what < 0.1:  # leaves without a word
                tell(left=1)
                client.close()
                client = Client(address, verbose=False, download_files=str(folder))
                continue
            try:
                picture, _ = job.result(timeout=120)
            except Exception as error:
                if "Too many are waiting" not in str(error):
                    raise
                tell(busy=1)
                time.sleep(rng.uniform(0.5, 2))
                continue
            reading = read_picture(Image.open(picture))
            tell(pictures=1, right=all(case.rights(reading).values()))

    with serving(model_dir, work) as (address, process):
        until = time.time() + seconds
        threads = [threading.Thread(target=visit, args=(address, i, until), daemon=True) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(min(90, seconds / 3))
        warm = process.memory_info().rss
        for thread in threads:
            thread.join(seconds + 200)
        growth = process.memory_info().rss - warm
        last = time.perf_counter()
        alone = {"prompt": "a fox", "negative_prompt": "", "num_inference_steps": 2}
        Client(address, verbose=False).predict(**alone, api_name="/text_to_image")
        wait = time.perf_counter() - last
    freed = count["left"] if wait < 10 else 0
    note = f"{count['busy']} told that too many are waiting"
    return [
        Row(f"pictures for {CLIENTS} clients at once, {seconds / 60:.0f} min", count["pictures"], count["right"], note),
        Row(
            "clients that left in mid-run",
            count["left"],
            freed,
            f"a picture after them in {wait:.1f} s",
        ),
        Row("memory of the demo level", 1, int(growth < MAX_GROWTH_OF_DEMO), f"{growth / 1e6:+.0f} MB after warm-up"),
    ]


def pictures(model_dir: Path, count: int) -> list[Row]:
    """Hundreds of pictures in one process: memory, descriptors and threads stay what they were."""
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    process = psutil.Process()
    settings = {"num_inference_steps": 8}
    for i in range(40):
        pipe("a fox in the snow", seed=i, **settings)

    def state() -> tuple[int, int, int]:
        return process.memory_info().rss, process.num_fds(), process.num_threads()

    before = state()
    made = 0
    for i in range(count):
        made += len(pipe(f"a fox in the snow {i % 90}", seed=i, **settings).images)
    growth, descriptors, threads = (
        now - then
        for now, then in zip((process.memory_info().rss, process.num_fds(), process.num_threads()), before, strict=True)
    )
    level = growth < MAX_GROWTH_OF_PROCESS and descriptors <= 0 and threads <= 0
    note = f"{growth / 1e6:+.0f} MB, {descriptors:+d} descriptors, {threads:+d} threads"
    return [Row("pictures in one process", count, made), Row("memory and descriptors level", 1, int(level), note)]


def fuzzers() -> list[Row]:
    """The fuzzing tests with many more examples."""
    rows = []
    for name in FUZZERS:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                f"tests/{name}",
                "--hypothesis-profile=soak",
                "-p",
                "no:cacheprovider",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        passed, failed = (int((re.search(rf"(\d+) {word}", done.stdout) or [0, 0])[1]) for word in ("passed", "failed"))
        if not passed + failed:
            sys.exit(done.stdout + done.stderr)
        rows.append(Row(f"fuzzing: {name}", passed + failed, passed, "tests, with ten times the examples"))
    return rows


def full_disk(work: Path) -> Row:
    """A conversion onto a disk that is too small says so and leaves nothing; needs root to mount one."""
    small = work / "small"
    small.mkdir()
    sizes = (1, 5, 10, 20)
    held = 0
    for megabytes in sizes:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(small)], capture_output=True
        )
        if mounted.returncode:
            return Row("a full disk", 0, 0, "not tried: mounting needs root")
        try:
            done = subprocess.run(
                command("convert", "--model-dir", str(small / "tiny")), cwd=ROOT, capture_output=True, text=True
            )
            said = "free" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
            held += done.returncode == 1 and said and not list(small.iterdir())
        finally:
            subprocess.run(["umount", str(small)], check=True)
    return Row("a full disk: told in one line, nothing left", len(sizes), held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the whole programme: 0.1 is a quick look")
    options = parser.parse_args()

    def times(count: int) -> int:
        return max(1, round(count * options.share))

    rng, rows, started = random.Random(0), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model_dir = work / "models" / "tiny-fp16"
        convert = command("convert", "--checkpoint", str(EMBEDDED_CHECKPOINT), "--model-dir", str(model_dir))
        quantize = command("quantize", str(model_dir), "--mode", "int8-weights", "--prompts", "2")
        parts: list[Callable[[], Row | list[Row]]] = [
            lambda: kills(work, convert, model_dir, times(20), rng),
            lambda: kills(work, quantize, quantized_sibling(model_dir, "int8-weights"), times(10), rng),
            lambda: clients(model_dir, work, 600 * options.share),
            lambda: pictures(model_dir, times(500)),
            fuzzers,
            lambda: full_disk(work),
        ]
        for part in parts:
            found = part()
            for row in found if isinstance(found, list) else [found]:
                print(f"{row.what}: {row.held} of {row.tried} held. {row.note}", flush=True)
                rows.append(row)
    lines = [[row.what, str(row.tried), str(row.held), row.note] for row in rows]
    minutes = (time.perf_counter() - started) / 60
    text = (
        f"`make soak`, {minutes:.0f} minutes on this machine:\n\n{machine_facts()}\n\n"
        f"{table(['', 'tried', 'held', ''], lines)}\n"
    )
    (RESULTS / "soak.md").write_text(text, encoding="utf-8")
    print(text)
    if any(row.held < row.tried for row in rows):
        sys.exit("something did not hold")


if __name__ == "__main__":
    main()
