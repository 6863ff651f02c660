"""One conversion: each part of a checkpoint is converted to OpenVINO and checked, and the settings are written."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino_tokenizers import convert_tokenizer

from ov_decidiffusion.conversion.checkpoint import Access, copy_tokenizer, weights_size
from ov_decidiffusion.conversion.hub import find_checkpoint, find_tiny_decoder
from ov_decidiffusion.conversion.reports import ConversionReport, PartReport, fingerprint_of, source_files, source_of
from ov_decidiffusion.conversion.torch_modules import load_tokenizer
from ov_decidiffusion.conversion.trace import TRACED, load_part, measure_agreement, run_torch, trace
from ov_decidiffusion.errors import ConversionError
from ov_decidiffusion.model_folder.configs import write_settings
from ov_decidiffusion.model_folder.defaults import DEFAULTS_1_0, DEFAULTS_2_0
from ov_decidiffusion.model_folder.integrity import describe_files, read_json
from ov_decidiffusion.model_folder.layout import (
    CONVERSION_REPORT,
    DEFAULTS_FILE,
    FORMAT,
    TINY_DECODER,
    config_file,
    graph_file,
    prompt_tokenizer_file,
    tokenizer_dir,
)
from ov_decidiffusion.model_folder.tokenizer import prompt_tokenizer
from ov_decidiffusion.model_folder.writing import building, check_disk, naming_a_full_disk, write_json
from ov_decidiffusion.progress import progress_bar
from ov_decidiffusion.runtime.memory import gc_frozen, release_freed_memory
from ov_decidiffusion.schedulers.registry import SQUEEZED, make_scheduler, peer_scheduler_config, up_to_date

MIN_PSNR = 40.0  # dB
SMALL_CHECKPOINT = 500e6  # bytes; up to this size a conversion is verified by default


def make_model_dir(
    checkpoint: str | Path,
    model_dir: Path,
    weight_format: str,
    verify: bool | None,
    access: Access,
) -> ConversionReport:
    """Convert a checkpoint, replacing ``model_dir`` if it exists; for the arguments see ``convert_checkpoint``."""
    check_disk(model_dir.parent, 0, "The converted folder")  # before anything is downloaded for it
    folder = find_checkpoint(checkpoint, **asdict(access))
    make_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"))  # refuse it now, not after the work
    if verify is None:
        verify = weights_size(folder) <= SMALL_CHECKPOINT
    read = source_files(folder)
    size = weights_size(folder) * (1 if weight_format == "fp16" else 2)
    check_disk(model_dir.parent, size, "The converted folder")
    folders = _folders_of_parts(folder, find_tiny_decoder(folder, _is_local(checkpoint) or access.local_files_only))
    with building(model_dir) as partial, gc_frozen():
        parts = _convert_parts(folders, folder, partial, weight_format, verify)
        write_checkpoint_settings(folder, partial)
        content = {"format": FORMAT} | source_of(checkpoint, access.revision)
        content |= {"weight_format": weight_format, "fingerprint": fingerprint_of(read), "read": read}
        content |= {"files": describe_files(partial), "parts": [asdict(part) for part in parts]}
        write_json(partial / CONVERSION_REPORT, content)
    return ConversionReport(model_dir, weight_format, tuple(parts), converted=True)


def _is_local(checkpoint: str | Path) -> bool:
    return Path(checkpoint).expanduser().is_dir()


def _folders_of_parts(folder: Path, tiny_decoder: Path | None) -> dict[str, Path]:
    """The parts to convert, and the folder that each is loaded from."""
    folders = dict.fromkeys((name for name in TRACED if name != TINY_DECODER), folder)
    return folders if tiny_decoder is None else folders | {TINY_DECODER: tiny_decoder}


def verify_conversion(found: ConversionReport, checkpoint: str | Path, access: Access) -> ConversionReport:
    """Verify a folder that was converted without verification, and record the result; a part whose weights cannot be
    found now stays unverified."""
    if all(part.psnr is not None for part in found.parts):
        return found
    folder, verified = find_checkpoint(checkpoint, **asdict(access)), []
    has_tiny = TINY_DECODER in [part.name for part in found.parts]
    folders = _folders_of_parts(folder, find_tiny_decoder(folder, _is_local(checkpoint)) if has_tiny else None)
    for part in progress_bar(found.parts, desc="verifying", unit="part"):
        if part.name not in folders:
            verified.append(part)
            continue
        reference, example = run_torch(TRACED[part.name], folders[part.name])
        agreement = _check_agreement(part.name, graph_file(found.model_dir, part.name), example, reference)
        verified.append(replace(part, psnr=agreement))
    report_file = found.model_dir / CONVERSION_REPORT
    write_json(report_file, read_json(report_file) | {"parts": [asdict(part) for part in verified]})
    return replace(found, parts=tuple(verified))


def _convert_parts(
    folders: dict[str, Path], checkpoint: Path, target: Path, weight_format: str, verify: bool
) -> list[PartReport]:
    reports = []
    with progress_bar(total=len(folders) + 1, desc="converting", unit="part") as progress:
        for name, folder in folders.items():
            progress.set_postfix_str(name)
            reports.append(_convert_part(name, folder, target, weight_format, verify))
            progress.update()
        progress.set_postfix_str("tokenizer")
        write_tokenizer(checkpoint, target)
        progress.update()
    return reports


def _convert_part(name: str, folder: Path, target: Path, weight_format: str, verify: bool) -> PartReport:
    """Trace one component and write it; PyTorch's copy is freed before the converted one is checked."""
    start, part, file = time.perf_counter(), TRACED[name], graph_file(target, name)
    file.parent.mkdir(parents=True)
    reference, example = None, {}
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
            "needed. Do not use this conversion."
        )
    return agreement


def _config_for_peers(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a converted model, with the class names that other tools know."""
    if name == "unet":
        config = config | {"_class_name": "UNet2DConditionModel", "time_cond_proj_dim": None}
    elif name.startswith("vae"):
        config = config | {"_class_name": "AutoencoderKL"}
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}


def write_tokenizer(checkpoint: Path, model_dir: Path) -> None:
    """Write a checkpoint's tokenizer in three forms: its own files, an OpenVINO model, and a file for ``TextEncoder``.

    Raises:
        CheckpointError: the tokenizer cannot be built, or lacks a token that begins, ends or pads a prompt.
    """
    tokenizer = load_tokenizer(checkpoint)
    backend = prompt_tokenizer(tokenizer)
    copy_tokenizer(checkpoint, tokenizer_dir(model_dir))
    ov.save_model(convert_tokenizer(tokenizer), tokenizer_dir(model_dir) / "openvino_tokenizer.xml")
    backend.save(str(prompt_tokenizer_file(model_dir)))


def write_checkpoint_settings(folder: Path, target: Path) -> None:
    """Write the scheduler and the defaults of a checkpoint."""
    scheduler = up_to_date(read_json(folder / "scheduler" / "scheduler_config.json"))
    defaults = DEFAULTS_2_0 if scheduler["_class_name"] == SQUEEZED else DEFAULTS_1_0
    if (folder / DEFAULTS_FILE).is_file():
        defaults = defaults | read_json(folder / DEFAULTS_FILE)
    write_settings(target, scheduler, peer_scheduler_config(scheduler), defaults)
