"""The code is organised as ``docs/architecture.md`` says: imports run down, between folders and between files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "ov_decidiffusion"
DRAWING = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LONGEST = 60  # lines of a function, its documentation apart


def block(name: str) -> str:
    return re.search(rf"```{name}\n(.*?)```", DRAWING, re.DOTALL)[1]


def levels() -> dict[str, int]:
    """Of each folder, and each file beside the folders, the line that the drawing of layers has it in."""
    return {name: i for i, line in enumerate(block("layers").splitlines()) for name in line.split()}


def places() -> dict[str, int]:
    """Of each module the line that the list of files has it in."""
    found, folder = {}, ""
    for i, line in enumerate(block("files").splitlines()[1:]):
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folder = (f"{name.rstrip('/')}." if name.endswith("/") else "") if len(indent) == 4 else folder
        if name.endswith(".py"):
            found[f"{folder}{name.removesuffix('.py')}"] = i
    return found


def modules(library: Path) -> dict[str, Path]:
    files = [file for file in library.rglob("*.py") if file.name != "__init__.py"]
    return {".".join(file.relative_to(library).with_suffix("").parts): file for file in files}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """The library's modules that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ov_decidiffusion":
            base = node.module.removeprefix("ov_decidiffusion").lstrip(".")
            found |= {full if (full := f"{base}.{name.name}".lstrip(".")) in known else base for name in node.names}
    return found - {""}


def upward(library: Path) -> list[str]:
    """The imports that run up: to a folder on the same line of the drawing or above, or to a file listed before."""
    known, level, place = modules(library), levels(), places()
    found = []
    for name, file in known.items():
        own = name.split(".")[0]
        for other in imports(file, known):
            theirs = other.split(".")[0]
            runs_up = place[other] <= place[name] if own == theirs else level[theirs] <= level[own]
            if runs_up:
                found.append(f"{name} -> {other}")
    return found


def test_imports_run_down_between_folders_and_between_files():
    known = modules(LIBRARY)
    assert set(places()) == set(known)
    assert {name.split(".")[0] for name in known} == set(levels())
    assert upward(LIBRARY) == []


@pytest.mark.parametrize(
    ("file", "line", "arrow"),
    [
        ("runtime/memory.py", "from ov_decidiffusion.pipeline import OVStableDiffusionPipeline", "pipeline"),
        ("generation/text.py", "from ov_decidiffusion.conversion.trace import psnr", "conversion.trace"),
        ("generation/vae.py", "from ov_decidiffusion.generation import engine", "generation.engine"),
    ],
)
def test_an_import_that_runs_up_is_found(tmp_path, file, line, arrow):
    for source in modules(LIBRARY).values():
        copy = tmp_path / source.relative_to(LIBRARY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    changed = tmp_path / file
    changed.write_text(f"{changed.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    assert upward(tmp_path) == [f"{file.removesuffix('.py').replace('/', '.')} -> {arrow}"]


def test_training_does_not_need_the_tutorials_helper():
    for file in (ROOT / "training").glob("*.py"):
        assert "ov_decidiffusion_helper" not in file.read_text(encoding="utf-8"), file


def test_functions_fit_on_a_screen():
    for file in [*modules(LIBRARY).values(), ROOT / "ov_decidiffusion_helper.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                begin = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0].lineno
                assert node.end_lineno - begin < LONGEST, f"{file.name}: {node.name}"


def test_tests_lie_in_folders_of_the_librarys_names():
    folders = {file.parent.name for file in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= {folder.name for folder in LIBRARY.iterdir() if folder.is_dir()}
