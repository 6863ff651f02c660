"""The denoising loop, and its steps."""

import inspect
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from ov_decidiffusion.arguments import MAX_GUIDANCE, check_range
from ov_decidiffusion.generation.guidance import Guidance
from ov_decidiffusion.generation.plan import Plan, noise_levels
from ov_decidiffusion.generation.tensors import check_embeds, check_latents
from ov_decidiffusion.generation.unet import DeepCache, UNet
from ov_decidiffusion.progress import progress_bar
from ov_decidiffusion.schedulers.registry import Scheduler


@dataclass(frozen=True)
class InpaintBlend:
    """Keeps the source outside the mask: after each step, the latents there are the source's, with equal noise.

    This is how diffusers inpaints with a model that has no input channels for masks.
    """

    clean: torch.Tensor  # latents of the source [b, 4, h, w]
    noise: torch.Tensor
    mask: torch.Tensor  # [b or 1, 1, h, w], 1 where the picture is repainted

    def apply(self, latents: torch.Tensor, scheduler: Scheduler, timestep: torch.Tensor | None) -> torch.Tensor:
        """The latents with the source's outside the mask, as noisy as at a timestep; None: without noise."""
        source = self.clean
        if timestep is not None:
            source = scheduler.add_noise(source, self.noise, timestep.reshape(1))
        return (1 - self.mask) * source + self.mask * latents


class DenoisingStep:
    """One step of ``denoise``. Assign to its attributes to change the run: the next step starts from their values.

    Attributes:
        index: counted from 0.
        total: number of steps of the run.
        timestep: the schedule's timestep for this step.
        latents: [b, 4, h, w], after the step; assigning another shape, or NaN, raises ValueError.
        sample: [b, 4, h, w], the U-Net's input: the latents before the step, as the scheduler scales them.
        predicted: [b, 4, h, w], the clean latents that the U-Net predicts at this step: where a single straight step
            to the end would lead.
        prompt_embeds: hidden states [b, n, d] of the prompts; in a guided run [2 b, n, d], with those of the negative
            prompts first.
        guidance_scale, guidance_rescale: the values for the next steps.
        quantized, decoder: the parts that run in INT8 and the decoder to use, for ``decode_latents``.
        postprocess: what ``finish`` needs to know about the run.
        scheduler: this run's own copy.
    """

    def __init__(
        self,
        index: int,
        plan: Plan,
        sample: torch.Tensor,
        latents: torch.Tensor,
        predicted: torch.Tensor,
        prompt_embeds: torch.Tensor,
        guidance: Guidance,
        postprocess: Any = None,
    ):
        self.index, self.total, self.timestep = index, len(plan.timesteps), plan.timesteps[index]
        self.sample, self.predicted, self.postprocess = sample, predicted, postprocess
        self.quantized, self.decoder, self.scheduler = plan.quantized, plan.config.decoder, plan.scheduler
        self._prompt_embeds, self._latents = prompt_embeds, latents
        self._guidance_scale, self._guidance_rescale = guidance.scale, guidance.rescale

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        self._guidance_scale = check_range("guidance_scale", value, 0, MAX_GUIDANCE)

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @guidance_rescale.setter
    def guidance_rescale(self, value: float) -> None:
        self._guidance_rescale = check_range("guidance_rescale", value, 0, 1)

    @property
    def prompt_embeds(self) -> torch.Tensor:
        return self._prompt_embeds

    @prompt_embeds.setter
    def prompt_embeds(self, embeds: torch.Tensor) -> None:
        if embeds is self._prompt_embeds:
            return
        checked = check_embeds("prompt_embeds", embeds, self._prompt_embeds.shape[-1])
        counts = sorted({len(self._latents), len(self._prompt_embeds)})
        if len(checked) not in counts:
            raise ValueError(f"`prompt_embeds` must be of {' or '.join(map(str, counts))} prompts, got {len(checked)}.")
        self._prompt_embeds = checked

    @property
    def latents(self) -> torch.Tensor:
        return self._latents

    @latents.setter
    def latents(self, latents: torch.Tensor) -> None:
        if latents is not self._latents:
            self._latents = check_latents("latents", latents, tuple(self._latents.shape))


