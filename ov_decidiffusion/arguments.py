"""Checks of a call's arguments: every refusal names the argument, its value and what is allowed.

All functions raise ValueError. Checks of tensors are in ``tensors.py``: this file is imported before torch is.
"""

import numbers
import os
import warnings
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

MAX_GUIDANCE = 1000  # far beyond any use; at 1e38 numbers overflow
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODERS = ("whole", "tiny")
SHOWN = 120  # characters of a value in a message
MAX_WHOLE = 10**9  # the default limit of a whole number: beyond it, numbers overflow somewhere
MAX_PROMPT = 100_000  # characters; about 8,000 fit into the 1,500 tokens that are read


def shown(value: Any) -> str:
    """A value as text for a message, cut short."""
    try:
        text = repr(value)
    except Exception:  # even a value whose repr fails has to be refused by name
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def warn_renamed(old: str, new: str) -> None:
    """Warn a caller of this library that a name was replaced; the old one works for one more release."""
    warnings.warn(
        f"`{old}` is now `{new}`; the old name will go in the next release.", DeprecationWarning, stacklevel=3
    )


def check_prompts(prompt: str | list[str] | None, name: str = "prompt") -> list[str]:
    """The prompts as a list."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`{name}` must be a string or a list of strings, got {shown(prompt)}.")
    for text in prompts:
        if len(text) > MAX_PROMPT:
            raise ValueError(f"`{name}` must have at most {MAX_PROMPT} characters, got {len(text)}: {shown(text)}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            broken = text[error.start : error.end]
            raise ValueError(
                f"`{name}` must be text, but holds {broken!r} at position {error.start}, half of a character."
            ) from error
    return list(prompts)


def check_negative_prompts(negative_prompt: str | list[str] | None, count: int) -> list[str]:
    """One negative prompt for each of ``count`` prompts; empty ones if none is given."""
    if negative_prompt is None:
        return [""] * count
    negatives = check_prompts(negative_prompt, "negative_prompt")
    if isinstance(negative_prompt, str):
        return negatives * count
    if len(negatives) != count:
        raise ValueError(f"`negative_prompt` has {len(negatives)} entries, but `prompt` has {count}.")
    return negatives


def check_schedule(name: str, values: Any, high: float, most: int) -> list[Any] | None:
    """None, or at most ``most`` falling timesteps or noise levels, from ``high`` down to 0."""
    if values is None:
        return None
    if hasattr(values, "tolist"):  # an array, or a tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= most:
        raise ValueError(f"`{name}` must be a list of at most {most} falling numbers, got {shown(values)}.")
    check = check_whole if name == "timesteps" else check_range
    checked = [check(f"{name}[{i}]", value, 0, high) for i, value in enumerate(values)]
    if any(later >= earlier for earlier, later in zip(checked, checked[1:], strict=False)):
        raise ValueError(f"`{name}` must be falling, got {shown(values)}.")
    return checked


def check_quantized(quantized: Any, there_are: frozenset[str], possible: tuple[str, ...]) -> frozenset[str]:
    """The parts to run in INT8: for True all that exist, else those named."""
    if isinstance(quantized, np.bool_):
        quantized = bool(quantized)
    if quantized is False:
        return frozenset()
    named = isinstance(quantized, (list, tuple, set, frozenset)) and all(one in possible for one in quantized)
    if quantized is not True and not named:
        raise ValueError(f"`quantized` must be True, False or some of {possible}, got {shown(quantized)}.")
    wanted = there_are if quantized is True else frozenset(quantized)
    missing = wanted - there_are
    if missing or (quantized is True and not wanted):
        raise ValueError(
            f"There is no INT8 {' and '.join(sorted(missing)) or 'model'} for this folder: make it with "
            "`python -m ov_decidiffusion quantize` or quantize_models and the folder that convert_checkpoint wrote, "
            "and load the pipeline again; or do without, by `quantized=False`. A part that INT8 would harm too much is "
            "kept as it was, and has no INT8 model."
        )
    return wanted


def check_decoder(decoder: Any, has_tiny: bool) -> str:
    """One of ``DECODERS``, if the folder has it."""
    check_choice("decoder", decoder, DECODERS)
    if decoder == "tiny" and not has_tiny:
        raise ValueError(
            '`decoder` "tiny" is not in this folder: its checkpoint has no tiny_decoder/, or none could be downloaded '
            "when it was converted. Once there is one, delete the folder and convert again."
        )
    return decoder


def check_whole(name: str, value: Any, least: int, most: float = MAX_WHOLE) -> int:
    """A whole number of Python or numpy from ``least`` to ``most``."""
    whole = _is_whole(value)
    if not whole or not least <= value <= most:
        open_ended = most == MAX_WHOLE and not (whole and value > most)
        allowed = f"of at least {least}" if open_ended else f"from {least} to {most}"
        raise ValueError(f"`{name}` must be a whole number {allowed}, got {shown(value)}.")
    return int(value)


def check_range(name: str, value: Any, low: float, high: float | None) -> float:
    """A number of Python or numpy from ``low`` to ``high``; None means no upper limit."""
    allowed = f"a number of at least {low}" if high is None else f"a number from {low} to {high}"
    number = _is_number(value)
    if not number or not value >= low or (high is not None and value > high) or _overflows(value):
        raise ValueError(f"`{name}` must be {allowed}, got {shown(value)}.")
    return float(value)


def _is_whole(value: Any) -> TypeGuard[int]:
    """Whether this is a whole number of Python or numpy; both behave alike here."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether this is a real number of Python or numpy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _overflows(value: Any) -> bool:
    """Whether a number is too large for a float."""
    try:
        float(value)
    except OverflowError:
        return True
    return False


