"""Progress bars, which are left out if there is no console."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """tqdm's progress bar; disabled without a console (``pythonw``, a service), where ``sys.stderr`` is None."""
    if sys.stderr is None and options.get("file") is None:
        options["disable"] = True
    return tqdm(*arguments, **options)
