"""The work behind the demo's page: from the fields' values to pictures, with previews on the way."""

import contextlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from ov_decidiffusion.analysis.pictures import save_film
from ov_decidiffusion.demo.sessions import MAX_FILMS, SavedImage, Session, Sessions
from ov_decidiffusion.errors import DeciDiffusionError
from ov_decidiffusion.generation.denoise import DenoisingStep
from ov_decidiffusion.generation.images import fit_size
from ov_decidiffusion.generation.metadata import made_with, settings_of
from ov_decidiffusion.generation.presets import PRESETS
from ov_decidiffusion.generation.webui_text import words_of
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from ov_decidiffusion.web.limits import MAX_SEED, MAX_STEPS
from ov_decidiffusion.web.queue import Job, Queue

MAX_PICTURES = 4
MAX_AREA, LARGE_AREA, WIDE_AREA = 16, 4, 2  # times the model's own area: above, refused; needs confirming; gets a hint
PREVIEW_SECONDS = 0.15  # the shortest time between two previews: more of them would only slow the pictures down
PREVIEW_SHARE = 0.05  # the largest share of the time that previews may take
GRACE_SECONDS = 10  # time for a visitor to reload the page before the runs are ended
SHAPES = {"Square": 1, "Portrait": 3 / 4, "Landscape": 4 / 3, "Wide": 16 / 9}
AUTOMATIC = "auto"  # a size or a solver that the visitor has not chosen
SIZE = re.compile(r"\s*(\d{1,5})\s*[x×]\s*(\d{1,5})\s*")


@dataclass(frozen=True)
class Progress:
    """What a visitor sees at a moment of a run.

    Attributes:
        status: a text.
        share: the share of the run that is done, 0…1; None if unknown.
        picture: the picture to show; None keeps the current one. At the end, several pictures put together.
        saved: the finished pictures, at the end.
        stopped: whether the visitor stopped the run.
    """

    status: str
    share: float | None = None
    picture: Image.Image | None = None
    saved: tuple[SavedImage, ...] = ()
    stopped: bool = False


class Run:
    """A run in a thread of its own, which can be watched; it goes on even if nobody watches.

    Attributes:
        prompt: the pictures' prompt.
        job: its place in the queue.
    """

    def __init__(self, prompt: str, job: Job):
        self.prompt, self.job = prompt, job
        self._changed = threading.Condition()
        self._latest: Progress | None = None
        self._error: Exception | None = None
        self._is_over = False

    def tell(self, progress: Progress) -> None:
        """Set what watchers see now."""
        with self._changed:
            self._latest = progress
            self._changed.notify_all()

    def end(self, error: Exception | None = None) -> None:
        """End the run; an error is raised for whoever watches."""
        with self._changed:
            self._is_over, self._error = True, error
            self._changed.notify_all()

    def watch(self) -> Iterator[Progress]:
        """The progress, each time it changes, until the end."""
        seen = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=seen: self._latest is not seen or self._is_over)
                latest, over, error = self._latest, self._is_over, self._error
            if latest is not seen and latest is not None:
                yield latest
            elif over:
                if error is not None:
                    raise error
                return
            seen = latest


