"""Examples in docstrings and in the pages about Python do what they show."""

import doctest
import inspect
import re
import shutil
from pathlib import Path

import pytest

import ov_decidiffusion
from ov_decidiffusion.pipeline import OVStableDiffusionPipeline

ROOT = Path(__file__).parent.parent
METHODS = [
    member
    for name, member in inspect.getmembers(OVStableDiffusionPipeline)
    if not name.startswith("_") or name == "__call__"
]
DOCUMENTED = [getattr(ov_decidiffusion, name) for name in ov_decidiffusion.__all__] + METHODS
WITH_EXAMPLES = {one.__qualname__: one for one in DOCUMENTED if ">>>" in (getattr(one, "__doc__", None) or "")}
PAGES = ("README.md", "docs/generate.md", "docs/from-diffusers.md")
BLOCKS = [
    (page, number, code)
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL))
]


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch, model_dir):
    """A folder with the embedded checkpoint in it, converted already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    shutil.copytree(model_dir, tmp_path / "models" / "tiny-decidiffusion-fp16")


@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize("name", sorted(WITH_EXAMPLES))
def test_a_docstrings_example_does_what_it_shows(name, pipe):
    documented = inspect.getdoc(WITH_EXAMPLES[name])
    example = doctest.DocTestParser().get_doctest(documented, {"pipe": pipe}, name, name, 0)
    assert doctest.DocTestRunner().run(example).failed == 0, "its output stands above"


@pytest.mark.usefixtures("in_a_folder")
def test_the_pages_examples_run_one_after_the_other(pipe):
    known: dict = {}
    for name in ("photo.jpg", "mask.png"):
        pipe("a house in a meadow", seed=1, num_inference_steps=4).images[0].save(name)
    for page, number, code in BLOCKS:
        exec(compile(code, f"{page}, block {number}", "exec"), known)
    known["pipe"].close()
    assert Path("owl.png").is_file() and Path("fox.png").is_file() and Path("belief-0.png").is_file()


def test_what_is_public_has_an_example():
    functions = {name for name in ov_decidiffusion.__all__ if name.islower()} - {"make_demo", "quantize_models"}
    assert functions <= WITH_EXAMPLES.keys()
