"""Tasks: text-to-image, image-to-image and inpainting prepare their inputs differently, then run the same loop."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ov_decidiffusion.arguments import check_choice, check_flag, check_range, check_whole
from ov_decidiffusion.generation.config import GenerationConfig
from ov_decidiffusion.generation.denoise import DenoisingStep, InpaintBlend
from ov_decidiffusion.generation.images import RESIZE_MODES, check_images, check_masks, make_image_processor, resize
from ov_decidiffusion.generation.metadata import attach, sha256_of
from ov_decidiffusion.generation.plan import Plan
from ov_decidiffusion.generation.tensors import check_batch
from ov_decidiffusion.generation.vae import Autoencoder

DEFAULT_STRENGTH = 0.8  # of image-to-image
HALF_WHITE = 128  # of 255: from this grey on, a mask counts as white
MAX_PADDING = 100_000  # pixels
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Overlay:
    """The source pictures, to paste over the finished ones where their masks are black."""

    pictures: list[Image.Image]
    masks: list[Image.Image]
    box: Box | None  # the crop of the sources that the finished pictures show; None: all of them

    def lay(self, made: list[Image.Image], processor: VaeImageProcessor) -> list[Image.Image]:
        """Paste the sources over the finished pictures, at the sources' size; a source may have several pictures."""
        times = len(made) // len(self.pictures)
        return [
            processor.apply_overlay(self.masks[i // times], self.pictures[i // times], one, self.box)
            for i, one in enumerate(made)
        ]


@dataclass(frozen=True)
class Postprocess:
    """What is added to a run's decoded pictures: the source around them, and their settings."""

    overlay: Overlay | None
    arguments: list[dict[str, Any]]  # for each picture, what is written into it
    made_with: dict[str, Any]

    def apply(self, decoded: list[Image.Image], processor: VaeImageProcessor, step: DenoisingStep) -> list[Image.Image]:
        """The finished pictures of a step, from its decoded ones."""
        if self.overlay is not None:
            decoded = self.overlay.lay(decoded, processor)
        made_with = self.made_with
        if step.index + 1 < step.total:
            made_with = made_with | {"stopped_after_step": step.index + 1}
        several = len(decoded) > 1 and self.arguments[0] is self.arguments[1]
        return [
            attach(one, arguments, made_with | ({"picture": i} if several else {}))
            for i, (one, arguments) in enumerate(zip(decoded, self.arguments, strict=True))
        ]


@dataclass(frozen=True)
class SourceInputs:
    """The checked inputs of image-to-image and inpainting; the fields are the arguments of the same names."""

    images: list[Image.Image]
    masks: list[Image.Image] | None  # of the images' sizes, mode "L"; white is repainted
    padding_mask_crop: int | None
    overlay: bool
    strength: float
    resize_mode: str
    latents: torch.Tensor | None = None  # [b, 4, h, w], in place of images

    @property
    def shaping(self) -> list[Image.Image] | None:
        """The pictures whose shape the result takes by default; None if only a crop is worked on, or for latents."""
        return self.images if self.padding_mask_crop is None and self.latents is None else None

    @property
    def hashes(self) -> dict[str, list[str]]:
        """Hashes of the source pictures and masks, which are not saved with a picture's settings themselves."""
        if self.latents is not None:
            return {"image_sha256": [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in self.latents]}
        both = {"image": self.images, "mask_image": self.masks or []}
        return {f"{name}_sha256": [sha256_of(one) for one in pictures] for name, pictures in both.items() if pictures}


@dataclass(frozen=True)
class PreparedSources:
    """The sources, resized to the size of the pictures to make."""

    pictures: list[Image.Image]
    masks: list[Image.Image] | None
    strength: float
    overlay: Overlay | None
    latents: torch.Tensor | None = None  # in place of pictures


def check_sources(config: GenerationConfig, prompts: int, latent_channels: int) -> SourceInputs | None:
    """The checked inputs of image-to-image and inpainting; None for text-to-image.

    Args:
        config: the call's configuration.
        prompts: number of prompts.
        latent_channels: a tensor with this many channels is taken as latents, as in diffusers.

    Raises:
        ValueError: an argument is wrong, or lacks another one that it needs.
    """
    image, mask_image, strength = config.image, config.mask_image, config.strength
    padding_mask_crop, overlay, resize_mode = config.padding_mask_crop, config.overlay, config.resize_mode
    default = DEFAULT_STRENGTH if mask_image is None else 1
    if strength is not None:
        check_range("strength", strength, 0, 1)
        if image is None:
            raise ValueError("`strength` says how much of a source picture to redo: give the picture as `image`.")
    strength = float(default if strength is None else strength)
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    check_flag("overlay", overlay)
    if image is None and mask_image is not None:
        raise ValueError("`mask_image` says what of a picture to repaint: give the picture as `image`.")
    if mask_image is None and (padding_mask_crop is not None or overlay):
        name = "overlay" if padding_mask_crop is None else "padding_mask_crop"
        raise ValueError(f"`{name}` goes with a mask: give `image` and `mask_image` too.")
    if image is None:
        return None
    if isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == latent_channels:
        if mask_image is not None:
            raise ValueError("`image` must be pictures where a `mask_image` is given, got latents: decode them first.")
        latents = check_batch("image", image, latent_channels)
        if len(latents) not in (1, prompts):
            raise ValueError(f"`image` must hold latents of one picture or of each of {prompts}, got {len(latents)}.")
        return SourceInputs([], None, None, False, strength, resize_mode, latents)
    images = check_images(image, prompts)
    masks = None if mask_image is None else check_masks(mask_image, images)
    if padding_mask_crop is not None:
        check_whole("padding_mask_crop", padding_mask_crop, 0, MAX_PADDING)
        if len(images) > 1:
            raise ValueError(f"`padding_mask_crop` takes one picture at a time, got {len(images)} in `image`.")
        assert masks is not None  # else it was refused above
        if np.asarray(masks[0]).max() < HALF_WHITE:
            raise ValueError("`padding_mask_crop` works around the white of `mask_image`, which is black all over.")
    return SourceInputs(images, masks, padding_mask_crop, overlay, strength, resize_mode)


def prepare_sources(inputs: SourceInputs, size: tuple[int, int]) -> PreparedSources:
    """Resize source pictures and their masks to the size (width, height) of the pictures to make."""
    images, masks, mode = inputs.images, inputs.masks, inputs.resize_mode
    if inputs.latents is not None:
        return PreparedSources([], None, inputs.strength, None, inputs.latents)
    if masks is None:
        return PreparedSources([resize(one, size, mode) for one in images], None, inputs.strength, None)
    if inputs.padding_mask_crop is None:
        images, masks = ([resize(one, size, mode) for one in several] for several in (images, masks))
        return PreparedSources(images, masks, inputs.strength, Overlay(images, masks, None) if inputs.overlay else None)
    box = VaeImageProcessor.get_crop_region(masks[0], *size, pad=inputs.padding_mask_crop)
    processor = make_image_processor(1)

    def cut(one: Image.Image) -> Image.Image:
        resized = processor.resize(one.crop(box), size[1], size[0], resize_mode="fill")
        assert isinstance(resized, Image.Image)  # for a picture it returns a picture
        return resized

    picture, mask = cut(images[0]), cut(masks[0])
    return PreparedSources([picture], [mask.convert("L")], inputs.strength, Overlay(images, masks, box))


def prepare_latents(
    plan: Plan,
    vae: Autoencoder,
    sources: PreparedSources | None,
    latents: torch.Tensor | None,
    shape: tuple[int, ...],
) -> tuple[torch.Tensor, InpaintBlend | None]:
    """The latents that the loop starts from, and for inpainting what it keeps of the source.

    Noise is drawn in the same order as in diffusers.

    Args:
        plan: the run's plan.
        vae: the autoencoder.
        sources: the prepared sources; None for text-to-image.
        latents: noise to start from instead of drawn noise; text-to-image only.
        shape: the latents' shape [b, 4, h, w].
    """
    if sources is None:
        noise = randn_tensor(shape, generator=plan.generator) if latents is None else latents
        return noise * plan.scheduler.init_noise_sigma, None
    if sources.latents is not None:
        clean = sources.latents.repeat_interleave(shape[0] // len(sources.latents), dim=0)
        return _with_noise(clean, randn_tensor(shape, generator=plan.generator), plan), None
    pixels = make_image_processor(vae.scale_factor).preprocess(sources.pictures)
    if sources.masks is None:
        clean = vae.to_latents(pixels, plan.generator, pictures=shape[0])
        return _with_noise(clean, randn_tensor(shape, generator=plan.generator), plan), None
    # diffusers draws once per source for inpainting, and once per picture for image-to-image
    times = shape[0] // len(pixels)
    of_sources = plan.generator[::times] if isinstance(plan.generator, list) else plan.generator
    clean = vae.to_latents(pixels, of_sources).repeat_interleave(times, dim=0)
    noise = randn_tensor(shape, generator=plan.generator)
    noisy = noise * plan.scheduler.init_noise_sigma if sources.strength == 1 else _with_noise(clean, noise, plan)
    randn_tensor((len(pixels), *shape[1:]), generator=of_sources)  # diffusers encodes the masked sources too
    return noisy, InpaintBlend(clean, noise, _latent_mask(sources.masks, shape))


def _with_noise(clean: torch.Tensor, noise: torch.Tensor, plan: Plan) -> torch.Tensor:
    return plan.scheduler.add_noise(clean, noise, plan.timesteps[:1].repeat(len(clean)))


def _latent_mask(masks: list[Image.Image], shape: tuple[int, ...]) -> torch.Tensor:
    """The mask [b, 1, h, w] of latent positions, 1 where repainted; each one's first pixel decides, as in diffusers."""
    white = np.stack([np.asarray(mask) for mask in masks]) / 255 >= 0.5
    small = torch.nn.functional.interpolate(torch.from_numpy(white)[:, None].float(), size=shape[-2:])
    return small.repeat_interleave(shape[0] // len(masks), dim=0)
