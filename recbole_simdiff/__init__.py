"""Diffusion and contrastive sequential recommendation on unmodified RecBole 1.2.1."""

from recbole_simdiff import compat

compat.apply()

from recbole_simdiff.errors import UserError  # noqa: E402
from recbole_simdiff.models import available_models, get_model  # noqa: E402

__version__ = "0.1.0"
__all__ = ["UserError", "available_models", "get_model"]
