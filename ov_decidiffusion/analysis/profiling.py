"""Where the time of a U-Net goes, level by level, measured by OpenVINO's profiler."""

import re
from collections import defaultdict

import numpy as np

from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

LEVEL = re.compile(r"\b(down_blocks\.\d+|mid_block|up_blocks\.\d+)\b")
OTHER = "other"


def level_times(
    pipe: OVStableDiffusionPipeline, width: int | None = None, height: int | None = None, runs: int = 3
) -> dict[str, float]:
    """Milliseconds of one U-Net run, for each block of its levels, and for everything outside them ("other").

    Args:
        pipe: the pipeline; a copy of its U-Net is compiled with profiling.
        width, height: the picture's size in pixels; None for the default size.
        runs: number of runs, of which the fastest counts.

    Returns:
        the milliseconds by block, in the order in which the blocks run.
    """
    default = pipe.default_size
    h, w = (
        (asked or usual) // pipe.vae_scale_factor for asked, usual in zip((height, width), default[::-1], strict=True)
    )
    config = pipe.models.unet_config
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((1, config["in_channels"], h, w), np.float32),
        "timestep": np.array([500], np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 77, config["cross_attention_dim"]), np.float32),
    }
    request = pipe.models.profiled("unet").create_infer_request()
    request.infer(inputs)  # packs the weights
    found: list[dict[str, float]] = []
    for _ in range(runs):
        request.infer(inputs)
        times: dict[str, float] = defaultdict(float)
        for node in request.profiling_info:
            level = LEVEL.search(node.node_name)
            times[level[1] if level else OTHER] += node.real_time.total_seconds() * 1000
        found.append(times)
    best = min(found, key=lambda times: sum(times.values()))
    return {name: best[name] for name in sorted(best, key=_order)}


def _order(name: str) -> tuple[int, str]:
    kinds = ("down", "mid", "up", OTHER)
    return next(i for i, kind in enumerate(kinds) if name.startswith(kind)), name
