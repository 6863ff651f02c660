"""Colour profiles, against the formulas of the colour spaces themselves."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from ov_decidiffusion.generation.images import to_rgb

# Colours of the primaries in XYZ, as profiles hold them (relative to D50): Display P3 and Adobe RGB (1998).
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
COLOUR = (220, 80, 60)


def profile(primaries, gamma: float, name: bytes = b"made for this test") -> bytes:
    """A profile of version 2 (ICC.1:2001-04) with three primaries and one exponent, or a grey one without primaries."""

    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    described = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(79)
    tags = {b"desc": described, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz((0.9642, 1, 0.8249))}
    if primaries:
        tags |= {letter + b"XYZ": xyz(one) for letter, one in zip((b"r", b"g", b"b"), primaries, strict=True)}
        tags |= {letter + b"TRC": curve for letter in (b"r", b"g", b"b")}
    else:
        tags[b"kTRC"] = curve
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"none", 0x02100000, b"mntr", b"RGB " if primaries else b"GRAY", b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642) + fixed(1) + fixed(0.8249) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def in_srgb(colour, primaries, gamma: float) -> np.ndarray:
    """IEC 61966-2-1: numbers -> light -> XYZ -> light of sRGB's primaries -> numbers."""
    light = (np.array(colour) / 255) ** gamma
    linear = np.linalg.solve(np.array(SRGB).T, np.array(primaries).T @ light).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def reopened(picture: Image.Image, kind: str, icc: bytes) -> Image.Image:
    how = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    buffer = io.BytesIO()
    picture.save(buffer, kind, icc_profile=icc, **how)
    return Image.open(buffer)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("primaries", "gamma"), [(DISPLAY_P3, 2.2), (ADOBE_RGB, 2.2), (DISPLAY_P3, 1.0)])
def test_a_profile_is_brought_to_srgb(kind, primaries, gamma):
    opened = reopened(Image.new("RGB", (32, 32), COLOUR), kind, profile(primaries, gamma))
    wanted = in_srgb(COLOUR, primaries, gamma)
    assert np.abs(wanted - COLOUR).max() > 8
    found = to_rgb(opened)
    assert np.abs(np.asarray(found)[5, 5] - wanted).max() <= 3 and "icc_profile" not in found.info


def test_transparency_palettes_and_greys_have_profiles_too():
    wanted = in_srgb(COLOUR, DISPLAY_P3, 2.2)
    clear = Image.new("RGBA", (32, 32), (*COLOUR, 0))
    clear.paste((*COLOUR, 255), (0, 0, 16, 32))
    found = np.asarray(to_rgb(reopened(clear, "PNG", profile(DISPLAY_P3, 2.2))), float)
    assert np.abs(found[5, 5] - wanted).max() <= 3 and (found[5, 25] == 255).all()
    palette = Image.new("RGB", (32, 32), COLOUR).quantize(4)
    found = np.asarray(to_rgb(reopened(palette, "PNG", profile(DISPLAY_P3, 2.2))), float)
    assert np.abs(found[5, 5] - wanted).max() <= 3
    grey = np.asarray(to_rgb(reopened(Image.new("L", (32, 32), 60), "PNG", profile(None, 1.0))), float)
    assert np.abs(grey[5, 5] - in_srgb((60,) * 3, SRGB, 1.0)).max() <= 3


@pytest.mark.parametrize("icc", [b"no profile", profile(DISPLAY_P3, 2.2)[:200], profile(None, 1.0)])
def test_a_profile_that_cannot_be_used_is_left_out_with_a_word(icc, caplog):
    opened = reopened(Image.new("RGB", (32, 32), COLOUR), "PNG", icc)
    assert np.asarray(to_rgb(opened))[5, 5].tolist() == list(COLOUR)
    assert "colour profile is left out" in caplog.text


def test_srgb_stays_as_it_is_to_the_bit():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    opened = reopened(Image.fromarray(noise), "PNG", profile(SRGB, 2.2, b"sRGB IEC61966-2.1"))
    np.testing.assert_array_equal(np.asarray(to_rgb(opened)), noise)
