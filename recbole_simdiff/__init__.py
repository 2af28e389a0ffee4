"""Diffusion and contrastive sequential recommendation on unmodified RecBole 1.2.1.

Importing the package is cheap: torch and RecBole are imported when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from recbole_simdiff.version import __version__

if TYPE_CHECKING:
    from recbole_simdiff.api import benchmark, resume, run, run_recbole, tune
    from recbole_simdiff.config.config import Config
    from recbole_simdiff.errors import UserError
    from recbole_simdiff.models.registry import available_models, get_model
    from recbole_simdiff.modules.base import SequentialModel
    from recbole_simdiff.runs.restore import evaluate
    from recbole_simdiff.runs.result import RunResult
    from recbole_simdiff.serving.recommender import Recommender, load

__all__ = [
    "Config",
    "Recommender",
    "RunResult",
    "SequentialModel",
    "UserError",
    "__version__",
    "available_models",
    "benchmark",
    "evaluate",
    "get_model",
    "load",
    "resume",
    "run",
    "run_recbole",
    "tune",
]

# Public name -> the module that has it.
_MODULES = {
    "Config": "config.config",
    "Recommender": "serving.recommender",
    "RunResult": "runs.result",
    "SequentialModel": "modules.base",
    "UserError": "errors",
    "available_models": "models.registry",
    "benchmark": "api",
    "evaluate": "runs.restore",
    "get_model": "models.registry",
    "load": "serving.recommender",
    "resume": "api",
    "run": "api",
    "run_recbole": "api",
    "tune": "api",
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
