"""The plan of a denoising run: what happens at each step, derived from a configuration."""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ov_decidiffusion.arguments import check_decoder, check_quantized
from ov_decidiffusion.generation.config import GenerationConfig, ResolvedConfig
from ov_decidiffusion.model_folder.layout import QUANTIZABLE
from ov_decidiffusion.runtime.models import Models
from ov_decidiffusion.schedulers.registry import Scheduler, make_solver, solver_name


@dataclass(frozen=True)
class Plan:
    """What one run does at each of its steps."""

    config: ResolvedConfig  # a call with it gives the same plan; presets and defaults are written out
    scheduler: Scheduler  # this run's own copy
    timesteps: torch.Tensor
    guided: list[bool]  # for each step: guidance acts, if its scale is above 1
    full_steps: list[bool]  # for each step: the full U-Net runs, not only its top level
    quantized: frozenset[str]  # parts that run in INT8
    generator: torch.Generator | list[torch.Generator]


def make_plan(
    config: GenerationConfig,
    scheduler: Scheduler,
    defaults: Mapping[str, Any],
    models: Models,
    strength: float | None,
    generator: torch.Generator | list[torch.Generator],
) -> Plan:
    """Check every value of a call's configuration, and plan what its run does at each step.

    Args:
        config: the call's configuration.
        scheduler: the pipeline's; the run gets a copy, so that several loops can run in turn.
        defaults: the checkpoint's own values.
        models: the folder's models. A preset leaves out INT8 where it is not faster, and the tiny decoder if there is
            none. INT8 models that would be faster must exist, and so must everything that the caller named.
        strength: for image-to-image and inpainting; None for text-to-image.
        generator: the source of the noise.

    Raises:
        ValueError: an argument has a wrong value.
    """
    resolved = config.resolved(defaults, scheduler.config.num_train_timesteps)
    solver = None if resolved.solver is None else solver_name(resolved.solver)
    own = copy.deepcopy(scheduler) if solver is None else make_solver(solver, scheduler)
    timesteps = set_timesteps(own, strength, resolved.num_inference_steps, resolved.timesteps, resolved.sigmas)
    interval = resolved.guidance_interval
    if config.guidance_interval is None and not _tells_noise_levels(own):
        interval = None  # a preset leaves out what the requested solver cannot do
    guided = guided_steps(own, timesteps, interval)
    parts, decoder = _parts_to_run(config, resolved, models)  # last, since it may have to measure
    return Plan(
        config=resolved.with_values(
            solver=solver, guidance_interval=interval, quantized=sorted(parts) or False, decoder=decoder
        ),
        scheduler=own,
        timesteps=timesteps,
        guided=guided,
        full_steps=full_steps(len(timesteps), resolved.cache_interval, resolved.cache_power),
        quantized=parts,
        generator=generator,
    )


def _parts_to_run(asked: GenerationConfig, resolved: ResolvedConfig, models: Models) -> tuple[frozenset[str], str]:
    """The parts to run in INT8, and the decoder. A preset's choice is dropped where it gains nothing or the model is
    missing; the caller's own choice is kept, or refused."""
    quantized, decoder = resolved.quantized, resolved.decoder
    if asked.quantized is None and quantized and not models.int8_pays:
        quantized = False
    if asked.decoder is None and not models.has_tiny_decoder:
        decoder = "whole"
    parts = check_quantized(quantized, models.quantized_parts, QUANTIZABLE)
    return parts, check_decoder(decoder, models.has_tiny_decoder)


def full_steps(total: int, interval: int, power: float = 1.0) -> list[bool]:
    """Which of ``total`` steps run the full U-Net: the first, the last, and as many between as are needed.

    The last step is a full one because it shows in the picture: a run that ends on reused features is worse than a
    shorter one that does not. Of n full steps after the first, number j = 1, 2, … comes at
    (total - 1) * (j / n) ** power. With a power of 1 they are evenly spread and at most ``interval`` apart. With a
    larger one, the same number lie closer together at the start (the paper's "non-uniform" schedule is a power law as
    well).
    """
    last = total - 1
    count = math.ceil(last / interval)
    full = [0]
    for j in range(1, count + 1):
        position = math.floor(last * (j / count) ** power + 0.5)
        full.append(max(position, full[-1] + 1))
    return [index in set(full) for index in range(total)]


def guided_steps(
    scheduler: Scheduler, timesteps: torch.Tensor, guidance_interval: tuple[float, float] | None
) -> list[bool]:
    """Which steps guidance acts on: those whose noise level lies in the interval, or all without an interval."""
    if guidance_interval is None:
        return [True] * len(timesteps)
    if not _tells_noise_levels(scheduler):
        raise ValueError(
            f"`guidance_interval` cannot be used with {type(scheduler).__name__}, which does not expose its noise "
            "levels, or combines several of them in one step."
        )
    low, high = guidance_interval
    return [low <= sigma <= high for sigma in noise_levels(scheduler, timesteps)]


def _tells_noise_levels(scheduler: Scheduler) -> bool:
    return hasattr(scheduler, "alphas_cumprod") and type(scheduler).__name__ != "PNDMScheduler"


def noise_levels(scheduler: Scheduler, timesteps: torch.Tensor) -> np.ndarray:
    """sigma = sqrt((1 - abar) / abar) of a schedule at timesteps, interpolated logarithmically between whole ones."""
    abar = scheduler.alphas_cumprod.double().numpy().clip(1e-12, 1 - 1e-12)
    sigmas = np.log((1 - abar) / abar) / 2
    return np.exp(np.interp(timesteps.double().numpy(), np.arange(len(abar)), sigmas))


def set_timesteps(
    scheduler: Scheduler,
    strength: float | None,
    num_inference_steps: int | None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> torch.Tensor:
    """Set a scheduler's timesteps, by their number, as a list, or by noise levels; return those that run.

    In image-to-image, ``strength`` leaves out the first ones.
    """
    if timesteps is not None or sigmas is not None:
        name, given = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"`{name}` cannot be given to {type(scheduler).__name__}, which computes its own.")
        scheduler.set_timesteps(**{name: given})
        if not len(scheduler.timesteps):
            raise ValueError(f"`{name}` of {given} leave {type(scheduler).__name__} no step to run: give more.")
    else:
        try:
            scheduler.set_timesteps(num_inference_steps)
        except ValueError as error:
            raise ValueError(
                f"`num_inference_steps` {num_inference_steps} is too few for {type(scheduler).__name__}: {error}"
            ) from error
    if strength is None:
        return scheduler.timesteps
    steps = scheduler.num_inference_steps or len(scheduler.timesteps)
    running = min(int(steps * strength), steps)
    if running < 1:
        raise ValueError(
            f"`strength` {strength} of {steps} steps leaves no step to run: use at least "
            f"{math.ceil(1000 / steps) / 1000}, or take more steps."
        )
    begin = (steps - running) * scheduler.order
    set_begin_index = getattr(scheduler, "set_begin_index", None)  # some schedulers lack it
    if set_begin_index is not None:
        set_begin_index(begin)
    return scheduler.timesteps[begin:]
