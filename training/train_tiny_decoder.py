"""Train the embedded checkpoint's tiny autoencoder: ``python -m training.train_tiny_decoder CHECKPOINT``.

Its decoder learns to make the same pictures as the whole decoder, from three kinds of latents: those of scenes;
mixtures of two scenes, which resemble a denoiser's early predictions; and those that the denoiser makes. Its encoder
learns the whole encoder's latents. It is diffusers' ``AutoencoderTiny``, narrower than the one published for Stable
Diffusion's latents (TAESD, https://github.com/madebyollin/taesd), since pictures of 128 pixels need less.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from ov_decidiffusion.model_folder.layout import TINY_DECODER
from training.checkpoint_files import write_part
from training.common import (
    autocast,
    falling_rate,
    fastest_precision,
    optimizer_step,
    pick_device,
    step_generator,
)
from training.models import SIDE, VAE_FACTOR
from training.sampling import sample_latents
from training.scenes import draw_some
from training.train_denoiser import Denoiser, make_denoiser, token_ids

CHUNK = 60  # number of pictures at a time, a third of each kind
KINDS = ("scenes", "mixtures", "generated")
CHECKED = 4 * CHUNK  # number of pictures for the check at the end, none of them trained on
GUIDANCE, STEPS = 3.0, 10  # for the generated latents


def make_tiny_autoencoder() -> AutoencoderTiny:
    """A tiny autoencoder: 0.3 million parameters in the decoder, and a tenth of that in the encoder, which is there for
    completeness."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(3, 3, 3, 1),
    )


@torch.no_grad()
def make_examples(
    vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer, count: int, seed: int, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents, float32 [n, 4, SIDE / 8, SIDE / 8], and the whole decoder's pictures of them, uint8
    [n, 3, SIDE, SIDE]; n is ``count`` rounded up to whole CHUNKs. In each CHUNK, the first third are scenes, the next
    mixtures, and the last are made by the denoiser."""
    generator, device = torch.Generator().manual_seed(seed), pick_device()
    vae, denoiser = vae.to(device), denoiser.to(device).eval()
    all_latents, pictures, factor = [], [], vae.config.scaling_factor
    for number in tqdm(range(-(-count // CHUNK)), desc="making latents and pictures", unit=f"{CHUNK} pictures"):
        _, captions, drawn = draw_some(CHUNK, f"{seed} {number}")
        x = pixels(torch.from_numpy(drawn).permute(0, 3, 1, 2).to(device))
        noise = torch.randn((CHUNK // 3, 4, *(SIDE // VAE_FACTOR,) * 2), generator=generator).to(device)
        ids = token_ids(tokenizer, [""] * len(noise) + captions[: len(noise)]).to(device)
        share = torch.rand(CHUNK // 3, 1, 1, 1, generator=generator).to(device)
        with autocast(device, precision):
            plain, one, other = vae.encode(x).latent_dist.mode().float().chunk(3)
            hidden_states = denoiser.text_encoder(ids).last_hidden_state
            made = sample_latents(denoiser.unet, hidden_states, noise, GUIDANCE, STEPS)
            latents = torch.cat([plain, share * one + (1 - share) * other, made / factor])
            decoded = vae.decode(latents).sample.float()
        all_latents.append((latents * factor).cpu())
        pictures.append((decoded.clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu())
    return torch.cat(all_latents), torch.cat(pictures)


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Pixels as uint8 -> as float32 in -1…1."""
    return pictures.float() / 127.5 - 1


def train(
    tiny: AutoencoderTiny, latents: torch.Tensor, pictures: torch.Tensor, options: argparse.Namespace, precision: str
) -> None:
    """Train in place. It takes only minutes, so there is no saved state to resume from.

    Args:
        tiny: the tiny autoencoder.
        latents, pictures: from ``make_examples``.
        options: ``steps``, ``batch``, ``rate`` and ``seed``.
        precision: "f32" or "bf16".
    """
    device = pick_device()
    tiny.float().to(device, memory_format=torch.channels_last).train()  # a fifth faster on a CPU
    latents, pictures = latents.to(device), pictures.to(device)
    optimizer = torch.optim.AdamW(tiny.parameters(), weight_decay=1e-4)
    bar = tqdm(range(options.steps), desc=f"tiny decoder ({precision})", unit="step")
    for step in bar:
        generator = step_generator(options.seed, step, device)
        which = torch.randint(len(latents), (options.batch,), generator=generator, device=device)
        codes, target = latents[which], pixels(pictures[which])
        with autocast(device, precision):
            made, read = tiny.decoder(codes).float(), tiny.encoder(target).float()
        loss = nn.functional.mse_loss(made, target) + 0.1 * nn.functional.l1_loss(made, target)
        loss = loss + 0.1 * nn.functional.mse_loss(read, codes)
        optimizer_step(optimizer, loss, options.rate * falling_rate(step, options.steps))
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")


@torch.no_grad()
def agreement(tiny: AutoencoderTiny, latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each picture against the whole decoder's; the peak is the distance from black to white."""
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
    parser.add_argument("--start-from", type=Path, help="a tiny decoder's folder whose weights to train further")
    options = parser.parse_args()
    precision = options.precision or fastest_precision(pick_device())
    vae = AutoencoderKL.from_pretrained(options.checkpoint / "vae").eval()
    tokenizer = CLIPTokenizer.from_pretrained(options.checkpoint / "tokenizer")
    denoiser = make_denoiser(tokenizer, options.checkpoint, options.seed, reading=0)
    latents, pictures = make_examples(vae, denoiser, tokenizer, options.pictures + CHECKED, options.seed, precision)
    torch.manual_seed(options.seed)
    tiny = AutoencoderTiny.from_pretrained(options.start_from) if options.start_from else make_tiny_autoencoder()
    train(tiny, latents[CHECKED:], pictures[CHECKED:], options, precision)
    tiny = tiny.to("cpu", memory_format=torch.contiguous_format).eval()
    found = agreement(tiny, latents[:CHECKED], pictures[:CHECKED])
    by_kind = found.view(-1, 3, CHUNK // 3).mean(dim=(0, 2))
    said = ", ".join(f"{name} {value:.1f}" for name, value in zip(KINDS, by_kind.tolist(), strict=True))
    print(f"{found.mean():.1f} dB against the whole decoder ({said}), lowest {found.min():.1f}, on {CHECKED} latents")
    # diffusers also writes ``block_out_channels``, which it would warn about when it loads the decoder.
    write_part(tiny, options.checkpoint / TINY_DECODER, without=("block_out_channels",))


if __name__ == "__main__":
    main()
