"""One denoising run: its plan, and the loop over whole and cached, guided and unguided steps."""

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from ov_decidiffusion.arguments import (
    MAX_GUIDANCE,
    check_guidance_interval,
    check_latents,
    check_quantized,
    check_range,
    check_schedule,
    check_whole,
)
from ov_decidiffusion.caching import DEEP_FEATURES, full_steps
from ov_decidiffusion.folder import QUANTIZABLE
from ov_decidiffusion.models import TOP_LEVEL, Models
from ov_decidiffusion.presets import apply_preset
from ov_decidiffusion.schedulers import make_solver

MAX_SIGMA = 1e4


@dataclass(frozen=True)
class Plan:
    """What one run does at each of its steps."""

    scheduler: SchedulerMixin  # of this run alone
    timesteps: torch.Tensor
    guidance_scale: float
    guidance_rescale: float
    guided: list[bool]  # of each step: guidance acts, if its scale is above 1
    whole: list[bool]  # of each step: the whole U-Net runs, not only its top level
    quantized: frozenset[str]  # parts that run in INT8
    generator: torch.Generator | list[torch.Generator] | None
    eta: float  # of DDIM: the share of its noise that is drawn anew


class DenoisingStep:
    """One step of ``denoise``. Assign to it to go on otherwise: the next step is made from what it holds.

    Attributes:
        index: from 0.
        total: steps of the run.
        timestep: of the schedule.
        latents: [b, 4, h, w], after the step; ValueError where others of another shape, or NaN, are assigned.
        prompt_embeds: hidden states [b, n, d] of the prompts, behind those of the negative prompts, [2 b, n, d], in a
            run that is guided.
        guidance_scale: of the next steps.
        quantized: parts that run in INT8, for ``decode_latents``.
    """

    def __init__(self, index: int, plan: Plan, latents: torch.Tensor, prompt_embeds: torch.Tensor, scale: float):
        self.index, self.total, self.timestep = index, len(plan.timesteps), plan.timesteps[index]
        self.quantized, self.prompt_embeds, self.guidance_scale = plan.quantized, prompt_embeds, scale
        self._latents = latents

    @property
    def latents(self) -> torch.Tensor:
        return self._latents

    @latents.setter
    def latents(self, latents: torch.Tensor) -> None:
        if latents is not self._latents:
            self._latents = check_latents("latents", latents, tuple(self._latents.shape))


