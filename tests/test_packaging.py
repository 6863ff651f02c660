"""What is installed is what is said: one list of requirements, and names that come quickly."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ov_decidiffusion
from ov_decidiffusion.conversion.checkpoint import EMBEDDED_CHECKPOINT
from ov_decidiffusion.conversion.hub import find_checkpoint
from ov_decidiffusion.errors import CheckpointError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lines(file: str) -> list[str]:
    return [
        line
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith(("#", " "))
    ]


def test_requirements_say_the_same_wherever_they_stand():
    extras = PROJECT["optional-dependencies"]
    users = [*PROJECT["dependencies"], *extras["demo"], *extras["serve"], *extras["bulk"]]
    users += [*extras["quantize"], *extras["notebook"]]
    assert sorted(lines("requirements.txt")) == sorted(users)
    assert sorted(lines("tests/requirements.txt")) == sorted(extras["test"])
    locked = {re.split("==", line)[0] for line in lines("requirements.lock")}
    wanted = {re.split(r"[\[<>=]", line)[0].replace("_", "-").lower() for line in (*users, *extras["test"])}
    assert wanted <= locked


def test_every_import_of_the_library_is_required():
    """Top-level packages that the library imports, and what brings each."""
    names = {"PIL": "pillow", "openvino_telemetry": "openvino", "huggingface_hub": "huggingface_hub"}
    imported = set()
    for file in (ROOT / "ov_decidiffusion").rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    foreign = imported - set(sys.stdlib_module_names) - {"ov_decidiffusion"}
    asked = [*lines("requirements.txt"), *PROJECT["optional-dependencies"]["scale"]]
    required = {re.split(r"[\[<>=]", line)[0].replace("-", "_").lower() for line in asked}
    assert {names.get(name, name).lower() for name in foreign} <= required


def test_names_come_without_anything_but_this_library_and_all_of_them_exist():
    code = (
        "import sys; before = set(sys.modules); import ov_decidiffusion; ov_decidiffusion.__version__; "
        "new = [name for name, module in sys.modules.items() if module and name not in before]; "
        "print(sorted({name.split('.')[0] for name in new} - sys.stdlib_module_names))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "['ov_decidiffusion']"
    assert "OVStableDiffusionPipeline" in dir(ov_decidiffusion) and "convert_checkpoint" in dir(ov_decidiffusion)
    for name in ov_decidiffusion.__all__:
        assert getattr(ov_decidiffusion, name) is not None
    assert PROJECT["dynamic"] == ["version"] and ov_decidiffusion.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ov_decidiffusion.nothing  # noqa: B018


def test_models_can_compile_before_torch_is_imported():
    code = (
        "import sys; from ov_decidiffusion import OVStableDiffusionPipeline; "
        "print(sorted({'torch', 'diffusers', 'transformers', 'scipy', 'gradio', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_a_picture_needs_no_more_than_torch_and_a_piece_of_diffusers(model_dir):
    """What takes a second to import and is not needed stays away, from the start of a process to its picture."""
    code = (
        "import sys; from ov_decidiffusion import OVStableDiffusionPipeline; "
        "pipe = OVStableDiffusionPipeline.from_pretrained(sys.argv[1]); pipe('a fox', num_inference_steps=2, seed=0); "
        "heavy = {'matplotlib', 'transformers', 'torch._dynamo', 'sympy', 'scipy', 'pandas', 'nncf', 'accelerate'}; "
        "models = [name for name in sys.modules if name.startswith('diffusers.models.')]; "
        "print(sorted(heavy & set(sys.modules)), models)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code, str(model_dir)], text=True, cwd=ROOT)
    assert printed.strip() == "[] []"


def test_a_checkpoint_that_was_converted_is_found_without_what_converts(model_dir):
    code = (
        "import sys; from ov_decidiffusion import convert_checkpoint; "
        "print(convert_checkpoint(sys.argv[1], sys.argv[2]).converted, "
        "sorted({'torch', 'diffusers', 'openvino', 'huggingface_hub'} & set(sys.modules)))"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", code, str(EMBEDDED_CHECKPOINT), str(model_dir)], text=True, cwd=ROOT
    )
    assert printed.strip() == "False []"


def test_a_model_folder_needs_neither_hub_nor_torch_weights():
    code = (
        "import sys; from ov_decidiffusion import OVStableDiffusionPipeline; "
        "print([name for name in sys.modules if name.startswith('ov_decidiffusion.')])"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert "ov_decidiffusion.pipeline" in printed
    for folder in ("conversion", "demo", "server", "bulk", "quantize"):
        assert f"'ov_decidiffusion.{folder}" not in printed


def test_an_installed_library_says_where_the_embedded_checkpoint_is(monkeypatch, tmp_path):
    elsewhere = tmp_path / "site-packages" / "checkpoints" / "tiny-decidiffusion"
    monkeypatch.setattr("ov_decidiffusion.conversion.hub.EMBEDDED_CHECKPOINT", elsewhere)
    with pytest.raises(CheckpointError, match="comes with the project's repository.*clone the repository"):
        find_checkpoint(elsewhere)
