"""What makes pictures: the parts of a model folder, put together for one run after the other.

This is where torch and diffusers come in; ``pipeline.py`` imports it while models compile.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from tqdm import tqdm

from ov_decidiffusion.arguments import (
    OUTPUT_TYPES,
    check_choice,
    check_decoder,
    check_flag,
    check_quantized,
    check_whole,
    shown,
)
from ov_decidiffusion.generation.denoise import Denoiser, DenoisingStep
from ov_decidiffusion.generation.images import choose_size, make_image_processor
from ov_decidiffusion.generation.metadata import of_each, seeds_of, solver_of, versions
from ov_decidiffusion.generation.plan import Plan, make_plan
from ov_decidiffusion.generation.tasks import Finishing, Given, check_given, prepare_sources, start
from ov_decidiffusion.generation.tensors import check_batch, check_latents, make_generator, unseeded_generator
from ov_decidiffusion.generation.text import Text, TextEncoder, check_text
from ov_decidiffusion.generation.vae import Autoencoder, quick_look
from ov_decidiffusion.model_folder.configs import read_origin, read_scheduler
from ov_decidiffusion.model_folder.defaults import read_defaults
from ov_decidiffusion.model_folder.integrity import explaining
from ov_decidiffusion.model_folder.layout import QUANTIZABLE
from ov_decidiffusion.model_folder.tokenizer import load_tokenizer
from ov_decidiffusion.runtime.memory import check_memory
from ov_decidiffusion.runtime.models import Models
from ov_decidiffusion.schedulers.registry import check_scheduler, make_scheduler

P = ParamSpec("P")
R = TypeVar("R")


def _at_work(method: "Callable[Concatenate[Engine, P], R]") -> "Callable[Concatenate[Engine, P], R]":
    """A method that the end of the process waits for."""

    @functools.wraps(method)
    def counted(self: "Engine", *args: P.args, **kwargs: P.kwargs) -> R:
        with self.models.at_work():
            return method(self, *args, **kwargs)

    return counted


class Engine:
    """The parts of a pipeline.

    Args:
        models: the compiled models.
        folder: that they came from.

    Raises:
        ValueError: the folder's tokenizer, scheduler or settings are damaged; the message names the file.
    """

    def __init__(self, models: Models, folder: Path):
        with explaining(folder, "loading"):
            tokenizer = load_tokenizer(folder)
            scheduler = make_scheduler(read_scheduler(folder))
            self.defaults = read_defaults(folder)
            self.origin = read_origin(folder)
            self.text_encoder = TextEncoder(models, tokenizer)
        self.models = models
        self.vae = Autoencoder(models)
        self.denoiser = Denoiser(models)
        self.scheduler = scheduler
        self.latent_channels: int = models.unet_config["in_channels"]
        side = models.unet_config["sample_size"] * self.vae.scale_factor
        self.default_size = (side, side)
        self.image_processor = make_image_processor(self.vae.scale_factor)
        self.progress_bar_config: dict[str, Any] = {}

    @property
    def scheduler(self) -> SchedulerMixin:
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerMixin) -> None:
        check_scheduler(scheduler)
        self._scheduler = scheduler

    def set_progress_bar_config(self, options: dict[str, Any]) -> None:
        """Arguments as ``OVStableDiffusionPipeline.set_progress_bar_config`` says."""
        known = inspect.signature(tqdm.__init__).parameters
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"tqdm has no option {unknown[0]!r}; it has {', '.join(list(known)[1:])}.")
        self.progress_bar_config = options

    @_at_work
    def denoise(
        self,
        *,
        prompt: Any,
        negative_prompt: Any,
        prompt_embeds: Any,
        negative_prompt_embeds: Any,
        prompt_syntax: Any,
        image: Any,
        mask_image: Any,
        padding_mask_crop: Any,
        overlay: Any,
        strength: Any,
        resize_mode: Any,
        height: Any,
        width: Any,
        num_images_per_prompt: Any,
        generator: Any,
        seed: Any,
        latents: Any,
        **planned: Any,
    ) -> Iterator[DenoisingStep]:
        """Check everything, and make the loop; arguments as ``OVStableDiffusionPipeline.denoise`` says.

        Args:
            planned: those of ``make_plan``.
        """
        check_flag("prompt_syntax", prompt_syntax)
        width_of_text = self.models.unet_config["cross_attention_dim"]
        text = check_text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, width_of_text, prompt_syntax)
        num_images_per_prompt = check_whole("num_images_per_prompt", num_images_per_prompt, 1)
        pictures = len(text[0]) * num_images_per_prompt
        given = check_given(image, mask_image, padding_mask_crop, overlay, strength, resize_mode, len(text[0]))
        if given is not None and latents is not None:
            raise ValueError("`latents` starts text-to-image; it cannot be given together with `image`.")
        shaping = None if given is None else given.shaping
        size = choose_size(
            width, height, shaping, self.default_size, self.models.size_factor, self.models.static_shapes
        )
        shape = (pictures, self.latent_channels, *(side // self.vae.scale_factor for side in reversed(size)))
        if latents is not None:
            latents = check_latents("latents", latents, shape)
        plan = make_plan(
            self.scheduler,
            self.defaults,
            self.models,
            strength=None if given is None else given.strength,
            generator=make_generator(generator, seed, pictures) or unseeded_generator(),
            **planned,
        )
        rows = pictures * (1 + (plan.guidance_scale > 1))
        coded = self.vae.decoded_at_once(size) if given is None else size  # encoded are sources in one piece
        check_memory(self.models.estimated_memory(rows, size, coded))
        if not all(plan.whole):
            self.denoiser.prepare_caching("unet" in plan.quantized)
        arguments = plan.arguments | {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_syntax": prompt_syntax,
            "num_images_per_prompt": num_images_per_prompt,
            "seed": seeds_of(plan.generator),
            "width": size[0],
            "height": size[1],
        }
        return self._count(self._run(plan, text, given, latents, shape, arguments))

    def _count(self, run: Generator[DenoisingStep, None, None]) -> Iterator[DenoisingStep]:
        """A loop that is at work while it makes a step, and not while it waits to be asked for the next."""
        with contextlib.closing(run):
            while True:
                with self.models.at_work():
                    step = next(run, None)
                if step is None:
                    return
                yield step

    @torch.no_grad()
    def _run(
        self,
        plan: Plan,
        text: tuple[Text, Text],
        given: Given | None,
        latents: torch.Tensor | None,
        shape: tuple[int, ...],
        arguments: dict[str, Any],
    ) -> Generator[DenoisingStep, None, None]:
        """The loop, from checked arguments; a generator, so that nothing is computed before it is asked for."""
        sources = None if given is None else prepare_sources(given, (arguments["width"], arguments["height"]))
        finishing = Finishing(
            overlay=None if sources is None else sources.overlay,
            arguments=of_each(arguments | ({} if given is None else given.arguments), shape[0]),
            made_with=self._made_with(plan) | ({} if given is None else given.hashes),
        )
        wanted = text if plan.guidance_scale > 1 else text[:1]
        times, syntax = arguments["num_images_per_prompt"], arguments["prompt_syntax"]
        prompt_embeds = self.text_encoder.prepare(wanted, times, syntax)
        latents, kept = start(plan, self.vae, sources, latents, shape)
        yield from self.denoiser.run(plan, latents, prompt_embeds, self.progress_bar_config, kept, finishing)

    def _made_with(self, plan: Plan) -> dict[str, Any]:
        """What a picture depends on beside the arguments of the call."""
        return {
            **self.origin,
            "preset": plan.preset,
            "inference_precision": self.models.number_format,
            "scheduler": type(plan.scheduler).__name__,
            "solver": solver_of(plan.scheduler),
            "versions": versions(),
        }

    @_at_work
    def encode_prompt(self, prompts: list[str], prompt_syntax: bool) -> torch.Tensor:
        """Hidden states of prompts, as ``OVStableDiffusionPipeline.encode_prompt`` says."""
        return self.text_encoder.encode(prompts, prompt_syntax)

    @_at_work
    def quick_look(self, latents: Any, colours: Any) -> list[Image.Image]:
        """Coarse pictures of latents, as ``OVStableDiffusionPipeline.quick_look`` says."""
        latents = check_batch("latents", latents, self.latent_channels)
        return quick_look(latents, colours, self.vae.scale_factor)

    @_at_work
    def encode_image(self, pixels: Any, generator: Any = None) -> torch.Tensor:
        """Latents of pixels; arguments as ``OVStableDiffusionPipeline.encode_image`` says."""
        pixels = check_batch("pixels", pixels, 3, self.vae.scale_factor)
        size = pixels.shape[3], pixels.shape[2]
        check_memory(self.models.estimated_memory(0, size, size))
        return self.vae.encode(pixels, make_generator(generator, None, len(pixels)))

    @_at_work
    def finish(self, step: DenoisingStep, output_type: str = "pil") -> list[Image.Image] | np.ndarray | torch.Tensor:
        """The pictures of a step; arguments as ``OVStableDiffusionPipeline.finish`` says."""
        check_choice("output_type", output_type, OUTPUT_TYPES[:-1])
        if not isinstance(step, DenoisingStep):
            raise ValueError(f"`step` must be one that denoise gave, got {shown(step)}.")
        finishing = step.finishing
        if output_type != "pil" and finishing.overlay is None:
            return self.decode(step.latents, output_type, step.quantized, step.decoder)
        decoded = self.decode(step.latents, quantized=step.quantized, decoder=step.decoder)
        pictures = finishing.finish(decoded, self.image_processor, step)
        if output_type == "pil":
            return pictures
        array = self.image_processor.pil_to_numpy(pictures)
        return array if output_type == "np" else self.image_processor.numpy_to_pt(array)

    @_at_work
    def decode(
        self,
        latents: torch.Tensor,
        output_type: str = "pil",
        quantized: bool | Collection[str] = False,
        decoder: str = "whole",
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Pictures of latents; arguments as ``OVStableDiffusionPipeline.decode_latents`` says."""
        check_choice("output_type", output_type, OUTPUT_TYPES[:-1])
        parts = check_quantized(quantized, self.models.quantized_parts, QUANTIZABLE)
        check_decoder(decoder, self.models.has_tiny_decoder)
        latents = check_batch("latents", latents, self.latent_channels)
        size = latents.shape[3] * self.vae.scale_factor, latents.shape[2] * self.vae.scale_factor
        check_memory(self.models.estimated_memory(0, size, self.vae.decoded_at_once(size)))
        decoded = self.vae.decode(latents, "vae_decoder" in parts, decoder)
        return self.image_processor.postprocess(decoded, output_type=output_type)
