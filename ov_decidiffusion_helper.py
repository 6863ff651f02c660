"""What the notebook imports: the library's public names, and what only a notebook needs."""

import json
import os
import time
from collections.abc import Sequence

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import openvino as ov
import torch
from diffusers import UNet2DConditionModel
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ov_decidiffusion.checkpoint import EMBEDDED_CHECKPOINT, KNOWN_CHECKPOINTS, CheckpointError
from ov_decidiffusion.convert import ConversionReport, convert_checkpoint
from ov_decidiffusion.demo import make_demo
from ov_decidiffusion.download import find_checkpoint
from ov_decidiffusion.folder import default_model_dir
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.presets import way_down
from ov_decidiffusion.quantize import quantize_models
from ov_decidiffusion.schedulers import SOLVERS, SQUEEZE_MODES
from ov_decidiffusion.unet_nas import V1_UNET_CONFIG, FlexibleUNet2DConditionModel

__all__ = [
    "EMBEDDED_CHECKPOINT",
    "KNOWN_CHECKPOINTS",
    "CheckpointError",
    "ConversionReport",
    "FlexibleUNet2DConditionModel",
    "OVStableDiffusionPipeline",
    "checkpoint_dropdown",
    "chosen_checkpoint",
    "compare_unets",
    "convert_checkpoint",
    "default_model_dir",
    "device_dropdown",
    "draw_unets",
    "find_checkpoint",
    "make_demo",
    "picture_grid",
    "quantize_models",
    "steps_against_quality",
    "walk_down",
]

COLORS = {"R": "#9ecae1", "T": "#fdae6b"}


def checkpoint_dropdown() -> widgets.Combobox:
    """Choose a checkpoint by name, or type any folder or hub id.

    ``DECIDIFFUSION_CHECKPOINT`` sets what is chosen at first; without it, the embedded one.
    """
    return widgets.Combobox(
        value=os.environ.get("DECIDIFFUSION_CHECKPOINT") or next(iter(KNOWN_CHECKPOINTS)),
        options=list(KNOWN_CHECKPOINTS),
        ensure_option=False,
        description="Checkpoint:",
        layout=widgets.Layout(width="420px"),
    )


def chosen_checkpoint(dropdown: widgets.Combobox) -> str:
    """The folder or hub id behind what the dropdown shows."""
    return KNOWN_CHECKPOINTS.get(dropdown.value, dropdown.value)


def device_dropdown() -> widgets.Dropdown:
    """Choose among the devices that OpenVINO finds on this machine, and AUTO."""
    devices = [*ov.Core().available_devices, "AUTO"]
    return widgets.Dropdown(value=devices[0], options=devices, description="Device:")


