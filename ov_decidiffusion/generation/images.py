"""PIL pictures, arrays and tensors -> the tensors that the models take, and back; sizes."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL import ExifTags, Image, ImageOps

from ov_decidiffusion.arguments import check_whole
from ov_decidiffusion.generation.colours import to_srgb

STRIP = 256  # rows of a large picture that are composited on a colour at a time
RESIZE_MODES = ("crop", "fill", "stretch")
PictureLike = Image.Image | np.ndarray | torch.Tensor
AREA_TOLERANCE = 0.15  # share of the default's area by which a size may differ, to be closer to a source's shape


@dataclass
class StableDiffusionOutput(BaseOutput):
    """What a call returns.

    Attributes:
        images: PIL pictures, or an array [b, H, W, 3] in 0…1 (np), or a tensor [b, 3, H, W] (pt, latent).
        nsfw_content_detected: the flag of the pipeline's ``safety_checker`` for each picture; None without one.
    """

    images: list[Image.Image] | Any  # Any: arrays and tensors; callers know which they asked for
    nsfw_content_detected: list[bool] | None = None


def to_pictures(image: Any, name: str = "image", behind: str = "white") -> list[Image.Image]:
    """Source pictures in any form, as upright RGB pictures.

    Args:
        image: a PIL picture; an array [H, W], [H, W, 3] or [b, H, W, 3], or with 4 channels, the fourth being opacity;
            a tensor [H, W], [3, H, W] or [b, 3, H, W]; or a list of these. Whole numbers are taken as 0…255, others as
            0…1, and tensors with negative numbers as -1…1, as in diffusers.
        name: the argument's name, for messages.
        behind: the colour that shows where a picture is transparent.

    Raises:
        ValueError: something else, or a picture that cannot be read.
    """
    if isinstance(image, (list, tuple)):
        return [picture for one in image for picture in to_pictures(one, name, behind)]
    if isinstance(image, Image.Image):
        return [to_rgb(image, name, behind)]
    if isinstance(image, torch.Tensor):
        return _tensor_to_pictures(image, name)
    if isinstance(image, np.ndarray):
        return _array_to_pictures(image, name, behind)
    raise ValueError(f"`{name}` must be a PIL picture, an array or a tensor, got {type(image).__name__}.")


def check_images(image: Any, prompts: int) -> list[Image.Image]:
    """One source picture, or one for each prompt, in RGB."""
    images = to_pictures(image)
    if len(images) not in (1, prompts):
        raise ValueError(f"`image` must be one picture or one for each of the {prompts} prompts, got {len(images)}.")
    return images


def check_masks(mask_image: Any, images: list[Image.Image]) -> list[Image.Image]:
    """A mask for each source picture, of its size, in grey (mode "L"): white is repainted, transparent areas are not.

    Args:
        mask_image: one mask, or one for each picture, in any form that ``to_pictures`` takes, of any size.

    Raises:
        ValueError: another number of masks.
    """
    masks = [mask.convert("L") for mask in to_pictures(mask_image, "mask_image", "black")]
    if len(masks) not in (1, len(images)):
        raise ValueError(
            f"`mask_image` must be one mask or one for each of the {len(images)} pictures, got {len(masks)}."
        )
    masks = masks * (len(images) // len(masks))
    return [resize(mask, image.size, "stretch") for mask, image in zip(masks, images, strict=True)]


def _tensor_to_pictures(tensor: torch.Tensor, name: str) -> list[Image.Image]:
    batch = tensor.detach().cpu()
    batch = batch[(None,) * max(0, 4 - batch.ndim)] if batch.ndim > 1 else batch
    if batch.ndim != 4 or batch.shape[1] not in (1, 3) or batch.is_complex():
        raise ValueError(f"`{name}` as a tensor must be [H, W], [3, H, W] or [b, 3, H, W], got {tuple(tensor.shape)}.")
    if batch.is_floating_point() and batch.numel() and batch.min() < -0.5 / 255:  # smaller ones: rounding errors
        batch = batch / 2 + 0.5
    array = batch.permute(0, 2, 3, 1)
    return _array_to_pictures(array.float().numpy() if array.is_floating_point() else array.numpy(), name, "white")


def _array_to_pictures(array: np.ndarray, name: str, behind: str) -> list[Image.Image]:
    batch = array[..., None] if array.ndim == 2 else array
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4) or 0 in batch.shape or array.dtype.kind not in "fiub":
        raise ValueError(
            f"`{name}` as an array must be [H, W], [H, W, 3 or 4] or [b, H, W, 3 or 4] of numbers, got {array.shape} "
            f"of {array.dtype}."
        )
    values = batch.astype(np.float32) * (255 if array.dtype.kind in "fb" else 1)
    if not np.isfinite(values).all() or values.min() < -0.5 or values.max() > 255.5:
        allowed = "0…1" if array.dtype.kind == "f" else "0…255"
        raise ValueError(
            f"`{name}` as an array of {array.dtype} must be in {allowed}, got {array.min()} to {array.max()}."
        )
    pixels = values.round().clip(0, 255).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*batch.shape[:3], max(3, batch.shape[3])))
    return [to_rgb(Image.fromarray(np.ascontiguousarray(one)), name, behind) for one in pixels]


def to_rgb(image: Image.Image, name: str = "image", behind: str = "white") -> Image.Image:
    """Any PIL picture as an upright RGB one.

    EXIF rotation and colour profiles are applied, transparent pictures are composited on white or another colour, and
    16-bit and floating-point greys are scaled instead of being cut off.

    Raises:
        ValueError: not a PIL picture, an empty one, or a file that is cut short or damaged.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"`{name}` must be a PIL picture, got {type(image).__name__}.")
    if min(image.size) < 1:
        raise ValueError(f"`{name}` is empty: {image.width}x{image.height} pixels.")
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")  # PGM's greys
    try:
        image.load()
        image = upright(image)
    except Exception as error:  # PIL's readers raise a dozen kinds of errors for damaged files
        raise ValueError(f"`{name}` cannot be read, it may be cut short or damaged: {error}") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(image, sixteen_bits)
    image = to_srgb(image)
    return _laid_on(image, behind) if image.has_transparency_data else image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """A picture rotated as its EXIF data says; the same object, not a copy as from PIL, if there is nothing to do."""
    return image if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else ImageOps.exif_transpose(image)


