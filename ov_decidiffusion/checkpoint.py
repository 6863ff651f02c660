"""Find, download and check a DeciDiffusion checkpoint, and build its torch modules.

Weights and settings are all that is taken from a checkpoint: no code of it is downloaded, none is run.
"""

import errno
import shutil
from collections.abc import Container
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin
from huggingface_hub import constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from ov_decidiffusion.folder import DEFAULTS_FILE
from ov_decidiffusion.unet_nas import FlexibleUNet2DConditionModel

EMBEDDED_CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny-decidiffusion"
KNOWN_CHECKPOINTS = {
    "Embedded (small, works offline)": str(EMBEDDED_CHECKPOINT),
    "DeciDiffusion 1.0": "Deci/DeciDiffusion-v1-0",
    "DeciDiffusion 2.0": "Deci/DeciDiffusion-v2-0",
}

# Part -> (config file, weights by preference). Safetensors hold numbers only; a pickle is a last resort, and
# diffusers and transformers then read it with weights_only=True.
WEIGHTED_PARTS = {
    "text_encoder": ("config.json", ("model.safetensors", "pytorch_model.bin")),
    "flexible_unet": ("config.json", ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")),
    "vae": ("config.json", ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")),
}
PLAIN_FILES = ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
OPTIONAL_FILES = (
    "model_index.json",
    DEFAULTS_FILE,
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
)
LOCAL_HINT = (
    f"Without a network, use the embedded checkpoint ({EMBEDDED_CHECKPOINT}), or give the path of a folder that "
    "holds a downloaded checkpoint."
)


class CheckpointError(ValueError):
    """A checkpoint cannot be found, downloaded or used; the message says why and what to do."""


def find_checkpoint(checkpoint: str | Path, revision: str | None = None) -> Path:
    """Turn a folder or a hub id into a checked folder on disk.

    Args:
        checkpoint: a local folder in the layout of ``Deci/DeciDiffusion-v1-0``, or a hub id such as that one.
            From the hub only the files that are needed are downloaded, into the hub's own cache. A connection
            that breaks is resumed, and after an interruption finished files are not fetched again.
            ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT`` are honoured.
        revision: branch, tag or commit of the hub repository; its main branch by default.

    Raises:
        CheckpointError: the folder lacks a part, a file is cut short, or the hub cannot provide the checkpoint.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        check_checkpoint(folder)
        return folder
    if folder.is_absolute() or str(checkpoint).startswith((".", "~")) or str(checkpoint).count("/") != 1:
        raise CheckpointError(
            f"`checkpoint` must be a folder or a hub id such as 'Deci/DeciDiffusion-v1-0', got '{checkpoint}', "
            "which is no folder here."
        )
    folder = _download(str(checkpoint), revision)
    check_checkpoint(folder)
    return folder


def _download(repo_id: str, revision: str | None) -> Path:
    place = f"'{repo_id}'" + (f" at revision '{revision}'" if revision else "")
    try:
        patterns = _needed_patterns(repo_id, revision)
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{place} asks you to accept its terms first: open {constants.ENDPOINT}/{repo_id}, accept them, and "
            "log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{place} does not exist: check the revision, or leave it out for 'main'.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{place} does not exist on {constants.ENDPOINT}, is private, or is gone: check the spelling. {LOCAL_HINT}"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{place} is no valid hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if constants.HF_HUB_OFFLINE else "no connection"
        raise CheckpointError(f"{place} cannot be downloaded from {constants.ENDPOINT}: {why}. {LOCAL_HINT}") from error
    except (HfHubHTTPError, HTTPError, EntryNotFoundError, XetDownloadError) as error:
        raise CheckpointError(
            f"{place} cannot be downloaded from {constants.ENDPOINT}: {error} {LOCAL_HINT}"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"The disk filled up while {place} was downloaded: {error}") from error
        raise CheckpointError(
            f"{place} cannot be downloaded from {constants.ENDPOINT}: {error} {LOCAL_HINT}"
        ) from error


def _needed_patterns(repo_id: str, revision: str | None) -> list[str]:
    """The files to fetch: one kind of weights for each part, and never code."""
    everything = [*PLAIN_FILES, *OPTIONAL_FILES]
    for part, (config, weights) in WEIGHTED_PARTS.items():
        everything += [f"{part}/{name}" for name in (config, *weights)]
    try:
        files = snapshot_download(repo_id, revision=revision, allow_patterns=everything, dry_run=True)
        to_download = {file.filename: file.file_size if file.will_download else 0 for file in files}
    except DryRunError:  # the hub is out of reach; the cache may have all that is needed
        try:
            to_download = {file.path: 0 for file in get_cached_repo_tree(repo_id, revision=revision)}
        except CachedRepoTreeNotFoundError:
            return everything
    missing = _missing(to_download)
    if missing:
        raise CheckpointError(_missing_message(f"'{repo_id}'", missing, to_download))
    chosen = [name for name in (*PLAIN_FILES, *OPTIONAL_FILES) if name in to_download]
    for part, (config, weights) in WEIGHTED_PARTS.items():
        chosen.append(f"{part}/{config}")
        chosen += [f"{part}/{name}" for name in weights if f"{part}/{name}" in to_download][:1]
    _check_disk(repo_id, sum(to_download.get(name, 0) for name in chosen))
    return chosen


def _check_disk(repo_id: str, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"'{repo_id}' needs {needed / 1e9:.2f} GB more in {cache}, where {free / 1e9:.2f} GB are free: free some "
            "space, or set HF_HOME to a folder on a larger disk."
        )


def check_checkpoint(folder: str | Path) -> None:
    """Make sure that a folder holds every part and that no weights file is cut short.

    Raises:
        CheckpointError: names what is missing or broken.
    """
    folder = Path(folder)
    present = {file.relative_to(folder).as_posix() for file in folder.glob("*/*") if file.is_file()}
    missing = _missing(present)
    if missing:
        raise CheckpointError(_missing_message(str(folder), missing, present))
    for part in WEIGHTED_PARTS:
        weights = _weights_file(folder, part)
        if weights.suffix == ".safetensors":
            try:
                with safe_open(weights, framework="pt"):
                    pass
            except SafetensorError as error:
                raise CheckpointError(
                    f"{weights} is incomplete or damaged ({error}): delete it and download it again."
                ) from error


def _missing(present: Container[str]) -> list[str]:
    missing = [name for name in PLAIN_FILES if name not in present]
    for part, (config, weights) in WEIGHTED_PARTS.items():
        if f"{part}/{config}" not in present:
            missing.append(f"{part}/{config}")
        if not any(f"{part}/{name}" in present for name in weights):
            missing.append(f"{part}/{weights[0]}")
    return missing


def _missing_message(checkpoint: str, missing: list[str], present: Container[str]) -> str:
    message = f"The checkpoint {checkpoint} lacks {', '.join(missing)}."
    if "unet/openvino_model.xml" in present:
        return f"{message} It is an OpenVINO model folder: load it with OVStableDiffusionPipeline.from_pretrained."
    if "unet/config.json" in present and "flexible_unet/config.json" in missing:
        return f"{message} Its unet/ is a Stable Diffusion U-Net; a DeciDiffusion checkpoint has flexible_unet/."
    return f"{message} A DeciDiffusion checkpoint has the layout of the hub's Deci/DeciDiffusion-v1-0."


def _weights_file(folder: Path, part: str) -> Path | None:
    return next((folder / part / name for name in WEIGHTED_PARTS[part][1] if (folder / part / name).is_file()), None)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint that a conversion reads, in a fixed order."""
    folder = Path(folder)
    files = [folder / name for name in (*PLAIN_FILES, *OPTIONAL_FILES)]
    for part, (config, _) in WEIGHTED_PARTS.items():
        files += [folder / part / config, _weights_file(folder, part)]
    return [file for file in files if file is not None and file.is_file()]


def weights_size(folder: str | Path) -> int:
    """Bytes of all weights files of a checked checkpoint."""
    return sum(_weights_file(Path(folder), part).stat().st_size for part in WEIGHTED_PARTS)


def load_text_encoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> CLIPTextModel:
    """CLIP's text encoder; token ids [b, 77] in, hidden states [b, 77, d] out."""
    folder = Path(folder) / "text_encoder"
    return CLIPTextModel.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def load_unet(folder: str | Path, dtype: torch.dtype = torch.float32) -> FlexibleUNet2DConditionModel:
    """U-Net-NAS, built from the configuration in the checkpoint.

    Raises:
        CheckpointError: the weights lack a parameter.
    """
    return _load_complete(FlexibleUNet2DConditionModel, Path(folder) / "flexible_unet", dtype)


def load_vae(folder: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The autoencoder; pictures [b, 3, H, W] in -1…1 to latents [b, 4, H / 8, W / 8] and back.

    Raises:
        CheckpointError: the weights lack a parameter.
    """
    return _load_complete(AutoencoderKL, Path(folder) / "vae", dtype)


def _load_complete(model_class: type[ModelMixin], folder: Path, dtype: torch.dtype) -> ModelMixin:
    """diffusers only warns of missing weights, and leaves them without values."""
    model, info = model_class.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise CheckpointError(
            f"The weights in {folder} lack {len(info['missing_keys'])} parameters that its config.json calls for, "
            f"such as {sorted(info['missing_keys'])[0]}: download it again."
        )
    return model.eval()


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """CLIP's tokenizer, padding to 77 tokens."""
    return CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer", local_files_only=True)
