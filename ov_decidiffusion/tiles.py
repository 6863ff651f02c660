"""Decode a large picture in overlapping tiles, which takes the memory of one tile."""

from collections.abc import Callable
from itertools import product

import torch

OVERLAP = 0.25  # of a tile's side


def decode_in_tiles(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, tile: int, scale: int
) -> torch.Tensor:
    """Decode tile by tile and blend the overlaps linearly, so that no seam shows.

    Args:
        decode: latents [1, c, h, w] to pixels [1, 3, scale * h, scale * w].
        latents: [1, c, h, w]; decoded in one piece if it is no larger than a tile.
        tile: side of a tile in latent positions, at least 4.
        scale: pixels to one latent position, along a side.

    Returns:
        pixels [1, 3, scale * h, scale * w].
    """
    height, width = latents.shape[-2:]
    if max(height, width) <= tile:
        return decode(latents)
    overlap = int(tile * OVERLAP)
    total = torch.zeros((1, 3, scale * height, scale * width))
    weights = torch.zeros((1, 1, scale * height, scale * width))
    for (top, bottom), (left, right) in product(_windows(height, tile, overlap), _windows(width, tile, overlap)):
        weight = _ramps(top, bottom, height, overlap, scale)[:, None] * _ramps(left, right, width, overlap, scale)
        region = (..., slice(scale * top, scale * bottom), slice(scale * left, scale * right))
        total[region] += decode(latents[..., top:bottom, left:right].contiguous()) * weight
        weights[region] += weight
    return total / weights


def _windows(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Beginnings and ends of equally long windows that cover a length, neighbours overlapping by at least so much."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def _ramps(begin: int, end: int, length: int, overlap: int, scale: int) -> torch.Tensor:
    """Weights along one side of a tile, in pixels: 1 inside, falling linearly towards sides with a neighbour."""
    pixels = scale * (end - begin)
    position = torch.arange(pixels) + 0.5
    weight = torch.ones(pixels)
    if begin > 0:
        weight = torch.minimum(weight, position / (scale * overlap))
    if end < length:
        weight = torch.minimum(weight, position.flip(0) / (scale * overlap))
    return weight
