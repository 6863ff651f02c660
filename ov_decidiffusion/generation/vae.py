"""Pixels <-> latents: the autoencoder of a model folder; it can decode large pictures in overlapping tiles."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from ov_decidiffusion.arguments import check_whole, shown
from ov_decidiffusion.model_folder.configs import vae_factor
from ov_decidiffusion.model_folder.layout import DEFAULTS_FILE, TINY_DECODER
from ov_decidiffusion.runtime.models import Models

OVERLAP = 0.25  # of a tile's side


class Autoencoder:
    """The encoder and the decoder of a model folder.

    Args:
        models: the compiled models.

    Attributes:
        config: the settings in the decoder's ``config.json``.
        scaling_factor: the autoencoder's latents times this factor are the U-Net's.
        scale_factor: pixels per latent position, along a side.
        tile_size: side of a tile in latent positions, or None to decode pictures whole.
    """

    def __init__(self, models: Models):
        self._models = models
        self.config = FrozenDict(models.vae_config)
        self.scaling_factor: float = models.vae_config["scaling_factor"]
        self.scale_factor: int = vae_factor(models.vae_config)
        self.tile_size: int | None = None

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Like ``AutoencoderKL.encode`` of diffusers: the distribution of a picture's latents, which are not scaled.

        Args:
            x: pixels [b, 3, H, W] in -1…1.
            return_dict: False returns a tuple.

        Returns:
            an output with ``latent_dist``.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        drawn_from = DiagonalGaussianDistribution(self._moments(x))
        return AutoencoderKLOutput(latent_dist=drawn_from) if return_dict else (drawn_from,)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Like ``AutoencoderKL.decode`` of diffusers: the picture of latents that are not scaled.

        Args:
            z: latents [b, 4, h, w].
            return_dict: False returns a tuple.
            generator: ignored; decoding draws no random numbers.

        Returns:
            an output with ``sample``, pixels [b, 3, H, W] in about -1…1.
        """
        from diffusers.models.autoencoders.vae import DecoderOutput

        pixels = self.to_pixels(z * self.scaling_factor)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def enable_tiling(self) -> None:
        """Decode pictures larger than the checkpoint's default size piece by piece."""
        self.use_tiles(self.config["sample_size"])

    def disable_tiling(self) -> None:
        """Decode pictures whole again."""
        self.tile_size = None

    def enable_slicing(self) -> None:
        """Changes nothing: pictures are decoded one at a time anyway."""

    def disable_slicing(self) -> None:
        """Changes nothing; see ``enable_slicing``."""

    def _moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Means and log variances, [b, 8, h, w], computed one picture at a time to keep memory low."""
        each = [self._models.run("vae_encoder", {"sample": one.numpy()})[0] for one in pixels.split(1)]
        return torch.from_numpy(np.concatenate(each))

    def to_latents(
        self,
        pixels: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        pictures: int | None = None,
    ) -> torch.Tensor:
        """Scaled latents, drawn from the encoder's distribution.

        Args:
            pixels: [b, 3, H, W] in -1…1.
            generator: one generator, or a list with one for each picture to make.
            pictures: number of pictures to make, a multiple of b; those of one source are neighbours. None: b.

        Returns:
            [pictures, 4, H / 8, W / 8]. Those of one source differ only with a list of generators.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # imports all models of diffusers

        moments = self._moments(pixels)
        times = 1 if pictures is None else pictures // len(pixels)
        if isinstance(generator, list):
            each = moments.repeat_interleave(times, dim=0).split(1)
            drawn = [DiagonalGaussianDistribution(one).sample(g) for one, g in zip(each, generator, strict=True)]
            return torch.cat(drawn) * self.scaling_factor
        drawn = DiagonalGaussianDistribution(moments).sample(generator)
        return drawn.repeat_interleave(times, dim=0) * self.scaling_factor

    def to_pixels(self, latents: torch.Tensor, quantized: bool = False, decoder: str = "whole") -> torch.Tensor:
        """Pixels [b, 3, H, W] in about -1…1 of scaled latents, decoded one picture at a time to keep memory low.

        Args:
            latents: [b, 4, h, w].
            quantized: run the whole decoder in INT8.
            decoder: "whole" or "tiny".
        """
        part, quantized = (TINY_DECODER, False) if decoder == "tiny" else ("vae_decoder", quantized)

        def decode_one(one: torch.Tensor) -> torch.Tensor:
            outputs = self._models.run(part, {"latent_sample": one.numpy()}, quantized=quantized)
            pixels = torch.from_numpy(outputs[0])
            if not torch.isfinite(pixels).all():
                raise FloatingPointError(
                    "The decoder gave NaN or infinity instead of a picture: are its weights damaged?"
                )
            return pixels

        own_scale = 1.0 if decoder == "tiny" else self.scaling_factor  # the tiny one takes the U-Net's latents
        scaled = (latents / own_scale).split(1)
        if self.tile_size is None:
            return torch.cat([decode_one(one) for one in scaled])
        return torch.cat([decode_in_tiles(decode_one, one, self.tile_size, self.scale_factor) for one in scaled])

    def use_tiles(self, tile_size: int) -> None:
        """Decode pictures larger than ``tile_size`` pixels piece by piece.

        Raises:
            ValueError: ``tile_size`` is below 8 latent positions.
        """
        check_whole("tile_size", tile_size, 8 * self.scale_factor)
        self.tile_size = tile_size // self.scale_factor

    def decoded_at_once(self, size: tuple[int, int]) -> tuple[int, int]:
        """The part (width, height) in pixels of a picture of this size that the decoder computes at a time."""
        if self.tile_size is None:
            return size
        return min(size[0], self.tile_size * self.scale_factor), min(size[1], self.tile_size * self.scale_factor)


