"""Which scheduler a model folder uses: diffusers' own, by the name in ``scheduler_config.json``, and the one of
DeciDiffusion 2.0, which diffusers lacks."""

import difflib
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers import KarrasDiffusionSchedulers

from ov_decidiffusion.arguments import check_whole, shown

SQUEEZE_MODES = {"10,6": (10, 6), "11,7": (11, 7)}  # timesteps that run, and how many of them are kept as they are
PEER_SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
)
PEER_BETA_SCHEDULES = ("linear", "scaled_linear")


def squeeze_timesteps(timesteps: Sequence[int], squeeze_mode: str) -> list[int]:
    """Shorten a schedule at its end, where pictures change least: DeciDiffusion 2.0's "squeezing".

    In mode "n,i" the first i timesteps stay; n - i evenly spaced ones, multiples of t[i-1] // (n - i + 1), take the
    place of all others.

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

    ``set_timesteps(16)`` lays out 16 steps and runs 10 of them in mode "10,6": see ``squeeze_timesteps``. It works
    for other checkpoints too, on their own noise schedule::

        pipe.scheduler = SqueezedDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

    Arguments are ``DPMSolverMultistepScheduler``'s, with the defaults of DeciDiffusion 2.0, and ``squeeze_mode``.

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
        trained_betas: Sequence[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "v_prediction",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "heun",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        final_sigmas_type: str = "sigma_min",
        lambda_min_clipped: float = -7.5,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
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
            super().set_timesteps(num_inference_steps, device, mu)
            timesteps = squeeze_timesteps(self.timesteps.tolist(), self.config.squeeze_mode)
        super().set_timesteps(device=device, timesteps=timesteps)


OWN_SCHEDULERS = {"SqueezedDPMSolverMultistepScheduler": SqueezedDPMSolverMultistepScheduler}
UNSUITABLE = {
    "EDMEulerScheduler",  # for models of another kind, which predict on another scale
    "DPMSolverSDEScheduler",  # needs a library that nothing here installs
}
SUPPORTED_SCHEDULERS = (
    *(scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name not in UNSUITABLE),
    *OWN_SCHEDULERS,
)
MAX_TRAIN_TIMESTEPS = 100_000


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that is neither ours nor among the ``KarrasDiffusionSchedulers`` of diffusers that suit.

    Raises:
        ValueError: names the scheduler and those that work.
    """
    name = type(scheduler).__name__
    if name not in SUPPORTED_SCHEDULERS:
        raise ValueError(f"`scheduler` must be one of {', '.join(SUPPORTED_SCHEDULERS)}, got {name}.")


