"""The options for loading models: a device, a precision, threads, a cache, and OpenVINO's own properties."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ov_decidiffusion.arguments import check_choice, check_path, check_whole, shown
from ov_decidiffusion.runtime.devices import find_device, make_core
from ov_decidiffusion.runtime.precision import INFERENCE_PRECISIONS, choose_precision

logger = logging.getLogger(__name__)

MAX_THREADS = 4096


@dataclass(frozen=True)
class Target:
    """What models are compiled for.

    Attributes:
        core: OpenVINO's core.
        device: OpenVINO's name of the device.
        config: OpenVINO's properties to compile with.
        precision: "f32", "bf16" or "f16"; None leaves the choice to OpenVINO.
        reason: a sentence that says the precision and why.
    """

    core: ov.Core
    device: str
    config: dict[str, Any]
    precision: str | None
    reason: str


def choose_target(
    device: Any = "CPU",
    inference_precision: Any = "auto",
    cache_dir: Any = None,
    threads: Any = None,
    ov_config: Any = None,
) -> Target:
    """Check the options for loading models, and choose the precision; for the arguments see ``Models.load``.

    Raises:
        ValueError: the message names the wrong argument.
    """
    core, device, config = check_loading(device, inference_precision, cache_dir, threads, ov_config)
    if inference_precision != "auto":
        return Target(core, device, config, inference_precision, f"{inference_precision}, as asked for")
    precision, reason = choose_precision(core, device)
    logger.info("inference_precision: %s", reason)
    return Target(core, device, config, precision, reason)


def check_loading(
    device: Any = "CPU",
    inference_precision: Any = "auto",
    cache_dir: Any = None,
    threads: Any = None,
    ov_config: Any = None,
) -> tuple[ov.Core, str, dict[str, Any]]:
    """Refuse wrong options for loading models, before any long work; for the arguments see ``Models.load``.

    Returns:
        OpenVINO's core, its name of the device, and its properties to compile with; the caller's override others.

    Raises:
        ValueError: the message names the wrong argument.
    """
    check_choice("inference_precision", inference_precision, INFERENCE_PRECISIONS)
    core = make_core()
    device = find_device(core, device)
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = check_whole("threads", threads, 1, MAX_THREADS)
    if cache_dir is not None:
        config["CACHE_DIR"] = str(check_path("ov_cache_dir", cache_dir))
    if ov_config is not None:
        _try_properties(core, device, ov_config)
    if cache_dir is not None:
        _make_cache(Path(config["CACHE_DIR"]))
    return core, device, config | (ov_config or {})


def _try_properties(core: ov.Core, device: str, ov_config: Any) -> None:
    """Compile a tiny model with these properties: only the device knows which ones it accepts."""
    if not isinstance(ov_config, dict) or not all(isinstance(name, str) for name in ov_config):
        raise ValueError(f"`ov_config` must be a dictionary of OpenVINO's properties by name, got {shown(ov_config)}.")
    sample = ops.parameter([1], np.float32)
    tried = {name: value for name, value in ov_config.items() if name != "CACHE_DIR"}
    try:
        trial = ov.Model(  # pyright: ignore[reportGeneralTypeIssues]  # OpenVINO has two classes of this name
            [ops.relu(sample)], [sample], "trial"
        )
        core.compile_model(trial, device, tried)
    except Exception as error:  # wrong names and wrong values raise several kinds
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"`ov_config` {shown(ov_config)} is not what {device} takes: {reason}") from error


def _make_cache(folder: Path) -> None:
    """Make the cache folder. It must be writable, unless it holds compiled models already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`ov_cache_dir` {folder} cannot be made a folder: {error.strerror}.") from error
    if not os.access(folder, os.W_OK) and not any(folder.glob("*.blob")):
        raise ValueError(f"`ov_cache_dir` {folder} cannot be written to.")
