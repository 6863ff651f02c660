"""A picture's settings as text, in the form of AUTOMATIC1111's stable-diffusion-webui, which many programs use.

The text has a prompt of any number of lines, optionally "Negative prompt: " and more lines, and a line of names and
values, such as "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512". Extensions append further lines.
"""

import json
import logging
import re
from typing import Any

from ov_decidiffusion.arguments import shown
from ov_decidiffusion.schedulers.registry import solver_name

logger = logging.getLogger(__name__)

NEGATIVE = "Negative prompt:"
# "name: value" between commas; the value may be in quotes. The quantifiers are possessive, so that a text that does
# not match is rejected without backtracking.
PAIR = re.compile(r'(?:^|(?<=,))([^:,]++):\s*+("(?:\\.|[^"\\])*+"|[^,]*+)(?:,|$)')
SCHEDULES_OF_OUR_OWN = ("", "automatic", "uniform")  # a solver's own schedule
# Names that do not affect our pictures, or are read elsewhere.
HARMLESS = re.compile(
    r"Steps|Sampler|Schedule type|CFG scale|Seed|Size|Denoising strength|Model|VAE|Version|Hires.*|First pass size|"
    r".* hash(es)?|Hashes|Time taken|User|Template|Negative Template|Eta|RNG|Module \d+|Discard penultimate sigma"
)


def write_text(arguments: dict[str, Any], origin: dict[str, Any], size: tuple[int, int]) -> str:
    """The settings text of a picture.

    Args:
        arguments: the arguments of the call that makes it.
        origin: what made it: the checkpoint and more, as in ``made_with``.
        size: (width, height) in pixels.
    """
    first: dict[str, Any] = {
        name: value[0] if isinstance(value, list) and value else value for name, value in arguments.items()
    }
    first |= words_of(arguments, origin)  # the picture need not be the call's first
    lines = [first["prompt"] or ""]
    if first.get("negative_prompt"):
        lines.append(f"{NEGATIVE} {first['negative_prompt']}")
    values = {
        "Steps": first.get("num_inference_steps"),
        "Sampler": sampler_name(first.get("solver") or origin.get("solver") or ""),
        "CFG scale": first.get("guidance_scale"),
        "Seed": first.get("seed"),
        "Size": f"{first.get('width', size[0])}x{first.get('height', size[1])}",
        "Model": origin.get("checkpoint"),
        "Denoising strength": first.get("strength"),
        "Version": "ov_decidiffusion",
    }
    told = {name: value for name, value in values.items() if value not in (None, "")}
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in told.items())])


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def sampler_name(solver: str) -> str:
    """A solver as people write it: "dpm++ 2m karras" is "DPM++ 2M Karras"."""
    names = {"karras": "Karras", "euler": "Euler", "heun": "Heun", "unipc": "UniPC", "a": "a", "squeezed": "Squeezed"}
    return " ".join(names.get(word, word.upper()) for word in solver.split())


def words_of(arguments: dict[str, Any], made_with: dict[str, Any]) -> dict[str, str | None]:
    """The prompt and the negative prompt of one picture, if its call had several.

    Args:
        arguments, made_with: what the picture carries, as ``settings_of`` and ``made_with`` return it.
    """
    picture, times = made_with.get("picture"), arguments.get("num_images_per_prompt")
    index = picture // times if isinstance(picture, int) and isinstance(times, int) and times > 0 else 0
    words = {}
    for name in ("prompt", "negative_prompt"):
        value = arguments.get(name)
        words[name] = value[index % len(value)] if isinstance(value, list) and value else value
    return words


def read_text(text: str) -> dict[str, Any]:
    """``arguments`` and ``made_with`` of a picture, read from its text; the log names what cannot be used.

    Raises:
        ValueError: no line of names and values, or a value that cannot be read.
    """
    lines = text.strip().split("\n")
    index = _parameter_line(lines)
    if index is None:
        raise ValueError(f"`picture` carries settings that cannot be read: {shown(text)}.")
    values = {name.strip(): _unquoted(value.strip()) for name, value in PAIR.findall(lines[index])}
    arguments = _prompts(lines[:index]) | _numbers(values, lines[index])
    solver = _solver_of(values.get("Sampler", ""), values.get("Schedule type", ""))
    if solver is not None:
        arguments["solver"] = solver
    if left_out := [name for name in values if not HARMLESS.fullmatch(name)]:
        logger.warning("The picture's settings say %s, which is left out.", shown(", ".join(left_out)))
    return {"arguments": arguments, "made_with": {"checkpoint": values.get("Model"), "text": text}}


def _parameter_line(lines: list[str]) -> int | None:
    """The index of the last line that begins with "Steps:", else of the last one that contains it."""
    found = [index for index, line in enumerate(lines) if re.match(r"\s*Steps:\s*\d", line)]
    found = found or [index for index, line in enumerate(lines) if re.search(r", Steps:\s*\d", line)]
    return found[-1] if found else None


def _prompts(lines: list[str]) -> dict[str, str]:
    """The prompt, up to a line that begins with "Negative prompt:", and the negative prompt, from there on."""
    begins = [index for index, line in enumerate(lines) if line.strip().startswith(NEGATIVE)]
    end = begins[0] if begins else len(lines)
    found = {"prompt": "\n".join(lines[:end]).strip()}
    negative = "\n".join(lines[end:]).strip().removeprefix(NEGATIVE).strip()
    return found | ({"negative_prompt": negative} if negative else {})


def _numbers(values: dict[str, str], line: str) -> dict[str, Any]:
    kinds = {
        "Steps": ("num_inference_steps", _whole),
        "CFG scale": ("guidance_scale", float),
        "Seed": ("seed", _whole),
        "Denoising strength": ("strength", float),
    }
    if any(name.startswith("Hires") or name == "First pass size" for name in values):
        del kinds["Denoising strength"]  # it belongs to a second run, which enlarges the picture
    try:
        found = {argument: kind(values[name]) for name, (argument, kind) in kinds.items() if name in values}
        if "Size" in values:
            found["width"], found["height"] = (_whole(side) for side in values["Size"].split("x"))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"`picture` carries settings that cannot be read: {shown(line)}.") from error
    return found


def _whole(text: str) -> int:
    """A whole number; some programs write 20 as 20.0."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value.strip('"')
    return value


def _solver_of(sampler: str, schedule: str) -> str | None:
    """The solver for a sampler and a schedule, or None if we have none."""
    name, kind = sampler.lower(), schedule.lower()
    if kind == "karras" and "karras" not in name:
        name += " karras"
    try:
        solver = solver_name(name)
    except ValueError:
        if sampler:
            logger.warning(
                "There is no solver like %s %s: the pipeline's own is used.", shown(sampler), shown(schedule)
            )
        return None
    if kind not in (*SCHEDULES_OF_OUR_OWN, "karras"):
        logger.warning("There is no schedule like %s: that of %s is used.", shown(schedule), solver)
    return solver
