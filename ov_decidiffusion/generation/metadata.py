"""The settings that a picture carries: they are written into its file, and read back; AUTOMATIC1111's are read too.

A PNG file has them as text chunks. Other formats have them in their EXIF data: AUTOMATIC1111's text as UserComment,
where AUTOMATIC1111 writes it too, and ours as MakerNote.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, PngImagePlugin

from ov_decidiffusion.arguments import shown
from ov_decidiffusion.generation.config import SAVED, GenerationConfig
from ov_decidiffusion.generation.webui_text import read_text, words_of, write_text
from ov_decidiffusion.schedulers.registry import SOLVERS
from ov_decidiffusion.web.uploads import readers

logger = logging.getLogger(__name__)

OWN = "ov_decidiffusion"  # names of the text chunks
WEBUI = "parameters"
VERSIONS = ("openvino", "torch", "diffusers")
WITH_EXIF = ("JPEG", "WEBP", "AVIF", "TIFF")
KINDS_READ = ("PNG", "MPO", *WITH_EXIF)  # no other reader may look at a file
MAX_EXIF = 65_000  # bytes; the limit of JPEG
USER_COMMENT, MAKER_NOTE = ExifTags.Base.UserComment, ExifTags.Base.MakerNote
UNICODE, OWN_NOTE = b"UNICODE\0", b"ov_decidiffusion\0"
MAX_TEXT = 1_000_000  # characters of settings that are read


class NoSettingsError(ValueError):
    """A picture carries no settings at all, as opposed to settings that cannot be read."""


class SettingsPicture(Image.Image):
    """A PIL picture whose ``save`` writes the settings in ``info`` into the file, which PIL's own does not.

    Args:
        picture: the picture to copy.
    """

    def __init__(self, picture: Image.Image):
        super().__init__()
        self.__setstate__(picture.__getstate__())  # PIL's own constructors make pictures of its own class only
        self.info = dict(picture.info)

    def copy(self) -> "SettingsPicture":
        """PIL's ``copy``, with the settings."""
        return SettingsPicture(self)

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """PIL's ``save``, with the settings."""
        texts = {name: self.info[name] for name in (WEBUI, OWN) if name in self.info}
        suffix = Path(str(getattr(fp, "name", fp))).suffix.lower()
        kind = (format or Image.registered_extensions().get(suffix, "")).upper()
        carrying: dict[str, Any] = {}
        if kind == "PNG":
            carrying["pnginfo"] = PngImagePlugin.PngInfo()
            for name, text in texts.items():
                carrying["pnginfo"].add_text(name, text)
        elif kind in WITH_EXIF and texts:
            carrying["exif"] = _to_exif(texts)
        super().save(fp, format, **(carrying | params))


def _to_exif(texts: dict[str, str]) -> bytes:
    exif = Image.Exif()
    if WEBUI in texts:
        exif.get_ifd(ExifTags.IFD.Exif)[USER_COMMENT] = UNICODE + texts[WEBUI].encode("utf-16-be", "replace")
    if OWN in texts:
        exif.get_ifd(ExifTags.IFD.Exif)[MAKER_NOTE] = OWN_NOTE + texts[OWN].encode()
    written = exif.tobytes()
    if len(written) > MAX_EXIF:
        logger.warning(
            "The picture's settings are left out: they take %d bytes, and this file format holds %d. PNG has no limit.",
            len(written),
            MAX_EXIF,
        )
        return b""
    return written


def _from_exif(exif: Image.Exif) -> dict[str, str]:
    """The texts that ``_to_exif`` wrote, or the UserComment of another program."""
    texts, tags = {}, exif.get_ifd(ExifTags.IFD.Exif)
    note, comment = tags.get(MAKER_NOTE), tags.get(USER_COMMENT)
    if isinstance(note, bytes) and note.startswith(OWN_NOTE):
        texts[OWN] = note.removeprefix(OWN_NOTE).decode("utf-8", "replace")
    if isinstance(comment, str):
        texts[WEBUI] = comment
    elif isinstance(comment, bytes) and comment.startswith(UNICODE):
        text = comment.removeprefix(UNICODE)
        # The standard leaves the byte order open: most letters of a prompt have a zero byte in front, or behind.
        little = text[1::2].count(0) > text[::2].count(0)
        texts[WEBUI] = text.decode("utf-16-le" if little else "utf-16-be", "replace")
    elif isinstance(comment, bytes):
        texts[WEBUI] = comment[len(UNICODE) :].decode("utf-8", "replace")
    return texts


def attach(picture: Image.Image, arguments: dict[str, Any], made_with: dict[str, Any]) -> SettingsPicture:
    """A copy of a picture with its settings in ``info``, and in the file that ``save`` writes.

    Args:
        arguments: the arguments of a call that makes the picture.
        made_with: the checkpoint, the precision, the versions, and anything else worth recording.
    """
    carrying = SettingsPicture(picture)
    carrying.info[WEBUI] = write_text(arguments, made_with, picture.size)
    carrying.info[OWN] = json.dumps({"arguments": arguments, "made_with": made_with}, default=str)
    return carrying


def settings_of(picture: str | Path | Image.Image) -> dict[str, Any]:
    """The arguments of the call that made a picture: ``pipe(**settings_of("old.png"))`` makes it again.

    Args:
        picture: a PNG, JPEG, WebP, AVIF or TIFF file that this pipeline or AUTOMATIC1111 wrote, or a picture that
            this pipeline returned. It does not hold the source picture and the mask: pass them to the call again.

    Raises:
        ValueError: the picture cannot be read, or carries no settings.

    Example:
        >>> from ov_decidiffusion import settings_of
        >>> pipe("a fox in the snow", seed=1, num_inference_steps=4).images[0].save("fox.png")
        >>> settings_of("fox.png")["seed"]
        1
        >>> again = pipe(**settings_of("fox.png")).images[0]
    """
    return _read(picture)["arguments"]


