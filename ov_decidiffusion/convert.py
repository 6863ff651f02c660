"""Checkpoint folder -> OpenVINO model folder, a component at a time."""

import hashlib
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino_tokenizers import convert_tokenizer
from tqdm.auto import tqdm

from ov_decidiffusion.checkpoint import (
    checkpoint_files,
    copy_tokenizer,
    load_tokenizer,
    weights_size,
)
from ov_decidiffusion.download import find_checkpoint
from ov_decidiffusion.folder import (
    CONVERSION_REPORT,
    DEFAULTS_1_0,
    DEFAULTS_2_0,
    DEFAULTS_FILE,
    FORMAT,
    QUANTIZED_KINDS,
    building,
    check_disk,
    check_model_dir,
    config_file,
    default_model_dir,
    describe_files,
    graph_file,
    hashes,
    is_free,
    naming_a_full_disk,
    only_one,
    quantized_sibling,
    read_json,
    tokenizer_dir,
    weights_file,
    write_json,
    write_settings,
)
from ov_decidiffusion.memory import release_freed_memory
from ov_decidiffusion.schedulers import make_scheduler, peer_scheduler_config
from ov_decidiffusion.trace import TRACED, load_part, measure_agreement, run_torch, trace

logger = logging.getLogger(__name__)

REPORT_FIELDS = ("format", "checkpoint", "revision", "weight_format", "fingerprint", "read", "files", "parts")
WEIGHT_FORMATS = ("fp16", "fp32")
MIN_PSNR = 40.0  # dB
SMALL_CHECKPOINT = 500e6  # bytes; up to this size a conversion is verified unless told otherwise


class ConversionError(RuntimeError):
    """A converted model does not agree with the PyTorch model that it came from."""


