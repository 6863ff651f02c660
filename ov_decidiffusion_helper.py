"""What the notebook imports: names from the library, and functions that draw and show."""

import ov_decidiffusion  # noqa: F401  # before OpenVINO, whose usage statistics it switches off

# isort: split

import functools
import io
import json
import os
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import openvino as ov
import torch
from diffusers import UNet2DConditionModel
from IPython import display
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.rcsetup import cycler
from PIL import Image
from torch import nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from ov_decidiffusion.analysis.pictures import picture_grid, save_film
from ov_decidiffusion.analysis.profiling import level_times
from ov_decidiffusion.analysis.studies import Timed, closeness_by_steps, guidance_map, timed_in_turn, walk_down
from ov_decidiffusion.analysis.word_maps import word_effects, word_maps
from ov_decidiffusion.conversion import torch_modules
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT, KNOWN_CHECKPOINTS
from ov_decidiffusion.conversion.convert import convert_checkpoint
from ov_decidiffusion.conversion.hub import find_checkpoint
from ov_decidiffusion.conversion.reports import ConversionReport
from ov_decidiffusion.conversion.unet_nas import V1_UNET_CONFIG, FlexibleUNet2DConditionModel
from ov_decidiffusion.demo.app import make_demo
from ov_decidiffusion.errors import CheckpointError, NotEnoughMemory
from ov_decidiffusion.generation.plan import noise_levels
from ov_decidiffusion.model_folder.layout import default_model_dir
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.quantize import quantize_models
from ov_decidiffusion.schedulers.registry import make_solver
from training.oracle import read_picture
from training.scenes import example_picture

__all__ = [
    "EMBEDDED_CHECKPOINT",
    "KNOWN_CHECKPOINTS",
    "CheckpointError",
    "ConversionReport",
    "FlexibleUNet2DConditionModel",
    "NotEnoughMemory",
    "OVStableDiffusionPipeline",
    "bar",
    "channels",
    "check",
    "checkpoint_dropdown",
    "chosen_checkpoint",
    "closeness",
    "closeness_by_steps",
    "compare_unets",
    "convert_checkpoint",
    "default_model_dir",
    "device_dropdown",
    "difference",
    "draw_closeness",
    "draw_levels",
    "draw_overview",
    "draw_schedule",
    "draw_seconds",
    "draw_table",
    "draw_unets",
    "example_picture",
    "film",
    "find_checkpoint",
    "grade",
    "guidance_map",
    "heat",
    "level_times",
    "load_text_encoder",
    "make_demo",
    "make_solver",
    "noise_levels",
    "picture_grid",
    "quantize_models",
    "read_picture",
    "show",
    "timed_in_turn",
    "walk_down",
    "word_effects",
    "word_maps",
]

# Okabe and Ito's colours, which colour-blind readers can tell apart; charts are on white, also on dark pages.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#767676"
COLORS = {"R": SKY, "T": ORANGE}
PARTS = {
    "text_encoder": PURPLE,
    "unet": BLUE,
    "unet_top_level": SKY,
    "vae_decoder": ORANGE,
    "tiny_decoder": RED,
    "elsewhere": GREY,
}
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "font.size": 10,
    "legend.frameon": False,
}


class _Dropdown(widgets.Dropdown):
    """A dropdown whose plain text says what is chosen, for pages that show no widgets."""

    def __repr__(self) -> str:
        return f"{self.description} {self.value}"


@functools.cache  # always the same dropdown, so that running all cells again keeps the choice
def checkpoint_dropdown(name: str = "") -> widgets.Dropdown:
    """A dropdown to choose a checkpoint by name.

    Args:
        name: the initial choice, which is added to the list: a folder or a hub id. If empty, the environment variable
            ``DECIDIFFUSION_CHECKPOINT`` decides; without it, the embedded checkpoint is chosen.
    """
    wanted = name or os.environ.get("DECIDIFFUSION_CHECKPOINT") or next(iter(KNOWN_CHECKPOINTS))
    return _Dropdown(
        value=wanted,
        options=list(dict.fromkeys([*KNOWN_CHECKPOINTS, wanted])),
        description="Checkpoint:",
        layout=widgets.Layout(width="420px"),
    )


