"""Every shipped experiment, end to end on ml-100k, reduced: one seed, one epoch, few users."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_simdiff.cli import main as cli
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import properties_dir
from recbole_simdiff.evaluation.protocols import PROTOCOLS
from recbole_simdiff.experiments.execute import DONE, LINES
from recbole_simdiff.experiments.plots import FORMATS
from recbole_simdiff.experiments.report import LATEX, SIGNIFICANCE, TABLE, VALUES
from recbole_simdiff.experiments.spec import label, load_experiment, select

SHIPPED = sorted(path.stem for path in (properties_dir() / "experiment").glob("*.yaml"))
COMMANDS = {"benchmark": "benchmark", "ablation": "ablate", "sweep": "sweep"}
REDUCED = {
    "epochs": 1,
    "train_fraction": 0.1,
    "user_inter_num_interval": "[100,inf)",
    "MAX_ITEM_LIST_LENGTH": 20,
    "hidden_size": 64,
    "inner_size": 16,
    "n_layers": 1,
    "train_batch_size": 512,
    "embedding_size": 64,
    "diffusion_steps": 20,
    "reverse_steps": 4,
    "sampling_seeds": 1,
    "diffuasr_epochs": 1,
    "diffuasr_sample_steps": 2,
    "sunet_channel_mult": [1],
    "diffuasr_guide_epochs": 1,
    "sunet_res_blocks": 1,
    "augmentation_cache": "augmented",
    "checkpoint_dir": "saved",
    "use_gpu": False,
}


def reduced(name: str, folder: Path) -> Path:
    """The experiment's file with rows that take a second, as far as their models know how."""
    content = yaml.safe_load((properties_dir() / "experiment" / f"{name}.yaml").read_text())
    for title, row in content["rows"].items():
        known = Config(row.get("model", title), "ml-100k").final_config_dict
        own = {**content.get("sweep", {}), **content.get("settings", {}), **row}
        small = {k: v for k, v in REDUCED.items() if k in known and k not in own}
        content["rows"][title] = {**row, **small}
    if "sweep" in content:
        content["sweep"] = {key: values[:3] for key, values in content["sweep"].items()}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def drawn(folder: Path, name: str) -> bool:
    """Whether the figure is there in every format."""
    return all((folder / f"{name}.{suffix}").stat().st_size > 3000 for suffix in FORMATS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("table1", "figure5") else pytest.mark.slow)
        for n in SHIPPED
        if load_experiment(n).kind in COMMANDS
    ],
)
def test_end_to_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Every row, and every point of a sweep, is trained, tested and reported."""
    monkeypatch.chdir(tmp_path)
    path = str(reduced(name, tmp_path))
    experiment = select(load_experiment(path), datasets=["ml-100k"], run_seeds=[1])
    expected = [str(run) for run in experiment.runs()]
    command = COMMANDS[experiment.kind]
    code = cli.main([command, path, "--datasets=ml-100k", "--seeds=1"])
    out, err = capsys.readouterr()
    assert code == 0, err
    records = [json.loads(line) for line in (Path("results") / name / LINES).open()]
    assert {line["status"] for line in records} == {DONE}
    (folder,) = (Path("results") / name).glob("part-*")
    text = (folder / TABLE).read_text()
    assert text.strip() in out
    for protocol in PROTOCOLS:
        assert f"all items ranked, {protocol}" in text
    for run in experiment.runs():
        assert text.count(f"\n| {label(run.row, run.swept)} | 1 | ") == len(PROTOCOLS), run
    rows = list(csv.DictReader((folder / VALUES).open()))
    labels = {(r["row"], r["swept"]) for r in rows}
    assert len(labels) == len(expected) == len(set(expected))
    assert all(0 <= float(r["value"]) <= 1 for r in rows)
    assert r"\bottomrule" in (folder / LATEX).read_text()
    if experiment.kind in ("sweep", "ablation"):
        for protocol in PROTOCOLS:
            assert drawn(folder, f"{name}-ml-100k-{protocol.replace(' ', '-')}")
    if not experiment.sweep:
        compared = list(csv.DictReader((folder / SIGNIFICANCE).open()))
        rivals = {row for row in experiment.rows if row != experiment.reference}
        assert {r["row"] for r in compared if r["against"] == experiment.reference} >= rivals
        assert len({r["users"] for r in compared}) == 1
    for figure in experiment.figures:
        assert drawn(folder, f"{name}-ml-100k-{figure}")


def test_table_1(tmp_path: Path, capsys: Any) -> None:
    arguments = ["benchmark", "table1", "--datasets=ml-100k", f"--output={tmp_path}"]
    assert cli.main(arguments) == 0
    assert "| ml-100k | here | 943 | 1,349 | 99,287 | 105.29 | 92.20 |" in capsys.readouterr().out
