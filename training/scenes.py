"""The world of the embedded checkpoint: captions of simple scenes, and the pictures that they describe.

``a {size} {color} {shape} on a {background} background`` is the grammar that is evaluated. Scenes go beyond it
with a place for the object, a second object, and stripes.
"""

import random
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

SIZES = {"small": (0.22, 0.32), "large": (0.50, 0.64)}  # radius, as a share of half the picture's side
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (245, 215, 60),
    "purple": (150, 60, 190),
    "orange": (245, 140, 40),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
PLACES = {  # centre of the object, as a share of half the picture's side, from the middle
    "on the left": (-0.55, 0.0),
    "on the right": (0.55, 0.0),
    "at the top": (0.0, -0.55),
    "at the bottom": (0.0, 0.55),
    "in the top left corner": (-0.55, -0.55),
    "in the top right corner": (0.55, -0.55),
    "in the bottom left corner": (-0.55, 0.55),
    "in the bottom right corner": (0.55, 0.55),
}
MAX_ROTATION = 9.0  # degrees
SUPERSAMPLING = 4
STRIPES = 4  # pairs of stripes across a picture


@dataclass(frozen=True)
class Object:
    """One drawn shape: what it is, and where exactly it landed."""

    size: str
    color: str
    shape: str
    radius: float
    center: tuple[float, float]
    rotation: float


@dataclass(frozen=True)
class Scene:
    """A picture's content and its caption."""

    caption: str
    background: str
    objects: tuple[Object, ...]
    stripes: str | None = None
    grammar_captions: tuple[str, ...] = field(default=())


def grammar_caption(size: str, color: str, shape: str, background: str) -> str:
    """The sentence of the evaluated grammar for one object."""
    return f"a {size} {color} {shape} on a {background} background"


def all_grammar_captions() -> list[tuple[str, str, str, str]]:
    """Every (size, color, shape, background) of the grammar; color and background differ."""
    return [
        (size, color, shape, background)
        for size in SIZES
        for color in PALETTE
        for shape in SHAPES
        for background in PALETTE
        if color != background
    ]


def is_held_out(caption: str) -> bool:
    """Whether a caption of the grammar is kept from training, to evaluate on."""
    return zlib.crc32(caption.encode()) % 5 == 0


