"""Where a picture's time goes, and what each saving removes: ``python -m benchmarks.waterfall``.

The full-size model makes one 512x512 picture with guidance: with other tools at their defaults and 30 steps, with this
project's preset "exact", and then with more and more savings down to the preset "fast". Every row is a process of its
own that makes a picture to warm up, and then the measured one. Results are written to ``benchmarks/results/``:
``waterfall.json``, ``.md``, ``.png``, or under the name that ``--name`` gives, for example for another processor.
"""

import argparse
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import openvino as ov

from benchmarks.report import decibels, difference, machine_facts, table
from benchmarks.runs import HERE, RESULTS, Bench, pictures_run, require_peers, run_python
from ov_decidiffusion.generation.presets import way_down
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.layout import QUANTIZATION_REPORT, quantized_sibling
from ov_decidiffusion.runtime.precision import choose_precision

CALIBRATION_PROMPTS = 4  # instead of eight, to save time
PEERS = {"Optimum Intel, its defaults": "optimum", "OpenVINO GenAI, its defaults": "genai"}
EXACT, EXACT_F32 = "exact", "exact, f32"
OURS = {EXACT_F32: {}, EXACT: {}} | way_down()  # each row adds to the one above it
FLOOR = "the floor: one step without guidance"
COLORS = {
    "unet": "#3182bd",
    "unet_top_level": "#9ecae1",
    "vae_decoder": "#fdae6b",
    "tiny_decoder": "#e6550d",
    "text_encoder": "#74c476",
}
PARTS = {
    "unet": "U-Net",
    "unet_top_level": "its top level",
    "vae_decoder": "decoder",
    "tiny_decoder": "tiny decoder",
    "text_encoder": "text encoder",
}


def all_runs() -> dict[str, dict]:
    """Every row's options, by its name; there is only one exact row if `auto` chooses f32."""
    auto_is_f32 = choose_precision(ov.Core(), "CPU")[0] == "f32"
    runs = {name: pictures_run(tool, "default", steps=30, warmup_steps=2) for name, tool in PEERS.items()}
    for name, arguments in OURS.items():
        if name == EXACT and auto_is_f32:
            continue
        arguments = dict(arguments)
        steps = arguments.pop("num_inference_steps", None if "preset" in arguments else 30)
        warmup = {"warmup_steps": 2} if steps == 30 else {}
        precision = "f32" if name == EXACT_F32 else "auto"
        runs[name] = pictures_run("ours", precision, steps=steps, name=name, arguments=arguments, **warmup)
    fast = {"preset": "fast", "cache_interval": 1}
    runs[FLOOR] = pictures_run("ours", "auto", steps=1, name=FLOOR, guidance_scale=1.0, arguments=fast)
    return runs


def prepare(bench: Bench, work: Path) -> None:
    """Make the model folder and its INT8 sibling, each in a process of its own, unless they exist."""
    if not bench.model_dir.exists():
        bench.prepare(work)
    if not (quantized_sibling(bench.model_dir) / QUANTIZATION_REPORT).is_file():
        shutil.rmtree(quantized_sibling(bench.model_dir), ignore_errors=True)
        prompts = ["--prompts", str(CALIBRATION_PROMPTS)]
        run_python(sys.executable, "-m", "ov_decidiffusion", "quantize", str(bench.model_dir), *prompts)


def rows_of(bench: Bench) -> dict[str, dict]:
    """The finished rows: their figures, by name."""
    done = {name: [other for other in bench.runs if other["run"] == run] for name, run in all_runs().items()}
    return {name: found[0] for name, found in done.items() if found}


