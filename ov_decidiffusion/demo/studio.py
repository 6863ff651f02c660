"""What happens behind the demo's page: from what was filled in to pictures, with all that is seen on the way."""

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageChops

from ov_decidiffusion.demo.sessions import SavedImage, Session, Sessions
from ov_decidiffusion.generation.denoise import DenoisingStep
from ov_decidiffusion.generation.images import fit_size
from ov_decidiffusion.generation.metadata import made_with, settings_of
from ov_decidiffusion.generation.presets import PRESETS
from ov_decidiffusion.generation.webui_text import words_of
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.web.limits import MAX_SEED, MAX_STEPS
from ov_decidiffusion.web.queue import Job, Queue

MAX_PICTURES = 4
PREVIEW_SECONDS = 0.15  # at least, between two previews: more would only slow the pictures down
PREVIEW_SHARE = 0.1  # at most, of the time
SHAPES = {"square": 1, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "3:4": 3 / 4, "2:3": 2 / 3, "9:16": 9 / 16}
AUTOMATIC = "auto"  # a size or a solver that nobody chose
WORD = re.compile(r"[^\W\d_]+")
SMALL_WORDS = {"a", "an", "and", "at", "in", "large", "of", "on", "small", "the", "with"}  # of captions, besides things


@dataclass(frozen=True)
class Progress:
    """What a visitor sees at a moment of a run.

    Attributes:
        status: in words.
        picture: to show, or None for the one that was there; at the end, several as one.
        saved: the finished pictures, at the end.
        stopped: whether the visitor ended it.
    """

    status: str
    picture: Image.Image | None = None
    saved: tuple[SavedImage, ...] = ()
    stopped: bool = False


