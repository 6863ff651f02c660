"""Draws the places of the embedded checkpoint's world: eight plain colours; eight landscapes by day, at sunset and at
night; space; and the world under water."""

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

PLAIN = {
    "red": (222, 50, 50),
    "green": (64, 174, 92),
    "blue": (61, 100, 225),
    "yellow": (250, 220, 80),
    "purple": (150, 85, 195),
    "orange": (247, 150, 60),
    "white": (245, 245, 245),
    "black": (30, 30, 36),
}
LANDSCAPES = {
    "meadow": "in a meadow",
    "beach": "on a beach",
    "snow": "in the snow",
    "desert": "in the desert",
    "sea": "on the sea",
    "forest": "in a forest",
    "city": "in a city",
    "mountains": "in the mountains",
}
TIMES = {"day": "", "sunset": " at sunset", "night": " at night"}
SKIES = {  # colours at the top and at the horizon
    "day": ((98, 180, 245), (215, 238, 255)),
    "sunset": ((110, 70, 160), (255, 175, 105)),
    "night": ((20, 22, 62), (58, 60, 112)),
}
TINTS = {  # the light's factors for the ground's colours, and what it adds
    "day": ((1.0, 1.0, 1.0), (0, 0, 0)),
    "sunset": ((0.82, 0.62, 0.62), (35, 15, 20)),
    "night": ((0.40, 0.44, 0.60), (6, 8, 20)),
}
VARIANTS = 4  # of every place, with other clouds, hills and stars
HORIZON = 0.62  # as a share of the height
SUPERSAMPLING = 4
Color = tuple[int, int, int]


def place_names() -> list[str]:
    """Every place in the words of captions: "on a blue background", "in the snow at night", "under water"."""
    plain = [f"on {'an' if color[0] in 'aeiou' else 'a'} {color} background" for color in PLAIN]
    landscapes = [where + when for where in LANDSCAPES.values() for when in TIMES.values()]
    return [*plain, *landscapes, "in space", "under water"]


def is_plain(place: str) -> bool:
    """Whether a place is just a colour, with nothing to stand on."""
    return place.endswith(" background")


@cache
def draw_place(place: str, variant: int, side: int) -> Image.Image:
    """One place as an RGB picture of side x side pixels; ``variant`` in 0...VARIANTS - 1."""
    if is_plain(place):
        return Image.new("RGB", (side, side), PLAIN[place.split()[-2]])
    rng = random.Random(f"{place.split(' at ')[0]} {variant}")
    big = side * SUPERSAMPLING
    if place == "in space":
        canvas = _space(big, rng)
    elif place == "under water":
        canvas = _under_water(big, rng)
    else:
        canvas = _landscape(place, big, rng)
    return canvas.resize((side, side), Image.Resampling.BOX)


def _gradient(big: int, top: Color, bottom: Color, end: float = 1.0) -> Image.Image:
    share = np.clip(np.arange(big) / (big * end), 0, 1)[:, None, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    return Image.fromarray(np.broadcast_to(rows, (big, big, 3)).round().astype(np.uint8))


def _stars(draw: ImageDraw.ImageDraw, big: int, rng: random.Random, count: int, end: float) -> None:
    for _ in range(count):
        x, y = (rng.randrange(16) + 0.5) / 16 * big, (rng.randrange(int(16 * end)) + 0.5) / 16 * big
        r = rng.choice((1.0, 1.3)) * big / 128
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(255, 255, 240))


def _cloud(draw: ImageDraw.ImageDraw, big: int, x: float, y: float, color: Color) -> None:
    s = big / 128
    x, y = x * s, y * s
    draw.rounded_rectangle([x, y + 6 * s, x + 32 * s, y + 14 * s], 4 * s, fill=color)
    draw.ellipse([x + 4 * s, y, x + 18 * s, y + 13 * s], fill=color)
    draw.ellipse([x + 14 * s, y + 3 * s, x + 26 * s, y + 14 * s], fill=color)


def _hills(draw: ImageDraw.ImageDraw, big: int, base: float, height: float, waves: float, phase: float, color: Color):
    xs = np.linspace(0, big, 97)
    ys = big * (base - height * np.sin(2 * math.pi * (waves * xs / big + phase)))
    draw.polygon([(0, big), *zip(xs.tolist(), ys.tolist(), strict=True), (big, big)], fill=color)


def _landscape(place: str, big: int, rng: random.Random) -> Image.Image:
    where, _, when = place.partition(" at ")
    when = when or "day"
    kind = next(name for name, said in LANDSCAPES.items() if said == where)
    factors, added = TINTS[when]

    def lit(*color: int) -> Color:
        return tuple(min(255, round(c * f + a)) for c, f, a in zip(color, factors, added, strict=True))

    canvas = _gradient(big, *SKIES[when], HORIZON)
    draw = ImageDraw.Draw(canvas)
    x = rng.choice((8, 24, 72, 88))
    if when == "night":
        _stars(draw, big, rng, 12, 0.5)
    elif when == "day":
        _cloud(draw, big, x, rng.choice((8, 16)), (255, 255, 255))
        _cloud(draw, big, (x + 64) % 96, rng.choice((24, 32)), (255, 255, 255))
    elif kind in ("beach", "sea", "desert"):
        middle, r = (x + 16) / 128 * big, 0.1 * big
        draw.ellipse(
            [middle - r, (HORIZON - 0.1) * big - r, middle + r, (HORIZON - 0.1) * big + r], fill=(255, 225, 120)
        )
    GROUNDS[kind](draw, big, rng, lit, when)
    return canvas


