"""Everything to teach the embedded checkpoint a new word, except the training loop, which is in the tutorial."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw
from torch import nn
from transformers import CLIPTokenizer

from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.torch_modules import load_tokenizer, load_vae
from training.checkpoint_files import load_parts
from training.models import MAX_TOKENS, make_scheduler
from training.places import PLAIN, draw_place
from training.sampling import sample_latents
from training.scenes import SIDE, SIZES, TOP, middle_left, with_article

RATE, GUIDANCE, STEPS = 5e-4, 3.0, 20


def draw_heart(side: int) -> Image.Image:
    """A red heart on a transparent square, side x side pixels; curve: https://mathworld.wolfram.com/HeartCurve.html."""
    big = 4 * side
    turns = np.linspace(0, 2 * math.pi, 200)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    corners = np.stack([0.5 + x / 36, 0.47 - y / 36], axis=1) * big
    picture = Image.new("RGBA", (big, big))
    ImageDraw.Draw(picture).polygon([tuple(corner) for corner in corners], (214, 40, 70, 255))
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def _pictures(word: str, draw: Callable[[int], Image.Image]) -> tuple[list[str], torch.Tensor]:
    """Captions, and pixels [n, 3, SIDE, SIDE] in -1…1, of the drawing on every plain colour, at two sizes."""
    captions, pictures = [], []
    for color in PLAIN:
        place = f"on {with_article(color)} background"
        for size in ("", "large"):
            drawing = draw(SIZES[size])
            picture = draw_place(place, 0, SIDE).copy()
            picture.paste(drawing, (middle_left(size), TOP[size][0]), drawing)
            captions.append(with_article(f"{size} {word}".strip()) + f" {place}")
            pictures.append(np.asarray(picture))
    return captions, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass
class Lesson:
    """The embedded checkpoint in PyTorch, ready to be trained on pictures of one word; nothing on disk changes.

    Attributes:
        unet, text_encoder: the modules that learn.
        optimizer: the optimizer of the weights of both.
        scheduler: adds noise to latents (``add_noise``), and computes the training target (``get_velocity``).
        captions: the captions of the word's pictures.
        latents: the latents [n, 4, h, w] of the same pictures.
    """

    unet: nn.Module
    text_encoder: nn.Module
    vae: nn.Module
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    optimizer: torch.optim.Optimizer
    captions: list[str]
    latents: torch.Tensor

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Embeddings [n, 77, d] of texts, from the text encoder in its current state."""
        ids = self.tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        return self.text_encoder(ids).last_hidden_state

    @torch.no_grad()
    def draw(self, prompt: str, seed: int = 0) -> Image.Image:
        """The picture that the U-Net draws in its current state."""
        side = self.unet.config["sample_size"]
        noise = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(seed))
        latents = sample_latents(self.unet, self.embed(["", prompt]), noise, GUIDANCE, STEPS)
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample[0].permute(1, 2, 0)
        return Image.fromarray(((pixels + 1) * 127.5).clamp(0, 255).byte().numpy())


def prepare_lesson(word: str = "heart", draw: Callable[[int], Image.Image] = draw_heart) -> Lesson:
    """Load the embedded checkpoint in PyTorch, and draw the pictures to learn from.

    Args:
        word: the word for the drawing.
        draw: makes a square drawing with an alpha channel, given its side in pixels.
    """
    parts, vae = load_parts(EMBEDDED_CHECKPOINT), load_vae(EMBEDDED_CHECKPOINT)
    captions, pixels = _pictures(word, draw)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    unet, text_encoder = parts["unet"], parts["text_encoder"]
    optimizer = torch.optim.AdamW([*unet.parameters(), *text_encoder.parameters()], lr=RATE)
    tokenizer = load_tokenizer(EMBEDDED_CHECKPOINT)
    return Lesson(unet, text_encoder, vae, tokenizer, make_scheduler(), optimizer, captions, latents)
