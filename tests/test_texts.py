"""What people read: links lead somewhere, and words are spelled as dictionaries have them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
TEXTS = [ROOT / name for name in TRACKED if name.endswith((".md", ".ipynb")) and (ROOT / name).exists()]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(file: Path) -> str:
    """A file's text without its code."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(file: Path) -> set[str]:
    """What headings can be linked to: as GitHub names them, and in notebooks as Jupyter does."""
    headings = re.findall(r"^#+ (.*)$", prose(file), flags=re.MULTILINE)
    github = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return github | {heading.replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", TEXTS, ids=[str(file.relative_to(ROOT)) for file in TEXTS])
def test_links_lead_somewhere(file):
    for target in LINK.findall(prose(file)):
        if target.startswith(("https://", "http://127.0.0.1", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path) if path else file
        assert linked.exists(), f"{file.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(linked), f"{file.name} links to {target}: no such heading"


def test_words_are_spelled_right(tmp_path):
    files = []
    for file in TEXTS:
        copy = tmp_path / f"{file.parent.name}-{file.name}.md"
        copy.write_text(prose(file), encoding="utf-8")
        files.append(str(copy))
    files += [str(ROOT / name) for name in TRACKED if name.endswith(".py") and (ROOT / name).exists()]
    command = [sys.executable, "-m", "codespell_lib", "--ignore-words-list", "ure,nin,fo,te", *files]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


# Words that a fluent reader stumbles over, each with what says it plainly.
STUMBLES = {
    r"\banew\b": "again",
    r"\bkin of\b": "similar to",
    r"\bwavers?\b": "varies",
    r"\bas wanted\b": "as requested",
    r"\bwhat is none\b": "name it",
    r"\bcoming into being\b": "as it forms",
    r"\bkeep away from\b": "avoid",
    r"\bdifferently well\b": "better",
    r"\bin the way of OpenAI": "OpenAI-compatible",
}


@pytest.mark.parametrize("file", TEXTS, ids=[str(file.relative_to(ROOT)) for file in TEXTS])
def test_sentences_read_themselves(file):
    found = {plain: re.findall(rf".*{pattern}.*", prose(file)) for pattern, plain in STUMBLES.items()}
    assert not {plain: lines for plain, lines in found.items() if lines}


def test_docstrings_and_messages_read_themselves():
    files = [ROOT / name for name in TRACKED if name.startswith("ov_decidiffusion") and name.endswith(".py")]
    found = [
        (file.name, line)
        for file in files
        for pattern in STUMBLES
        for line in re.findall(rf".*{pattern}.*", file.read_text(encoding="utf-8"))
    ]
    assert not found