class Studio:
    """One pipeline and its visitors.

    Args:
        pipe: the pipeline to generate with.
        queue: in front of the pipeline, if others wait in it too.
    """

    def __init__(self, pipe: OVStableDiffusionPipeline, queue: Queue | None = None):
        self.pipe = pipe
        self.queue = Queue() if queue is None else queue
        self.sessions = Sessions()
        # Each thread that computes keeps some megabytes for itself, and the page's calls come in a hundred of them.
        self._one_thread = ThreadPoolExecutor(1, "pictures")

    def close(self) -> None:
        """End all runs at their next step, and delete all pictures."""
        self.queue.close()
        self.sessions.close()

    def make(self, arguments: dict[str, Any], client: str | None, session: Session) -> Iterator[Progress]:
        """Wait in the queue, and make pictures; one that is stopped shows what the preview showed.

        Args:
            arguments: of ``pipe.denoise``.
            client: who may stop it.
            session: where the pictures go.

        Raises:
            ValueError, FloatingPointError: as the pipeline does.
            QueueIsFull: too many are waiting.
        """
        steps = arguments.get("num_inference_steps") or self.pipe.defaults["num_inference_steps"]
        with self.queue.place(Job(client, steps * arguments.get("num_images_per_prompt", 1))) as job:
            yield from self._wait(job)
            if not self.queue.is_stopped(job):
                yield from self._run(arguments, job, session)

    def _wait(self, job: Job) -> Iterator[Progress]:
        while ahead := self.queue.ahead(job):
            if self.queue.is_stopped(job):
                yield Progress("Stopped while waiting.")
                return
            before = "one picture is" if ahead == 1 else f"{ahead} pictures are"
            yield Progress(f"Waiting: {before} made before yours, about {_seconds(self.queue.seconds_until(job))}.")
            self.queue.ahead(job, 0.5)

    def _run(self, arguments: dict[str, Any], job: Job, session: Session) -> Iterator[Progress]:
        yield Progress("Reading the prompt …")
        begun = next_look = time.perf_counter()
        stopped, step = False, None
        steps = self.pipe.denoise(**arguments)
        for step in iter(lambda: self._compute(next, steps, None), None):
            now = time.perf_counter()
            job.done = round(job.work * (step.index + 1) / step.total)
            if stopped := self.queue.is_stopped(job):
                step.latents = step.predicted  # the picture that the preview showed
                break
            if now >= next_look:
                look = side_by_side(self._compute(self._look, step))
                taken = time.perf_counter() - now
                next_look = now + max(PREVIEW_SECONDS, taken / PREVIEW_SHARE)
                yield Progress(_progress(step, now - begun), look)
        if step is None or self.queue.closed or job.left:
            return
        yield Progress("Decoding …")
        pictures = self._compute(self.pipe.finish, step)
        seconds = time.perf_counter() - begun
        if not stopped:
            self.queue.measured(job.work, seconds)
        saved = []
        for i, picture in reversed(list(enumerate(pictures))):  # the latest saved comes first
            own = settings_of(picture)
            told = caption_of(own, seed_of(own, i), seconds)
            told += f", stopped after step {step.index + 1} of {step.total}" if stopped else ""
            source, mask = arguments.get("image"), arguments.get("mask_image")
            if source is not None and abs(source.width * picture.height - source.height * picture.width) > source.width:
                told += f", the source cut to {picture.width}x{picture.height}"
            if (one := session.save(picture, own, told, source, mask)) is None:
                return
            saved.insert(0, one)
        what = "Stopped" if stopped else "Done" if len(saved) == 1 else f"Done: {len(saved)} pictures"
        together = side_by_side(pictures) if len(pictures) > 1 else None
        yield Progress(f"{what} after {seconds:.1f} s.", together, tuple(saved), stopped)

    def _compute(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return self._one_thread.submit(call, *arguments).result()

    def _look(self, step: DenoisingStep) -> list[Image.Image]:
        """What a step's pictures will be, without the whole decoder's time."""
        if self.pipe.has_tiny_decoder:
            with contextlib.suppress(FloatingPointError):  # what is predicted early may be far from any picture
                return self.pipe.decode_latents(step.predicted, decoder="tiny")
        return self.pipe.latent_preview(step.predicted)

    def size_choices(self) -> list[tuple[str, str]]:
        """Sizes of about the usual area in the usual shapes, as (label, "WxH")."""
        width, height = self.pipe.default_size
        choices = [(f"automatic ({width}x{height})", AUTOMATIC)]
        for name, shape in SHAPES.items():
            size = "x".join(map(str, fit_size(round(1000 * shape), 1000, width * height, self.pipe.size_factor)))
            if size not in [value for _, value in choices]:
                choices.append((f"{name}: {size}", size))
        return choices

    def words_not_known(self, text: str) -> list[str]:
        """The words that a model with a small vocabulary has not learned, in their order."""
        understood = self.pipe.defaults.get("understands")
        if not isinstance(understood, dict):
            return []
        known = {word for texts in understood.values() for text in texts for word in WORD.findall(text.lower())}
        words = [word.lower() for word in WORD.findall(text) if word != "BREAK"]
        return [word for word in dict.fromkeys(words) if word not in known | SMALL_WORDS]


def arguments_of(
    *,
    prompt: str | None,
    negative_prompt: str | None = None,
    source: Image.Image | None = None,
    mask: Image.Image | None = None,
    strength: float = 0.8,
    preset: str = "exact",
    seed: float | None = None,
    size: str | None = AUTOMATIC,
    pictures: float = 1,
    steps: float | None = None,
    guidance_scale: float | None = None,
    solver: str | None = AUTOMATIC,
) -> dict[str, Any]:
    """The pipeline's arguments, from what was filled in.

    Args:
        source: starts image-to-image, and with ``mask`` (mode "L", white is made anew) inpainting.
        seed: None draws one.
        size: "WxH" in pixels, or ``AUTOMATIC``.
        solver: or ``AUTOMATIC`` for the preset's.

    Raises:
        ValueError: nothing was asked for, or a value cannot be read.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("Write a prompt first: what should the picture show?")
    first = random.randint(0, MAX_SEED) if seed is None else int(seed)
    if not 0 <= first <= MAX_SEED:
        raise ValueError(f"The seed must be a whole number from 0 to {MAX_SEED}, got {first}.")
    count = 1 if pictures is None else int(pictures)
    if not 1 <= count <= MAX_PICTURES:
        raise ValueError(f"At most {MAX_PICTURES} pictures are made at once, got {count}.")
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": (negative_prompt or "").strip() or None,
        "preset": preset,
        "seed": [(first + i) % (MAX_SEED + 1) for i in range(count)],
        "num_images_per_prompt": count,
        "num_inference_steps": None if steps is None else int(steps),
        "guidance_scale": guidance_scale,
        "solver": None if solver in (None, "", AUTOMATIC) else solver,
    }
    if (arguments["num_inference_steps"] or 1) > MAX_STEPS:
        raise ValueError(f"At most {MAX_STEPS} steps are run here, got {int(steps or 0)}.")
    if size not in (None, "", AUTOMATIC):
        found = re.fullmatch(r"\s*(\d{1,5})\s*[x×]\s*(\d{1,5})\s*", str(size))
        if found is None:
            raise ValueError(f"The size must be written like 512x384, got {size!r}.")
        arguments |= {"width": int(found[1]), "height": int(found[2])}
    if source is not None:
        arguments |= {"image": source, "strength": None if strength is None else float(strength)}
        if mask is not None:
            arguments |= {"mask_image": mask, "overlay": True}
    return arguments


def form_values_of(picture: Any) -> dict[str, Any]:
    """What to fill in to make a picture again, by the names of ``arguments_of``.

    Raises:
        ValueError: the picture carries no settings.
    """
    found, origin = settings_of(picture), made_with(picture)
    words, preset = words_of(found, origin), origin.get("preset")
    size = f"{found['width']}x{found['height']}" if "width" in found and "height" in found else AUTOMATIC
    return {
        "prompt": words["prompt"] or "",
        "negative_prompt": words["negative_prompt"] or "",
        "strength": found.get("strength"),
        "preset": preset if isinstance(preset, str) and preset in PRESETS else None,
        "seed": seed_of(found, 0),
        "size": size,
        "steps": found.get("num_inference_steps"),
        "guidance_scale": found.get("guidance_scale"),
        "solver": found.get("solver") or AUTOMATIC,
    }


def mask_of(layers: list[Image.Image]) -> Image.Image | None:
    """Where something was painted, in white; None where nothing was."""
    painted = [layer.getchannel("A") for layer in layers if layer is not None and "A" in layer.getbands()]
    if not painted:
        return None
    together = painted[0]
    for one in painted[1:]:
        together = ImageChops.lighter(together, one)
    mask = together.point([0] + [255] * 255)  # of each opacity: white wherever there is any
    return mask if mask.getbbox() else None


def seed_of(arguments: dict[str, Any], index: int) -> int | None:
    """The seed of one picture of a call."""
    seed = arguments.get("seed")
    return seed[index] if isinstance(seed, list) else seed


def caption_of(arguments: dict[str, Any], seed: int | None, seconds: float) -> str:
    """What is said of a picture."""
    solver = f" of {arguments['solver']}" if arguments.get("solver") else ""
    steps = f"{arguments.get('num_inference_steps')} steps{solver}"
    told = f"{arguments.get('prompt') or ''} — seed {seed}, {steps}, {seconds:.1f} s"
    if arguments.get("negative_prompt"):
        told += f", not: {arguments['negative_prompt']}"
    if arguments.get("strength") is not None:
        told += f", from a picture with strength {arguments['strength']:g}"
    return told


def layer_of(mask: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """A mask as it is painted: in a colour where it is white, on nothing."""
    layer = Image.new("RGBA", mask.size, (*color, 0))
    layer.paste((*color, 255), mask=mask.convert("L"))
    return layer


def is_blank(picture: Image.Image) -> bool:
    """Whether a picture is white all over, as an editor's empty canvas is."""
    return all(band.getextrema()[0] == 255 for band in picture.convert("RGB").split())


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Several pictures as one, two in a row; an empty place is transparent."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    rows = -(-len(pictures) // 2)
    together = Image.new("RGBA", (2 * width, rows * height))
    for i, one in enumerate(pictures):
        together.paste(one, (i % 2 * width, i // 2 * height))
    return together


def _progress(step: DenoisingStep, seconds: float) -> str:
    left = seconds / (step.index + 1) * (step.total - step.index - 1)
    return f"Step {step.index + 1} of {step.total}, {_seconds(left)} left"


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{max(seconds, 0.1):.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
