"""Runs to serve from, trained once."""

from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff import load
from recbole_simdiff.config.config import Config
from recbole_simdiff.runs.run import run_one
from recbole_simdiff.serving.recommender import Recommender
from tests.conftest import SEQUENCES, SMALL, write_inter


def config_of(folder: Path, model: str = "SASRecCE", **changes: Any) -> Config:
    """The configuration of one epoch of a small model on toy, which is written to the folder."""
    write_inter(folder / "dataset", "toy", SEQUENCES)
    known = Config(model, "toy").final_config_dict
    values = {key: value for key, value in SMALL.items() if key in known}
    values |= {"data_path": str(folder / "dataset"), "checkpoint_dir": str(folder / "saved")}
    return Config(model, "toy", overrides=values | {"epochs": 1} | changes)


def train(folder: Path, model: str = "SASRecCE", **changes: Any) -> Path:
    """The run folder of one epoch of a small model on toy."""
    config = config_of(folder, model, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return Path(run_one(config).run_dir)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the encoder alone."""
    return train(tmp_path_factory.mktemp("serving"))


@pytest.fixture
def recommender(run_dir: Path) -> Recommender:
    """Its best epoch."""
    return load(run_dir, use_gpu=False)
