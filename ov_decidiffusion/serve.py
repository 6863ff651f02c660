"""The names by which the server is started: ``create_app`` for any ASGI server, ``app`` for Ray's ``serve run``."""

from typing import Any

from ov_decidiffusion.server.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    """``app``, for ``serve run ov_decidiffusion.serve:app``: many pipelines behind one address, with Ray Serve."""
    if name == "app":
        from ov_decidiffusion.server.replicas import make_application

        return make_application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
