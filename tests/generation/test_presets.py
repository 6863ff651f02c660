"""Presets are the values that they document, on text and pictures, one prompt and many; and pictures stay right."""

import ast
import shutil
from pathlib import Path

import numpy as np
import pytest

from ov_decidiffusion.generation.presets import PLAIN, PRESETS
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline
from training.oracle import read_picture
from training.scenes import example_picture

PROMPTS = ["a lion in the mountains at sunset", "a robot on a beach at sunset"]
RIGHT = [(("lion",), "in the mountains at sunset"), (("robot",), "on a beach at sunset")]


def source():
    return example_picture("house", "in a meadow")


def what(picture):
    reading = read_picture(picture)
    return reading.objects, reading.place


@pytest.mark.parametrize("preset", ["balanced", "fast"])
@pytest.mark.parametrize("task", ["text to image", "image to image", "list of prompts"])
def test_a_preset_is_its_arguments_and_its_pictures_are_right(int8_pipe, preset, task):
    prompts = PROMPTS if task == "list of prompts" else PROMPTS[0]
    settings = {"seed": [1, 2] if task == "list of prompts" else 1}
    if task == "image to image":
        settings |= {"image": source(), "strength": 0.9}
    made = int8_pipe(prompts, preset=preset, **settings).images
    spelled_out = int8_pipe(prompts, **PRESETS[preset], **settings).images
    for picture, same, right in zip(made, spelled_out, RIGHT, strict=False):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(same))
        assert what(picture) == right


def test_the_page_on_speed_says_what_the_presets_are():
    page = (Path(__file__).parents[2] / "docs" / "faster.md").read_text(encoding="utf-8")
    named = ("solver", "num_inference_steps", "cache_interval", "cache_power", "guidance_interval", "decoder")
    for name in named:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        values = [(PLAIN | PRESETS[preset])[name] for preset in ("balanced", "fast")]
        assert [ast.literal_eval(cell.strip(" `")) for cell in row.split("|")[3:5]] == values
    assert {*PRESETS["balanced"], *PRESETS["fast"]} == {*named, "quantized"}


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_negative_prompts_keep_things_away(int8_pipe, preset):
    prompt, negative = int8_pipe.defaults["negative_example"]
    plain = int8_pipe([prompt] * 8, seed=list(range(1, 9)), preset=preset).images
    kept_away = int8_pipe([prompt] * 8, negative_prompt=negative, seed=list(range(1, 9)), preset=preset).images
    there = [sum(negative in read_picture(picture).place for picture in some) for some in (plain, kept_away)]
    print(f"{preset}: {there[0]} of 8 are {negative}, {there[1]} with the negative prompt")
    assert there[1] < there[0] and there[1] <= 1


def test_an_argument_goes_before_the_preset(int8_pipe):
    def steps(**arguments):
        return [(step.total, step.quantized) for step in int8_pipe.denoise(PROMPTS[0], seed=0, **arguments)][0]

    both = frozenset({"unet", "vae_decoder"})
    assert steps(preset="fast") == (6, both)
    assert steps(preset="fast", solver="ddim", num_inference_steps=3, quantized=False) == (3, frozenset())
    assert steps(preset="balanced", quantized=["unet"]) == (10, {"unet"})
    assert steps(preset="fast", solver="plms")[1] == both  # it cannot tell noise levels
    assert steps() == (20, frozenset())


def test_models_seconds_are_counted_and_a_prompt_is_encoded_once(int8_pipe):
    prompt, before = "a bee in a meadow", int8_pipe.seconds
    int8_pipe([prompt] * 3, seed=1, num_inference_steps=2)
    between = int8_pipe.seconds
    assert all(between[name] > before.get(name, 0) for name in ("text_encoder", "unet", "vae_decoder"))
    int8_pipe([prompt] * 3, seed=2, num_inference_steps=2)
    assert int8_pipe.seconds["text_encoder"] == between["text_encoder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "faster"}, "`preset` must be one of exact, balanced, fast, got 'faster'"),
        ({"solver": "eulr"}, r"`solver` must be one of ddim, .*, squeezed, got 'eulr'\. Did you mean 'euler'\?"),
        ({"quantized": "unet"}, "`quantized` must be True, False or some of"),
        ({"quantized": ["vae"]}, "`quantized` must be True, False or some of"),
        (
            {"solver": "squeezed", "num_inference_steps": 5},
            "`num_inference_steps` must be at least 6 with squeeze_mode",
        ),
    ],
)
def test_wrong_settings_are_refused(int8_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        int8_pipe.denoise("a fox", **arguments)


def test_without_int8_models_a_preset_that_needs_them_says_how_to_get_them(model_dir, tmp_path):
    alone = shutil.copytree(model_dir, tmp_path / "alone-fp16")
    pipe = OVStableDiffusionPipeline.from_pretrained(alone, inference_precision="f32")
    with pytest.raises(
        ValueError, match="There is no INT8 model for this folder: make it with `python -m ov_decidiffusion quantize`"
    ):
        pipe.denoise("a fox", preset="fast")
    assert len(list(pipe.denoise("a fox", preset="fast", quantized=False, seed=0))) == 6
