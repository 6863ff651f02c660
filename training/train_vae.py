"""Train the embedded checkpoint's autoencoder: ``python -m training.train_vae``.

Loss: L1, with a larger weight at edges, and L1 of the differences between neighbouring pixels. In the first tenth of a
run from scratch, three of the four latent channels are drawn towards the picture's averages over 8x8 pixels; with this,
the autoencoder learns several times faster. After that they are free, since tied latents leave no room for details, and
only their size is bounded. Most of the run uses crops, which are cheaper; the last part uses whole pictures.
The decoder is given the latents' mean plus a small fixed noise; in a trial, sampling the posterior from the first step
on stopped learning early. Afterwards the posterior's variance is set to that of this noise, so that the encoder's
distribution matches what the decoder was trained on.
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
    fingerprint,
    optimizer_step,
    pick_device,
    resume,
    save_state,
    step_generator,
)
from training.models import LATENT_NOISE, SIDE, VAE_FACTOR, make_vae
from training.scenes import draw_scene, random_scene

RUNS = Path(__file__).parent / "runs"
CROP = 96  # pixels
WHOLE_SHARE = 0.3  # share of the steps, at the end, that use whole pictures
TIED_SHARE = 0.1  # share of the steps, at the start of a run from scratch, that tie latents to thumbnails
EDGE_WEIGHT = 5
GRADIENT_WEIGHT = 2
SIZE_WEIGHT = 0.1
THUMBNAIL_SCALE = 1.5  # brings the averages of pictures in -1…1 near unit variance


def draw_pictures(count: int, seed: int) -> torch.Tensor:
    """Pictures of scenes, uint8 [count, 3, SIDE, SIDE]; one in twenty has its colours and light changed, so that the
    autoencoder also handles source pictures from outside this world."""
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


def random_batch(pictures: torch.Tensor, batch: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Random pictures, float32 [batch, 3, side, side] in -1…1, each cropped at a random position of the latent grid."""
    which = torch.randint(len(pictures), (batch,), generator=generator)
    corners = VAE_FACTOR * torch.randint((pictures.shape[-1] - side) // VAE_FACTOR + 1, (batch, 2), generator=generator)
    cut = [pictures[i, :, y : y + side, x : x + side] for i, (y, x) in zip(which, corners.tolist(), strict=True)]
    return (torch.stack(cut).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def edge_weights(x: torch.Tensor) -> torch.Tensor:
    """Weights [b, 1, H, W] that make the few pixels near edges count more: fine outlines depend on them."""
    contrast = nn.functional.max_pool2d(x, 5, 1, 2) + nn.functional.max_pool2d(-x, 5, 1, 2)
    return 1 + EDGE_WEIGHT * (contrast.amax(dim=1, keepdim=True) > 0.2)


def gradient_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 loss of the differences between neighbouring pixels, across and down."""
    return (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()


def thumbnail_loss(latents: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of three latent channels from the picture's 8x8 averages."""
    return (latents[:, :3] - THUMBNAIL_SCALE * nn.functional.avg_pool2d(x, VAE_FACTOR)).square().mean()


def fix_posterior(vae: AutoencoderKL) -> None:
    """Make the encoder report LATENT_NOISE as its standard deviation, everywhere."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = 2 * math.log(LATENT_NOISE)


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[float, float]:
    """Reconstruction PSNR in dB (peak 255) and the latents' standard deviation."""
    x = pictures.to(vae.device).float() / 127.5 - 1
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
    vae = vae.float().to(device, memory_format=torch.channels_last)  # a third faster on CPUs
    for module in (vae.encoder, vae.quant_conv):
        module.requires_grad_(not options.decoder_only)
    scaling_factor = vae.config.scaling_factor
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=rate, weight_decay=1e-2)
    key = [fingerprint(vae.parameters()), vae.config.norm_num_groups, options.decoder_only, steps, batch, rate, seed]
    start = resume(state_file, key, vae=vae, optimizer=optimizer)
    vae.train()
    held = draw_pictures(32, seed + 1)
    pictures = draw_pictures(6000, seed)
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=f"autoencoder ({precision})", unit="step")
    for step in progress:
        generator = step_generator(seed, step)
        whole = step >= (1 - WHOLE_SHARE) * steps
        x = random_batch(pictures, batch, SIDE if whole else CROP, generator).to(device)
        with autocast(device, precision):
            latents = vae.encode(x).latent_dist.mean.float()
            noise = torch.randn(latents.shape, generator=generator).to(device)
            y = vae.decode(latents + LATENT_NOISE * noise).sample.float()
        loss = (edge_weights(x) * (y - x).abs()).mean() + GRADIENT_WEIGHT * gradient_loss(y, x)
        if not options.decoder_only:
            loss = loss + SIZE_WEIGHT * (latents.square().mean(dim=(0, 2, 3)) - 1).clamp(min=0).sum()
        if options.start_from is None and step < TIED_SHARE * steps:
            loss = loss + 0.5 * thumbnail_loss(latents, x)
        optimizer_step(optimizer, loss, rate * falling_rate(step, steps))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(state_file, key, step + 1, vae=vae, optimizer=optimizer)
            vae.eval()
            psnr, std = measure(vae, held)
            vae.train()
            progress.write(f"step {step + 1}: loss {loss.item():.4f}, {psnr:.1f} dB, latents' deviation {std:.2f}")
    vae = vae.cpu().eval()
    fix_posterior(vae)
    psnr, std = measure(vae, draw_pictures(64, seed + 1))
    vae.register_to_config(scaling_factor=scaling_factor if options.decoder_only else round(1 / std, 5))
    print(f"reconstruction {psnr:.1f} dB, latents' standard deviation {std:.3f}")
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("f32", "bf16"), help="default: whichever is faster here")
    parser.add_argument("--start-from", type=Path, help="an autoencoder whose weights to train further")
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder, so that denoisers stay valid")
    parser.add_argument("--output", type=Path, default=RUNS / "vae")
    options = parser.parse_args()
    precision = options.precision or fastest_precision(pick_device())
    vae = train(options, precision, RUNS / "vae.pt")
    vae.save_pretrained(options.output)


if __name__ == "__main__":
    main()
