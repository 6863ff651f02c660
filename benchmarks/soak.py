"""Stress tests: ``python -m benchmarks.soak``, about an hour on two cores.

They kill conversions, quantizations and bulk generation, let many clients use one demo at once, make hundreds of
pictures in one process, run the fuzzing tests at length, emulate another processor, and fill a disk. The table of
results is printed and written to ``results/soak.md``.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from gradio_client import Client
from gradio_client.exceptions import AppError
from gradio_client.utils import Status
from PIL import Image

from benchmarks.report import machine_facts, psnr_of_pictures, table
from benchmarks.runs import RESULTS
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.model_folder.integrity import describe_files, verify_model_dir
from ov_decidiffusion.model_folder.layout import quantized_sibling
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from training.evaluate import Case, choose_cases, generate
from training.oracle import read_picture

ROOT = Path(__file__).parent.parent
CLIENTS = 36  # more than are allowed to wait
MAX_GROWTH_OF_DEMO = 60e6  # bytes, after the warm-up
MAX_GROWTH_OF_PROCESS = 40e6
BULK_ROWS = 60
STEPS = 12  # number of steps of a client's picture
STOP_WITHIN = 10  # seconds; if all clients are waiting, a picture waits about a minute for its turn
CLOSE = {"exact": 40, "fast": 30}  # dB; INT8 rounds differently if products are added up in other formats
TWO_PICTURES = """
import sys
from ov_decidiffusion import OVStableDiffusionPipeline
pipe = OVStableDiffusionPipeline.from_pretrained(sys.argv[1], inference_precision="f32")
for name, settings in (("exact", {"num_inference_steps": 3}), ("fast", {"preset": "fast", "quantized": True})):
    pipe("a fox in the snow", seed=1, **settings).images[0].save(f"{sys.argv[2]}/{name}.png")
"""
FUZZERS = (
    "generation/test_arguments.py",
    "generation/test_images.py",
    "generation/test_same_as_diffusers.py",
    "model_folder/test_contract.py",
    "model_folder/test_hostile.py",
)


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
    """Start a command and kill it after ``after`` seconds, unless it has ended."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


def conversion(target: Path) -> list[str]:
    return command("convert", "--checkpoint", str(EMBEDDED_CHECKPOINT), "--model-dir", str(target))


def run(make: list[str]) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the message has its error output.
    """
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(make[1:])} failed:\n{done.stderr[-2000:]}")


def holds(check: Callable[[], bool]) -> bool:
    """The result of a check; if it raises an error, that is printed and counts as not held."""
    try:
        return check()
    except (RuntimeError, ValueError, OSError) as error:
        print(f"did not hold: {error}", flush=True)
        return False


def kills(make: list[str], target: Path, count: int, rng: random.Random) -> Row:
    """Kill a command that makes a folder at random moments: the folder must be absent or complete, and the next run
    must succeed."""
    start = time.perf_counter()
    run(make)
    seconds, expected, held = time.perf_counter() - start, describe_files(target), 0

    def kill_one() -> bool:
        shutil.rmtree(target, ignore_errors=True)
        killed(make, rng.uniform(0.1, 1.0) * seconds)
        if target.exists():
            verify_model_dir(target)
        run(make)
        left = [path.name for path in target.parent.iterdir() if path.name.endswith(".partial")]
        return describe_files(target) == expected and not left

    for _ in range(count):
        held += holds(kill_one)
    return Row(f"kill -9 of {make[3]}, and the next run", count, held, "byte-identical folders, nothing left behind")


@contextmanager
def serving(model_dir: Path, work: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run a demo in a process of its own; yields its address and the process."""
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


@dataclass
class Tally:
    """What the clients saw; all of them add to it."""

    pictures: int = 0
    right: int = 0
    left: int = 0
    stopped: int = 0
    honoured: int = 0  # stops that ended the run within STOP_WITHIN
    busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **found: int) -> None:
        with self.lock:
            for name, value in found.items():
                setattr(self, name, getattr(self, name) + value)


