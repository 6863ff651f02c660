"""The torch modules of a checkpoint and its tokenizer, built from weights and settings only."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin
from transformers import CLIPTextModel, CLIPTokenizer

from ov_decidiffusion.conversion.checkpoint import copy_tokenizer, weights_variant
from ov_decidiffusion.conversion.unet_nas import FlexibleUNet2DConditionModel
from ov_decidiffusion.errors import CheckpointError
from ov_decidiffusion.model_folder.tokenizer import check_token_ids

Model = TypeVar("Model", bound=ModelMixin)


def load_text_encoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> CLIPTextModel:
    """CLIP's text encoder; token ids [b, 77] in, hidden states [b, 77, d] out.

    Raises:
        CheckpointError: it cannot be built, or its weights lack a parameter or hold NaN.
    """
    variant = weights_variant(folder, "text_encoder")
    folder = Path(folder) / "text_encoder"
    with _building(folder):
        # The configuration may name an attention kernel on the hub; ``attn_implementation`` overrides it.
        loaded = CLIPTextModel.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            attn_implementation="sdpa",
            variant=variant,
            output_loading_info=True,
        )
        return _complete(loaded, folder)


def load_unet(folder: str | Path, dtype: torch.dtype = torch.float32) -> FlexibleUNet2DConditionModel:
    """U-Net-NAS, built from the configuration in the checkpoint.

    Raises:
        CheckpointError: it cannot be built, or its weights lack a parameter or hold NaN.
    """
    variant = weights_variant(folder, "flexible_unet")
    return _load_model(FlexibleUNet2DConditionModel, Path(folder) / "flexible_unet", dtype, variant)


def load_vae(folder: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The autoencoder; pictures [b, 3, H, W] in -1…1 to latents [b, 4, H / 8, W / 8] and back.

    Raises:
        CheckpointError: it cannot be built, or its weights lack a parameter or hold NaN.
    """
    return _load_model(AutoencoderKL, Path(folder) / "vae", dtype, weights_variant(folder, "vae"))


def load_tiny_decoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderTiny:
    """A small autoencoder from a folder of its own, whose decoder takes the U-Net's latents.

    Raises:
        CheckpointError: it cannot be built, or its weights lack a parameter or hold NaN.
    """
    return _load_model(AutoencoderTiny, Path(folder), dtype)


def _load_model(model_class: type[Model], folder: Path, dtype: torch.dtype, variant: str | None = None) -> Model:
    with _building(folder):
        loaded = model_class.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, variant=variant, output_loading_info=True
        )
        return _complete(loaded, folder)


@contextmanager
def _building(folder: Path) -> Iterator[None]:
    """Turn the many errors that a wrong configuration or damaged weights cause into a CheckpointError."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} does not hold a model that can be built ({type(error).__name__}: {error}): download it again."
        ) from error


def _complete(loaded: Any, folder: Path) -> Any:
    """Refuse a model with missing or NaN weights; diffusers and transformers only warn of missing ones.

    Args:
        loaded: the model, and the library's information about its loading.
        folder: the folder that it was loaded from, for messages.
    """
    model, info = loaded
    if info["missing_keys"]:
        raise CheckpointError(
            f"The weights in {folder} lack {len(info['missing_keys'])} parameters that its config.json calls for, "
            f"such as {sorted(info['missing_keys'])[0]}: download it again."
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"The weights in {folder} hold NaN or infinity, in {name}: download it again.")
    return model.eval()


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """CLIP's tokenizer, padding to 77 tokens, built from its known files and no others.

    Raises:
        CheckpointError: it cannot be built, or has a token that the text encoder has no row for.
    """
    folder = Path(folder)
    with _building(folder / "tokenizer"), tempfile.TemporaryDirectory() as known:
        copy_tokenizer(folder, Path(known))
        tokenizer = CLIPTokenizer.from_pretrained(known, local_files_only=True)
        check_token_ids(tokenizer.get_vocab(), folder)
    tokenizer.name_or_path = str(folder / "tokenizer")
    return tokenizer
