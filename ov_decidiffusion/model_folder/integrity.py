"""Whether a model folder is complete: its files, their sizes and hashes, and readable JSON."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ov_decidiffusion.arguments import check_path
from ov_decidiffusion.errors import ModelDirError
from ov_decidiffusion.model_folder.layout import (
    CONVERSION_REPORT,
    PARTS,
    QUANTIZATION_REPORT,
    config_file,
    graph_file,
    tokenizer_dir,
    weights_file,
)


def check_model_dir(folder: Path) -> None:
    """Refuse a folder that lacks a part, or has a file of another size than was written.

    Raises:
        ValueError: the message names what is missing or has another size.
    """
    needed = [file(folder, part) for part in PARTS for file in (graph_file, weights_file)]
    needed += [config_file(folder, "unet"), config_file(folder, "vae_decoder")]
    needed += [folder / "scheduler" / "scheduler_config.json", tokenizer_dir(folder) / "vocab.json"]
    missing = [file.relative_to(folder).as_posix() for file in needed if not file.is_file()]
    if missing:
        what = "does not exist" if not folder.exists() else f"lacks {', '.join(missing)}"
        remedy = "make it with `ov-decidiffusion convert`, or convert_checkpoint"
        raise ModelDirError(f"`model_dir` {folder} {what}: {remedy}.")
    damaged = [
        name for name, written in _written_files(folder).items() if not _has_size(folder / name, written["size"])
    ]
    if damaged:
        raise ModelDirError(_damage(folder, damaged, "of another size than was written"))


def verify_model_dir(folder: str | Path) -> None:
    """Compare every file of a model folder with the hash of what was written; takes seconds for the real models.

    Raises:
        ValueError: files are missing or damaged, which the message names; or the folder has no hashes to compare with.

    Example:
        >>> from ov_decidiffusion import verify_model_dir
        >>> verify_model_dir(pipe.models.folder)
    """
    folder = check_path("folder", folder)
    check_model_dir(folder)
    written = _written_files(folder)
    if not written:
        raise ValueError(f"`model_dir` {folder} has no hashes to compare with: convert the checkpoint again.")
    found = hashes(folder, written)
    damaged = [name for name, hashed in found.items() if hashed != written[name]["sha256"]]
    if damaged:
        raise ModelDirError(_damage(folder, damaged, "not what was written"))


@contextlib.contextmanager
def explaining(folder: Path, doing: str) -> Iterator[None]:
    """Turn an error that a folder's contents caused into one that names the damaged file, or else the operation.

    Args:
        folder: the model folder.
        doing: the operation, for the message.

    Raises:
        ValueError: in place of whatever error a damaged or odd file causes.
    """
    try:
        yield
    except (ValueError, MemoryError, NotImplementedError):
        raise
    except Exception as error:
        remedy = "If its files were changed, delete the folder and convert again."
        with contextlib.suppress(OSError):
            if _written_files(folder):
                verify_model_dir(folder)
                remedy = "Its files are as they were written, so the request does not fit them."
        raise ModelDirError(
            f"`model_dir` {folder}: {doing} failed ({type(error).__name__}: {error}). {remedy}"
        ) from error


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of a folder's files, by name."""

    def sha256(name: str) -> str:
        with (folder / name).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    names = list(names)
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        return dict(zip(names, pool.map(sha256, names), strict=True))


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a folder except its reports; to be written into a report."""
    reports = (CONVERSION_REPORT, QUANTIZATION_REPORT)
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    found = hashes(folder, [name for name in names if name not in reports])
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in found.items()}


def are_described(files: Any) -> bool:
    """Whether these are files by name, each with size and SHA-256, as ``describe_files`` returns them."""
    return isinstance(files, dict) and all(
        isinstance(file, dict) and isinstance(file.get("size"), int) and isinstance(file.get("sha256"), str)
        for file in files.values()
    )


def _written_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a folder as its latest report describes them; empty without a report."""
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
    return f"`model_dir` {folder} is damaged: {', '.join(names)} {verb} {what}. Delete the folder and {make} again."


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a file is a link out of its folder; links into the blobs of the hub's cache are allowed."""
    real, allowed = file.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    return not any(real.is_relative_to(place) for place in allowed)


def read_json(file: str | Path, remedy: str = "make the folder again") -> dict[str, Any]:
    """Read a settings file.

    Raises:
        ValueError: it is missing, or holds something other than a JSON object; ``remedy`` ends the message.
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
