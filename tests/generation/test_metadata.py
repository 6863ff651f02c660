"""A picture carries the settings that make it again, and AUTOMATIC1111's are read."""

import contextlib
import io
import json
import struct
import time
import zlib

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


ODD_VALUES = (
    {"seed": 10**30},
    {"num_inference_steps": 2**70},
    {"seed": "x"},
    {"num_inference_steps": "20"},
    {"num_inference_steps": True},
    {"guidance_scale": float("nan")},
    {"guidance_scale": float("inf")},
    {"prompt": True},
    {"prompt": "\ud800"},
    {"solver": 5},
    {"width": "<b>"},
    {"prompt_syntax": "no"},
)


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


@pytest.mark.parametrize("kind", ["jpg", "webp", "avif", "tiff"])
def test_other_kinds_of_files_carry_them_too(pipe, tmp_path, kind):
    prompt = "ein Füchslein, “雪” 🦊"
    picture = pipe(prompt, negative_prompt="rain", seed=5, num_inference_steps=2).images[0]
    picture.save(tmp_path / f"made.{kind}")
    assert settings_of(tmp_path / f"made.{kind}") == settings_of(picture)
    assert made_with(tmp_path / f"made.{kind}")["checkpoint"] == pipe.origin["checkpoint"]
    assert same(pipe(**settings_of(tmp_path / f"made.{kind}")).images[0], picture)
    with Image.open(tmp_path / f"made.{kind}") as saved:  # as any reader of EXIF finds it
        comment = saved.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0") and comment[8:].decode("utf-16-be").startswith(prompt)


def test_settings_too_long_for_a_jpeg_are_told(pipe, tmp_path, caplog):
    step = next(iter(pipe.denoise("a fox", seed=1, num_inference_steps=1)))
    picture = pipe.finish(step)[0]
    picture.info["parameters"] = "a" * 70_000
    picture.save(tmp_path / "made.jpg")
    assert "settings are left out" in caplog.text
    with Image.open(tmp_path / "made.jpg") as saved:
        assert saved.size == picture.size


def webui_file(folder, text: str, kind: str = "png", order: str = "be"):
    """A file as stable-diffusion-webui writes it."""
    file, picture = folder / f"webui.{kind}", Image.new("RGB", (8, 8))
    if kind == "png":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("parameters", text)
        picture.save(file, pnginfo=texts)
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(f"utf-16-{order}")
        picture.save(file, exif=exif.tobytes())
    return file


HEAD = "a fox\nNegative prompt: rain\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 128x128"


@pytest.mark.parametrize(("kind", "order"), [("png", ""), ("jpg", "be"), ("jpg", "le"), ("webp", "be"), ("avif", "be")])
def test_automatic1111s_files_of_any_kind_are_read(tmp_path, kind, order):
    found = settings_of(webui_file(tmp_path, HEAD.replace("fox", "fox, лиса"), kind, order))
    assert (found["prompt"], found["negative_prompt"], found["seed"]) == ("a fox, лиса", "rain", 5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HEAD, ("a fox", "rain", 20, 5, None)),
        (HEAD + ", Denoising strength: 0.5", ("a fox", "rain", 20, 5, 0.5)),
        (HEAD + ", Denoising strength: 0.5, Hires upscale: 2", ("a fox", "rain", 20, 5, None)),
        (HEAD + ", Denoising strength: 0.5, Hires resize: 256x0, Hires steps: 9", ("a fox", "rain", 20, 5, None)),
        (HEAD + ", Denoising strength: 0.5, First pass size: 0x0", ("a fox", "rain", 20, 5, None)),
        (HEAD + "\nTemplate: a __beast__\nNegative Template: rain", ("a fox", "rain", 20, 5, None)),
        (HEAD + "\n\nUsed embeddings: bad [afea]\nTime taken: 3.2s", ("a fox", "rain", 20, 5, None)),
        (
            HEAD.replace("a fox", "a sign, Negative prompt: here"),
            ("a sign, Negative prompt: here", "rain", 20, 5, None),
        ),
        (HEAD.replace("rain", "rain\nand snow"), ("a fox", "rain\nand snow", 20, 5, None)),
        (
            HEAD.replace("20", "20.0").replace("Seed: 5", "Seed: 5.0").replace("128", "128.0"),
            ("a fox", "rain", 20, 5, None),
        ),
        (HEAD.replace("a fox\nNegative prompt: rain\n", ""), ("", None, 20, 5, None)),
    ],
)
def test_automatic1111s_text_in_its_many_forms(tmp_path, text, told):
    found = settings_of(webui_file(tmp_path, text))
    names = ("prompt", "negative_prompt", "num_inference_steps", "seed", "strength")
    assert (tuple(found.get(name) for name in names), found["width"]) == (told, 128)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (", Schedule type: Exponential", "Exponential"),
        (", Clip skip: 2, Tiling: True", "Clip skip, Tiling"),
        (", Schedule type: Automatic, Model hash: abc, VAE: x.pt", None),
    ],
)
def test_what_cannot_be_used_of_it_is_named(tmp_path, caplog, more, named):
    settings_of(webui_file(tmp_path, HEAD + more))
    assert named in caplog.text if named else not caplog.text


@pytest.mark.parametrize("prompt", ["ein Füchslein im Schnee", "лиса в снегу", "雪の中の狐", "a fox ❄"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_plain_texts_of_png_in_either_encoding(tmp_path, prompt, encoding):
    """The standard has Latin-1, and many programs write UTF-8."""
    if encoding == "latin-1" and not prompt.isascii() and "ü" not in prompt:
        return
    text = HEAD.replace("a fox", prompt).encode(encoding)
    body = b"parameters\0" + text
    chunk = struct.pack(">I", len(body)) + b"tEXt" + body + struct.pack(">I", zlib.crc32(b"tEXt" + body))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    file = tmp_path / "written.png"
    file.write_bytes(buffer.getvalue()[:33] + chunk + buffer.getvalue()[33:])  # behind the header
    assert settings_of(file)["prompt"] == prompt


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
        *({"arguments": {"prompt": "a"} | odd, "made_with": {}} for odd in ODD_VALUES),
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
