"""Full-size checkpoints with random weights: ``python -m benchmarks.make_checkpoint 1.0 FOLDER``.

Speed and memory do not depend on the values of weights, only on their number and layout; pictures of such a checkpoint
are noise. Each checkpoint has all files of its repository on the hub, with CLIP's own vocabulary; files that no run
needs are little more than placeholders. ``1.0`` is DeciDiffusion 1.0's real configuration. ``2.0`` is a stand-in: we
know only the size of DeciDiffusion 2.0's configuration, so this is a U-Net of the same family with as many parameters
and 2.0's scheduler. ``sd15`` is Stable Diffusion 1.5, for comparison.
"""

import argparse
import copy
import json
import math
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.clip_vocabulary import VOCABULARY, write_tokenizer
from ov_decidiffusion.conversion.unet_nas import V1_UNET_CONFIG, FlexibleUNet2DConditionModel
from ov_decidiffusion.model_folder.layout import TINY_DECODER
from ov_decidiffusion.schedulers.squeezed import SqueezedDPMSolverMultistepScheduler

KINDS = ("1.0", "2.0", "sd15")
STAND_IN_2_0 = {  # fewer blocks than 1.0, of the same kind: 525,576,324 parameters
    "down_blocks_num_attentions": [0, 2, 2],
    "mid_num_resnets": 0,
    "mid_num_attentions": 0,
    "up_blocks_num_attentions": [4, 3, 0],
}


def random_value(name: str, shape: torch.Size) -> torch.Tensor:
    """A parameter drawn from a generator seeded with its name, scaled so that activations stay in range."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if drawn.ndim >= 2:
        return drawn / math.sqrt(drawn[0].numel())
    return 1 + 0.1 * drawn if name.endswith("weight") else 0.1 * drawn


def unet_of(kind: str) -> nn.Module:
    """The U-Net of a kind, without allocating its weights."""
    with torch.device("meta"):
        if kind == "sd15":
            return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return FlexibleUNet2DConditionModel.from_config(unet_config(kind))


def unet_config(kind: str) -> dict[str, Any]:
    """The ``config.json`` of a U-Net-NAS."""
    config = copy.deepcopy(json.loads(V1_UNET_CONFIG.read_text()))
    if kind == "2.0":
        config["configurations"] |= STAND_IN_2_0
    return config


def text_encoder() -> nn.Module:
    """CLIP ViT-L/14's text encoder."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        projection_dim=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    with torch.device("meta"):
        return CLIPTextModel(config)


def vae() -> nn.Module:
    """Stable Diffusion's autoencoder."""
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
            scaling_factor=0.18215,
        )


def tiny_autoencoder() -> nn.Module:
    """The architecture of TAESD, as published for Stable Diffusion's latents."""
    with torch.device("meta"):
        return AutoencoderTiny()


def scheduler_of(kind: str) -> SchedulerMixin:
    if kind == "2.0":
        return SqueezedDPMSolverMultistepScheduler()
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def write_weights(model: nn.Module, file: Path, prefix: str = "") -> int:
    """Write random float16 weights for every parameter of a model; returns the number of parameters."""
    shapes = {prefix + name: parameter.shape for name, parameter in model.named_parameters()}
    weights = {
        name: random_value(name, shape).half()
        for name, shape in tqdm(shapes.items(), desc=file.parent.name, unit="tensor")
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata={"format": "pt"})
    return sum(shape.numel() for shape in shapes.values())


def write_what_nobody_needs(folder: Path) -> None:
    """Write files of the real repository that no run needs; opening one of them causes an error."""
    for name in ("unet/diffusion_pytorch_model", "safety_checker/model"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.safetensors").write_bytes(b"not needed")
    unet_of("sd15").save_config(folder / "unet")
    checker = {"architectures": ["StableDiffusionSafetyChecker"], "model_type": "clip"}
    (folder / "safety_checker" / "config.json").write_text(json.dumps(checker, indent=2) + "\n")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"crop_size": 224, "size": 224}\n')
    (folder / "pipeline.py").write_text("raise SystemExit('code of a checkpoint must never run')\n")
    (folder / "README.md").write_text("A stand-in of random weights.\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


def write_index(folder: Path, kind: str, scheduler: str) -> None:
    """Write a repository's index; DeciDiffusion's names its makers' own class, and does not mention its own U-Net."""
    index = {
        "_class_name": "StableDiffusionPipeline" if kind == "sd15" else "DeciPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if kind != "sd15":
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_checkpoint(kind: str, folder: str | Path) -> dict[str, int]:
    """Write a full-size checkpoint with seeded random float16 weights, in the layout of its repository on the hub.

    Args:
        kind: "1.0", "2.0" (a stand-in) or "sd15".
        folder: the folder to make, about 2 GB; it must not exist yet.

    Returns:
        the number of parameters of each part.

    Raises:
        ValueError: the kind is unknown, or the folder exists.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
    folder = Path(folder).expanduser()
    if folder.exists():
        raise ValueError(f"`folder` {folder} exists: delete it or choose another one.")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    unet_name = "unet" if kind == "sd15" else "flexible_unet"
    numbers = {}
    try:
        encoder, autoencoder, unet = text_encoder(), vae(), unet_of(kind)
        encoder.config.save_pretrained(partial / "text_encoder")
        prefix = "" if next(iter(encoder.state_dict())).startswith("text_model.") else "text_model."
        numbers["text_encoder"] = write_weights(encoder, partial / "text_encoder" / "model.safetensors", prefix)
        for name, model in ((unet_name, unet), ("vae", autoencoder), (TINY_DECODER, tiny_autoencoder())):
            model.save_config(partial / name)
            numbers[name] = write_weights(model, partial / name / "diffusion_pytorch_model.safetensors")
        scheduler = scheduler_of(kind)
        scheduler.save_pretrained(partial / "scheduler")
        write_tokenizer(partial / "tokenizer")
        write_index(partial, kind, type(scheduler).__name__)
        if kind != "sd15":
            write_what_nobody_needs(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for part, count in make_checkpoint(options.kind, options.folder).items():
        print(f"{part:<15}{count:>13,} parameters")


if __name__ == "__main__":
    main()
