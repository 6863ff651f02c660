"""What each saving costs in quality: ``make quality``.

The embedded checkpoint makes 960 pictures with every setting, with the same captions and seeds; half are captions that
training never saw. An oracle reads whether a picture shows what its caption says. Every picture is also compared with
the exact one of its seed, by PSNR and by a perceptual distance. Finished settings are saved, so that an interrupted run
can resume. Results are written to ``benchmarks/results/``: ``quality.json``, ``.md``, ``.png``, and a contact sheet.
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from benchmarks.report import machine_facts, psnr_of_pictures, table
from benchmarks.runs import HERE, RESULTS, machine
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.conversion.torch_modules import load_vae
from ov_decidiffusion.generation.presets import NOISY, PRESETS
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.quantize import quantize_models
from training.evaluate import BATCH, SINGLE, Case, choose_cases, generate
from training.oracle import read_picture

EXACT = "exact"
SETTINGS = {
    EXACT: {},
    "INT8 U-Net": {"quantized": ("unet",)},
    "INT8 decoder": {"quantized": ("vae_decoder",)},
    "tiny decoder": {"decoder": "tiny"},
    "caching, every 3rd step": {"cache_interval": 3},
    "caching by 3, denser at the start": {"cache_interval": 3, "cache_power": 1.5},
    f"guided at noise levels above {NOISY[0]}": {"guidance_interval": NOISY},
    "guidance computed every 2nd step": {"guidance_cache_interval": 2},
    "guidance computed once": {"guidance_cache_interval": 1000},
    "DPM-Solver++, 10 steps": {"solver": "dpm++", "num_inference_steps": 10},
    "DPM-Solver++, 6 steps": {"solver": "dpm++", "num_inference_steps": 6},
    "squeezed, 10 steps": {"solver": "squeezed", "num_inference_steps": 16},
    "preset balanced": {"preset": "balanced"},
    "preset fast": {"preset": "fast"},
}
PRESET_COLORS = {EXACT: "#000000", "preset balanced": "#e6550d", "preset fast": "#a50f15"}
ABOVE = {EXACT: 8, "preset balanced": -18, "preset fast": -32}  # points from a preset's mark to its name
SHOWN = 12  # number of columns of the contact sheet


class PerceptualDistance:
    """A perceptual distance of pictures, from the features of an autoencoder trained on such pictures.

    As in LPIPS (Zhang et al. 2018, arXiv 1801.03924), features of several depths are normalized to unit vectors at each
    position, and squared differences are averaged over positions and added up over depths. LPIPS takes the features
    from networks trained on photographs, which do not know these flat drawings and would have to be downloaded. Here
    they are the embedded VAE encoder's, one of each resolution. The distance of equal pictures is 0.
    """

    def __init__(self, encoder: nn.Module):
        self.encoder, self.features = encoder, []
        for block in encoder.down_blocks:
            block.register_forward_hook(lambda _module, _inputs, output: self.features.append(output))

    @torch.no_grad()
    def _look(self, pictures: list[np.ndarray]) -> list[torch.Tensor]:
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.features = []
        self.encoder(pixels)
        return [nn.functional.normalize(feature, dim=1) for feature in self.features]

    def __call__(self, pictures: list[np.ndarray], references: list[np.ndarray]) -> list[float]:
        """One distance for each pair of arrays [H, W, 3] of 0…255."""
        pairs = zip(self._look(pictures), self._look(references), strict=True)
        return sum((a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs).tolist()


def paired_change(rights: list[bool], base: list[bool]) -> tuple[float, float]:
    """The change in the percentage of right pictures for equal captions and seeds, in points, ± of a 95 % interval."""
    change = 100 * (np.array(rights, float) - np.array(base, float))
    return float(change.mean()), float(1.96 * change.std(ddof=1) / np.sqrt(len(change)))


def measure(
    pipe: OVStableDiffusionPipeline, cases: list[Case], settings: dict, exact: np.ndarray | None
) -> tuple[dict, np.ndarray]:
    """One setting's figures and its pictures [n, H, W, 3]."""
    generate(pipe, cases[:BATCH], **settings)  # compiles the models and packs their weights
    start = time.perf_counter()
    made = generate(pipe, cases, **settings)
    seconds = (time.perf_counter() - start) / len(cases)
    rights = [all(case.rights(read_picture(picture)).values()) for case, picture in zip(cases, made, strict=True)]
    pictures = np.stack([np.asarray(picture) for picture in made])
    hard = [right for case, right in zip(cases, rights, strict=True) if case.scene.size not in SINGLE]
    figures = {"seconds": seconds, "rights": _digits(rights), "rights_of_hard": _digits(hard)}
    if exact is not None:
        look = PerceptualDistance(load_vae(EMBEDDED_CHECKPOINT).encoder)
        pairs = list(zip(pictures, exact, strict=True))
        figures["psnr"] = float(np.median([min(99.0, psnr_of_pictures(*pair)) for pair in pairs]))
        distances = []
        for i in range(0, len(pairs), 16):
            distances += look(list(pictures[i : i + 16]), list(exact[i : i + 16]))
        figures["distance"] = float(np.mean(distances))
    return figures, pictures


def _digits(rights: list[bool]) -> str:
    return "".join(str(int(right)) for right in rights)


def _rights(figures: dict, of: str = "rights") -> list[bool]:
    """Which of a setting's pictures were right."""
    return [digit == "1" for digit in figures[of]]


