"""The script of the figure of DreamRec's generation, on a run on toy data."""

import csv
import runpy
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff import evaluate
from recbole_simdiff.runs.run import run_one as run

SCRIPT = Path(__file__).parents[1] / "docs" / "results" / "generation.py"


def test_every_number_is_an_evaluations(make_config: Any, tmp_path: Path) -> None:
    """Of the settings that its row names; the spread over the seeds is theirs."""
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(SCRIPT))
    result = run(make_config("DreamRec", diffusion_steps=10))
    script["main"]([result.run_dir, str(tmp_path / "figure")])
    with (tmp_path / "figure.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = len(script["GUIDANCE"]) + sum(steps <= 10 for steps in script["STEPS"])
    assert len(rows) == kinds * (1 + script["SEEDS"])
    row = next(
        r for r in rows if (r["swept"], r["value"], r["seed"]) == ("guidance", "4.0", "2022")
    )
    found = evaluate(result.run_dir, {"guidance": 4.0, "sampling_seed": 2022}, test=False)
    expected = found.valid["history kept"]
    assert {name: float(row[name]) for name in expected} == expected
    row = next(r for r in rows if (r["value"], r["noise"]) == ("5", "False"))
    changes = {"sampler": "ddim", "sample_steps": 5, "sample_noise": False}
    found = evaluate(result.run_dir, changes, test=False)
    assert float(row["ndcg@5"]) == found.valid["history kept"]["ndcg@5"]
    assert len((tmp_path / "figure.md").read_text().splitlines()) == 2 + kinds
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_the_summary_is_mean_and_deviation() -> None:
    script = runpy.run_path(str(SCRIPT))
    rows = [
        {"swept": "guidance", "value": 1.0, "noise": True, "seed": seed, "m": float(seed)}
        for seed in (1, 3)
    ]
    assert script["summary"](rows, "guidance", True, "m") == [(1.0, 2.0, 2**0.5)]
    assert script["summary"](rows, "guidance", False, "m") == []
