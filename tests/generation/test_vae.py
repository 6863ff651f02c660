"""Decoding in tiles: exact where a decoder is local, seamless where it is not, and as good as diffusers' own tiles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ov_decidiffusion.conversion.trace import psnr
from ov_decidiffusion.generation.vae import decode_in_tiles

PROMPT = "a fox in the snow"


@pytest.mark.parametrize(("height", "width", "tile"), [(16, 16, 16), (33, 16, 16), (40, 57, 16), (17, 90, 12)])
def test_a_decoder_that_looks_at_one_position_only_is_not_changed(height, width, tile):
    sizes = []

    def decode(latents):
        sizes.append(max(latents.shape[-2:]))
        return F.interpolate(latents[:, :3] * 2 + 1, scale_factor=8)

    latents = torch.randn((1, 4, height, width), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode_in_tiles(decode, latents, tile, 8), decode(latents))
    assert max(sizes[:-1]) <= tile


def test_tiles_are_as_close_to_the_whole_picture_as_those_of_diffusers(pipe, diffusers_components):
    latents = pipe(PROMPT, seed=1, width=256, height=192, output_type="latent").images
    whole = pipe.decode_latents(latents, "np")[0]
    pipe.enable_vae_tiling(128)
    try:
        tiled = pipe.decode_latents(latents, "np")[0]
        with pytest.raises(ValueError, match="`tile_size` must be a whole number of at least 64, got 8"):
            pipe.enable_vae_tiling(8)
    finally:
        pipe.disable_vae_tiling()
    np.testing.assert_array_equal(pipe.decode_latents(latents, "np")[0], whole)
    vae = diffusers_components["vae"]
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 128, 16
    with torch.no_grad():
        theirs = vae.decode(latents / pipe.vae_scaling_factor).sample[0].permute(1, 2, 0).numpy() / 2 + 0.5
    vae.disable_tiling()
    ours, others = psnr(tiled, whole), psnr(theirs.clip(0, 1), whole)
    print(f"256x192 in tiles of 128: {ours:.1f} dB from the whole picture, diffusers' tiles {others:.1f} dB")
    assert not np.array_equal(tiled, whole)
    assert ours > 20 and ours > others - 1


def test_a_source_is_encoded_once_for_all_its_pictures(pipe, monkeypatch):
    ran, run = [], pipe.models.run

    def counted(name, inputs, *more, **options):
        ran.append((name, len(next(iter(inputs.values())))))
        return run(name, inputs, *more, **options)

    monkeypatch.setattr(pipe.models, "run", counted)
    source = Image.new("RGB", (128, 128), "red")
    pipe("a fox", image=source, seed=[1, 2, 3], num_images_per_prompt=3, num_inference_steps=2, output_type="latent")
    assert [rows for name, rows in ran if name == "vae_encoder"] == [1]
