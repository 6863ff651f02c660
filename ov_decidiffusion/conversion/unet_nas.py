"""U-Net-NAS, the denoiser of DeciDiffusion, composed from diffusers' own layers.

The blocks were found by a neural architecture search, so each one has its own number of residual blocks and
of transformers. A checkpoint describes them in the ``configurations`` dictionary of its ``config.json``;
everything around the blocks (input convolution, time embedding, output convolutions, forward pass) is
diffusers' ``UNet2DConditionModel``.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from safetensors import safe_open
from torch import nn

V1_UNET_CONFIG = Path(__file__).parents[1] / "data" / "decidiffusion_v1_unet.json"  # of DeciDiffusion 1.0
NORM_NUM_GROUPS = 32

SCALAR_FIELDS = {
    "temb_dim": int,
    "resnet_eps": float,
    "resnet_act_fn": str,
    "num_attention_heads": int,
    "cross_attention_dim": int,
    "mix_block_in_forward": bool,
    "add_upsample_mid_block": bool,
    "mid_num_resnets": int,
    "mid_num_attentions": int,
}
PER_LEVEL_FIELDS = {
    "down_blocks_in_channels": int,
    "down_blocks_out_channels": int,
    "down_blocks_num_attentions": int,
    "down_blocks_num_resnets": int,
    "add_downsample": bool,
    "prev_output_channels": int,
    "up_blocks_num_attentions": int,
    "up_blocks_num_resnets": int,
    "add_upsample": bool,
}


def check_configurations(configurations: dict[str, Any], block_out_channels: Sequence[int]) -> None:
    """Refuse a ``configurations`` dictionary that does not describe a U-Net-NAS.

    Args:
        configurations: the dictionary of this name in the checkpoint's ``config.json``.
        block_out_channels: the list of this name beside it; its first entry is the width of level 0.

    Raises:
        ValueError: the message names the field, its value and what is allowed.
    """
    if not isinstance(configurations, dict):
        raise ValueError(f"`configurations` must be a dictionary that describes the blocks, got {configurations!r}.")
    for name, kind in (SCALAR_FIELDS | PER_LEVEL_FIELDS).items():
        if name not in configurations:
            raise ValueError(f"`configurations` lacks the field '{name}'.")
        values = configurations[name]
        if name in SCALAR_FIELDS:
            values = [values]
        elif not isinstance(values, (list, tuple)):
            raise ValueError(f"`configurations['{name}']` must be a list with one entry a level, got {values!r}.")
        for value in values:
            _check_value(name, value, kind)
    levels = len(configurations["down_blocks_out_channels"])
    for name in PER_LEVEL_FIELDS:
        if len(configurations[name]) != levels or not levels:
            raise ValueError(
                f"`configurations['{name}']` has {len(configurations[name])} entries, but "
                f"'down_blocks_out_channels' names {levels} levels; every level needs one."
            )
    _check_widths(configurations, block_out_channels)


def _check_value(name: str, value: Any, kind: type) -> None:
    numeric = kind in (int, float)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (numeric and isinstance(value, bool)):
        raise ValueError(f"`configurations['{name}']` must hold {kind.__name__} values, got {value!r}.")
    positive = "channels" in name or name in ("up_blocks_num_resnets", "down_blocks_num_resnets")
    if numeric and value < 0 or positive and value < 1:
        raise ValueError(
            f"`configurations['{name}']` must be {'at least 1' if positive else 'not negative'}, got {value}."
        )


def _check_widths(configurations: dict[str, Any], block_out_channels: Sequence[int]) -> None:
    outs = list(configurations["down_blocks_out_channels"])
    expected = {
        "temb_dim": 4 * block_out_channels[0],
        "down_blocks_in_channels": [block_out_channels[0], *outs[:-1]],
        "prev_output_channels": [outs[-1], *reversed(outs[1:])],
    }
    for name, value in expected.items():
        found = configurations[name]
        if (list(found) if isinstance(found, (list, tuple)) else found) != value:
            raise ValueError(
                f"`configurations['{name}']` is {found}, but block_out_channels {list(block_out_channels)} and "
                f"down_blocks_out_channels {outs} call for {value}."
            )
    for name in ("down_blocks_in_channels", "down_blocks_out_channels"):
        for width in configurations[name]:
            if width % NORM_NUM_GROUPS:
                raise ValueError(
                    f"`configurations['{name}']` must hold multiples of {NORM_NUM_GROUPS} (the groups of every "
                    f"GroupNorm), got {width}."
                )


def _interleave(resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], mix: bool) -> nn.ModuleList:
    """Order a block's layers: alternating as long as there are both kinds, or all residual blocks first."""
    if not mix:
        return nn.ModuleList([*resnets, *attentions])
    ordered = []
    for i in range(max(len(resnets), len(attentions))):
        ordered += [*resnets[i : i + 1], *attentions[i : i + 1]]
    return nn.ModuleList(ordered)


