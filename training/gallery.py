"""The pictures of the README and of the model card: ``python -m training.gallery``.

These use the first seeds, whatever the result: eight scenes for the README; and of the evaluation's single objects in
combinations that training never saw, every third, up to 48. The README's film shows the U-Net's input at each step, and
the picture that it predicts. The showcase of the demo's page, with picked seeds, goes into the checkpoint's
``pipeline_defaults.json``.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ov_decidiffusion import OVStableDiffusionPipeline
from ov_decidiffusion.analysis.pictures import picture_grid, save_film
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from training.evaluate import SINGLE, choose_cases, generate
from training.write_defaults import write_lines

PROMPTS = [
    "a rocket in space",
    "an owl in a forest at night",
    "a whale on the sea at sunset",
    "a castle in the mountains",
    "a robot in a city at night",
    "a sailboat on the sea",
    "a cactus in the desert at sunset",
    "a penguin and a snowman in the snow",
]
SHOWCASE = [  # the first is the large one
    ("a robot on a beach at sunset", 3),
    ("a rocket in space", 2),
    ("an owl in a forest at night", 4),
    ("a whale under water", 5),
    ("a castle and a balloon in a meadow", 3),
    ("a penguin and a snowman in the snow", 2),
    ("a ufo in the desert at night", 5),
]
FILMED = "a fox in the snow"
PICTURES, SHEET, FILM = (Path("docs") / name for name in ("pictures.png", "never-trained-on.png", "belief.gif"))


def beliefs(pipe: OVStableDiffusionPipeline, prompt: str, seed: int) -> list[Image.Image]:
    """For each step, the noisy picture that the U-Net is given, beside the clean one that it predicts."""
    frames = []
    side = pipe.default_size[0] // pipe.vae_scale_factor
    given = torch.randn(1, pipe.latent_channels, side, side, generator=torch.Generator().manual_seed(seed))
    for step in pipe.denoise(prompt, latents=given):
        left, right = (pipe.decode_latents(latents)[0] for latents in (given, step.predicted))
        frames.append(picture_grid([left, right], side=200))
        given = step.latents
    return frames


def write_showcase(pipe: OVStableDiffusionPipeline, checkpoint: Path) -> None:
    """Put the pictures that the demo's page starts with into a checkpoint's settings, as WebP."""
    shown = []
    for prompt, seed in SHOWCASE:
        file = io.BytesIO()
        Image.fromarray(np.asarray(pipe(prompt, seed=seed).images[0])).save(file, "WEBP", quality=90, method=6)
        shown.append({"prompt": prompt, "seed": seed, "webp": base64.b64encode(file.getvalue()).decode()})
    file = checkpoint / "pipeline_defaults.json"
    write_lines(file, json.loads(file.read_text(encoding="utf-8")) | {"showcase": shown})


def main() -> None:
    pipe = OVStableDiffusionPipeline.from_pretrained(EMBEDDED_CHECKPOINT, inference_precision="f32")
    pictures = pipe(PROMPTS, seed=list(range(len(PROMPTS)))).images
    PICTURES.parent.mkdir(exist_ok=True)
    picture_grid(pictures, PROMPTS, columns=4, side=200).save(PICTURES, optimize=True)
    cases = [case for case in choose_cases(240)["never trained on"] if case.scene.size in SINGLE][::3][:48]
    sheet = picture_grid(generate(pipe, cases), [case.caption for case in cases], columns=8, side=128)
    sheet.save(SHEET, optimize=True)
    save_film(beliefs(pipe, FILMED, seed=0), FILM, height=200, milliseconds=220)
    write_showcase(pipe, EMBEDDED_CHECKPOINT)
    print(f"wrote {PICTURES}, {SHEET}, {FILM} and the showcase")


if __name__ == "__main__":
    main()
