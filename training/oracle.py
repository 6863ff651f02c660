"""Reads a little scene back without any network: which objects, at which size, in which place.

The place is the drawn one whose rim is nearest to the picture's. On that place, every object at every size and spot
of the grid is laid in turn, and the one that leaves the smallest difference is what the picture shows; how much more
the runner-up leaves is the margin. Pairs are read as two objects, each at its own spot.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from training.artwork import HUES, ICONS, OWN_HUES, template
from training.places import VARIANTS, draw_place, is_plain, place_names
from training.scenes import FEET, FLYING, GRID, LEFT, SIDE, SIZES

SCALE = 2  # pictures are read at half their size: what an object is shows there
RIM = 6  # pixels of the picture, around it, that no object reaches
MIN_MARGIN = 0.08  # of the difference: below it, the runner-up is as likely


@dataclass(frozen=True)
class Reading:
    """What the oracle sees.

    Attributes:
        place: a name of ``place_names()``.
        objects: the names of one object or of two, from left to right.
        colors: of each, or None for its own.
        size: a key of SIZES.
        margin: share of the difference by which the runner-up is worse; of two objects the smaller one.
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


def _spots(place: str, size: str, flying: bool) -> list[tuple[int, int]]:
    """(left, top) at half size of the spots where an object of a size may be."""
    side = SIZES[size]
    if is_plain(place) or place == "in space":
        top = (SIDE - side) // 2 // GRID * GRID
    elif flying and size != "large":
        top = FEET[size] - side - (24 if size else 16)
    else:
        top = FEET[size] - side
    lefts = LEFT[size] if size != "pair" else (LEFT["pair"][0], LEFT["pair"][0] + side)
    return [(left // SCALE, top // SCALE) for left in lefts]


def _differences(picture: np.ndarray, ground: np.ndarray, place: str, size: str) -> dict[tuple[int, int], np.ndarray]:
    """For every spot, what each object laid there leaves of the picture's difference to the ground: [objects]."""
    keys, colors, cover = _objects(size)
    side = SIZES[size] // SCALE
    flying = np.array([name in FLYING for name, _ in keys])
    before = np.square(picture - ground)
    found = {}
    for kind in (False, True):
        for left, top in _spots(place, size, kind):
            box = (slice(top, top + side), slice(left, left + side))
            laid = colors + (1 - cover) * ground[box]
            left_over = np.square(picture[box] - laid).sum(axis=(1, 2, 3)) - before[box].sum()
            left_over[flying != kind] = np.inf
            found[left, top] = np.minimum(found.get((left, top), np.inf), left_over)
    return found


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
    whole = float(np.square(pixels - ground).sum())
    differences = _differences(pixels, ground, place, size)
    if size == "pair":
        lefts = sorted({left for left, _ in differences})
        each = [np.min([one for (at, _), one in differences.items() if at == left], axis=0) for left in lefts]
    else:
        each = [np.min(list(differences.values()), axis=0)]
    chosen, margins = zip(*(_best_and_margin(one, size, whole) for one in each), strict=True)
    names, colors = zip(*chosen, strict=True)
    return whole + sum(float(one.min()) for one in each), Reading(place, names, colors, size, min(margins))


def _best_and_margin(scores: np.ndarray, size: str, whole: float) -> tuple[tuple[str, str | None], float]:
    """The object that leaves least, and how much more the best one of another name leaves."""
    keys = _objects(size)[0]
    best = int(scores.argmin())
    others = np.array([name != keys[best][0] for name, _ in keys])
    return keys[best], (float(scores[others].min()) - float(scores[best])) / max(whole, 1e-6)
