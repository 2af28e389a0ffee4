"""What the package does to the process so that RecBole runs on today's libraries."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from recbole_simdiff import compat

ALIASES = ("float", "int", "str", "object", "bool", "long", "complex", "unicode")


def test_missing_numpy_names_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALIASES:
        monkeypatch.delattr(np, name)
    compat.restore_numpy_aliases()
    assert [np.float, np.int, np.str, np.object, np.complex] == [float, int, str, object, complex]
    assert np.zeros(1, dtype=np.long).dtype == np.int64
    assert np.array([True]).astype(np.bool).dtype == np.bool_
    assert np.array(["a"]).astype(np.unicode).dtype.kind == "U"


def test_numpy_names_that_exist_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = object()
    for name in ALIASES:
        monkeypatch.setattr(np, name, mark)
    compat.restore_numpy_aliases()
    assert all(getattr(np, name) is mark for name in ALIASES)


def test_importing_the_package_leaves_the_process_as_it_was() -> None:
    """NumPy 2 defines two of the names itself; RecBole would bend them."""
    code = (
        "import numpy as np; before = {n: np.__dict__.get(n) for n in ('bool', 'long')}\n"
        "import recbole_simdiff\n"
        "recbole_simdiff.Config('SASRec', 'toy')\n"
        "assert all(np.__dict__[n] is v for n, v in before.items() if v is not None)\n"
        "assert np.float is float\n"
        # sine.py, which comes with every sequential model, turns anomaly detection on.
        "import torch, recbole.model.sequential_recommender\n"
        "from recbole_simdiff import available_models\n"
        "assert 'SINE' in available_models() and 'SimDiffRec' in available_models()\n"
        "assert 'recbole.model.sequential_recommender.sine' in __import__('sys').modules\n"
        "assert not torch.is_anomaly_enabled(), 'anomaly detection is on'\n"
        "assert 'ray' not in __import__('sys').modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scikit_learn_is_imported_when_a_metric_needs_it() -> None:
    """Not by RecBole's metrics as such, which everything imports."""
    code = (
        "import sys; import recbole_simdiff.config.config\n"
        "from recbole.evaluator import metrics\n"
        "late = ('sklearn', 'sklearn.metrics', 'scipy.stats')\n"
        "assert not set(late) & sys.modules.keys()\n"
        "assert metrics.sk_auc([0, 1], [0, 1]) == 0.5\n"
        "assert metrics.mean_absolute_error([1, 2], [2, 4]) == 1.5\n"
        "assert metrics.mean_squared_error([1, 2], [2, 4]) == 2.5\n"
        "from sklearn.metrics import roc_auc_score\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scikit_learn_that_is_there_is_used() -> None:
    code = (
        "import sklearn.metrics; import recbole_simdiff.config.config\n"
        "from recbole.evaluator import metrics\n"
        "assert metrics.sk_auc is sklearn.metrics.auc\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("before", [True, False])
def test_anomaly_detection_stays_as_the_user_set_it(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_that_meddles(name: str) -> None:
        assert name == "recbole.model.sequential_recommender"
        torch.autograd.set_detect_anomaly(not before)

    monkeypatch.setattr(compat.importlib, "import_module", import_that_meddles)
    try:
        torch.autograd.set_detect_anomaly(before, check_nan=False)
        compat.import_recbole_models()
        assert torch.is_anomaly_enabled() is before
    finally:
        torch.autograd.set_detect_anomaly(False)


def test_a_missing_recbole_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs RecBole.*pip install --no-deps recbole==1\.2\.1"):
        compat.require_recbole()


def test_another_version_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.0")
    message = r"recbole 1\.2\.0 is installed; recbole_simdiff is tested with 1\.2\.1 only.*--no-de"
    with pytest.warns(UserWarning, match=message):
        compat.require_recbole()


def test_the_tested_version_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: compat.RECBOLE_VERSION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.require_recbole()
