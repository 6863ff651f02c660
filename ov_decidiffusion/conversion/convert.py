"""Checkpoint -> OpenVINO model folder, unless the folder exists already."""

import shutil
from pathlib import Path

from ov_decidiffusion.arguments import check_choice, check_flag, check_path
from ov_decidiffusion.conversion.checkpoint import Access
from ov_decidiffusion.conversion.reports import ConversionReport, existing_report, quantized_from
from ov_decidiffusion.model_folder.layout import default_model_dir
from ov_decidiffusion.model_folder.writing import is_free, only_one, refuse_own_folder

WEIGHT_FORMATS = ("fp16", "fp32")


def convert_checkpoint(
    checkpoint: str | Path,
    model_dir: str | Path | None = None,
    weight_format: str = "fp16",
    verify: bool | None = None,
    revision: str | None = None,
    allow_pickles: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> ConversionReport:
    """Convert a DeciDiffusion checkpoint to an OpenVINO model folder; does nothing if a complete one exists.

    A tiny decoder is converted too if one is found; see ``find_tiny_decoder``.

    Args:
        checkpoint: a folder or a hub id; see ``find_checkpoint``.
        model_dir: the folder to make; ``default_model_dir(checkpoint, weight_format)`` if None.
        weight_format: how weights are stored: "fp16" or "fp32".
        verify: run the same seeded input through PyTorch and through the converted model at f32, and fail if they
            agree to less than 40 dB. None verifies small checkpoints only.
        revision, allow_pickles, token, local_files_only: see ``find_checkpoint``.

    Returns:
        for each part the size in MB, the seconds, and the agreement with PyTorch in dB:
        20 log10(max|reference| / RMSE).

    Raises:
        ValueError: a wrong argument, an unknown scheduler, or ``model_dir`` holds something else.
        CheckpointError: see ``find_checkpoint``.
        OSError: the folder cannot be written, or there is no room for it.
        ConversionError: a converted model disagrees with PyTorch.

    Example:
        >>> from ov_decidiffusion import convert_checkpoint
        >>> report = convert_checkpoint("checkpoints/tiny-decidiffusion")
        >>> report.model_dir.name
        'tiny-decidiffusion-fp16'
    """
    check_path("checkpoint", checkpoint, "a folder or a hub id")
    check_choice("weight_format", weight_format, WEIGHT_FORMATS)
    check_flag("allow_pickles", allow_pickles)
    check_flag("local_files_only", local_files_only)
    access = Access(revision, allow_pickles, token, local_files_only)
    if verify is not None:
        check_flag("verify", verify)
    default = model_dir is None
    model_dir = default_model_dir(checkpoint, weight_format) if default else check_path("model_dir", model_dir)
    if model_dir.name in ("", ".."):  # a temporary folder is made beside it, under its name
        model_dir = model_dir.resolve()
    found, outdated = None, []
    with only_one(model_dir):
        if not is_free(model_dir):
            found = existing_report(model_dir, checkpoint, revision, weight_format, default)
            if found is not None and not verify:
                return found
            outdated = quantized_from(model_dir)
        from ov_decidiffusion.conversion.export import (  # takes seconds, for torch and the hub
            make_model_dir,
            verify_conversion,
        )

        if found is not None:
            return verify_conversion(found, checkpoint, access)
        refuse_own_folder(model_dir)
        report = make_model_dir(checkpoint, model_dir, weight_format, verify, access)
        for quantized in outdated:
            shutil.rmtree(quantized)
        return report
