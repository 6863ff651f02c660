"""The benchmark's figures as Markdown tables and a chart."""

import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from benchmarks.runs import CACHES, GROWTH, RIVALS, THIRTY_STEPS, Bench, loading_run, machine, pictures_run, unet_run

NAMES = {
    "ours": "this project",
    "diffusers": "diffusers, PyTorch",
    "optimum": "Optimum Intel",
    "genai": "OpenVINO GenAI",
}
UNETS = {"nas": "U-Net-NAS (DeciDiffusion 1.0)", "sd15": "U-Net of Stable Diffusion 1.5"}
FIGURES = {
    "step_s": "a step",
    "end_to_end_s": "a picture, 5 steps",
    "first_picture_s": "first picture from a cold start",
}


def psnr_of_pictures(picture: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of arrays of 0…255, peak 255; infinity if both are equal."""
    mean = np.square(picture.astype(np.float64) - reference).mean()
    return 10 * math.log10(255**2 / mean) if mean else math.inf


def difference(picture: Path, reference: Path) -> tuple[float, int]:
    """PSNR in dB (peak 255) and the largest pixel difference of two pictures of the same size."""
    a, b = (np.asarray(Image.open(file).convert("RGB"), np.int64) for file in (picture, reference))
    return psnr_of_pictures(a, b), int(np.abs(a - b).max())


def compare_pictures(bench: Bench) -> dict[tuple[str, str], tuple[float, int]]:
    """The difference of every tool's picture from that of diffusers, in the comparison runs."""
    reference = bench.picture(pictures_run("diffusers", "f32"))
    found = {}
    for tool, precision in RIVALS:
        picture = bench.picture(pictures_run(tool, precision))
        if tool != "diffusers" and picture.exists() and reference.exists():
            found[tool, precision] = difference(picture, reference)
    return found


def write(bench: Bench, precision: str, folder: Path) -> str:
    """Write ``compare.md`` and ``compare.png`` and return the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "DeciDiffusion 1.0 in its real configuration and size, with random weights: they cost what real ones cost, and "
        f"their pictures are noise. Measured by `make benchmark` on this machine:\n\n{machine_facts()}\n"
        f"- precision that `auto` chose: {precision}\n- Optimum Intel's environment: {_peer_versions(bench)}",
        "### Beside its peers\n\n512x512, guidance 7.5, the same converted folder, seed and scheduler (DDIM). "
        "Medians of runs in processes of their own (smallest to largest); in brackets, the time as a multiple of "
        "ours.\n\n" + rivals_table(bench),
        "### Thirty steps\n\n" + thirty_table(bench),
        "### The U-Net alone\n\nOne run, batch 2, latents of a 512x512 picture; the machine's rate is the better of "
        "PyTorch's and OpenVINO's product of two 4096x4096 matrices in the same process.\n\n"
        + unet_table(bench, precision),
        "### How cost grows\n\n" + growth_table(bench),
        "### Fidelity\n\nThe converted models against PyTorch at f32, as the conversion with `verify=True` found "
        "them; and the 512x512 picture after 5 steps against that of diffusers in PyTorch at f32.\n\n"
        + fidelity_tables(bench),
        "### Conversion and loading\n\n" + conversion_table(bench) + "\n\n"
        "Imports left out, without INT8 models beside.\n\n" + loading_table(bench),
    ]
    text = "\n\n".join(parts) + "\n"
    (folder / "compare.md").write_text(text, encoding="utf-8")
    draw(bench).savefig(folder / "compare.png", dpi=110)
    return text


def machine_facts() -> str:
    """What the figures depend on, as a Markdown list."""
    return "\n".join(f"- {name}: {value}" for name, value in machine().items())


def _peer_versions(bench: Bench) -> str:
    found = next((run["versions"] for run in bench.runs if run["run"]["tool"] == "optimum"), {})
    return ", ".join(f"{name} {value}" for name, value in found.items()) or "not run"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decibels(value: float) -> str:
    """An agreement as text for a table."""
    return "equal" if value == math.inf else f"{value:.1f} dB"


def _name(tool: str, precision: str) -> str:
    settings = {"auto": "auto", "default": "its defaults"}.get(precision, precision)
    if tool in ("optimum", "genai") and precision != "default":
        settings += ", all cores"
    return NAMES[tool] if tool == "diffusers" else f"{NAMES[tool]}, {settings}"


def _cell(bench: Bench, figure: str, run: dict, base: dict) -> str:
    values = bench.values(figure, run)
    if not values:
        return "not run"
    middle, ours = statistics.median(values), bench.median(figure, base)
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{middle:.2f} s{spread}" + (f" [{middle / ours:.2f}x]" if ours else "")


def rivals_table(bench: Bench) -> str:
    base = pictures_run(*RIVALS[0])
    rows = []
    for rival in RIVALS:
        run = pictures_run(*rival)
        memory = bench.median("peak_memory_gb", run)
        cells = [_cell(bench, figure, run, base) for figure in FIGURES]
        rows.append([_name(*rival), *cells, "not run" if memory is None else f"{memory:.1f} GB"])
    return table(["", *FIGURES.values(), "peak memory"], rows)


def thirty_table(bench: Bench) -> str:
    base = THIRTY_STEPS[RIVALS[0]]
    rows = [[_name(*rival), _cell(bench, "first_picture_s", run, base)] for rival, run in THIRTY_STEPS.items()]
    return table(["", "one picture of 30 steps, from a cold start"], rows)


def unet_table(bench: Bench, precision: str) -> str:
    rows = []
    for wanted in dict.fromkeys(("f32", precision)):
        for unet, name in UNETS.items():
            run = unet_run(unet, wanted)
            seconds, rate = bench.median("step_s", run), bench.median("machine_gflops", run)
            if seconds is None:
                continue
            achieved = bench.gigaflops[unet] / seconds
            share = f"{bench.median('share', run):.2f}"
            rows.append(
                [
                    name,
                    wanted,
                    f"{seconds:.2f} s",
                    f"{bench.gigaflops[unet]:.0f}",
                    f"{achieved:.0f}",
                    f"{rate:.0f}",
                    share,
                ]
            )
    header = ["", "precision", "seconds", "GFLOP", "GFLOP/s", "machine's GFLOP/s", "share of it"]
    return table(header, rows)


def growth_table(bench: Bench) -> str:
    base = GROWTH["512x512"]
    rows = []
    for name, run in GROWTH.items():
        memory = bench.median("peak_memory_gb", run)
        rows.append([name, _cell(bench, "step_s", run, base), "not run" if memory is None else f"{memory:.1f} GB"])
    return table(["", "a step", "peak memory"], rows)


def fidelity_tables(bench: Bench) -> str:
    models = [[part["name"], decibels(part["psnr"])] for part in bench.conversions["verified"]["parts"]]
    pictures = [
        [_name(*rival), decibels(psnr), f"{largest}/255"] for rival, (psnr, largest) in compare_pictures(bench).items()
    ]
    return (
        table(["model", "PSNR against PyTorch f32"], models)
        + "\n\n"
        + table(["picture", "PSNR against diffusers", "largest difference of a pixel"], pictures)
    )


def conversion_table(bench: Bench) -> str:
    rows = [
        [name, f"{measured['seconds']:.0f} s", f"{measured['peak_memory_gb']:.2f} GB"]
        for name, measured in (
            ("verify=False", bench.conversions["plain"]),
            ("verify=True", bench.conversions["verified"]),
        )
    ]
    return table(["2 GB of fp16 weights", "time", "peak memory"], rows)


def loading_table(bench: Bench) -> str:
    """The time of ``from_pretrained`` with OpenVINO's model cache, which is off by default, and the cache's size."""
    rows = []
    for cache in CACHES:
        seconds, size = (bench.values(figure, loading_run(cache)) for figure in ("load_s", "cache_gb"))
        if not seconds:
            continue
        again = f"{statistics.median(seconds[1:]):.1f} s" if seconds[1:] else "not run"
        rows.append([cache, f"{seconds[0]:.1f} s", again, f"{max(size):.1f} GB"])
    return table(["OpenVINO's model cache", "`from_pretrained`, the first time", "from then on", "on disk"], rows)


def draw(bench: Bench) -> plt.Figure:
    """Draw bars that show where a picture's time goes, tool by tool."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    rivals = [rival for rival in RIVALS if bench.values("end_to_end_s", pictures_run(*rival))][::-1]
    for position, rival in enumerate(rivals):
        run = pictures_run(*rival)
        whole, decode = bench.median("end_to_end_s", run), bench.median("decode_s", run)
        color = "#3182bd" if rival[0] == "ours" else "#9e9e9e"
        axis.barh(position, whole - decode, color=color)
        axis.barh(position, decode, left=whole - decode, color=color, alpha=0.45)
        axis.text(whole, position, f" {whole:.1f} s", va="center", fontsize=9)
    axis.set_yticks(range(len(rivals)), [_name(*rival) for rival in rivals], fontsize=9)
    axis.set_xlabel("seconds for a 512x512 picture of 5 steps; paler: after the last step, the decoder")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.12)
    figure.tight_layout()
    return figure
