"""Small measurements that the tutorial shows: what guidance changes, how soon solvers arrive, where the seconds go."""

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ov_decidiffusion.generation.denoise import DenoisingStep
from ov_decidiffusion.generation.presets import way_down
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.schedulers.registry import SOLVERS, scheduler_class
from ov_decidiffusion.schedulers.squeezed import SQUEEZE_MODES

QUICK = 2.0  # seconds of a picture that is timed ROUNDS times; a slower one once
UNREAD = "CI" in os.environ and "DECIDIFFUSION_TRAIN" not in os.environ  # a run of the tests, which nobody reads
ROUNDS = 1 if UNREAD else 7
ALL_STEPS = 60  # of the picture that the others are on their way to


@dataclass(frozen=True)
class Timed:
    """A picture, and the seconds that it took: in all, and in each model.

    Attributes:
        spread: half of the range between the quartiles of the times; 0 where it was timed once.
    """

    name: str
    picture: Image.Image
    seconds: float
    models: dict[str, float]
    spread: float = 0.0

    @property
    def time(self) -> str:
        """The seconds with their spread, in words."""
        return f"{self.seconds:.2f} s" + (f" ± {self.spread:.2f}" if self.spread else "")


def guidance_map(pipe: OVStableDiffusionPipeline, step: DenoisingStep) -> np.ndarray:
    """How much the prompt changes the prediction at each position, float32 [h, w]: the mean over channels of the
    difference between the prediction with the prompt and the one against it.

    Args:
        step: of a guided run of one picture.

    Raises:
        ValueError: the run is not guided, or makes several pictures.
    """
    if len(step.prompt_embeds) != 2:
        raise ValueError("The map is of one picture whose run is guided: `guidance_scale` above 1.")
    with pipe.models.at_work():
        predictions, _ = pipe.unet.full(torch.cat([step.sample] * 2), step.timestep, step.prompt_embeds)
        return (predictions[1] - predictions[0]).abs().mean(dim=0).numpy()


def closeness_by_steps(
    pipe: OVStableDiffusionPipeline, prompts: Sequence[str], steps: Sequence[int], seed: int = 0
) -> Iterator[tuple[str, int, float]]:
    """How close pictures of few steps come to those of very many, solver by solver.

    All solvers follow the same path from the same noise, so with enough steps they end in the same picture: the
    reference is that of UniPC, which is none of them, after 60.

    Args:
        prompts: the picture of each counts alike.
        steps: numbers of steps to try; squeezed schedules have theirs.
        seed: of the first picture; the others count on.

    Yields:
        the solver's name, the steps that ran, and the closeness in decibels of the mean squared distance.
    """
    prompts = prompts[:1] if UNREAD else prompts
    settings: dict[str, Any] = {"seed": [seed + i for i in range(len(prompts))], "output_type": "np"}

    def make(**arguments: Any) -> np.ndarray:
        images = pipe(list(prompts), **arguments, **settings).images
        assert isinstance(images, np.ndarray)  # as ``output_type`` says
        return images

    reference = make(num_inference_steps=ALL_STEPS, solver="unipc")

    def closeness(**arguments: Any) -> float:
        error = make(**arguments) - reference
        return float(-10 * np.log10(max(1e-10, np.mean(np.square(error)))))

    for solver, name in (("ddim", "DDIM"), ("euler", "Euler"), ("dpm++", "DPM-Solver++")):
        for count in steps:
            yield name, count, closeness(solver=solver, num_inference_steps=count)
    kept = pipe.scheduler
    name, options = SOLVERS["squeezed"]
    squeezed = scheduler_class(name)
    try:
        for mode, (running, *_) in SQUEEZE_MODES.items():
            pipe.scheduler = squeezed.from_config(kept.config, **options | {"squeeze_mode": mode})
            yield "squeezed", running, closeness(num_inference_steps=16)  # what is laid out before squeezing
    finally:
        pipe.scheduler = kept


def timed_in_turn(
    pipe: OVStableDiffusionPipeline, prompt: str, settings: Mapping[str, Mapping[str, Any]], **shared: Any
) -> list[Timed]:
    """Time settings against each other: after a run of each, which compiles what is needed, in turns, so that a busy
    moment of the machine meets all of them.

    Args:
        settings: arguments of the pipeline's call by the name of the row.
        shared: arguments of all rows.

    Returns:
        of each row the median and its spread.
    """
    calls = {name: {**shared, **arguments} for name, arguments in settings.items()}
    for arguments in calls.values():
        pipe(prompt, **arguments)
    runs: dict[str, list[Timed]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        for name, arguments in calls.items():
            if turn == 0 or runs[name][0].seconds < QUICK:
                runs[name].append(_timed_once(pipe, name, prompt, arguments))
    return [_median(taken) for taken in runs.values()]


def _median(runs: list[Timed]) -> Timed:
    middle = sorted(runs, key=lambda one: one.seconds)[len(runs) // 2]
    if len(runs) < 2:
        return middle
    low, _, high = statistics.quantiles([one.seconds for one in runs], n=4)
    return replace(middle, spread=(high - low) / 2)


def _timed_once(pipe: OVStableDiffusionPipeline, name: str, prompt: str, arguments: dict[str, Any]) -> Timed:
    before, start = pipe.seconds, time.perf_counter()
    picture = pipe(prompt, **arguments).images[0]
    seconds = time.perf_counter() - start
    models = {part: spent - before.get(part, 0.0) for part, spent in pipe.seconds.items()}
    return Timed(name, picture, seconds, {part: spent for part, spent in models.items() if spent > 0})


def walk_down(pipe: OVStableDiffusionPipeline, prompt: str, seed: int = 0) -> list[Timed]:
    """The same prompt and seed with one saving after the other, from exact down to the preset "fast"; INT8 models
    and the tiny decoder where there are any."""
    rows: dict[str, dict[str, Any]] = {}
    for name, arguments in ({"exact": {}} | way_down()).items():
        if arguments.get("decoder") == "tiny" and not pipe.has_tiny_decoder:
            continue
        if not pipe.quantized_parts:
            if arguments == {"quantized": True}:
                continue
            arguments = {**arguments, "quantized": False}
        rows[name] = arguments
    return timed_in_turn(pipe, prompt, rows, seed=seed)
