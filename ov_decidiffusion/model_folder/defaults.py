"""The settings recommended by a checkpoint's makers, and prompts that suit it: ``pipeline_defaults.json``."""

from pathlib import Path
from typing import Any

from ov_decidiffusion.errors import ModelDirError
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.layout import DEFAULTS_FILE

# Red, green and blue in -1…1 for each channel of Stable Diffusion's latents, and last for latents of 0; by keturn:
# https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204.
LATENT_PREVIEW = [
    [0.298, 0.207, 0.208],
    [0.187, 0.286, 0.173],
    [-0.158, 0.189, 0.264],
    [-0.184, -0.271, -0.473],
    [0.0, 0.0, 0.0],
]
# Used for what a checkpoint's own file does not set.
SUITING_PHOTOGRAPHS = {
    "example_prompts": [
        ["a lighthouse on a cliff at sunset, oil painting", "people, text"],
        ["a red fox in fresh snow, photograph", "blurry"],
        ["a bowl of ramen on a wooden table, soft light", ""],
        ["a treehouse village in a bamboo forest, watercolour", "photograph"],
    ],
    "negative_example": ["a street in a small town", "cars"],
    "image_example": ["a red house in a meadow", "a red house in a snowy meadow at dusk, oil painting"],
    "calibration_prompts": [
        "portrait of an old fisherman, studio light, photograph",
        "a mountain lake at dawn, mist over the water",
        "an astronaut riding a bicycle, comic book style",
        "a crowded night market in the rain, neon signs",
        "a cat asleep on a stack of books, watercolour",
        "a modern kitchen with a large window, architectural photograph",
        "a dragon over a medieval city, fantasy art",
        "macro photograph of a dew drop on a leaf",
    ],
    "latent_preview": LATENT_PREVIEW,
}
DEFAULTS_1_0 = {"num_inference_steps": 30, "guidance_scale": 7.5, "guidance_rescale": 0.7} | SUITING_PHOTOGRAPHS
DEFAULTS_2_0 = {"num_inference_steps": 16, "guidance_scale": 7.5, "guidance_rescale": 0.8} | SUITING_PHOTOGRAPHS


def read_defaults(folder: Path) -> dict[str, Any]:
    """The number of steps, the guidance and the example prompts that suit a folder's models.

    Raises:
        ValueError: texts have another form; the numbers are checked where they are used.
    """
    file = folder / DEFAULTS_FILE
    own = read_json(file) if file.is_file() else {}
    if "quick_look" in own:  # its former name
        own.setdefault("latent_preview", own.pop("quick_look"))
    defaults = DEFAULTS_1_0 | own
    for name, (form, fits) in FORMS.items():
        if name in defaults and not fits(defaults[name]):
            raise ModelDirError(f"`{file}: {name}` must be {form}.")
    return defaults


def _are_texts(values: Any, least: int) -> bool:
    return isinstance(values, list) and len(values) >= least and all(isinstance(one, str) for one in values)


FORMS = {
    "example_prompts": (
        "a list of pairs, each a prompt and a negative prompt",
        lambda pairs: isinstance(pairs, list) and pairs and all(_are_texts(pair, 2) for pair in pairs),
    ),
    "negative_example": ("a prompt and what to avoid", lambda pair: _are_texts(pair, 2)),
    "image_example": ("two prompts", lambda pair: _are_texts(pair, 2)),
    "calibration_prompts": ("a list of at least two prompts", lambda prompts: _are_texts(prompts, 2)),
    "showcase": (
        "a list of pictures, each with a `prompt`, a `seed` and a `webp` file in base64",
        lambda shown: (
            isinstance(shown, list)
            and all(
                isinstance(one, dict)
                and isinstance(one.get("prompt"), str)
                and isinstance(one.get("seed"), int)
                and isinstance(one.get("webp"), str)
                for one in shown
            )
        ),
    ),
    "understands": (
        "lists of words by their kind",
        lambda kinds: isinstance(kinds, dict) and all(_are_texts(words, 0) for words in kinds.values()),
    ),
}
