"""Train the embedded checkpoint's tiny autoencoder: ``python -m training.train_tiny_decoder CHECKPOINT``.

Its decoder learns to make the whole decoder's pictures of the same latents, those of scenes, and mixtures of two
scenes, which is what a denoiser predicts before it has made up its mind; its encoder learns the whole encoder's
latents. It is diffusers' ``AutoencoderTiny``, narrower than the one published for Stable Diffusion's latents (TAESD,
https://github.com/madebyollin/taesd), for pictures of 128 pixels need less.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn
from tqdm import tqdm

from ov_decidiffusion.folder import TINY_DECODER
from training.checkpoint_files import write_part
from training.common import (
    autocast,
    falling_rate,
    fastest_precision,
    optimizer_step,
    pick_device,
    step_generator,
)
from training.models import SIDE
from training.scenes import draw_scene, random_scene

MIXED_SHARE = 1 / 3  # of the latents
CHECKED = 200  # pictures at the end, none of them trained on


def make_tiny_autoencoder() -> AutoencoderTiny:
    """0.3 million parameters in the decoder, a tenth of that in the encoder, which is there for completeness."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(3, 3, 3, 1),
    )


@torch.no_grad()
def make_examples(vae: AutoencoderKL, count: int, seed: int, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents as the denoiser has them, float32 [count, 4, SIDE / 8, SIDE / 8], and the whole decoder's pictures of
    them, uint8 [count, 3, SIDE, SIDE]."""
    rng, generator, device = random.Random(seed), torch.Generator().manual_seed(seed), pick_device()
    vae = vae.to(device)
    all_latents, pictures = [], []
    for _ in tqdm(range(0, count, 20), desc="drawing, encoding and decoding", unit_scale=20, unit="picture"):
        scenes = np.stack([np.asarray(draw_scene(random_scene(rng), SIDE)) for _ in range(20)])
        x = torch.from_numpy(scenes).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
        with autocast(device, precision):
            latents = vae.encode(x).latent_dist.mode().float()
            mixed = torch.rand(20, 1, 1, 1, generator=generator) < MIXED_SHARE
            share = torch.where(mixed, torch.rand(20, 1, 1, 1, generator=generator), torch.ones(())).to(device)
            latents = share * latents + (1 - share) * latents.roll(1, 0)
            decoded = vae.decode(latents).sample.float()
        all_latents.append((latents * vae.config.scaling_factor).cpu())
        pictures.append((decoded.clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu())
    return torch.cat(all_latents)[:count], torch.cat(pictures)[:count]


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 -> -1…1."""
    return pictures.float() / 127.5 - 1


def train(
    tiny: AutoencoderTiny, latents: torch.Tensor, pictures: torch.Tensor, options: argparse.Namespace, precision: str
) -> None:
    """Minutes, so that an interrupted run begins again.

    Args:
        latents, pictures: as of ``make_examples``.
        options: ``steps``, ``batch``, ``rate`` and ``seed``.
    """
    device = pick_device()
    tiny.to(device).train()
    optimizer = torch.optim.AdamW(tiny.parameters(), weight_decay=1e-4)
    bar = tqdm(range(options.steps), desc=f"tiny decoder ({precision})", unit="step")
    for step in bar:
        which = torch.randint(len(latents), (options.batch,), generator=step_generator(options.seed, step))
        codes, target = latents[which].to(device), pixels(pictures[which]).to(device)
        with autocast(device, precision):
            made, read = tiny.decoder(codes).float(), tiny.encoder(target).float()
        loss = nn.functional.mse_loss(made, target) + 0.1 * nn.functional.l1_loss(made, target)
        loss = loss + 0.1 * nn.functional.mse_loss(read, codes)
        optimizer_step(optimizer, loss, options.rate * falling_rate(step, options.steps))
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")


@torch.no_grad()
def agreement(tiny: AutoencoderTiny, latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each picture against the whole decoder's, white and black being 255 apart."""
    made = torch.cat([tiny.decoder(codes).clamp(-1, 1) for codes in latents.split(20)])
    return 20 * torch.log10(2 / (made - pixels(pictures)).square().mean((1, 2, 3)).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("f32", "bf16"), help="default: whichever is faster here")
    options = parser.parse_args()
    precision = options.precision or fastest_precision(pick_device())
    vae = AutoencoderKL.from_pretrained(options.checkpoint / "vae").eval()
    latents, pictures = make_examples(vae, options.pictures + CHECKED, options.seed, precision)
    torch.manual_seed(options.seed)
    tiny = make_tiny_autoencoder()
    train(tiny, latents[CHECKED:], pictures[CHECKED:], options, precision)
    tiny = tiny.cpu().eval()
    found = agreement(tiny, latents[:CHECKED], pictures[:CHECKED])
    print(f"{found.mean():.1f} dB against the whole decoder, lowest {found.min():.1f}, on {CHECKED} latents")
    # What diffusers writes of the widths beside those that it takes would make it warn.
    write_part(tiny, options.checkpoint / TINY_DECODER, without=("block_out_channels",))


if __name__ == "__main__":
    main()
