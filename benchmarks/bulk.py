"""What bulk generation costs beside a plain loop: ``make bulk-benchmark``.

The same prompts of the embedded checkpoint, made by the pipeline called one prompt after the other, by ``bulk`` in one
process, by ``bulk`` on Ray with one actor and with two, and by OpenVINO GenAI called in a loop. Each row computes in
f32, which all of them agree on, in a process of its own. Writes ``benchmarks/results/bulk.md``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import machine_facts, table
from benchmarks.runs import RESULTS
from ov_decidiffusion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.convert import convert_checkpoint

PROMPTS = ["a fox in the snow", "an owl in a forest at night", "a whale under water", "a rocket on a beach at sunset"]
STEPS = 20
PLAIN = """
from ov_decidiffusion import OVStableDiffusionPipeline
pipe = OVStableDiffusionPipeline.from_pretrained(model_dir, inference_precision="f32")
pipe.set_progress_bar_config(disable=True)
def make(prompts):
    for i, prompt in enumerate(prompts):
        pipe(prompt, seed=i, num_inference_steps=steps).images[0].save(out / f"{i}.png")
"""
BULK = """
import sys
if not actors:
    sys.modules["ray"] = None
from ov_decidiffusion.bulk import generate
def make(prompts):
    rows = [{"prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
    generate(rows, model_dir, out / str(len(prompts)), actors=max(1, actors), inference_precision="f32",
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
make(prompts[:2])
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
}


def run(code: str, actors: int, model_dir: Path, count: int) -> dict[str, float]:
    """Seconds and bytes of one row, in a process of its own; starting is not counted, but for Ray, which has to."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    with tempfile.TemporaryDirectory() as out:
        head = (
            f"from pathlib import Path\nmodel_dir, out = {str(model_dir)!r}, Path({out!r})\n"
            f"prompts, steps, actors = {prompts!r}, {STEPS}, {actors}\n"
        )
        done = subprocess.run([sys.executable, "-c", head + code + TIMED], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.rsplit("FOUND", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400)
    options = parser.parse_args()
    model_dir = convert_checkpoint(EMBEDDED_CHECKPOINT).model_dir
    found = {name: run(code, actors, model_dir, options.pictures) for name, (code, actors) in ROWS.items()}
    plain = next(iter(found.values()))["seconds"]
    rows = [
        [
            name,
            f"{60 * options.pictures / one['seconds']:.0f}",
            f"{plain / one['seconds']:.2f}",
            f"{one['memory'] / 1e9:.1f} GB",
        ]
        for name, one in found.items()
    ]
    text = (
        f"{options.pictures} pictures of the embedded checkpoint at f32, {STEPS} steps each. The rows on Ray include "
        "starting the actors, each of which loads the models. Measured by `make bulk-benchmark` on this machine:\n\n"
        f"{machine_facts()}\n\n{table(['', 'pictures a minute', 'of the plain loop', 'peak memory'], rows)}\n"
    )
    (RESULTS / "bulk.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