def picture_grid(
    pictures: Sequence[Image.Image], titles: Sequence[str] = (), columns: int | None = None, side: int = 160
) -> Image.Image:
    """Pictures side by side, each in a cell of side x side pixels with its title above.

    Args:
        pictures: of any size; each is scaled to fit its cell.
        titles: one a picture, or none at all. Long ones are broken into lines.
        columns: pictures in a row; all in one row if None.

    Returns:
        a picture with a palette of 256 colours.
    """
    if titles and len(titles) != len(pictures):
        raise ValueError(f"`titles` has {len(titles)} entries, but there are {len(pictures)} pictures.")
    font = ImageFont.load_default(12)
    wrapped = [_wrap(title, font, side - 4) for title in titles]
    header = 8 + 15 * max((text.count("\n") + 1 for text in wrapped), default=0) if titles else 0
    columns = columns or len(pictures)
    rows = -(-len(pictures) // columns)
    gap = 6
    grid = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + header + gap) - gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, picture in enumerate(pictures):
        x, y = i % columns * (side + gap), i // columns * (side + header + gap)
        scale = side / max(picture.size)
        size = tuple(max(1, round(edge * scale)) for edge in picture.size)
        sharp = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS
        grid.paste(picture.convert("RGB").resize(size, sharp), (x + (side - size[0]) // 2, y + header))
        if titles:
            draw.multiline_text((x + 2, y + header - 4), wrapped[i], "black", font, anchor="ld", spacing=3)
    # A palette keeps the notebook small; of an RGB picture, Jupyter would store a PNG and a JPEG.
    return grid.quantize(256)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def steps_against_quality(
    pipe: OVStableDiffusionPipeline, prompts: Sequence[str], steps: Sequence[int] = (4, 6, 8, 10, 14, 20), seed: int = 0
) -> Figure:
    """Chart how close pictures of few steps come to those of very many, solver by solver.

    All solvers follow the same path from the same noise, so with enough steps they end in the same picture: the
    reference is DPM-Solver++'s after 60. The pipeline keeps its scheduler.

    Args:
        prompts: the picture of each counts alike.
        steps: numbers of steps to try; squeezed schedules have theirs.
        seed: of the first picture; the others count on.
    """
    kept, config = pipe.scheduler, pipe.scheduler.config
    settings = {"seed": [seed + i for i in range(len(prompts))], "output_type": "np"}
    solvers = {"DDIM": SOLVERS["ddim"], "DPM-Solver++": SOLVERS["dpm++ 2m"]}
    squeezed_solver, squeezed_options = SOLVERS["squeezed"]
    for mode in SQUEEZE_MODES:
        solvers[f"squeezed {mode}"] = (squeezed_solver, squeezed_options | {"squeeze_mode": mode})
    figure, axis = plt.subplots(figsize=(7, 3.2))
    try:
        reference = pipe(list(prompts), num_inference_steps=60, solver="dpm++", **settings).images
        for name, (solver, options) in solvers.items():
            pipe.scheduler = solver.from_config(config, **options)
            squeezed = "squeeze_mode" in options
            counts = [SQUEEZE_MODES[options["squeeze_mode"]][0]] if squeezed else list(steps)
            asked = [16] if squeezed else counts  # what DeciDiffusion 2.0's makers lay out before squeezing
            errors = [pipe(list(prompts), num_inference_steps=n, **settings).images - reference for n in asked]
            decibels = [-10 * np.log10(np.mean(np.square(error))) for error in errors]
            axis.plot(counts, decibels, "D" if squeezed else "o-", label=name)
    finally:
        pipe.scheduler = kept
    axis.set_xlabel("steps that run")
    axis.set_ylabel("closeness, dB")
    axis.legend(fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def walk_down(pipe: OVStableDiffusionPipeline, prompt: str, seed: int = 0) -> Image.Image:
    """The same prompt and seed with one trick after the other, down to the preset "fast"; seconds in the titles.

    Every picture is made twice and the second is timed, so that no row pays for compiling.
    """
    pictures, titles = [], []
    for name, arguments in ({"exact": {}} | way_down()).items():
        pipe(prompt, seed=seed, **arguments)
        start = time.perf_counter()
        pictures.append(pipe(prompt, seed=seed, **arguments).images[0])
        titles.append(f"{name}: {time.perf_counter() - start:.2f} s")
    return picture_grid(pictures, titles)


def compare_unets() -> dict[str, nn.Module]:
    """U-Net-NAS 1.0 and Stable Diffusion 1.5's U-Net from their configurations, as shapes without weights."""
    with torch.device("meta"):
        nas = FlexibleUNet2DConditionModel.from_config(json.loads(V1_UNET_CONFIG.read_text()))
        plain = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return {"Stable Diffusion 1.5": plain, "DeciDiffusion 1.0 (U-Net-NAS)": nas}


def draw_unets(unets: dict[str, nn.Module]) -> Figure:
    """Draw the blocks of U-Nets, level by level, with the parameters of each level."""
    figure, axes = plt.subplots(1, len(unets), figsize=(6.4 * len(unets), 4.4), squeeze=False)
    for axis, (name, unet) in zip(axes[0], unets.items(), strict=True):
        _draw_unet(axis, name, unet)
    figure.text(0.5, 0.01, "R: residual block    T: transformer (attention to the text)", ha="center", fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def _draw_unet(axis: plt.Axes, name: str, unet: nn.Module) -> None:
    side, total = unet.config["sample_size"], _millions(unet)
    down, up = list(unet.down_blocks), list(reversed(unet.up_blocks))
    for level, (going_down, going_up) in enumerate(zip(down, up, strict=True)):
        share = _millions(going_down) + _millions(going_up)
        _draw_block(axis, 0.0, -level, going_down)
        _draw_block(axis, 2.0, -level, going_up)
        axis.text(-0.12, -level, f"{side >> level}x{side >> level}", ha="right", va="center", fontsize=9)
        axis.text(3.1, -level, f"{share:.0f} M", ha="left", va="center", fontsize=9)
    halved = getattr(down[-1], "downsamplers", None) is not None
    deepest = side >> (len(down) - 1 + halved)
    _draw_block(axis, 1.0, -len(down), unet.mid_block)
    axis.text(-0.12, -len(down), f"{deepest}x{deepest}", ha="right", va="center", fontsize=9)
    axis.text(3.1, -len(down), f"{_millions(unet.mid_block):.0f} M", ha="left", va="center", fontsize=9)
    axis.set_title(f"{name}: {total:.0f} M parameters", fontsize=11)
    for x, label in ((0.5, "down"), (1.5, "middle"), (2.5, "up")):
        axis.text(x, 0.55, label, ha="center", fontsize=9, color="gray")
    axis.set_xlim(-0.75, 3.7)
    axis.set_ylim(-4.5, 0.8)
    axis.axis("off")


def _draw_block(axis: plt.Axes, x: float, y: float, block: nn.Module) -> None:
    layers = _layers(block)
    width = 0.98 / max(6, len(layers))
    for i, kind in enumerate(layers):
        left = x + 0.5 + (i - len(layers) / 2) * width
        shape = "round,pad=0,rounding_size=0.02"
        axis.add_patch(FancyBboxPatch((left, y - 0.26), width * 0.86, 0.52, shape, fc=COLORS[kind], ec="none"))
        axis.text(left + width * 0.43, y, kind, ha="center", va="center", fontsize=8)


def _layers(block: nn.Module) -> list[str]:
    """Kinds of a block's layers in the order in which they run, R or T."""
    if hasattr(block, "modules_list"):
        return ["R" if hasattr(module, "conv1") else "T" for module in block.modules_list]
    attentions = list(getattr(block, "attentions", []))
    layers = []
    for i in range(len(block.resnets)):
        layers += ["R"] + (["T"] if i < len(attentions) else [])
    return layers


def _millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
