"""How well pictures match their captions: ``python -m training.evaluate``.

First the oracle is tested: on true scenes, on the same scenes after the autoencoder, on noise, and on pictures of other
captions. Then 480 pictures are made with the OpenVINO pipeline at the checkpoint's defaults, and the oracle reads them.
Half of them are combinations that training never saw; the seeds are the first ones, and none is left out. Another 48
pictures show things in another colour than their own ("a blue car"), in places where training never saw them. A contact
sheet of all pictures is written.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ov_decidiffusion import OVStableDiffusionPipeline
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from training.artwork import HUES, ICONS, OWN_HUES, shade, template
from training.oracle import Reading, read_picture
from training.scenes import PLACES, SIDE, Scene, draw_scene, is_held_out, make_scene

BATCH = 8
KINDS = {"": 0.4, "large": 0.3, "small": 0.1, "pair": 0.2}  # kinds of scenes, and their shares
SINGLE = ("", "large")  # the kinds that count for the main score


@dataclass(frozen=True)
class Case:
    """One picture to make: what it must show, and the seed of its noise."""

    scene: Scene
    seed: int

    @property
    def caption(self) -> str:
        return self.scene.caption

    def rights(self, reading: Reading) -> dict[str, bool]:
        """Whether the objects, in the caption's colours, and the place are right; unclear objects count as wrong."""
        wanted = [(item.name, item.color) for item in self.scene.objects]
        seen = list(zip(reading.objects, reading.colors, strict=True))
        asked = any(color for _, color in wanted)  # whether the caption names a colour
        wanted, seen = (sorted((n, shade(n, color) if asked else "") for n, color in one) for one in (wanted, seen))
        found = reading.clear and seen == wanted
        place = reading.place == self.scene.place
        return {"object": found, "place": place, "both": found and place}


def choose_cases(per_half: int, seed: int = 0) -> dict[str, list[Case]]:
    """Scenes of every kind, in the objects' own colours; half are combinations that training never saw."""
    rng = random.Random(seed)
    halves = {}
    for half, held_out in (("never trained on", True), ("trained on", False)):
        halves[half] = []
        for kind, share in KINDS.items():
            for _ in range(round(share * per_half)):
                halves[half].append(Case(_draw(kind, held_out, rng), rng.randrange(2**31)))
    return halves


def choose_coloured(count: int, seed: int = 0) -> list[Case]:
    """Single objects in another colour than their own, in places where training never saw them."""
    rng, cases = random.Random(seed), []
    while len(cases) < count:
        name, color, place = rng.choice(list(OWN_HUES)), rng.choice(list(HUES)), rng.choice(PLACES)
        if is_held_out(name, place) and shade(name, color) != "own":
            scene = make_scene((name,), place, "", rng, colors=False)
            scene = replace(scene, objects=(replace(scene.objects[0], color=color),))
            cases.append(Case(scene, rng.randrange(2**31)))
    return cases


def _draw(kind: str, held_out: bool, rng: random.Random) -> Scene:
    while True:
        names, place = tuple(rng.sample(list(ICONS), 2 if kind == "pair" else 1)), rng.choice(PLACES)
        if all(is_held_out(name, place) == held_out for name in names):
            return make_scene(names, place, kind, rng, colors=False)


def generate(pipe: OVStableDiffusionPipeline, cases: Sequence[Case], **arguments) -> list[Image.Image]:
    """One picture per case, made in batches; each has its own seed, so the batches do not matter."""
    pictures = []
    for start in tqdm(range(0, len(cases), BATCH), desc="generating", unit=f"{BATCH} pictures"):
        some = cases[start : start + BATCH]
        pictures += pipe([case.caption for case in some], seed=[case.seed for case in some], **arguments).images
    return pictures


