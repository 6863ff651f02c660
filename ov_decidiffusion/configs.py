"""What a model folder's settings say of sizes and scales."""

from typing import Any

from ov_decidiffusion.arguments import check_range, check_whole, shown

MAX_SAMPLE_SIZE, MAX_WIDTH = 4096, 65_536


def check_configs(unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """What sizes and scales are computed from."""
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
    """How many pixels of a side are one latent position."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def unet_factor(config: dict[str, Any]) -> int:
    """How often the U-Net halves the latents' sides."""
    return 2 ** sum(_downsamples(config))


def _downsamples(config: dict[str, Any]) -> Any:
    """Whether each level of the U-Net halves them; in Stable Diffusion's all but the last do."""
    nas = config.get("configurations", {})
    if nas == {}:
        return [True] * (len(config["block_out_channels"]) - 1)
    return nas.get("add_downsample") if isinstance(nas, dict) else None
