"""Write and read the embedded checkpoint in the layout of DeciDiffusion's own repository."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from ov_decidiffusion.conversion.unet_nas import FlexibleUNet2DConditionModel
from ov_decidiffusion.model_folder.layout import TINY_DECODER

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "flexible_unet": ["ov_decidiffusion.conversion.unet_nas", "FlexibleUNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_part(model: ModelMixin, folder: Path, without: tuple[str, ...] = ()) -> None:
    """Write a model of diffusers in float16, and its settings except those in ``without`` and its path on the machine
    that trained it."""
    model.half().save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name in ("_name_or_path", *without):
        config.pop(name, None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_checkpoint(
    folder: Path,
    vae: AutoencoderKL,
    unet: FlexibleUNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer_folder: Path,
    scheduler: SchedulerMixin,
) -> None:
    """Write every part in float16. Other files in the folder (the model card, the defaults) stay, except a tiny decoder
    that was trained for another autoencoder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes() if weights.is_file() else None
    write_part(vae, folder / "vae")
    if weights.read_bytes() != before:
        shutil.rmtree(folder / TINY_DECODER, ignore_errors=True)
    write_part(unet, folder / "flexible_unet")
    scheduler.save_pretrained(folder / "scheduler")
    text_encoder.config.save_pretrained(folder / "text_encoder")
    # The names that transformers wrote when DeciDiffusion was released.
    weights = {f"text_model.{name}": value.half().contiguous() for name, value in text_encoder.state_dict().items()}
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    if tokenizer_folder.resolve() != (folder / "tokenizer").resolve():
        shutil.copytree(tokenizer_folder, folder / "tokenizer", dirs_exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def load_parts(folder: Path) -> dict[str, nn.Module]:
    """The trained modules of a checkpoint, in float32."""
    return {
        "unet": FlexibleUNet2DConditionModel.from_pretrained(folder / "flexible_unet", torch_dtype=torch.float32),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
    }
