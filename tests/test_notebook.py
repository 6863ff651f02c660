"""The tutorial: runs from top to bottom, with nbval and in JupyterLab, and was committed executed."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import UNIX_ONLY
from nbclient import NotebookClient
from playwright.sync_api import expect, sync_playwright

import execute_notebook
import ov_decidiffusion_helper as helper

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "decidiffusion.ipynb"
MOST_BYTES = 3e6
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def markdown_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_runs_with_the_embedded_checkpoint(record_property):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--durations=8", "-p", "no:cacheprovider", NOTEBOOK.name],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "DECIDIFFUSION_CHECKPOINT"} | {"CI": "true"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "failed" not in done.stdout and "passed" in done.stdout
    record_property("told", done.stdout[done.stdout.index("slowest 8 durations") :])


def test_was_committed_executed_with_pictures_that_say_what_they_show():
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    cells = code_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output for output in outputs if {"image/png", "image/gif"} & set(output.get("data", {}))]
    assert len(pictures) >= 25
    for output in pictures:
        (kind,) = {"image/png", "image/gif"} & set(output["data"])
        assert len(output["metadata"][kind]["alt"]) > 10
    text = json.dumps(outputs)
    assert "widget-view" not in text and "Dropdown(" not in text and not re.search(r"\d+%\|", text)


def test_every_exercise_has_a_solution_and_is_not_solved_as_it_stands():
    told = []
    for cell in code_cells(NOTEBOOK):
        if "helper.check(" in "".join(cell["source"]) or "helper.grade(" in "".join(cell["source"]):
            lines = "".join("".join(output.get("text", [])) for output in cell["outputs"]).splitlines()
            told.append([line for line in lines if line.startswith(("Right", "Not yet: ", "Write your answer"))])
    assert all(len(lines) == 1 and not lines[0].startswith("Right") for lines in told), told
    texts = "\n".join(markdown_cells(NOTEBOOK))
    assert len(told) == texts.count("**Try it.**") == texts.count("<details><summary>A solution</summary>") >= 15


def test_the_exported_page_asks_no_other_host():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    page = execute_notebook.to_html(notebook)
    asked = re.findall(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["'](https?:[^"']*)""", page)
    assert not asked and page.count("data:image/png;base64") >= 25
    assert not re.findall(r"@import\s+url|url\(['\"]?https?:", page)
    assert page.count(' alt="') >= 25


def test_the_exported_page_draws_formulas_without_a_script():
    page = execute_notebook.to_html(nbformat.read(NOTEBOOK, as_version=4))
    formulas = sum(len(execute_notebook.FORMULA.findall(cell)) for cell in markdown_cells(NOTEBOOK))
    assert formulas > 0 and page.count("<math ") == formulas
    assert "\\sqrt" not in page and "\\bar" not in page


def test_the_four_steps_come_first_and_show_the_converter():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    steps = ["# Part I", "## Step 1. Convert", "## Step 2. Prepare", "## Step 3. Run", "## Step 4. Interactive demo"]
    at = [next(i for i, text in enumerate(texts) if step in text) for step in [*steps, "# Part II", "# Part III"]]
    assert at == sorted(at)
    first = "\n".join(text for text, cell in zip(texts[: at[5]], cells, strict=False) if cell["cell_type"] == "code")
    for call in ("ov.convert_model(", "example_input=", "ov.save_model(", "convert_checkpoint(", "from_pretrained("):
        assert call in first, call
    assert "image=source" in first and "make_demo(pipe)" in first
    words = " ".join(texts[: at[5]])
    for term in ("OpenVINO IR", "Intermediate Representation", "OVC", "text encoder", "embeddings", "latents"):
        assert term in words, term
    for term in ("classifier-free guidance", "Text-to-image", "Image-to-image", "Gradio"):
        assert term in words, term
    pictures = [output for cell in cells[: at[5]] for output in cell.get("outputs", []) if "image/png" in str(output)]
    assert len(pictures) >= 4, "the parts, pictures, changed pictures, and the page"


