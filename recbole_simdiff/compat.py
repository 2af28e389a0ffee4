"""What RecBole 1.2.1 needs to run on today's libraries: one function per fault.

RecBole itself stays untouched. Faults of its data classes are closed by overrides in ``data/``,
those of its trainer in ``training/`` and those of its configuration in ``config/``; this module
holds what has to happen to the process as a whole. Every folder of this package that imports
RecBole applies it first, in its ``__init__.py``.
"""

import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

RECBOLE_VERSION = "1.2.1"


def require_recbole() -> None:
    """Raise a clear ImportError when RecBole is missing; warn when its version is untested.

    Symptom: RecBole 1.2.1 declares ``ray<=2.6.3``, which has no build for Python 3.12 and later,
    so pip either finds no solution or silently installs 1.2.0. Nothing here needs ray.
    May go when RecBole's metadata no longer pins ray.

    Raises:
        ImportError: if RecBole is not installed.
    """
    if importlib.util.find_spec("recbole") is None:
        raise ImportError(
            "recbole_simdiff needs RecBole. On Python 3.12 and later pip cannot resolve its pinned "
            f"ray, which is not needed: run  pip install --no-deps recbole=={RECBOLE_VERSION}"
        )
    version = importlib.metadata.version("recbole")
    if version != RECBOLE_VERSION:
        warnings.warn(
            f"recbole {version} is installed; recbole_simdiff is tested with "
            f"{RECBOLE_VERSION} only (pip install --no-deps recbole=={RECBOLE_VERSION})",
            stacklevel=2,
        )


def restore_numpy_aliases() -> None:
    """Give NumPy the names that RecBole reads and NumPy 1.24 / 2.0 removed; adds missing ones only.

    Symptom: ``AttributeError: module 'numpy' has no attribute 'float'`` in the metrics, in
    ``Interaction`` and while loading data. May go when RecBole uses the built-in types.
    """
    aliases = {
        "float": float,
        "int": int,
        "str": str,
        "object": object,
        "bool": np.bool_,
        "long": np.int64,
        "complex": complex,
        "unicode": str,
    }
    for name, value in aliases.items():
        if name not in np.__dict__:
            setattr(np, name, value)


def defer_scikit_learn() -> None:
    """Let RecBole's metrics import scikit-learn when AUC, MAE or RMSE is computed, and not before.

    Symptom: ``recbole.evaluator.metrics``, which even RecBole's configuration imports, imports all
    of scikit-learn and ``scipy.stats`` for three functions, a second at every start. It is imported
    here, once, with functions of these names that import the real ones when they are called.
    May go when RecBole imports them where it computes these metrics.
    """
    if "sklearn" in sys.modules or "recbole.evaluator.metrics" in sys.modules:
        return
    stand_in = ModuleType("sklearn.metrics")
    for name in ("auc", "mean_absolute_error", "mean_squared_error"):
        vars(stand_in)[name] = _deferred(name)
    sys.modules["sklearn.metrics"] = stand_in
    try:
        importlib.import_module("recbole.evaluator.metrics")
    finally:
        del sys.modules["sklearn.metrics"]


def _deferred(name: str) -> Callable[..., Any]:
    """A function of ``sklearn.metrics``, which is imported when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return vars(importlib.import_module("sklearn.metrics"))[name](*args, **kwargs)

    return call


def import_recbole_models() -> None:
    """Import RecBole's sequential models and leave autograd's anomaly detection as it was.

    Symptom: ``sine.py``, which is imported with every sequential model, calls
    ``torch.autograd.set_detect_anomaly(True)`` at import, so every training step of every model in
    the process pays for NaN checks. Importing here, once, and putting
    the switch back keeps later imports from turning it on. May go when RecBole drops the call.
    """
    before = torch.is_anomaly_enabled()
    importlib.import_module("recbole.model.sequential_recommender")
    torch.autograd.set_detect_anomaly(before)


@cache
def apply() -> None:
    """Apply every fix of this module; calling it again changes nothing."""
    require_recbole()
    restore_numpy_aliases()
    defer_scikit_learn()
    import_recbole_models()