def right_alone(model_dir: Path, count: int) -> list[Case]:
    """Captions whose pictures the oracle reads correctly when they are made without other clients."""
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    cases = sum(choose_cases(count // 2).values(), [])
    made = generate(pipe, cases, num_inference_steps=STEPS)
    return [case for case, picture in zip(cases, made, strict=True) if case.rights(read_picture(picture))["both"]]


def visit(address: str, number: int, until: float, cases: list[Case], folder: Path, tally: Tally) -> None:
    """One client: it requests a picture, then waits for it, stops it, or leaves; and requests the next."""
    rng = random.Random(number)
    client = Client(address, verbose=False, download_files=str(folder))
    while time.time() < until:
        case, what = rng.choice(cases), rng.random()
        arguments = {"prompt": case.caption, "negative_prompt": "", "seed": case.seed, "num_inference_steps": STEPS}
        job = client.submit(**arguments, api_name="/text_to_image")
        if what < 0.1:  # leaves without notice
            tally.add(left=1)
            client.close()
            client = Client(address, verbose=False, download_files=str(folder))
            continue
        try:
            if what < 0.2:
                while job.status().code in (Status.STARTING, Status.JOINING_QUEUE):
                    time.sleep(0.1)
                time.sleep(rng.uniform(0.5, 2))
                client.predict(api_name="/stop")
                asked = time.perf_counter()
                with contextlib.suppress(AppError):  # stopped before there was a picture
                    job.result(timeout=120)
                tally.add(stopped=1, honoured=int(time.perf_counter() - asked < STOP_WITHIN))
                continue
            picture, _ = job.result(timeout=120)
        except AppError as error:
            if "Too many are waiting" not in str(error):
                raise
            tally.add(busy=1)
            time.sleep(rng.uniform(0.5, 2))
            continue
        tally.add(pictures=1, right=int(case.rights(read_picture(Image.open(picture)))["both"]))


def clients(model_dir: Path, work: Path, seconds: float) -> list[Row]:
    """Many clients of one demo: each must get the picture that it requested, or be told that too many are waiting."""
    cases, tally = right_alone(model_dir, 60), Tally()
    with serving(model_dir, work) as (address, process), ThreadPoolExecutor(CLIENTS) as pool:
        until = time.time() + seconds
        visits = [pool.submit(visit, address, i, until, cases, work / f"client-{i}", tally) for i in range(CLIENTS)]
        time.sleep(min(90, seconds / 3))
        warm = process.memory_info().rss
        failed = [one for one in visits if one.exception(seconds + 200)]
        growth = process.memory_info().rss - warm
        last = time.perf_counter()
        alone = {"prompt": "a fox", "negative_prompt": "", "num_inference_steps": 2}
        Client(address, verbose=False).predict(**alone, api_name="/text_to_image")
        wait = time.perf_counter() - last
    for one in failed:
        print(f"a client failed: {one.exception()!r}")
    freed = tally.left if wait < 10 else 0
    rows = [
        ("clients that saw nothing unexpected", CLIENTS, CLIENTS - len(failed), f"{seconds / 60:.0f} minutes at once"),
        ("right pictures for them, read by the oracle", tally.pictures, tally.right, f"{tally.busy} told to come back"),
        ("stops, of running and of waiting pictures", tally.stopped, tally.honoured, f"within {STOP_WITHIN} s"),
        ("clients that left in mid-run", tally.left, freed, f"a picture after them in {wait:.1f} s"),
        ("memory of the demo level", 1, int(growth < MAX_GROWTH_OF_DEMO), f"{growth / 1e6:+.0f} MB after warm-up"),
    ]
    return [Row(*row) for row in rows]


def pictures(model_dir: Path, count: int) -> list[Row]:
    """Make hundreds of pictures in one process: memory, descriptors and threads must not grow."""
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
    growth, descriptors, threads = (now - then for now, then in zip(state(), before, strict=True))
    level = growth < MAX_GROWTH_OF_PROCESS and descriptors <= 0 and threads <= 0
    note = f"{growth / 1e6:+.0f} MB, {descriptors:+d} descriptors, {threads:+d} threads"
    return [Row("pictures in one process", count, made), Row("memory and descriptors level", 1, int(level), note)]


def bulk_kills(model_dir: Path, work: Path, count: int, rng: random.Random) -> Row:
    """Kill bulk generation at random moments: the same command must resume, and give what an undisturbed run gives."""
    prompts = work / "prompts.csv"
    with prompts.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], *[[f"a fox on a beach {i}"] for i in range(BULK_ROWS)]])

    def make(out: Path) -> list[str]:
        return command(
            "bulk", str(prompts), "--out", str(out), "--model-dir", str(model_dir), "--inference-precision", "f32"
        )

    def sums(out: Path) -> list[str]:
        """The hashes of all pictures, from their files; they must equal those in the manifest."""
        table = pq.read_table(out / "manifest.parquet").to_pylist()
        read = [hashlib.sha256((out / record["file"]).read_bytes()).hexdigest() for record in table]
        if read != [record["sha256"] for record in table]:
            raise ValueError(f"files in {out} are not those of the manifest")
        return read

    start = time.perf_counter()
    run(make(work / "whole"))
    seconds, expected, held = time.perf_counter() - start, sums(work / "whole"), 0

    def kill_one(out: Path) -> bool:
        killed(make(out), rng.uniform(0.1, 1.0) * seconds)
        kept = {part: part.read_bytes() for part in out.glob("manifest/*.parquet")}
        run(make(out))
        nothing_twice = all(part.read_bytes() == data for part, data in kept.items())
        return nothing_twice and sums(out) == expected and not list(out.rglob(".*"))

    for i in range(count):
        held += holds(functools.partial(kill_one, work / f"killed-{i}"))
    return Row("kill -9 of bulk, and the next run", count, held, f"{BULK_ROWS} pictures each, the same to the bit")