def check_path(name: str, value: Any, what: str = "a folder") -> Path:
    """A path, with ``~`` expanded. An empty one is refused, since it would mean the current folder.

    So are names that are not UTF-8: Linux allows any bytes, but the libraries that read weights and tokenizers do not.
    """
    try:
        if isinstance(value, (str, os.PathLike)) and str(value):
            path = Path(value).expanduser()
            str(path.absolute()).encode()
            return path
    except UnicodeError:
        raise ValueError(f"`{name}` {shown(value)} has a name that is not UTF-8: rename the folder.") from None
    except RuntimeError:  # ``~name`` of a user that does not exist
        pass
    raise ValueError(f"`{name}` must be {what}, got {shown(value)}.")


def check_choice(name: str, value: Any, allowed: Any) -> str:
    """One of the names in ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {shown(value)}.")
    return value


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")


def check_guidance_interval(interval: Any) -> tuple[float, float] | None:
    """None, or two noise levels in order."""
    if interval is None:
        return None
    if not isinstance(interval, (list, tuple)) or len(interval) != 2:
        raise ValueError(f"`guidance_interval` must be (low, high), two noise levels, or None, got {shown(interval)}.")
    low = check_range("guidance_interval[0]", interval[0], 0, None)
    return low, check_range("guidance_interval[1]", interval[1], interval[0], None)


def check_callback(callback: Any) -> None:
    """Refuse what cannot be called."""
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` must be a function or None, got {shown(callback)}.")


def check_callback_tensors(names: Any, possible: tuple[str, ...]) -> list[str]:
    """The tensors that a callback is given."""
    if not isinstance(names, (list, tuple)) or not all(name in possible for name in names):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be a list of some of {', '.join(possible)}, got {shown(names)}."
        )
    return list(names)


def check_callback_result(result: Any) -> dict[str, Any]:
    """What a callback returned: a dictionary; an empty one for None, which means no change."""
    if result is not None and not isinstance(result, dict):
        raise ValueError(f"`callback_on_step_end` must return a dictionary or None, got {shown(result)}.")
    return result or {}
