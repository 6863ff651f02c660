"""Train the embedded checkpoint's autoencoder: ``python -m training.train_vae``.

Loss: L1, on random crops first (many pictures a step) and then on whole pictures: the group norms see a whole
picture's statistics in use, and a network that has only met crops gets the colours of whole pictures wrong.
The decoder sees the latents' mean plus a fixed small noise; sampling the posterior from the first step on was
seen to stop learning early. The posterior's variance is then set to that very noise, so that what the encoder's
distribution says is what the decoder was trained on.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from training.common import (
    autocast,
    falling_rate,
    fastest_precision,
    load_state,
    pick_device,
    save_state,
    step_generator,
)
from training.models import LATENT_NOISE, SIDE, make_vae
from training.scenes import draw_scene, random_scene

RUNS = Path(__file__).parent / "runs"
CROP = 64
EDGE_WEIGHT = 5
LATENT_PENALTY = 1e-3  # keeps the latents near unit scale, where the noise means something


def draw_pictures(count: int, seed: int) -> torch.Tensor:
    """uint8 [count, 3, SIDE, SIDE]; one in ten has its colours and its light changed, so that source
    pictures that are not from this world survive the autoencoder too."""
    rng = random.Random(seed)
    numbers = np.random.default_rng(seed)
    pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    for i in tqdm(range(count), desc="drawing", unit="picture"):
        picture = np.asarray(draw_scene(random_scene(rng), SIDE), np.float32)
        if rng.random() < 1 / 20:
            picture = picture[..., numbers.permutation(3)]
            across, down = numbers.uniform(-0.3, 0.3, 2)
            light = numbers.uniform(0.5, 1.1) + across * ramp[None, :] + down * ramp[:, None]
            picture = picture * light[..., None] + numbers.uniform(-30, 60, 3)
        pictures[i] = picture.clip(0, 255).round()
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def random_crops(pictures: torch.Tensor, batch: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [batch, 3, side, side] in -1…1."""
    which = torch.randint(len(pictures), (batch,), generator=generator)
    corners = torch.randint(SIDE - side + 1, (batch, 2), generator=generator)
    crops = [
        pictures[i, :, y : y + side, x : x + side] for i, (y, x) in zip(which.tolist(), corners.tolist(), strict=True)
    ]
    return torch.stack(crops).float() / 127.5 - 1


def edge_weights(x: torch.Tensor) -> torch.Tensor:
    """Weights [b, 1, H, W] that make the few pixels near edges count: small rings live or die by them."""
    contrast = nn.functional.max_pool2d(x, 5, 1, 2) + nn.functional.max_pool2d(-x, 5, 1, 2)
    return 1 + EDGE_WEIGHT * (contrast.amax(dim=1, keepdim=True) > 0.2)


def fix_posterior(vae: AutoencoderKL) -> None:
    """Make the encoder report LATENT_NOISE as its standard deviation, everywhere."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = 2 * math.log(LATENT_NOISE)


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[float, float]:
    """Reconstruction PSNR in dB (peak 255) and the latents' standard deviation."""
    x = pictures.float() / 127.5 - 1
    latents = vae.encode(x).latent_dist.mean
    y = vae.decode(latents).sample.clamp(-1, 1)
    error = ((x - y) * 127.5).square().mean().item()
    return 10 * math.log10(255**2 / error), latents.std().item()


def train(options: argparse.Namespace, precision: str, state_file: Path) -> AutoencoderKL:
    """Run or resume the training; returns the autoencoder on the CPU with its ``scaling_factor`` set."""
    steps, batch, rate, seed = options.steps, options.batch, options.rate, options.seed
    device = pick_device()
    torch.manual_seed(seed)
    vae = make_vae() if options.start_from is None else AutoencoderKL.from_pretrained(options.start_from)
    vae = vae.float()
    for module in (vae.encoder, vae.quant_conv):
        module.requires_grad_(not options.decoder_only)
    scaling_factor = vae.config.scaling_factor
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=rate, weight_decay=1e-2)
    start = 0
    key = [str(options.start_from), options.decoder_only, steps, seed]
    if (state := load_state(state_file)) is not None and state["key"] == key:
        vae.load_state_dict(state["vae"])
        vae.to(device)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    vae.to(device).train()
    pictures = draw_pictures(4000, seed)
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=f"autoencoder ({precision})", unit="step")
    for step in progress:
        generator = step_generator(seed, step)
        side, count = (CROP, batch) if step < options.crop_share * steps else (SIDE, max(1, batch * CROP**2 // SIDE**2))
        x = random_crops(pictures, count, side, generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = rate * falling_rate(step, steps)
        with autocast(device, precision):
            latents = vae.encode(x).latent_dist.mean.float()
            noise = torch.randn(latents.shape, generator=generator).to(device)
            y = vae.decode(latents + LATENT_NOISE * noise).sample.float()
        loss = (edge_weights(x) * (y - x).abs()).mean() + LATENT_PENALTY * latents.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 125 == 0 or step + 1 == steps:
            save_state(state_file, key=key, vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            progress.write(f"step {step + 1}: loss {loss.item():.4f}")
    vae = vae.cpu().eval()
    fix_posterior(vae)
    psnr, std = measure(vae, draw_pictures(64, seed + 1))
    vae.register_to_config(scaling_factor=scaling_factor if options.decoder_only else round(1 / std, 5))
    print(f"reconstruction {psnr:.1f} dB, latents' standard deviation {std:.3f}")
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("f32", "bf16"), help="default: whichever is faster here")
    parser.add_argument("--crop-share", type=float, default=0.4, help="of the steps, that see crops")
    parser.add_argument("--start-from", type=Path, help="an autoencoder whose weights to train on")
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder, so that a denoiser stays valid")
    parser.add_argument("--output", type=Path, default=RUNS / "vae")
    options = parser.parse_args()
    precision = options.precision or fastest_precision(pick_device())
    vae = train(options, precision, RUNS / "vae.pt")
    vae.save_pretrained(options.output)


if __name__ == "__main__":
    main()