class Denoiser:
    """The U-Net of a model folder: whole, its top level alone, and in the loop.

    Args:
        models: the compiled models.
    """

    def __init__(self, models: Models):
        self._models = models

    def prepare_caching(self, quantized: bool = False) -> None:
        """Compile what ``whole`` with ``keep_deep`` and ``top_level`` run.

        Raises:
            ValueError: the U-Net cannot be cut.
        """
        self._models.prepare_caching(quantized)

    def whole(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        keep_deep: bool = False,
        quantized: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One run of the whole U-Net.

        Args:
            sample: latents [b, 4, h, w], as the scheduler scales them.
            timestep: one number.
            text: hidden states [b, 77, d].
            keep_deep: give the deeper levels' features too; after ``prepare_caching``.

        Returns:
            the prediction [b, 4, h, w], and the deeper levels' features [b, channels, h, w] or None.
        """
        inputs = _unet_inputs(sample, timestep) | {"encoder_hidden_states": text.numpy()}
        outputs = self._models.run("unet", inputs, outputs=2 if keep_deep else 1, quantized=quantized)
        return outputs[0], outputs[1] if keep_deep else None

    def top_level(
        self, sample: torch.Tensor, timestep: torch.Tensor, deep: torch.Tensor, quantized: bool = False
    ) -> torch.Tensor:
        """The prediction of the top level, given the deeper levels' features of an earlier step."""
        inputs = _unet_inputs(sample, timestep) | {DEEP_FEATURES: deep.numpy()}
        return self._models.run(TOP_LEVEL, inputs, quantized=quantized)[0]

    @torch.no_grad()
    def run(
        self, plan: Plan, latents: torch.Tensor, prompt_embeds: torch.Tensor, bar: dict[str, Any]
    ) -> Iterator[DenoisingStep]:
        """The loop.

        Args:
            latents: what to start from [b, 4, h, w].
            prompt_embeds: hidden states of the prompts [b, n, d], behind those of the negative prompts [2 b, n, d]
                where steps are guided.
            bar: options of the progress bar.

        Raises:
            FloatingPointError: a step ended in NaN or infinity.
        """
        scheduler, deep, scale = plan.scheduler, None, plan.guidance_scale
        extra = _extra_step_arguments(scheduler, plan)
        keeps, quantized = not all(plan.whole), "unet" in plan.quantized
        for index, timestep in enumerate(tqdm(plan.timesteps, **{"desc": "denoising", **bar})):
            guided = plan.guided[index] and scale > 1 and len(prompt_embeds) == 2 * len(latents)
            text = prompt_embeds if guided else prompt_embeds[-len(latents) :]
            batch = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
            if plan.whole[index] or len(deep) < len(batch):
                prediction, deep = self.whole(batch, timestep, text, keeps, quantized)
            else:
                prediction = self.top_level(batch, timestep, deep[-len(batch) :], quantized)
            if guided:
                prediction = guide(prediction, scale, plan.guidance_rescale)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if not torch.isfinite(latents).all():
                raise FloatingPointError(
                    f"Step {index + 1} of {len(plan.timesteps)} gave NaN or infinity instead of a picture: the weights "
                    'may be damaged, or the numbers too large for the format; try inference_precision="f32", or a '
                    "lower guidance_scale."
                )
            step = DenoisingStep(index, plan, latents, prompt_embeds, scale)
            yield step
            latents, prompt_embeds, scale = step.latents, step.prompt_embeds, step.guidance_scale


def _unet_inputs(sample: torch.Tensor, timestep: torch.Tensor) -> dict[str, np.ndarray]:
    return {"sample": sample.numpy(), "timestep": timestep.reshape(1).float().numpy()}


def make_plan(
    scheduler: SchedulerMixin,
    defaults: dict[str, Any],
    quantized_parts: frozenset[str],
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
        quantized_parts: that there are.
        strength: of image-to-image, or None.
        options: those that ``apply_preset`` fills in, but the number of steps.

    Raises:
        ValueError: an argument has a wrong value.
    """
    chosen = apply_preset(preset, num_inference_steps=num_inference_steps, **options)
    solver = chosen["solver"]
    scheduler = copy.deepcopy(scheduler) if solver is None else make_solver(solver, scheduler)
    last = scheduler.config.num_train_timesteps - 1

    def given(name: str, value: Any) -> Any:
        return defaults[name] if value is None else value

    steps = check_whole("num_inference_steps", given("num_inference_steps", chosen["num_inference_steps"]), 1, last + 1)
    timesteps = check_schedule("timesteps", timesteps, last)
    sigmas = check_schedule("sigmas", sigmas, MAX_SIGMA)
    if timesteps is not None and sigmas is not None:
        raise ValueError("Give `timesteps` or `sigmas`, not both.")
    interval = check_guidance_interval(chosen["guidance_interval"])
    cache_interval = check_whole("cache_interval", chosen["cache_interval"], 1)
    cache_power = check_range("cache_power", chosen["cache_power"], 1, 3)
    running = set_timesteps(scheduler, steps, strength, timesteps, sigmas)
    return Plan(
        scheduler=scheduler,
        timesteps=running,
        guidance_scale=check_range("guidance_scale", given("guidance_scale", guidance_scale), 0, MAX_GUIDANCE),
        guidance_rescale=check_range("guidance_rescale", given("guidance_rescale", guidance_rescale), 0, 1),
        guided=guided_steps(scheduler, running, interval),
        whole=full_steps(len(running), cache_interval, cache_power),
        quantized=check_quantized(chosen["quantized"], quantized_parts, QUANTIZABLE),
        generator=generator,
        eta=check_range("eta", eta, 0, 1),
    )


def guided_steps(
    scheduler: SchedulerMixin, timesteps: torch.Tensor, guidance_interval: tuple[float, float] | None
) -> list[bool]:
    """Which steps guidance acts on: those with a noise level in the interval, or all."""
    if guidance_interval is None:
        return [True] * len(timesteps)
    if not hasattr(scheduler, "alphas_cumprod") or type(scheduler).__name__ == "PNDMScheduler":
        raise ValueError(
            f"`guidance_interval` cannot be used with {type(scheduler).__name__}, which does not tell its noise "
            "levels, or makes one step of several."
        )
    abar = scheduler.alphas_cumprod.double().numpy()
    sigmas = np.interp(timesteps.double().numpy(), np.arange(len(abar)), np.sqrt((1 - abar) / abar))
    low, high = guidance_interval
    return [low <= sigma <= high for sigma in sigmas]


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    strength: float | None,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> torch.Tensor:
    """The timesteps to run: so many, or those given, by number or noise level; in image-to-image without the first."""
    if timesteps is not None or sigmas is not None:
        name, given = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"`{name}` cannot be given to {type(scheduler).__name__}: it lays out its own.")
        scheduler.set_timesteps(**{name: given})
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


def guide(prediction: torch.Tensor, guidance_scale: float, guidance_rescale: float) -> torch.Tensor:
    """Classifier-free guidance on a batch [unconditional, conditional], and its rescaling."""
    unconditional, conditional = prediction.chunk(2)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if guidance_rescale > 0:
        dims = list(range(1, guided.ndim))
        contrast = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        guided = guidance_rescale * (guided * contrast) + (1 - guidance_rescale) * guided
    return guided


def _extra_step_arguments(scheduler: SchedulerMixin, plan: Plan) -> dict[str, Any]:
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", plan.generator), ("eta", plan.eta)) if name in taken}
