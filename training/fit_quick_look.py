"""Fit the colours of latents for quick looks: ``python -m training.fit_quick_look CHECKPOINT``.

Each channel of the latents is given the shares of red, green and blue that come closest to true pictures, made as
small as their latents: linear regression with an offset. What is found goes into the checkpoint's defaults.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.scenes import draw_scene, random_scene

PICTURES = 256


def fit(vae: AutoencoderKL, pictures: np.ndarray) -> list[list[float]]:
    """Rows of red, green and blue in -1…1 for each channel of scaled latents, and behind them for none.

    Args:
        pictures: uint8 [b, H, W, 3].
    """
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(one).latent_dist.mean for one in x.split(16)]) * vae.config.scaling_factor
    small = torch.nn.functional.adaptive_avg_pool2d(x, latents.shape[-2:])
    channels = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    with_offset = torch.cat([channels, torch.ones(len(channels), 1, dtype=torch.float64)], dim=1)
    found = torch.linalg.lstsq(with_offset, small.permute(0, 2, 3, 1).flatten(0, 2).double()).solution
    return [[round(value, 4) for value in row] for row in found.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    options = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(options.checkpoint / "vae", torch_dtype=torch.float32).eval()
    rng, side = random.Random(0), vae.config.sample_size
    pictures = np.stack([np.asarray(draw_scene(random_scene(rng), side)) for _ in range(PICTURES)])
    file = options.checkpoint / "pipeline_defaults.json"
    content = json.loads(file.read_text())
    content["quick_look"] = fit(vae, pictures)
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(content["quick_look"])


if __name__ == "__main__":
    main()