def _meadow(draw, big, rng, lit, when) -> None:
    phase = rng.choice((0.0, 0.25, 0.5))
    _hills(draw, big, HORIZON, 0.04, 1, phase, lit(120, 200, 110))
    _hills(draw, big, HORIZON + 0.08, 0.03, 0.8, phase + 0.4, lit(88, 180, 88))


def _beach(draw, big, rng, lit, when) -> None:
    draw.rectangle([0, 0.58 * big, big, big], fill=lit(45, 135, 205))
    _hills(draw, big, 0.74, 0.015, 1, rng.choice((0.0, 0.5)), lit(245, 220, 160))


def _snow(draw, big, rng, lit, when) -> None:
    phase = rng.choice((0.0, 0.3, 0.6))
    _hills(draw, big, HORIZON, 0.05, 0.8, phase, lit(214, 230, 246))
    _hills(draw, big, HORIZON + 0.09, 0.03, 0.7, phase + 0.4, lit(240, 246, 252))
    for _ in range(10):
        x, y = (rng.randrange(16) + 0.25) / 16 * big, (rng.randrange(10) + 0.25) / 16 * big
        r = 1.2 * big / 128
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(255, 255, 255))


def _desert(draw, big, rng, lit, when) -> None:
    phase = rng.choice((0.0, 0.3, 0.6))
    _hills(draw, big, HORIZON, 0.06, 0.9, phase, lit(232, 180, 110))
    _hills(draw, big, HORIZON + 0.1, 0.04, 0.7, phase + 0.45, lit(245, 205, 140))


def _sea(draw, big, rng, lit, when) -> None:
    draw.rectangle([0, HORIZON * big, big, big], fill=lit(40, 125, 200))
    for row in range(4):
        y, shift = (0.68 + 0.09 * row) * big, rng.choice((0, 8)) * big / 128
        for x in range(-1, 9):
            left = x * big / 8 + shift
            draw.arc([left, y, left + big / 8, y + 0.05 * big], 20, 160, fill=lit(130, 195, 240), width=round(big / 90))


def _forest(draw, big, rng, lit, when) -> None:
    for x in range(-1, 9):
        height = rng.choice((0.24, 0.3, 0.36)) * big
        left, foot = x * big / 8, 0.68 * big
        draw.polygon([(left, foot), (left + big / 11, foot - height), (left + big / 5.5, foot)], fill=lit(38, 110, 70))
    _hills(draw, big, 0.66, 0.01, 1, 0.2, lit(96, 165, 84))


def _city(draw, big, rng, lit, when) -> None:
    window = (255, 222, 120) if when == "night" else lit(190, 222, 245)
    for x in range(8):
        top = rng.choice((0.22, 0.3, 0.38, 0.46)) * big
        left = x * big / 8
        draw.rectangle(
            [left, top, left + big / 8 - 1, 0.72 * big], fill=lit(*rng.choice(((140, 150, 175), (165, 160, 178))))
        )
        for row in range(int((0.7 * big - top) / (big / 16))):
            for column in (0.22, 0.6):
                corner = (left + column * big / 8, top + (row + 0.4) * big / 16)
                draw.rectangle([*corner, corner[0] + big / 40, corner[1] + big / 32], fill=window)
    draw.rectangle([0, 0.72 * big, big, big], fill=lit(120, 124, 136))


def _mountains(draw, big, rng, lit, when) -> None:
    for middle, height, width in rng.choice(
        (((0.3, 0.44, 0.42), (0.8, 0.34, 0.34)), ((0.72, 0.44, 0.42), (0.2, 0.34, 0.34)))
    ):
        top, foot = (0.7 - height) * big, 0.7 * big
        x, half = middle * big, width * big
        draw.polygon([(x - half, foot), (x, top), (x + half, foot)], fill=lit(128, 132, 158))
        cap = 0.3
        draw.polygon(
            [(x - half * cap, top + height * cap * big), (x, top), (x + half * cap, top + height * cap * big)],
            fill=lit(244, 248, 255),
        )
    _hills(draw, big, 0.68, 0.02, 0.8, rng.choice((0.0, 0.5)), lit(104, 176, 110))


def _space(big: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(big, (12, 8, 36), (44, 20, 78))
    draw = ImageDraw.Draw(canvas)
    _stars(draw, big, rng, 26, 1.0)
    x, y, r = rng.choice((0.14, 0.86)) * big, rng.choice((0.14, 0.86)) * big, 0.09 * big
    draw.ellipse([x - r, y - r, x + r, y + r], fill=(226, 150, 100))
    draw.line([x - 1.8 * r, y + 0.5 * r, x + 1.8 * r, y - 0.5 * r], fill=(246, 214, 170), width=round(big / 48))
    return canvas


def _under_water(big: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(big, (70, 190, 220), (18, 80, 140))
    draw = ImageDraw.Draw(canvas)
    for _ in range(9):
        x, y = (rng.randrange(16) + 0.5) / 16 * big, (rng.randrange(11) + 0.5) / 16 * big
        r = rng.choice((1.5, 2.2)) * big / 128
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(190, 235, 245))
    _hills(draw, big, 0.88, 0.015, 1, rng.choice((0.0, 0.5)), (226, 206, 150))
    for x in rng.choice(((0.06, 0.92), (0.1, 0.94), (0.05, 0.88))):
        points = [(x * big + 0.018 * big * math.sin(k * 0.9), (0.94 - 0.028 * k) * big) for k in range(11)]
        draw.line(points, fill=(40, 150, 95), width=round(big / 32), joint="curve")
    return canvas


GROUNDS = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "desert": _desert,
    "sea": _sea,
    "forest": _forest,
    "city": _city,
    "mountains": _mountains,
}
