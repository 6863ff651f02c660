"""DDIM with classifier-free guidance in plain PyTorch, for the trainings that need to see what a denoiser makes."""

import torch
from torch import nn

from training.models import make_scheduler


@torch.no_grad()
def sample_latents(
    unet: nn.Module, hidden_states: torch.Tensor, noise: torch.Tensor, guidance_scale: float, steps: int
) -> torch.Tensor:
    """Scaled latents [b, 4, h, w] made from noise [b, 4, h, w].

    Args:
        hidden_states: the text encoder's, [2 b, n, d]: of the empty prompts, then of the prompts.
    """
    scheduler, latents = make_scheduler(), noise
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps.to(noise.device):
        against, wanted = unet(torch.cat([latents] * 2), timestep, hidden_states).sample.float().chunk(2)
        guided = against + guidance_scale * (wanted - against)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
