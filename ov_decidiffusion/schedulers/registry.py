"""Schedulers by the name in ``scheduler_config.json``: diffusers' own, and that of DeciDiffusion 2.0. Each is imported
when it is needed, since some of them import SciPy."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import diffusers
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers

from ov_decidiffusion.arguments import check_whole, shown


class Scheduler(Protocol):
    """What the pipeline needs from a scheduler; diffusers' schedulers have no common type for it."""

    @property
    def config(self) -> Any: ...
    @property
    def order(self) -> int: ...
    @property
    def timesteps(self) -> torch.Tensor: ...
    @property
    def num_inference_steps(self) -> int | None: ...
    @property
    def alphas_cumprod(self) -> torch.Tensor: ...
    @property
    def init_noise_sigma(self) -> Any: ...
    @property
    def set_timesteps(self) -> Callable[..., None]: ...
    @property
    def scale_model_input(self) -> Callable[..., torch.Tensor]: ...
    @property
    def add_noise(self) -> Callable[..., torch.Tensor]: ...
    @property
    def step(self) -> Callable[..., Any]: ...


PEER_SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
)
PEER_BETA_SCHEDULES = ("linear", "scaled_linear")


SQUEEZED = "SqueezedDPMSolverMultistepScheduler"
UNSUITABLE = {
    "EDMEulerScheduler",  # for another kind of models, which predict on another scale
    "DPMSolverSDEScheduler",  # needs a library that is not installed here
}
SUPPORTED_SCHEDULERS = (
    *(scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name not in UNSUITABLE),
    SQUEEZED,
)
MAX_TRAIN_TIMESTEPS = 100_000
NOISE_SCHEDULE = ("betas", "alphas_cumprod")  # attributes of a scheduler


def scheduler_class(name: str) -> Any:
    """The class of one of ``SUPPORTED_SCHEDULERS``."""
    if name == SQUEEZED:
        from ov_decidiffusion.schedulers.squeezed import SqueezedDPMSolverMultistepScheduler

        return SqueezedDPMSolverMultistepScheduler
    return getattr(diffusers, name)


def check_scheduler(scheduler: Scheduler) -> None:
    """Refuse a scheduler that is not among ``SUPPORTED_SCHEDULERS``.

    Raises:
        ValueError: the message names the scheduler and those that work.
    """
    name = type(scheduler).__name__
    if name not in SUPPORTED_SCHEDULERS:
        raise ValueError(f"`scheduler` must be one of {', '.join(SUPPORTED_SCHEDULERS)}, got {name}.")


def make_scheduler(config: dict[str, Any]) -> Scheduler:
    """Build the scheduler that a ``scheduler_config.json`` names.

    Raises:
        ValueError: the name is missing or not supported, or a setting is wrong.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SUPPORTED_SCHEDULERS:
        raise ValueError(f"The scheduler must be one of {', '.join(SUPPORTED_SCHEDULERS)}, got {name!r}.")
    check_whole("num_train_timesteps", config.get("num_train_timesteps", 1000), 1, MAX_TRAIN_TIMESTEPS)
    try:
        scheduler = _built(name, config)
        scheduler.set_timesteps(min(20, scheduler.config.num_train_timesteps))
        if not all(torch.isfinite(getattr(scheduler, values, torch.zeros(1))).all() for values in NOISE_SCHEDULE):
            raise ValueError("its noise schedule holds NaN or infinity")
    except Exception as error:  # wrong settings raise all kinds of errors
        raise ValueError(f"The settings of the scheduler {name} do not work: {error}") from error
    return _built(name, config | _corrections(scheduler))


def up_to_date(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's settings with the corrections that diffusers' own pipelines make when they load a checkpoint.

    Stable Diffusion was trained with ``steps_offset`` 1 and without ``clip_sample``, but early configurations say or
    imply otherwise (diffusers' ``StableDiffusionPipeline.__init__``).
    """
    return config | _corrections(_built(config["_class_name"], config))


def _corrections(scheduler: Scheduler) -> dict[str, Any]:
    wanted = {"steps_offset": 1, "clip_sample": False}
    return {name: value for name, value in wanted.items() if scheduler.config.get(name, value) != value}


def _built(name: str, config: Mapping[str, Any], **settings: Any) -> Scheduler:
    """Build what the class's ``from_config`` would, and keep the settings of other classes in its configuration.

    ``from_config`` itself would import every scheduler of diffusers to find out whose settings those are, and one of
    them spends half a second importing SciPy.
    """
    made = scheduler_class(name)
    own = set(inspect.signature(made.__init__).parameters) - {"self", "kwargs"} - set(made.ignore_for_config)
    not_meant = {"_use_default_values", *config.get("_use_default_values", ())}  # another class's default values
    kept = {key: value for key, value in config.items() if key not in not_meant}
    others = {key: value for key, value in kept.items() if key not in own}
    scheduler = made(**{key: value for key, value in (kept | settings).items() if key in own})
    scheduler.register_to_config(**others | {"_class_name": made.__name__})
    return scheduler


