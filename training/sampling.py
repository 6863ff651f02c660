"""DDIM with classifier-free guidance in plain PyTorch, for trainings that need a denoiser's pictures."""

import torch
from torch import nn

from training.models import make_scheduler


@torch.no_grad()
def sample_latents(
    unet: nn.Module, hidden_states: torch.Tensor, noise: torch.Tensor, guidance_scale: float, steps: int
) -> torch.Tensor:
    """Scaled latents [b, 4, h, w] made from noise [b, 4, h, w].

    Args:
        unet: the denoiser.
        hidden_states: [2 b, n, d] from the text encoder: first those of the empty prompts, then those of the prompts.
        noise: the noise to start from.
        guidance_scale: the weight of classifier-free guidance.
        steps: number of steps.
    """
    scheduler, latents = make_scheduler(), noise
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps.to(noise.device):
        against, wanted = unet(torch.cat([latents] * 2), timestep, hidden_states).sample.float().chunk(2)
        guided = against + guidance_scale * (wanted - against)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
