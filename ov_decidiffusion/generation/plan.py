"""What one denoising run does at each of its steps, from the arguments of a call."""

import copy
import inspect
import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from ov_decidiffusion.arguments import (
    MAX_GUIDANCE,
    check_decoder,
    check_guidance_interval,
    check_quantized,
    check_range,
    check_schedule,
    check_whole,
)
from ov_decidiffusion.generation.presets import apply_preset
from ov_decidiffusion.model_folder.layout import QUANTIZABLE
from ov_decidiffusion.runtime.models import Models
from ov_decidiffusion.schedulers.registry import make_solver, solver_name

MAX_SIGMA = 1e4


@dataclass(frozen=True)
class Plan:
    """What one run does at each of its steps."""

    scheduler: SchedulerMixin  # of this run alone
    timesteps: torch.Tensor
    guidance_scale: float
    guidance_rescale: float
    guided: list[bool]  # of each step: guidance acts, if its scale is above 1
    directed: list[bool]  # of each step: guidance's direction is computed anew, not taken from an earlier step
    whole: list[bool]  # of each step: the whole U-Net runs, not only its top level
    quantized: frozenset[str]  # parts that run in INT8
    decoder: str  # of finished latents
    generator: torch.Generator | list[torch.Generator] | None
    eta: float  # of DDIM: the share of its noise that is drawn anew
    preset: str
    arguments: dict[str, Any]  # of a call that plans the same, presets and defaults written out


def make_plan(
    scheduler: SchedulerMixin,
    defaults: dict[str, Any],
    models: Models,
    *,
    strength: float | None,
    generator: torch.Generator | list[torch.Generator] | None,
    num_inference_steps: Any,
    timesteps: Any,
    sigmas: Any,
    guidance_scale: Any,
    guidance_rescale: Any,
    eta: Any,
    preset: Any,
    **options: Any,
) -> Plan:
    """What a run does at each step, from the arguments of a call, all of them checked.

    Args:
        scheduler: of the pipeline; the run gets one of its own, so that loops can interleave.
        defaults: of the checkpoint.
        models: that there are; a preset does without INT8 where it does not pay and without a tiny decoder where
            there is none; INT8 models that pay have to be there, as what is asked for by name.
        strength: of image-to-image and inpainting, or None.
        options: those that ``apply_preset`` fills in, but the number of steps.

    Raises:
        ValueError: an argument has a wrong value.
    """
    chosen = apply_preset(preset, num_inference_steps=num_inference_steps, **options)
    solver = None if chosen["solver"] is None else solver_name(chosen["solver"])
    scheduler = copy.deepcopy(scheduler) if solver is None else make_solver(solver, scheduler)
    chosen |= {"timesteps": timesteps, "sigmas": sigmas, "eta": eta}
    chosen |= {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale}
    arguments = {"solver": solver} | _checked(chosen, defaults, scheduler.config.num_train_timesteps - 1)
    own_steps = (arguments.get(name) for name in ("num_inference_steps", "timesteps", "sigmas"))
    running = set_timesteps(scheduler, strength, *own_steps)
    if options["guidance_interval"] is None and not _tells_noise_levels(scheduler):
        arguments["guidance_interval"] = None  # a preset does without what the solver asked for cannot do
    guided = guided_steps(scheduler, running, arguments["guidance_interval"])
    chosen |= _without_what_is_no_gain(chosen, options, models)  # last, for it may have to measure
    quantized = check_quantized(chosen["quantized"], models.quantized_parts, QUANTIZABLE)
    arguments["quantized"] = sorted(quantized) or False
    arguments["decoder"] = check_decoder(chosen["decoder"], models.has_tiny_decoder)
    return Plan(
        scheduler=scheduler,
        timesteps=running,
        guidance_scale=arguments["guidance_scale"],
        guidance_rescale=arguments["guidance_rescale"],
        guided=guided,
        directed=directed_steps(guided, arguments["guidance_cache_interval"]),
        whole=full_steps(len(running), arguments["cache_interval"], arguments["cache_power"]),
        quantized=quantized,
        decoder=arguments["decoder"],
        generator=generator,
        eta=arguments["eta"],
        preset=preset,
        arguments=arguments,
    )


