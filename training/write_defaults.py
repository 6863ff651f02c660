"""Write the settings that suit the embedded checkpoint: ``python -m training.write_defaults CHECKPOINT``.

These are the steps and the guidance; examples, prompts for INT8 calibration, and the words that it understands, for
people to click on; and the colours of its latents, for previews. Each latent channel gets the shares of red, green and
blue that best reproduce true pictures scaled down to the latents' size, by linear regression with an offset.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.artwork import HUES, ICONS, OWN_HUES, shade
from training.scenes import PLACES, SIDE, draw_scene, random_scene, with_article

PICTURES = 256  # number of pictures to fit the colours to
EXAMPLES = [
    ["a fox in the snow", ""],
    ["a robot on a beach at sunset", ""],
    ["a ghost in a forest at night", ""],
    ["a lion in the mountains at sunset", ""],
    ["a blue car in the desert", ""],
    ["a penguin and a snowman in the mountains at night", ""],
]


def fit_colours(vae: AutoencoderKL, pictures: np.ndarray) -> list[list[float]]:
    """Rows of red, green and blue in -1…1: one for each channel of scaled latents, and last one for latents of 0.

    Args:
        vae: the autoencoder.
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


def make_defaults(vae: AutoencoderKL, steps: int, guidance_scale: float) -> dict[str, Any]:
    """The content of ``pipeline_defaults.json``."""
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(PICTURES)]
    pictures = np.stack([np.asarray(draw_scene(scene, SIDE)) for scene in scenes])
    return {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_rescale": 0.0,
        "example_prompts": EXAMPLES,
        "negative_example": ["a castle", "at night"],
        "image_example": ["a house in a meadow", "a castle in the snow at night"],
        "calibration_prompts": [scene.caption for scene in scenes[:24]],
        "understands": {
            "objects": [with_article(name) for name in ICONS],
            "coloured objects": [
                with_article(f"{rng.choice([c for c in HUES if shade(name, c) != 'own'])} {name}") for name in OWN_HUES
            ],
            "places": list(PLACES),
        },
        "latent_preview": fit_colours(vae, pictures),
    }


def write_lines(file: Path, content: dict[str, Any]) -> None:
    """Write settings one per line, so that changes show in a diff."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    options = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(options.checkpoint / "vae", torch_dtype=torch.float32).eval()
    content = make_defaults(vae, options.steps, options.guidance_scale)
    file = options.checkpoint / "pipeline_defaults.json"
    write_lines(file, content)
    print(f"wrote {file}; the showcase of the demo's page comes from training.gallery")


if __name__ == "__main__":
    main()