@torch.no_grad()
def denoise(
    plan: Plan,
    unet: UNet,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    progress_bar_config: dict[str, Any],
    blend: InpaintBlend | None = None,
    postprocess: Any = None,
    rows_at_once: int | None = None,
) -> Generator[DenoisingStep, None, None]:
    """The loop: predict, guide, step, yield.

    Args:
        plan: the run's plan.
        unet: the U-Net; call its ``prepare_caching`` first if not all steps of the plan are full ones.
        latents: [b, 4, h, w] to start from.
        prompt_embeds: hidden states of the prompts [b, n, d]; in a guided run [2 b, n, d], with those of the negative
            prompts first.
        progress_bar_config: tqdm's options.
        blend: what inpainting keeps of the source.
        postprocess: passed on to each step.
        rows_at_once: see ``UNet.full``.

    Raises:
        FloatingPointError: a step ended in NaN or infinity.
    """
    config, scheduler = plan.config, plan.scheduler
    guidance = Guidance(config.guidance_scale, config.guidance_rescale, plan.guided, config.guidance_cache_interval)
    cache = DeepCache(unet, plan.full_steps, "unet" in plan.quantized, rows_at_once)
    step_options = _step_options(scheduler, plan)
    for index, timestep in enumerate(progress_bar(plan.timesteps, **{"desc": "denoising", **progress_bar_config})):
        rows, text = guidance.inputs(index, latents, prompt_embeds)
        rows = scheduler.scale_model_input(rows, timestep)
        prediction = guidance.apply(cache.predict(index, rows, timestep, text))
        sample = rows[-len(latents) :]
        predicted = predicted_end(scheduler, prediction, sample, timestep)
        latents = scheduler.step(prediction, timestep, latents, **step_options, return_dict=False)[0]
        if blend is not None:
            predicted = blend.apply(predicted, scheduler, None)
            latents = blend.apply(latents, scheduler, next(iter(plan.timesteps[index + 1 :]), None))
        _refuse_nan(latents, index, len(plan.timesteps))
        step = DenoisingStep(index, plan, sample, latents, predicted, prompt_embeds, guidance, postprocess)
        yield step
        latents = check_latents("latents", step.latents, tuple(latents.shape))  # may have been changed in place
        prompt_embeds, guidance.scale, guidance.rescale = step.prompt_embeds, step.guidance_scale, step.guidance_rescale


def _refuse_nan(latents: torch.Tensor, index: int, total: int) -> None:
    if not torch.isfinite(latents).all():
        raise FloatingPointError(
            f"Step {index + 1} of {total} gave NaN or infinity instead of a picture: the weights may be damaged, the "
            "numbers too large for the format, or the steps too few for the solver; try "
            'inference_precision="f32", a lower guidance_scale, or more steps.'
        )


def predicted_end(
    scheduler: Scheduler, prediction: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """The clean latents that a prediction implies (Salimans & Ho 2022, arXiv 2202.00512, section 4 and appendix D).

    Args:
        prediction: [b, 4, h, w] of the noise, of v or of the latents, by the scheduler's ``prediction_type``.
        sample: the U-Net's input, as the scheduler scales it: alpha x + sigma noise with alpha^2 + sigma^2 = 1.
        timestep: one number.
    """
    level = float(noise_levels(scheduler, timestep.reshape(1))[0])
    alpha = 1 / math.sqrt(1 + level**2)
    sigma = level * alpha
    if scheduler.config.prediction_type == "sample":
        return prediction
    if scheduler.config.prediction_type == "v_prediction":
        return alpha * sample - sigma * prediction
    return (sample - sigma * prediction) / alpha


def _step_options(scheduler: Scheduler, plan: Plan) -> dict[str, Any]:
    """The optional arguments that this scheduler's ``step`` accepts."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", plan.generator), ("eta", plan.config.eta)) if name in taken}
