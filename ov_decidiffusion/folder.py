"""The model folder, the contract between conversion and use: names of parts and files, and how one comes about.

The layout is the one that Optimum Intel, OpenVINO GenAI and OpenVINO Model Server load as it is. Whoever has such a
folder needs no torch weights, no hub and no checkpoint.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ov_decidiffusion.arguments import check_path
from ov_decidiffusion.writing import write_json

logger = logging.getLogger(__name__)

FORMAT = 2  # of a conversion's report; a folder of another one is converted anew
QUANTIZATION_FORMAT = 3  # models of an older one may saturate where VNNI is missing: not used, and made anew

MAX_TOKENS = 77  # that a folder's text encoder and U-Net take
PARTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
TINY_DECODER = "tiny_decoder"  # of a checkpoint and of a model folder: may be there or not
QUANTIZED_KINDS = ("int8", "int8-weights", "int4-weights")  # of folders beside a model folder
QUANTIZABLE = ("unet", "vae_decoder")  # where computing in INT8 pays
CONVERSION_REPORT = "conversion_report.json"  # what a folder was made of
QUANTIZATION_REPORT = "quantization_report.json"  # how a quantized one was made
DEFAULTS_FILE = "pipeline_defaults.json"  # of a checkpoint too
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# Red, green and blue in -1…1 of each channel of Stable Diffusion's latents, and behind them of none; by keturn:
# https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204.
QUICK_LOOK = [
    [0.298, 0.207, 0.208],
    [0.187, 0.286, 0.173],
    [-0.158, 0.189, 0.264],
    [-0.184, -0.271, -0.473],
    [0.0, 0.0, 0.0],
]
# What a checkpoint's makers sample it with, and prompts that suit it; its own file goes before.
SUITING_PHOTOGRAPHS = {
    "example_prompts": [
        ["a lighthouse on a cliff at sunset, oil painting", "people, text"],
        ["a red fox in fresh snow, photograph", "blurry"],
        ["a bowl of ramen on a wooden table, soft light", ""],
        ["a treehouse village in a bamboo forest, watercolour", "photograph"],
    ],
    "negative_example": ["a street in a small town", "cars"],
    "image_example": ["a red house in a meadow", "a red house in a snowy meadow at dusk, oil painting"],
    "calibration_prompts": [
        "portrait of an old fisherman, studio light, photograph",
        "a mountain lake at dawn, mist over the water",
        "an astronaut riding a bicycle, comic book style",
        "a crowded night market in the rain, neon signs",
        "a cat asleep on a stack of books, watercolour",
        "a modern kitchen with a large window, architectural photograph",
        "a dragon over a medieval city, fantasy art",
        "macro photograph of a dew drop on a leaf",
    ],
    "quick_look": QUICK_LOOK,
}
DEFAULTS_1_0 = {"num_inference_steps": 30, "guidance_scale": 7.5, "guidance_rescale": 0.7} | SUITING_PHOTOGRAPHS
DEFAULTS_2_0 = {"num_inference_steps": 16, "guidance_scale": 7.5, "guidance_rescale": 0.8} | SUITING_PHOTOGRAPHS


class ModelDirError(ValueError):
    """A model folder is not whole, or what is in it does not work."""


def default_model_dir(checkpoint: str | Path, weight_format: str = "fp16") -> Path:
    """``models/<name>-<format>`` in the current folder, the name being the last part of the folder or hub id."""
    path = Path(checkpoint).expanduser()
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return Path("models") / f"{name}-{weight_format}"


def is_checkpoint(model: str | Path) -> bool:
    """Whether this is a checkpoint's folder or looks like a hub id, and is no model folder."""
    folder = Path(model).expanduser()
    if folder.exists():
        return (folder / "flexible_unet").is_dir()
    name = str(model).rstrip("/")
    return not folder.is_absolute() and name.count("/") == 1 and not name.startswith((".", "~"))


def quantized_sibling(folder: Path, kind: str = "int8") -> Path:
    """Where the quantized models of a folder are, or would be: ``models/x-fp16`` -> ``models/x-int8``.

    A folder of INT8 models is its own.
    """
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if (folder / QUANTIZATION_REPORT).is_file():
        return folder
    return folder.with_name(f"{re.sub('-fp(16|32)$', '', folder.name)}-{kind}")


