"""How well pictures match their captions: ``python -m training.evaluate``.

Generates 240 pictures with the OpenVINO pipeline at the checkpoint's defaults, half of captions that training
never saw, and lets the oracle read them back. Writes a contact sheet to look at.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ov_decidiffusion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.convert import convert_checkpoint
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from training.oracle import Reading, read_picture
from training.scenes import all_grammar_captions, grammar_caption, is_held_out

BATCH = 8
ASPECTS = ("background", "color", "shape", "size")


@dataclass(frozen=True)
class Case:
    """One picture to make: what it must show, and the seed of its noise."""

    caption: str
    size: str
    color: str
    shape: str
    background: str
    seed: int

    def rights(self, reading: Reading) -> dict[str, bool]:
        """Which aspects the reading got right."""
        return {aspect: getattr(reading, aspect) == getattr(self, aspect) for aspect in ASPECTS}


def choose_cases(per_half: int, seed: int = 0) -> dict[str, list[Case]]:
    """Captions of the grammar, drawn without repetition as long as there are enough of them."""
    rng = random.Random(seed)
    halves = {}
    for name, held_out in (("never trained on", True), ("trained on", False)):
        pool = [scene for scene in all_grammar_captions() if is_held_out(grammar_caption(*scene)) == held_out]
        rounds = -(-per_half // len(pool))
        chosen = [scene for _ in range(rounds) for scene in rng.sample(pool, len(pool))][:per_half]
        halves[name] = [Case(grammar_caption(*scene), *scene, seed=rng.randrange(2**31)) for scene in chosen]
    return halves


def generate(pipe: OVStableDiffusionPipeline, cases: list[Case], **arguments) -> list[Image.Image]:
    """One picture a case, in batches; each has its own seed, so the batches do not matter."""
    pictures = []
    for start in tqdm(range(0, len(cases), BATCH), desc="generating", unit=f"{BATCH} pictures"):
        some = cases[start : start + BATCH]
        out = pipe([case.caption for case in some], seed=[case.seed for case in some], **arguments)
        pictures += out.images
    return pictures


def accuracy(cases: list[Case], pictures: list[Image.Image]) -> dict[str, float]:
    """Percentages of pictures with each aspect right, and with all four right."""
    rights = [case.rights(read_picture(picture)) for case, picture in zip(cases, pictures, strict=True)]
    shares = {aspect: 100 * sum(right[aspect] for right in rights) / len(rights) for aspect in ASPECTS}
    shares["all four"] = 100 * sum(all(right.values()) for right in rights) / len(rights)
    return shares


def contact_sheet(pictures: list[Image.Image], columns: int = 20) -> Image.Image:
    """All pictures side by side."""
    side = pictures[0].width
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * side, i // columns * side))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--model-dir", type=Path, help="default: models/<checkpoint>-fp16, made if it is not there")
    parser.add_argument("--pictures", type=int, default=240)
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--guidance-rescale", type=float)
    parser.add_argument("--sheet", type=Path, default=Path("outputs/evaluation.png"))
    options = parser.parse_args()
    report = convert_checkpoint(options.checkpoint, options.model_dir)
    pipe = OVStableDiffusionPipeline.from_pretrained(report.model_dir, inference_precision="f32")
    pipe.set_progress_bar_config(disable=True)
    arguments = {name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale", "guidance_rescale")}
    halves = choose_cases(options.pictures // 2)
    start = time.perf_counter()
    pictures = {name: generate(pipe, cases, **arguments) for name, cases in halves.items()}
    seconds = time.perf_counter() - start

    everything = sum(halves.values(), []), sum(pictures.values(), [])
    rows = {name: accuracy(halves[name], pictures[name]) for name in halves} | {"all": accuracy(*everything)}
    settings = ", ".join(f"{k} {pipe.defaults[k] if v is None else v}" for k, v in arguments.items())
    print(f"\n{len(everything[0])} pictures, {settings}, {seconds:.0f} s\n")
    print("| captions | background | object colour | shape | size | all four |\n| --- | --- | --- | --- | --- | --- |")
    for name, shares in rows.items():
        print(f"| {name} | " + " | ".join(f"{share:.1f} %" for share in shares.values()) + " |")
    options.sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(everything[1]).save(options.sheet)
    print(f"\ncontact sheet: {options.sheet}")


if __name__ == "__main__":
    main()
