"""The world of the embedded checkpoint: captions such as "a fox in the snow at night", and the pictures that they
describe. Objects (``artwork.py``) stand in places (``places.py``), at a few sizes, on the grid of the latents."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from training.artwork import HUES, ICONS, OWN_HUES, sprite, template
from training.places import VARIANTS, draw_place, is_plain, place_names

SIDE = 128  # in pixels, of the pictures to which the measures below refer
SIZES = {"small": 48, "": 80, "large": 112, "pair": 48}  # side of an object, in pixels
# Possible left edges of an object; the middle one is the example's. Small objects are a step of the U-Net's third level
# apart (32 pixels), those of a pair two such steps, those of the usual size a step of its second level. Down to that
# level an object looks the same at all its positions, so that it is learned once.
LEFTS = {"small": (8, 40, 72), "": (8, 24, 40), "large": (8,), "pair": (8,)}
APART = 64  # distance between the left edges of a pair
TOP = {"small": (64, 32), "": (32, 16), "large": (8, 8), "pair": (64, 32)}  # top edges of standing and flying objects
SHARES = {"": 36, "large": 18, "small": 12, "pair": 34}  # percentages of scenes to train on
FLYING = {"butterfly", "bee", "rocket", "airplane", "balloon", "ufo", "sun", "moon", "rainbow", "star"}
PLURAL = {"cherries"}
PLACES = tuple(place_names())


@dataclass(frozen=True)
class Object:
    """One object of a scene: what it is, and the square that it fills, in pixels of a picture with side SIDE."""

    name: str
    color: str | None
    left: int
    top: int
    side: int

    @property
    def words(self) -> str:
        return f"{self.color} {self.name}" if self.color else self.name


@dataclass(frozen=True)
class Scene:
    """A picture's content. ``size`` is a key of SIZES."""

    objects: tuple[Object, ...]
    place: str
    size: str
    variant: int

    @property
    def caption(self) -> str:
        return f"{described(self)} {self.place}"


def with_article(words: str) -> str:
    """The words with "a" or "an" in front, or with nothing for a plural."""
    if words.split()[-1] in PLURAL:
        return words
    return f"{'an' if words[0] in 'aeio' or words == 'umbrella' else 'a'} {words}"


def described(scene: Scene) -> str:
    """The objects of a scene in words, without its place."""
    if scene.size in ("small", "large"):
        return with_article(f"{scene.size} {scene.objects[0].words}")
    return " and ".join(with_article(item.words) for item in scene.objects)


def is_held_out(name: str, place: str) -> bool:
    """Whether an object never appears in a place in training, alone or in pairs; such scenes are for the evaluation."""
    return zlib.crc32(f"{name} {place}".encode()) % 5 == 0


def middle_left(size: str) -> int:
    """The left edge of an object in the middle, or of the first one of a pair."""
    return LEFTS[size][len(LEFTS[size]) // 2]


def make_scene(names: tuple[str, ...], place: str, size: str, rng: random.Random, colors: bool = True) -> Scene:
    """A scene with one object of a size, or two objects, in a place; ``rng`` decides the rest."""
    size = "pair" if len(names) == 2 else size
    side = SIZES[size]
    left = rng.choice(LEFTS[size])
    objects = []
    for name in names:
        color = rng.choice(list(HUES)) if colors and name in OWN_HUES and rng.random() < 0.5 else None
        objects.append(Object(name, color, left, TOP[size][name in FLYING], side))
        left += APART
    return Scene(tuple(objects), place, size, rng.randrange(VARIANTS))


def random_scene(rng: random.Random) -> Scene:
    """A scene to train on: mostly one object, never a held-out combination."""
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    while True:
        place = rng.choice(PLACES)
        names = tuple(rng.sample(list(ICONS), 2 if kind == "pair" else 1))
        if not any(is_held_out(name, place) for name in names):
            return make_scene(names, place, kind, rng)


def draw_scene(scene: Scene, side: int = SIDE, objects: Callable[..., Image.Image] = sprite) -> Image.Image:
    """Draw a scene as an RGB picture of side x side pixels.

    Args:
        scene: the scene.
        side: side of the picture in pixels.
        objects: draws one object: ``artwork.sprite``, or ``artwork.template``, which needs no network.
    """
    scale = side / SIDE
    picture = draw_place(scene.place, scene.variant, side).copy()
    for item in scene.objects:
        width = round(item.side * scale)
        drawn = objects(item.name, width, item.color)
        where = round(item.left * scale), round(item.top * scale)
        if (
            not (is_plain(scene.place) or scene.place in ("in space", "under water", "on the sea"))
            and item.name not in FLYING
        ):
            picture = _with_shadow(picture, where, width)
        picture.paste(drawn, where, drawn)
    return picture


def example_picture(name: str, place: str, size: str = "", side: int = SIDE) -> Image.Image:
    """A drawn picture of one object in its own colours, in the middle; always the same, and needs no network."""
    scene = make_scene((name,), place, size, random.Random(0), colors=False)
    return draw_scene(replace(scene, objects=(replace(scene.objects[0], left=middle_left(size)),)), side, template)


def draw_some(count: int, seed: str) -> tuple[list[Scene], list[str], np.ndarray]:
    """Scenes to train on, a caption for each as somebody would write it, and pictures, uint8 [count, SIDE, SIDE, 3]."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    captions = [reword(scene, rng) for scene in scenes]
    return scenes, captions, np.stack([np.asarray(draw_scene(scene, SIDE)) for scene in scenes])


def _with_shadow(picture: Image.Image, where: tuple[int, int], width: int) -> Image.Image:
    shadow = Image.new("L", picture.size, 0)
    x, y, feet = where[0] + width / 2, where[1] + width * 0.95, width * 0.34
    ImageDraw.Draw(shadow).ellipse([x - feet, y - width * 0.05, x + feet, y + width * 0.05], fill=70)
    shadow = shadow.filter(ImageFilter.GaussianBlur(width / 60))
    dark = Image.fromarray((np.asarray(picture, np.float32) * 0.45).astype(np.uint8))
    return Image.composite(dark, picture, shadow)


def reword(scene: Scene, rng: random.Random) -> str:
    """A caption as different people would write it; mostly the plain one.

    Captions with only a part of the scene make negative prompts work, which name just what to avoid.
    """
    chance = rng.random()
    if chance < 0.84:
        return scene.caption
    if chance < 0.88:
        return rng.choice(("a picture of ", "an image of ", "a drawing of ")) + scene.caption
    if chance < 0.92:
        return described(scene)
    if chance < 0.95:
        return scene.objects[0].name
    return rng.choice((scene.place, scene.place.split(" ", 1)[-1]))
