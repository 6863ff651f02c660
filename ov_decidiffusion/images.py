"""PIL pictures <-> the tensors that the models take and give."""

import math

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture as an upright RGB one.

    EXIF rotation is applied, transparency is laid on white, and 16-bit and floating-point greys keep their
    range instead of being cut off.

    Raises:
        ValueError: not a PIL picture, or an empty one.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"`image` must be a PIL picture, got {type(image).__name__}.")
    if min(image.size) < 1:
        raise ValueError(f"`image` is empty: {image.width}x{image.height} pixels.")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    grey = np.nan_to_num(np.asarray(image, np.float32))
    if image.mode == "F" and grey.max(initial=0) <= 1:
        grey = grey * 255
    elif grey.max(initial=0) > 255:
        grey = grey / 257  # 65535 / 255
    return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def fit_size(width: int, height: int, max_area: int, factor: int) -> tuple[int, int]:
    """The size to generate at for a source picture: its own, unless that is too large.

    Args:
        width, height: of the source, in pixels.
        max_area: pixels; a larger source is scaled down to it, keeping its shape.
        factor: both sides are rounded to multiples of it, and are at least it.

    Returns:
        (width, height), in pixels, with an area of at most ``max_area`` wherever the factor allows it.
    """
    scale = min(1.0, math.sqrt(max_area / (width * height)))
    sides = [max(factor, round(side * scale / factor) * factor) for side in (width, height)]
    while sides[0] * sides[1] > max_area and max(sides) > factor:  # rounding up went past the area
        longer = sides.index(max(sides))
        sides[longer] -= factor
    return sides[0], sides[1]


def make_image_processor(vae_scale_factor: int) -> VaeImageProcessor:
    """diffusers' own conversion between pictures (0…255) and tensors [b, 3, H, W] in -1…1; Lanczos scaling."""
    return VaeImageProcessor(vae_scale_factor=vae_scale_factor, resample="lanczos")


def latents_to_rgb(latents: torch.Tensor) -> list[Image.Image]:
    """A quick look at latents [b, 4, h, w] without the decoder: their three strongest directions as RGB.

    The directions are those of the last entry, so that the steps of one denoising can be compared.

    Returns:
        b pictures of w x h pixels.
    """
    flat = latents.detach().float().flatten(2)  # [b, 4, h * w]
    centered = flat - flat.mean(dim=2, keepdim=True)
    basis = torch.linalg.svd(centered[-1], full_matrices=False).U[:, :3]
    shown = basis.T @ centered
    shown = (shown / (3 * shown.std(dim=2, keepdim=True).clamp_min(1e-6)) + 1) / 2
    pixels = (shown.clamp(0, 1) * 255).round().byte().unflatten(2, latents.shape[2:])
    return [Image.fromarray(one.numpy()) for one in pixels.permute(0, 2, 3, 1).contiguous()]
