"""Train the embedded checkpoint's U-Net-NAS and text encoder together: ``python -m training.train_denoiser``.

Pictures are drawn and encoded once. Then the denoiser learns to predict v (Salimans & Ho 2022, arXiv 2202.00512,
section 2.4) on the latents, with one caption in ten dropped, so that classifier-free guidance and negative prompts
work. Errors count more where an object stands: a place fills most of a picture, and is learned much earlier. The
exponential moving average of the weights is written.
"""

import argparse
import os
from collections import deque
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPTokenizer

from training.artwork import fetch_artwork
from training.checkpoint_files import load_parts, write_checkpoint
from training.common import (
    autocast,
    fastest_precision,
    fingerprint,
    held_rate,
    pick_device,
    read_file,
    resume,
    save_state,
    step_generator,
    write_file,
)
from training.models import MAX_TOKENS, SIDE, VAE_FACTOR, make_scheduler, make_text_encoder, make_unet
from training.optimizers import MatrixOptimizer
from training.scenes import APART, LEFTS, SHARES, SIZES, TOP, Scene, draw_some
from training.teach_to_read import teach_to_read
from training.tokenizer import make_tokenizer

RUNS = Path(__file__).parent / "runs"
CHUNK = 32  # number of pictures that a process draws at a time
CAPTION_DROPOUT = 0.1
OBJECT_WEIGHT = 3.0  # weight of an error where an object stands, relative to errors elsewhere
EMA_DECAY = 0.9995


