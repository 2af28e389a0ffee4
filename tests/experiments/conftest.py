"""Experiments on the tiny data set of tests/conftest.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_simdiff.config.config import Config
from recbole_simdiff.experiments.spec import Experiment, load_experiment, select
from tests.conftest import SMALL


def tiny(*models: str) -> dict[str, Any]:
    """Values under which runs of these models take a second; only those that all of them know."""
    known = [set(Config(model, "ml-100k").final_config_dict) for model in models]
    values = SMALL | {"epochs": 1}
    return {k: v for k, v in values.items() if all(k in keys for keys in known)}


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
        made = load_experiment(write(**changes))
        values = tiny(*{run.model for run in made.runs()})
        return select(made, command=values | places | command)

    return make
