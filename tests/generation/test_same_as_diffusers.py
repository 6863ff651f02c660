"""The same pictures as diffusers, systematically: tasks, solvers, seeds, prompts, sources, callbacks and sizes.

Where ours differ on purpose: several sources with several pictures each. diffusers repeats sources one after the other
(a b a b) and prompts each for itself (a a b b), so a picture would start from another prompt's source; here each
source stays with its prompt. Such calls are left out.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ov_decidiffusion.schedulers.registry import SOLVERS, make_solver

LENGTH = float(os.environ.get("FUZZ_LENGTH", "1"))
PROMPTS = ["a fox in the snow", "a rocket in space"]
CLOSE = 1.5 / 255  # 1/255, and the rounding of both
# The single-step solvers lay out their orders again for each number of steps, and squeezed schedules are ours alone.
COMPARED = sorted(set(SOLVERS) - {"squeezed"})


def source(colour: str) -> Image.Image:
    picture = Image.new("RGB", (128, 128), colour)
    ImageDraw.Draw(picture).ellipse([30, 20, 90, 100], fill="red")
    return picture


MASK = Image.new("L", (128, 128))
MASK.paste(255, (24, 32, 104, 120))
SIZES = [(128, 128), (96, 72), (72, 136), (136, 104)]  # (width, height): at all but the first, levels have odd sides
SOURCES = [source("skyblue"), source("darkgreen")]


@pytest.fixture(scope="module")
def theirs(diffusers_components, diffusers_text2img, diffusers_img2img) -> dict[str, Any]:
    inpaint = StableDiffusionInpaintPipeline(**diffusers_components)
    inpaint.set_progress_bar_config(disable=True)
    return {"text-to-image": diffusers_text2img, "image-to-image": diffusers_img2img, "inpainting": inpaint}


def generators(kind: str, pictures: int) -> Any:
    if kind == "one seed":
        return torch.Generator().manual_seed(5)
    return [torch.Generator().manual_seed(5 + i) for i in range(pictures)]


def nudge(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a callback may do: read the scheduler of the run, and change the latents by it."""
    share = float(pipe.scheduler.timesteps[index]) / 1000
    return {"latents": tensors["latents"] * (1 - 0.05 * share)}


def largest_difference(
    pipe: Any,
    theirs: dict,
    task: str,
    solver: str,
    prompts: int,
    times: int,
    seeds: str,
    callback: bool,
    size: tuple[int, int] = SIZES[0],
) -> float:
    pictures = prompts * times
    arguments: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "num_images_per_prompt": times}
    arguments |= {"output_type": "np"} | ({"callback_on_step_end": nudge} if callback else {})
    if task != "text-to-image":
        sources = [one.resize(size) for one in SOURCES]
        arguments |= {"image": sources[:prompts] if times == 1 else sources[0], "strength": 0.75}
    if task == "inpainting":
        mask = MASK.resize(size)
        arguments |= {"mask_image": [mask] * prompts if times == 1 else mask}
    sides = dict(zip(("width", "height"), size, strict=True))
    prompt = PROMPTS[:prompts]
    other = theirs[task]
    other.scheduler = make_solver(solver, pipe.scheduler)
    given = {} if task == "image-to-image" else sides  # there diffusers takes the source's size, and no other
    expected = other(prompt, generator=generators(seeds, pictures), **given, **arguments).images
    own = {"seed": [5 + i for i in range(pictures)]} if seeds == "list of seeds" else {}
    own = own or {"generator": generators(seeds, pictures)}
    made = pipe(prompt, solver=solver, guidance_rescale=0.0, **sides, **own, **arguments).images
    assert expected.std() > 0.03, "a flat picture proves nothing"
    return float(np.abs(made - expected).max())


@pytest.mark.parametrize("solver", ["euler a", "ddpm", "dpm++ 2m sde"])
@pytest.mark.parametrize("seeds", ["one seed", "list of generators"])
def test_several_pictures_of_one_inpainted_source_draw_their_noise_in_diffusers_order(pipe, theirs, solver, seeds):
    assert largest_difference(pipe, theirs, "inpainting", solver, 1, 2, seeds, False) <= CLOSE


@settings(
    max_examples=max(1, int(12 * LENGTH)),
    deadline=None,
    database=None,
    derandomize=LENGTH == 1,
    suppress_health_check=list(HealthCheck),
)
@given(
    task=st.sampled_from(["text-to-image", "image-to-image", "inpainting"]),
    solver=st.sampled_from(COMPARED),
    counts=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    seeds=st.sampled_from(["one seed", "list of seeds", "list of generators"]),
    callback=st.booleans(),
    size=st.sampled_from(SIZES),
)
def test_any_call_is_diffusers_own(pipe, theirs, task, solver, counts, seeds, callback, size):
    assert largest_difference(pipe, theirs, task, solver, *counts, seeds, callback, size) <= CLOSE


def test_with_nothing_to_repaint_the_source_stays_as_with_diffusers(pipe, theirs):
    black = Image.new("L", (128, 128))
    arguments = {"image": SOURCES[0], "mask_image": black, "num_inference_steps": 3, "output_type": "np"}
    theirs["inpainting"].scheduler = make_solver("ddim", pipe.scheduler)
    expected = theirs["inpainting"](PROMPTS[0], generator=generators("one seed", 1), height=128, width=128, **arguments)
    made = pipe(PROMPTS[0], solver="ddim", generator=generators("one seed", 1), guidance_rescale=0.0, **arguments)
    assert np.abs(made.images - expected.images).max() <= CLOSE
    assert np.abs(made.images - np.asarray(SOURCES[0]) / 255).mean() < 0.05


@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "inpainting"])
def test_sides_that_levels_cannot_halve_are_diffusers_own(pipe, theirs, task):
    for size in SIZES[1:]:
        assert largest_difference(pipe, theirs, task, "dpm++ 2m", 1, 1, "one seed", False, size) <= CLOSE