def _checked(chosen: dict[str, Any], defaults: dict[str, Any], last: int) -> dict[str, Any]:
    """Arguments of a call that hold for any models: defaults filled in, and every value checked.

    Args:
        last: timestep of the schedule.
    """

    def given(name: str) -> Any:
        return defaults[name] if chosen[name] is None else chosen[name]

    timesteps = check_schedule("timesteps", chosen["timesteps"], last, last + 1)
    sigmas = check_schedule("sigmas", chosen["sigmas"], MAX_SIGMA, last + 1)
    if timesteps is not None and sigmas is not None:
        raise ValueError("Give `timesteps` or `sigmas`, not both.")
    steps = check_whole("num_inference_steps", given("num_inference_steps"), 1, last + 1)
    own_steps = {"timesteps": timesteps} if sigmas is None else {"sigmas": sigmas}
    return {
        **({"num_inference_steps": steps} if timesteps is None and sigmas is None else own_steps),
        "guidance_scale": check_range("guidance_scale", given("guidance_scale"), 0, MAX_GUIDANCE),
        "guidance_rescale": check_range("guidance_rescale", given("guidance_rescale"), 0, 1),
        "eta": check_range("eta", chosen["eta"], 0, 1),
        "cache_interval": check_whole("cache_interval", chosen["cache_interval"], 1),
        "cache_power": check_range("cache_power", chosen["cache_power"], 1, 3),
        "guidance_interval": check_guidance_interval(chosen["guidance_interval"]),
        "guidance_cache_interval": check_whole("guidance_cache_interval", chosen["guidance_cache_interval"], 1),
    }


def _without_what_is_no_gain(chosen: dict[str, Any], asked: dict[str, Any], models: Models) -> dict[str, Any]:
    """What a preset has to do without on this machine or with this folder; what was asked for by name stays."""
    without: dict[str, Any] = {}
    if asked["quantized"] is None and chosen["quantized"] and not models.int8_pays:
        without["quantized"] = False
    if asked["decoder"] is None and not models.has_tiny_decoder:
        without["decoder"] = "whole"
    return without


def full_steps(total: int, interval: int, power: float = 1.0) -> list[bool]:
    """Which of ``total`` steps run the whole U-Net: the first, the last, and as many between as are needed.

    The last does because what a run ends on shows: one that ends on reused features is worse than a shorter one that
    does not. Of n whole steps after the first, number j = 1, 2, … comes at (total - 1) * (j / n) ** power: evenly and
    at most ``interval`` apart for a power of 1, as many but closer together at the start for a larger one (the
    paper's "non-uniform" schedule is a power law as well).
    """
    last = total - 1
    count = math.ceil(last / interval)
    whole = [0]
    for j in range(1, count + 1):
        position = math.floor(last * (j / count) ** power + 0.5)
        whole.append(max(position, whole[-1] + 1))
    there = set(whole)
    return [index in there for index in range(total)]


def guided_steps(
    scheduler: SchedulerMixin, timesteps: torch.Tensor, guidance_interval: tuple[float, float] | None
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


def _tells_noise_levels(scheduler: SchedulerMixin) -> bool:
    return hasattr(scheduler, "alphas_cumprod") and type(scheduler).__name__ != "PNDMScheduler"


def directed_steps(guided: list[bool], interval: int) -> list[bool]:
    """Which steps compute guidance's direction: of those that are guided the first and every so many."""
    counted = accumulate(guided, initial=0)
    return [acts and count % interval == 0 for acts, count in zip(guided, counted, strict=False)]


def noise_levels(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> np.ndarray:
    """sigma = sqrt((1 - abar) / abar) of a schedule at timesteps, between whole ones on a logarithmic scale."""
    abar = scheduler.alphas_cumprod.double().numpy().clip(1e-12, 1 - 1e-12)
    sigmas = np.log((1 - abar) / abar) / 2
    return np.exp(np.interp(timesteps.double().numpy(), np.arange(len(abar)), sigmas))


def set_timesteps(
    scheduler: SchedulerMixin,
    strength: float | None,
    num_inference_steps: int | None,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
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
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]
