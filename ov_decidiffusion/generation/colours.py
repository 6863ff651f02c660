"""Colour profiles: pictures are converted to sRGB, which the models were trained on."""

import io
import logging

from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

MAX_PROFILE = 4_000_000  # bytes; a printer's has one or two million
MODES = {"RGB": ("RGB", "RGBA", "RGBX"), "GRAY": ("L",), "CMYK": ("CMYK",)}  # picture modes by a profile's space


def to_srgb(picture: Image.Image) -> Image.Image:
    """Apply a picture's colour profile (ICC); the result has no profile, and its values are sRGB.

    Palettes are expanded to colours, and transparency is kept. A profile that is damaged, or does not fit the
    picture's mode, is ignored with a warning in the log. Pictures without a profile or already in sRGB stay unchanged.

    Args:
        picture: a loaded picture with 8 bits per channel; others stay unchanged.
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
        logger.warning("A picture's colour profile is left out, since it cannot be used: %s", str(error)[:200])
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
        picture = picture.convert("L")  # a grey picture, which became RGB only because it has transparency
    if picture.mode not in MODES.get(space, ()):
        raise ValueError(f"it is for {space}, and the picture is {picture.mode}")
    converted = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # it is None only for a conversion in place
    converted.info.pop("icc_profile", None)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