def older_processor(model_dir: Path, work: Path) -> Row:
    """The exact and the fast picture on an emulated Haswell (AVX2 without VNNI): they must be close to those here."""
    what = "exact and fast on an emulated Haswell"
    emulator = shutil.which("qemu-x86_64")
    if "avx512" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        return Row(what, 0, 0, "not tried: this processor is such a one itself")
    if emulator is None:
        return Row(what, 0, 0, "not tried: it needs qemu-x86_64, of Debian's qemu-user")
    found = {}

    def close() -> bool:
        run(command("quantize", str(model_dir)))
        for where, before in (("here", []), ("there", [emulator, "-cpu", "Haswell"])):
            (work / where).mkdir()
            run([*before, sys.executable, "-c", TWO_PICTURES, str(model_dir), str(work / where)])
        for name in CLOSE:
            pictures = [np.asarray(Image.open(work / where / f"{name}.png")) for where in ("here", "there")]
            found[name] = psnr_of_pictures(*pictures)
        return all(found[name] >= least for name, least in CLOSE.items())

    held = holds(close)
    note = ", ".join(f"{name} {value:.1f} dB (at least {CLOSE[name]})" for name, value in found.items())
    return Row(what, 1, int(held), f"from this processor's: {note}")


def fuzzers(length: int) -> list[Row]:
    """Run the fuzzing tests with many more examples."""
    note = f"tests, with {length} times the examples"
    return [tests(f"fuzzing: {Path(name).name}", [f"tests/{name}"], note, FUZZ_LENGTH=str(length)) for name in FUZZERS]


def at_length() -> list[Row]:
    """Run the tests that a plain run leaves out: killed actors and replicas, and the tutorial in JupyterLab."""
    return [tests("tests that take long", ["-m", "at_length"], "killed actors and replicas, JupyterLab's Run All")]


def tests(what: str, arguments: list[str], note: str, **environment: str) -> Row:
    """The result of a pytest run, as a row."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    passed, failed = (int((re.search(rf"(\d+) {word}", done.stdout) or [0, 0])[1]) for word in ("passed", "failed"))
    if not passed or failed:
        print(done.stdout + done.stderr)
    return Row(what, max(1, passed + failed), passed, note)


def full_disk(work: Path) -> Row:
    """Convert to a disk that is too small: the command must say so and leave nothing. Needs root to mount one."""
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
    parser.add_argument("--share", type=float, default=1.0, help="share of all tests to run; 0.1 is a quick check")
    options = parser.parse_args()

    def times(count: int) -> int:
        return max(1, round(count * options.share))

    rng, rows, started = random.Random(0), [], time.perf_counter()

    def tell(found: list[Row]) -> None:
        for row in found:
            print(f"{row.what}: {row.held} of {row.tried} held. {row.note}", flush=True)
            rows.append(row)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as beside:
        work = Path(folder)
        model_dir, another = work / "models" / "tiny-fp16", work / "killed" / "tiny-fp16"
        quantize = command("quantize", str(model_dir), "--mode", "int8-weights", "--prompts", "2")
        run(conversion(model_dir))
        fuzzed = beside.submit(fuzzers, times(10))  # one core; the killed processes use the other
        tell([kills(conversion(another), another, times(20), rng)])
        tell([kills(quantize, quantized_sibling(model_dir, "int8-weights"), times(10), rng)])
        tell([bulk_kills(model_dir, work, times(3), rng)])
        tell([full_disk(work)])
        tell(fuzzed.result())
        tell(clients(model_dir, work, 600 * options.share))
        tell(pictures(model_dir, times(500)))
        tell([older_processor(model_dir, work)])
        tell(at_length())
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
