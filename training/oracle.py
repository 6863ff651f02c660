"""The oracle: it reads a drawn scene without any neural network, and says which objects, of which size, are where.

The place is the one whose drawn rim is nearest to the picture's rim. On that place, every object is tried at every size
and position; the one that leaves the smallest difference is what the picture shows. The margin is how much more the
runner-up leaves. Pairs are read as two objects, each at its own position.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from training.artwork import HUES, ICONS, OWN_HUES, template
from training.places import VARIANTS, draw_place, is_plain, place_names
from training.scenes import APART, FLYING, LEFTS, SIDE, SIZES, TOP

SCALE = 2  # pictures are read at half their size, at which objects can still be told apart
RIM = 6  # width in pixels of the picture's rim, which no object reaches
MIN_MARGIN = 0.1  # about half of what the hardest of 200 true scenes had through an autoencoder of 31 dB (0.19)


@dataclass(frozen=True)
class Reading:
    """What the oracle sees.

    Attributes:
        place: a name of ``place_names()``.
        objects: the names of one object or of two, from left to right.
        colors: the colour of each object, or None for its own.
        size: a key of SIZES.
        margin: by how much the runner-up is worse, as a share of the difference between the picture and its empty place
            in the object's square; of two objects the smaller margin.
    """

    place: str
    objects: tuple[str, ...]
    colors: tuple[str | None, ...]
    size: str
    margin: float

    @property
    def clear(self) -> bool:
        """Whether the picture shows the object clearly better than any other."""
        return self.margin >= MIN_MARGIN


def _small(picture: Image.Image) -> np.ndarray:
    """A picture at half its size, float32 [64, 64, 3]."""
    side = SIDE // SCALE
    return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BOX), np.float32)


@cache
def _places() -> tuple[list[tuple[str, int]], np.ndarray]:
    """(name, variant) of every drawn place, and their pictures [places, 64, 64, 3]."""
    keys = [(name, variant) for name in place_names() for variant in range(1 if is_plain(name) else VARIANTS)]
    return keys, np.stack([_small(draw_place(name, variant, SIDE)) for name, variant in keys])


@cache
def _rim() -> np.ndarray:
    mask = np.zeros((SIDE // SCALE,) * 2, bool)
    mask[: RIM // SCALE] = mask[-RIM // SCALE :] = mask[:, : RIM // SCALE] = mask[:, -RIM // SCALE :] = True
    return mask


@dataclass(frozen=True)
class _Templates:
    """All objects that stand, or all that fly, at one size: what they add to a ground, and how much of it they cover.

    On a ground g, an object of colours c (premultiplied by its cover) and cover a gives c + (1 - a) g. If a picture
    differs from the ground by d, the object leaves (d - c + a g)². ``left_over`` computes the sum of these squares
    multiplied out, so that each term is the product of a matrix over all objects with a vector of the picture.
    """

    keys: list[tuple[str, str | None]]
    colors: np.ndarray  # c, float32 [objects, s * s * 3]
    cover: np.ndarray  # a, [objects, s * s]
    colors_cover: np.ndarray  # c a, [objects, s * s * 3]
    cover_squared: np.ndarray  # [objects, s * s]
    colors_squared: np.ndarray  # the sum of c², [objects]

    def left_over(self, picture: np.ndarray, ground: np.ndarray) -> np.ndarray:
        """How much more each object leaves than the bare ground does, [objects]; negative if it explains the picture.

        Args:
            picture, ground: squares [s, s, 3].
        """
        difference, ground_squared = picture - ground, np.square(ground).sum(axis=2).ravel()
        along = self.colors @ difference.ravel() - self.cover @ (difference * ground).sum(axis=2).ravel()
        own = self.colors_squared - 2 * self.colors_cover @ ground.ravel() + self.cover_squared @ ground_squared
        return own - 2 * along


@cache
def _templates(size: str, flying: bool) -> _Templates:
    """The templates of objects that fly, or of the others, in every colour that they come in."""
    keys = [(name, None) for name in ICONS] + [(name, color) for name in OWN_HUES for color in HUES]
    keys = [(name, color) for name, color in keys if (name in FLYING) == flying]
    side = SIZES[size] // SCALE
    drawn = [template(name, SIZES[size], color).convert("RGBa") for name, color in keys]
    pixels = np.stack([np.asarray(one.resize((side, side), Image.Resampling.BOX), np.float32) for one in drawn])
    colors, cover = pixels[..., :3].reshape(len(keys), -1), pixels[..., 3].reshape(len(keys), -1) / 255
    colors_cover = colors * np.repeat(cover, 3, axis=1)
    return _Templates(keys, colors, cover, colors_cover, np.square(cover), np.square(colors).sum(axis=1))


def _laid(
    picture: np.ndarray, ground: np.ndarray, size: str, left: int
) -> tuple[list[tuple[str, str | None]], np.ndarray, np.ndarray]:
    """Try every object at a distance from the left, at the height where it would stand or fly.

    Args:
        picture, ground: [64, 64, 3].
        size: a key of SIZES.
        left: the left edge, in pixels of the full picture.

    Returns:
        every object's name and colour; how much more it leaves than the bare ground, [objects]; and what the bare
        ground leaves in the object's square, [objects].
    """
    side, left = SIZES[size] // SCALE, left // SCALE
    keys, left_over, there = [], [], []
    for flying, top in enumerate(TOP[size]):
        box = (slice(top // SCALE, top // SCALE + side), slice(left, left + side))
        known = _templates(size, bool(flying))
        keys += known.keys
        left_over.append(known.left_over(picture[box], ground[box]))
        there.append(np.full(len(known.keys), np.square(picture[box] - ground[box]).sum()))
    return keys, np.concatenate(left_over), np.concatenate(there)


def read_place(picture: Image.Image) -> tuple[str, int]:
    """The place whose drawn rim is nearest to the picture's, and its variant."""
    keys, grounds = _places()
    rim = _rim()
    distances = np.abs(grounds[:, rim] - _small(picture)[rim]).mean(axis=(1, 2))
    return keys[int(distances.argmin())]