# Solvers by their common names, for any checkpoint's noise schedule: a class of diffusers, and settings that replace
# the checkpoint's own. The classes follow diffusers' documentation, "Schedulers", and its table of AUTOMATIC1111's and
# k-diffusion's names. Timesteps are evenly spaced from the noisiest one on, which matters most with few steps.
_EVENLY = {"timestep_spacing": "linspace"}
_SDE = {"algorithm_type": "sde-dpmsolver++", **_EVENLY}
_KARRAS = {"use_karras_sigmas": True}
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "ddpm": ("DDPMScheduler", {"timestep_spacing": "trailing"}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", _EVENLY),
    "euler karras": ("EulerDiscreteScheduler", _EVENLY | _KARRAS),
    "euler a": ("EulerAncestralDiscreteScheduler", _EVENLY),
    "heun": ("HeunDiscreteScheduler", _EVENLY),
    "heun karras": ("HeunDiscreteScheduler", _EVENLY | _KARRAS),
    "lms": ("LMSDiscreteScheduler", _EVENLY),
    "lms karras": ("LMSDiscreteScheduler", _EVENLY | _KARRAS),
    "dpm2": ("KDPM2DiscreteScheduler", _EVENLY),
    "dpm2 karras": ("KDPM2DiscreteScheduler", _EVENLY | _KARRAS),
    "dpm2 a": ("KDPM2AncestralDiscreteScheduler", _EVENLY),
    "dpm2 a karras": ("KDPM2AncestralDiscreteScheduler", _EVENLY | _KARRAS),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", _EVENLY),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", _EVENLY | _KARRAS),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpm++ 2m sde karras": ("DPMSolverMultistepScheduler", _SDE | _KARRAS),
    "dpm++ 2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "dpm++ 2s karras": ("DPMSolverSinglestepScheduler", {"lower_order_final": True} | _KARRAS),
    "unipc": ("UniPCMultistepScheduler", _EVENLY),
    "unipc karras": ("UniPCMultistepScheduler", _EVENLY | _KARRAS),
    "deis": ("DEISMultistepScheduler", _EVENLY),
    "squeezed": (SQUEEZED, _EVENLY),
}
OTHER_NAMES = {
    "dpm++": "dpm++ 2m",
    "dpm++ sde": "dpm++ 2s",
    "dpm++ sde karras": "dpm++ 2s karras",
    "euler ancestral": "euler a",
    "pndm": "plms",
}


def solver_name(name: Any) -> str:
    """A solver's name as in ``SOLVERS``, ignoring case and extra spaces: "DPM++ 2M Karras" is "dpm++ 2m karras".

    Raises:
        ValueError: there is no such solver; the message lists all, and names the nearest.
    """
    known = " ".join(name.lower().replace("_", " ").split()) if isinstance(name, str) else ""
    known = OTHER_NAMES.get(known, known)
    if known not in SOLVERS:
        near = difflib.get_close_matches(known, SOLVERS, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, got {shown(name)}.{meant}")
    return known


def make_solver(name: str, scheduler: Scheduler) -> Scheduler:
    """The solver with a name from ``SOLVERS``, on another scheduler's noise schedule.

    Raises:
        ValueError: there is no such solver.
    """
    solver, settings = SOLVERS[solver_name(name)]
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("use_")}  # its kind of sigmas
    return _built(solver, config, **settings)


def peer_scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler config that other OpenVINO tools can read.

    Returns:
        the config itself if these tools support its scheduler, betas and timestep spacing. Otherwise that of DDIM on
        the same noise schedule, with the betas written out as ``trained_betas``.

    Raises:
        ValueError: the scheduler has no betas.
    """
    known_betas = config.get("trained_betas") is not None or config.get("beta_schedule") in PEER_BETA_SCHEDULES
    known_spacing = config.get("timestep_spacing") != "trailing"
    if config.get("_class_name") in PEER_SCHEDULERS and known_betas and known_spacing:
        return config
    scheduler = make_scheduler(config)
    betas = getattr(scheduler, "betas", None)
    if betas is None:
        raise ValueError(f"Other tools cannot follow the noise schedule of {config['_class_name']}.")
    betas = betas.tolist()
    ddim = diffusers.DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        prediction_type=scheduler.config.prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return dict(ddim.config) | {"_class_name": "DDIMScheduler"}
