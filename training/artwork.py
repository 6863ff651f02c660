"""The objects of the embedded checkpoint's world: Microsoft's Fluent Emoji, downloaded by version and hash.

The artwork is under the MIT licence, "Copyright (c) Microsoft Corporation.". It comes as the npm package
``@iconify-json/fluent-emoji-flat``, one JSON file with the drawing of every icon, and is downloaded for training only.
"""

import colorsys
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

RUNS = Path(__file__).parent / "runs"
PACKAGE = "@iconify-json/fluent-emoji-flat@1.2.6"
ARCHIVE = "iconify-json-fluent-emoji-flat-1.2.6.tgz"
SHA256 = "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
TEMPLATES = Path(__file__).parent / "templates" / "objects.png"  # made by ``make_templates.py``
TEMPLATE_SIDE, COLUMNS = 112, 10
# Words of captions -> names of icons.
ICONS = {
    "fox": "fox",
    "lion": "lion",
    "panda": "panda",
    "rabbit": "rabbit-face",
    "cat": "cat-face",
    "dog": "dog-face",
    "pig": "pig-face",
    "frog": "frog",
    "unicorn": "unicorn",
    "penguin": "penguin",
    "owl": "owl",
    "chick": "front-facing-baby-chick",
    "flamingo": "flamingo",
    "parrot": "parrot",
    "whale": "spouting-whale",
    "fish": "tropical-fish",
    "octopus": "octopus",
    "crab": "crab",
    "turtle": "turtle",
    "elephant": "elephant",
    "giraffe": "giraffe",
    "dinosaur": "sauropod",
    "apple": "red-apple",
    "banana": "banana",
    "strawberry": "strawberry",
    "cherries": "cherries",
    "watermelon": "watermelon",
    "pineapple": "pineapple",
    "avocado": "avocado",
    "mushroom": "mushroom",
    "pizza": "pizza",
    "hamburger": "hamburger",
    "donut": "doughnut",
    "cupcake": "cupcake",
    "tree": "deciduous-tree",
    "palm tree": "palm-tree",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "tulip": "tulip",
    "car": "automobile",
    "bus": "bus",
    "tractor": "tractor",
    "train": "locomotive",
    "sailboat": "sailboat",
    "house": "house",
    "castle": "castle",
    "tent": "tent",
    "snowman": "snowman-without-snow",
    "umbrella": "umbrella",
    "robot": "robot",
    "ghost": "ghost",
    "pumpkin": "jack-o-lantern",
    "gift": "wrapped-gift",
    "crown": "crown",
    "guitar": "guitar",
    "butterfly": "butterfly",
    "bee": "honeybee",
    "rocket": "rocket",
    "airplane": "airplane",
    "balloon": "balloon",
    "ufo": "flying-saucer",
    "sun": "sun",
    "moon": "crescent-moon",
    "rainbow": "rainbow",
    "star": "star",
}
# Objects that also come in other colours, each with the hue (in 0...1) that is replaced; and the hues of the colours.
OWN_HUES = {"car": 0.0, "balloon": 0.0, "tulip": 0.9, "umbrella": 0.73, "apple": 0.0, "gift": 0.97}
HUES = {"red": 0.0, "yellow": 0.14, "green": 0.36, "blue": 0.6, "purple": 0.77, "pink": 0.9}
HUE_REACH = 0.09  # pixels this close to the object's own hue get the new one


def shade(name: str, color: str | None) -> str:
    """The colour of an object, or "own" if it is None or the object's own: a red apple is an apple."""
    return "own" if color is None or abs((HUES[color] - OWN_HUES[name] + 0.5) % 1 - 0.5) < HUE_REACH else color


def fetch_artwork(folder: Path = RUNS / "artwork") -> Path:
    """The package's archive, downloaded by npm unless it exists already.

    Raises:
        FileNotFoundError: the archive is missing, and npm is not installed.
        ValueError: the archive is not the one that this world was made with.
    """
    archive = folder / ARCHIVE
    if not archive.exists():
        if shutil.which("npm") is None:
            raise FileNotFoundError(f"{archive} is missing, and so is npm, which downloads it (`npm pack {PACKAGE}`).")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=beside, check=True, stdout=subprocess.DEVNULL)
            (Path(beside) / ARCHIVE).replace(archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{archive} has sha256 {found}, expected {SHA256}; remove it to fetch it again.")
    return archive


@cache
def _icons() -> dict[str, dict]:
    with tarfile.open(fetch_artwork()) as archive:
        return json.load(archive.extractfile("package/icons.json"))["icons"]


@cache
def sprite(name: str, side: int, color: str | None = None) -> Image.Image:
    """One object as an RGBA picture of side x side pixels.

    Args:
        name: a key of ``ICONS``.
        side: side of the picture in pixels.
        color: a key of ``HUES``, for objects of ``OWN_HUES``; by default the object's own colour.
    """
    import resvg_py

    body = _icons()[ICONS[name]]["body"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
    picture = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))).convert("RGBA")
    return picture if color is None else _recolored(picture, OWN_HUES[name], HUES[color])


@cache
def template(name: str, side: int, color: str | None = None) -> Image.Image:
    """The same as ``sprite``, a little softer, from the small picture in this repository; needs no network."""
    i = list(ICONS).index(name)
    with Image.open(TEMPLATES) as sheet:
        left, top = i % COLUMNS * TEMPLATE_SIDE, i // COLUMNS * TEMPLATE_SIDE
        picture = sheet.convert("RGBA").crop((left, top, left + TEMPLATE_SIDE, top + TEMPLATE_SIDE))
    if side != TEMPLATE_SIDE:
        picture = picture.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    return picture if color is None else _recolored(picture, OWN_HUES[name], HUES[color])


def _recolored(picture: Image.Image, own: float, hue: float) -> Image.Image:
    """Change hues near ``own`` to ``hue``; yellow of equal lightness would look brown, so it is made lighter."""
    pixels = np.asarray(picture).astype(np.float32) / 255
    flat = pixels.reshape(-1, 4).copy()
    for i, (r, g, b, alpha) in enumerate(flat):
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        if alpha > 0 and s > 0.2 and abs((h - own + 0.5) % 1 - 0.5) < HUE_REACH:
            flat[i, :3] = colorsys.hsv_to_rgb(hue, s, min(1.0, v + 0.15 * (hue == HUES["yellow"])))
    return Image.fromarray((flat.reshape(pixels.shape) * 255).round().astype(np.uint8), "RGBA")
