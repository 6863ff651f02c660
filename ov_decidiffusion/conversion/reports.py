"""The report of a conversion: what a model folder was made from, and whether it matches a request."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ov_decidiffusion.conversion.checkpoint import checkpoint_files
from ov_decidiffusion.model_folder.integrity import are_described, check_model_dir, explaining, hashes, read_json
from ov_decidiffusion.model_folder.layout import (
    CONVERSION_REPORT,
    FIRST_FORMAT_WITH_HASHES,
    FORMAT,
    PARTS,
    QUANTIZED_KINDS,
    quantized_sibling,
    weights_file,
)

logger = logging.getLogger(__name__)

Part = TypeVar("Part")
REPORT_FIELDS = ("format", "checkpoint", "revision", "weight_format", "fingerprint", "read", "files", "parts")


@dataclass(frozen=True)
class PartReport:
    """One converted component."""

    name: str
    megabytes: float
    seconds: float
    psnr: float | None  # agreement with PyTorch in dB, None if not verified


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion produced; ``str()`` formats it as a table."""

    model_dir: Path
    weight_format: str
    parts: tuple[PartReport, ...]
    converted: bool  # False: the folder existed before

    def __str__(self) -> str:
        lines = [f"{'part':<13}{'size':>10}{'time':>9}{'agreement with PyTorch':>25}"]
        for part in self.parts:
            psnr = "not verified" if part.psnr is None else f"{part.psnr:.1f} dB"
            lines.append(f"{part.name:<13}{part.megabytes:>7.1f} MB{part.seconds:>7.1f} s{psnr:>25}")
        return "\n".join([*lines, self.place])

    @property
    def place(self) -> str:
        """One line that says where the folder is, and whether it existed before."""
        verb = "converted to" if self.converted else "found in"
        return f"{verb} {self.model_dir} ({self.weight_format} weights)"


def existing_report(
    model_dir: Path,
    checkpoint: str | Path,
    revision: str | None,
    weight_format: str,
    default: bool,
) -> ConversionReport | None:
    """The report of a complete folder that matches the request, or None if the folder has to be converted again.

    It has to if it has an older format, or if it lies in the default place and its checkpoint has changed since.

    Args:
        model_dir: the folder.
        checkpoint, revision, weight_format: what is requested; see ``convert_checkpoint``.
        default: whether ``model_dir`` is ``default_model_dir(checkpoint, weight_format)``.

    Raises:
        ValueError: the folder holds anything else; it is left alone.
    """
    report_file = model_dir / CONVERSION_REPORT
    missing = [name for name in PARTS if not weights_file(model_dir, name).is_file()]
    if missing or not report_file.is_file():
        raise ValueError(
            f"`model_dir` {model_dir} exists and is no complete conversion of ours (it lacks "
            f"{', '.join(missing) or CONVERSION_REPORT}): delete it or choose another folder."
        )
    report = read_json(report_file)
    if "format" not in report and report.get("fingerprint"):
        logger.warning(
            "%s is of an older format, without hashes of what it was made from: converting it again.", model_dir
        )
        return None
    lacking = [name for name in REPORT_FIELDS if name not in report]
    lacking += [name for name in ("read", "files") if name in report and not are_described(report[name])]
    if lacking or report["format"] not in range(FIRST_FORMAT_WITH_HASHES, FORMAT + 1):
        raise ValueError(
            f"{report_file} is no report of this version ({', '.join(lacking) or 'another format'}): delete "
            f"{model_dir} or choose another folder."
        )
    check_model_dir(model_dir)
    wanted = source_of(checkpoint, revision) | {"weight_format": weight_format}
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        wanted["fingerprint"] = fingerprint_of(source_files(folder, report["read"]))
    differing = [name for name, value in wanted.items() if report[name] != value]
    if default and differing == ["fingerprint"]:
        logger.warning("%s was made from %s as it was before it changed: converting it again.", model_dir, checkpoint)
        return None
    if differing:
        raise ValueError(
            f"`model_dir` {model_dir} holds {report['checkpoint']} (revision {report['revision']}, "
            f"{report['weight_format']} weights), and its {' and '.join(differing)} differs from what is asked for "
            f"({checkpoint}, revision {revision}, {weight_format}): delete it or choose another folder."
        )
    if report["format"] < FORMAT:
        logger.warning("%s is of an older format, which makes fewer sizes of pictures: converting it again.", model_dir)
        return None
    parts = read_parts(model_dir, report, PartReport)
    return ConversionReport(model_dir, weight_format, parts, converted=False)


def read_parts(folder: Path, report: dict[str, Any], kind: type[Part]) -> tuple[Part, ...]:
    """The entries for each part in a folder's report, as dataclasses.

    Args:
        folder: the folder, for messages.
        report: its report.
        kind: the dataclass of an entry.

    Raises:
        ValueError: an entry lacks a field, or has one of another type.
    """
    with explaining(folder, "reading its report"):
        parts = tuple(kind(**part) for part in report["parts"])
        for part in parts:
            for name, wanted in get_type_hints(kind).items():
                value = getattr(part, name)
                if not isinstance(value, wanted):
                    raise TypeError(f"{name} is {value!r}")
    return parts


def quantized_from(model_dir: Path) -> list[Path]:
    """The folders of INT8 and INT4 models beside a model folder that were made from it."""
    fingerprint = read_json(model_dir / CONVERSION_REPORT).get("fingerprint")
    siblings = [quantized_sibling(model_dir, mode) for mode in QUANTIZED_KINDS]
    made = [one for one in siblings if (one / CONVERSION_REPORT).is_file() and one != model_dir]
    return [one for one in made if read_json(one / CONVERSION_REPORT).get("fingerprint") == fingerprint]


def source_of(checkpoint: str | Path, revision: str | None) -> dict[str, str | None]:
    """What a model folder was made from: a hub id with its revision, or a folder's name without its path."""
    folder = Path(checkpoint).expanduser()
    return {"checkpoint": folder.resolve().name if folder.is_dir() else str(checkpoint), "revision": revision}


def source_files(folder: Path, known: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """Size, time of change and SHA-256 of every file that a conversion reads.

    Args:
        folder: the checkpoint.
        known: an earlier result: a file with the same size and time is not read again.
    """
    found = {}
    for file in checkpoint_files(folder):
        stat = file.stat()
        found[file.relative_to(folder).as_posix()] = {"size": stat.st_size, "changed": stat.st_mtime_ns}
    known = known or {}
    same = {name: known[name] for name, now in found.items() if now.items() <= known.get(name, {}).items()}
    read = hashes(folder, [name for name in found if name not in same])
    return {name: same.get(name) or now | {"sha256": read[name]} for name, now in found.items()}


def fingerprint_of(read: dict[str, dict[str, Any]]) -> str:
    """One hash of the contents of all files of a checkpoint."""
    return hashlib.sha256(
        json.dumps({name: file["sha256"] for name, file in sorted(read.items())}).encode()
    ).hexdigest()