def make_scheduler(config: dict[str, Any]) -> SchedulerMixin:
    """Build the scheduler that a ``scheduler_config.json`` names.

    Raises:
        ValueError: the name is missing or not supported, or a setting is wrong.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SUPPORTED_SCHEDULERS:
        raise ValueError(f"The scheduler must be one of {', '.join(SUPPORTED_SCHEDULERS)}, got {name!r}.")
    check_whole("num_train_timesteps", config.get("num_train_timesteps", 1000), 1, MAX_TRAIN_TIMESTEPS)
    try:
        scheduler = (OWN_SCHEDULERS.get(name) or getattr(diffusers, name)).from_config(config)
        scheduler.set_timesteps(min(20, scheduler.config.num_train_timesteps))
    except Exception as error:  # whatever a wrong setting leads to
        raise ValueError(f"The settings of the scheduler {name} do not work: {error}") from error
    return (OWN_SCHEDULERS.get(name) or getattr(diffusers, name)).from_config(config)


# Solvers by the names that people know, for any checkpoint's noise schedule: a class of diffusers, and settings in
# place of the checkpoint's own. Which class is which name: diffusers' documentation, "Schedulers", its table of
# AUTOMATIC1111's and k-diffusion's names. Evenly spaced from the noisiest timestep on, which few steps need most.
_EVENLY = {"timestep_spacing": "linspace"}
_SDE = {"algorithm_type": "sde-dpmsolver++", **_EVENLY}
_KARRAS = {"use_karras_sigmas": True}
SOLVERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"timestep_spacing": "trailing"}),
    "ddpm": (diffusers.DDPMScheduler, {"timestep_spacing": "trailing"}),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (diffusers.EulerDiscreteScheduler, _EVENLY),
    "euler karras": (diffusers.EulerDiscreteScheduler, _EVENLY | _KARRAS),
    "euler a": (diffusers.EulerAncestralDiscreteScheduler, _EVENLY),
    "heun": (diffusers.HeunDiscreteScheduler, _EVENLY),
    "heun karras": (diffusers.HeunDiscreteScheduler, _EVENLY | _KARRAS),
    "lms": (diffusers.LMSDiscreteScheduler, _EVENLY),
    "lms karras": (diffusers.LMSDiscreteScheduler, _EVENLY | _KARRAS),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, _EVENLY),
    "dpm2 karras": (diffusers.KDPM2DiscreteScheduler, _EVENLY | _KARRAS),
    "dpm2 a": (diffusers.KDPM2AncestralDiscreteScheduler, _EVENLY),
    "dpm2 a karras": (diffusers.KDPM2AncestralDiscreteScheduler, _EVENLY | _KARRAS),
    "dpm++ 2m": (DPMSolverMultistepScheduler, _EVENLY),
    "dpm++ 2m karras": (DPMSolverMultistepScheduler, _EVENLY | _KARRAS),
    "dpm++ 2m sde": (DPMSolverMultistepScheduler, _SDE),
    "dpm++ 2m sde karras": (DPMSolverMultistepScheduler, _SDE | _KARRAS),
    "dpm++ 2s": (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    "dpm++ 2s karras": (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True} | _KARRAS),
    "unipc": (diffusers.UniPCMultistepScheduler, _EVENLY),
    "unipc karras": (diffusers.UniPCMultistepScheduler, _EVENLY | _KARRAS),
    "deis": (diffusers.DEISMultistepScheduler, _EVENLY),
    "squeezed": (SqueezedDPMSolverMultistepScheduler, _EVENLY),
}
OTHER_NAMES = {
    "dpm++": "dpm++ 2m",
    "dpm++ sde": "dpm++ 2s",
    "dpm++ sde karras": "dpm++ 2s karras",
    "euler ancestral": "euler a",
    "pndm": "plms",
}


def solver_name(name: Any) -> str:
    """A solver's name as the table has it, whatever its case and spaces: "DPM++ 2M Karras" is "dpm++ 2m karras".

    Raises:
        ValueError: no such solver; the message names the nearest, and all.
    """
    known = " ".join(name.lower().replace("_", " ").split()) if isinstance(name, str) else ""
    known = OTHER_NAMES.get(known, known)
    if known not in SOLVERS:
        near = difflib.get_close_matches(known, SOLVERS, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, got {shown(name)}.{meant}")
    return known


def make_solver(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """Another solver, by a name of ``SOLVERS``, on a scheduler's noise schedule.

    Raises:
        ValueError: no such solver.
    """
    solver, settings = SOLVERS[solver_name(name)]
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("use_")}  # their own sigmas
    return solver.from_config(config, **settings)


def peer_scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler config that other OpenVINO tools can read.

    Returns:
        the config itself if they know its scheduler, betas and spacing of timesteps, else that of DDIM on the same
        noise schedule, its betas written out as ``trained_betas``.

    Raises:
        ValueError: the scheduler has no betas.
    """
    known_betas = config.get("trained_betas") is not None or config.get("beta_schedule") in PEER_BETA_SCHEDULES
    known_spacing = config.get("timestep_spacing") != "trailing"
    if config.get("_class_name") in PEER_SCHEDULERS and known_betas and known_spacing:
        return config
    scheduler = make_scheduler(config)
    if not hasattr(scheduler, "betas"):
        raise ValueError(f"Other tools cannot follow the noise schedule of {config['_class_name']}.")
    betas = scheduler.betas.tolist()
    ddim = diffusers.DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        prediction_type=scheduler.config.prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return dict(ddim.config) | {"_class_name": "DDIMScheduler"}