def graph_file(folder: Path, part: str) -> Path:
    """The graph of a part; what reads or writes it finds the weights beside it."""
    return folder / part / "openvino_model.xml"


def weights_file(folder: Path, part: str) -> Path:
    """The weights of a part."""
    return graph_file(folder, part).with_suffix(".bin")


def config_file(folder: Path, part: str) -> Path:
    """The settings of a part."""
    return folder / part / "config.json"


def tokenizer_dir(folder: Path) -> Path:
    """The files of the tokenizer, and beside them the same as an OpenVINO model for other tools."""
    return folder / "tokenizer"


def prompt_tokenizer_file(folder: Path) -> Path:
    """The tokenizer as the tokenizers library reads it, in a fraction of the time that transformers takes."""
    return tokenizer_dir(folder) / "prompt_tokenizer.json"


def check_token_ids(vocabulary: dict[str, int], folder: Path) -> None:
    """Refuse a tokenizer with tokens that the text encoder has no row for: they would be read as some other.

    Args:
        vocabulary: all tokens with their numbers.
        folder: of a checkpoint or of models.

    Raises:
        ValueError: names the token.
    """
    config = config_file(folder, "text_encoder")
    rows = read_json(config).get("vocab_size") if config.is_file() else None
    token = max(vocabulary, key=vocabulary.get, default=None)
    if isinstance(rows, int) and token is not None and vocabulary[token] >= rows:
        raise ValueError(
            f"The tokenizer of {folder} has {token!r} as number {vocabulary[token]}, and the text encoder knows those "
            f"below {rows} only: make the folder anew, of files that belong together."
        )


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The settings of the scheduler to use: the checkpoint's own, where other tools have to be given another."""
    own = folder / "ov_scheduler" / "scheduler_config.json"
    return read_json(own if own.is_file() else folder / "scheduler" / "scheduler_config.json")


def read_defaults(folder: Path) -> dict[str, Any]:
    """The number of steps, the guidance and the example prompts that suit a folder's models.

    Raises:
        ValueError: texts are of another form; the numbers are looked at where they are used.
    """
    file = folder / DEFAULTS_FILE
    defaults = DEFAULTS_1_0 | (read_json(file) if file.is_file() else {})
    for name, (form, fits) in FORMS.items():
        if name in defaults and not fits(defaults[name]):
            raise ModelDirError(f"`{file}: {name}` must be {form}.")
    return defaults


def _are_texts(values: Any, least: int) -> bool:
    return isinstance(values, list) and len(values) >= least and all(isinstance(one, str) for one in values)


FORMS = {
    "example_prompts": (
        "a list of pairs, each a prompt and a negative prompt",
        lambda pairs: isinstance(pairs, list) and pairs and all(_are_texts(pair, 2) for pair in pairs),
    ),
    "negative_example": ("a prompt and what to keep away from", lambda pair: _are_texts(pair, 2)),
    "image_example": ("two prompts", lambda pair: _are_texts(pair, 2)),
    "calibration_prompts": ("a list of at least two prompts", lambda prompts: _are_texts(prompts, 2)),
    "understands": (
        "lists of words by their kind",
        lambda kinds: isinstance(kinds, dict) and all(_are_texts(words, 0) for words in kinds.values()),
    ),
}


def read_origin(folder: Path) -> dict[str, Any]:
    """The checkpoint that a folder was made of, its revision and the format of the weights; None where nothing says."""
    file = folder / CONVERSION_REPORT
    report = read_json(file) if file.is_file() else {}
    return {name: report.get(name) for name in ("checkpoint", "revision", "weight_format")}


def write_settings(
    target: Path, scheduler: dict[str, Any], scheduler_for_peers: dict[str, Any], defaults: dict[str, Any]
) -> None:
    """The scheduler, the pipeline's defaults, and the index that other tools start from."""
    write_json(target / "scheduler" / "scheduler_config.json", scheduler_for_peers)
    if scheduler_for_peers is not scheduler:
        write_json(target / "ov_scheduler" / "scheduler_config.json", scheduler)
    write_json(target / DEFAULTS_FILE, defaults)
    index = MODEL_INDEX | {"scheduler": ["diffusers", scheduler_for_peers["_class_name"]]}
    write_json(target / "model_index.json", index)


