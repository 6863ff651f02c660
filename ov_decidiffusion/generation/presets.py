"""Presets: one word sets several arguments, which trade quality for speed."""

from collections.abc import Mapping
from typing import Any

from ov_decidiffusion.arguments import check_choice

# What a call uses if neither the caller nor the preset sets a value. None: the checkpoint or the pipeline decides.
PLAIN: dict[str, Any] = {
    "solver": None,
    "num_inference_steps": None,
    "quantized": False,
    "cache_interval": 1,
    "cache_power": 1.0,
    "guidance_interval": None,
    "guidance_cache_interval": 1,
    "decoder": "whole",
}
NOISY = (0.6, 1e7)  # at lower noise levels guidance changes little
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {
        "solver": "dpm++",
        "num_inference_steps": 10,
        "quantized": True,
        "cache_interval": 3,
        "cache_power": 1.5,
        "guidance_interval": NOISY,
    },
    "fast": {
        "solver": "dpm++",
        "num_inference_steps": 6,
        "quantized": True,
        "cache_interval": 3,
        "guidance_interval": NOISY,
        "decoder": "tiny",
    },
}


def apply_preset(preset: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A value for every name in ``PLAIN``: the caller's, otherwise the preset's, otherwise the plain one.

    Args:
        preset: "exact", "balanced" or "fast".
        asked: the caller's values by name; None where there is none.

    Raises:
        ValueError: there is no such preset.
    """
    check_choice("preset", preset, PRESETS)
    return PLAIN | PRESETS[preset] | {name: asked[name] for name in PLAIN if asked[name] is not None}


def way_down() -> dict[str, dict[str, Any]]:
    """From exact to fast, one saving at a time: what each adds, and the arguments of a call with all savings so far."""
    balanced, fast = PRESETS["balanced"], PRESETS["fast"]
    uncached = {name: balanced[name] for name in ("solver", "num_inference_steps", "quantized")}
    unguided = uncached | {"guidance_interval": balanced["guidance_interval"]}
    return {
        "INT8": {"quantized": True},
        f"and DPM-Solver++, {balanced['num_inference_steps']} steps": uncached,
        "and no guidance at the end": unguided,
        f"and caching by {balanced['cache_interval']}: preset balanced": {"preset": "balanced"},
        f"and {fast['num_inference_steps']} steps": {"preset": "fast", "decoder": "whole"},
        "and the tiny decoder: preset fast": {"preset": "fast", "decoder": "tiny"},
    }