def chosen_checkpoint(dropdown: widgets.Dropdown) -> str:
    """The folder or hub id of the checkpoint that the dropdown shows."""
    name = str(dropdown.value)
    return KNOWN_CHECKPOINTS.get(name, name)


def device_dropdown(name: str = "") -> widgets.Dropdown:
    """A dropdown to choose among the devices that OpenVINO finds on this machine, and AUTO.

    Args:
        name: the initial choice; empty for the first device.

    Raises:
        ValueError: there is no such device.
    """
    devices = [*ov.Core().available_devices, "AUTO"]
    if name and name not in devices:
        raise ValueError(f"`device_name` must be one of {', '.join(devices)}, got {name!r}.")
    return _Dropdown(value=name or devices[0], options=devices, description="Device:")


def load_text_encoder(checkpoint: str) -> CLIPTextModel:
    """CLIP's text encoder as a PyTorch module: token ids [b, 77] to embeddings [b, 77, d].

    Also hides the warnings that tracing it would cause: about shape checks that only refuse wrong shapes, and about
    deprecated attributes, since the trace touches all attributes.

    Args:
        checkpoint: a folder or a hub id.
    """
    warnings.simplefilter("ignore", torch.jit.TracerWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return torch_modules.load_text_encoder(find_checkpoint(checkpoint))


def show(picture: Image.Image | Figure, alt: str) -> None:
    """Show a picture or a chart, with alternative text for readers who cannot see it."""
    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=100)
        plt.close(picture)
        picture = Image.open(buffer).convert("RGB").quantize(64)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    display.display(display.Image(buffer.getvalue(), alt=alt))


@overload
def bar(items: Collection[Any], what: str, total: int | None = None) -> Iterator[Any]: ...
@overload
def bar(items: Iterable[Any], what: str, total: int) -> Iterator[Any]: ...
def bar(items: Any, what: str, total: int | None = None) -> Iterator[Any]:
    """Yield items, and show a line that counts them and, at the end, says how long they took."""
    total = len(items) if total is None else total
    start, line = time.perf_counter(), display.display(display.Pretty(f"{what} …"), display_id=True)
    assert line is not None  # ``display_id`` asks for it
    for count, item in enumerate(items):
        line.update(display.Pretty(f"{what}: {count} of {total}"))
        yield item
    line.update(display.Pretty(f"{what}: {total} in {time.perf_counter() - start:.1f} s"))


def check(right: bool, otherwise: str, answer: Any = "") -> None:
    """Print whether an exercise is solved, or a hint; while the answer is None, ask for one."""
    print("Write your answer into the cell." if answer is None else "Right." if right else f"Not yet: {otherwise}")


def grade(picture: Image.Image, thing: str, place: str, otherwise: str = "") -> None:
    """Let the oracle read a picture of the embedded checkpoint, and print whether it shows one thing in a place.

    Args:
        picture: the picture.
        thing, place: what it should show, and where.
        otherwise: what else is not right yet; "" if nothing.
    """
    reading = read_picture(picture)
    seen = " and ".join(reading.objects) + ("" if reading.clear else " (not clearly)")
    right = reading.clear and thing in reading.objects and reading.place == place and not otherwise
    told = f"Not yet: {otherwise} And the" if otherwise else f"{'Right' if right else 'Not yet'}: the"
    print(f"{told} oracle reads {seen} {reading.place}.")


def difference(picture: Image.Image, reference: Image.Image, times: float = 8) -> Image.Image:
    """The absolute difference of two pictures, multiplied by ``times``; black where they are equal."""
    apart = np.abs(np.asarray(picture.convert("RGB"), float) - np.asarray(reference.convert("RGB"), float))
    return Image.fromarray(np.clip(times * apart, 0, 255).astype(np.uint8))


def closeness(picture: Image.Image, reference: Image.Image) -> str:
    """How close two pictures are, in decibels: 20 more means a tenth of the root mean squared difference."""
    apart = np.asarray(picture.convert("RGB"), float) - np.asarray(reference.convert("RGB"), float)
    return f"{20 * np.log10(255 / max(1e-3, np.sqrt(np.mean(apart**2)))):.0f} dB"


