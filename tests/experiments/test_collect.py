"""A table of single runs."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.cli.main import main
from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.evaluation.rankings import RANKS
from recbole_simdiff.experiments.collect import collect
from recbole_simdiff.runs.result import RESULT, read_result
from recbole_simdiff.runs.run import run_one


@pytest.fixture
def runs(make_config: Any) -> dict[str, Path]:
    """Folders of SASRecCE with two seeds and with another dropout, and of CL4SRec."""
    settings = {
        "one": ("SASRecCE", {}),
        "two": ("SASRecCE", {"seed": 7}),
        "other": ("SASRecCE", {"hidden_dropout_prob": 0.1}),
        "cl": ("CL4SRec", {}),
    }
    made = {}
    for name, (model, values) in settings.items():
        config = make_config(model, epochs=1, save_rankings=True, **values)
        made[name] = Path(run_one(config).run_dir)
    return made


def edited(folder: Path, **values: Any) -> None:
    """Change settings in a run's ``result.json``."""
    content = json.loads((folder / RESULT).read_text())
    content["config"]["values"] |= values
    (folder / RESULT).write_text(json.dumps(content))


def test_runs_that_differ_in_the_seed_are_one_row(runs: dict[str, Path]) -> None:
    found = collect([runs[name] for name in ("one", "two", "cl")])
    assert list(found.experiment.rows) == ["SASRecCE", "CL4SRec"]
    assert found.experiment.reference == "SASRecCE"
    cell, *_ = found.cells
    values = [read_result(runs[name]).test[KEPT]["hit@5"] for name in ("one", "two")]
    assert list(found.cells[cell].values("hit@5", KEPT).values()) == values
    assert found.cells[cell].mean("hit@5", KEPT) == pytest.approx(sum(values) / 2)


def test_several_settings_of_a_model_are_named(runs: dict[str, Path]) -> None:
    labels = list(collect(list(runs.values())).experiment.rows)
    assert labels == [
        "SASRecCE, hidden_dropout_prob=0.5",
        "SASRecCE, hidden_dropout_prob=0.1",
        "CL4SRec",
    ]


def test_the_command_writes_the_tables(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    given = [str(runs[name]) for name in ("one", "two", "cl")]
    assert main(["collect", *given, "--reference=CL4SRec", f"--output={output}"]) == 0
    out = capsys.readouterr().out
    assert (output / "table.md").read_text().strip() in out
    assert "| SASRecCE | 2 |" in out
    assert "against CL4SRec" in out
    assert "Wilcoxon" in (output / "table.tex").read_text()
    assert str(tmp_path) not in (output / "table.tex").read_text()
    (first, *_) = csv.DictReader((output / "significance.csv").open())
    assert first["against"] == "CL4SRec"
    assert 0 <= float(first["p_wilcoxon"]) <= 1


def test_without_rankings_there_are_no_tests(
    runs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    (runs["cl"] / RANKS).unlink()
    given = [str(runs[name]) for name in ("one", "cl")]
    assert main(["collect", *given, f"--output={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "| CL4SRec | 1 |" in out
    assert f"evaluate --checkpoint={runs['cl']} --save_rankings=True" in out
    assert not (tmp_path / "out" / "significance.csv").exists()


def test_what_cannot_be_compared_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["collect", *arguments]) == 2
        return str(capsys.readouterr().err)

    one, cl = str(runs["one"]), str(runs["cl"])
    assert "not one of the rows SASRecCE; CL4SRec" in refused(one, cl, "--reference=X")
    assert "collect does not know --epochs" in refused(one, "--epochs=2")
    assert "is not the result of a finished run" in refused(str(tmp_path))
    edited(runs["two"], seed=2020)
    assert "have the same settings and seed=2020" in refused(one, str(runs["two"]))
    edited(runs["cl"], user_inter_num_interval="[9,inf)")
    assert "user_inter_num_interval" in refused(one, cl)
    content = json.loads((runs["cl"] / RESULT).read_text())
    (runs["cl"] / RESULT).write_text(json.dumps(content | {"test": {}}))
    assert "was tested on nothing" in refused(one, cl)