def waterfall_table(rows: dict[str, dict], pictures: dict[str, Path]) -> str:
    """Seconds, ratios and closeness, a row for every finished run."""
    defaults = [rows[name]["end_to_end_s"] for name in PEERS if name in rows]
    lines = []
    for name, row in rows.items():
        whole, models = row["end_to_end_s"], row["models_s"]
        unet = models.get("unet", 0.0) + models.get("unet_top_level", 0.0)
        cells = ["", "", ""]  # other tools do not say
        if models:
            outside = 100 * (1 - sum(models.values()) / whole)
            decoder = models.get("vae_decoder", 0.0) + models.get("tiny_decoder", 0.0)
            cells = [f"{unet:.1f} s", f"{decoder:.1f} s", f"{outside:.2f} %"]
        ratio = f"{min(defaults) / whole:.1f}x" if defaults else ""
        compared = name in OURS and name != EXACT_F32
        close = decibels(difference(pictures[name], pictures[EXACT_F32])[0]) if compared else ""
        lines.append([name, f"{whole:.1f} s", ratio, *cells, f"{row['peak_memory_gb']:.1f} GB", close])
    header = ["", "a picture", "faster than the faster peer", "U-Net", "decoder", "outside the models", "peak memory"]
    return table([*header, "picture against exact, f32"], lines)


def int8_lines(bench: Bench, rows: dict[str, dict]) -> str:
    """How closely the INT8 models agree with the plain ones, and the time of a step with them."""
    report = read_json(quantized_sibling(bench.model_dir) / QUANTIZATION_REPORT)
    parts = [
        [part["name"], decibels(part["psnr"]), f"{part['plain_megabytes']:.0f} MB", f"{part['megabytes']:.0f} MB"]
        for part in report["parts"]
    ]
    text = table(["", "PSNR of INT8 against the plain model", "plain", "INT8"], parts)
    if {EXACT_F32, "INT8"} <= set(rows):
        f32, int8 = (rows[name]["step_s"] for name in (EXACT_F32, "INT8"))
        auto = f", auto {rows[EXACT]['step_s']:.2f} s" if EXACT in rows else ""
        text += f"\n\nA guided step: f32 {f32:.2f} s{auto}, INT8 {int8:.2f} s."
        text += f" INT8 is {f32 / int8:.2f} times as fast as f32."
    return text


def draw(rows: dict[str, dict]) -> plt.Figure:
    """Draw a bar for every row, made up of the seconds of each model."""
    figure, axis = plt.subplots(figsize=(9, 4.2))
    for position, row in zip(range(len(rows))[::-1], rows.values(), strict=True):
        left = 0.0
        for part, seconds in (row["models_s"] or {"": row["end_to_end_s"]}).items():
            axis.barh(position, seconds, left=left, color=COLORS.get(part, "#9e9e9e"))
            left += seconds
        axis.text(left, position, f" {row['end_to_end_s']:.1f} s", va="center", fontsize=9)
    axis.set_yticks(range(len(rows))[::-1], list(rows), fontsize=9)
    for part, label in PARTS.items():
        axis.barh(0, 0, color=COLORS[part], label=label)
    axis.legend(fontsize=9, loc="lower right")
    axis.set_xlabel("seconds for a 512x512 picture, models loaded and warm")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.1)
    figure.tight_layout()
    return figure


def write(bench: Bench) -> str:
    """Write the table and the chart beside the JSON file, and return the Markdown."""
    rows = rows_of(bench)
    pictures = {name: bench.picture(run) for name, run in all_runs().items()}
    text = (
        "DeciDiffusion 1.0 in its real configuration and size, with random weights; one run of each row, models "
        "loaded and warm, 512x512, guidance 7.5, 30 steps of DDIM where no number is named. Measured "
        f"by `make benchmark` on this machine:\n\n{machine_facts()}\n\n"
        f"{waterfall_table(rows, pictures)}\n\n{int8_lines(bench, rows)}\n"
    )
    bench.file.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(rows).savefig(bench.file.with_suffix(".png"), dpi=110)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="the folder for the full-size models; 7 GB")
    parser.add_argument("--name", default="waterfall", help="name of the result files; by default %(default)s")
    options = parser.parse_args()
    require_peers()
    bench = Bench(options.work, RESULTS / f"{options.name}.json", {})
    bench.load()
    prepare(bench, options.work)
    bench.do_all([(name, run, 0) for name, run in all_runs().items()])
    print(write(bench))


if __name__ == "__main__":
    main()
