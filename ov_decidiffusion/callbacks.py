"""What diffusers' users do while a picture is made: callbacks, and the pipeline's attributes that they read and set."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ov_decidiffusion.arguments import MAX_GUIDANCE, check_callback_result, check_range

if TYPE_CHECKING:
    from ov_decidiffusion.denoise import DenoisingStep

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


class RunState:
    """The attributes of a pipeline that belong to the run which a thread is in."""

    defaults: dict[str, Any]

    def __init__(self) -> None:
        self._current = threading.local()  # the step that each thread's call is at
        self._stops = 0  # how often another thread has asked to end what is going on

    def __reduce__(self) -> Any:
        raise TypeError(
            "A pipeline cannot be pickled or copied: call OVStableDiffusionPipeline.from_pretrained in each process."
        )

    @contextlib.contextmanager
    def _running(self) -> Iterator[Callable[[DenoisingStep], None]]:
        """A run of this thread: tell it each step, and ask ``interrupt`` after it."""
        self._current.stops = self._stops
        try:
            yield lambda step: setattr(self._current, "step", step)
        finally:
            self._current.__dict__.clear()

    @property
    def guidance_scale(self) -> float:
        """Of the run that this thread is in, as it is now; outside of one, the checkpoint's own."""
        step = getattr(self._current, "step", None)
        return self.defaults["guidance_scale"] if step is None else step.guidance_scale

    @property
    def num_timesteps(self) -> int | None:
        """Steps of the run that this thread is in."""
        step = getattr(self._current, "step", None)
        return None if step is None else step.total

    @property
    def _guidance_scale(self) -> float:  # diffusers documents it for callbacks
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        step = getattr(self._current, "step", None)
        if step is None:
            raise ValueError("`_guidance_scale` can be set in a callback only; give `guidance_scale` to the call.")
        step.guidance_scale = check_range("guidance_scale", value, 0, MAX_GUIDANCE)

    @property
    def interrupt(self) -> bool:
        """Whether the run that this thread is in is about to end."""
        asked = getattr(self._current, "stops", self._stops) != self._stops
        return asked or getattr(self._current, "interrupted", False)

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """In a callback: end this run. From another thread: end all that are going on."""
        if getattr(self._current, "step", None) is not None:
            self._current.interrupted = bool(value)
        elif value:
            self._stops += 1


def call_back(callback: Callable, pipe: RunState, step: DenoisingStep, names: list[str]) -> None:
    """Show a step to a callback, and go on from what it returns."""
    from ov_decidiffusion.tensors import check_embeds  # there is a step, so torch is there

    negative = step.prompt_embeds[: len(step.latents)]
    tensors = {"latents": step.latents, "prompt_embeds": step.prompt_embeds, "negative_prompt_embeds": negative}
    result = check_callback_result(callback(pipe, step.index, step.timestep, {name: tensors[name] for name in names}))
    step.latents = result.get("latents", step.latents)
    if result.get("prompt_embeds", step.prompt_embeds) is not step.prompt_embeds:
        text = step.prompt_embeds
        step.prompt_embeds = check_embeds("prompt_embeds", result["prompt_embeds"], text.shape[-1])
        if len(step.prompt_embeds) not in (len(step.latents), len(text)):
            raise ValueError(
                f"`prompt_embeds` must be of {len(step.latents)} or {len(text)} prompts, got {len(step.prompt_embeds)}."
            )
