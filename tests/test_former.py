"""Checkpoints and records of an earlier version (0.1.0, commit 3f77cec) are read as they were."""

import json
import shutil
from pathlib import Path

import pytest

from recbole_simdiff import checkpoint, evaluate, load
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.config.keys import RETIRED
from recbole_simdiff.experiments.execute import LINES, read_lines
from recbole_simdiff.runs.restore import stored_config

FORMER = Path(__file__).parent / "former"
MODELS = ["CL4SRec", "DiffuASR", "DreamRec", "GRU4Rec", "SimDiffRec"]


@pytest.fixture
def run_of(tmp_path: Path, data_path: Path) -> Path:
    """Copies of the stored runs, two epochs each on ``toy``."""
    return Path(shutil.copytree(FORMER, tmp_path / "former"))


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_gives_the_metrics_it_had(run_of: Path, data_path: Path, model: str) -> None:
    stored = json.loads((run_of / model / "result.json").read_text())
    found = evaluate(run_of / model, {"data_path": str(data_path)})
    for split in ("valid", "test"):
        for protocol, metrics in stored[split].items():
            assert getattr(found, split)[protocol] == pytest.approx(metrics, abs=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_recommends(run_of: Path, model: str) -> None:
    (answer,) = load(run_of / model).recommend([["i1", "i2", "i3"]], k=5)
    assert len(answer.items) == 5


def test_settings_that_came_later_are_what_the_code_did_then(run_of: Path) -> None:
    """SimDiffRec rounded by the table alone, and its chain was not clamped."""
    model = load(run_of / "SimDiffRec").model
    assert model.estimate_scale is None
    assert model.reverse_clamp == "none"


def test_so_they_are_for_a_backbone_of_diffuasr(run_of: Path) -> None:
    former = checkpoint.load(run_of / "SimDiffRec" / BEST)[1]["config"]
    values = {**former["values"], "backbone": "SimDiffRec", "augmenter": "random"}
    stored = {"model": "DiffuASR", "dataset": "toy", "values": values}
    config = stored_config({"config": stored}, {}, ())
    assert (config["rounding"], config["reverse_clamp"]) == ("tied", "none")


def test_settings_that_are_gone_are_passed_over(run_of: Path) -> None:
    """DiffuASR's pseudo-items are in its checkpoint, whatever shaped them."""
    stored = checkpoint.load(run_of / "DiffuASR" / BEST)[1]
    gone = RETIRED["DiffuASR"].keys()
    assert stored["config"]["values"].keys() >= gone
    assert any(
        stored["config"]["values"][key] != value for key, value in RETIRED["DiffuASR"].items()
    )
    assert not gone & stored_config(stored, {}, ()).plain()["values"].keys()


def test_records_are_read(run_of: Path) -> None:
    lines = list(read_lines(run_of / LINES).values())
    assert [line["status"] for line in lines] == ["done"] * 4
    assert {line["row"] for line in lines} == {"SASRec", "CL4SRec"}
