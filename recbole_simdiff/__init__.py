"""Diffusion and contrastive sequential recommendation on unmodified RecBole 1.2.1."""

__version__ = "0.1.0"

from recbole_simdiff import compat

compat.apply()

from recbole_simdiff.augmentation import run_augmented  # noqa: E402
from recbole_simdiff.config import Config  # noqa: E402
from recbole_simdiff.errors import UserError  # noqa: E402
from recbole_simdiff.inference import Recommender, load  # noqa: E402
from recbole_simdiff.models import available_models, get_model  # noqa: E402
from recbole_simdiff.run import RunResult, evaluate, run  # noqa: E402

__all__ = [
    "Config",
    "Recommender",
    "RunResult",
    "UserError",
    "available_models",
    "evaluate",
    "get_model",
    "load",
    "run",
    "run_augmented",
]
