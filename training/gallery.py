"""The picture at the top of the README: ``python -m training.gallery``."""

from pathlib import Path

from ov_decidiffusion_helper import EMBEDDED_CHECKPOINT, OVStableDiffusionPipeline, convert_checkpoint, picture_grid

PROMPTS = [
    "a large red star on a blue background",
    "a small yellow ring and a small white cross on a purple background",
    "a large green triangle on a white and orange striped background",
    "a small orange square on a black background, in the top left corner",
    "a large white cross on a green background",
    "a small purple star on a yellow background, at the bottom",
    "a large black ring on an orange background",
    "a small blue circle and a small red triangle on a white background",
]
FILE = Path("docs/pictures.png")


def main() -> None:
    pipe = OVStableDiffusionPipeline.from_pretrained(
        convert_checkpoint(EMBEDDED_CHECKPOINT).model_dir, inference_precision="f32"
    )
    pictures = pipe(PROMPTS, seed=list(range(len(PROMPTS)))).images
    FILE.parent.mkdir(exist_ok=True)
    picture_grid(pictures, PROMPTS, columns=4, side=200).save(FILE, optimize=True)
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
