"""What one denoising run does at each of its steps, from a configuration."""

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

    config: ResolvedConfig  # of a call that plans the same, presets and defaults written out
    scheduler: Scheduler  # of this run alone
    timesteps: torch.Tensor
    guided: list[bool]  # of each step: guidance acts, if its scale is above 1
    full_steps: list[bool]  # of each step: the full U-Net runs, not only its top level
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
    """What a run does at each step, from the configuration of a call, every value of it checked.

    Args:
        scheduler: of the pipeline; the run gets one of its own, so that loops can interleave.
        defaults: of the checkpoint.
        models: the folder's; a preset does without INT8 where it does not pay and without a tiny decoder where there is
            none. INT8 models that pay have to be there, as what is asked for by name.
        strength: of image-to-image and inpainting, or None.

    Raises:
        ValueError: an argument has a wrong value.
    """
    resolved = config.resolved(defaults, scheduler.config.num_train_timesteps)
    solver = None if resolved.solver is None else solver_name(resolved.solver)
    own = copy.deepcopy(scheduler) if solver is None else make_solver(solver, scheduler)
    timesteps = set_timesteps(own, strength, resolved.num_inference_steps, resolved.timesteps, resolved.sigmas)
    interval = resolved.guidance_interval
    if config.guidance_interval is None and not _tells_noise_levels(own):
        interval = None  # a preset does without what the solver asked for cannot do
    guided = guided_steps(own, timesteps, interval)
    parts, decoder = _parts_to_run(config, resolved, models)  # last, for it may have to measure
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
    """The parts to run in INT8, and the decoder: what a preset chose, it does without where there is no gain or no
    such model; what was asked for by name stays, or is refused."""
    quantized, decoder = resolved.quantized, resolved.decoder
    if asked.quantized is None and quantized and not models.int8_pays:
        quantized = False
    if asked.decoder is None and not models.has_tiny_decoder:
        decoder = "whole"
    parts = check_quantized(quantized, models.quantized_parts, QUANTIZABLE)
    return parts, check_decoder(decoder, models.has_tiny_decoder)


def full_steps(total: int, interval: int, power: float = 1.0) -> list[bool]:
    """Which of ``total`` steps run the full U-Net: the first, the last, and as many between as are needed.

    The last does because what a run ends on shows: one that ends on reused features is worse than a shorter one that
    does not. Of n full steps after the first, number j = 1, 2, … comes at (total - 1) * (j / n) ** power: evenly and
    at most ``interval`` apart for a power of 1, as many but closer together at the start for a larger one (the
    paper's "non-uniform" schedule is a power law as well).
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
    """Which steps guidance acts on: those with a noise level in the interval, or all."""
    if guidance_interval is None:
        return [True] * len(timesteps)
    if not _tells_noise_levels(scheduler):
        raise ValueError(
            f"`guidance_interval` cannot be used with {type(scheduler).__name__}, which does not tell its noise "
            "levels, or makes one step of several."
        )
    low, high = guidance_interval
    return [low <= sigma <= high for sigma in noise_levels(scheduler, timesteps)]


def _tells_noise_levels(scheduler: Scheduler) -> bool:
    return hasattr(scheduler, "alphas_cumprod") and type(scheduler).__name__ != "PNDMScheduler"


def noise_levels(scheduler: Scheduler, timesteps: torch.Tensor) -> np.ndarray:
    """sigma = sqrt((1 - abar) / abar) of a schedule at timesteps, between whole ones on a logarithmic scale."""
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
    """The timesteps to run: so many, or those given, by number or noise level; in image-to-image without the first."""
    if timesteps is not None or sigmas is not None:
        name, given = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"`{name}` cannot be given to {type(scheduler).__name__}: it lays out its own.")
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
    set_begin_index = getattr(scheduler, "set_begin_index", None)  # some have none
    if set_begin_index is not None:
        set_begin_index(begin)
    return scheduler.timesteps[begin:]