def with_alpha(image: Image.Image) -> Image.Image:
    """A picture in a mode with an alpha channel; the same object, not a copy as from PIL, if it has one."""
    return image if image.mode in ("RGBA", "LA") else image.convert("RGBA")


def _laid_on(image: Image.Image, behind: str) -> Image.Image:
    """A transparent picture on a colour, strip by strip: in one go it would take five times its own memory."""
    laid = Image.new("RGB", image.size)
    image = with_alpha(image)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGBA")
        ground = Image.new("RGBA", strip.size, behind)
        laid.paste(Image.alpha_composite(ground, strip).convert("RGB"), (0, top))
    return laid


def _wide_grey_to_rgb(image: Image.Image, sixteen_bits: bool) -> Image.Image:
    """Scale a grey picture to 0…255. 16 bits are 0…65535. "I" and "F" do not state their range, so it is guessed from
    the largest value: 1 (F only; up to 1.5, since resizing overshoots at edges), 255, or else 65535."""
    grey = np.array(image, np.float32)  # changed in place: a large one takes a quarter of a gigabyte
    largest = grey.max(initial=0, where=np.isfinite(grey))
    if image.mode == "F" and largest <= 1.5:
        grey *= 255
    elif sixteen_bits or largest > 255:
        grey /= 257  # 65535 / 255
    np.nan_to_num(grey, copy=False, nan=0, posinf=255, neginf=0)
    np.rint(grey.clip(0, 255, out=grey), out=grey)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def fit_size(width: int, height: int, area: int, factor: int) -> tuple[int, int]:
    """The size to generate at for a source picture: of the sizes with about ``area`` pixels, the closest to its shape.

    Args:
        width, height: the source's size in pixels.
        area: number of pixels of the default size; sizes may have up to 15 % more or fewer.
        factor: both sides are multiples of it.

    Returns:
        (width, height), in pixels.
    """
    units = area / factor**2
    most = max(1, math.floor(units * (1 + AREA_TOLERANCE)))
    least = units * (1 - AREA_TOLERANCE)
    candidates = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1) if i * j >= least]
    wanted = math.log(width / height)

    def distance(size: tuple[int, int]) -> tuple[float, ...]:
        shape = math.log(size[0] / size[1])
        return round(abs(shape - wanted), 9), abs(shape), abs(size[0] * size[1] - units)

    i, j = min(candidates or [(1, 1)], key=distance)
    return i * factor, j * factor


