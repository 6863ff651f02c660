"""Checks whether a change of the code changed any picture: ``python -m benchmarks.picture_hashes FILE``.

Draws 60 pictures of the embedded checkpoint in f32: all tasks, presets, samplers, masks, long prompts, lists of seeds,
embeddings and tiles. If ``FILE`` does not exist, their hashes are written to it; otherwise they are compared with it.
Hashes are equal only on the same machine with the same libraries.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from ov_decidiffusion import OVStableDiffusionPipeline, convert_checkpoint, quantize_models

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "tiny-decidiffusion"
PROMPT = "a fox in the snow"
STEPS = 4
SOLVERS = (
    *("ddim", "ddpm", "plms", "euler", "euler karras", "euler a", "heun", "lms", "lms karras", "dpm2", "dpm2 a"),
    *("dpm++ 2m", "dpm++ 2m karras", "dpm++ 2m sde", "dpm++ 2m sde karras", "dpm++ 2s", "unipc", "unipc karras"),
    *("deis", "squeezed"),
)


def source(width: int = 128, height: int = 128) -> Image.Image:
    """A picture to start from: a gradient with a disc on it."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, np.full_like(rows, 90)], axis=-1)
    picture = Image.fromarray(pixels.astype(np.uint8))
    ImageDraw.Draw(picture).ellipse([width // 4, height // 4, width // 2, height // 2], fill=(220, 40, 30))
    return picture


def mask(width: int = 128, height: int = 128) -> Image.Image:
    """A mask that is white on its right half."""
    made = Image.new("L", (width, height))
    made.paste(255, [width // 2, 0, width, height])
    return made


def calls(pipe: OVStableDiffusionPipeline) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the arguments of each call."""
    quick = {"prompt": PROMPT, "seed": 1, "num_inference_steps": STEPS}
    edit = quick | {"image": source(), "strength": 0.75}
    for solver in SOLVERS:
        steps = {"num_inference_steps": 16} if solver == "squeezed" else {}
        yield f"solver {solver}", quick | {"solver": solver} | steps
    for preset in ("exact", "balanced", "fast"):
        yield f"preset {preset}", {"prompt": PROMPT, "seed": 2, "preset": preset}
        yield f"preset {preset} of a source", {"prompt": PROMPT, "seed": 2, "preset": preset, "image": source()}
    yield "negative prompt", quick | {"negative_prompt": "red"}
    yield "brackets", quick | {"prompt": "a (fox:1.4) in [the snow]"}
    yield "brackets as they stand", quick | {"prompt": "a (fox:1.4) in the snow", "prompt_syntax": False}
    yield "long prompt", quick | {"prompt": ", ".join([PROMPT] * 30)}
    yield "long negative prompt", quick | {"negative_prompt": ", ".join(["a red car"] * 40)}
    yield "two prompts", quick | {"prompt": [PROMPT, "an owl in a forest"]}
    yield "list of seeds", quick | {"seed": [3, 4, 5], "num_images_per_prompt": 3}
    yield (
        "list of generators",
        quick
        | {"seed": None, "generator": [torch.Generator().manual_seed(i) for i in (6, 7)]}
        | {"num_images_per_prompt": 2},
    )
    yield "one seed for three", quick | {"num_images_per_prompt": 3}
    yield "another size", quick | {"width": 192, "height": 64}
    yield "no guidance", quick | {"guidance_scale": 1.0}
    yield "guidance_rescale", quick | {"guidance_rescale": 0.9}
    yield "guidance_interval", quick | {"guidance_interval": (0.5, 5.0)}
    yield "guidance_cache_interval", quick | {"guidance_cache_interval": 2}
    yield "cache_interval", quick | {"cache_interval": 2, "num_inference_steps": 7}
    yield "cache_power", quick | {"cache_interval": 3, "cache_power": 2.0, "num_inference_steps": 10}
    yield "eta", quick | {"solver": "ddim", "eta": 0.7}
    yield "timesteps", quick | {"num_inference_steps": None, "solver": "dpm++", "timesteps": [950, 600, 300, 50]}
    yield "sigmas", quick | {"num_inference_steps": None, "solver": "euler", "sigmas": [14.0, 3.0, 0.8, 0.1]}
    yield "latents", quick | {"latents": torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(8))}
    embeds = pipe.encode_text([PROMPT, ""])
    yield "embeddings", quick | {"prompt": None, "prompt_embeds": embeds[:1], "negative_prompt_embeds": embeds[1:]}
    yield "INT8", quick | {"quantized": True}
    yield "INT8 U-Net", quick | {"quantized": ["unet"]}
    yield "tiny decoder", quick | {"decoder": "tiny"}
    yield "image-to-image", edit
    yield "image-to-image, euler a", edit | {"solver": "euler a"}
    yield "image-to-image of another shape", edit | {"image": source(200, 100)}
    yield (
        "image-to-image, filled",
        edit | {"image": source(200, 100), "resize_mode": "fill", "width": 128, "height": 128},
    )
    yield "image-to-image, seeds", edit | {"seed": [1, 2], "num_images_per_prompt": 2}
    yield "image-to-image of two", edit | {"prompt": [PROMPT] * 2, "image": [source(), mask()]}
    paint = edit | {"mask_image": mask()}
    yield "inpainting", paint
    yield "inpainting at full strength", paint | {"strength": None}
    yield "inpainting with an overlay", paint | {"overlay": True}
    yield (
        "inpainting what lies around",
        paint | {"padding_mask_crop": 8, "image": source(256, 192)} | {"mask_image": mask(256, 192)},
    )
    yield "inpainting, several", paint | {"num_images_per_prompt": 2}
    yield "tiles", quick | {"width": 192, "height": 192}


def draw(pipe: OVStableDiffusionPipeline) -> dict[str, str]:
    """The SHA-256 of each call's pixels, by the call's name."""
    hashes = {}
    for name, arguments in tqdm(list(calls(pipe)), desc="drawing", unit="call"):
        if name == "tiles":
            pipe.enable_vae_tiling(96)
        digest = hashlib.sha256()
        for picture in pipe(**arguments).images:
            digest.update(f"{picture.mode}{picture.size}".encode() + picture.tobytes())
        hashes[name] = digest.hexdigest()
        pipe.disable_vae_tiling()
    return hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a JSON file: written if it does not exist, otherwise compared with")
    parser.add_argument("--model-dir", type=Path, default=Path("outputs/picture_hashes/tiny-fp16"))
    options = parser.parse_args()
    folder = convert_checkpoint(CHECKPOINT, options.model_dir).model_dir
    quantize_models(folder)
    pipe = OVStableDiffusionPipeline.from_pretrained(folder, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    found = draw(pipe)
    if not options.file.exists():
        options.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{len(found)} hashes written to {options.file}")
        return
    before = json.loads(options.file.read_text(encoding="utf-8"))
    differing = [name for name in sorted(before.keys() | found.keys()) if before.get(name) != found.get(name)]
    print(f"{len(found) - len(differing)} of {len(before)} calls gave the same pictures")
    if differing:
        sys.exit(f"other pictures: {', '.join(differing)}")


if __name__ == "__main__":
    main()