def shape_mask(shape: str, side: int, radius: float, center: tuple[float, float], rotation: float) -> np.ndarray:
    """Coverage of a shape, antialiased.

    Args:
        side: of the square picture, in pixels.
        radius, center: as shares of half the side; center (0, 0) is the middle of the picture.
        rotation: degrees.

    Returns:
        float32 [side, side] in 0…1.
    """
    big = side * SUPERSAMPLING
    canvas = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(canvas)
    half = big / 2
    middle = np.array([half + center[0] * half, half + center[1] * half])
    r = radius * half
    if shape in ("circle", "ring"):
        draw.ellipse([*(middle - r), *(middle + r)], fill=255)
        if shape == "ring":
            draw.ellipse([*(middle - 0.55 * r), *(middle + 0.55 * r)], fill=0)
    else:
        angle = np.deg2rad(rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = (_outline(shape) * r) @ turn.T + middle
        draw.polygon([tuple(point) for point in points], fill=255)
    coverage = np.asarray(canvas, np.float32).reshape(side, SUPERSAMPLING, side, SUPERSAMPLING)
    return coverage.mean(axis=(1, 3)) / 255


def _outline(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1 around the origin, y downwards."""
    if shape == "square":
        c = np.sqrt(0.5)
        return np.array([(-c, -c), (c, -c), (c, c), (-c, c)])
    if shape == "triangle":
        angles = np.deg2rad([-90, 30, 150])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "star":
        angles = np.deg2rad(-90 + 36 * np.arange(10))
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)
    if shape == "cross":
        a, b = 0.32, np.sqrt(1 - 0.32**2)
        quarter = np.array([(a, -b), (a, -a), (b, -a)])
        turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.concatenate([quarter @ turn.T for turn in turns])
    raise ValueError(f"`shape` must be one of {', '.join(SHAPES)}, got {shape!r}.")


def draw_scene(scene: Scene, side: int) -> Image.Image:
    """Paint a scene as an RGB picture of side x side pixels."""
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = PALETTE[scene.background]
    if scene.stripes is not None:
        band = (np.arange(side) * 2 * STRIPES // side) % 2 == 1
        picture[:, band] = PALETTE[scene.stripes]
    for item in scene.objects:
        mask = shape_mask(item.shape, side, item.radius, item.center, item.rotation)[..., None]
        picture += (np.array(PALETTE[item.color], np.float32) - picture) * mask
    return Image.fromarray(picture.round().astype(np.uint8))


def _place(rng: random.Random, size: str, color: str, shape: str, center: tuple[float, float], spread: float) -> Object:
    radius = rng.uniform(*SIZES[size])
    room = 0.97 - radius
    x, y = (max(-room, min(room, c + rng.uniform(-spread, spread))) for c in center)
    return Object(size, color, shape, radius, (x, y), rng.uniform(-MAX_ROTATION, MAX_ROTATION))


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene to train on: never one whose objects spell a held-out caption."""
    while True:
        scene = _random_scene(rng)
        if not any(is_held_out(caption) for caption in scene.grammar_captions):
            return scene


def _random_scene(rng: random.Random) -> Scene:
    kind = rng.choices(("plain", "placed", "pair", "striped"), weights=(60, 16, 14, 10))[0]
    first, second, background = rng.sample(list(PALETTE), 3)
    shape, other_shape = rng.choice(SHAPES), rng.choice(SHAPES)
    # Small shapes are learnt last: they are two latent positions in radius.
    size = rng.choices(list(SIZES), weights=(2, 1))[0] if kind in ("plain", "striped") else "small"
    spelled = (grammar_caption(size, first, shape, background),)
    if kind == "placed":
        place = rng.choice(list(PLACES))
        item = _place(rng, size, first, shape, PLACES[place], 0.05)
        return Scene(f"{spelled[0]}, {place}", background, (item,), None, spelled)
    if kind == "pair":
        items = (
            _place(rng, "small", first, shape, (-0.48, 0.0), 0.06),
            _place(rng, "small", second, other_shape, (0.48, 0.0), 0.06),
        )
        spelled += (grammar_caption("small", second, other_shape, background),)
        caption = f"a small {first} {shape} and a small {second} {other_shape} on a {background} background"
        return Scene(caption, background, items, None, spelled)
    item = _place(rng, size, first, shape, (0.0, 0.0), 0.05)
    if kind == "striped":
        caption = f"a {size} {first} {shape} on a {background} and {second} striped background"
        return Scene(caption, background, (item,), second, spelled)
    return Scene(spelled[0], background, (item,), None, spelled)


def scene_from_caption(size: str, color: str, shape: str, background: str, rng: random.Random) -> Scene:
    """A scene of the grammar, drawn as training draws it."""
    item = _place(rng, size, color, shape, (0.0, 0.0), 0.05)
    caption = grammar_caption(size, color, shape, background)
    return Scene(caption, background, (item,), None, (caption,))


def reword(scene: Scene, rng: random.Random) -> str:
    """The caption as one of many people would write it; mostly the plain one.

    Short captions make negative prompts work: they are the parts that somebody wants to push away.
    """
    item, draw = scene.objects[0], rng.random()
    if draw < 0.80 or len(scene.objects) > 1:
        caption = scene.caption
    elif draw < 0.85:
        caption = rng.choice(("a picture of ", "draw ", "please draw ", "an image of ")) + scene.caption
    elif draw < 0.87:
        caption = f"a {item.size} {item.color} {item.shape}"
    elif draw < 0.89:
        caption = f"a {item.color} {item.shape}"
    elif draw < 0.92:
        caption = rng.choice((f"a {item.size} {item.shape}", item.shape, f"a {item.shape}", item.size))
    elif scene.stripes is not None:
        caption = rng.choice(("stripes", "a striped background"))
    else:
        color = scene.background
        caption = rng.choice((f"a {color} background", f"{color} background", f"{color}"))
    if rng.random() < 0.25:
        caption = caption.replace(" a orange", " an orange")
    return caption
