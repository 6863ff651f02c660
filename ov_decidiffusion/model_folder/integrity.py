"""Whether a model folder is whole: its files, their sizes and hashes, and JSON that can be read."""

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
        ValueError: names what is missing or of another size.
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
    """Read every file of a model folder and compare it with what was written: some seconds for the real models.

    Raises:
        ValueError: names the files that are missing or damaged, or the folder has no hashes to compare with.

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
    """Say of an error that a folder's contents lead to which file is damaged, or else what was being done.

    Raises:
        ValueError: in place of whatever a damaged or odd file leads to.
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
    return f"`model_dir` {folder} is damaged: {', '.join(names)} {verb} {what}. Delete the folder and {make} again."


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a link leads elsewhere than in its folder, or to where the hub's cache keeps a folder's files."""
    real, allowed = file.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    return not any(real.is_relative_to(place) for place in allowed)


def read_json(file: str | Path, remedy: str = "make the folder again") -> dict[str, Any]:
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
