"""A DeciDiffusion checkpoint: which files it has, and whether they are complete. Needs no PyTorch.

Only weights and settings are taken from a checkpoint: its code is neither downloaded nor run.
"""

import json
import re
import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ov_decidiffusion.errors import CheckpointError
from ov_decidiffusion.model_folder.configs import MAX_SAMPLE_SIZE, MAX_WIDTH
from ov_decidiffusion.model_folder.integrity import leads_out, read_json
from ov_decidiffusion.model_folder.layout import DEFAULTS_FILE, TINY_DECODER

EMBEDDED_CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny-decidiffusion"
KNOWN_CHECKPOINTS = {
    "Embedded (small, works offline)": str(EMBEDDED_CHECKPOINT),
    "DeciDiffusion 1.0": "Deci/DeciDiffusion-v1-0",
    "DeciDiffusion 2.0": "Deci/DeciDiffusion-v2-0",
}


@dataclass(frozen=True)
class Access:
    """How to find a checkpoint; the fields are arguments of ``find_checkpoint``."""

    revision: str | None = None
    allow_pickles: bool = False
    token: str | bool | None = None
    local_files_only: bool = False


def _weights_names(name: str, pickle: str) -> tuple[str, ...]:
    return f"{name}.safetensors", f"{name}.safetensors.index.json", f"{name}.fp16.safetensors", pickle


# Part -> (config file, weights files by preference): one file, several with an index, or the variant "fp16".
# Safetensors hold numbers only. A pickle is read only if the caller allows it; diffusers and transformers then read it
# with weights_only=True.
WEIGHTED_PARTS = {
    "text_encoder": ("config.json", _weights_names("model", "pytorch_model.bin")),
    "flexible_unet": ("config.json", _weights_names("diffusion_pytorch_model", "diffusion_pytorch_model.bin")),
    "vae": ("config.json", _weights_names("diffusion_pytorch_model", "diffusion_pytorch_model.bin")),
}
SHARDS = "*-of-*.safetensors"  # an index beside them says what each of them holds
PLAIN_FILES = ("scheduler/scheduler_config.json",)
VOCABULARIES = (("tokenizer/vocab.json", "tokenizer/merges.txt"), ("tokenizer/tokenizer.json",))  # either suffices
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "added_tokens.json",
)
TINY_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
# diffusers' defaults for the settings in which a tiny decoder must match the decoder that it replaces.
TINY_DEFAULTS = {
    "latent_channels": 4,
    "out_channels": 3,
    "upsampling_scaling_factor": 2,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "num_decoder_blocks": [3, 3, 3, 1],
    "decoder_block_out_channels": [64, 64, 64, 64],
}
OPTIONAL_FILES = (
    *("model_index.json", DEFAULTS_FILE),
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    *(f"{TINY_DECODER}/{name}" for name in TINY_FILES),
)
LFS_POINTER = b"version https://git-lfs"
MAX_NUMBER = 1_000_000  # the largest size, width or count in a configuration
MAX_LAYERS = 100
LIMITS = {"sample_size": MAX_SAMPLE_SIZE, "cross_attention_dim": MAX_WIDTH}
COUNTS = ("num_hidden_layers", "layers_per_block", "num_encoder_blocks", "num_decoder_blocks")  # numbers of layers
REMEDY = "download it again"
FLOATS = ("F16", "BF16", "F32", "F64")
COUNTED = ("position_ids", "num_batches_tracked")  # integers that older versions save with the weights


def check_checkpoint(folder: str | Path, allow_pickles: bool = False) -> None:
    """Check that a folder has every part, that no weights file is cut short, and that no link leads out of it.

    Raises:
        CheckpointError: the message names what is missing or broken.
    """
    folder = Path(folder)
    present = {file.relative_to(folder).as_posix() for file in folder.glob("*/*") if file.is_file()}
    missing = missing_files(present)
    if missing:
        raise CheckpointError(missing_message(str(folder), missing, present))
    for file in checkpoint_files(folder):
        _refuse_links_out(file, folder)
    for part in WEIGHTED_PARTS:
        for weights in weights_files(folder, part):
            if weights.suffix == ".bin" and not allow_pickles:
                raise CheckpointError(
                    f"{weights} is a pickle, which could hold code: it is read only with allow_pickles=True. "
                    "Safetensors need no permission."
                )
            if weights.suffix != ".json":
                _check_weights(weights)
    _check_numbers(folder)
    if (folder / TINY_DECODER).is_dir():
        check_tiny_decoder(folder / TINY_DECODER, read_json(folder / "vae" / "config.json", REMEDY))
    _check_vocabulary(folder)