def object_weights(scene: Scene) -> torch.Tensor:
    """How much an error at each latent position counts, float16 [1, SIDE / 8, SIDE / 8]; the mean is 1."""
    weights = torch.ones(1, SIDE // VAE_FACTOR, SIDE // VAE_FACTOR)
    for item in scene.objects:
        top, left, side = (edge // VAE_FACTOR for edge in (item.top, item.left, item.side))
        weights[:, top : top + side, left : left + side] = OBJECT_WEIGHT
    return (weights / weights.mean()).half()


class Drawings(Dataset):
    """Scenes to train on, CHUNK at a time: pixels uint8 [CHUNK, SIDE, SIDE, 3], position weights, and captions."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return -(-self.count // CHUNK)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        scenes, captions, pictures = draw_some(min(CHUNK, self.count - i * CHUNK), f"{self.seed} {i}")
        return torch.from_numpy(pictures), torch.stack([object_weights(scene) for scene in scenes]), captions


def draw_and_encode(
    vae: AutoencoderKL, count: int, seed: int, precision: str, cache: Path
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Scaled latents [count, 4, SIDE / 8, SIDE / 8] in float16, the weights of their positions, and their captions.

    They are stored in a file, for resumed runs. All cores draw while the device encodes.
    """
    key = [count, CHUNK, seed, fingerprint(vae.parameters()), OBJECT_WEIGHT, [SIZES, LEFTS, TOP, APART, SHARES]]
    if (kept := read_file(cache, key)) is not None:
        return kept["latents"], kept["weights"], kept["captions"]
    fetch_artwork()  # once, before the worker processes need it
    device = pick_device()
    vae = vae.to(device)
    latents, weights, captions = [], [], []
    with tqdm(total=count, desc="drawing and encoding", unit="picture") as progress:
        for pictures, weight, said in DataLoader(Drawings(count, seed), batch_size=None, num_workers=os.cpu_count()):
            x = pictures.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad(), autocast(device, precision):
                mean = vae.encode(x).latent_dist.mean
            latents.append((mean.float() * vae.config.scaling_factor).half().cpu())
            weights.append(weight)
            captions += said
            progress.update(len(said))
    latents, weights = torch.cat(latents), torch.cat(weights)
    write_file(cache, {"key": key, "latents": latents, "weights": weights, "captions": captions})
    return latents, weights, captions


class Denoiser(nn.Module):
    """The U-Net and the text encoder, which learn together: noisy latents, timesteps and token ids in, v out."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        text = self.text_encoder(input_ids).last_hidden_state
        return self.unet(noisy, timesteps, text).sample.float()


def draw_timesteps(count: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps to train at, int64 [count]: half spread over the whole schedule, the others where scenes form.

    The others follow a logit-normal distribution (Esser et al. 2024, arXiv 2403.03206, section 3.1) around the middle
    of the schedule, where the caption decides what the picture shows; later, that can be seen through the noise. Evenly
    spaced draws, each with a little jitter, vary less than independent ones.
    """
    device = generator.device
    uniform, shaping = (
        (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
        for n in (count // 2, count - count // 2)
    )
    normal = torch.special.ndtri(shaping.clamp(1e-4, 1 - 1e-4))
    share = torch.cat([uniform, torch.sigmoid(0.9 * normal + 0.1)])
    return (share * total).long().clamp(max=total - 1)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids, int64 [captions, 77], padded as in the pipeline."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def make_denoiser(tokenizer: CLIPTokenizer, start_from: Path | None, seed: int, reading: int) -> Denoiser:
    """A new denoiser with a pretrained text encoder, or the denoiser of a finished checkpoint, to train further."""
    torch.manual_seed(seed)
    if start_from is not None:
        parts = load_parts(start_from)
        denoiser = Denoiser(parts["unet"], parts["text_encoder"])
    else:
        denoiser = Denoiser(make_unet(), make_text_encoder(len(tokenizer)))
        denoiser.text_encoder.load_state_dict(_reading_encoder(tokenizer, reading, seed))
    if pick_device().type == "cpu":  # on CPUs fused attention is slower than plain products at these widths
        denoiser.unet.set_attn_processor(AttnProcessor())
        denoiser.text_encoder.config._attn_implementation = "eager"
    return denoiser.train()


def _reading_encoder(tokenizer: CLIPTokenizer, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a pretrained text encoder; stored in a file, for resumed runs."""
    key = [steps, seed, len(tokenizer)]
    if (kept := read_file(RUNS / "text_encoder.pt", key)) is None:
        encoder = make_text_encoder(len(tokenizer)).train()
        print(f"{teach_to_read(encoder, tokenizer, steps, seed=seed):.1f} % of answers right")
        kept = {"key": key, "weights": encoder.state_dict()}
        write_file(RUNS / "text_encoder.pt", kept)
    return kept["weights"]


def train(
    denoiser: Denoiser,
    latents: torch.Tensor,
    weights: torch.Tensor,
    input_ids: torch.Tensor,
    empty: torch.Tensor,
    options: argparse.Namespace,
    precision: str,
) -> EMAModel:
    """Run or resume the training; returns the averaged weights."""
    device, state_file = pick_device(), RUNS / "denoiser.pt"
    scheduler = make_scheduler()
    denoiser.to(device)
    optimizer = MatrixOptimizer(denoiser, options.rate, torch.bfloat16 if precision == "bf16" else torch.float32)
    average = EMAModel(denoiser.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75, foreach=True)
    # Without the number of steps, since a run may be made longer; with the device, since each kind draws other numbers.
    settings = [options.batch, options.rate, options.seed, device.type]
    key = [fingerprint(denoiser.parameters()), fingerprint([latents, weights]), *settings]
    start = resume(state_file, key, denoiser=denoiser, optimizer=optimizer, average=average)
    average.to(device)
    latents, weights, input_ids, empty = (kept.to(device) for kept in (latents, weights, input_ids, empty))
    losses, run = deque(maxlen=250), torch.compile(denoiser) if options.compile else denoiser
    progress = tqdm(
        range(start, options.steps), initial=start, total=options.steps, desc=f"denoiser ({precision})", unit="step"
    )
    for step in progress:
        generator = step_generator(options.seed, step, device)
        which = torch.randint(len(latents), (options.batch,), generator=generator, device=device)
        clean, ids = latents[which].float(), input_ids[which]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        timesteps = draw_timesteps(options.batch, scheduler.config.num_train_timesteps, generator)
        dropped = torch.rand(options.batch, generator=generator, device=device) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], empty, ids)
        with autocast(device, precision):
            v = run(scheduler.add_noise(clean, noise, timesteps), timesteps, ids)
        target = scheduler.get_velocity(clean, noise, timesteps)
        loss = ((v - target).square() * weights[which].float()).mean()
        optimizer.step(loss, options.rate * held_rate(step, options.steps))
        average.step(denoiser.parameters())
        losses.append(loss.detach())  # read only below: reading it makes a GPU wait
        if (step + 1) % 250 == 0 or step + 1 == options.steps:
            save_state(state_file, key, step + 1, denoiser=denoiser, optimizer=optimizer, average=average)
            progress.write(f"step {step + 1}: loss {torch.stack(list(losses)).mean().item():.4f}")
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reading-steps", type=int, default=600, help="steps to pretrain the text encoder alone")
    parser.add_argument("--pictures", type=int, default=100000)
    parser.add_argument("--precision", choices=("f32", "bf16"), help="default: whichever is faster here")
    parser.add_argument("--compile", action="store_true", help="takes three minutes at first, then a quarter faster")
    parser.add_argument("--vae", type=Path, default=RUNS / "vae", help="the folder that train_vae wrote")
    parser.add_argument("--start-from", type=Path, help="a finished checkpoint whose weights to train further")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/tiny-decidiffusion"))
    options = parser.parse_args()
    precision = options.precision or fastest_precision(pick_device())

    vae = AutoencoderKL.from_pretrained(options.vae).eval()
    latents, weights, captions = draw_and_encode(vae, options.pictures, options.seed, precision, RUNS / "latents.pt")
    if options.start_from is not None:
        tokenizer = CLIPTokenizer.from_pretrained(options.start_from / "tokenizer")
    else:
        tokenizer = make_tokenizer(captions, RUNS / "tokenizer")
    denoiser = make_denoiser(tokenizer, options.start_from, options.seed, options.reading_steps)
    ids, empty = token_ids(tokenizer, captions), token_ids(tokenizer, [""])[0]
    average = train(denoiser, latents, weights, ids, empty, options, precision)
    average.copy_to(denoiser.parameters())
    denoiser = denoiser.cpu().eval()
    write_checkpoint(
        options.output, vae.cpu(), denoiser.unet, denoiser.text_encoder, Path(tokenizer.name_or_path), make_scheduler()
    )


if __name__ == "__main__":
    main()