@dataclass(frozen=True)
class PartReport:
    """One converted component."""

    name: str
    megabytes: float
    seconds: float
    psnr: float | None  # dB against PyTorch, None where it was not verified


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion produced; ``str()`` gives it as a table."""

    model_dir: Path
    weight_format: str
    parts: tuple[PartReport, ...]
    converted: bool  # False: the folder had been there before

    def __str__(self) -> str:
        lines = [f"{'part':<13}{'size':>10}{'time':>9}{'agreement with PyTorch':>25}"]
        for part in self.parts:
            psnr = "not verified" if part.psnr is None else f"{part.psnr:.1f} dB"
            lines.append(f"{part.name:<13}{part.megabytes:>7.1f} MB{part.seconds:>7.1f} s{psnr:>25}")
        verb = "converted to" if self.converted else "found in"
        return "\n".join([*lines, f"{verb} {self.model_dir} ({self.weight_format} weights)"])


def convert_checkpoint(
    checkpoint: str | Path,
    model_dir: str | Path | None = None,
    weight_format: str = "fp16",
    verify: bool | None = None,
    revision: str | None = None,
    allow_pickles: bool = False,
) -> ConversionReport:
    """Convert a DeciDiffusion checkpoint to an OpenVINO model folder; does nothing where one is complete.

    Args:
        checkpoint: a folder or a hub id, as ``find_checkpoint`` takes it.
        model_dir: the folder to make; ``default_model_dir(checkpoint, weight_format)`` if None.
        weight_format: how weights are stored, "fp16" or "fp32".
        verify: run the same seeded input through PyTorch and through the converted model at f32, and fail below
            40 dB. None verifies small checkpoints only.
        revision: of a hub id.
        allow_pickles: as ``find_checkpoint``.

    Returns:
        sizes in MB, seconds, and the agreement with PyTorch in dB: 20 log10(max|reference| / RMSE).

    Raises:
        ValueError: a wrong argument, an unknown scheduler, or ``model_dir`` holds something else.
        CheckpointError: as ``find_checkpoint``.
        OSError: the folder cannot be written, or there is no room for it.
        ConversionError: a converted model disagrees with PyTorch.
    """
    if weight_format not in WEIGHT_FORMATS:
        raise ValueError(f"`weight_format` must be one of {', '.join(WEIGHT_FORMATS)}, got {weight_format!r}.")
    default = model_dir is None
    model_dir = default_model_dir(checkpoint, weight_format) if default else Path(model_dir).expanduser()
    source = _source(checkpoint, revision)
    with only_one(model_dir):
        if not is_free(model_dir):
            found = _existing_report(model_dir, checkpoint, revision, weight_format, verify, default)
            if found is not None:
                return found
            _drop_quantized(model_dir)
        return _convert(find_checkpoint(checkpoint, revision, allow_pickles), model_dir, weight_format, verify, source)


def _convert(
    folder: Path, model_dir: Path, weight_format: str, verify: bool | None, source: dict[str, str | None]
) -> ConversionReport:
    make_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"))  # refused now, not after the work
    if verify is None:
        verify = weights_size(folder) <= SMALL_CHECKPOINT
    read = source_files(folder)
    size = weights_size(folder) * (1 if weight_format == "fp16" else 2)
    check_disk(model_dir.parent, size, "The converted folder")
    with building(model_dir) as partial:
        parts = _convert_parts(folder, partial, weight_format, verify)
        write_checkpoint_settings(folder, partial)
        content = {"format": FORMAT} | source
        content |= {"weight_format": weight_format, "fingerprint": _fingerprint(read), "read": read}
        content |= {"files": describe_files(partial), "parts": [asdict(part) for part in parts]}
        write_json(partial / CONVERSION_REPORT, content)
    return ConversionReport(model_dir, weight_format, tuple(parts), converted=True)


def _existing_report(
    model_dir: Path,
    checkpoint: str | Path,
    revision: str | None,
    weight_format: str,
    verify: bool | None,
    default: bool,
) -> ConversionReport | None:
    """The report of a complete folder, or None for one to convert anew: of an older format, or, in the default place,
    of the same checkpoint as it was before it changed. Anything else is left alone and refused."""
    report_file = model_dir / CONVERSION_REPORT
    missing = [name for name in TRACED if not weights_file(model_dir, name).is_file()]
    if missing or not report_file.is_file():
        raise ValueError(
            f"`model_dir` {model_dir} exists and is no complete conversion of ours (it lacks "
            f"{', '.join(missing) or CONVERSION_REPORT}): delete it or choose another folder."
        )
    report = read_json(report_file)
    if "format" not in report and report.get("fingerprint"):
        logger.warning("%s is of an older format, without hashes of what it was made of: converting anew.", model_dir)
        return None
    lacking = [name for name in REPORT_FIELDS if name not in report]
    if lacking or report["format"] != FORMAT:
        raise ValueError(
            f"{report_file} is no report of this version ({', '.join(lacking) or 'another format'}): delete "
            f"{model_dir} or choose another folder."
        )
    check_model_dir(model_dir)
    wanted = _source(checkpoint, revision) | {"weight_format": weight_format}
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        wanted["fingerprint"] = _fingerprint(source_files(folder, report["read"]))
    differing = [name for name, value in wanted.items() if report[name] != value]
    if default and differing == ["fingerprint"]:
        logger.warning("%s was made of %s as it was before it changed: converting anew.", model_dir, checkpoint)
        return None
    if differing:
        raise ValueError(
            f"`model_dir` {model_dir} holds {report['checkpoint']} (revision {report['revision']}, "
            f"{report['weight_format']} weights), and its {' and '.join(differing)} differs from what is asked for "
            f"({checkpoint}, revision {revision}, {weight_format}): delete it or choose another folder."
        )
    parts = tuple(PartReport(**part) for part in report["parts"])
    if verify and any(part.psnr is None for part in parts):
        parts = _verify_parts(parts, find_checkpoint(checkpoint, revision), model_dir)
        write_json(report_file, report | {"parts": [asdict(part) for part in parts]})
    return ConversionReport(model_dir, weight_format, parts, converted=False)


def _drop_quantized(model_dir: Path) -> None:
    """Remove the INT8 and INT4 models that were made of a folder which is about to be replaced."""
    for mode in QUANTIZED_KINDS:
        sibling = quantized_sibling(model_dir, mode)
        report = sibling / CONVERSION_REPORT
        source = model_dir / CONVERSION_REPORT
        if report.is_file() and read_json(report).get("fingerprint") == read_json(source).get("fingerprint"):
            shutil.rmtree(sibling)


def _verify_parts(parts: tuple[PartReport, ...], folder: Path, model_dir: Path) -> tuple[PartReport, ...]:
    """Check a folder that was converted without a check."""
    verified = []
    for report in tqdm(parts, desc="verifying", unit="part"):
        reference, example = run_torch(TRACED[report.name], folder)
        agreement = _check_agreement(report.name, graph_file(model_dir, report.name), example, reference)
        verified.append(replace(report, psnr=agreement))
    return tuple(verified)


def _source(checkpoint: str | Path, revision: str | None) -> dict[str, str | None]:
    """What a model folder was made of: a hub id with its revision, or the name of a folder, which may move."""
    folder = Path(checkpoint).expanduser()
    return {"checkpoint": folder.resolve().name if folder.is_dir() else str(checkpoint), "revision": revision}


def source_files(folder: Path, known: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """Size, time of change and sha256 of every file that a conversion reads.

    Args:
        known: what was found of them before: a file of the same size and time is not read again.
    """
    found = {}
    for file in checkpoint_files(folder):
        stat = file.stat()
        found[file.relative_to(folder).as_posix()] = {"size": stat.st_size, "changed": stat.st_mtime_ns}
    known = known or {}
    same = {name: known[name] for name, now in found.items() if now.items() <= known.get(name, {}).items()}
    read = hashes(folder, [name for name in found if name not in same])
    return {name: same.get(name) or now | {"sha256": read[name]} for name, now in found.items()}


def _fingerprint(read: dict[str, dict[str, Any]]) -> str:
    """One number for the contents of all files of a checkpoint."""
    return hashlib.sha256(
        json.dumps({name: file["sha256"] for name, file in sorted(read.items())}).encode()
    ).hexdigest()


def _convert_parts(folder: Path, target: Path, weight_format: str, verify: bool) -> list[PartReport]:
    reports = []
    with tqdm(total=len(TRACED) + 1, desc="converting", unit="part") as progress:
        for name in TRACED:
            progress.set_postfix_str(name)
            reports.append(_convert_part(name, folder, target, weight_format, verify))
            progress.update()
        progress.set_postfix_str("tokenizer")
        write_tokenizer(folder, tokenizer_dir(target))
        progress.update()
    return reports


def _convert_part(name: str, folder: Path, target: Path, weight_format: str, verify: bool) -> PartReport:
    """Trace one component and write it; PyTorch's copy is freed before the converted one is checked."""
    start, part, file = time.perf_counter(), TRACED[name], graph_file(target, name)
    file.parent.mkdir(parents=True)
    reference, example = None, None
    if verify:
        reference, example = run_torch(part, folder)
        release_freed_memory()
    module, config = load_part(part, folder, torch.float16 if weight_format == "fp16" else torch.float32)
    model = trace(module, config, part)
    with naming_a_full_disk(file.parent):
        ov.save_model(model, file, compress_to_fp16=weight_format == "fp16")
    write_json(config_file(target, name), _config_for_peers(name, config))
    del module, model
    release_freed_memory()
    psnr = None if reference is None else _check_agreement(name, file, example, reference)
    size = sum(path.stat().st_size for path in file.parent.iterdir())
    return PartReport(name, size / 1e6, time.perf_counter() - start, psnr)