def check_tiny_decoder(folder: Path, vae: dict[str, Any]) -> None:
    """Check that a tiny decoder's folder is complete, and that the decoder fits an autoencoder's latents.

    Args:
        folder: the tiny decoder's folder.
        vae: the autoencoder's settings.

    Raises:
        CheckpointError: the message names what is missing, broken or does not fit.
    """
    missing = [name for name in TINY_FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"The tiny decoder {folder} lacks {', '.join(missing)}: {REMEDY}, or delete it.")
    _check_weights(folder / TINY_FILES[1])
    file = folder / TINY_FILES[0]
    _check_file_numbers(file)
    config = TINY_DEFAULTS | read_json(file, REMEDY)
    blocks, widths = config["num_decoder_blocks"], config["decoder_block_out_channels"]
    wanted = TINY_DEFAULTS | {"latent_channels": vae.get("latent_channels", 4)}
    for name in ("latent_channels", "out_channels", "upsampling_scaling_factor", "scaling_factor", "shift_factor"):
        if config[name] != wanted[name]:
            raise CheckpointError(f"{file} must have {name} = {wanted[name]}, got {config[name]!r}.")
    counts = [len(one) if isinstance(one, list) else None for one in (vae.get("block_out_channels"), blocks, widths)]
    if None in counts or len(set(counts)) > 1:
        raise CheckpointError(f"{file} must have as many levels as the autoencoder, got {blocks!r} and {widths!r}.")


def _refuse_links_out(file: Path, folder: Path) -> None:
    if leads_out(file, folder):
        raise CheckpointError(
            f"{file} is a link out of the checkpoint, to {file.resolve()}: put the file itself there."
        )


def _check_weights(weights: Path) -> None:
    with weights.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(f"{weights} is only a pointer of Git LFS: fetch the file with `git lfs pull`.")
    if weights.suffix == ".safetensors":
        try:
            with safe_open(weights, framework="np") as tensors:
                kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{weights} is incomplete or damaged ({error}): delete it and download it again."
            ) from error
        wrong = [name for name, kind in kinds.items() if kind not in FLOATS and not name.endswith(COUNTED)]
        if wrong:
            raise CheckpointError(
                f"{weights} holds {wrong[0]} as {kinds[wrong[0]]}, and weights are of {', '.join(FLOATS)}: {REMEDY}."
            )


def _check_numbers(folder: Path) -> None:
    """Refuse absurd numbers: a configuration of billions of layers would be built until memory runs out."""
    for part, (config, _) in WEIGHTED_PARTS.items():
        _check_file_numbers(folder / part / config)
    file = folder / "flexible_unet" / "config.json"
    reads = read_json(file, REMEDY).get("cross_attention_dim", 768)  # 768 is the default of both libraries
    gives = read_json(folder / "text_encoder" / "config.json", REMEDY).get("hidden_size", 768)
    if isinstance(reads, int) and isinstance(gives, int) and reads != gives:
        raise CheckpointError(
            f"{file} has cross_attention_dim = {reads}, and the text encoder's hidden states are {gives} wide: "
            f"{REMEDY}."
        )


def _check_file_numbers(file: Path) -> None:
    for name, number in _numbers(read_json(file, REMEDY)):
        most = MAX_LAYERS if name in COUNTS or "_num_" in name else LIMITS.get(name, MAX_NUMBER)
        if not abs(number) <= most:
            raise CheckpointError(f"{file} has {name} = {number}, which no such model has: {REMEDY}.")


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a configuration, each with the name of its key."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, name)
    elif isinstance(content, (int, float)):
        yield name, content


def _check_vocabulary(folder: Path) -> None:
    """Refuse token ids outside the embedding table: they would all be read as one word, or fail."""
    file, vocabulary = _vocabulary(folder)
    rows = read_json(folder / "text_encoder" / "config.json", REMEDY).get("vocab_size", 49408)
    ids = [number for number in vocabulary.values() if isinstance(number, int) and not isinstance(number, bool)]
    if len(ids) != len(vocabulary) or not ids or not isinstance(rows, int) or min(ids) < 0 or max(ids) >= rows:
        raise CheckpointError(
            f"{file} does not fit the text encoder, which knows {rows} words: it must "
            f"hold whole numbers from 0 to {rows - 1 if isinstance(rows, int) else '?'}. Download both again."
        )