def channels(latents: torch.Tensor) -> list[Image.Image]:
    """Each channel of one picture's latents [1, c, h, w] in grey, from its darkest to its lightest value."""
    grey = latents[0] - latents[0].amin(dim=(1, 2), keepdim=True)
    grey = 255 * grey / grey.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    return [Image.fromarray(channel.byte().numpy()) for channel in grey]


def heat(values: np.ndarray, under: Image.Image | None = None, most: float | None = None) -> Image.Image:
    """A map [h, w] in colours from dark to bright, blended with a picture if one is given.

    Args:
        values: the map.
        under: the picture, or None.
        most: the value shown brightest; by default the largest.
    """
    shares = np.clip(values / max(1e-12, values.max() if most is None else most), 0, 1)
    colored = Image.fromarray((255 * matplotlib.colormaps["inferno"](shares)[..., :3]).astype(np.uint8))
    if under is None:
        return colored
    return Image.blend(under.convert("L").convert("RGB"), colored.resize(under.size, Image.Resampling.BICUBIC), 0.6)


def film(frames: Sequence[Image.Image], file: Path, alt: str) -> None:
    """Write frames with ``save_film``, and show the film.

    Args:
        frames: the pictures.
        file: the GIF file to write.
        alt: what the film shows, for readers who cannot see it.
    """
    save_film(frames, file)
    display.display(display.Image(file.read_bytes(), format="gif", alt=alt))


def draw_overview(pipe: OVStableDiffusionPipeline, steps: int) -> Figure:
    """Draw the way from a prompt and noise to a picture: the parts, and the shapes of what they pass on."""
    width, side = pipe.models.unet_config["cross_attention_dim"], pipe.default_size[0] // pipe.vae_scale_factor
    latents = f"{pipe.latent_channels} x {side} x {side}"
    boxes = {  # label: left, bottom, width, colour
        "text encoder": (1.6, 1.5, 1.5, PURPLE),
        "U-Net": (4.4, 0.75, 1.6, BLUE),
        "decoder": (7.8, 0.75, 1.3, ORANGE),
    }
    arrows = [  # from, to, what goes there
        ((0.9, 1.85), (1.6, 1.85), ""),
        ((3.1, 1.85), (4.4, 1.25), f"vectors\n77 x {width}"),
        ((0.9, 0.5), (4.4, 0.95), f"noise\n{latents}"),
        ((6.0, 1.1), (7.8, 1.1), f"clean latents\n{latents}"),
        ((9.1, 1.1), (9.8, 1.1), ""),
    ]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9.5, 2.6))
        for label, (left, bottom, wide, color) in boxes.items():
            axis.add_patch(FancyBboxPatch((left, bottom), wide, 0.7, "round,pad=0,rounding_size=0.08", fc=color))
            axis.text(left + wide / 2, bottom + 0.35, label, ha="center", va="center", color="white", weight="bold")
        for start, end, label in arrows:
            axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.5})
            axis.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.2, label, ha="center", fontsize=8)
        axis.annotate("", (4.6, 0.7), (5.8, 0.7), arrowprops={"arrowstyle": "-|>", "connectionstyle": "arc3,rad=-0.7"})
        axis.text(5.2, 0.02, f"{steps} times: a little less noise", ha="center", fontsize=9)
        axis.text(0.85, 1.85, "prompt", ha="right", va="center")
        axis.text(0.85, 0.5, "seed", ha="right", va="center")
        axis.text(9.85, 1.1, "picture", va="center")
        axis.set(xlim=(0, 10.7), ylim=(-0.2, 2.4))
        axis.axis("off")
        figure.tight_layout()
    return figure


def draw_schedule(pipe: OVStableDiffusionPipeline, num_inference_steps: int) -> Figure:
    """Plot a schedule's share of signal and its noise level, with the steps of a run marked."""
    pipe.scheduler.set_timesteps(num_inference_steps)
    every = torch.arange(pipe.scheduler.config.num_train_timesteps)
    marked = pipe.scheduler.timesteps.long()
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
        left.plot(every, pipe.scheduler.alphas_cumprod)
        left.plot(marked, pipe.scheduler.alphas_cumprod[marked], "o", color=RED, markersize=4)
        left.set(xlabel="timestep", ylabel="alpha-bar: share of signal")
        right.semilogy(every, noise_levels(pipe.scheduler, every))
        right.semilogy(marked, noise_levels(pipe.scheduler, marked), "o", color=RED, markersize=4)
        right.set(xlabel="timestep", ylabel="sigma: noise per signal")
        figure.tight_layout()
    return figure


