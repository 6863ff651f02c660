"""A picture carries the settings that make it again, and AUTOMATIC1111's are read."""

import contextlib
import json
import time

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ov_decidiffusion.demo.studio import form_values_of
from ov_decidiffusion.generation.metadata import made_with, settings_of

PROMPT = "a fox in the snow"
WEBUI = """a (fox:1.2), in the snow
second line
Negative prompt: blurry, text
Steps: 13, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 1234, Size: 128x128, Model hash: abc, \
Model: "a, model", Denoising strength: 0.6, Version: v1.10.0"""


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"seed": 5, "negative_prompt": "white", "num_inference_steps": 4, "guidance_scale": 3.5, "height": 64},
        {"seed": 5, "solver": "DPM++ 2M Karras", "num_inference_steps": 5, "prompt_syntax": False},
        {"seed": 5, "solver": "dpm++ 2m", "timesteps": [900, 500, 100]},
        {"seed": 5, "num_inference_steps": 6, "cache_interval": 2, "guidance_interval": (1.0, 50.0)},
    ],
)
def test_the_saved_file_makes_the_same_picture(pipe, tmp_path, arguments):
    picture = pipe(PROMPT, **arguments).images[0]
    picture.save(tmp_path / "made.png")
    found = settings_of(tmp_path / "made.png")
    assert found["prompt"] == PROMPT and isinstance(found["seed"], int)
    assert same(pipe(**found).images[0], picture)
    assert settings_of(picture) == found


def test_each_of_several_with_its_own_seed_is_made_alone_and_others_together(pipe, tmp_path):
    apart = pipe([PROMPT, "a whale under water"], seed=[3, 4], num_inference_steps=4).images
    found = settings_of(apart[1])
    assert (found["prompt"], found["seed"]) == ("a whale under water", 4)
    again = np.asarray(pipe(**found).images[0], int)
    assert np.abs(again - np.asarray(apart[1], int)).max() <= 1
    together = pipe(PROMPT, num_images_per_prompt=2, seed=3, num_inference_steps=4).images
    together[1].save(tmp_path / "made.png")
    assert made_with(tmp_path / "made.png")["picture"] == 1
    assert same(pipe(**settings_of(tmp_path / "made.png")).images[1], together[1])