def _vocabulary(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that holds the vocabulary, and all tokens with their ids."""
    file = folder / "tokenizer" / "vocab.json"
    if file.is_file():
        return file, read_json(file, REMEDY)
    file = folder / "tokenizer" / "tokenizer.json"
    model = read_json(file, REMEDY).get("model")
    vocabulary, merges = (model.get(name) if isinstance(model, dict) else None for name in ("vocab", "merges"))
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise CheckpointError(f"{file} holds no vocabulary of byte pairs, as CLIP's tokenizer has: {REMEDY}.")
    return file, vocabulary


def missing_files(present: Container[str]) -> list[str]:
    missing = [name for name in PLAIN_FILES if name not in present]
    vocabulary = [[name for name in names if name not in present] for names in VOCABULARIES]
    missing += vocabulary[0] if all(vocabulary) else []
    for part, (config, weights) in WEIGHTED_PARTS.items():
        if f"{part}/{config}" not in present:
            missing.append(f"{part}/{config}")
        if not any(f"{part}/{name}" in present for name in weights):
            missing.append(f"{part}/{weights[0]}")
    return missing


def missing_message(checkpoint: str, missing: list[str], present: Container[str]) -> str:
    message = f"The checkpoint {checkpoint} lacks {', '.join(missing)}."
    if "unet/openvino_model.xml" in present:
        return f"{message} It is an OpenVINO model folder: load it with OVStableDiffusionPipeline.from_pretrained."
    if "unet/config.json" in present and "flexible_unet/config.json" in missing:
        return f"{message} Its unet/ is a Stable Diffusion U-Net; a DeciDiffusion checkpoint has flexible_unet/."
    return f"{message} A DeciDiffusion checkpoint has the layout of the hub's Deci/DeciDiffusion-v1-0."


def weights_files(folder: str | Path, part: str) -> list[Path]:
    """The files with a part's weights: a single file, or an index and the files that it names.

    Raises:
        CheckpointError: an index lies beside other weights, or names files outside the folder.
    """
    place, names = Path(folder) / part, WEIGHTED_PARTS[part][1]
    found = [place / name for name in names if (place / name).is_file()]
    for index in sorted(place.glob("*.index*.json")):  # diffusers and transformers follow an index to other files
        if index.name not in names:
            raise CheckpointError(f"{index} is an index of weights in several files, of a kind that is not supported.")
        if len(found) > 1:
            raise CheckpointError(f"{place} holds weights in one file and in several: delete one of the two.")
        return [index, *_shards(index)]
    return found[:1]


def _shards(index: Path) -> list[Path]:
    names = read_json(index, REMEDY).get("weight_map")
    values = list(names.values()) if isinstance(names, dict) and names else [None]
    files = sorted({str(name) for name in values})
    for name in files:
        if not re.fullmatch(r"[\w.]+-\d+-of-\d+\.safetensors", name):
            raise CheckpointError(f"{index} names {name!r}, which is no file of weights beside it: {REMEDY}.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"The checkpoint lacks {index.parent / name}, which {index.name} names: {REMEDY}.")
    return [index.parent / name for name in files]


def weights_variant(folder: str | Path, part: str) -> str | None:
    """The variant of a part's weights, as diffusers and transformers call it."""
    return "fp16" if weights_files(folder, part)[0].name.endswith(".fp16.safetensors") else None


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint that a conversion reads, in a fixed order."""
    folder = Path(folder)
    files = [folder / name for name in (*PLAIN_FILES, *OPTIONAL_FILES)]
    for part, (config, _) in WEIGHTED_PARTS.items():
        files += [folder / part / config, *weights_files(folder, part)]
    return [file for file in files if file.is_file()]


def weights_size(folder: str | Path) -> int:
    """Total bytes of the weights files of a checked checkpoint."""
    return sum(file.stat().st_size for part in WEIGHTED_PARTS for file in weights_files(folder, part))


def copy_tokenizer(folder: str | Path, target: Path) -> None:
    """Copy the tokenizer's own files, and nothing else that lies beside them.

    If there is only ``tokenizer.json``, as newer versions write it, its contents are also written as the two files
    that older versions read.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (Path(folder) / "tokenizer" / name).is_file():
            shutil.copyfile(Path(folder) / "tokenizer" / name, target / name)
    if not (target / "vocab.json").is_file():
        model = read_json(target / "tokenizer.json", REMEDY)["model"]
        (target / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
