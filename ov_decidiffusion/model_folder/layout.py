"""The layout of a model folder: the names of its parts and files.

Optimum Intel, OpenVINO GenAI and OpenVINO Model Server can load this layout too. With such a folder, no torch weights,
no hub and no checkpoint are needed.
"""

import re
from pathlib import Path

FORMAT = 3  # of a conversion's report; a folder of an older format is converted again
FIRST_FORMAT_WITH_HASHES = 2
ANY_SIZE_FORMAT = 3  # from this one on, the U-Net takes latents of any size, before only multiples of ``unet_factor``
QUANTIZATION_FORMAT = 4  # INT8 models of an older format take fewer picture sizes; `quantize` replaces them

MAX_TOKENS = 77  # number of tokens that a folder's text encoder and U-Net take
PARTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
TINY_DECODER = "tiny_decoder"  # an optional part of a checkpoint and of a model folder
QUANTIZED_KINDS = ("int8", "int8-weights", "int4-weights")  # kinds of quantized folders beside a model folder
QUANTIZABLE = ("unet", "vae_decoder")  # the parts for which computing in INT8 pays
CONVERSION_REPORT = "conversion_report.json"  # what a folder was made from
QUANTIZATION_REPORT = "quantization_report.json"  # how a quantized folder was made
DEFAULTS_FILE = "pipeline_defaults.json"  # checkpoints may have it too
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def default_model_dir(checkpoint: str | Path, weight_format: str = "fp16") -> Path:
    """``models/<name>-<format>`` in the current folder; the name is the last part of the folder or hub id."""
    path = Path(checkpoint).expanduser()
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return Path("models") / f"{name}-{weight_format}"


def is_checkpoint(model: str | Path) -> bool:
    """Whether this is a checkpoint's folder or looks like a hub id, as opposed to a model folder."""
    folder = Path(model).expanduser()
    if folder.exists():
        return (folder / "flexible_unet").is_dir()
    name = str(model).rstrip("/")
    return not folder.is_absolute() and name.count("/") == 1 and not name.startswith((".", "~"))


def quantized_sibling(folder: Path, kind: str = "int8") -> Path:
    """Where a folder's quantized models are, or would be: ``models/x-fp16`` -> ``models/x-int8``.

    For a folder that holds quantized models, it is the folder itself.
    """
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if (folder / QUANTIZATION_REPORT).is_file():
        return folder
    return folder.with_name(f"{re.sub('-fp(16|32)$', '', folder.name)}-{kind}")


def graph_file(folder: Path, part: str) -> Path:
    """The graph of a part; OpenVINO expects the weights beside it."""
    return folder / part / "openvino_model.xml"


def weights_file(folder: Path, part: str) -> Path:
    """The weights of a part."""
    return graph_file(folder, part).with_suffix(".bin")


def config_file(folder: Path, part: str) -> Path:
    """The settings of a part."""
    return folder / part / "config.json"


def tokenizer_dir(folder: Path) -> Path:
    """The folder with the tokenizer's files, and with the tokenizer as an OpenVINO model for other tools."""
    return folder / "tokenizer"


def prompt_tokenizer_file(folder: Path) -> Path:
    """The tokenizer's file for the tokenizers library, which loads it in a fraction of the time of transformers."""
    return tokenizer_dir(folder) / "prompt_tokenizer.json"
