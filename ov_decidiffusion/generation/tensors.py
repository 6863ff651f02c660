"""Checks of tensors and generators that a call is given; ``arguments.py`` has the checks that need no torch."""

from typing import Any

import numpy as np
import torch

from ov_decidiffusion.arguments import check_whole, shown

MAX_GENERATOR_SEED = 2**64 - 1  # what torch.Generator takes


def check_embeds(name: str, embeds: Any, width: int, count: int | None = None) -> torch.Tensor:
    """Check hidden states [count, n, width] of a text encoder; a count of None allows any."""
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or embeds.shape[-1] != width or 0 in embeds.shape:
        found = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else shown(embeds)
        raise ValueError(
            f"`{name}` must be a tensor [prompts, tokens, {width}], as encode_prompt makes it, got {found}."
        )
    return check_latents(name, embeds, (count or len(embeds), *embeds.shape[1:]))


def check_latents(name: str, latents: Any, expected: tuple[int, ...]) -> torch.Tensor:
    """Check latents, a tensor or a numpy array, for their shape; returns a float32 tensor on the CPU."""
    if isinstance(latents, np.ndarray) and latents.dtype.kind in "fiu":
        latents = torch.from_numpy(latents.astype(np.float32))
    if not isinstance(latents, torch.Tensor) or latents.is_complex():
        raise ValueError(f"`{name}` must be a tensor or an array of numbers {expected}, got {shown(latents)}.")
    if tuple(latents.shape) != tuple(expected):
        raise ValueError(f"`{name}` must have the shape {tuple(expected)}, got {tuple(latents.shape)}.")
    latents = latents.detach().cpu().float()
    if not torch.isfinite(latents).all():
        raise ValueError(f"`{name}` must hold numbers only, but has NaN or infinity in it.")
    return latents


def check_batch(name: str, values: Any, channels: int, factor: int = 1) -> torch.Tensor:
    """Check latents or pixels [b, channels, h, w] of any number and size; returns what ``check_latents`` does.

    Args:
        factor: both sides must be multiples of it.
    """
    shape: tuple[int, ...] = tuple(getattr(values, "shape", ()))
    if len(shape) != 4 or shape[1] != channels or 0 in shape or any(side % factor for side in shape[2:]):
        sides = f"sides being multiples of {factor}, " if factor > 1 else ""
        raise ValueError(
            f"`{name}` must be a tensor [b, {channels}, h, w], {sides}got {shape if shape else shown(values)}."
        )
    return check_latents(name, values, shape)


def make_generator(
    generator: torch.Generator | list[torch.Generator] | None, seed: int | list[int] | None, pictures: int
) -> torch.Generator | list[torch.Generator] | None:
    """One generator for the batch, or a list with one per picture; torch's global seed stays untouched."""
    if seed is not None:
        if generator is not None:
            raise ValueError("Give `seed` or `generator`, not both.")
        generator = _seeded(seed)
    if isinstance(generator, (list, tuple)):
        if len(generator) != pictures:
            raise ValueError(
                f"`{'generator' if seed is None else 'seed'}` is a list and needs one for each of the {pictures} "
                f"pictures, got {len(generator)}."
            )
        generator = list(generator)
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator) and not (one is None and generator is None):
            raise ValueError(
                f"`generator` must be a torch.Generator or a list of them, got {shown(one)}; whole numbers are `seed`s."
            )
    return generator


def _seeded(seed: Any) -> torch.Generator | list[torch.Generator]:
    """A generator for a seed, or a list of generators for a list or an array of seeds; numpy integers are accepted."""
    several = isinstance(seed, (list, tuple)) or (isinstance(seed, np.ndarray) and seed.ndim > 0)
    seed = seed if several or not isinstance(seed, np.ndarray) else seed[()]
    seeds = [check_whole("seed", value, 0, MAX_GENERATOR_SEED) for value in (seed if several else [seed])]
    made = [torch.Generator().manual_seed(value) for value in seeds]
    return made if several else made[0]


def unseeded_generator() -> torch.Generator:
    """The generator for a call without a seed or generator: right after ``torch.manual_seed`` torch's, as in diffusers.

    Otherwise a new generator, seeded by a number from torch's, so that the seed is known.
    """
    own = torch.default_generator
    if torch.equal(torch.Generator().manual_seed(own.initial_seed()).get_state(), own.get_state()):
        return own
    return torch.Generator().manual_seed(int(torch.randint(2**32, ())))