def _resnet(configurations: dict[str, Any], in_channels: int, out_channels: int) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=configurations["temb_dim"],
        eps=configurations["resnet_eps"],
        groups=NORM_NUM_GROUPS,
        non_linearity=configurations["resnet_act_fn"],
    )


def _attention(configurations: dict[str, Any], channels: int, use_linear_projection: bool) -> Transformer2DModel:
    heads = configurations["num_attention_heads"]
    if not heads or channels % heads:
        raise ValueError(f"`configurations['num_attention_heads']` must divide the width {channels}, got {heads}.")
    return Transformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=channels // heads,
        in_channels=channels,
        num_layers=1,
        cross_attention_dim=configurations["cross_attention_dim"],
        norm_num_groups=NORM_NUM_GROUPS,
        use_linear_projection=use_linear_projection,
    )


class _FlexibleBlock(nn.Module):
    """Base class of the three kinds of block, with a ``modules_list`` of residual blocks and transformers."""

    has_cross_attention = True  # makes diffusers' forward pass the text to every block
    modules_list: nn.ModuleList

    @property
    def resnets(self) -> list[ResnetBlock2D]:
        """The residual blocks, in order; diffusers' forward counts them to distribute the skips."""
        return [module for module in self.modules_list if isinstance(module, ResnetBlock2D)]

    @staticmethod
    def _attend(module: nn.Module, hidden_states: torch.Tensor, text: torch.Tensor, options: dict) -> torch.Tensor:
        return module(hidden_states, encoder_hidden_states=text, return_dict=False, **options)[0]


def _attention_options(
    attention_mask: torch.Tensor | None,
    cross_attention_kwargs: dict | None,
    encoder_attention_mask: torch.Tensor | None,
) -> dict[str, Any]:
    return {
        "attention_mask": attention_mask,
        "cross_attention_kwargs": cross_attention_kwargs,
        "encoder_attention_mask": encoder_attention_mask,
    }


class FlexibleDownBlock2D(_FlexibleBlock):
    """A level on the way down; it keeps a skip after every residual block, before the transformer that follows."""

    def __init__(self, configurations: dict[str, Any], level: int, use_linear_projection: bool):
        super().__init__()
        width = configurations["down_blocks_out_channels"][level]
        first = configurations["down_blocks_in_channels"][level]
        count = configurations["down_blocks_num_resnets"][level]
        resnets = [_resnet(configurations, first if i == 0 else width, width) for i in range(count)]
        attentions = [
            _attention(configurations, width, use_linear_projection)
            for _ in range(configurations["down_blocks_num_attentions"][level])
        ]
        self.modules_list = _interleave(resnets, attentions, configurations["mix_block_in_forward"])
        self.downsamplers = None
        if configurations["add_downsample"][level]:
            self.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, padding=1, name="op")])
        self.keeps_downsampled = level < len(configurations["add_downsample"]) - 1

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns the level's output and its skips, each [b, channels, h, w]."""
        options = _attention_options(attention_mask, cross_attention_kwargs, encoder_attention_mask)
        skips: tuple[torch.Tensor, ...] = ()
        for module in self.modules_list:
            if isinstance(module, ResnetBlock2D):
                hidden_states = module(hidden_states, temb)
                skips += (hidden_states,)
            else:
                hidden_states = self._attend(module, hidden_states, encoder_hidden_states, options)
        if self.downsamplers is not None:
            hidden_states = self.downsamplers[0](hidden_states)
            if self.keeps_downsampled:
                skips += (hidden_states,)
        return hidden_states, skips