def made_with(picture: str | Path | Image.Image) -> dict[str, Any]:
    """The checkpoint, precision and versions that made a picture, if it records them; raises as ``settings_of``.

    Example:
        >>> from ov_decidiffusion import made_with
        >>> made_with(pipe("a fox in the snow", num_inference_steps=4).images[0])["checkpoint"]
        'tiny-decidiffusion'
    """
    return _read(picture)["made_with"]


def _read(picture: str | Path | Image.Image) -> dict[str, Any]:
    try:
        if not isinstance(picture, Image.Image):
            with Image.open(Path(picture).expanduser(), formats=readers(KINDS_READ)) as opened:
                texts = _texts_in(opened)
        else:
            texts = _texts_in(picture)
    except Exception as error:  # PIL's readers raise a dozen kinds of errors for damaged files
        raise ValueError(f"`picture` {shown(picture)} cannot be read: {error}") from error
    for name, read in ((OWN, _read_own), (WEBUI, read_text)):
        text = texts.get(name)
        if text is not None:
            if len(text) > MAX_TEXT:
                raise ValueError(f"`picture` carries settings of {len(text)} characters: at most {MAX_TEXT} are read.")
            return _checked(read(text))
    raise NoSettingsError("`picture` carries no settings: neither ours nor AUTOMATIC1111's are in its text.")


def _texts_in(picture: Image.Image) -> dict[str, str]:
    """The texts of a picture that hold settings, by the names of their chunks."""
    if picture.format == "PNG":
        picture.load()  # text chunks may come after the pixels
    texts = {name: picture.info[name] for name in (OWN, WEBUI) if isinstance(picture.info.get(name), str)}
    if picture.format == "PNG":
        return {name: _as_written(text) for name, text in texts.items()}
    return texts or _from_exif(picture.getexif())


def _as_written(text: str) -> str:
    """PNG's plain text chunks are Latin-1 by the standard, but many programs write UTF-8 into them."""
    if isinstance(text, PngImagePlugin.iTXt):  # UTF-8 by the standard
        return text
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _read_own(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        arguments, origin = content["arguments"], content["made_with"]
        if not isinstance(origin, dict):
            raise ValueError("made_with is of another kind")
        return {"arguments": {name: arguments[name] for name in SAVED if name in arguments}, "made_with": origin}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"`picture` carries settings that cannot be read ({error}): {shown(text)}.") from error


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """Check that every setting has a type that its argument takes, so that callers need not check again.

    Raises:
        ValueError: a setting has not; the message names it.
    """
    for name, value in found["arguments"].items():
        values = value if isinstance(value, list) and value else [value]
        if not all(one is None or any(is_kind(one) for is_kind in KINDS[name]) for one in values):
            raise ValueError(
                f"`picture` carries settings that cannot be read: `{name}` is {shown(value)}, which it cannot be."
            )
    return found


def _is_text(value: Any) -> bool:
    """Whether it is text that can be encoded: half a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float) and math.isfinite(value)


def _kinds(annotation: str) -> list[Callable[[Any], bool]]:
    tests = {"str": _is_text, "bool": _is_flag, "int": _is_whole, "float": _is_number}
    return [tests[name] for name in tests if re.search(rf"\b{name}\b", annotation)]


KINDS = {one.name: _kinds(str(one.type)) for one in fields(GenerationConfig) if one.name in SAVED}


def solver_of(scheduler: Any) -> str | None:
    """A scheduler's common name, as in ``SOLVERS``; None if it has none."""
    own = type(scheduler).__name__
    for name, (kind, settings) in sorted(SOLVERS.items(), key=lambda entry: -len(entry[1][1])):
        wanted = {"use_karras_sigmas": False} | settings
        wanted.pop("timestep_spacing", None)
        if own == kind and all((scheduler.config.get(key) or False) == wanted[key] for key in wanted):
            return name
    return None


def seeds_of(generator: torch.Generator | list[torch.Generator] | None) -> int | list[int] | None:
    """Seeds that make the same generators again; None if numbers have been drawn from them already."""
    if isinstance(generator, list):
        seeds = [seeds_of(one) for one in generator]
        return None if None in seeds else seeds  # type: ignore[return-value]
    if generator is None:
        return None
    seed = generator.initial_seed()
    fresh = torch.Generator().manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None


def of_each(arguments: dict[str, Any], pictures: int) -> list[dict[str, Any]]:
    """For each picture of a call, the arguments that make it: of it alone if it has its own seed, else of all.

    Args:
        arguments: of the call that makes all pictures, with prompts and negative prompts as lists or None.
        pictures: number of pictures.
    """
    seeds = arguments.get("seed")
    if pictures > 1 and not isinstance(seeds, list):
        return [arguments] * pictures
    each = []
    for i in range(pictures):
        seed = seeds[i] if isinstance(seeds, list) else seeds
        each.append(arguments | words_of(arguments, {"picture": i}) | {"seed": seed, "num_images_per_prompt": 1})
    return each


def sha256_of(picture: Image.Image) -> str:
    """The SHA-256 of a picture's pixels."""
    return hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()


@cache
def versions() -> dict[str, str]:
    """The versions of the libraries that a picture depends on."""
    return {name: version(name) for name in VERSIONS}
