"""The engine makes pictures: it puts the parts of a model folder together, and runs them for each call.

It is the module that brings in torch and diffusers; ``pipeline.py`` imports it while models compile.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from ov_decidiffusion.generation.config import GenerationConfig, ResolvedConfig
from ov_decidiffusion.generation.denoise import DenoisingStep, denoise
from ov_decidiffusion.generation.images import choose_size, make_image_processor
from ov_decidiffusion.generation.metadata import of_each, seeds_of, solver_of, versions
from ov_decidiffusion.generation.plan import Plan, make_plan
from ov_decidiffusion.generation.tasks import (
    Postprocess,
    SourceInputs,
    check_sources,
    prepare_latents,
    prepare_sources,
)
from ov_decidiffusion.generation.tensors import check_batch, check_latents, make_generator, unseeded_generator
from ov_decidiffusion.generation.text import Text, TextEncoder, check_text
from ov_decidiffusion.generation.unet import UNet
from ov_decidiffusion.generation.vae import Autoencoder, latent_preview
from ov_decidiffusion.model_folder.configs import read_origin, read_scheduler
from ov_decidiffusion.model_folder.defaults import read_defaults
from ov_decidiffusion.model_folder.integrity import explaining
from ov_decidiffusion.model_folder.layout import QUANTIZABLE
from ov_decidiffusion.model_folder.tokenizer import load_tokenizer
from ov_decidiffusion.runtime.memory import check_memory
from ov_decidiffusion.runtime.models import Models
from ov_decidiffusion.schedulers.registry import Scheduler, check_scheduler, make_scheduler

Pictures = list[Image.Image] | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class _Run:
    """The checked inputs of one run."""

    config: ResolvedConfig
    text: tuple[Text, Text]
    inputs: SourceInputs | None
    latents: torch.Tensor | None  # to start from instead of drawn noise
    shape: tuple[int, ...]  # of the latents
    size: tuple[int, int]  # (width, height) in pixels
    rows_at_once: int  # that the U-Net computes


class Engine:
    """The parts of a pipeline.

    Args:
        models: the compiled models.
        folder: the model folder that they were loaded from.

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
        self.unet = UNet(models)
        self.scheduler = scheduler
        self.latent_channels: int = models.unet_config["in_channels"]
        side = models.unet_config["sample_size"] * self.vae.scale_factor
        self.default_size = (side, side)
        self.image_processor = make_image_processor(self.vae.scale_factor)
        self.progress_bar_config: dict[str, Any] = {}

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        check_scheduler(scheduler)
        self._scheduler = scheduler

    def set_progress_bar_config(self, options: dict[str, Any]) -> None:
        """See ``OVStableDiffusionPipeline.set_progress_bar_config``."""
        known = inspect.signature(tqdm.__init__).parameters
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"tqdm has no option {unknown[0]!r}; it has {', '.join(list(known)[1:])}.")
        self.progress_bar_config = options

    def denoise(self, config: GenerationConfig) -> Iterator[DenoisingStep]:
        """Check all arguments, and return the loop."""
        with self.models.at_work():
            run, plan = self._prepare_run(config)
            if not all(plan.full_steps):
                self.unet.prepare_caching("unet" in plan.quantized)
            return self._count(self._run(run, plan))

    def _prepare_run(self, config: GenerationConfig) -> tuple[_Run, Plan]:
        """All checks that come before the first step."""
        check_flag("prompt_syntax", config.prompt_syntax)
        text = check_text(config, self.models.unet_config["cross_attention_dim"])
        prompts = len(text[0])
        pictures = prompts * check_whole("num_images_per_prompt", config.num_images_per_prompt, 1)
        inputs = check_sources(config, prompts, self.latent_channels)
        if inputs is not None and config.latents is not None:
            raise ValueError("`latents` starts text-to-image; it cannot be given together with `image`.")
        size = self._size(config, inputs)
        shape = (pictures, self.latent_channels, *(side // self.vae.scale_factor for side in reversed(size)))
        latents = None if config.latents is None else check_latents("latents", config.latents, shape)
        generator = make_generator(config.generator, config.seed, pictures) or unseeded_generator()
        strength = None if inputs is None else inputs.strength
        plan = make_plan(config, self.scheduler, self.defaults, self.models, strength, generator)
        rows = pictures * (1 + (plan.config.guidance_scale > 1))
        coded = self.vae.decoded_at_once(size) if inputs is None else size  # sources are encoded in one piece
        rows_at_once = self.models.rows_at_once(rows, size, coded)
        width, height = size
        resolved = plan.config.with_values(seed=seeds_of(generator), width=width, height=height, strength=strength)
        return _Run(resolved, text, inputs, latents, shape, size, rows_at_once), plan

    def set_default_size(self, size: tuple[int, int]) -> None:
        """Change the size (width, height) in pixels of a picture when a call gives no size.

        Raises:
            ValueError: not a pair, or not a size that pictures can have.
        """
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ValueError(f"`default_size` must be (width, height), got {shown(size)}.")
        models = self.models
        self.default_size = choose_size(*size, None, self.default_size, models.size_factor, models.static_shapes)

    def _size(self, config: GenerationConfig, inputs: SourceInputs | None) -> tuple[int, int]:
        """(width, height) in pixels of the pictures to make."""
        shaping = None if inputs is None else inputs.shaping
        models, default = self.models, self.default_size
        source = None if inputs is None else inputs.latents
        given = getattr(config.latents if source is None else source, "shape", ())
        own = None if len(given) != 4 else (given[3] * self.vae.scale_factor, given[2] * self.vae.scale_factor)
        if own is not None and shaping is None and config.width is None and config.height is None:
            default = own  # the latents determine the size
        size = choose_size(config.width, config.height, shaping, default, models.size_factor, models.static_shapes)
        if source is not None and size != own:
            raise ValueError(
                f"`image` holds latents, which set the size: leave out `width` and `height`, got {size[0]}x{size[1]}."
            )
        return size

    def _count(self, run: Generator[DenoisingStep, None, None]) -> Iterator[DenoisingStep]:
        """Mark the models as at work while the loop makes a step, but not while it waits for the next request."""
        with contextlib.closing(run):
            while True:
                with self.models.at_work():
                    step = next(run, None)
                if step is None:
                    return
                yield step

    @torch.no_grad()
    def _run(self, run: _Run, plan: Plan) -> Generator[DenoisingStep, None, None]:
        """The loop; a generator, so that nothing is computed before the first step is requested."""
        config, inputs = run.config, run.inputs
        sources = None if inputs is None else prepare_sources(inputs, run.size)
        postprocess = Postprocess(
            overlay=None if sources is None else sources.overlay,
            arguments=of_each(config.to_save(), run.shape[0]),
            made_with=self._made_with(plan) | ({} if inputs is None else inputs.hashes),
        )
        texts = run.text if config.guidance_scale > 1 else run.text[:1]
        prompt_embeds = self.text_encoder.prepare(texts, config.num_images_per_prompt, config.prompt_syntax)
        latents, blend = prepare_latents(plan, self.vae, sources, run.latents, run.shape)
        yield from denoise(
            plan, self.unet, latents, prompt_embeds, self.progress_bar_config, blend, postprocess, run.rows_at_once
        )

    def _made_with(self, plan: Plan) -> dict[str, Any]:
        """What a picture depends on besides the arguments of the call."""
        return {
            **self.origin,
            "preset": plan.config.preset,
            "inference_precision": self.models.precision,
            "scheduler": type(plan.scheduler).__name__,
            "solver": solver_of(plan.scheduler),
            "versions": versions(),
        }

    def encode_prompt(self, prompts: list[str], prompt_syntax: bool) -> torch.Tensor:
        """Hidden states of prompts; see ``OVStableDiffusionPipeline.encode_text``."""
        with self.models.at_work():
            return self.text_encoder.encode(prompts, prompt_syntax)

    def encode_pair(self, config: GenerationConfig, guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states of prompts and negative prompts; see ``OVStableDiffusionPipeline.encode_prompt``."""
        with self.models.at_work():
            prompts, negative = check_text(config, self.models.unet_config["cross_attention_dim"])
            times = check_whole("num_images_per_prompt", config.num_images_per_prompt, 1)
            texts = (prompts, negative) if guided else (prompts,)
            states = self.text_encoder.prepare(texts, times, config.prompt_syntax)
            if not guided:
                return states, None
            against, wanted = states.chunk(2)
            return wanted, against

    def latent_preview(self, latents: Any, colours: Any) -> list[Image.Image]:
        """Coarse pictures of latents; see ``OVStableDiffusionPipeline.latent_preview``."""
        with self.models.at_work():
            return latent_preview(check_batch("latents", latents, self.latent_channels), colours, self.vae.scale_factor)

    def encode_image(
        self, pixels: Any, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Latents of pixels; see ``OVStableDiffusionPipeline.encode_image``."""
        with self.models.at_work():
            pixels = check_batch("pixels", pixels, 3, self.vae.scale_factor)
            size = pixels.shape[3], pixels.shape[2]
            check_memory(self.models.estimated_memory(0, size, size))
            return self.vae.to_latents(pixels, make_generator(generator, None, len(pixels)))

    def finish(self, step: DenoisingStep, output_type: str = "pil") -> Pictures:
        """The pictures of a step; see ``OVStableDiffusionPipeline.finish``."""
        check_choice("output_type", output_type, OUTPUT_TYPES[:-1])
        if not isinstance(step, DenoisingStep):
            raise ValueError(f"`step` must be one that denoise gave, got {shown(step)}.")
        postprocess = step.postprocess
        if output_type != "pil" and postprocess.overlay is None:
            return self.decode(step.latents, output_type, step.quantized, step.decoder)
        with self.models.at_work():
            decoded = self.decode(step.latents, "pil", step.quantized, step.decoder)
            pictures = postprocess.apply(decoded, self.image_processor, step)
            if output_type == "pil":
                return pictures
            array = self.image_processor.pil_to_numpy(pictures)
            return array if output_type == "np" else self.image_processor.numpy_to_pt(array)

    def decode(
        self,
        latents: Any,
        output_type: str = "pil",
        quantized: bool | Collection[str] = False,
        decoder: str = "whole",
    ) -> Pictures:
        """Pictures of latents; see ``OVStableDiffusionPipeline.decode_latents``."""
        check_choice("output_type", output_type, OUTPUT_TYPES[:-1])
        parts = check_quantized(quantized, self.models.quantized_parts, QUANTIZABLE)
        check_decoder(decoder, self.models.has_tiny_decoder)
        with self.models.at_work():
            latents = check_batch("latents", latents, self.latent_channels)
            size = latents.shape[3] * self.vae.scale_factor, latents.shape[2] * self.vae.scale_factor
            check_memory(self.models.estimated_memory(0, size, self.vae.decoded_at_once(size)))
            decoded = self.vae.to_pixels(latents, "vae_decoder" in parts, decoder)
            # Any: diffusers declares a single picture but returns a list of them.
            pictures: Any = self.image_processor.postprocess(decoded, output_type=output_type)
            return pictures
