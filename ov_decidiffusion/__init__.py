"""DeciDiffusion on OpenVINO: converts a checkpoint to a model folder, and makes pictures from text."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which do not run ``__getattr__``
    from ov_decidiffusion.conversion.convert import convert_checkpoint as convert_checkpoint
    from ov_decidiffusion.conversion.hub import find_checkpoint as find_checkpoint
    from ov_decidiffusion.demo.app import make_demo as make_demo
    from ov_decidiffusion.generation.metadata import made_with as made_with
    from ov_decidiffusion.generation.metadata import settings_of as settings_of
    from ov_decidiffusion.model_folder.integrity import verify_model_dir as verify_model_dir
    from ov_decidiffusion.pipeline import OVStableDiffusionPipeline as OVStableDiffusionPipeline
    from ov_decidiffusion.quantize import quantize_models as quantize_models
    from ov_decidiffusion.schedulers.registry import SUPPORTED_SCHEDULERS as SUPPORTED_SCHEDULERS

if os.path.expanduser("~") == "~":  # no home folder, as in containers: OpenVINO asks for one when it is imported
    os.environ["HOME"] = "/nonexistent"  # Debian's home for users without one

# OpenVINO and NNCF would report each import and each conversion to Google Analytics. Without the package that reports
# they do not; where OpenVINO was imported before, that package is told that its user declines.
if "openvino_telemetry" in sys.modules:
    from openvino_telemetry.utils.opt_in_checker import ConsentCheckResult, OptInChecker

    OptInChecker.check = lambda *_, **__: ConsentCheckResult.DECLINED
else:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's way to say that there is none

__version__ = "1.1.0"
_PLACES = {
    "OVStableDiffusionPipeline": "pipeline",
    "SUPPORTED_SCHEDULERS": "schedulers.registry",
    "convert_checkpoint": "conversion.convert",
    "find_checkpoint": "conversion.hub",
    "make_demo": "demo.app",
    "made_with": "generation.metadata",
    "quantize_models": "quantize",
    "settings_of": "generation.metadata",
    "verify_model_dir": "model_folder.integrity",
}
__all__ = sorted(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]  # each name is listed once, above


def __getattr__(name: str) -> Any:
    """Import each name when it is first used: torch and OpenVINO take seconds to import."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
