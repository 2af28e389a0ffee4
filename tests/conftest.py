"""Shared fixtures: tiny data sets checked by eye, and a config for them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders

# Tiny tensors are up to ten times slower with threads that wait for one another.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start

# user -> items in time order. 12 items; lengths 2..9, so all cases of the split occur.
SEQUENCES = {
    "a": ["i1", "i2", "i3", "i4", "i5", "i6", "i7", "i8", "i9"],
    "b": ["i2", "i3", "i5", "i1", "i10"],
    "c": ["i9", "i8", "i7", "i6", "i11", "i12", "i1"],
    "d": ["i4", "i2", "i12", "i11"],
    "e": ["i5", "i6", "i7"],
    "f": ["i10", "i1"],
}
SMALL = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 4,
    "hidden_size": 8,
    "inner_size": 16,
    "k_noise": 3,
    "diffusion_steps": 20,
    "reverse_steps": 4,
    "p_uncond": 0.5,  # so that a batch of four has rows with and without their condition
    "train_batch_size": 4,
    "topk": [1, 2, 5],
    "valid_metric": "NDCG@5",
    "show_progress": False,
    "use_gpu": False,
    "epochs": 2,
}


def write_inter(folder: Path, name: str, sequences: dict[str, list[str]]) -> Path:
    """Write ``folder/name/name.inter``; the timestamp is the position in the sequence."""
    path = folder / name / f"{name}.inter"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, items in sequences.items():
        lines += [f"{user}\t{item}\t{time}" for time, item in enumerate(items)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def data_path(tmp_path: Path) -> Path:
    """A folder with the data set ``toy``."""
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    return tmp_path / "dataset"


@pytest.fixture
def make_config(tmp_path: Path, data_path: Path) -> Any:
    """Config of a tiny model on ``toy``: make_config(model, key=value, ...)."""

    def make(model: str = "SimDiffRec", dataset: str = "toy", **overrides: Any) -> Config:
        values: dict[str, Any] = dict(SMALL)
        values |= {"data_path": str(data_path), "checkpoint_dir": str(tmp_path / "saved")}
        known = set(Config(model, "ml-100k").final_config_dict)
        values = {k: v for k, v in values.items() if k in known} | overrides
        return Config(model, dataset, overrides=values)

    return make


@pytest.fixture
def build(make_config: Any) -> Any:
    """build(model, key=value, ...) -> (config, training loader, valid, test, model), seeded."""

    def make(model: str = "SimDiffRec", dataset: str = "toy", **overrides: Any) -> Any:
        config = make_config(model, dataset, **overrides)
        torch.manual_seed(0)
        train, valid, test = create_loaders(config, create_dataset(config))
        return config, train, valid, test, config.model_class(config, train._dataset)

    return make


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole writes log_tensorboard/ into the working directory."""
    monkeypatch.chdir(tmp_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The battery of tests/test_own_models.py runs over a model of the user's own, too."""
    parser.addoption("--own_model", metavar="FILE.py:CLASS", help="a model of your own to test")
