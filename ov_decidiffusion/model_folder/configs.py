"""The JSON files of a model folder: sizes and scales, the scheduler, and what the folder was made from."""

from pathlib import Path
from typing import Any

from ov_decidiffusion.arguments import check_range, check_whole, shown
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.layout import CONVERSION_REPORT, DEFAULTS_FILE, MODEL_INDEX
from ov_decidiffusion.model_folder.writing import write_json

MAX_SAMPLE_SIZE, MAX_WIDTH = 4096, 65_536


def check_configs(unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """Check the settings that sizes and scales are computed from; ValueError names a wrong one."""
    for name, most in (("sample_size", MAX_SAMPLE_SIZE), ("in_channels", 64), ("cross_attention_dim", MAX_WIDTH)):
        check_whole(f"unet/config.json: {name}", unet.get(name), 1, most)
    for where, config in (("unet", unet), ("vae_decoder", vae)):
        widths = config.get("block_out_channels")
        if not isinstance(widths, list) or not 1 <= len(widths) <= 8:
            raise ValueError(f"`{where}/config.json: block_out_channels` must be 1 to 8 widths, got {shown(widths)}.")
        for width in widths:
            check_whole(f"{where}/config.json: block_out_channels", width, 1, MAX_WIDTH)
    downsamples = _downsamples(unet)
    if (
        not isinstance(downsamples, list)
        or not all(isinstance(one, bool) for one in downsamples)
        or len(downsamples) > 8
    ):
        raise ValueError(
            "`unet/config.json: configurations` must hold `add_downsample`, up to 8 of true and false, or be left out, "
            f"got {shown(unet.get('configurations'))}."
        )
    check_range("vae_decoder/config.json: scaling_factor", vae.get("scaling_factor"), 1e-4, 1e4)


def vae_factor(config: dict[str, Any]) -> int:
    """Pixels per latent position, along a side."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def unet_factor(config: dict[str, Any]) -> int:
    """The factor by which the U-Net shrinks the latents' sides: 2 to the number of its halvings."""
    return 2 ** sum(_downsamples(config))


def _downsamples(config: dict[str, Any]) -> Any:
    """For each level of the U-Net, whether it halves the sides; in Stable Diffusion all but the last do."""
    nas = config.get("configurations", {})
    if nas == {}:
        return [True] * (len(config["block_out_channels"]) - 1)
    return nas.get("add_downsample") if isinstance(nas, dict) else None


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's settings; the checkpoint's own if the folder holds another scheduler for other tools."""
    own = folder / "ov_scheduler" / "scheduler_config.json"
    return read_json(own if own.is_file() else folder / "scheduler" / "scheduler_config.json")


def read_origin(folder: Path) -> dict[str, Any]:
    """The checkpoint that a folder was made from, its revision and the weights' format; None for what is unknown."""
    file = folder / CONVERSION_REPORT
    report = read_json(file) if file.is_file() else {}
    return {name: report.get(name) for name in ("checkpoint", "revision", "weight_format")}


def write_settings(
    target: Path, scheduler: dict[str, Any], scheduler_for_peers: dict[str, Any], defaults: dict[str, Any]
) -> None:
    """Write the scheduler, the pipeline's defaults, and the ``model_index.json`` that other tools start from."""
    write_json(target / "scheduler" / "scheduler_config.json", scheduler_for_peers)
    if scheduler_for_peers is not scheduler:
        write_json(target / "ov_scheduler" / "scheduler_config.json", scheduler)
    write_json(target / DEFAULTS_FILE, defaults)
    index = MODEL_INDEX | {"scheduler": ["diffusers", scheduler_for_peers["_class_name"]]}
    write_json(target / "model_index.json", index)
