"""Teach the embedded checkpoint a word that it does not know, in two minutes: what the tutorial does in PyTorch."""

import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.torch_modules import load_tokenizer, load_vae
from training.checkpoint_files import load_parts
from training.models import MAX_TOKENS, make_scheduler
from training.places import PLAIN, draw_place
from training.sampling import sample_latents
from training.scenes import SIDE, SIZES, TOP, middle_left, with_article

BATCH, RATE, GUIDANCE, STEPS = 16, 5e-4, 3.0, 20


def draw_heart(side: int) -> Image.Image:
    """A red heart on nothing, side x side pixels; the curve is that of https://mathworld.wolfram.com/HeartCurve.html."""
    big = 4 * side
    turns = np.linspace(0, 2 * math.pi, 200)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    corners = np.stack([0.5 + x / 36, 0.47 - y / 36], axis=1) * big
    picture = Image.new("RGBA", (big, big))
    ImageDraw.Draw(picture).polygon([tuple(corner) for corner in corners], (214, 40, 70, 255))
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def _pictures() -> tuple[list[str], torch.Tensor]:
    """Captions, and pixels [n, 3, SIDE, SIDE] in -1…1: the heart on every plain colour, at two sizes."""
    captions, pictures = [], []
    for color in PLAIN:
        place = f"on {with_article(color)} background"
        for size in ("", "large"):
            heart = draw_heart(SIZES[size])
            picture = draw_place(place, 0, SIDE).copy()
            picture.paste(heart, (middle_left(size), TOP[size][0]), heart)
            captions.append(with_article(f"{size} heart".strip()) + f" {place}")
            pictures.append(np.asarray(picture))
    return captions, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def teach_a_word(
    looks: int = 200, every: int = 50, prompt: str = "a heart on a white background", seed: int = 0
) -> Iterator[tuple[int, Image.Image]]:
    """Go on training the embedded checkpoint's U-Net and text encoder on hearts; nothing on disk changes.

    Args:
        looks: steps of training, of 16 pictures each.
        every: looks between two pictures.
        prompt: what to draw, always from the same noise.

    Yields:
        the looks so far, and the picture that the checkpoint draws then.
    """
    parts, tokenizer, scheduler = load_parts(EMBEDDED_CHECKPOINT), load_tokenizer(EMBEDDED_CHECKPOINT), make_scheduler()
    vae, unet, text_encoder = load_vae(EMBEDDED_CHECKPOINT), parts["unet"], parts["text_encoder"]

    def ids(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids

    captions, pixels = _pictures()
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    optimizer = torch.optim.AdamW([*unet.parameters(), *text_encoder.parameters()], lr=RATE)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for look in range(looks + 1):
        if look % every == 0:
            yield look, _draw(vae, unet, text_encoder(ids(["", prompt])).last_hidden_state, seed)
        chosen = rng.sample(range(len(captions)), BATCH)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        noisy = scheduler.add_noise(latents[chosen], noise, timesteps)
        text = text_encoder(ids([captions[i] for i in chosen])).last_hidden_state
        target = scheduler.get_velocity(latents[chosen], noise, timesteps)
        loss = nn.functional.mse_loss(unet(noisy, timesteps, text).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _draw(vae: nn.Module, unet: nn.Module, text: torch.Tensor, seed: int) -> Image.Image:
    """A picture for hidden states [2, n, d] of the empty prompt and of the prompt."""
    side = unet.config["sample_size"]
    noise = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(seed))
    latents = sample_latents(unet, text, noise, GUIDANCE, STEPS)
    pixels = vae.decode(latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0)
    return Image.fromarray(((pixels + 1) * 127.5).clamp(0, 255).byte().numpy())
