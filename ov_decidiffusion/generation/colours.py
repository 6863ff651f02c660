"""Colour profiles: what a picture's numbers mean, brought to sRGB, which the models were trained on."""

import io
import logging

from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

MAX_PROFILE = 4_000_000  # bytes; a printer's has one or two million
MODES = {"RGB": ("RGB", "RGBA", "RGBX"), "GRAY": ("L",), "CMYK": ("CMYK",)}  # that a profile of a space fits


def to_srgb(picture: Image.Image) -> Image.Image:
    """A picture whose colour profile (ICC) was applied: it then has none, and its numbers are sRGB.

    Palettes become colours, and what is transparent stays so. A profile that is damaged, or of another kind than the
    picture, is left out with a warning in the log; pictures without one, and those in sRGB already, stay as they are.

    Args:
        picture: loaded, of 8 bits a channel; others stay as they are.
    """
    data = picture.info.get("icc_profile")
    if not data or picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return picture
    try:
        profile = _read_profile(data)
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return picture
        return _converted(picture, profile)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        logger.warning("A picture's colour profile is left out, it cannot be used: %s", str(error)[:200])
        return picture


def _read_profile(data: bytes) -> ImageCms.ImageCmsProfile:
    if len(data) > MAX_PROFILE:
        raise ValueError(f"it has {len(data) / 1e6:.0f} MB; at most {MAX_PROFILE // 10**6} MB are read")
    return ImageCms.ImageCmsProfile(io.BytesIO(data))


def _converted(picture: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    alpha = None
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB")
    elif picture.mode in ("P", "1", "LA", "La", "PA"):
        picture = picture.convert("RGB" if picture.mode[0] == "P" else "L")
    space = profile.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]  # PIL's hints lack it
    if space == "GRAY" and picture.mode == "RGB" and alpha is not None:
        picture = picture.convert("L")  # a grey picture, to which only its transparency gave colours
    if picture.mode not in MODES.get(space, ()):
        raise ValueError(f"it is for {space}, and the picture is {picture.mode}")
    converted = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # only where it converts in place
    converted.info.pop("icc_profile", None)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
