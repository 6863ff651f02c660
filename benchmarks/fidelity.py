"""Do the tools make the same picture? Against diffusers in PyTorch at float32: same seed, steps and weights."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.runs import RIVALS, Bench, pictures_run


def psnr_of_pictures(picture: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of arrays of 0…255, peak 255; infinite where both are equal."""
    mean = np.square(picture.astype(np.float64) - reference).mean()
    return 10 * math.log10(255**2 / mean) if mean else math.inf


def difference(picture: Path, reference: Path) -> tuple[float, int]:
    """PSNR in dB (peak 255) and the largest difference of any pixel, of two pictures of one size."""
    a, b = (np.asarray(Image.open(file).convert("RGB"), np.int64) for file in (picture, reference))
    return psnr_of_pictures(a, b), int(np.abs(a - b).max())


def compare_pictures(bench: Bench) -> dict[tuple[str, str], tuple[float, int]]:
    """Every rival's picture of the comparison runs against that of diffusers."""
    reference = bench.picture(pictures_run("diffusers", "f32"))
    found = {}
    for tool, precision in RIVALS:
        picture = bench.picture(pictures_run(tool, precision))
        if tool != "diffusers" and picture.exists() and reference.exists():
            found[tool, precision] = difference(picture, reference)
    return found