class Studio:
    """One pipeline and its visitors.

    Args:
        pipe: the pipeline to generate with.
        queue: the queue in front of the pipeline, if others wait in it too.
        outputs: a folder where pictures are kept after the demo has ended; None keeps none.
        offers_int8: whether visitors may start making INT8 models, which keeps this machine busy for minutes.
    """

    def __init__(
        self,
        pipe: OVStableDiffusionPipeline,
        queue: Queue | None = None,
        outputs: Path | None = None,
        offers_int8: bool = True,
    ):
        self.pipe = pipe
        self.queue = Queue() if queue is None else queue
        self.outputs = outputs
        self.sessions = Sessions(outputs=outputs)
        self.runs: dict[str | None, list[Run]] = {}  # the waiting and running ones of each client
        self._offers_int8, self._making_int8 = offers_int8, None
        self._visits: dict[str | None, str] = {}  # the token of each page that is open
        self._used: set[str] = set()  # presets whose models have run
        # Each thread that computes keeps some megabytes, and the page's calls come from a hundred threads.
        self._one_thread = ThreadPoolExecutor(1, "pictures")

    def close(self) -> None:
        """End all runs at their next step, and delete all pictures."""
        if self._making_int8 is not None and self._making_int8.poll() is None:
            self._making_int8.terminate()
        self.queue.close()
        self.sessions.close()

    def visit(self, page: str | None, token: str) -> None:
        """Note that a visitor, known by a token, has opened or reloaded a page."""
        self._visits[page] = token

    def leave(self, page: str | None) -> None:
        """End a visitor's runs after a page was closed, unless the visitor has or soon opens another page."""
        self.queue.forget(page)
        self.sessions.end_program(page)
        token = self._visits.pop(page, None)
        if token is not None:
            timer = threading.Timer(GRACE_SECONDS, self._forget, [token])
            timer.daemon = True
            timer.start()

    def _forget(self, token: str) -> None:
        if token not in self._visits.values():
            self.queue.forget(token)

    def warm_up(self) -> None:
        """Run the models once, in a thread: their first run is slow, and the next shows how long pictures take here."""
        threading.Thread(target=self._warm_up, name="warm up", daemon=True).start()

    def _warm_up(self) -> None:
        # Errors are ignored here; a visitor's own run reports them.
        with self.queue.place(Job("", 0)) as job, contextlib.suppress(Exception):
            if self.queue.ahead(job):
                return
            run = self.pipe.denoise("", num_inference_steps=3, seed=0)
            self._compute(next, run)
            begun = time.perf_counter()
            step = self._compute(next, run)
            self.queue.measured(1, time.perf_counter() - begun)
            if not self.queue.closed:
                self._compute(self._look, step)
                self._compute(self.pipe.decode_latents, step.predicted)
            self._used.add("exact")

    def work_of(self, arguments: dict[str, Any]) -> float:
        """The amount of work of a call, in steps of one picture of the model's own size."""
        preset = PRESETS.get(arguments.get("preset") or "exact", {})
        steps = arguments.get("num_inference_steps") or preset.get("num_inference_steps")
        pictures = arguments.get("num_images_per_prompt", 1)
        return (steps or self.pipe.defaults["num_inference_steps"]) * pictures * max(1, self.area_of(arguments))

    def area_of(self, arguments: dict[str, Any]) -> float:
        """The area of a call's pictures, divided by the area of the model's own size."""
        own = self.pipe.default_size
        return (arguments.get("width") or own[0]) * (arguments.get("height") or own[1]) / (own[0] * own[1])

    def greeting(self) -> str:
        """The first status: says how long a picture takes here, once that was measured."""
        if not self._used:
            return "Ready."
        return f"Ready: a picture takes about {_seconds(self.queue.estimated_seconds(self.work_of({})))} here."

    def missing_int8(self) -> str:
        """A text that says what the faster presets lack, and what making it takes; "" if they lack nothing."""
        missing = self.pipe.models.missing_int8() if self._offers_int8 else ""
        return f"The faster qualities {missing}" if missing else ""

    def make_int8(self) -> Iterator[str]:
        """Make the INT8 models in a process of its own, which can be ended; yields how long it has taken so far.

        Raises:
            DeciDiffusionError: they could not be made; the message says why.
        """
        command = [sys.executable, "-m", "ov_decidiffusion", "quantize", str(self.pipe.models.folder)]
        with tempfile.TemporaryFile() as printed:
            self._making_int8 = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
            begun = time.perf_counter()
            while self._making_int8.poll() is None:
                yield f"Making the INT8 models: {time.perf_counter() - begun:.0f} s so far."
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._making_int8.wait(1)
            if self._making_int8.returncode:
                printed.seek(0)
                last = (printed.read().decode(errors="replace").strip().splitlines() or ["it was ended"])[-1]
                raise DeciDiffusionError(f"The INT8 models could not be made: {last.removeprefix('error: ')}")
        self.pipe.find_quantized()

    def make(self, arguments: dict[str, Any], client: str | None, session: Session) -> Iterator[Progress]:
        """``start`` a run, and watch it."""
        return self.start(arguments, client, session).watch()

    def start(self, arguments: dict[str, Any], client: str | None, session: Session) -> Run:
        """Start a run, which waits in the queue and makes pictures; if it is stopped, the result is its preview.

        Args:
            arguments: the arguments of ``pipe.denoise``.
            client: the client that may stop it.
            session: the session that keeps the pictures.

        Raises:
            ValueError: the pictures are too large, or need models that do not exist.
            QueueIsFull: too many jobs are waiting.
        """
        if self.area_of(arguments) > MAX_AREA:
            width, height = arguments.get("width"), arguments.get("height")
            raise ValueError(f"The size {width}x{height} is more than {MAX_AREA} times the model's own: choose less.")
        if arguments.get("preset", "exact") != "exact" and self.missing_int8():
            raise ValueError("This quality needs INT8 models, which are not there yet: have them made, or choose Best.")
        run = Run(arguments["prompt"], Job(client, self.work_of(arguments)))
        self.queue.submit(run.job)
        self.runs.setdefault(client, []).append(run)
        threading.Thread(target=self._drive, args=(run, arguments, session), name="run", daemon=True).start()
        return run

    def _drive(self, run: Run, arguments: dict[str, Any], session: Session) -> None:
        error = None
        try:
            for progress in self._wait(run.job):
                run.tell(progress)
            if not self.queue.is_stopped(run.job):
                for progress in self._run(arguments, run.job, session):
                    run.tell(progress)
        except Exception as raised:  # raised again for whoever watches
            error = raised
        finally:
            self.queue.remove(run.job)
            own = self.runs.get(run.job.client, [])
            own.remove(run)
            if not own:
                self.runs.pop(run.job.client, None)
            run.end(error)

    def _wait(self, job: Job) -> Iterator[Progress]:
        while ahead := self.queue.ahead(job):
            if self.queue.is_stopped(job):
                yield Progress("Stopped while waiting.")
                return
            own_before, _ = self.queue.others_of(job)
            if not own_before and not self._used:
                yield Progress("Loading the model, first time only …")
            elif not own_before:  # otherwise the visitor's earlier run shows its own progress
                before = "One picture" if ahead == 1 else f"{ahead} pictures"
                yield Progress(f"{before} ahead of yours, about {_seconds(self.queue.seconds_until(job))}.")
            self.queue.ahead(job, 0.5)

    def _run(self, arguments: dict[str, Any], job: Job, session: Session) -> Iterator[Progress]:
        preset = arguments.get("preset") or "exact"
        yield Progress("Reading the prompt …" if preset in self._used else "Loading the model, first time only …")
        begun = next_look = time.perf_counter()
        first, stopped, step = 0.0, False, None
        beliefs: list[Any] = []
        steps = self.pipe.denoise(**arguments)
        for step in iter(lambda: self._compute(next, steps, None), None):
            now = time.perf_counter()
            first = first or now
            beliefs.append(step.predicted)
            share = (step.index + 1) / step.total
            job.done = job.work * share
            if stopped := self.queue.is_stopped(job):
                step.latents = step.predicted  # the picture that the preview showed
                break
            if now >= next_look:
                look = side_by_side(self._compute(self._look, step))
                taken = time.perf_counter() - now
                next_look = now + max(PREVIEW_SECONDS, taken / PREVIEW_SHARE)
                yield Progress(_step(step, now - first) + self._queued_behind(job), share, look)
        if step is None or self.queue.closed or job.left:
            return
        self._used.add(preset)
        yield Progress("Stopping …" if stopped else "Decoding …", 1.0)
        pictures = self._compute(self.pipe.finish, step)
        seconds = time.perf_counter() - begun
        if not stopped:
            self.queue.measured(job.work, seconds)
        yield self._saved(pictures, arguments, session, step, seconds, stopped, beliefs)

    def _queued_behind(self, job: Job) -> str:
        _, behind = self.queue.others_of(job)
        return f" · {behind} more queued" if behind else ""

    def _saved(
        self,
        pictures: Any,
        arguments: dict[str, Any],
        session: Session,
        step: DenoisingStep,
        seconds: float,
        stopped: bool,
        beliefs: list[Any],
    ) -> Progress:
        """Save a run's pictures, and return its last progress."""
        saved = []
        for i, picture in reversed(list(enumerate(pictures))):  # the session lists the latest saved one first
            own = settings_of(picture)
            told = details_of(own, seed_of(own, i), seconds, len(pictures))
            told += f" · stopped after step {step.index + 1} of {step.total}" if stopped else ""
            source, mask = arguments.get("image"), arguments.get("mask_image")
            if source is not None and abs(source.width * picture.height - source.height * picture.width) > source.width:
                told += f" · the source was cut to {picture.width}x{picture.height}"
            steps = tuple(one[i : i + 1].clone() for one in beliefs)
            if (one := session.save(picture, own, told, source, mask, steps)) is None:
                return Progress("The pictures are no longer kept.")
            saved.insert(0, one)
        what = "Stopped" if stopped else "Done" if len(saved) == 1 else f"Done: {len(saved)} pictures"
        together = side_by_side(pictures) if len(pictures) > 1 else None
        return Progress(f"{what} after {seconds:.1f} s.", None, together, tuple(saved), stopped)

    def film(self, picture: SavedImage) -> Path:
        """An animated GIF file, beside the picture's own, that shows how it formed step by step.

        Raises:
            ValueError: its steps are no longer kept.
        """
        if not picture.beliefs:
            raise ValueError(f"The steps of this picture are no longer kept: only those of the latest {MAX_FILMS} are.")
        file = picture.path.with_suffix(".gif")
        if not file.is_file():
            frames = [self._compute(self._look_at, latents)[0] for latents in picture.beliefs]
            with Image.open(picture.path) as finished:
                save_film([*frames, finished.convert("RGB")], file, height=max(256, frames[0].height))
        return file

    def _compute(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return self._one_thread.submit(call, *arguments).result()

    def _look(self, step: DenoisingStep) -> list[Image.Image]:
        """Previews of a step's final pictures, without spending the time of the whole decoder."""
        return self._look_at(step.predicted)

    def _look_at(self, latents: Any) -> list[Image.Image]:
        if self.pipe.has_tiny_decoder:
            with contextlib.suppress(FloatingPointError):  # early predictions may be far from any picture
                return self.pipe.decode_latents(latents, decoder="tiny")
        return self.pipe.latent_preview(latents)

    def size_choices(self) -> list[tuple[str, str]]:
        """Sizes of about the default area in common shapes, as (label, "WxH")."""
        width, height = self.pipe.default_size
        choices = [("Automatic", AUTOMATIC)]
        for name, shape in SHAPES.items():
            size = "x".join(map(str, fit_size(round(1000 * shape), 1000, width * height, self.pipe.size_factor)))
            if size not in [value for _, value in choices]:
                choices.append((f"{name}, {size}", size))
        return choices

    def size_hint(self, size: str | None) -> str:
        """A hint about a size before it is used; "" if there is none."""
        found = SIZE.fullmatch(str(size))
        area = 0.0 if found is None else self.area_of({"width": int(found[1]), "height": int(found[2])})
        if area > MAX_AREA:
            return f"More than {MAX_AREA} times the model's own size: this is refused."
        if area > WIDE_AREA:
            return f"{area:.0f} times the size that the model learned on: things may appear several times."
        return ""


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
    """The pipeline's arguments, from the values of the page's fields.

    Args:
        prompt, negative_prompt, preset, guidance_scale, strength: see the pipeline's ``__call__``.
        source: a picture for image-to-image, or with ``mask`` for inpainting.
        mask: mode "L"; white is repainted.
        seed: the first picture's seed, further pictures count up from it; None draws one.
        size: "WxH" in pixels, or ``AUTOMATIC``.
        pictures: number of pictures.
        steps: number of steps; None for the preset's.
        solver: a sampler's name, or ``AUTOMATIC`` for the preset's.

    Raises:
        ValueError: the prompt is empty, or a value cannot be used.
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
        found = SIZE.fullmatch(str(size))
        if found is None:
            raise ValueError(f"The size must be written like 512x384, got {size!r}.")
        arguments |= {"width": int(found[1]), "height": int(found[2])}
    if source is not None:
        arguments |= {"image": source, "strength": None if strength is None else float(strength)}
        if mask is not None:
            arguments |= {"mask_image": mask, "overlay": True}
    return arguments


def form_values_of(picture: Any) -> dict[str, Any]:
    """The fields' values that make a picture again, by the names of ``arguments_of``.

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
    """A mask that is white where something was painted; None if nothing was."""
    painted = [layer.getchannel("A") for layer in layers if layer is not None and "A" in layer.getbands()]
    if not painted:
        return None
    together = painted[0]
    for one in painted[1:]:
        together = ImageChops.lighter(together, one)
    mask = together.point([0] + [255] * 255)  # maps any opacity above 0 to white
    return mask if mask.getbbox() else None


def seed_of(arguments: dict[str, Any], index: int) -> int | None:
    """The seed of one picture of a call."""
    seed = arguments.get("seed")
    return seed[index] if isinstance(seed, list) else seed


def details_of(arguments: dict[str, Any], seed: int | None, seconds: float, pictures: int = 1) -> str:
    """The details shown with a picture's prompt."""
    solver = f" of {arguments['solver']}" if arguments.get("solver") else ""
    time_taken = f"{seconds:.1f} s" if pictures == 1 else f"{pictures} pictures in {seconds:.1f} s"
    told = f"seed {seed} · {arguments.get('num_inference_steps')} steps{solver} · {time_taken}"
    if arguments.get("negative_prompt"):
        told += f" · without {arguments['negative_prompt']}"
    if arguments.get("strength") is not None:
        told += f" · from a picture, strength {arguments['strength']:g}"
    return told


def layer_of(mask: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """A mask as the editor's layer: a colour where it is white, transparent elsewhere."""
    layer = Image.new("RGBA", mask.size, (*color, 0))
    layer.paste((*color, 255), mask=mask.convert("L"))
    return layer


def is_blank(picture: Image.Image) -> bool:
    """Whether a picture is all white, like the editor's empty canvas."""
    return all(band.getextrema()[0] == 255 for band in picture.convert("RGB").split())


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Several pictures put together, two in a row; an empty place is transparent."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    rows = -(-len(pictures) // 2)
    together = Image.new("RGBA", (2 * width, rows * height))
    for i, one in enumerate(pictures):
        together.paste(one, (i % 2 * width, i // 2 * height))
    return together


def _step(step: DenoisingStep, seconds: float) -> str:
    """A run's progress as text. The remaining time is shown from the second step on: the first may wait for models.

    Args:
        step: the latest step.
        seconds: seconds since the first step was done.
    """
    told = f"Step {step.index + 1} of {step.total}"
    left = step.total - step.index - 1
    return f"{told}, {_seconds(seconds / step.index * left)} left" if step.index and left else told


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{max(seconds, 0.1):.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
