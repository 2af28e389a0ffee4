"""Fixes that RecBole 1.2.1 needs to run on today's libraries: one function per fault.

RecBole itself is not changed. Faults of its data classes are fixed by overrides in ``data``, those
of its evaluation in ``evaluation``, of its trainer in ``training`` and of its configuration in
``config``. This module holds the fixes that act on the whole process. Every folder of this package
that imports RecBole calls ``apply`` first, in its ``__init__.py``.
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
    Remove when RecBole's metadata no longer pins ray.

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
    """Add the names that RecBole reads and NumPy 1.24 / 2.0 removed, where they are missing.

    Symptom: ``AttributeError: module 'numpy' has no attribute 'float'`` in the metrics, in
    ``Interaction`` and while loading data. Remove when RecBole uses the built-in types.
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
    """Let RecBole's metrics import scikit-learn only when AUC, MAE or RMSE is computed.

    Symptom: RecBole's configuration imports ``recbole.evaluator.metrics``, which imports all of
    scikit-learn and ``scipy.stats`` for three functions. This takes a second at every start. The
    module is imported here once, with three functions that import the real ones when called.
    Remove when RecBole imports them where it computes these metrics.
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
    """A function of ``sklearn.metrics`` that is imported at its first call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return vars(importlib.import_module("sklearn.metrics"))[name](*args, **kwargs)

    return call


def import_recbole_models() -> None:
    """Import RecBole's sequential models and keep the state of autograd's anomaly detection.

    Symptom: ``sine.py``, which is imported with every sequential model, calls
    ``torch.autograd.set_detect_anomaly(True)`` at import. Every training step of every model in the
    process then runs slow NaN checks. The models are imported here once and the switch is set back,
    so that later imports do not turn it on. Remove when RecBole drops the call.
    """
    before = torch.is_anomaly_enabled()
    importlib.import_module("recbole.model.sequential_recommender")
    torch.autograd.set_detect_anomaly(before)


@cache
def apply() -> None:
    """Apply every fix of this module. Further calls change nothing."""
    require_recbole()
    restore_numpy_aliases()
    defer_scikit_learn()
    import_recbole_models()
