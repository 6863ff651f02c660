"""Where the time of a cold start goes: ``python -m benchmarks.cold``.

The full-size model's first picture, 512x512 with guidance, is made in a process of its own, as on a command line: with
the preset "exact", with other tools, and with the faster presets; and so is the embedded checkpoint's. Runs take turns,
ours next to the other tools'. Results are written to ``benchmarks/results/``: ``cold.json`` and ``cold.md``.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.report import machine_facts, table
from benchmarks.runs import HERE, RESULTS, Bench, pictures_run, require_peers
from benchmarks.waterfall import prepare
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.generation.presets import PRESETS

TURNS = 5
OURS, GENAI = "this project, exact", "OpenVINO GenAI, its defaults"
RUNS = {
    OURS: pictures_run("ours", "auto", name="cold", cold_only=True),
    GENAI: pictures_run("genai", "default", name="cold genai", cold_only=True),
    "Optimum Intel, its defaults": pictures_run("optimum", "default", name="cold optimum", cold_only=True),
    "this project, exact, INT8 models beside": pictures_run(
        "ours", "auto", name="cold beside", cold_only=True, arguments={"preset": "exact"}
    ),
    f"this project, balanced, {PRESETS['balanced']['num_inference_steps']} steps": pictures_run(
        "ours", "auto", steps=None, name="cold balanced", cold_only=True, arguments={"preset": "balanced"}
    ),
    f"this project, fast, {PRESETS['fast']['num_inference_steps']} steps": pictures_run(
        "ours", "auto", steps=None, name="cold fast", cold_only=True, arguments={"preset": "fast"}
    ),
    "the embedded checkpoint, 128x128": pictures_run(
        "ours", "auto", side=128, name="cold embedded", cold_only=True, embedded=True
    ),
}
PIECES = {"import_s": "imports", "load_s": "models loaded", "unet_begins_s": "first step begins"}
REST = {"step_s": "a step, after the first", "decode_s": "after the last step", "peak_memory_gb": "peak memory"}


def cold_table(bench: Bench) -> str:
    """A row for each run: when each stage was done, and the times of the rest; medians."""
    rows = []
    for name, run in RUNS.items():
        cells = []
        for figure in (*PIECES, "first_picture_s", *REST):
            value = bench.median(figure, run)
            unit = "GB" if figure.endswith("gb") else "s"
            cells.append("" if value is None else f"{value:.1f} {unit}" if unit == "GB" else f"{value:.2f} s")
        rows.append([name, *cells])
    return table(["", *PIECES.values(), "picture made", *REST.values()], rows)


def pairs_line(bench: Bench) -> str:
    """The time of our first picture as a share of OpenVINO GenAI's, turn by turn."""
    turns = {
        name: {other["turn"]: other["first_picture_s"] for other in bench.runs if other["run"] == RUNS[name]}
        for name in (OURS, GENAI)
    }
    ratios = [turns[OURS][turn] / turns[GENAI][turn] for turn in turns[OURS] if turn in turns[GENAI]]
    return (
        f"Of {len(ratios)} pairs, our exact first picture took {statistics.median(ratios):.2f} of OpenVINO GenAI's "
        f"time in the median ({min(ratios):.2f} to {max(ratios):.2f})."
    )


def write(bench: Bench) -> str:
    """Write the table beside the JSON file, and return the Markdown."""
    text = (
        "DeciDiffusion 1.0 in its real configuration and size, with random weights: the first picture of a process, "
        "512x512, guidance 7.5, 5 steps of DDIM where no number is named, without OpenVINO's model cache; medians of "
        f"{TURNS} runs. The first four columns of seconds count from the start of the process. Measured by "
        f"`make benchmark` on this machine:\n\n{machine_facts()}\n\n{cold_table(bench)}\n\n{pairs_line(bench)}\n"
    )
    bench.file.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="the folder for the full-size models; 7 GB")
    options = parser.parse_args()
    require_peers()
    bench = Bench(options.work, RESULTS / "cold.json", {})
    bench.load()
    prepare(bench, options.work)
    convert_checkpoint(EMBEDDED_CHECKPOINT)
    bench.do_all([(name, run, turn) for turn in range(TURNS) for name, run in RUNS.items()])
    print(write(bench))


if __name__ == "__main__":
    main()
