"""The arguments of one call, in one place: ``GenerationConfig``. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ov_decidiffusion.arguments import MAX_GUIDANCE, check_guidance_interval, check_range, check_schedule, check_whole
from ov_decidiffusion.generation.presets import apply_preset

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ov_decidiffusion.generation.images import PictureLike

MAX_SIGMA = 1e4
NOT_SAVED: Mapping[str, Any] = {"saved": False}  # in a field's metadata: it cannot be written into a picture


@dataclass(frozen=True, eq=False)
class GenerationConfig:
    """The arguments of one call of ``OVStableDiffusionPipeline``, whose ``__call__`` documents each field.

    None means that the preset, the checkpoint or the source picture decides.
    """

    prompt: str | list[str] | None = None
    _: KW_ONLY
    negative_prompt: str | list[str] | None = None
    image: PictureLike | Sequence[PictureLike] | None = field(default=None, metadata=NOT_SAVED)
    mask_image: PictureLike | Sequence[PictureLike] | None = field(default=None, metadata=NOT_SAVED)
    padding_mask_crop: int | None = None
    overlay: bool = False
    strength: float | None = None
    resize_mode: str = "crop"
    num_inference_steps: int | None = None
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = field(default=None, metadata=NOT_SAVED)
    seed: int | list[int] | None = None
    latents: torch.Tensor | np.ndarray | None = field(default=None, metadata=NOT_SAVED)
    prompt_embeds: torch.Tensor | None = field(default=None, metadata=NOT_SAVED)
    negative_prompt_embeds: torch.Tensor | None = field(default=None, metadata=NOT_SAVED)
    prompt_syntax: bool = True
    preset: str = field(default="exact", metadata=NOT_SAVED)  # saved beside the arguments, which hold its values
    solver: str | None = None
    quantized: bool | Sequence[str] | None = None
    cache_interval: int | None = None
    cache_power: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_cache_interval: int | None = None
    decoder: str | None = None

    def resolved(self, defaults: Mapping[str, Any], train_timesteps: int) -> ResolvedConfig:
        """The configuration that runs: values that are None come from the preset, then from the checkpoint.

        ``make_plan`` handles what depends on the machine or the folder, such as whether there are INT8 models.

        Args:
            defaults: the checkpoint's own values, by the fields' names.
            train_timesteps: length of the noise schedule.

        Raises:
            ValueError: there is no such preset, or a number has a wrong value.
        """
        asked = {one.name: getattr(self, one.name) for one in fields(self)}
        chosen = apply_preset(self.preset, asked)
        if chosen["num_inference_steps"] is None:
            chosen["num_inference_steps"] = defaults["num_inference_steps"]
        scale, rescale = (
            defaults[name] if getattr(self, name) is None else getattr(self, name)
            for name in ("guidance_scale", "guidance_rescale")
        )
        last = train_timesteps - 1
        timesteps = check_schedule("timesteps", self.timesteps, last, train_timesteps)
        sigmas = check_schedule("sigmas", self.sigmas, MAX_SIGMA, train_timesteps)
        if timesteps is not None and sigmas is not None:
            raise ValueError("Give `timesteps` or `sigmas`, not both.")
        steps = check_whole("num_inference_steps", chosen["num_inference_steps"], 1, train_timesteps)
        return ResolvedConfig(
            **asked
            | chosen
            | {
                "num_inference_steps": steps if timesteps is None and sigmas is None else None,
                "timesteps": timesteps,
                "sigmas": sigmas,
                "guidance_scale": check_range("guidance_scale", scale, 0, MAX_GUIDANCE),
                "guidance_rescale": check_range("guidance_rescale", rescale, 0, 1),
                "eta": check_range("eta", self.eta, 0, 1),
                "num_images_per_prompt": check_whole("num_images_per_prompt", self.num_images_per_prompt, 1),
                "cache_interval": check_whole("cache_interval", chosen["cache_interval"], 1),
                "cache_power": check_range("cache_power", chosen["cache_power"], 1, 3),
                "guidance_interval": check_guidance_interval(chosen["guidance_interval"]),
                "guidance_cache_interval": check_whole("guidance_cache_interval", chosen["guidance_cache_interval"], 1),
            }
        )

    def to_save(self) -> dict[str, Any]:
        """The fields needed to make the picture again, without those that had no effect on it."""
        left_out = {name for name in ("num_inference_steps", "timesteps", "sigmas") if getattr(self, name) is None}
        if self.image is None:
            left_out |= {"strength", "resize_mode"}
        if self.mask_image is None:
            left_out |= {"padding_mask_crop", "overlay"}
        return {name: getattr(self, name) for name in SAVED if name not in left_out}


@dataclass(frozen=True, eq=False)
class ResolvedConfig(GenerationConfig):
    """A configuration with every choice made; ``num_inference_steps`` is None where the schedule itself is given."""

    # ``field()``: these have to be given; they have no default of None.
    _: KW_ONLY
    guidance_scale: float = field()
    guidance_rescale: float = field()
    quantized: bool | Sequence[str] = field()
    cache_interval: int = field()
    cache_power: float = field()
    guidance_cache_interval: int = field()
    decoder: str = field()

    def with_values(self, **values: Any) -> ResolvedConfig:
        """A copy with other values for some fields."""
        return replace(self, **values)


FIELDS = tuple(one.name for one in fields(GenerationConfig))
SAVED = tuple(one.name for one in fields(GenerationConfig) if one.metadata.get("saved", True))
