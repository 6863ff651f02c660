"""The pictures of the README and of the model card: ``python -m training.gallery``.

Both take the first seeds and leave nothing out: eight scenes for the README, and a sheet of 48 captions of combinations
that training never saw.
"""

from pathlib import Path

from ov_decidiffusion_helper import EMBEDDED_CHECKPOINT, OVStableDiffusionPipeline, picture_grid
from training.evaluate import SINGLE, choose_cases, generate

PROMPTS = [
    "a fox in the snow",
    "a robot on a beach at sunset",
    "a ghost in a forest at night",
    "a lion in the mountains at sunset",
    "a castle on the sea",
    "a rabbit in the mountains at night",
    "a hamburger in space",
    "a penguin in a city at night",
]
PICTURES, SHEET = Path("docs/pictures.png"), Path("docs/never-trained-on.png")


def main() -> None:
    pipe = OVStableDiffusionPipeline.from_pretrained(EMBEDDED_CHECKPOINT, inference_precision="f32")
    pictures = pipe(PROMPTS, seed=list(range(len(PROMPTS)))).images
    PICTURES.parent.mkdir(exist_ok=True)
    picture_grid(pictures, PROMPTS, columns=4, side=200).save(PICTURES, optimize=True)
    cases = [case for case in choose_cases(240)["never trained on"] if case.scene.size in SINGLE][::3][:48]
    sheet = picture_grid(generate(pipe, cases), [case.caption for case in cases], columns=8, side=128)
    sheet.save(SHEET, optimize=True)
    print(f"wrote {PICTURES} and {SHEET}")


if __name__ == "__main__":
    main()