def check_model_dir(folder: Path) -> None:
    """Refuse a folder that lacks a part, or has a file of another size than was written.

    Raises:
        ValueError: names what is missing or of another size.
    """
    needed = [file(folder, part) for part in PARTS for file in (graph_file, weights_file)]
    needed += [config_file(folder, "unet"), config_file(folder, "vae_decoder")]
    needed += [folder / "scheduler" / "scheduler_config.json", tokenizer_dir(folder) / "vocab.json"]
    missing = [file.relative_to(folder).as_posix() for file in needed if not file.is_file()]
    if missing:
        what = "does not exist" if not folder.exists() else f"lacks {', '.join(missing)}"
        raise ModelDirError(f"`model_dir` {folder} {what}: make it with convert_checkpoint.")
    damaged = [
        name for name, written in _written_files(folder).items() if not _has_size(folder / name, written["size"])
    ]
    if damaged:
        raise ModelDirError(_damage(folder, damaged, "of another size than was written"))


def verify_model_dir(folder: str | Path) -> None:
    """Read every file of a model folder and compare it with what was written: some seconds for the real models.

    Raises:
        ValueError: names the files that are missing or damaged, or the folder has no hashes to compare with.
    """
    folder = check_path("folder", folder)
    check_model_dir(folder)
    written = _written_files(folder)
    if not written:
        raise ValueError(f"`model_dir` {folder} has no hashes to compare with: convert the checkpoint anew.")
    found = hashes(folder, written)
    damaged = [name for name, hashed in found.items() if hashed != written[name]["sha256"]]
    if damaged:
        raise ModelDirError(_damage(folder, damaged, "not what was written"))


@contextlib.contextmanager
def explaining(folder: Path, doing: str) -> Iterator[None]:
    """Say of an error that a folder's contents lead to which file is damaged, or else what was being done.

    Raises:
        ValueError: in place of whatever a damaged or odd file leads to.
    """
    try:
        yield
    except (ValueError, MemoryError, NotImplementedError):
        raise
    except Exception as error:
        remedy = "If its files were changed, delete the folder and convert anew."
        with contextlib.suppress(OSError):
            if _written_files(folder):
                verify_model_dir(folder)
                remedy = "Its files are as they were written, so that what was asked for does not fit them."
        raise ModelDirError(
            f"`model_dir` {folder}: {doing} failed ({type(error).__name__}: {error}). {remedy}"
        ) from error


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of files of a folder, by name."""

    def sha256(name: str) -> str:
        with (folder / name).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    names = list(names)
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return dict(zip(names, pool.map(sha256, names), strict=True))


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a folder but its reports, for a report."""
    reports = (CONVERSION_REPORT, QUANTIZATION_REPORT)
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    found = hashes(folder, [name for name in names if name not in reports])
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in found.items()}


def are_described(files: Any) -> bool:
    """Whether these are files by name with the size and sha256 of each, as ``describe_files`` has them."""
    return isinstance(files, dict) and all(
        isinstance(file, dict) and isinstance(file.get("size"), int) and isinstance(file.get("sha256"), str)
        for file in files.values()
    )


def _written_files(folder: Path) -> dict[str, dict[str, Any]]:
    """What the latest report says of the files of a folder; nothing where there is none."""
    for name in (QUANTIZATION_REPORT, CONVERSION_REPORT):
        if (folder / name).is_file():
            files = read_json(folder / name).get("files", {})
            if not are_described(files):
                raise ModelDirError(_damage(folder, [name], "not what was written"))
            return files
    return {}


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _damage(folder: Path, names: list[str], what: str) -> str:
    verb = "is" if len(names) == 1 else "are"
    make = "quantize" if (folder / QUANTIZATION_REPORT).is_file() else "convert"
    return f"`model_dir` {folder} is damaged: {', '.join(names)} {verb} {what}. Delete the folder and {make} anew."


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a link leads elsewhere than in its folder, or to where the hub's cache keeps a folder's files."""
    real, allowed = file.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    return not any(real.is_relative_to(place) for place in allowed)


def read_json(file: str | Path, remedy: str = "make the folder anew") -> dict[str, Any]:
    """A settings file.

    Raises:
        ValueError: it is missing, or holds something else than a JSON object; ``remedy`` ends the message.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}): {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): {remedy}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, but holds a {type(content).__name__}: {remedy}.")
    return content
