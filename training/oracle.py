"""Reads a little scene back without any network: which objects, at which size, in which place.

The place is the drawn one whose rim is nearest to the picture's. On that place, every object at every size
is laid in turn, and the one that leaves the smallest difference is what the picture shows; how much more
the runner-up leaves is the margin. Pairs are read as two objects, each at its own spot.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from training.artwork import HUES, ICONS, OWN_HUES, template
from training.places import VARIANTS, draw_place, is_plain, place_names
from training.scenes import APART, FLYING, LEFT, SIDE, SIZES, TOP

SCALE = 2  # pictures are read at half their size: what an object is shows there
RIM = 6  # pixels of the picture, around it, that no object reaches
MIN_MARGIN = 0.1  # about half of what the hardest of 200 true scenes has, seen through the autoencoder (0.19)


@dataclass(frozen=True)
class Reading:
    """What the oracle sees.

    Attributes:
        place: a name of ``place_names()``.
        objects: the names of one object or of two, from left to right.
        colors: of each, or None for its own.
        size: a key of SIZES.
        margin: by how much the runner-up is worse, as a share of what the picture differs from its place in the
            object's square; of two objects the smaller one.
    """

    place: str
    objects: tuple[str, ...]
    colors: tuple[str | None, ...]
    size: str
    margin: float

    @property
    def clear(self) -> bool:
        """Whether the picture shows one thing more than any other."""
        return self.margin >= MIN_MARGIN


def _small(picture: Image.Image) -> np.ndarray:
    """float32 [64, 64, 3]."""
    side = SIDE // SCALE
    return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BOX), np.float32)


@cache
def _places() -> tuple[list[tuple[str, int]], np.ndarray]:
    """(name, variant) of every drawn place, and each as [64, 64, 3]."""
    keys = [(name, variant) for name in place_names() for variant in range(1 if is_plain(name) else VARIANTS)]
    return keys, np.stack([_small(draw_place(name, variant, SIDE)) for name, variant in keys])


@cache
def _rim() -> np.ndarray:
    mask = np.zeros((SIDE // SCALE,) * 2, bool)
    mask[: RIM // SCALE] = mask[-RIM // SCALE :] = mask[:, : RIM // SCALE] = mask[:, -RIM // SCALE :] = True
    return mask


@cache
def _objects(size: str) -> tuple[list[tuple[str, str | None]], np.ndarray, np.ndarray]:
    """(name, colour) of every object, its colours [n, s, s, 3] and its cover [n, s, s, 1] at half a size."""
    keys = [(name, None) for name in ICONS]
    keys += [(name, color) for name in OWN_HUES for color in HUES]
    drawn = [template(name, SIZES[size], color) for name, color in keys]
    side = SIZES[size] // SCALE
    pixels = np.stack(
        [np.asarray(one.convert("RGBa").resize((side, side), Image.Resampling.BOX), np.float32) for one in drawn]
    )
    cover = pixels[..., 3:] / 255
    return keys, pixels[..., :3], cover


def _laid(picture: np.ndarray, ground: np.ndarray, size: str, left: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each object, laid so far from the left where it would stand or fly: what it leaves of the picture's difference
    to the ground, beyond or below all of it; and what that difference is in its square. Both [objects]."""
    keys, colors, cover = _objects(size)
    side, left = SIZES[size] // SCALE, left // SCALE
    flying = np.array([name in FLYING for name, _ in keys])
    left_over, there = np.empty(len(keys)), np.empty(len(keys))
    for kind, top in enumerate(TOP[size]):
        box = (slice(top // SCALE, top // SCALE + side), slice(left, left + side))
        mine = flying == kind
        before = np.square(picture[box] - ground[box]).sum()
        laid = colors[mine] + (1 - cover[mine]) * ground[box]
        left_over[mine] = np.square(picture[box] - laid).sum(axis=(1, 2, 3)) - before
        there[mine] = before
    return left_over, there


def read_place(picture: Image.Image) -> tuple[str, int]:
    """The nearest drawn place, by its rim, and its variant."""
    keys, grounds = _places()
    rim = _rim()
    distances = np.abs(grounds[:, rim] - _small(picture)[rim]).mean(axis=(1, 2))
    return keys[int(distances.argmin())]


def read_picture(picture: Image.Image) -> Reading:
    """Read a picture of one object or of two."""
    place, variant = read_place(picture)
    keys, grounds = _places()
    pixels, ground = _small(picture), grounds[keys.index((place, variant))]
    found = [_read_at(pixels, ground, place, size) for size in SIZES]
    return min(found, key=lambda one: one[0])[1]


def _read_at(pixels: np.ndarray, ground: np.ndarray, place: str, size: str) -> tuple[float, Reading]:
    """What the best objects of a size leave of the difference to the ground, and the reading."""
    lefts = (LEFT[size], LEFT[size] + APART) if size == "pair" else (LEFT[size],)
    found = [_best_at(pixels, ground, size, left) for left in lefts]
    (names, colors), margins = zip(*(one[0] for one in found), strict=True), [one[1] for one in found]
    whole = float(np.square(pixels - ground).sum())
    return whole + sum(one[2] for one in found), Reading(place, names, colors, size, min(margins))


def _best_at(
    pixels: np.ndarray, ground: np.ndarray, size: str, left: int
) -> tuple[tuple[str, str | None], float, float]:
    """The object that leaves least so far from the left; how much more the best one of another name leaves, as a share
    of the difference in the square; and what it leaves."""
    keys = _objects(size)[0]
    left_over, there = _laid(pixels, ground, size, left)
    best = int(left_over.argmin())
    others = np.array([name != keys[best][0] for name, _ in keys])
    least = float(left_over[best])
    margin = (float(left_over[others].min()) - least) / max(float(there[best]), 1e-6)
    return keys[best], margin if least < 0 else 0.0, least  # an object that nothing speaks for is not clear
