"""``ov-decidiffusion generate``: one command for one picture, with every argument of a call as an option."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_decidiffusion.demo.sessions import telling_name
from ov_decidiffusion.generation.config import GenerationConfig
from ov_decidiffusion.generation.presets import PRESETS
from ov_decidiffusion.web.limits import MAX_SEED, QUALITY

if TYPE_CHECKING:
    from PIL import Image

    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PATTERN = "{prompt}-{seed}.png"
OUTPUT_HELP = f"a pattern with {{prompt}}, {{seed}} and {{index}}; by default {PATTERN} in this folder"
EXAMPLES = """examples:
  ov-decidiffusion generate "an owl in a forest at night" -o owl.png
  ov-decidiffusion generate "a castle in a meadow at sunset" --count 4 --preset fast -o "castle-{seed}.webp"
  ov-decidiffusion generate "a red balloon" --image photo.jpg --strength 0.6
  ov-decidiffusion generate --like owl.png --seed 7
  cat prompts.txt | ov-decidiffusion generate -o "made/{index}-{prompt}.png"
"""
OWN = ("prompt", "image", "mask_image", "seed", "preset", "quantized", "num_images_per_prompt")  # in ``add_options``


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options: its own, and one for each other argument of a call."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    parser.usage = "ov-decidiffusion generate [PROMPT ...] [-o FILE] [options]"
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="*", help="what to show; without one, prompts are read from standard input")
    add("-o", "--output", metavar="FILE", help=f"{', '.join(FORMATS)}, a folder, or {OUTPUT_HELP}")
    add("--like", metavar="PICTURE", help="start from the settings that a saved picture carries")
    add("--image", metavar="FILE", help="a source picture: image-to-image")
    add("--mask", metavar="FILE", help="inpainting: the white area of this picture is repainted in the source")
    add("--count", type=int, metavar="N", default=1, help="pictures of each prompt, with seeds that count up")
    add("--seed", type=int, metavar="N", help="the same one gives the same picture again; by default a new one")
    add("--preset", choices=[*PRESETS], help="quality or speed; by default exact")
    add("--quantized", metavar="PARTS", type=_parts, help="what runs in INT8: yes, no, or unet,vae_decoder")
    group = parser.add_argument_group("arguments of the pipeline's call, as in Python")
    documentation = _documentation()
    for name, kind in option_kinds().items():
        group.add_argument(f"--{name.replace('_', '-')}", help=documentation.get(name), **kind)


def option_kinds() -> dict[str, dict[str, Any]]:
    """How argparse reads each argument of a call that can be given on a command line."""
    kinds: dict[str, dict[str, Any]] = {
        "int": {"type": int, "metavar": "N"},
        "float": {"type": float, "metavar": "X"},
        "str": {"metavar": "TEXT"},
        "bool": {"action": argparse.BooleanOptionalAction, "default": None},
        "Sequence[int]": {"type": _numbers(int), "metavar": "N,N,…"},
        "Sequence[float]": {"type": _numbers(float), "metavar": "X,X,…"},
        "tuple[float, float]": {"type": _numbers(float), "metavar": "LOW,HIGH"},
    }
    annotations = {one.name: str(one.type).split(" | ")[0] for one in fields(GenerationConfig) if one.name not in OWN}
    return {name: kinds[annotation] for name, annotation in annotations.items() if annotation in kinds}


def run(options: argparse.Namespace, load: Callable[[], OVStableDiffusionPipeline]) -> None:
    """Check the options, load the pipeline, and make one picture after the other.

    Args:
        options: the command line's options.
        load: makes the pipeline; it converts the checkpoint first if needed.

    Raises:
        ValueError: an option has a wrong value.
    """
    arguments = _arguments(options)
    target = _Target(options.output)
    jobs = list(_jobs(arguments, options))
    pipe = load()
    pipe.set_progress_bar_config(disable=None, leave=False)  # a bar for terminals only
    if arguments.get("preset", "exact") != "exact" and arguments.get("quantized") is None:
        _offer_int8(pipe)
    target.several = len(jobs) > 1
    for job in jobs:
        start = time.perf_counter()
        pictures = pipe(**job).images
        seconds = time.perf_counter() - start
        for picture in pictures:
            file = target.save(picture, job)
            steps = _steps(picture)
            print(f"{file}: {picture.width}x{picture.height}, seed {_seed(job)}, {steps} steps, {seconds:.1f} s")


def _offer_int8(pipe: OVStableDiffusionPipeline) -> None:
    """Offer to make the INT8 models of the faster presets if they are missing; without a terminal, fail."""
    missing = pipe.models.missing_int8()
    if not missing:
        return
    if not sys.stdin.isatty():
        raise ValueError(f"The presets balanced and fast {missing} Give --quantize to make them first.")
    print(f"The presets balanced and fast {missing}", file=sys.stderr)
    print("Make them now? [Y/n] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("", "y", "yes"):
        raise ValueError("Without INT8 models, use the preset exact or --no-quantized.")
    from ov_decidiffusion.quantize import quantize_models  # NNCF takes seconds to import

    with contextlib.redirect_stdout(sys.stderr):
        print(quantize_models(pipe.models.folder))
    pipe.find_quantized()


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a call that all pictures share; options override the settings of ``--like``."""
    arguments: dict[str, Any] = {}
    if options.like is not None:
        from ov_decidiffusion.generation.metadata import made_with, settings_of
        from ov_decidiffusion.generation.webui_text import words_of

        arguments = settings_of(options.like)
        arguments |= words_of(arguments, made_with(options.like))
    given = {name: getattr(options, name) for name in (*option_kinds(), "seed", "preset", "quantized")}
    arguments |= {name: value for name, value in given.items() if value is not None}
    for name, file in (("image", options.image), ("mask_image", options.mask)):
        if file is not None:
            arguments[name] = _open(file)
    if "strength" in arguments and "image" not in arguments:
        raise ValueError("`strength` needs a source picture: give it with --image.")
    return arguments