def read_picture(picture: Image.Image) -> Reading:
    """Read a picture of one object or of two."""
    place, variant = read_place(picture)
    keys, grounds = _places()
    pixels, ground = _small(picture), grounds[keys.index((place, variant))]
    found = [_read_at(pixels, ground, place, size, left) for size in SIZES for left in LEFTS[size]]
    return min(found, key=lambda one: one[0])[1]


def _read_at(pixels: np.ndarray, ground: np.ndarray, place: str, size: str, left: int) -> tuple[float, Reading]:
    """What the best objects of a size, at a distance from the left, leave of the difference; and their reading."""
    lefts = (left, left + APART) if size == "pair" else (left,)
    found = [_best_at(pixels, ground, size, left) for left in lefts]
    (names, colors), margins = zip(*(one[0] for one in found), strict=True), [one[1] for one in found]
    whole = float(np.square(pixels - ground).sum())
    return whole + sum(one[2] for one in found), Reading(place, names, colors, size, min(margins))


def _best_at(
    pixels: np.ndarray, ground: np.ndarray, size: str, left: int
) -> tuple[tuple[str, str | None], float, float]:
    """The object that leaves least, at a distance from the left; its margin to the best object of another name, as a
    share of what the bare ground leaves in the square; and how much more than the bare ground it leaves."""
    keys, left_over, there = _laid(pixels, ground, size, left)
    best = int(left_over.argmin())
    others = np.array([name != keys[best][0] for name, _ in keys])
    least = float(left_over[best])
    margin = (float(left_over[others].min()) - least) / max(float(there[best]), 1e-6)
    return keys[best], margin if least < 0 else 0.0, least  # an object no better than the bare ground is not clear