class FlexibleMidBlock2D(_FlexibleBlock):
    """The deepest block; it runs at half the last level's side length if that level downsamples."""

    def __init__(self, configurations: dict[str, Any], use_linear_projection: bool):
        super().__init__()
        width = configurations["down_blocks_out_channels"][-1]
        attentions = [
            _attention(configurations, width, use_linear_projection)
            for _ in range(configurations["mid_num_attentions"])
        ]
        resnets = [_resnet(configurations, width, width) for _ in range(configurations["mid_num_resnets"])]
        first = _resnet(configurations, width, width)
        if configurations["mix_block_in_forward"]:  # here a transformer comes before each residual block
            self.modules_list = nn.ModuleList([first, *_interleave(attentions, resnets, mix=True)])
        else:
            self.modules_list = nn.ModuleList([first, *resnets, *attentions])
        upsampler = nn.Identity()
        if configurations["add_upsample_mid_block"]:
            upsampler = Upsample2D(width, use_conv=True)
        self.upsamplers = nn.ModuleList([upsampler])

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns [b, channels, h, w], upsampled if the block has an upsampler."""
        options = _attention_options(attention_mask, cross_attention_kwargs, encoder_attention_mask)
        # The released weights were trained with the first residual block applied twice.
        hidden_states = self.modules_list[0](hidden_states, temb)
        for module in self.modules_list:
            if isinstance(module, ResnetBlock2D):
                hidden_states = module(hidden_states, temb)
            else:
                hidden_states = self._attend(module, hidden_states, encoder_hidden_states, options)
        return self.upsamplers[0](hidden_states)


class FlexibleUpBlock2D(_FlexibleBlock):
    """A level on the way up; every residual block takes one skip, concatenated after its input."""

    def __init__(self, configurations: dict[str, Any], index: int, use_linear_projection: bool):
        super().__init__()
        level = len(configurations["down_blocks_out_channels"]) - 1 - index
        width = configurations["down_blocks_out_channels"][level]
        count = configurations["up_blocks_num_resnets"][index]
        hidden = [configurations["prev_output_channels"][index]] + [width] * (count - 1)
        skip = [width] * (count - 1) + [configurations["down_blocks_in_channels"][level]]
        resnets = [_resnet(configurations, hidden[i] + skip[i], width) for i in range(count)]
        attentions = [
            _attention(configurations, width, use_linear_projection)
            for _ in range(configurations["up_blocks_num_attentions"][index])
        ]
        self.modules_list = _interleave(resnets, attentions, configurations["mix_block_in_forward"])
        self.follows_mid_block = index == 0
        self.upsamplers = None
        if configurations["add_upsample"][index]:
            self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        res_hidden_states_tuple: tuple[torch.Tensor, ...],
        encoder_hidden_states: torch.Tensor,
        cross_attention_kwargs: dict | None = None,
        upsample_size: Sequence[int] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns [b, channels, h, w]; takes the skips last in, first out."""
        options = _attention_options(attention_mask, cross_attention_kwargs, encoder_attention_mask)
        skips = list(res_hidden_states_tuple)
        if self.follows_mid_block:  # its upsampler is given no size, and turns an odd side into an even one
            height, width = skips[-1].shape[2:]
            hidden_states = hidden_states[:, :, :height, :width]
        for module in self.modules_list:
            if isinstance(module, ResnetBlock2D):
                hidden_states = module(torch.cat([hidden_states, skips.pop()], dim=1), temb)
            else:
                hidden_states = self._attend(module, hidden_states, encoder_hidden_states, options)
        if self.upsamplers is not None:
            hidden_states = self.upsamplers[0](hidden_states, upsample_size)
        return hidden_states


