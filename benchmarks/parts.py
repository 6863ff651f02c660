"""How much each saving changes the models' outputs at full size: ``python -m benchmarks.parts``.

At each step of a guided 512x512 run of ten steps, the U-Net's outputs, with and without the prompt, are compared with
those of the INT8 model and of feature caching for the same latents. The decoder's picture is compared with that of the
INT8 decoder and of tiles. The weights are random: this shows that nothing breaks with size, not how a picture looks.
Results are written to ``benchmarks/results/parts.md``.
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.report import decibels, machine_facts, table
from benchmarks.run_one import PROMPT, SEED
from benchmarks.runs import GUIDANCE, HERE, RESULTS, Bench
from benchmarks.waterfall import prepare
from ov_decidiffusion.conversion.trace import psnr
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

STEPS = 10
AGES = (1, 2, 3)  # how many steps old the cached features are

Agreements = dict[str, list[float]]


@torch.no_grad()
def compare_steps(pipe: OVStableDiffusionPipeline, side: int) -> tuple[Agreements, torch.Tensor]:
    """Agreement in dB with the full U-Net in f32, by saving, with one value per step; and the final latents."""
    shape = (1, pipe.latent_channels, side // pipe.vae_scale_factor, side // pipe.vae_scale_factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    text = pipe.encode_text(["", PROMPT])
    for int8 in (False, True):
        pipe.unet.prepare_caching(int8)
    found, kept = defaultdict(list), []
    run = {"num_inference_steps": STEPS, "solver": "dpm++", "guidance_scale": GUIDANCE, "height": side, "width": side}
    for step in tqdm(pipe.denoise(PROMPT, latents=latents, **run), desc="comparing", total=STEPS):
        batch = torch.cat([latents, latents])
        whole, deep = pipe.unet.full(batch, step.timestep, text, keep_features=True)
        int8, int8_deep = pipe.unet.full(batch, step.timestep, text, keep_features=True, quantized=True)
        own = pipe.unet.shallow(batch, step.timestep, deep)
        int8_own = pipe.unet.shallow(batch, step.timestep, int8_deep, quantized=True)
        found["INT8"].append(psnr(int8.numpy(), whole.numpy()))
        found["top level on this step's own features"].append(psnr(own.numpy(), whole.numpy()))
        found["the same in INT8, against the INT8 U-Net"].append(psnr(int8_own.numpy(), int8.numpy()))
        for age in AGES[: len(kept)]:
            old_deep, old_int8_deep = kept[-age]
            cached = pipe.unet.shallow(batch, step.timestep, old_deep)
            in_int8 = pipe.unet.shallow(batch, step.timestep, old_int8_deep, quantized=True)
            found[f"caching, features {_steps(age)} old"].append(psnr(cached.numpy(), whole.numpy()))
            found[f"INT8 and caching, features {_steps(age)} old"].append(psnr(in_int8.numpy(), whole.numpy()))
        kept.append((deep, int8_deep))
        latents = step.latents
    return found, latents


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def compare_pictures(pipe: OVStableDiffusionPipeline, latents: torch.Tensor) -> dict[str, float]:
    """Agreement in dB with the picture that the decoder makes in f32 without tiles."""
    whole = pipe.decode_latents(latents, "np")
    found = {"INT8 decoder": psnr(pipe.decode_latents(latents, "np", quantized=("vae_decoder",)), whole)}
    pipe.enable_vae_tiling(whole.shape[1] // 2)
    found[f"tiles of {whole.shape[1] // 2} pixels"] = psnr(pipe.decode_latents(latents, "np"), whole)
    pipe.disable_vae_tiling()
    return found


def write(steps: Agreements, pictures: dict[str, float], side: int, folder: Path = RESULTS) -> str:
    """Write ``parts.md`` and return the Markdown."""
    rows = [[name, decibels(statistics.median(v)), decibels(min(v))] for name, v in sorted(steps.items())]
    rows += [[name, decibels(value), ""] for name, value in pictures.items()]
    text = (
        f"DeciDiffusion 1.0 in its real configuration and size, with random weights, {side}x{side}: agreement with the "
        f"whole models in f32, 20 log10(max / RMSE), over the {STEPS} steps of a run. Measured by `make benchmark` on "
        f"this machine:\n\n{machine_facts()}\n\n{table(['', 'median', 'lowest'], rows)}\n"
    )
    (folder / "parts.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="the folder for the full-size models; 7 GB")
    options = parser.parse_args()
    bench = Bench(options.work, options.work / "parts.json", {})
    prepare(bench, options.work)
    pipe = OVStableDiffusionPipeline.from_pretrained(bench.model_dir, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    side = pipe.default_size[0]
    steps, latents = compare_steps(pipe, side)
    print(write(steps, compare_pictures(pipe, latents), side))


if __name__ == "__main__":
    main()
