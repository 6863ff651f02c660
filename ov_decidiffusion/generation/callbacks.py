"""What diffusers' users do while a picture is made: callbacks, and the pipeline's attributes that they read and set."""

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
    """A call that a thread is in.

    Attributes:
        stops: how often another thread had asked to end everything when the call began.
        step: the latest.
        interrupted: whether a callback of its own asked to end it.
    """

    stops: int
    step: DenoisingStep | None = None
    interrupted: bool = False


class RunState:
    """The attributes of a pipeline that belong to the call which a thread is in."""

    defaults: dict[str, Any]

    def __init__(self) -> None:
        self._threads = threading.local()  # its ``calls``: one within the other, the innermost last
        self._stops = 0  # how often another thread has asked to end what is going on

    def __reduce__(self) -> Any:
        raise TypeError(
            "A pipeline cannot be pickled or copied: call OVStableDiffusionPipeline.from_pretrained in each process."
        )

    @contextlib.contextmanager
    def _calling(self) -> Iterator[CurrentCall]:
        """A call of this thread: set its ``step``, and ask ``interrupt`` after it."""
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
        """Where the call is that this thread is in."""
        return self._calls[-1].step if self._calls else None

    @property
    def guidance_scale(self) -> float:
        """Of the run that this thread is in, as it is now; after one what it was, and before any the checkpoint's."""
        return self._latest[0] if self._step is None else self._step.guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """As ``guidance_scale``."""
        return self._latest[1] if self._step is None else self._step.guidance_rescale

    @property
    def _latest(self) -> tuple[float, float, int | None]:
        """guidance_scale, guidance_rescale and steps of this thread's latest run."""
        own = self.defaults["guidance_scale"], self.defaults["guidance_rescale"], None
        return getattr(self._threads, "latest", own)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance acts in the run that this thread is in."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int | None:
        """Steps of the run that this thread is in, or of its latest."""
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
        """Whether the call that this thread is in is about to end."""
        return bool(self._calls) and (self._calls[-1].interrupted or self._calls[-1].stops != self._stops)

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """In a callback: end this call. From another thread: end all that are going on."""
        if self._step is not None:
            self._calls[-1].interrupted = bool(value)
        elif value:
            self._stops += 1


def call_back(callback: Callable[..., Any], pipe: RunState, step: DenoisingStep, names: list[str]) -> None:
    """Show a step to a callback, and continue with the latents and prompt_embeds that it returns.

    As in diffusers, negative_prompt_embeds that it returns change nothing: prompt_embeds holds them.
    """
    negative = step.prompt_embeds[: len(step.latents)]
    tensors = {"latents": step.latents, "prompt_embeds": step.prompt_embeds, "negative_prompt_embeds": negative}
    result = check_callback_result(callback(pipe, step.index, step.timestep, {name: tensors[name] for name in names}))
    step.latents = result.get("latents", step.latents)
    step.prompt_embeds = result.get("prompt_embeds", step.prompt_embeds)
