"""What bulk generation costs compared with a plain loop: ``make bulk-benchmark``.

The embedded checkpoint makes pictures of the same prompts: with the pipeline called for one prompt after the other,
with ``bulk`` in one process, with ``bulk`` on Ray with one actor and with two, and with OpenVINO GenAI and Optimum
Intel called in a loop. Each row computes in f32, which all of them support, in a process of its own. On Ray, the time
to start is found from another run with few pictures. The overhead of a chunk is measured with rows that are refused.
Writes ``benchmarks/results/bulk.md``; with ``--model-dir``, for a full-size model for example, ``bulk-`` and that
folder's name.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import machine_facts, table
from benchmarks.runs import PEERS_PYTHON, RESULTS, require_peers
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.layout import config_file

PROMPTS = ["a fox in the snow", "an owl in a forest at night", "a whale under water", "a rocket on a beach at sunset"]
CHUNKS = (100, 1100)
FEW = 8
PLAIN = """
from ov_decidiffusion import OVStableDiffusionPipeline
pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
pipe.set_progress_bar_config(disable=True)
def make(prompts):
    for i, prompt in enumerate(prompts):
        pipe(prompt, seed=i, num_inference_steps=steps).images[0].save(out / f"{i}.png")
"""
BULK = """
import tempfile
from ov_decidiffusion.bulk.generate import generate
def make(prompts):
    rows = [{"prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
    generate(rows, model_dir, tempfile.mkdtemp(dir=out), actors=actors or None, inference_precision="f32",
             num_inference_steps=steps)
"""
GENAI = """
import openvino_genai
from PIL import Image
pipe = openvino_genai.Text2ImagePipeline(model_dir, "CPU", INFERENCE_PRECISION_HINT="f32")
def make(prompts):
    for i, prompt in enumerate(prompts):
        picture = pipe.generate(prompt, num_inference_steps=steps, rng_seed=i).data[0]
        Image.fromarray(picture).save(out / f"{i}.png")
"""
OPTIMUM = """
import torch
from optimum.intel import OVStableDiffusionPipeline
pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
pipe.set_progress_bar_config(disable=True)
def make(prompts):
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(i)
        picture = pipe(prompt, num_inference_steps=steps, height=side, width=side, generator=generator).images[0]
        picture.save(out / f"{i}.png")
"""
REFUSED = BULK.replace('{"prompt": prompt, "seed": i}', '{"prompt": None}')  # each row is a chunk without a picture
TIMED = """
import json, os, threading, time, psutil
from pathlib import Path
def peak():
    me = psutil.Process()
    while True:
        total = sum(p.memory_info().rss for p in [me, *me.children(recursive=True)] if p.is_running())
        most[0] = max(most[0], total)
        time.sleep(0.2)
most = [0]
threading.Thread(target=peak, daemon=True).start()
if not actors:  # what starts Ray again each time has nothing to warm up
    make(prompts[:1])
start = time.perf_counter()
make(prompts)
print("FOUND", json.dumps({"seconds": time.perf_counter() - start, "memory": most[0]}))
os._exit(0)
"""
ROWS = {
    "the pipeline, a prompt at a time": (PLAIN, 0),
    "bulk in one process": (BULK, 0),
    "bulk on Ray, one actor": (BULK, 1),
    "bulk on Ray, two actors": (BULK, 2),
    "OpenVINO GenAI, a prompt at a time": (GENAI, 0),
    "Optimum Intel, a prompt at a time": (OPTIMUM, 0),
}


def run(code: str, actors: int, model_dir: Path, count: int, steps: int) -> dict[str, float]:
    """Seconds and bytes of one row, in a process of its own; the time to start is counted for Ray only."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    side = read_json(config_file(model_dir, "unet"))["sample_size"] * 8
    with tempfile.TemporaryDirectory() as out:
        head = (
            f"from pathlib import Path\nmodel_dir, out = {str(model_dir)!r}, Path({out!r})\n"
            f"prompts, steps, actors, side = {prompts!r}, {steps}, {actors}, {side}\n"
        )
        python = str(PEERS_PYTHON) if code is OPTIMUM else sys.executable
        done = subprocess.run([python, "-c", head + code + TIMED], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.rsplit("FOUND", 1)[1])


def measure(code: str, actors: int, model_dir: Path, count: int, steps: int) -> dict[str, float]:
    """The figures of a row, with the seconds before its first picture begins, and those for each further picture."""
    found = run(code, actors, model_dir, count, steps)
    each = found["seconds"] / count
    if actors:  # without Ray, everything is warm already
        few = min(FEW * actors, count // 2)
        each = (found["seconds"] - run(code, actors, model_dir, few, steps)["seconds"]) / (count - few)
    return found | {"each": each, "start": found["seconds"] - each * count}


def around_a_chunk(model_dir: Path, actors: int) -> float:
    """Milliseconds of overhead per chunk, besides its pictures: to look it up, distribute, record and read it."""
    few, many = (run(REFUSED, actors, model_dir, count, 1)["seconds"] for count in CHUNKS)
    return 1000 * (many - few) / (CHUNKS[1] - CHUNKS[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model-dir", type=Path)
    options = parser.parse_args()
    require_peers()
    model_dir = options.model_dir or convert_checkpoint(EMBEDDED_CHECKPOINT).model_dir
    found = {}
    for name, (code, actors) in ROWS.items():
        found[name] = measure(code, actors, model_dir, options.pictures, options.steps)
        print(f"{name}: {found[name]['seconds']:.1f} s", flush=True)
    plain = next(iter(found.values()))["seconds"]
    rows = [
        [
            name,
            f"{60 * options.pictures / one['seconds']:.{0 if options.model_dir is None else 2}f}",
            f"{plain / one['seconds']:.2f}",
            f"{one['start']:.0f} s",
            f"{plain / options.pictures / one['each']:.2f}",
            f"{one['memory'] / 1e9:.1f} GB",
        ]
        for name, one in found.items()
    ]
    columns = ["", "pictures a minute", "of the plain loop", "start", "of the plain loop once started", "peak memory"]
    text = (
        f"{options.pictures} pictures of {model_dir.name} at f32, {options.steps} steps each. To start is to start "
        "Ray and the actors, each of which loads the models; pictures a minute include it. Measured by `python -m "
        f"benchmarks.bulk` on this machine:\n\n{machine_facts()}\n\n{table(columns, rows)}\n"
    )
    if options.model_dir is None:
        costs = [f"{around_a_chunk(model_dir, actors):.1f} ms {how}" for actors, how in ((0, "alone"), (1, "on Ray"))]
        text += f"\nA chunk costs, besides its pictures, {' and '.join(costs)}.\n"
    name = "bulk.md" if options.model_dir is None else f"bulk-{model_dir.name}.md"
    (RESULTS / name).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
