"""Reads a generated picture back without any network: which shape, which colours, which size.

Colours are the nearest of the palette; shape and size are those of the drawn shape whose mask overlaps the
picture's object most.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from training.scenes import MAX_ROTATION, PALETTE, SHAPES, SIZES, shape_mask

MIN_OVERLAP = 0.5  # intersection over union below which there is no shape to speak of
RADII = np.linspace(0.16, 0.72, 29)
ROTATIONS = np.linspace(-MAX_ROTATION, MAX_ROTATION, 5)
SIZE_BORDER = (SIZES["small"][1] + SIZES["large"][0]) / 2


@dataclass(frozen=True)
class Reading:
    """What the oracle sees; None for what it cannot tell."""

    size: str | None
    color: str | None
    shape: str | None
    background: str | None
    overlap: float  # intersection over union with the best drawn shape


def read_picture(picture: Image.Image) -> Reading:
    """Read a square RGB picture that shows one object on a plain background."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    side = pixels.shape[0]
    if pixels.shape[:2] != (side, side):
        raise ValueError(f"`picture` must be square, got {picture.width}x{picture.height}.")
    background = _background(pixels)
    color = _object_color(pixels, background)
    if color is None:
        return Reading(None, None, None, background, 0.0)
    near_object = _distance(pixels, PALETTE[color]) < _distance(pixels, PALETTE[background])
    overlaps = _overlaps(near_object)
    best = int(overlaps.argmax())
    shape, radius = _templates(side)[1][best]
    overlap = float(overlaps[best])
    if overlap < MIN_OVERLAP:
        return Reading(None, color, None, background, overlap)
    return Reading("small" if radius < SIZE_BORDER else "large", color, shape, background, overlap)


def _distance(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.square(pixels - np.array(color, np.float32)).sum(axis=-1)


def _nearest_colors(pixels: np.ndarray) -> np.ndarray:
    return np.stack([_distance(pixels, color) for color in PALETTE.values()]).argmin(axis=0)


def _background(pixels: np.ndarray) -> str:
    """The commonest colour along the picture's rim."""
    rim = max(1, len(pixels) // 16)
    names = _nearest_colors(pixels)
    edge = np.concatenate([names[:rim].ravel(), names[-rim:].ravel(), names[:, :rim].ravel(), names[:, -rim:].ravel()])
    return list(PALETTE)[np.bincount(edge).argmax()]


def _object_color(pixels: np.ndarray, background: str) -> str | None:
    """The commonest other colour, away from edges, whose blends may look like a third colour."""
    names = _nearest_colors(pixels)
    foreground = names != list(PALETTE).index(background)
    inner = foreground.copy()
    for axis in (0, 1):
        inner &= np.roll(foreground, 1, axis) & np.roll(foreground, -1, axis)
    chosen = names[inner] if inner.any() else names[foreground]
    return list(PALETTE)[np.bincount(chosen).argmax()] if chosen.size else None


@cache
def _templates(side: int) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """Masks [n, side * side] of every shape at every radius and rotation, in the middle, and what each is."""
    masks, names = [], []
    for shape in SHAPES:
        for radius in RADII:
            for rotation in ROTATIONS:
                masks.append(shape_mask(shape, side, radius, (0.0, 0.0), rotation).ravel() > 0.5)
                names.append((shape, float(radius)))
    return np.array(masks, np.float32), names


def _overlaps(mask: np.ndarray) -> np.ndarray:
    """Intersection over union of a mask, moved to the middle, with every template."""
    if not mask.any():
        return np.zeros(len(_templates(len(mask))[1]))
    middle = (len(mask) - 1) / 2
    shift = [round(middle - float(where.mean())) for where in np.nonzero(mask)]
    centered = np.roll(mask, shift, axis=(0, 1)).ravel().astype(np.float32)
    masks, _ = _templates(len(mask))
    common = masks @ centered
    return common / (masks.sum(axis=1) + centered.sum() - common)
