"""The API reference: it is built from the docstrings, shows every public name, and needs no network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ov_decidiffusion

MAKER = Path(__file__).parent.parent / "docs" / "reference" / "make.py"
OUTSIDE = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//')
LINK = re.compile(r'href="([^":#]+\.html)(?:#([^"]+))?"')


@pytest.mark.at_length
def test_the_reference_shows_every_public_name_and_its_links_lead_somewhere(tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", MAKER, tmp_path], check=True)
    front = (tmp_path / "ov_decidiffusion.html").read_text()
    for name in [*ov_decidiffusion.__all__, "OVStableDiffusionPipeline.__call__"]:
        assert f'id="{name}"' in front
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        text = page.read_text()
        assert not OUTSIDE.search(text)
        for target, anchor in LINK.findall(text):
            linked = page.parent / target
            assert linked.is_file(), f"{page.name} links to {target}"
            assert not anchor or f'id="{anchor}"' in linked.read_text(), f"{page.name} links to {target}#{anchor}"