class FlexibleUNet2DConditionModel(UNet2DConditionModel):
    """U-Net-NAS: diffusers' ``UNet2DConditionModel`` with the blocks that ``configurations`` describes.

    ``from_pretrained``, ``from_config`` and ``save_pretrained`` are diffusers'. The forward pass takes
    ``sample`` [b, in_channels, h, w], ``timestep`` (a number or [b]) and ``encoder_hidden_states``
    [b, tokens, cross_attention_dim], and returns [b, out_channels, h, w]. Any h and w will do: a downsampler rounds an
    odd side up, and an upsampler's output is cut to the size of the skip.

    Args:
        configurations: the searched blocks, as in the ``config.json`` of DeciDiffusion 1.0.
        mid_block_type: None builds the model without a mid block, as ``UNet2DConditionModel`` does; any other
            value builds U-Net-NAS's own.

    The other arguments are ``UNet2DConditionModel``'s. Those that only describe Stable Diffusion's blocks
    (``layers_per_block``, ``attention_head_dim``, …) are kept in the config and change nothing here.

    Raises:
        ValueError: a field of ``configurations`` is missing, has the wrong length or contradicts another; the
            message names it.
    """

    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]

    @register_to_config
    def __init__(
        self,
        configurations: dict[str, Any],
        sample_size: int | None = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = NORM_NUM_GROUPS,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 768,
        attention_head_dim: int = 8,
        use_linear_projection: bool = False,
        resnet_time_scale_shift: str = "default",
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        addition_embed_type: None = None,  # diffusers' forward looks it up
    ):
        check_configurations(configurations, block_out_channels)
        own_config = dict(self.config)
        # With one empty level, diffusers builds what surrounds the blocks and nearly nothing else; its own
        # blocks at full width would cost gigabytes and be thrown away at once.
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            flip_sin_to_cos=flip_sin_to_cos,
            freq_shift=freq_shift,
            down_block_types=("DownBlock2D",),
            mid_block_type=None,
            up_block_types=("UpBlock2D",),
            block_out_channels=(block_out_channels[0],),
            layers_per_block=0,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
            time_cond_proj_dim=time_cond_proj_dim,
            conv_in_kernel=conv_in_kernel,
            conv_out_kernel=conv_out_kernel,
        )
        self._internal_dict = type(self._internal_dict)(own_config)

        levels = range(len(configurations["down_blocks_out_channels"]))
        self.down_blocks = nn.ModuleList(
            [FlexibleDownBlock2D(configurations, level, use_linear_projection) for level in levels]
        )
        self.mid_block = None
        if mid_block_type is not None:
            self.mid_block = FlexibleMidBlock2D(configurations, use_linear_projection)
        self.up_blocks = nn.ModuleList(
            [FlexibleUpBlock2D(configurations, index, use_linear_projection) for index in levels]
        )
        self.num_upsamplers = sum(configurations["add_downsample"])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> "FlexibleUNet2DConditionModel":
        """diffusers' ``from_pretrained``; weights without a ``mid_block.*`` name load without a mid block."""
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        names: set[str] = set()
        for weights in folder.glob("diffusion_pytorch_model*.safetensors"):  # one file, or several
            with safe_open(weights, framework="pt") as file:
                names.update(file.keys())
        if names and not any(name.startswith("mid_block.") for name in names):
            kwargs["mid_block_type"] = None
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