def test_each_of_several_with_one_seed_tells_its_own_prompt(pipe, tmp_path):
    prompts, negative = ["a fox in the snow", "a lion in the desert"], ["white", "blue"]
    made = pipe(prompts, negative_prompt=negative, seed=1, num_images_per_prompt=2, num_inference_steps=1).images
    for i, picture in enumerate(made):
        picture.save(tmp_path / "saved.png")
        with Image.open(tmp_path / "saved.png") as saved:
            assert saved.text["parameters"].startswith(f"{prompts[i // 2]}\nNegative prompt: {negative[i // 2]}\n")
        filled = form_values_of(tmp_path / "saved.png")
        assert (filled["prompt"], filled["negative_prompt"]) == (prompts[i // 2], negative[i // 2])


def test_image_to_image_and_inpainting_need_their_pictures_again(pipe, tmp_path):
    source = pipe("a house in a meadow", seed=1).images[0]
    mask = Image.new("L", source.size, 0)
    mask.paste(255, [0, 0, source.width // 2, source.height])
    for given, more in (({"image": source}, {}), ({"image": source, "mask_image": mask}, {"overlay": True})):
        made = pipe(PROMPT, seed=2, num_inference_steps=4, strength=0.7, **given, **more).images[0]
        made.save(tmp_path / "made.png")
        assert same(pipe(**settings_of(tmp_path / "made.png"), **given).images[0], made)
        assert [len(one) for one in made_with(tmp_path / "made.png")["image_sha256"]] == [64]


def test_it_says_what_it_was_made_with(pipe, tmp_path):
    picture = pipe(PROMPT, seed=2, num_inference_steps=3).images[0]
    picture.save(tmp_path / "made.png")
    told = made_with(tmp_path / "made.png")
    assert told["checkpoint"] == pipe.origin["checkpoint"] and "revision" in told
    assert told["inference_precision"] == "f32" and set(told["versions"]) == {"openvino", "torch", "diffusers"}
    step = next(iter(pipe.denoise(PROMPT, seed=2, num_inference_steps=3)))
    assert made_with(pipe.finish(step)[0])["stopped_after_step"] == 1


def test_automatic1111s_text_is_written_and_read(pipe, tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", WEBUI)
    Image.new("RGB", (8, 8)).save(tmp_path / "webui.png", pnginfo=texts)
    found = settings_of(tmp_path / "webui.png")
    assert found == {
        "prompt": "a (fox:1.2), in the snow\nsecond line",
        "negative_prompt": "blurry, text",
        "num_inference_steps": 13,
        "guidance_scale": 5.5,
        "seed": 1234,
        "strength": 0.6,
        "width": 128,
        "height": 128,
        "solver": "dpm++ 2m karras",
    }
    assert made_with(tmp_path / "webui.png")["checkpoint"] == "a, model"
    picture = pipe(**found, image=Image.new("RGB", (128, 128), "white")).images[0]
    lines = picture.info["parameters"].split("\n")
    assert lines[:3] == WEBUI.split("\n")[:3]
    assert lines[3].startswith("Steps: 13, Sampler: DPM++ 2M Karras, CFG scale: 5.5, Seed: 1234, Size: 128x128, Model:")


def test_pictures_without_settings_or_with_broken_ones_are_told(tmp_path):
    plain, broken, text = (tmp_path / f"{name}.png" for name in ("plain", "broken", "text"))
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(ValueError, match="carries no settings"):
        settings_of(plain)
    for content in ("{", "[]", json.dumps({"arguments": 1})):
        texts = PngImagePlugin.PngInfo()
        texts.add_text("ov_decidiffusion", content)
        Image.new("RGB", (8, 8)).save(broken, pnginfo=texts)
        with pytest.raises(ValueError, match="carries settings that cannot be read"):
            settings_of(broken)
    text.write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        settings_of(text)


@pytest.mark.parametrize(
    "text", ["a\nSteps: 5," + " " * 50_000 + "x", "a" * 100_000, 'a\nSteps: 5, x: "' + "\\" * 9999]
)
def test_odd_text_of_others_takes_no_time(text):
    picture = Image.new("RGB", (8, 8))
    picture.info["parameters"] = text
    begin = time.thread_time()  # of the processor: others may have it meanwhile
    with contextlib.suppress(ValueError):
        assert settings_of(picture)["num_inference_steps"] == 5
    assert time.thread_time() - begin < 2


@pytest.mark.parametrize(
    "content",
    [
        {"arguments": {"prompt": "a"}, "made_with": []},
        {"arguments": {"prompt": {"a": 1}}, "made_with": {}},
        {"arguments": {"seed": []}, "made_with": {}},
        {"arguments": {"width": [[1]]}, "made_with": {}},
        {"arguments": None, "made_with": {}},
    ],
)
def test_settings_of_another_kind_are_refused(content):
    picture = Image.new("RGB", (8, 8))
    picture.info["ov_decidiffusion"] = json.dumps(content)
    with pytest.raises(ValueError, match="settings that cannot be read"):
        settings_of(picture)


def test_unknown_names_in_a_file_reach_no_argument(tmp_path):
    texts = PngImagePlugin.PngInfo()
    content = {"arguments": {"prompt": "a fox", "image": "/etc/passwd", "cache_dir": "x"}, "made_with": {}}
    texts.add_text("ov_decidiffusion", json.dumps(content))
    Image.new("RGB", (8, 8)).save(tmp_path / "made.png", pnginfo=texts)
    assert settings_of(tmp_path / "made.png") == {"prompt": "a fox"}
