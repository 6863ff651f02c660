"""Progress bars, which are left out where there is nothing to draw them on."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """tqdm's bar; without a console (``pythonw``, a service) ``sys.stderr`` is None, and there is none."""
    if sys.stderr is None and options.get("file") is None:
        options["disable"] = True
    return tqdm(*arguments, **options)
