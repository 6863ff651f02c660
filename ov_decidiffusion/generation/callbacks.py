"""Callbacks of a run, and the pipeline's attributes that diffusers' users read and set while it goes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ov_decidiffusion.arguments import check_callback_result

if TYPE_CHECKING:
    from ov_decidiffusion.generation.denoise import DenoisingStep

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass
class CurrentCall:
    """A call that is running in a thread.

    Attributes:
        stops: how often other threads had asked to end all calls when this one began.
        step: its latest step.
        interrupted: whether its own callback asked to end it.
    """

    stops: int
    step: DenoisingStep | None = None
    interrupted: bool = False


class RunState:
    """The attributes of a pipeline that belong to the call running in the current thread."""

    defaults: dict[str, Any]

    def __init__(self) -> None:
        self._threads = threading.local()  # its ``calls`` are nested, the innermost last
        self._stops = 0  # how often another thread has asked to end all calls

    def __reduce__(self) -> Any:
        raise TypeError(
            "A pipeline cannot be pickled or copied: call OVStableDiffusionPipeline.from_pretrained in each process."
        )

    @contextlib.contextmanager
    def _calling(self) -> Iterator[CurrentCall]:
        """Begin a call in this thread; the caller sets its ``step``, and checks ``interrupt`` after each step."""
        call = CurrentCall(self._stops)
        self._threads.calls = [*self._calls, call]
        try:
            yield call
        finally:
            self._threads.calls = self._calls[:-1]
            if call.step is not None:
                self._threads.latest = call.step.guidance_scale, call.step.guidance_rescale, call.step.total

    @property
    def _calls(self) -> list[CurrentCall]:
        return getattr(self._threads, "calls", [])

    @property
    def _step(self) -> DenoisingStep | None:
        """The latest step of the call running in this thread."""
        return self._calls[-1].step if self._calls else None

    @property
    def guidance_scale(self) -> float:
        """The current value in this thread's run; after a run its last value, before any run the checkpoint's."""
        return self._latest[0] if self._step is None else self._step.guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """The current value; see ``guidance_scale``."""
        return self._latest[1] if self._step is None else self._step.guidance_rescale

    @property
    def _latest(self) -> tuple[float, float, int | None]:
        """guidance_scale, guidance_rescale and the number of steps of this thread's latest run."""
        own = self.defaults["guidance_scale"], self.defaults["guidance_rescale"], None
        return getattr(self._threads, "latest", own)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether this thread's run is guided."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int | None:
        """The number of steps of this thread's run, or of its latest."""
        return self._latest[2] if self._step is None else self._step.total

    @property
    def _guidance_scale(self) -> float:  # diffusers documents it for callbacks
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._step_to_change("guidance_scale").guidance_scale = value

    @property
    def _guidance_rescale(self) -> float:
        return self.guidance_rescale

    @_guidance_rescale.setter
    def _guidance_rescale(self, value: float) -> None:
        self._step_to_change("guidance_rescale").guidance_rescale = value

    @property
    def _num_timesteps(self) -> int | None:
        return self.num_timesteps

    def _step_to_change(self, name: str) -> DenoisingStep:
        if self._step is None:
            raise ValueError(f"`_{name}` can be set in a callback only; give `{name}` to the call.")
        return self._step

    @property
    def interrupt(self) -> bool:
        """Whether the call running in this thread is about to end."""
        return bool(self._calls) and (self._calls[-1].interrupted or self._calls[-1].stops != self._stops)

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """In a callback: end this call. From another thread: end all running calls."""
        if self._step is not None:
            self._calls[-1].interrupted = bool(value)
        elif value:
            self._stops += 1


def call_back(callback: Callable[..., Any], pipe: RunState, step: DenoisingStep, names: list[str]) -> None:
    """Pass a step to a callback, and continue with the latents and prompt_embeds that it returns.

    As in diffusers, returned negative_prompt_embeds change nothing: prompt_embeds holds them too.
    """
    negative = step.prompt_embeds[: len(step.latents)]
    tensors = {"latents": step.latents, "prompt_embeds": step.prompt_embeds, "negative_prompt_embeds": negative}
    result = check_callback_result(callback(pipe, step.index, step.timestep, {name: tensors[name] for name in names}))
    step.latents = result.get("latents", step.latents)
    step.prompt_embeds = result.get("prompt_embeds", step.prompt_embeds)
