"""Experiments on the tiny data set of tests/conftest.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_simdiff.experiments.spec import Experiment, load_experiment, select
from tests.conftest import SMALL

# For every model; what only some know is left to their defaults.
TINY = {k: v for k, v in SMALL.items() if k not in ("p_uncond", "hidden_size", "inner_size")}
TINY |= {"k_noise": 3, "epochs": 1}
CONTENT = {
    "kind": "ablation",
    "title": "Parts",
    "datasets": ["toy"],
    "seeds": [1, 2],
    "rows": {
        "SimDiffRec": {},
        "w/o both": {"model": "SimDiffRec", "cl_weight": 0, "diff_weight": 0},
    },
    "metrics": ["hit@5", "ndcg@5"],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(key=value, ...) -> path of an experiment's file; a value of None leaves the key out."""

    def make(**changes: Any) -> str:
        path = tmp_path / "parts.yaml"
        content = {k: v for k, v in (CONTENT | changes).items() if v is not None}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return make


@pytest.fixture
def experiment(write: Any, data_path: Path, tmp_path: Path) -> Callable[..., Experiment]:
    """experiment(key=value, ...) -> one whose runs take a second."""

    def make(**changes: Any) -> Experiment:
        command = changes.pop("command", {})
        places = {"data_path": str(data_path), "checkpoint_dir": str(tmp_path / "saved")}
        return select(load_experiment(write(**changes)), command=TINY | places | command)

    return make
