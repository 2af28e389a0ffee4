"""Diffusion and contrastive sequential recommendation on unmodified RecBole 1.2.1."""

from recbole_simdiff import compat
from recbole_simdiff.version import __version__

compat.apply()

from recbole_simdiff.config.config import Config  # noqa: E402
from recbole_simdiff.errors import UserError  # noqa: E402
from recbole_simdiff.models.registry import available_models, get_model  # noqa: E402
from recbole_simdiff.pipelines.diffuasr import run_augmented  # noqa: E402
from recbole_simdiff.runs.restore import evaluate  # noqa: E402
from recbole_simdiff.runs.result import RunResult  # noqa: E402
from recbole_simdiff.runs.run import run  # noqa: E402
from recbole_simdiff.serving.recommender import Recommender, load  # noqa: E402

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
    "run",
    "run_augmented",
]