def draw_levels(times: dict[str, float]) -> Figure:
    """Draw the milliseconds of each block as bars, in the order in which the blocks run."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 2.8))
        bars = axis.barh(list(times), list(times.values()), color=BLUE)
        axis.bar_label(bars, fmt=" %.1f ms", fontsize=9)
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds of one run")
        figure.tight_layout()
    return figure


def draw_table(names: Sequence[str], values: np.ndarray) -> Figure:
    """Draw a square table of numbers from -1 to 1 as colours, with the numbers in it."""
    side = 0.62 * len(names) + 1.2
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(side, side))
        axis.imshow(values, cmap="viridis", vmin=min(0.0, values.min()), vmax=1)
        for (row, column), value in np.ndenumerate(values):
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=_on(value))
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.spines[:].set_visible(False)
        figure.tight_layout()
    return figure


def _on(value: float) -> str:
    return "black" if value > 0.6 else "white"


def draw_closeness(found: Sequence[tuple[str, int, float]]) -> Figure:
    """Plot how close few steps come, with a line for each solver, and diamonds for the squeezed schedules."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 3.2))
        for name in dict.fromkeys(name for name, _, _ in found):
            steps, decibels = zip(*[(steps, value) for other, steps, value in found if other == name], strict=True)
            axis.plot(steps, decibels, "D" if name == "squeezed" else "o-", label=name)
        axis.set(xlabel="steps that run", ylabel="closeness, dB")
        axis.legend(fontsize=9)
        figure.tight_layout()
    return figure


def draw_seconds(rows: Sequence[Timed]) -> Figure:
    """Draw where the seconds of each row went, as bars."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 0.45 * len(rows) + 1))
        for i, row in enumerate(rows):
            spent = row.models | {"elsewhere": max(0.0, row.seconds - sum(row.models.values()))}
            left = 0.0
            for part, color in PARTS.items():
                label = part.replace("_", " ") if i == 0 or part == "unet_top_level" else None
                known = label in axis.get_legend_handles_labels()[1]
                axis.barh(i, spent.get(part, 0), left=left, color=color, label=None if known else label)
                left += spent.get(part, 0)
            axis.text(left, i, f" {row.seconds:.2f} s", va="center")
        axis.set_yticks(range(len(rows)), [row.name for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel("seconds a picture")
        axis.legend(fontsize=8, loc="lower right")
        figure.tight_layout()
    return figure


def compare_unets() -> dict[str, UNet2DConditionModel]:
    """DeciDiffusion 1.0's U-Net-NAS and Stable Diffusion 1.5's U-Net, built from configurations without weights."""
    with torch.device("meta"):
        nas = FlexibleUNet2DConditionModel.from_config(json.loads(V1_UNET_CONFIG.read_text()))
        assert isinstance(nas, FlexibleUNet2DConditionModel)  # it is a pair only if unused settings are requested
        plain = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return {"Stable Diffusion 1.5": plain, "DeciDiffusion 1.0 (U-Net-NAS)": nas}


def draw_unets(unets: dict[str, UNet2DConditionModel]) -> Figure:
    """Draw the blocks of U-Nets, level by level, with the parameters of each level."""
    figure, axes = plt.subplots(1, len(unets), figsize=(6.4 * len(unets), 4.4), squeeze=False)
    for axis, (name, unet) in zip(axes[0], unets.items(), strict=True):
        _draw_unet(axis, name, unet)
    figure.text(
        0.5,
        0.01,
        "R: residual block    T: transformer (attention: to itself, then to the text)",
        ha="center",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def _draw_unet(axis: plt.Axes, name: str, unet: UNet2DConditionModel) -> None:
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


def _layers(block: Any) -> list[str]:
    """The kinds of layers of a block, diffusers' or ours, R or T, in the order in which they run."""
    if hasattr(block, "modules_list"):
        return ["R" if hasattr(module, "conv1") else "T" for module in block.modules_list]
    attentions = list(getattr(block, "attentions", []))
    layers = []
    for i in range(len(block.resnets)):
        layers += ["R"] + (["T"] if i < len(attentions) else [])
    return layers


def _millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