def test_the_chosen_checkpoint_stays_when_all_cells_run_again(monkeypatch):
    monkeypatch.setenv("DECIDIFFUSION_CHECKPOINT", "somebody/theirs")
    helper.checkpoint_dropdown.cache_clear()
    try:
        assert helper.chosen_checkpoint(helper.checkpoint_dropdown()) == "somebody/theirs"
        helper.checkpoint_dropdown().value = "DeciDiffusion 1.0"
        assert helper.chosen_checkpoint(helper.checkpoint_dropdown()) == "Deci/DeciDiffusion-v1-0"
    finally:
        helper.checkpoint_dropdown.cache_clear()


def test_programs_set_the_values_of_the_cell_that_is_tagged_for_them():
    sources = [("".join(cell["source"]), cell["metadata"].get("tags")) for cell in code_cells(NOTEBOOK)]
    [at] = [i for i, (_, tags) in enumerate(sources) if tags == ["parameters"]]
    after = [source for source, _ in sources[at + 1 : at + 4]]
    names: dict = {"helper": helper, "Path": Path}
    for source in (sources[at][0], 'checkpoint_name, device_name = "somebody/theirs", "AUTO"', *after):
        exec(source, names)
    assert names["checkpoint"] == "somebody/theirs" and names["device_dropdown"].value == "AUTO"
    with pytest.raises(ValueError, match="`device_name` must be one of .*CPU.*, got 'TPU'"):
        helper.device_dropdown("TPU")


@UNIX_ONLY
@pytest.mark.at_length
@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="needs Chromium")
def test_run_all_in_jupyterlab(tmp_path):
    (ROOT / "models").mkdir(exist_ok=True)
    for name in (
        "ov_decidiffusion",
        "ov_decidiffusion_helper.py",
        "training",
        "checkpoints",
        "models",
        "requirements.txt",
        "docs",
        "benchmarks",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    copy = tmp_path / NOTEBOOK.name
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, copy)
    port = 18888
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    options = ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={tmp_path}"]
    environment = os.environ | {"CI": "true", "JUPYTER_CONFIG_DIR": str(tmp_path / ".jupyter")}
    server = subprocess.Popen([*command, *options], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            run_all(page, f"http://127.0.0.1:{port}/lab/tree/{copy.name}")
            browser.close()
    finally:
        server.terminate()
        server.wait(30)
    cells = code_cells(copy)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


def run_all(page, address: str) -> None:
    """Open a notebook, run all its cells from the menu, wait for the last one, and save."""
    for _ in range(60):
        try:
            page.goto(address)
            break
        except Exception:  # the server is still starting
            page.wait_for_timeout(500)
    indicator, prompts = page.locator(".jp-Notebook-ExecutionIndicator"), page.locator(".jp-CodeCell .jp-InputPrompt")
    for _ in range(6):  # it says idle before the kernel is there too, and nothing runs then
        expect(indicator).to_have_attribute("data-status", "idle", timeout=120_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
        with contextlib.suppress(AssertionError):
            expect(prompts.first).to_have_text(re.compile(r"[*\d]"), timeout=20_000)
            break
    expect(prompts.last).to_have_text(re.compile(r"\d"), timeout=1_200_000)
    page.keyboard.press("Control+s")
    page.wait_for_timeout(3000)


CELL = """
import gradio as gr
from ov_decidiffusion.demo.app import DemoBlocks
with DemoBlocks() as demo:
    gr.Markdown(f"page {len(demos)}")
demo.launch(inline=False, quiet=True, prevent_thread_lock=True)
demos.append(demo)
"""
ASK = """
import httpx
print([demo.is_running for demo in demos], "page 1" in httpx.get(demo.local_url).text)
demo.close(verbose=False)
"""


def test_running_the_demos_cell_again_closes_the_first():
    cells = [nbformat.v4.new_code_cell(source) for source in ("demos = []", CELL, CELL, ASK)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert notebook.cells[-1].outputs[0].text.strip() == "[False, True] True"


def test_a_notebook_alone_says_what_to_do(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    alone = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(first.source)])
    with pytest.raises(Exception, match="Clone the whole repository"):
        NotebookClient(alone, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
