"""Leave out what an import brings and nobody here uses."""

import sys
import threading

COMPILER = "torch._dynamo"
_one_at_a_time = threading.Lock()


def import_diffusers() -> None:
    """Import diffusers without PyTorch's compiler, which it asks for one decorator, and which takes a second.

    Where there is no compiler, diffusers takes a decorator that does nothing: what is lost are hints for
    ``torch.compile``. Whoever imported either before keeps them as they are.
    """
    with _one_at_a_time:
        if COMPILER in sys.modules or "diffusers.utils.torch_utils" in sys.modules:
            return
        sys.modules[COMPILER] = None  # type: ignore[assignment]  # Python's way to say that there is none
        try:
            import diffusers.utils.torch_utils  # noqa: F401
        finally:
            sys.modules.pop(COMPILER, None)
