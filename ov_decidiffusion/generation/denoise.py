"""One denoising run: the loop over whole and cached, guided and unguided steps."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from ov_decidiffusion.arguments import MAX_GUIDANCE, check_range
from ov_decidiffusion.generation.plan import Plan, noise_levels
from ov_decidiffusion.generation.tensors import check_embeds, check_latents
from ov_decidiffusion.model_folder.layout import MAX_TOKENS
from ov_decidiffusion.runtime.models import ATTENTION, TOP_LEVEL, Models
from ov_decidiffusion.runtime.transformations import DEEP_FEATURES


@dataclass(frozen=True)
class Kept:
    """What inpainting leaves as it is: outside the mask, each step's latents are the source's, as noisy as the rest.

    diffusers' way of inpainting with a model that has no channels for masks.
    """

    clean: torch.Tensor  # latents of the source [b, 4, h, w]
    noise: torch.Tensor
    mask: torch.Tensor  # [b or 1, 1, h, w], 1 where the picture is made anew

    def blend(self, latents: torch.Tensor, scheduler: SchedulerMixin, timestep: torch.Tensor | None) -> torch.Tensor:
        """Latents that are noisy as at a timestep; None: that are done."""
        source = self.clean
        if timestep is not None:
            source = scheduler.add_noise(source, self.noise, timestep.reshape(1))
        return (1 - self.mask) * source + self.mask * latents


class DenoisingStep:
    """One step of ``denoise``. Assign to it to go on otherwise: the next step is made from what it holds.

    Attributes:
        index: from 0.
        total: steps of the run.
        timestep: of the schedule.
        latents: [b, 4, h, w], after the step; ValueError where others of another shape, or NaN, are assigned.
        sample: [b, 4, h, w], what the U-Net was given: the latents before the step, as the scheduler scales them.
        predicted: [b, 4, h, w], the latents that the U-Net believes in at this step: where a single straight step to
            the end would lead.
        prompt_embeds: hidden states [b, n, d] of the prompts, behind those of the negative prompts, [2 b, n, d], in a
            run that is guided.
        guidance_scale, guidance_rescale: of the next steps.
        quantized, decoder: parts that run in INT8, and which decoder does, for ``decode_latents``.
        finishing: what ``finish`` needs to know of the run.
    """

    def __init__(
        self,
        index: int,
        plan: Plan,
        sample: torch.Tensor,
        latents: torch.Tensor,
        predicted: torch.Tensor,
        prompt_embeds: torch.Tensor,
        guidance: tuple[float, float],
        finishing: Any = None,
    ):
        self.index, self.total, self.timestep = index, len(plan.timesteps), plan.timesteps[index]
        self.sample, self.predicted, self.finishing = sample, predicted, finishing
        self.quantized, self.decoder = plan.quantized, plan.decoder
        self._prompt_embeds, self._guidance_scale, self._guidance_rescale = prompt_embeds, *guidance
        self._latents = latents

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
        return torch.from_numpy(outputs[0]), torch.from_numpy(outputs[1]) if keep_deep else None

    def top_level(
        self, sample: torch.Tensor, timestep: torch.Tensor, deep: torch.Tensor, quantized: bool = False
    ) -> torch.Tensor:
        """The prediction of the top level, given the deeper levels' features of an earlier step."""
        inputs = _unet_inputs(sample, timestep) | {DEEP_FEATURES: deep.numpy()}
        return torch.from_numpy(self._models.run(TOP_LEVEL, inputs, quantized=quantized)[0])

    def attention(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
        """What each layer of cross-attention looks at [b, h * w, n], of inputs as ``whole`` takes them."""
        inputs = _unet_inputs(sample, timestep) | {"encoder_hidden_states": text.numpy()}
        return [torch.from_numpy(layer) for layer in self._models.run(ATTENTION, inputs, outputs=None)]

    @torch.no_grad()
    def run(
        self,
        plan: Plan,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        bar: dict[str, Any],
        kept: Kept | None = None,
        finishing: Any = None,
    ) -> Iterator[DenoisingStep]:
        """The loop.

        Args:
            latents: what to start from [b, 4, h, w].
            prompt_embeds: hidden states of the prompts [b, n, d], behind those of the negative prompts [2 b, n, d]
                where steps are guided.
            bar: options of the progress bar.
            kept: what is not made anew, in inpainting.
            finishing: handed to each step.

        Raises:
            FloatingPointError: a step ended in NaN or infinity.
        """
        scheduler, deep, direction = plan.scheduler, None, None
        scale, rescale = plan.guidance_scale, plan.guidance_rescale
        extra = _extra_step_arguments(scheduler, plan)
        keeps, quantized = not all(plan.whole), "unet" in plan.quantized
        for index, timestep in enumerate(tqdm(plan.timesteps, **{"desc": "denoising", **bar})):
            if prompt_embeds.shape[1] != MAX_TOKENS:
                self._models.allow_long_prompts()
            guided = plan.guided[index] and scale > 1 and len(prompt_embeds) == 2 * len(latents)
            both = guided and (plan.directed[index] or direction is None)
            text = prompt_embeds if both else prompt_embeds[-len(latents) :]
            batch = scheduler.scale_model_input(torch.cat([latents, latents]) if both else latents, timestep)
            if plan.whole[index] or len(deep) < len(batch):
                prediction, deep = self.whole(batch, timestep, text, keeps, quantized)
            else:
                prediction = self.top_level(batch, timestep, deep[-len(batch) :], quantized)
            if both:
                unconditional, conditional = prediction.chunk(2)
                direction = conditional - unconditional
                prediction = rescaled(unconditional + scale * direction, conditional, rescale)
            elif guided:
                prediction = rescaled(prediction + (scale - 1) * direction, prediction, rescale)
            sample = batch[-len(latents) :]
            predicted = predicted_end(scheduler, prediction, sample, timestep)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if kept is not None:
                predicted = kept.blend(predicted, scheduler, None)
                latents = kept.blend(latents, scheduler, next(iter(plan.timesteps[index + 1 :]), None))
            if not torch.isfinite(latents).all():
                raise FloatingPointError(
                    f"Step {index + 1} of {len(plan.timesteps)} gave NaN or infinity instead of a picture: the weights "
                    "may be damaged, the numbers too large for the format, or the steps too few for the solver; try "
                    'inference_precision="f32", a lower guidance_scale, or more steps.'
                )
            step = DenoisingStep(index, plan, sample, latents, predicted, prompt_embeds, (scale, rescale), finishing)
            yield step
            latents = check_latents("latents", step.latents, tuple(latents.shape))  # may have been changed in place
            prompt_embeds, scale, rescale = step.prompt_embeds, step.guidance_scale, step.guidance_rescale


def _unet_inputs(sample: torch.Tensor, timestep: torch.Tensor) -> dict[str, np.ndarray]:
    return {"sample": sample.numpy(), "timestep": timestep.reshape(1).float().numpy()}


def predicted_end(
    scheduler: SchedulerMixin, prediction: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """The clean latents that a prediction stands for (Salimans & Ho 2022, arXiv 2202.00512, section 4 and appendix D).

    Args:
        prediction: of the noise, of v or of the latents, as the scheduler is set to [b, 4, h, w].
        sample: what it was made from, as the scheduler scales it: alpha x + sigma noise with alpha^2 + sigma^2 = 1.
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


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, guidance_rescale: float) -> torch.Tensor:
    """A guided prediction, its contrast pulled back towards the conditional one's by a share in 0…1."""
    if guidance_rescale > 0:
        dims = list(range(1, guided.ndim))
        contrast = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        guided = guidance_rescale * (guided * contrast) + (1 - guidance_rescale) * guided
    return guided


def _extra_step_arguments(scheduler: SchedulerMixin, plan: Plan) -> dict[str, Any]:
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", plan.generator), ("eta", plan.eta)) if name in taken}
