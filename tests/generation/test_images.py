"""Sources keep their shape, and whatever is given as a picture is read rightly or refused."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ov_decidiffusion.generation.images import choose_size, fit_size, resize, to_pictures

LENGTH = int(os.environ.get("FUZZ_LENGTH", "1"))  # `make soak` draws ten times the examples


@pytest.mark.parametrize(
    ("source", "area", "expected"),
    [
        ((768, 512), 512 * 512, (640, 448)),
        ((512, 768), 512 * 512, (448, 640)),
        ((1024, 768), 512 * 512, (576, 448)),
        ((1920, 1080), 512 * 512, (704, 384)),
        ((512, 512), 512 * 512, (512, 512)),
        ((100, 150), 512 * 512, (448, 640)),
        ((4000, 1000), 128 * 128, (256, 64)),
        ((300, 200), 128 * 128, (128, 128)),
        ((1, 1), 128 * 128, (128, 128)),
    ],
)
def test_the_size_is_the_one_closest_in_shape_of_about_the_defaults_area(source, area, expected):
    width, height = fit_size(*source, area, 64)
    assert 0.85 * area <= width * height <= 1.15 * area and width % 64 == height % 64 == 0
    distance = abs(np.log(width / height) - np.log(source[0] / source[1]))
    best = abs(np.log(expected[0] / expected[1]) - np.log(source[0] / source[1]))
    assert distance <= best + 1e-9


def disc(size: tuple[int, int]) -> Image.Image:
    """A black disc in the middle of a white picture."""
    picture = Image.new("L", size, 255)
    radius = 0.35 * min(size)
    x, y = size[0] / 2, size[1] / 2
    ImageDraw.Draw(picture).ellipse([x - radius, y - radius, x + radius, y + radius], 0)
    return picture.convert("RGB")


def widths(picture: Image.Image) -> tuple[float, float]:
    """Of the dark thing in a picture, across and down: the root of its second moments."""
    dark = np.clip(1.2 - np.asarray(picture.convert("L"), float) / 200, 0, 1)
    dark[dark < 0.3] = 0
    return tuple(
        float(np.sqrt(np.average((np.arange(n) - np.average(np.arange(n), weights=mass)) ** 2, weights=mass)))
        for n, mass in ((dark.shape[1], dark.sum(axis=0)), (dark.shape[0], dark.sum(axis=1)))
    )


@pytest.mark.parametrize("mode", ["crop", "fill"])
@pytest.mark.parametrize("source", [(300, 200), (200, 300), (640, 360), (100, 150), (512, 1024)])
@pytest.mark.parametrize("default", [128, 512])
def test_a_circle_stays_a_circle(default, source, mode):
    size = fit_size(*source, default**2, 64)
    across, down = widths(resize(disc(source), size, mode))
    assert across / down == pytest.approx(1, abs=0.03)


def test_a_circle_is_a_circle_after_image_to_image_and_an_egg_only_where_asked_for(pipe):
    arguments = {"strength": 0.05, "num_inference_steps": 40, "seed": 0, "guidance_scale": 1.0}
    made = pipe("a ghost", image=disc((300, 200)), **arguments).images[0]
    across, down = widths(made)
    assert across / down == pytest.approx(1, abs=0.03)
    square = {"height": 128, "width": 128, "resize_mode": "stretch"}
    across, down = widths(pipe("a ghost", image=disc((300, 200)), **square, **arguments).images[0])
    assert across / down < 0.8
    with pytest.raises(ValueError, match="`resize_mode` must be one of crop, fill, stretch, got 'squeeze'"):
        pipe.denoise("a", image=disc((64, 64)), resize_mode="squeeze")


@pytest.mark.parametrize(("given", "expected"), [({"height": 256}, (384, 256)), ({"width": 192}, (192, 128))])
def test_one_side_that_is_given_brings_the_other_along(given, expected):
    sides = {"width": None, "height": None} | given
    assert choose_size(**sides, images=[Image.new("RGB", (300, 200))], default=(128, 128), factor=64) == expected


def test_a_line_is_filled_up_and_an_opaque_array_is_one_picture():
    assert resize(Image.new("RGB", (1, 5000)), (128, 128), "fill").size == (128, 128)
    array = np.full((64, 64, 4), 255, np.uint8)
    array[:32, :, 3] = 0
    (picture,) = to_pictures(np.where(array == 255, [200, 0, 0, 255], array).astype(np.uint8))
    assert picture.getpixel((0, 0)) == (255, 255, 255) and picture.getpixel((0, 63)) == (200, 0, 0)
    with pytest.raises(ValueError, match=r"must be \[H, W\], .* got \(3, 64, 64\)"):
        to_pictures(np.zeros((3, 64, 64)))
    (overshot,) = to_pictures(Image.fromarray(np.array([[0, 0.5, 1.02]], np.float32)))
    assert [pixel[0] for pixel in overshot.getdata()] == [0, 128, 255]
    barely = torch.full((1, 3, 8, 8), 0.5)
    barely[0, 0, 0, 0] = -1e-6
    assert to_pictures(barely)[0].getpixel((4, 4)) == (128, 128, 128)


def test_wide_greys_keep_their_range():
    for value, expected in ((255, 1), (256, 1), (32768, 128), (65535, 255)):
        picture = Image.fromarray(np.full((4, 4), value, np.uint16))
        assert to_pictures(picture)[0].getpixel((0, 0)) == (expected,) * 3
    for value, expected in ((255, 1), (256, 1), (65535, 255)):
        picture = Image.open(io.BytesIO(b"P5 1 1 65535\n" + value.to_bytes(2, "big")))
        assert to_pictures(picture)[0].getpixel((0, 0)) == (expected,) * 3
    values = np.full((4, 4), 0.5, np.float32)
    values[0, 0] = np.inf
    picture = to_pictures(Image.fromarray(values))[0]
    assert picture.getpixel((1, 1)) == (128,) * 3 and picture.getpixel((0, 0)) == (255,) * 3


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA")


def encoded(picture: Image.Image, name: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, name)
    return file.getvalue()


@settings(max_examples=600 * LENGTH, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(FORMATS), cut=st.floats(0.05, 1))
def test_a_file_that_is_cut_short_or_damaged_is_refused_by_name(data, name, cut):
    content = bytearray(encoded(disc((40, 24)), name))
    content = content[: int(len(content) * cut)]
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        opened = Image.open(io.BytesIO(bytes(content)))
    except Exception:
        return  # PIL itself refuses it when it is opened, which is before it is given to us
    if opened.width * opened.height > 10_000_000:
        return
    try:
        (picture,) = to_pictures(opened)
    except ValueError as error:
        assert "`image` cannot be read" in str(error) or "`image` is empty" in str(error)
    else:
        assert picture.mode == "RGB" and picture.size


@settings(max_examples=400 * LENGTH, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    kind=st.sampled_from(["uint8", "int64", "float32", "float64", "bool", "complex64"]),
    value=st.sampled_from([0, 1, 255, -3, float("nan"), float("inf"), 0.5]),
    as_tensor=st.booleans(),
)
def test_arrays_and_tensors_of_any_shape_are_taken_or_refused(shape, kind, value, as_tensor):
    with np.errstate(all="ignore"):
        array = np.full(shape, value, np.float64).astype(kind)
    given_one = torch.from_numpy(array.copy()) if as_tensor else array
    try:
        pictures = to_pictures(given_one)
    except ValueError as error:
        assert "`image` as a" in str(error)
    else:
        assert pictures and all(picture.mode == "RGB" and min(picture.size) > 0 for picture in pictures)