def latent_preview(latents: torch.Tensor, colours: Any, scale: int) -> list[Image.Image]:
    """Pictures of latents without the decoder: a sum of one colour per channel, weighted by the latents.

    Args:
        latents: scaled latents [b, c, h, w].
        colours: c + 1 rows of red, green and blue in -1…1: one for each channel, and last the colour of latents of 0.
        scale: pixels per latent position, along a side.

    Raises:
        ValueError: ``colours`` has another form.
    """
    try:
        table = torch.tensor(colours, dtype=torch.float32)
        flat = latents.float().flatten(2).transpose(1, 2)  # [b, h * w, c]
        rgb = (flat @ table[:-1] + table[-1]).unflatten(1, latents.shape[2:])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{DEFAULTS_FILE}: latent_preview` must be {latents.shape[1] + 1} rows of 3 numbers, got {shown(colours)}."
        ) from error
    pixels = ((rgb / 2 + 0.5).nan_to_num(0.5).clamp(0, 1) * 255).round().byte().numpy()
    size = (latents.shape[3] * scale, latents.shape[2] * scale)
    return [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in pixels]


def decode_in_tiles(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, tile: int, scale: int
) -> torch.Tensor:
    """Decode tile by tile and blend the overlaps linearly, so that no seam shows.

    Args:
        decode: turns latents [1, c, h, w] into pixels [1, 3, scale * h, scale * w].
        latents: [1, c, h, w]; decoded in one piece if they are no larger than a tile.
        tile: side of a tile in latent positions, at least 4.
        scale: pixels per latent position, along a side.

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
    """Begins and ends of equally long windows that cover a length; neighbours overlap by at least ``overlap``."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def _ramps(begin: int, end: int, length: int, overlap: int, scale: int) -> torch.Tensor:
    """Weights for each pixel along one side of a tile: 1 inside, falling linearly towards ends with a neighbour."""
    pixels = scale * (end - begin)
    position = torch.arange(pixels) + 0.5
    weight = torch.ones(pixels)
    if begin > 0:
        weight = torch.minimum(weight, position / (scale * overlap))
    if end < length:
        weight = torch.minimum(weight, position.flip(0) / (scale * overlap))
    return weight