def choose_size(
    width: Any,
    height: Any,
    images: list[Image.Image] | None,
    default: tuple[int, int],
    factor: int,
    fixed: bool = False,
) -> tuple[int, int]:
    """The size of the pictures to make, in pixels.

    Args:
        width, height: as given by the caller. None: the default's, or with ``images`` what comes closest to their
            shape, given the other side if that is set.
        images: the source pictures, or None.
        default: (width, height).
        factor: both sides are multiples of it.
        fixed: whether the default is the only possible size.

    Raises:
        ValueError: a side is not a multiple of ``factor``, sources have different sizes, or the size is fixed.
    """
    own = default
    if images is not None and not fixed and (width is None or height is None):
        if len({image.size for image in images}) > 1:
            raise ValueError("`image` holds pictures of different sizes: give `height` and `width`.")
        own = fit_size(*images[0].size, default[0] * default[1], factor)
        shape = images[0].width / images[0].height
        if height is not None:  # the other side follows
            own = (_nearest(check_whole("height", height, 1) * shape, factor), own[1])
        elif width is not None:
            own = (own[0], _nearest(check_whole("width", width, 1) / shape, factor))
    chosen = []
    for name, asked, otherwise in (("width", width, own[0]), ("height", height, own[1])):
        value = otherwise if asked is None else check_whole(name, asked, 1)
        if value % factor:
            below = max(1, value // factor) * factor
            raise ValueError(
                f"`{name}` must be a multiple of {factor}, got {value}; the nearest are {below} and {below + factor}."
            )
        chosen.append(value)
    if fixed and tuple(chosen) != default:
        raise ValueError(
            f"On this device pictures are {default[0]}x{default[1]} pixels, got {chosen[0]}x{chosen[1]}: leave out "
            "`width` and `height`, or choose another device."
        )
    return chosen[0], chosen[1]


def _nearest(pixels: float, factor: int) -> int:
    """The multiple of a factor that is closest to a length, and at least the factor."""
    return max(1, round(pixels / factor)) * factor


def resize(picture: Image.Image, size: tuple[int, int], mode: str) -> Image.Image:
    """Bring a picture to a size (width, height).

    Args:
        mode: "crop" scales it to cover the size and cuts the rest off evenly; "fill" scales it to fit inside and
            repeats its edges around it; "stretch" changes its shape.
    """
    if picture.size == size:
        return picture
    if mode == "stretch":
        return picture.resize(size, Image.Resampling.LANCZOS)
    if mode == "crop":
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    scale = min(size[0] / picture.width, size[1] / picture.height)
    within = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    inside = picture.resize(within, Image.Resampling.LANCZOS)
    left, top = ((size[i] - inside.size[i]) // 2 for i in (0, 1))
    around = ((top, size[1] - inside.height - top), (left, size[0] - inside.width - left), (0, 0))
    around = around[: np.asarray(inside).ndim]
    return Image.fromarray(np.pad(np.asarray(inside), around, "edge"))


def make_image_processor(vae_scale_factor: int) -> VaeImageProcessor:
    """diffusers' own conversion between pictures (0…255) and tensors [b, 3, H, W] in -1…1, with Lanczos scaling."""
    return VaeImageProcessor(vae_scale_factor=vae_scale_factor, resample="lanczos")
