"""One command for one picture, run as a user runs it."""

import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ov_decidiffusion.cli import generate, main
from ov_decidiffusion.generation.config import GenerationConfig
from ov_decidiffusion.generation.metadata import settings_of

ROOT = Path(__file__).parents[2]
PROMPT = "an owl in a forest at night"
QUICK = ["--num-inference-steps", "4", "--inference-precision", "f32"]


def run(folder: Path, model_dir: Path, *arguments: str, prompts: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ov_decidiffusion", "generate", *arguments, "--model-dir", str(model_dir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, input=prompts, capture_output=True, text=True)


def call(monkeypatch, *arguments: str) -> None:
    """The same in this process."""
    monkeypatch.setattr(sys, "argv", ["ov-decidiffusion", *arguments])
    main.main()


def test_a_command_makes_the_pipelines_picture_and_says_where(tmp_path, model_dir, pipe):
    done = run(tmp_path, model_dir, PROMPT, "-o", "owl.png", "--seed", "7", *QUICK)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"owl.png: 128x128, seed 7, 4 steps, [\d.]+ s\n", done.stdout)
    expected = pipe(PROMPT, seed=7, num_inference_steps=4).images[0]
    made = np.asarray(Image.open(tmp_path / "owl.png")).astype(int)
    assert np.abs(made - np.asarray(expected).astype(int)).max() <= 1
    assert settings_of(tmp_path / "owl.png")["prompt"] == PROMPT


@pytest.fixture
def here(monkeypatch, tmp_path, loaded_pipe):
    """In a folder of its own, with the tests' pipeline: loading it is what the first test shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ov_decidiffusion.cli.commands._load", lambda options: loaded_pipe)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path


def test_several_pictures_formats_patterns_and_prompts_from_standard_input(here, monkeypatch):
    call(monkeypatch, "generate", PROMPT, "--count", "2", "--seed", "5", "-o", "{seed}/{prompt}.webp", *QUICK)
    assert {file.relative_to(here).as_posix() for file in here.rglob("*.webp")} == {
        "5/an-owl-in-a-forest-at-night.webp",
        "6/an-owl-in-a-forest-at-night.webp",
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("a fox\n\na rocket in space\n"))
    call(monkeypatch, "generate", "-o", "two.jpg", "--seed", "1", *QUICK)
    assert [Image.open(here / name).format for name in ("two-1.jpg", "two-2.jpg")] == ["JPEG", "JPEG"]
    for _ in range(2):  # names that nobody chose replace nothing
        call(monkeypatch, "generate", "a fox", "--seed", "1", *QUICK)
    assert (here / "a-fox-1.png").is_file() and (here / "a-fox-1-2.png").is_file()


def test_like_takes_a_pictures_settings_and_options_change_them(here, monkeypatch):
    call(monkeypatch, "generate", "a fox in the snow", "--seed", "3", "--guidance-scale", "2", "-o", "a.png", *QUICK)
    call(monkeypatch, "generate", "--like", "a.png", "-o", "b.png")
    np.testing.assert_array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    call(monkeypatch, "generate", "--like", "a.png", "--solver", "euler a", "--seed", "4", "-o", "c.png")
    found = settings_of("c.png")
    assert (found["prompt"], found["guidance_scale"], found["solver"], found["seed"]) == (
        "a fox in the snow",
        2.0,
        "euler a",
        4,
    )


def test_a_source_and_a_mask_are_files(here, monkeypatch, pipe):
    source, mask = Image.new("RGB", (128, 128), "green"), Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    source.save("source.png")
    mask.save("mask.png")
    masked = ["--image", "source.png", "--mask", "mask.png", "--overlay", "--strength", "0.75"]
    call(monkeypatch, "generate", "a fox", "--seed", "1", "-o", "made.png", *masked, *QUICK)
    arguments = {"image": source, "mask_image": mask, "overlay": True, "strength": 0.75}
    expected = pipe("a fox", seed=1, num_inference_steps=4, **arguments).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open("made.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Write a prompt"),
        ([PROMPT, "-o", "owl.tiff"], "must end in .png, .jpg, .jpeg, .webp"),
        ([PROMPT, "-o", "{name}.png"], "may hold {prompt}, {seed} and {index}"),
        ([PROMPT, "--guidance-scale", "-1"], "`guidance_scale` must be a number from 0"),
        ([PROMPT, "--solver", "eulr"], "Did you mean 'euler'"),
        ([PROMPT, "--image", "nothing.png"], "there is no file nothing.png"),
        ([PROMPT, "--strength", "0.5"], "`strength` needs a source picture: give it with --image"),
        ([PROMPT, "--count", "0"], "`count` must be a whole number from 1"),
        (["--like", "nothing.png"], "cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_no_file(here, monkeypatch, arguments, message):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "generate", *arguments)
    assert message in str(ended.value) and "\n" not in str(ended.value)
    assert not list(here.iterdir())


def test_every_argument_that_fits_on_a_command_line_is_an_option(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "generate", "--help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    not_written = {"latents", "generator", "prompt_embeds", "negative_prompt_embeds"}
    for name in {one.name for one in fields(GenerationConfig)} - not_written - set(generate.OWN):
        assert f"--{name.replace('_', '-')}" in told, name
    for option in ("--image", "--mask", "--count", "--seed", "--preset", "--like", "-o FILE"):
        assert option in told
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "generate", PROMPT, "--nothing", "1")
    assert ended.value.code == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.at_length
def test_a_faster_preset_offers_to_make_its_models(small_model_dir, monkeypatch, tmp_path, capsys):
    """And where nobody is there to be asked, says what to give."""
    folder = shutil.copytree(small_model_dir, tmp_path / "own-fp16")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ov_decidiffusion.runtime.models.Models.int8_pays", True)
    asked = ["generate", PROMPT, "--preset", "fast", "--model-dir", str(folder), "-o", "owl.png", *QUICK]
    for stdin, message in ((io.StringIO(), "Give --quantize to make them first"), (Terminal("n\n"), "--no-quantized")):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit, match=message):
            call(monkeypatch, *asked)
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    call(monkeypatch, *asked)
    assert "which takes about half a minute" in capsys.readouterr().err
    assert set(settings_of(tmp_path / "owl.png")["quantized"]) == {"unet", "vae_decoder"}
