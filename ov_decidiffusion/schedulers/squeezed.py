"""The scheduler of DeciDiffusion 2.0, which diffusers lacks: DPM-Solver++ on squeezed timesteps."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.configuration_utils import register_to_config

SQUEEZE_MODES = {"10,6": (10, 6), "11,7": (11, 7)}  # how many timesteps run, and how many of them stay unchanged


def squeeze_timesteps(timesteps: Sequence[int], squeeze_mode: str) -> list[int]:
    """Shorten a schedule at its end, where pictures change least: DeciDiffusion 2.0's "squeezing".

    In mode "n,i" the first i timesteps stay; n - i evenly spaced ones, multiples of t[i-1] // (n - i + 1), replace all
    others.

    Args:
        timesteps: descending.
        squeeze_mode: "10,6" or "11,7".

    Returns:
        n timesteps, descending.

    Raises:
        ValueError: an unknown mode, or too few timesteps for it.
    """
    if squeeze_mode not in SQUEEZE_MODES:
        raise ValueError(f"`squeeze_mode` must be one of {list(SQUEEZE_MODES)}, got {squeeze_mode!r}.")
    total, kept = SQUEEZE_MODES[squeeze_mode]
    if len(timesteps) < kept:
        raise ValueError(
            f"`num_inference_steps` must be at least {kept} with squeeze_mode {squeeze_mode!r}, got {len(timesteps)}."
        )
    stride = timesteps[kept - 1] // (total - kept + 1)
    return [*timesteps[:kept], *(stride * i for i in range(total - kept, 0, -1))]


class SqueezedDPMSolverMultistepScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ on squeezed timesteps, the scheduler of DeciDiffusion 2.0.

    In mode "10,6", ``set_timesteps(16)`` makes a schedule of 16 steps and squeezes it to 10: see
    ``squeeze_timesteps``. It works for other checkpoints too, on their own noise schedule::

        pipe.scheduler = SqueezedDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

    The arguments are those of ``DPMSolverMultistepScheduler``, with DeciDiffusion 2.0's defaults, and ``squeeze_mode``.

    Raises:
        ValueError: an unknown ``squeeze_mode``, or Karras sigmas, which have timesteps of their own.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "squaredcos_cap_v2",
        trained_betas: np.ndarray | list[float] | None = None,
        solver_order: int = 2,
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "v_prediction",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"] = "dpmsolver++",
        solver_type: Literal["midpoint", "heun"] = "heun",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        final_sigmas_type: Literal["zero", "sigma_min"] = "sigma_min",
        lambda_min_clipped: float = -7.5,
        variance_type: Literal["learned", "learned_range"] | None = None,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace",
        steps_offset: int = 1,
        rescale_betas_zero_snr: bool = False,
        squeeze_mode: str = "10,6",
    ):
        if squeeze_mode not in SQUEEZE_MODES:
            raise ValueError(f"`squeeze_mode` must be one of {list(SQUEEZE_MODES)}, got {squeeze_mode!r}.")
        if use_karras_sigmas:
            raise ValueError("`use_karras_sigmas` must be false: squeezed timesteps have sigmas of their own.")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            solver_order=solver_order,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
            algorithm_type=algorithm_type,
            solver_type=solver_type,
            lower_order_final=lower_order_final,
            euler_at_final=euler_at_final,
            final_sigmas_type=final_sigmas_type,
            lambda_min_clipped=lambda_min_clipped,
            variance_type=variance_type,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """diffusers' ``set_timesteps``; the schedule of ``num_inference_steps`` is squeezed, ``timesteps`` is not.

        The number of steps that run is ``len(scheduler.timesteps)``.
        """
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device, mu)  # pyright: ignore[reportArgumentType]  # takes None
            timesteps = squeeze_timesteps(self.timesteps.tolist(), self.config["squeeze_mode"])
        super().set_timesteps(device=device, timesteps=timesteps)  # pyright: ignore[reportArgumentType]  # takes None
