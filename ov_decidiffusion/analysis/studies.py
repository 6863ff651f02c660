"""Small measurements for the tutorial: what guidance changes, how fast solvers converge, where the time goes."""

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

QUICK = 2.0  # seconds; pictures faster than that are timed ROUNDS times, slower ones once
UNREAD = "CI" in os.environ and "DECIDIFFUSION_TRAIN" not in os.environ  # a test run, whose figures nobody reads
ROUNDS = 1 if UNREAD else 7
ALL_STEPS = 60  # number of steps of the reference picture, to which the others converge


@dataclass(frozen=True)
class Timed:
    """A picture, and the seconds that it took: in total, and in each model.

    Attributes:
        spread: half of the interquartile range of the times; 0 if it was timed once.
    """

    name: str
    picture: Image.Image
    seconds: float
    models: dict[str, float]
    spread: float = 0.0

    @property
    def time(self) -> str:
        """The seconds with their spread, as text."""
        return f"{self.seconds:.2f} s" + (f" ± {self.spread:.2f}" if self.spread else "")


def guidance_map(pipe: OVStableDiffusionPipeline, step: DenoisingStep) -> np.ndarray:
    """How much the prompt changes the prediction at each position, float32 [h, w]: the absolute difference between the
    conditional and the unconditional prediction, averaged over channels.

    Args:
        pipe: the pipeline.
        step: a step of a guided run of one picture.

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
    """How close pictures made with few steps come to those with very many, solver by solver.

    All solvers follow the same path from the same noise, so with enough steps they end in the same picture. The
    reference is made with 60 steps of UniPC, which is not among the solvers compared.

    Args:
        pipe: the pipeline.
        prompts: prompts whose pictures count equally.
        steps: numbers of steps to try; squeezed schedules have their own.
        seed: the first picture's seed; the others count up from it.

    Yields:
        the solver's name, the number of steps that ran, and the closeness in decibels, from the mean squared error.
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
            yield "squeezed", running, closeness(num_inference_steps=16)  # the steps before squeezing
    finally:
        pipe.scheduler = kept


def timed_in_turn(
    pipe: OVStableDiffusionPipeline, prompt: str, settings: Mapping[str, Mapping[str, Any]], **shared: Any
) -> list[Timed]:
    """Time settings against each other. Each runs once to compile its models; then they take turns, so that a busy
    moment of the machine affects all of them.

    Args:
        pipe: the pipeline.
        prompt: the prompt.
        settings: arguments of the pipeline's call, by the name of the row.
        shared: arguments that all rows share.

    Returns:
        for each row the median and its spread.
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
    """Time the same prompt and seed with more and more savings, from exact to the preset "fast"; INT8 models and the
    tiny decoder are used if they exist."""
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
