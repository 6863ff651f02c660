"""OVStableDiffusionPipeline: text, and a picture where one is wanted, to pictures, on OpenVINO."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPTokenizer

from ov_decidiffusion.arguments import (
    MAX_GUIDANCE,
    check_callback,
    check_callback_result,
    check_choice,
    check_guidance_interval,
    check_images,
    check_latents,
    check_negative_prompts,
    check_prompts,
    check_range,
    check_whole,
    make_generator,
    shown,
)
from ov_decidiffusion.caching import full_steps
from ov_decidiffusion.denoise import Denoiser, DenoisingStep, Plan, guided_steps, set_timesteps
from ov_decidiffusion.folder import QUANTIZABLE, read_defaults, read_json, scheduler_file, tokenizer_dir
from ov_decidiffusion.images import fit_size, make_image_processor
from ov_decidiffusion.models import Models
from ov_decidiffusion.presets import apply_preset
from ov_decidiffusion.schedulers import check_scheduler, make_scheduler, make_solver
from ov_decidiffusion.text import TextEncoder
from ov_decidiffusion.vae import Autoencoder

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class StableDiffusionOutput(BaseOutput):
    """``images``: PIL pictures, or an array [b, H, W, 3] in 0…1 (np), or a tensor [b, 3, H, W] (pt, latent)."""

    images: list[Image.Image] | np.ndarray | torch.Tensor


class OVStableDiffusionPipeline:
    """Text-to-image and text-guided image-to-image with an OpenVINO model folder.

    Argument names and meanings are those of diffusers' ``StableDiffusionPipeline`` and
    ``StableDiffusionImg2ImgPipeline``; with the same weights, scheduler and seed, and
    ``inference_precision="f32"``, the pictures are theirs too.
    Make one with ``from_pretrained``.

    Attributes:
        scheduler: any of diffusers' ``KarrasDiffusionSchedulers``; assign another to change it.
        defaults: the checkpoint's own ``num_inference_steps``, ``guidance_scale`` and ``guidance_rescale``.
        vae_scale_factor: pixels to one latent position, along a side.
        size_factor: pictures' sides are multiples of this.
        default_size: (width, height) in pixels of a picture when nothing else is asked for.
        inference_precision: what the models compute in, and why, as a sentence.
        quantized_parts: the models that there are in INT8 too; ``quantize_models`` makes them.
        denoiser: the U-Net, whole and its top level alone, for those who look inside the loop.
        seconds: spent in each model since the pipeline was loaded.
    """

    def __init__(
        self,
        models: Models,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
        defaults: dict[str, Any],
    ):
        self._models = models
        self._text_encoder = TextEncoder(models, tokenizer)
        self._vae = Autoencoder(models)
        self.denoiser = Denoiser(models)
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.defaults = defaults
        self.vae_scaling_factor = self._vae.scaling_factor
        self.vae_scale_factor = self._vae.scale_factor
        self.latent_channels = models.unet_config["in_channels"]
        self.size_factor = self.vae_scale_factor * _unet_factor(models.unet_config)
        side = models.unet_config["sample_size"] * self.vae_scale_factor
        self.default_size = (side, side)
        self.image_processor = make_image_processor(self.vae_scale_factor)
        self.inference_precision = models.inference_precision
        self.quantized_parts = models.quantized_parts
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        device: str = "CPU",
        inference_precision: str = "auto",
        cache_dir: str | Path | None = None,
    ) -> "OVStableDiffusionPipeline":
        """Load a folder that ``convert_checkpoint`` made.

        Args:
            model_dir: the OpenVINO model folder.
            device: any OpenVINO device string, such as "CPU", "AUTO" or "GPU.0". CPU is what this project is
                tested on; other devices are written to OpenVINO's documentation and untested.
            inference_precision: what the models compute in, "f32", "bf16" or "f16". "auto" takes the fastest,
                found by a probe that is run once on a machine; ``inference_precision`` of the pipeline says which.
                With "f32" pictures are diffusers' own; OpenVINO's default picks bf16 on processors that have
                its instructions, even where that is slower. The autoencoder never computes in f16.
            cache_dir: where OpenVINO keeps compiled models so that the next start is quicker; None keeps none.

        Raises:
            ValueError: a wrong argument, or a folder that lacks a part; the message names it.
        """
        folder = Path(model_dir).expanduser()
        models = Models(folder, device, inference_precision, cache_dir)
        return cls(
            models,
            CLIPTokenizer.from_pretrained(tokenizer_dir(folder), local_files_only=True),
            make_scheduler(read_json(scheduler_file(folder))),
            read_defaults(folder),
        )

    @property
    def scheduler(self) -> SchedulerMixin:
        """The noise schedule and solver in use."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerMixin) -> None:
        check_scheduler(scheduler)
        self._scheduler = scheduler

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each model so far."""
        return dict(self._models.seconds)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of the progress bar, as tqdm takes them; ``disable=True`` hides it."""
        self._progress_bar_config = kwargs

    def __call__(
        self,
        prompt: str | list[str],
        *others: Any,
        output_type: str = "pil",
        callback_on_step_end: Callable[["OVStableDiffusionPipeline", int, torch.Tensor, dict], dict] | None = None,
        **arguments: Any,
    ) -> StableDiffusionOutput:
        """Generate pictures.

        Args:
            prompt: what to show; one or a list.
            output_type: "pil", "np", "pt" or "latent" (before the decoder).
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": latents})`` after each
                step; if it returns a dictionary, its "latents" are gone on from.
            arguments: those of ``denoise``.

        Raises:
            ValueError: an argument has a wrong value; the message says which, and what is allowed.
        """
        if others:
            raise TypeError(
                "Only `prompt` may be given without its name, as in pipe(prompt, image=picture, height=512); got "
                f"{len(others)} more: {shown(others[0])}."
            )
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_callback(callback_on_step_end)
        for step in self.denoise(prompt, **arguments):
            if callback_on_step_end is not None:
                result = callback_on_step_end(self, step.index, step.timestep, {"latents": step.latents})
                step.latents = check_callback_result(result).get("latents", step.latents)
        if output_type == "latent":
            return StableDiffusionOutput(images=step.latents)
        return StableDiffusionOutput(images=self.decode_latents(step.latents, output_type, step.quantized))

    def denoise(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | None = None,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | list[int] | None = None,
        latents: torch.Tensor | None = None,
        preset: str = "exact",
        solver: str | None = None,
        quantized: bool | Sequence[str] | None = None,
        cache_interval: int | None = None,
        cache_power: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Iterator[DenoisingStep]:
        """The denoising loop, a step at a time.

        Everything is checked before the first step runs. Stop iterating to stop generating;
        ``decode_latents(step.latents)`` shows how far it is.

        Args:
            prompt: what to show; one or a list.
            negative_prompt: what to keep away from; one for all prompts, or a list of the same length. It acts
                through guidance, so ``guidance_scale`` has to be above 1.
            image: a source picture, or one for each prompt, of any size and mode; makes it image-to-image.
            strength: with ``image``, how much of it to redo, above 0 and at most 1: that share of the steps runs.
            num_inference_steps: denoising steps, at least 1; None for the checkpoint's own.
            guidance_scale: weight of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); it is off at
                1 or below; None for the checkpoint's own.
            guidance_rescale: share, 0…1, by which guidance's contrast is pulled back (Lin et al. 2023, arXiv
                2305.08891, section 3.4); None for the checkpoint's own.
            height, width: in pixels, multiples of ``size_factor``. None: the checkpoint's default, or with
                ``image`` its own size, scaled down to the default's area; several must then be of one size.
            num_images_per_prompt: pictures to make of each prompt.
            generator: source of the noise; a list of them, one a picture, makes each picture independent of the
                batch.
            seed: an int makes one generator for the whole batch, a list makes one for each picture; not together
                with ``generator``.
            latents: noise to start from instead of drawn noise, [pictures, 4, height / 8, width / 8]; text-to-image
                only.
            preset: "exact", "balanced" or "fast": values, listed in ``PRESETS``, for those of the following arguments
                and ``num_inference_steps`` that are None.
            solver: "ddim", "dpm++" or "squeezed" in place of ``scheduler``, on its noise schedule. "squeezed" runs
                some of the steps asked for only, as ``SQUEEZE_MODES`` says.
            quantized: run the U-Net and the decoder in INT8, or only the parts named; needs ``quantize_models``.
            cache_interval: run the whole U-Net on the first step, on the last, and between them on as many as lie
                at most n apart if spread evenly; the others run its top level on the deeper levels' last features
                (Ma et al. 2023, arXiv 2312.00858). 1 runs everything on every step.
            cache_power: with a ``cache_interval``, how the whole steps lie: 1 evenly, above it (at most 3) as many,
                but closer together at the start.
            guidance_interval: (low, high), the noise levels sigma = sqrt((1 - abar) / abar) between which guidance
                acts; outside, steps cost half (Kynkäänniemi et al. 2024, arXiv 2404.07724). (0, math.inf): always.

        Raises:
            ValueError: an argument has a wrong value; the message says which, and what is allowed.
        """
        prompts = check_prompts(prompt)
        negatives = check_negative_prompts(negative_prompt, len(prompts))
        chosen = apply_preset(
            preset,
            solver=solver,
            num_inference_steps=num_inference_steps,
            quantized=quantized,
            cache_interval=cache_interval,
            cache_power=cache_power,
            guidance_interval=guidance_interval,
        )
        steps = self._or_default("num_inference_steps", chosen["num_inference_steps"])
        steps = check_whole("num_inference_steps", steps, 1, self.scheduler.config.num_train_timesteps)
        guidance_scale = self._or_default("guidance_scale", guidance_scale)
        guidance_scale = check_range("guidance_scale", guidance_scale, 0, MAX_GUIDANCE)
        guidance_rescale = self._or_default("guidance_rescale", guidance_rescale)
        guidance_rescale = check_range("guidance_rescale", guidance_rescale, 0, 1)
        num_images_per_prompt = check_whole("num_images_per_prompt", num_images_per_prompt, 1)
        cache_interval = check_whole("cache_interval", chosen["cache_interval"], 1)
        cache_power = check_range("cache_power", chosen["cache_power"], 1, 3)
        guidance_interval = check_guidance_interval(chosen["guidance_interval"])
        quantized = self._check_quantized(chosen["quantized"])
        pictures = len(prompts) * num_images_per_prompt
        generator = make_generator(generator, seed, pictures)
        images = None
        if image is not None:
            strength = check_range("strength", strength, 0, 1)
            if latents is not None:
                raise ValueError("`latents` starts text-to-image; it cannot be given together with `image`.")
            images = check_images(image, len(prompts))
        width, height = self._size(width, height, images)
        if latents is not None:
            latents = check_latents("latents", latents, self._latent_shape(pictures, width, height))
        scheduler = self._fresh_scheduler(chosen["solver"])
        timesteps = set_timesteps(scheduler, steps, strength if images is not None else None)
        whole = full_steps(len(timesteps), cache_interval, cache_power)
        plan = Plan(
            scheduler=scheduler,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guided=guided_steps(scheduler, timesteps, guidance_scale, guidance_interval),
            whole=whole,
            quantized=quantized,
            generator=generator,
        )
        inputs = _Inputs(
            prompts=prompts,
            negatives=negatives if guidance_scale > 1 else None,
            images=images,
            size=(width, height),
            num_images_per_prompt=num_images_per_prompt,
            latents=latents,
        )
        if not all(whole):
            self.denoiser.prepare_caching("unet" in quantized)
        return self._run(inputs, plan)

    def _fresh_scheduler(self, solver: str | None) -> SchedulerMixin:
        """A scheduler counts its steps; one of its own for each run lets loops interleave."""
        return copy.deepcopy(self.scheduler) if solver is None else make_solver(solver, self.scheduler)

    @torch.no_grad()
    def _run(self, inputs: "_Inputs", plan: Plan) -> Iterator[DenoisingStep]:
        conditional, text = self._encode_prompts(inputs)
        latents = self._first_latents(inputs, plan, len(conditional))
        yield from self.denoiser.run(plan, latents, conditional, text, self._progress_bar_config)

    def _encode_prompts(self, inputs: "_Inputs") -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of the prompts, one a picture; and behind those of the negative prompts where there are any."""
        conditional = self.encode_prompt(inputs.prompts).repeat_interleave(inputs.num_images_per_prompt, dim=0)
        if inputs.negatives is None:
            return conditional, conditional
        unconditional = self.encode_prompt(inputs.negatives).repeat_interleave(inputs.num_images_per_prompt, dim=0)
        return conditional, torch.cat([unconditional, conditional])

    def _first_latents(self, inputs: "_Inputs", plan: Plan, pictures: int) -> torch.Tensor:
        """Noise, or the source pictures with as much noise as the first timestep has."""
        if inputs.images is not None:
            clean = self._image_latents(inputs.images, inputs.size, pictures, plan.generator)
            noise = randn_tensor(clean.shape, generator=plan.generator)
            return plan.scheduler.add_noise(clean, noise, plan.timesteps[:1].repeat(pictures))
        latents = inputs.latents
        if latents is None:
            latents = randn_tensor(self._latent_shape(pictures, *inputs.size), generator=plan.generator)
        return latents.float() * plan.scheduler.init_noise_sigma

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, quantized: bool = False
    ) -> torch.Tensor:
        """One run of the U-Net: latents [b, 4, h, w], a timestep and hidden states [b, 77, d] in, [b, 4, h, w] out."""
        return self.denoiser.whole(sample, timestep, text, quantized=quantized)[0]

    def encode_prompt(self, prompt: str | list[str]) -> torch.Tensor:
        """Hidden states [prompts, 77, d] of the text encoder; what does not fit into 77 tokens is left out.

        The latest prompts are remembered: many pictures of one prompt encode it once.
        """
        return self._text_encoder.encode(check_prompts(prompt))

    def token_ids(self, prompts: list[str]) -> np.ndarray:
        """What the text encoder takes: whole numbers [prompts, 77], padded, and cut off where a prompt is longer."""
        return self._text_encoder.token_ids(prompts)

    def encode_image(
        self, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Scaled latents [b, 4, H / 8, W / 8] of pixels [b, 3, H, W] in -1…1, drawn from the encoder's distribution."""
        return self._vae.encode(pixels, generator)

    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "pil", quantized: bool | Collection[str] = False
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Pictures of latents [b, 4, h, w], decoded one at a time to keep memory low."""
        check_choice("output_type", output_type, OUTPUT_TYPES[:-1])
        decoded = self._vae.decode(latents, "vae_decoder" in self._check_quantized(quantized))
        return self.image_processor.postprocess(decoded, output_type=output_type)

    def enable_vae_tiling(self, tile_size: int | None = None) -> None:
        """Decode pictures larger than a tile piece by piece, in the memory that one piece takes.

        Args:
            tile_size: the side of a tile in pixels; None for the checkpoint's default size.

        Raises:
            ValueError: ``tile_size`` is below 8 latent positions.
        """
        self._vae.use_tiles(self.default_size[0] if tile_size is None else tile_size)

    def disable_vae_tiling(self) -> None:
        """Decode pictures whole again."""
        self._vae.tile_size = None

    def _check_quantized(self, quantized: bool | Collection[str]) -> frozenset[str]:
        """The parts to run in INT8: all that there are for True, else those named."""
        if quantized is False:
            return frozenset()
        named = isinstance(quantized, (list, tuple, set, frozenset)) and all(one in QUANTIZABLE for one in quantized)
        if quantized is not True and not named:
            raise ValueError(f"`quantized` must be True, False or some of {QUANTIZABLE}, got {shown(quantized)}.")
        wanted = self.quantized_parts if quantized is True else frozenset(quantized)
        missing = wanted - self.quantized_parts
        if missing or (quantized is True and not wanted):
            raise ValueError(
                f"There is no INT8 {' and '.join(sorted(missing)) or 'model'} for this folder: make it with "
                "quantize_models from the folder that convert_checkpoint wrote, and load the pipeline anew. A part "
                "that was kept as it was, since INT8 harmed it too much, has none."
            )
        return wanted

    def _or_default(self, name: str, value: float | None) -> float:
        return self.defaults[name] if value is None else value

    def _latent_shape(self, pictures: int, width: int, height: int) -> tuple[int, int, int, int]:
        return (pictures, self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def _size(self, width: int | None, height: int | None, images: list[Image.Image] | None) -> tuple[int, int]:
        own_width, own_height = self.default_size
        if images is not None and not self._models.static_shapes and (width is None or height is None):
            if len({image.size for image in images}) > 1:
                raise ValueError("`image` holds pictures of different sizes: give `height` and `width`.")
            own_width, own_height = fit_size(*images[0].size, own_width * own_height, self.size_factor)
        width, height = own_width if width is None else width, own_height if height is None else height
        for name, value in (("width", width), ("height", height)):
            value = check_whole(name, value, 1)
            if value % self.size_factor:
                below = max(1, value // self.size_factor) * self.size_factor
                raise ValueError(
                    f"`{name}` must be a multiple of {self.size_factor}, got {value}; the nearest are {below} and "
                    f"{below + self.size_factor}."
                )
        if self._models.static_shapes and (width, height) != self.default_size:
            raise ValueError(
                f"On this device pictures are {self.default_size[0]}x{self.default_size[1]} pixels, got "
                f"{width}x{height}: leave out `width` and `height`, or choose another device."
            )
        return int(width), int(height)

    def _image_latents(
        self,
        images: list[Image.Image],
        size: tuple[int, int],
        pictures: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Latents of the source pictures, one for each picture to make."""
        pixels = self.image_processor.preprocess(images, width=size[0], height=size[1])
        if isinstance(generator, list):  # every picture draws its own
            pixels = pixels.repeat_interleave(pictures // len(pixels), dim=0)
        clean = self.encode_image(pixels, generator)
        return clean.repeat_interleave(pictures // len(clean), dim=0)


@dataclass(frozen=True)
class _Inputs:
    """What one run starts from, all of it checked."""

    prompts: list[str]
    negatives: list[str] | None  # None without guidance
    images: list[Image.Image] | None
    size: tuple[int, int]
    num_images_per_prompt: int
    latents: torch.Tensor | None


def _unet_factor(config: dict[str, Any]) -> int:
    if "configurations" in config:
        return 2 ** sum(config["configurations"]["add_downsample"])
    return 2 ** (len(config["block_out_channels"]) - 1)
