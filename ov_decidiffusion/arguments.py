"""What a call of the pipeline may be given: every refusal names the argument, its value and what is allowed.

All functions raise ValueError.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ov_decidiffusion.images import to_rgb


def check_prompts(prompt: str | list[str]) -> list[str]:
    """The prompts as a list."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` must be a string or a list of strings, got {prompt!r}.")
    return list(prompts)


def check_negative_prompts(negative_prompt: str | list[str] | None, count: int) -> list[str]:
    """One negative prompt for each of ``count`` prompts; empty ones where there is none."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    negatives = check_prompts(negative_prompt)
    if len(negatives) != count:
        raise ValueError(f"`negative_prompt` has {len(negatives)} entries, but `prompt` has {count}.")
    return negatives


def check_images(image: Image.Image | list[Image.Image], prompts: int) -> list[Image.Image]:
    """One source picture, or one for each prompt, in RGB."""
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(images) not in (1, prompts):
        raise ValueError(f"`image` must be one picture or one for each of the {prompts} prompts, got {len(images)}.")
    return [to_rgb(one) for one in images]


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def check_range(name: str, value: Any, low: float, high: float | None) -> None:
    """Refuse what is no number from ``low`` to ``high``; None: without an upper end."""
    allowed = f"a number of at least {low}" if high is None else f"a number from {low} to {high}"
    number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not number or not value >= low or (high is not None and value > high):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def check_guidance_interval(interval: Any) -> None:
    """Refuse what is neither None nor two noise levels in order."""
    if interval is None:
        return
    if not isinstance(interval, (list, tuple)) or len(interval) != 2:
        raise ValueError(f"`guidance_interval` must be (low, high), two noise levels, or None, got {interval!r}.")
    check_range("guidance_interval[0]", interval[0], 0, None)
    check_range("guidance_interval[1]", interval[1], interval[0], None)


def make_generator(
    generator: torch.Generator | list[torch.Generator] | None, seed: int | list[int] | None, pictures: int
) -> torch.Generator | list[torch.Generator] | None:
    """One generator for the batch, or a list of one a picture; no global seed is touched."""
    if seed is not None:
        if generator is not None:
            raise ValueError("Give `seed` or `generator`, not both.")
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed]
        for value in seeds:
            check_whole("seed", value, 0)
        made = [torch.Generator().manual_seed(int(value)) for value in seeds]
        generator = made if isinstance(seed, (list, tuple)) else made[0]
    if isinstance(generator, (list, tuple)) and len(generator) != pictures:
        raise ValueError(
            f"A list of seeds or generators needs one for each of the {pictures} pictures, got {len(generator)}."
        )
    return list(generator) if isinstance(generator, tuple) else generator
