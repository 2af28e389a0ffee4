"""Diffusion and contrastive sequential recommendation on unmodified RecBole 1.2.1.

Importing the package is cheap: torch and RecBole are imported when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from recbole_simdiff.version import __version__

if TYPE_CHECKING:
    from recbole_simdiff.api import resume, run
    from recbole_simdiff.config.config import Config
    from recbole_simdiff.errors import UserError
    from recbole_simdiff.models.registry import available_models, get_model
    from recbole_simdiff.runs.restore import evaluate
    from recbole_simdiff.runs.result import RunResult
    from recbole_simdiff.serving.recommender import Recommender, load

__all__ = [
    "Config",
    "Recommender",
    "RunResult",
    "UserError",
    "__version__",
    "available_models",
    "evaluate",
    "get_model",
    "load",
    "resume",
    "run",
]

# Public name -> the module that has it.
_MODULES = {
    "Config": "config.config",
    "Recommender": "serving.recommender",
    "RunResult": "runs.result",
    "UserError": "errors",
    "available_models": "models.registry",
    "evaluate": "runs.restore",
    "get_model": "models.registry",
    "load": "serving.recommender",
    "resume": "api",
    "run": "api",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
