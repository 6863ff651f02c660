"""Make the API reference from the docstrings, public names first: static pages in ``html/``, which need no network."""

import pkgutil
import sys
from pathlib import Path

import pdoc

import ov_decidiffusion

HERE = Path(__file__).parent


def make(out: Path) -> None:
    for name in ov_decidiffusion.__all__:  # pdoc reads a module's dictionary, where lazy names are not yet
        setattr(ov_decidiffusion, name, getattr(ov_decidiffusion, name))
    pdoc.render.configure(docformat="google", template_directory=HERE, show_source=False)
    inside = (one.name for one in pkgutil.iter_modules(ov_decidiffusion.__path__) if one.name != "__main__")
    pdoc.pdoc("ov_decidiffusion", *(f"ov_decidiffusion.{name}" for name in inside), output_directory=out)


if __name__ == "__main__":
    pages = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "html"
    make(pages)
    print(pages / "ov_decidiffusion.html")