def _jobs(arguments: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The arguments of each call: one for each picture of each prompt."""
    from ov_decidiffusion.arguments import check_whole

    count = check_whole("count", options.count, 1, 10_000)
    prompts = _prompts(options) or ([arguments["prompt"]] if "prompt" in arguments else [])
    if not prompts:
        raise ValueError('Write a prompt, as in: ov-decidiffusion generate "an owl in a forest at night" -o owl.png')
    for prompt in prompts:
        first = arguments.get("seed")
        first = secrets.randbelow(MAX_SEED + 1) if first is None else first
        if count > 1 and not isinstance(first, int):
            raise ValueError("`count` goes with one seed, and --like has several: give --seed.")
        for number in range(count):
            yield arguments | {"prompt": prompt, "seed": first + number if count > 1 else first}


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt and options.prompt != ["-"]:
        return options.prompt
    if options.prompt == ["-"] or (options.like is None and not sys.stdin.isatty()):
        return [line.strip() for line in sys.stdin if line.strip()]
    return []


class _Target:
    """Where pictures are written.

    Args:
        output: the option's value: a file, a folder or a pattern.

    Raises:
        ValueError: an unsupported file format, or an unknown placeholder.
    """

    def __init__(self, output: str | None):
        self.several = False
        self._chosen = output is not None
        path = Path(output or PATTERN).expanduser()
        if output and (path.is_dir() or output.endswith(("/", "\\"))):
            path, self._chosen = path / PATTERN, False
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"`output` must end in {', '.join(FORMATS)}, or be a folder, got {output!r}.")
        try:
            str(path).format(prompt="", seed=0, index=0)
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(
                f"`output` may hold {{prompt}}, {{seed}} and {{index}}, got {output!r} ({error})."
            ) from error
        self._path, self._index = path, 0

    def save(self, picture: Image.Image, job: dict[str, Any]) -> Path:
        """Write a picture, completely or not at all; unless the user chose the name, no existing file is replaced."""
        from ov_decidiffusion.model_folder.writing import write_whole

        self._index += 1
        words = telling_name(str(job["prompt"]), None)
        name = str(self._path).format(prompt=words, seed=_seed(job), index=self._index)
        file = Path(name)
        if self.several and name == str(self._path):
            file = file.with_stem(f"{file.stem}-{self._index}")
        base, count = file, 1
        while not self._chosen and file.exists():
            count += 1
            file = base.with_stem(f"{base.stem}-{count}")
        written = io.BytesIO()
        kind = FORMATS[file.suffix.lower()]
        picture.save(written, kind, **({} if kind == "PNG" else {"quality": QUALITY}))
        write_whole(file, written.getvalue())
        return file


def _seed(job: dict[str, Any]) -> Any:
    seed = job["seed"]
    return seed if isinstance(seed, int) else "-".join(str(one) for one in seed or [])


def _steps(picture: Image.Image) -> Any:
    from ov_decidiffusion.generation.metadata import settings_of

    found = settings_of(picture)
    return found.get("num_inference_steps") or len(found.get("timesteps") or found.get("sigmas") or [])


def _open(file: str) -> Image.Image:
    from ov_decidiffusion.web.uploads import open_own_file

    return open_own_file(Path(file).expanduser())


def _parts(text: str) -> bool | list[str]:
    return {"yes": True, "no": False}.get(text, text.split(","))


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        return [kind(one) for one in text.split(",")]

    numbers.__name__ = f"list of {kind.__name__}"  # argparse shows it for a wrong value
    return numbers


def _documentation() -> dict[str, str]:
    """The first sentence about each argument of a call, from the docstring of ``__call__``."""
    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

    text = inspect.getdoc(OVStableDiffusionPipeline.__call__) or ""
    found: dict[str, str] = {}
    for names, words in re.findall(r"^    ([a-z][\w, ]*): ((?:.|\n(?=        ))*)", text, re.MULTILINE):
        plain = re.sub(r" \([^()]*arXiv[^()]*\)", "", " ".join(words.split()))  # without citations
        sentence = re.split(r"(?<=[a-z)1])[.;](?:\s|$)", plain)[0]
        found |= dict.fromkeys(names.split(", "), sentence.replace("%", "%%").replace("``", ""))
    return found
