"""Code as diffusers' documentation has it, for the type checker: it is read, and never run."""

import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from ov_decidiffusion import OVStableDiffusionPipeline, convert_checkpoint, settings_of


def use(checkpoint: str) -> list[Image.Image]:
    report = convert_checkpoint(checkpoint, weight_format="fp16")
    pipe = OVStableDiffusionPipeline.from_pretrained(report.model_dir, torch_dtype=torch.float32)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe = pipe.to("cpu")
    pipe.enable_vae_tiling()
    generator = torch.Generator("cpu").manual_seed(0)
    image = pipe(prompt="a fox", negative_prompt="rain", num_inference_steps=20, generator=generator).images[0]
    latents = pipe("a fox", output_type="latent").images
    other = pipe(prompt=["a fox"], image=latents, strength=0.5, guidance_scale=2.0).images[0]
    image.save("fox.png")
    seed: int = settings_of("fox.png")["seed"]
    return [image, other, *pipe("a fox", seed=seed).images]
