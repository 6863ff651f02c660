"""Which scheduler a model folder uses: diffusers' own, by the name in ``scheduler_config.json``."""

from typing import Any

import diffusers
from diffusers import SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers

SUPPORTED_SCHEDULERS = tuple(scheduler.name for scheduler in KarrasDiffusionSchedulers)
PEER_SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
)
PEER_BETA_SCHEDULES = ("linear", "scaled_linear")


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that is not one of diffusers' ``KarrasDiffusionSchedulers``.

    Raises:
        ValueError: names the scheduler and those that work.
    """
    name = type(scheduler).__name__
    if name not in SUPPORTED_SCHEDULERS:
        raise ValueError(f"`scheduler` must be one of {', '.join(SUPPORTED_SCHEDULERS)}, got {name}.")


def make_scheduler(config: dict[str, Any]) -> SchedulerMixin:
    """Build the scheduler that a ``scheduler_config.json`` names.

    Raises:
        ValueError: the name is missing or not supported.
    """
    name = config.get("_class_name")
    if name not in SUPPORTED_SCHEDULERS:
        raise ValueError(f"The scheduler must be one of {', '.join(SUPPORTED_SCHEDULERS)}, got {name!r}.")
    return getattr(diffusers, name).from_config(config)


def peer_scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler config that other OpenVINO tools can read.

    Returns:
        the config itself if they know its scheduler, betas and spacing of timesteps, else that of DDIM on the same
        noise schedule, its betas written out as ``trained_betas``.
    """
    known_betas = config.get("trained_betas") is not None or config.get("beta_schedule") in PEER_BETA_SCHEDULES
    known_spacing = config.get("timestep_spacing") != "trailing"
    if config.get("_class_name") in PEER_SCHEDULERS and known_betas and known_spacing:
        return config
    betas = make_scheduler(config).betas.tolist()
    ddim = diffusers.DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        prediction_type=config.get("prediction_type", "epsilon"),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return dict(ddim.config) | {"_class_name": "DDIMScheduler"}
