"""The server under load: ``python -m benchmarks.load`` lets 32 clients request pictures of the embedded checkpoint.

Each client sends a request, waits for its picture, and sends the next; if too many requests are waiting (429), it tries
again after the time in Retry-After. For comparison, the pipeline is called directly, in batches as large as the
server's. Writes ``benchmarks/results/load.md``.
"""

import argparse
import random
import statistics
import subprocess
import sys
import threading
import time

import httpx

from benchmarks.report import machine_facts, table
from benchmarks.runs import RESULTS
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

PROMPT, STEPS, BATCH, PORT = "a fox in the snow", 20, 4, 18766
CLIENTS = 32


def directly(pipe: OVStableDiffusionPipeline, seconds: float) -> float:
    """Pictures per second of the pipeline without a server."""
    made, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        seeds = list(range(made, made + BATCH))
        made += len(pipe([PROMPT] * BATCH, seed=seeds, num_inference_steps=STEPS).images)
    return made / (time.perf_counter() - start)


def visit(number: int, until: float, found: list[tuple[int, float]]) -> None:
    """Run one client until its time is up."""
    rng = random.Random(number)
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=300) as client:
        while time.time() < until:
            body = {"prompt": PROMPT, "seed": rng.randrange(2**31), "num_inference_steps": STEPS}
            start = time.perf_counter()
            answer = client.post("/v1/images/generations", json=body)
            found.append((answer.status_code, time.perf_counter() - start))
            if answer.status_code == 429:
                time.sleep(float(answer.headers["Retry-After"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    model_dir = convert_checkpoint(EMBEDDED_CHECKPOINT).model_dir
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir)
    pipe.set_progress_bar_config(disable=True)
    directly(pipe, 2)
    direct = directly(pipe, min(60, options.seconds / 3))
    pipe.close()
    command = [sys.executable, "-m", "ov_decidiffusion", "serve", "--port", str(PORT), "--max-batch", str(BATCH)]
    server = subprocess.Popen([*command, "--max-waiting", str(CLIENTS // 2)], stdout=subprocess.DEVNULL)
    try:
        _wait(server)
        found: list[tuple[int, float]] = []
        start, until = time.time(), time.time() + options.seconds
        clients = [threading.Thread(target=visit, args=(number, until, found)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        spent = time.time() - start
    finally:
        server.terminate()
        server.wait(60)
    _report(found, spent, direct)


def _wait(server: subprocess.Popen) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            raise RuntimeError("the server did not start")
        try:
            httpx.get(f"http://127.0.0.1:{PORT}/health", timeout=5)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("the server did not answer within two minutes")


def _report(found: list[tuple[int, float]], spent: float, direct: float) -> None:
    seconds = sorted(spent_on for status, spent_on in found if status == 200)
    rate = len(seconds) / spent
    rows = [
        ["answered", str(len(seconds))],
        ["told to come back (429)", str(sum(status == 429 for status, _ in found))],
        ["anything else", str(sum(status not in (200, 429) for status, _ in found))],
        ["latency, median", f"{statistics.median(seconds):.2f} s"],
        ["latency, 95th percentile", f"{seconds[int(0.95 * len(seconds))]:.2f} s"],
        ["pictures a minute", f"{60 * rate:.0f}"],
        [f"the pipeline called directly, {BATCH} at a time", f"{60 * direct:.0f}"],
        ["share of it", f"{rate / direct:.2f}"],
    ]
    text = (
        f"{CLIENTS} clients for {spent:.0f} s on the embedded checkpoint, {STEPS} steps a picture. Measured by "
        f"`python -m benchmarks.load` on this machine:\n\n{machine_facts()}\n\n{table(['', ''], rows)}\n"
    )
    (RESULTS / "load.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
