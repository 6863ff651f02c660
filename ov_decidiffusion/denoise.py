"""One denoising run: its plan, and the loop over whole and cached, guided and unguided steps."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from ov_decidiffusion.arguments import check_latents
from ov_decidiffusion.caching import DEEP_FEATURES
from ov_decidiffusion.models import TOP_LEVEL, Models


@dataclass(frozen=True)
class Plan:
    """What one run does at each of its steps."""

    scheduler: SchedulerMixin  # of this run alone
    timesteps: torch.Tensor
    guidance_scale: float
    guidance_rescale: float
    guided: list[bool]  # of each step
    whole: list[bool]  # of each step: the whole U-Net runs, not only its top level
    quantized: frozenset[str]  # parts that run in INT8
    generator: torch.Generator | list[torch.Generator] | None


class DenoisingStep:
    """One step of ``denoise``. Assign to ``latents`` to go on from other ones.

    Attributes:
        index: from 0.
        total: steps of the run.
        timestep: of the schedule.
        latents: [b, 4, h, w], after the step; ValueError where others of another shape, or NaN, are assigned.
        quantized: parts that run in INT8, for ``decode_latents``.
    """

    def __init__(
        self, index: int, total: int, timestep: torch.Tensor, latents: torch.Tensor, quantized: frozenset[str]
    ):
        self.index, self.total, self.timestep, self.quantized = index, total, timestep, quantized
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
        self, plan: Plan, latents: torch.Tensor, conditional: torch.Tensor, text: torch.Tensor, bar: dict[str, Any]
    ) -> Iterator[DenoisingStep]:
        """The loop.

        Args:
            latents: what to start from [b, 4, h, w].
            conditional: hidden states [b, 77, d] of the prompts.
            text: for guided steps, those of the negative prompts and behind them those of the prompts, [2 b, 77, d].
            bar: options of the progress bar.
        """
        scheduler, deep = plan.scheduler, None
        extra = _extra_step_arguments(scheduler, plan.generator)
        keeps, quantized = not all(plan.whole), "unet" in plan.quantized
        for index, timestep in enumerate(tqdm(plan.timesteps, **{"desc": "denoising", **bar})):
            guided = plan.guided[index]
            batch = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
            if plan.whole[index] or len(deep) < len(batch):
                prediction, deep = self.whole(batch, timestep, text if guided else conditional, keeps, quantized)
            else:
                prediction = self.top_level(batch, timestep, deep[-len(batch) :], quantized)
            if guided:
                prediction = guide(prediction, plan.guidance_scale, plan.guidance_rescale)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if not torch.isfinite(latents).all():
                raise FloatingPointError(
                    f"Step {index + 1} of {len(plan.timesteps)} gave NaN or infinity instead of a picture: the weights "
                    'may be damaged, or the numbers too large for the format; try inference_precision="f32", or a '
                    "lower guidance_scale."
                )
            step = DenoisingStep(index, len(plan.timesteps), timestep, latents, plan.quantized)
            yield step
            latents = step.latents


def _unet_inputs(sample: torch.Tensor, timestep: torch.Tensor) -> dict[str, np.ndarray]:
    return {"sample": sample.numpy(), "timestep": timestep.reshape(1).float().numpy()}


def guided_steps(
    scheduler: SchedulerMixin,
    timesteps: torch.Tensor,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None,
) -> list[bool]:
    """Which steps are guided: none up to a scale of 1, else those with a noise level in the interval."""
    if guidance_scale <= 1 or guidance_interval is None:
        return [guidance_scale > 1] * len(timesteps)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"`guidance_interval` needs noise levels, which {type(scheduler).__name__} does not tell.")
    abar = scheduler.alphas_cumprod.double().numpy()
    sigmas = np.interp(timesteps.double().numpy(), np.arange(len(abar)), np.sqrt((1 - abar) / abar))
    low, high = guidance_interval
    return [low <= sigma <= high for sigma in sigmas]


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, strength: float | None) -> torch.Tensor:
    """The timesteps to run; in image-to-image, the first ones are left out."""
    scheduler.set_timesteps(num_inference_steps)
    if strength is None:
        return scheduler.timesteps
    steps = scheduler.num_inference_steps
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


def _extra_step_arguments(scheduler: SchedulerMixin, generator: Any) -> dict[str, Any]:
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