def _check_agreement(name: str, file: Path, example: dict[str, torch.Tensor], reference: list[np.ndarray]) -> float:
    agreement = measure_agreement(file, example, reference)
    if agreement < MIN_PSNR:
        raise ConversionError(
            f"The converted {name} agrees with PyTorch to {agreement:.1f} dB only; at least {MIN_PSNR:.0f} dB are "
            "needed. The conversion is not to be used."
        )
    return agreement


def _config_for_peers(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The settings beside a converted model, under the class names that other tools know."""
    if name == "unet":
        config = config | {"_class_name": "UNet2DConditionModel", "time_cond_proj_dim": None}
    elif name.startswith("vae"):
        config = config | {"_class_name": "AutoencoderKL"}
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}


def write_tokenizer(folder: Path, target: Path) -> None:
    copy_tokenizer(folder, target)
    ov.save_model(convert_tokenizer(load_tokenizer(folder)), target / "openvino_tokenizer.xml")


def write_checkpoint_settings(folder: Path, target: Path) -> None:
    """The scheduler and the defaults of a checkpoint."""
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    defaults = DEFAULTS_2_0 if scheduler["_class_name"] == "SqueezedDPMSolverMultistepScheduler" else DEFAULTS_1_0
    if (folder / DEFAULTS_FILE).is_file():
        defaults = defaults | read_json(folder / DEFAULTS_FILE)
    write_settings(target, scheduler, peer_scheduler_config(scheduler), defaults)
