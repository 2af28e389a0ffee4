"""From Python every model and pipeline goes one road, which the command line goes, too."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import recbole_simdiff
from recbole_simdiff import checkpoint, load
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.training.trainer import PlanTrainer

SMALL: dict[str, Any] = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 4,
    "train_batch_size": 4,
    "topk": [1, 2, 5],
    "valid_metric": "NDCG@5",
    "use_gpu": False,
    "show_progress": False,
    "epochs": 2,
}


@pytest.fixture
def values(tmp_path: Path, data_path: Path) -> dict[str, Any]:
    return SMALL | {"data_path": str(data_path), "checkpoint_dir": str(tmp_path / "saved")}


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights and metrics."""
    (a, _), (b, _) = (checkpoint.load(folder / BEST) for folder in (one, other))
    texts = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    return (
        a.keys() == b.keys()
        and all(torch.equal(a[key], b[key]) for key in a if key.startswith("model."))
        and all(texts[0][split] == texts[1][split] for split in ("valid", "test"))
    )


@pytest.mark.parametrize(
    ("model", "own"),
    [
        ("SASRec", {}),
        ("SimDiffRec", {"k_noise": 3}),
        ("DiffuASR", {"backbone": "GRU4Rec", "n_pseudo": 2, "diffuasr_windows": "all"}),
    ],
)
def test_run_is_what_the_command_line_runs(
    values: dict[str, Any], tmp_path: Path, model: str, own: dict[str, Any]
) -> None:
    """A model of RecBole, one of this package, and a pipeline of several runs."""
    own = own | ({"diffuasr_epochs": 2} if model == "DiffuASR" else {})
    result = recbole_simdiff.run(model, "toy", **values, **own)
    assert result.config["model"] == model
    there = values | own | {"checkpoint_dir": str(tmp_path / "there")}
    arguments = [f"--{key}={json.dumps(value)}" for key, value in there.items()]
    command = [sys.executable, "-m", "recbole_simdiff", f"--model={model}", "--dataset=toy"]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
    (other,) = (tmp_path / "there").glob(f"{model}-*")
    assert same(Path(result.run_dir), other)
    assert len(load(result.run_dir).recommend([["i1", "i2"]], k=3)[0].items) == 3


def test_configuration_files_and_values(values: dict[str, Any], tmp_path: Path) -> None:
    """A value wins over a file."""
    (tmp_path / "x.yaml").write_text("learning_rate: 0.5\nhidden_size: 8\n")
    result = recbole_simdiff.run(
        "SASRecCE", "toy", [tmp_path / "x.yaml"], learning_rate=0.01, **values
    )
    assert result.config["values"]["learning_rate"] == 0.01
    assert result.config["values"]["hidden_size"] == 8


def test_a_wrong_value_is_named_as_an_override(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"tau=-1.0 must be positive \(tau from overrides\)"):
        recbole_simdiff.run("SimDiffRec", "toy", tau=-1, **values)


@pytest.mark.parametrize("model", ["SASRecCE", "DiffuASR"])
def test_a_stopped_run_is_resumed(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Of a pipeline, its final run."""
    own = {"augmenter": "random", "n_pseudo": 2} if model == "DiffuASR" else {}
    whole = recbole_simdiff.run(model, "toy", **values, **own)
    stock, runs = PlanTrainer.save_state, []

    def stop(self: PlanTrainer, name: str) -> None:
        stock(self, name)
        if name == LAST and self.progress.epoch == 1 and self.config.name == model and not runs:
            runs.append(self.run_dir)
            raise Interrupted(2, self.run_dir)

    monkeypatch.setattr(PlanTrainer, "save_state", stop)
    with pytest.raises(Interrupted):
        recbole_simdiff.run(model, "toy", **values, **own)
    again = recbole_simdiff.resume(runs[0])
    assert again.run_dir == str(runs[0])
    assert same(Path(again.run_dir), Path(whole.run_dir))
    with pytest.raises(UserError, match="learning_rate cannot be changed"):
        recbole_simdiff.resume(runs[0], learning_rate=0.5)
