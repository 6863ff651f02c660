"""Execute the tutorial: ``python execute_notebook.py`` writes ``decidiffusion.html``, a page that needs no network;
``--in-place`` writes the notebook itself, in the form that is committed.

Shows its progress, and at the end the cells that took longest.
"""

import argparse
import copy
import os
import re
import time
from pathlib import Path

import nbformat
from latex2mathml.converter import convert as to_mathml
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from tqdm import tqdm

NOTEBOOK = Path(__file__).parent / "decidiffusion.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"
NEEDS_NETWORK = ("mathjax_url", "require_js_url", "jquery_url", "jupyter_widgets_base_url", "mermaid_js_url")
SLOWEST = 8
FORMULA = re.compile(r"\$([^$\n]+)\$")
# Additions to Jupyter's own style: a layout for phones, and dark colours for readers who prefer them.
STYLE = """<style>
.jp-RenderedHTMLCommon img, .jp-RenderedImage img { max-width: 100%; height: auto; }
.jp-RenderedHTMLCommon table { display: block; overflow-x: auto; max-width: 100%; }
main { max-width: 1100px; margin: 0 auto; }
@media (max-width: 700px) {
  .jp-InputPrompt, .jp-OutputPrompt, .jp-Collapser { display: none !important; }
  body, .jp-Notebook, .jp-Cell { padding: 4px !important; }
  .jp-RenderedText pre, .jp-CodeMirrorEditor, .highlight pre { overflow-x: auto; font-size: 12px; }
}
@media (prefers-color-scheme: dark) {
  :root, body {
    --jp-layout-color0: #16181d; --jp-layout-color1: #16181d; --jp-layout-color2: #22262e; --jp-layout-color3: #3a404b;
    --jp-content-font-color0: #f4f5f7; --jp-content-font-color1: #e3e5e9; --jp-content-font-color2: #b9bec8;
    --jp-ui-font-color0: #f4f5f7; --jp-ui-font-color1: #e3e5e9; --jp-content-link-color: #8ab8ff;
    --jp-cell-editor-background: #1f232b; --jp-cell-editor-border-color: #3a404b; --jp-border-color1: #3a404b;
    --jp-border-color2: #3a404b; --jp-rendermime-table-row-background: #1f232b;
    --jp-rendermime-table-row-hover-background: #2a3040; --jp-mirror-editor-keyword-color: #7ee08a;
    --jp-mirror-editor-string-color: #ff9d8a; --jp-mirror-editor-comment-color: #9fb4b8;
    --jp-mirror-editor-number-color: #9be29b; --jp-mirror-editor-operator-color: #d9a6ff;
    --jp-mirror-editor-variable-color: #e3e5e9; --jp-mirror-editor-builtin-color: #7ee08a;
    --jp-mirror-editor-def-color: #8ab8ff; --jp-mirror-editor-punctuation-color: #8ab8ff;
    color-scheme: dark;
  }
}
</style>
"""


def execute(notebook: nbformat.NotebookNode) -> dict[int, float]:
    """Run all cells in the notebook's folder; returns the seconds of each code cell."""
    seconds: dict[int, float] = {}
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(total=cells, desc="executing", unit="cell") as progress:

        def begins(cell: nbformat.NotebookNode, cell_index: int) -> None:
            seconds[cell_index] = time.perf_counter()

        def ends(cell: nbformat.NotebookNode, cell_index: int, **_: object) -> None:
            seconds[cell_index] = time.perf_counter() - seconds[cell_index]
            progress.update()

        NotebookClient(
            notebook,
            timeout=3600,
            kernel_name="python3",
            resources={"metadata": {"path": str(NOTEBOOK.parent)}},
            on_cell_execute=begins,
            on_cell_executed=ends,
        ).execute()
    return {index: spent for index, spent in seconds.items() if notebook.cells[index].cell_type == "code"}


def without_widgets(notebook: nbformat.NotebookNode) -> None:
    """Replace widgets by the text of what was chosen, and remove progress bars, which would be saved empty."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
        cell["outputs"] = [output for output in cell.get("outputs", []) if not _is_bar(output)]
        if cell.cell_type != "code":
            del cell["outputs"]
        cell.metadata.pop("execution", None)


def _is_bar(output: nbformat.NotebookNode) -> bool:
    text = output.get("data", {}).get("text/plain", "") or output.get("text", "")
    return bool(re.search(r"\d+%\|", text))


def to_html(notebook: nbformat.NotebookNode) -> str:
    """A self-contained HTML page."""
    exporter = HTMLExporter(embed_images=True)
    for name in NEEDS_NETWORK:
        if exporter.has_trait(name):
            setattr(exporter, name, "")
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # browsers show MathML; a script for LaTeX would need the network
            cell.source = FORMULA.sub(lambda formula: to_mathml(formula[1]), cell.source)
    page = exporter.from_notebook_node(notebook)[0].replace("</head>", f"{STYLE}</head>", 1)
    return re.sub(r'<script[^>]*\bsrc="[^"]*"[^>]*>\s*</script>', "", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-place", action="store_true")
    options = parser.parse_args()
    os.environ["CI"] = "true"  # nobody uses the demo in this run
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    seconds = execute(notebook)
    without_widgets(notebook)
    if options.in_place:
        nbformat.write(notebook, NOTEBOOK)
        print(f"wrote {NOTEBOOK.name}, {NOTEBOOK.stat().st_size / 1e6:.2f} MB")
    else:
        page = NOTEBOOK.with_suffix(".html")
        page.write_text(to_html(notebook), encoding="utf-8")
        print(f"the executed notebook, with its pictures: {page}")
    print(f"{sum(seconds.values()):.0f} s in all; the slowest cells:")
    for index in sorted(seconds, key=seconds.get, reverse=True)[:SLOWEST]:
        first = next(line for line in notebook.cells[index].source.splitlines() if line.strip())
        print(f"{seconds[index]:7.1f} s  {first[:90]}")


if __name__ == "__main__":
    main()
