"""The settings that travel with a picture: written into it as text, and read back, AUTOMATIC1111's too."""

import hashlib
import json
import logging
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from ov_decidiffusion.arguments import shown
from ov_decidiffusion.generation.config import SAVED
from ov_decidiffusion.schedulers.registry import SOLVERS, solver_name

logger = logging.getLogger(__name__)

OWN = "ov_decidiffusion"  # names of the text chunks
WEBUI = "parameters"
VERSIONS = ("openvino", "torch", "diffusers")
# What AUTOMATIC1111's stable-diffusion-webui calls arguments of ours, and what they are.
WEBUI_NAMES = {
    "Steps": ("num_inference_steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Denoising strength": ("strength", float),
}
# A name and its value, which may be quoted, between commas. Possessive, so that what is none is found out in one go.
WEBUI_PAIR = re.compile(r'(?:^|(?<=,))([^:,]++):\s*+("(?:\\.|[^"\\])*+"|[^,]*+)(?:,|$)')
MAX_TEXT = 1_000_000  # characters of settings that are looked at


class SettingsPicture(Image.Image):
    """A PIL picture whose PNG file carries the texts of ``info``, which PIL leaves out.

    Args:
        picture: to copy.
    """

    def __init__(self, picture: Image.Image):
        super().__init__()
        self.__setstate__(picture.__getstate__())  # PIL's own constructors make pictures of its own class only
        self.info = dict(picture.info)

    def copy(self) -> "SettingsPicture":
        """PIL's ``copy``, with the settings."""
        return SettingsPicture(self)

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """PIL's ``save``."""
        texts = PngImagePlugin.PngInfo()
        for name in (WEBUI, OWN):
            if name in self.info:
                texts.add_text(name, self.info[name])
        super().save(fp, format, **({"pnginfo": texts} | params))


def attach(picture: Image.Image, arguments: dict[str, Any], made_with: dict[str, Any]) -> SettingsPicture:
    """A copy of a picture with its settings in ``info``, and in the PNG file that ``save`` writes.

    Args:
        arguments: of a call that makes it.
        made_with: checkpoint, precision, versions, and whatever else is to be known of it.
    """
    carrying = SettingsPicture(picture)
    carrying.info[WEBUI] = _webui_text(arguments, made_with, picture.size)
    carrying.info[OWN] = json.dumps({"arguments": arguments, "made_with": made_with}, default=str)
    return carrying


def settings_of(picture: str | Path | Image.Image) -> dict[str, Any]:
    """The arguments of the call that made a picture: ``pipe(**settings_of("old.png"))`` makes it again.

    Args:
        picture: a PNG file of ours or of AUTOMATIC1111's, or a picture of the pipeline's. A source picture and a mask
            are not in it, and have to be given again.

    Raises:
        ValueError: it cannot be read, or carries no settings.
    """
    return _read(picture)["arguments"]


def made_with(picture: str | Path | Image.Image) -> dict[str, Any]:
    """Checkpoint, precision and versions that made a picture, as far as it says; ValueError as ``settings_of``."""
    return _read(picture)["made_with"]


def _read(picture: str | Path | Image.Image) -> dict[str, Any]:
    try:
        if not isinstance(picture, Image.Image):
            with Image.open(Path(picture).expanduser()) as opened:
                opened.load()  # PNG texts may come behind the pixels
                info = dict(opened.info)
        else:
            info = picture.info
    except Exception as error:  # PIL's readers raise a dozen kinds of errors for damaged files
        raise ValueError(f"`picture` {shown(picture)} cannot be read: {error}") from error
    for name, read in ((OWN, _read_own), (WEBUI, _read_webui)):
        text = info.get(name)
        if isinstance(text, str):
            if len(text) > MAX_TEXT:
                raise ValueError(f"`picture` carries settings of {len(text)} characters: at most {MAX_TEXT} are read.")
            return read(text)
    raise ValueError("`picture` carries no settings: neither ours nor AUTOMATIC1111's are in its text.")


def _read_own(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        arguments, origin = content["arguments"], content["made_with"]
        found = {name: arguments[name] for name in SAVED if name in arguments}
        odd = [name for name, value in found.items() if not _is_plain(value)]
        if odd or not isinstance(origin, dict):
            raise ValueError(f"{(odd or ['made_with'])[0]} is of another kind")
        return {"arguments": found, "made_with": origin}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"`picture` carries settings that cannot be read ({error}): {shown(text)}.") from error


def _is_plain(value: Any) -> bool:
    """Whether this is a value of JSON, or a list of some that is not empty."""
    values = value if isinstance(value, list) and value else [value]
    return all(one is None or isinstance(one, (str, int, float)) for one in values)


def _webui_text(arguments: dict[str, Any], origin: dict[str, Any], size: tuple[int, int]) -> str:
    """As AUTOMATIC1111's stable-diffusion-webui writes it: prompt, negative prompt, and a line of names and values."""
    first: dict[str, Any] = {
        name: value[0] if isinstance(value, list) and value else value for name, value in arguments.items()
    }
    first |= words_of(arguments, origin)  # which may be another picture's than the first
    lines = [first["prompt"] or ""]
    if first.get("negative_prompt"):
        lines.append(f"Negative prompt: {first['negative_prompt']}")
    values = {
        "Steps": first.get("num_inference_steps"),
        "Sampler": webui_sampler(first.get("solver") or origin.get("solver") or ""),
        "CFG scale": first.get("guidance_scale"),
        "Seed": first.get("seed"),
        "Size": f"{first.get('width', size[0])}x{first.get('height', size[1])}",
        "Model": origin.get("checkpoint"),
        "Denoising strength": first.get("strength"),
        "Version": "ov_decidiffusion",
    }
    told = {name: value for name, value in values.items() if value not in (None, "")}
    return "\n".join([*lines, ", ".join(f"{name}: {_webui_value(value)}" for name, value in told.items())])


def _webui_value(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def webui_sampler(solver: str) -> str:
    """A solver as people write it: "dpm++ 2m karras" is "DPM++ 2M Karras"."""
    names = {"karras": "Karras", "euler": "Euler", "heun": "Heun", "unipc": "UniPC", "a": "a", "squeezed": "Squeezed"}
    return " ".join(names.get(word, word.upper()) for word in solver.split())


def _read_webui(text: str) -> dict[str, Any]:
    *lines, last = text.strip().split("\n")
    pairs = WEBUI_PAIR.findall(last)
    values = {name.strip(): _unquoted(value.strip()) for name, value in pairs}
    if "Steps" not in values:
        raise ValueError(f"`picture` carries settings that cannot be read: {shown(text)}.")
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    arguments: dict[str, Any] = {"prompt": prompt.strip()}
    if negative.strip():
        arguments["negative_prompt"] = negative.strip()
    if "Hires upscale" in values:  # there it is of a second run, which enlarges the picture
        values.pop("Denoising strength", None)
    try:
        for name, (argument, kind) in WEBUI_NAMES.items():
            if name in values:
                arguments[argument] = kind(values[name])
        if "Size" in values:
            arguments["width"], arguments["height"] = (int(side) for side in values["Size"].split("x"))
    except ValueError as error:
        raise ValueError(f"`picture` carries settings that cannot be read: {shown(last)}.") from error
    solver = _solver_of(values.get("Sampler", ""), values.get("Schedule type", ""))
    if solver is not None:
        arguments["solver"] = solver
    return {"arguments": arguments, "made_with": {"checkpoint": values.get("Model"), "text": text}}


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return json.loads(value)
        except ValueError:
            return value.strip('"')
    return value


def _solver_of(sampler: str, schedule: str) -> str | None:
    """The solver for AUTOMATIC1111's sampler and schedule, or None where there is none of ours."""
    name = sampler.lower()
    if schedule.lower() == "karras" and "karras" not in name:
        name += " karras"
    try:
        return solver_name(name)
    except ValueError:
        if sampler:
            logger.warning(
                "There is no solver like %s %s: the pipeline's own is used.", shown(sampler), shown(schedule)
            )
        return None


def solver_of(scheduler: Any) -> str | None:
    """The name that people know a scheduler by; None where there is none."""
    own = type(scheduler).__name__
    for name, (kind, settings) in sorted(SOLVERS.items(), key=lambda entry: -len(entry[1][1])):
        wanted = {"use_karras_sigmas": False} | settings
        wanted.pop("timestep_spacing", None)
        if own == kind and all((scheduler.config.get(key) or False) == wanted[key] for key in wanted):
            return name
    return None


def seeds_of(generator: torch.Generator | list[torch.Generator] | None) -> int | list[int] | None:
    """Seeds that make the same generators, where they were not drawn from yet."""
    if isinstance(generator, list):
        seeds = [seeds_of(one) for one in generator]
        return None if None in seeds else seeds  # type: ignore[return-value]
    if generator is None:
        return None
    seed = generator.initial_seed()
    fresh = torch.Generator().manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None


def of_each(arguments: dict[str, Any], pictures: int) -> list[dict[str, Any]]:
    """The arguments of a call that makes one picture alone, where each has a seed of its own; else those of them all.

    Args:
        arguments: of the call that makes them all, prompts and negative prompts as lists or None.
    """
    seeds = arguments.get("seed")
    if pictures > 1 and not isinstance(seeds, list):
        return [arguments] * pictures
    each = []
    for i in range(pictures):
        seed = seeds[i] if isinstance(seeds, list) else seeds
        each.append(arguments | words_of(arguments, {"picture": i}) | {"seed": seed, "num_images_per_prompt": 1})
    return each


def words_of(arguments: dict[str, Any], made_with: dict[str, Any]) -> dict[str, str | None]:
    """The prompt and the negative prompt of a picture itself, where its call had several; as ``_read`` gives both."""
    picture, times = made_with.get("picture"), arguments.get("num_images_per_prompt")
    index = picture // times if isinstance(picture, int) and isinstance(times, int) and times > 0 else 0
    words = {}
    for name in ("prompt", "negative_prompt"):
        value = arguments.get(name)
        words[name] = value[index % len(value)] if isinstance(value, list) and value else value
    return words


def sha256_of(picture: Image.Image) -> str:
    """Of a picture's pixels."""
    return hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Of the libraries that a picture depends on."""
    return {name: version(name) for name in VERSIONS}
