"""The tutorial: runs from top to bottom, shows pictures, and was committed executed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "decidiffusion.ipynb"


def test_runs_with_the_embedded_checkpoint():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "-p", "no:cacheprovider", NOTEBOOK.name],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "DECIDIFFUSION_CHECKPOINT"} | {"CI": "true"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "failed" not in done.stdout and "passed" in done.stdout


def test_was_committed_executed_with_its_pictures():
    assert NOTEBOOK.stat().st_size < 2e6
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 9


CELL = """
import gradio as gr
from ov_decidiffusion.demo import DemoBlocks
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
