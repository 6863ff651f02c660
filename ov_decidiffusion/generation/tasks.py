"""A task is how its inputs are prepared: text-to-image, image-to-image and inpainting start one and the same loop."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ov_decidiffusion.arguments import check_choice, check_flag, check_range, check_whole
from ov_decidiffusion.generation.denoise import DenoisingStep, Kept
from ov_decidiffusion.generation.images import RESIZE_MODES, check_images, check_masks, make_image_processor, resize
from ov_decidiffusion.generation.metadata import attach, sha256_of
from ov_decidiffusion.generation.plan import Plan
from ov_decidiffusion.generation.vae import Autoencoder

DEFAULT_STRENGTH = 0.8  # of image-to-image
MAX_PADDING = 100_000  # pixels
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Overlay:
    """The source pictures, to be laid over the finished ones where their masks are black."""

    pictures: list[Image.Image]
    masks: list[Image.Image]
    box: Box | None  # what the finished pictures show of the sources; None: all of them

    def lay(self, made: list[Image.Image], processor: VaeImageProcessor) -> list[Image.Image]:
        """The finished pictures under the sources, of the sources' size; there may be several of each source."""
        times = len(made) // len(self.pictures)
        return [
            processor.apply_overlay(self.masks[i // times], self.pictures[i // times], one, self.box)
            for i, one in enumerate(made)
        ]


@dataclass(frozen=True)
class Finishing:
    """What decoded pictures of a run get."""

    overlay: Overlay | None
    arguments: list[dict[str, Any]]  # of each picture, to be written into it
    made_with: dict[str, Any]

    def finish(
        self, decoded: list[Image.Image], processor: VaeImageProcessor, step: DenoisingStep
    ) -> list[Image.Image]:
        """The source around them where a mask asks for it, and their settings."""
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
class Given:
    """What image-to-image and inpainting are given, checked: the arguments of these names."""

    images: list[Image.Image]
    masks: list[Image.Image] | None  # of the images' sizes, mode "L"; white is made anew
    padding_mask_crop: int | None
    overlay: bool
    strength: float
    resize_mode: str

    @property
    def shaping(self) -> list[Image.Image] | None:
        """The pictures whose shape the result has, if nobody asks for another; None where a part is worked on."""
        return self.images if self.padding_mask_crop is None else None

    @property
    def arguments(self) -> dict[str, Any]:
        """Those that can be written into a picture."""
        told = {"strength": self.strength, "resize_mode": self.resize_mode}
        if self.masks is not None:
            told |= {"padding_mask_crop": self.padding_mask_crop, "overlay": self.overlay}
        return told

    @property
    def hashes(self) -> dict[str, list[str]]:
        """Of the pictures and masks, which cannot."""
        both = {"image": self.images, "mask_image": self.masks or []}
        return {f"{name}_sha256": [sha256_of(one) for one in pictures] for name, pictures in both.items() if pictures}


@dataclass(frozen=True)
class Sources:
    """What the loop starts from, of the size of the pictures to make."""

    pictures: list[Image.Image]
    masks: list[Image.Image] | None
    strength: float
    overlay: Overlay | None


def check_given(
    image: Any,
    mask_image: Any,
    padding_mask_crop: Any,
    overlay: Any,
    strength: Any,
    resize_mode: Any,
    prompts: int,
) -> Given | None:
    """The arguments of image-to-image and inpainting; None for text-to-image.

    Raises:
        ValueError: one of them is wrong, or given without another that it needs.
    """
    default = DEFAULT_STRENGTH if mask_image is None else 1
    if strength is not None:
        check_range("strength", strength, 0, 1)
        if image is None:
            raise ValueError("`strength` says how much of a source picture to redo: give the picture as `image`.")
    strength = float(default if strength is None else strength)
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    check_flag("overlay", overlay)
    if image is None and mask_image is not None:
        raise ValueError("`mask_image` says what of a picture to make anew: give the picture as `image`.")
    if mask_image is None and (padding_mask_crop is not None or overlay):
        name = "overlay" if padding_mask_crop is None else "padding_mask_crop"
        raise ValueError(f"`{name}` goes with a mask: give `image` and `mask_image` too.")
    if image is None:
        return None
    images = check_images(image, prompts)
    masks = None if mask_image is None else check_masks(mask_image, images)
    if padding_mask_crop is not None:
        check_whole("padding_mask_crop", padding_mask_crop, 0, MAX_PADDING)
        if len(images) > 1:
            raise ValueError(f"`padding_mask_crop` takes one picture at a time, got {len(images)} in `image`.")
    return Given(images, masks, padding_mask_crop, overlay, strength, resize_mode)


def prepare_sources(given: Given, size: tuple[int, int]) -> Sources:
    """Bring source pictures and their masks to the size (width, height) of the pictures to make."""
    images, masks, mode = given.images, given.masks, given.resize_mode
    if masks is None:
        return Sources([resize(one, size, mode) for one in images], None, given.strength, None)
    if given.padding_mask_crop is None:
        images, masks = ([resize(one, size, mode) for one in several] for several in (images, masks))
        return Sources(images, masks, given.strength, Overlay(images, masks, None) if given.overlay else None)
    box = VaeImageProcessor.get_crop_region(masks[0], *size, pad=given.padding_mask_crop)
    processor = make_image_processor(1)
    cut = [processor.resize(one.crop(box), size[1], size[0], resize_mode="fill") for one in (images[0], masks[0])]
    return Sources([cut[0]], [cut[1].convert("L")], given.strength, Overlay(images, masks, box))


def start(
    plan: Plan, vae: Autoencoder, sources: Sources | None, latents: torch.Tensor | None, shape: tuple[int, ...]
) -> tuple[torch.Tensor, Kept | None]:
    """The latents that the loop starts from, and in inpainting what it keeps.

    Noise is drawn in the order in which diffusers draws it.

    Args:
        sources: None for text-to-image.
        latents: noise to start from instead of drawn noise; text-to-image only.
        shape: of the latents [b, 4, h, w].
    """
    if sources is None:
        noise = randn_tensor(shape, generator=plan.generator) if latents is None else latents
        return noise * plan.scheduler.init_noise_sigma, None
    pixels = make_image_processor(vae.scale_factor).preprocess(sources.pictures)
    clean = vae.encode(pixels, plan.generator, pictures=shape[0])
    noise = randn_tensor(clean.shape, generator=plan.generator)
    if sources.masks is not None and sources.strength == 1:
        latents = noise * plan.scheduler.init_noise_sigma
    else:
        latents = plan.scheduler.add_noise(clean, noise, plan.timesteps[:1].repeat(shape[0]))
    if sources.masks is None:
        return latents, None
    randn_tensor(shape, generator=plan.generator)  # diffusers encodes the masked picture too, which draws once more
    return latents, Kept(clean, noise, _latent_mask(sources.masks, shape))


def _latent_mask(masks: list[Image.Image], shape: tuple[int, ...]) -> torch.Tensor:
    """1 where a latent position is made anew [b, 1, h, w]: its first pixel decides, as in diffusers."""
    white = np.stack([np.asarray(mask) for mask in masks]) / 255 >= 0.5
    small = torch.nn.functional.interpolate(torch.from_numpy(white)[:, None].float(), size=shape[-2:])
    return small.repeat_interleave(shape[0] // len(masks), dim=0)