def shares(cases: Sequence[Case], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Percentages of pictures with the objects, the place, and both right."""
    rights = [case.rights(read_picture(picture)) for case, picture in zip(cases, pictures, strict=True)]
    names = ("object", "place", "both")
    return {name: 100 * sum(right[name] for right in rights) / max(1, len(rights)) for name in names}


def through_autoencoder(pipe: OVStableDiffusionPipeline, picture: Image.Image) -> Image.Image:
    """Encode a picture and decode it again."""
    pixels = pipe.image_processor.preprocess([picture])
    return pipe.decode_latents(pipe.encode_image(pixels, torch.Generator().manual_seed(0)))[0]


def prove_oracle(pipe: OVStableDiffusionPipeline, count: int) -> None:
    """Print how often the oracle is right, for true scenes and for pictures that it should not recognise."""
    cases = [case for half in choose_cases(count // 2, seed=1).values() for case in half]
    true = [draw_scene(case.scene, SIDE, template) for case in tqdm(cases, desc="drawing", unit="scene")]
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in cases[: count // 5]]
    smooth = [one.resize((8, 8), Image.Resampling.BOX).resize((SIDE, SIDE)) for one in noise]
    some = cases[: count // 5]
    rows = {
        "true scenes": (cases, true),
        "through the autoencoder": (some, [through_autoencoder(pipe, one) for one in true[: len(some)]]),
        "noise": (some, noise),
        "smooth noise": (some, smooth),
        "other captions' pictures": (some, true[1 : len(some) + 1]),
    }
    print("| the oracle on | pictures | object | place | both |\n| --- | --- | --- | --- | --- |")
    for name, (asked, pictures) in rows.items():
        found = shares(asked, pictures)
        print(f"| {name} | {len(pictures)} | " + " | ".join(f"{share:.1f} %" for share in found.values()) + " |")


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 20) -> Image.Image:
    """All pictures side by side."""
    side = pictures[0].width
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * side, i // columns * side))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(EMBEDDED_CHECKPOINT), help="a checkpoint or a model folder")
    parser.add_argument("--pictures", type=int, default=480)
    parser.add_argument("--oracle", type=int, default=1000, help="number of true scenes to test the oracle on")
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--guidance-rescale", type=float)
    parser.add_argument("--sheet", type=Path, default=Path("outputs/evaluation.png"))
    options = parser.parse_args()
    pipe = OVStableDiffusionPipeline.from_pretrained(options.checkpoint, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    if options.oracle:
        prove_oracle(pipe, options.oracle)
    arguments = {name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale", "guidance_rescale")}
    halves, start = choose_cases(options.pictures // 2), time.perf_counter()
    pictures = {name: generate(pipe, cases, **arguments) for name, cases in halves.items()}
    settings = ", ".join(f"{k} {pipe.defaults[k] if v is None else v}" for k, v in arguments.items())
    print(f"\n{options.pictures} pictures, {settings}, {time.perf_counter() - start:.0f} s\n")
    print("| captions | pictures | object | place | both |\n| --- | --- | --- | --- | --- |")
    everything = [(case, one) for half in halves for case, one in zip(halves[half], pictures[half], strict=True)]
    single = [pair for pair in everything if pair[0].scene.size in SINGLE]
    groups = {f"one object, {half}": [pair for pair in single if pair[0] in cases] for half, cases in halves.items()}
    groups["one object, all"] = single
    groups["one small object"] = [pair for pair in everything if pair[0].scene.size == "small"]
    groups["two objects"] = [pair for pair in everything if pair[0].scene.size == "pair"]
    coloured = choose_coloured(options.pictures // 10)
    groups["one coloured object"] = list(zip(coloured, generate(pipe, coloured, **arguments), strict=True))
    for name, pairs in groups.items():
        found = shares([case for case, _ in pairs], [picture for _, picture in pairs])
        print(f"| {name} | {len(pairs)} | " + " | ".join(f"{share:.1f} %" for share in found.values()) + " |")
    options.sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet([picture for _, picture in everything]).save(options.sheet)
    print(f"\ncontact sheet: {options.sheet}")


if __name__ == "__main__":
    main()