def quality_table(found: dict[str, dict]) -> str:
    """A row for every setting."""
    rows = []
    for name, figures in found.items():
        cells = [name, f"{100 * np.mean(_rights(figures)):.1f} %"]
        if name == EXACT:
            cells += [""] * 4
        else:
            for of in ("rights", "rights_of_hard"):
                change, margin = paired_change(_rights(figures, of), _rights(found[EXACT], of))
                cells.append(f"{change:+.1f} ± {margin:.1f}")
            cells += [f"{figures['psnr']:.1f} dB", f"{figures['distance']:.3f}"]
        ratio = found[EXACT]["seconds"] / figures["seconds"]
        rows.append([*cells, f"{figures['seconds']:.3f} s", f"{ratio:.1f}x"])
    header = [
        "",
        "objects and place right",
        "change, points",
        "of small objects and pairs",
        "PSNR",
        "perceptual distance",
    ]
    return table([*header, "seconds a picture", "faster"], rows)


def draw(found: dict[str, dict]) -> plt.Figure:
    """Plot quality against time: prompt accuracy with its interval, and closeness to the exact picture."""
    base = _rights(found[EXACT])
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4))
    colors = iter(plt.get_cmap("tab20").colors)
    for name, figures in found.items():
        preset = "preset" in name or name == EXACT
        style = {"fmt": "D" if preset else "o", "color": PRESET_COLORS.get(name) or next(colors), "capsize": 2}
        style["markersize"] = 8 if preset else 5
        change, margin = paired_change(_rights(figures), base)
        points = [(axes[0], change, margin)]
        if name != EXACT:
            points.append((axes[1], figures["psnr"], None))
        for axis, height, margin in points:
            axis.errorbar(figures["seconds"], height, margin, label=None if preset else name, **style)
            if preset:
                place = {"xytext": (6, ABOVE[name]), "textcoords": "offset points"}
                axis.annotate(name, (figures["seconds"], height), **place, fontsize=9)
    axes[0].axhline(0, color="#bdbdbd", linewidth=0.8, zorder=0)
    axes[0].set_ylabel("change of prompt accuracy, points")
    axes[1].set_ylabel("closeness to the exact picture, dB")
    most = 1.3 * max(figures["seconds"] for figures in found.values())
    for axis in axes:
        axis.set(xlabel="seconds a picture", xlim=(0, most))
        axis.spines[["top", "right"]].set_visible(False)
    if len(found) > len(PRESET_COLORS):
        axes[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def contact_sheet(pictures: dict[str, np.ndarray], side: int = 96, label: int = 215) -> Image.Image:
    """A row for every setting, a column for every seed."""
    sheet = Image.new("RGB", (label + SHOWN * side, len(pictures) * side), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, (name, made) in enumerate(pictures.items()):
        pen.text((4, row * side + side // 2), name, "black", font, anchor="lm")
        for column, picture in enumerate(made[:: max(1, len(made) // SHOWN)][:SHOWN]):
            small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (label + column * side, row * side))
    return sheet


def write(found: dict[str, dict], pictures: dict[str, np.ndarray], count: int) -> str:
    """Write the table, the chart and the contact sheet; returns the table with its explanation."""
    text = (
        f"{count} pictures of the embedded checkpoint for every setting, the same captions and seeds, in batches; "
        "everything not named is as in `exact`. Change: against `exact`, with a paired 95 % interval, of all pictures "
        "and of those with a small object or two, which are the hardest. A checkpoint that errs nowhere can only lose. "
        "PSNR (median) and perceptual distance (mean): against the exact picture of the same seed; the distance is "
        "LPIPS' formula on "
        f"the embedded autoencoder's features. Measured by `make quality` on this machine:\n\n{machine_facts()}\n\n"
        f"{quality_table(found)}\n"
    )
    (RESULTS / "quality.md").write_text(text, encoding="utf-8")
    draw(found).savefig(RESULTS / "quality.png", dpi=110)
    contact_sheet(pictures).quantize(256).save(RESULTS / "quality-sheet.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=960)
    parser.add_argument("--work", type=Path, default=HERE / "work" / "quality", help="the folder for the pictures")
    options = parser.parse_args()
    model_dir = convert_checkpoint(EMBEDDED_CHECKPOINT).model_dir
    print(quantize_models(model_dir))
    pipe = OVStableDiffusionPipeline.from_pretrained(model_dir)
    pipe.set_progress_bar_config(disable=True)
    cases = sum(choose_cases(options.pictures // 2).values(), [])
    about = {"machine": machine(), "precision": pipe.inference_precision.split(",")[0], "pictures": len(cases)}
    about |= json.loads(json.dumps({"settings": SETTINGS, "presets": PRESETS}))
    file, found, pictures = RESULTS / "quality.json", {}, {}
    kept_before = json.loads(file.read_text()) if file.is_file() else {}
    if kept_before.get("about") == about:
        found = kept_before["found"]
    options.work.mkdir(parents=True, exist_ok=True)
    # First the exact pictures, which all others are compared with; then the presets, in case time runs out.
    for name in sorted(SETTINGS, key=lambda name: (name != EXACT, "preset" not in name)):
        kept = options.work / f"{name}.npz"
        if name not in found or not kept.is_file():
            print(name, flush=True)
            found[name], pictures[name] = measure(pipe, cases, SETTINGS[name], pictures.get(EXACT))
            np.savez_compressed(kept, pictures[name])
            file.write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
        else:
            pictures[name] = np.load(kept)["arr_0"]
        in_order = [name for name in SETTINGS if name in found]
        text = write({n: found[n] for n in in_order}, {n: pictures[n] for n in in_order if n in pictures}, len(cases))
    print(text)


if __name__ == "__main__":
    main()
