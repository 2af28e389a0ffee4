"""From Python every model and pipeline goes one road, which the command line goes, too."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import recbole_simdiff
from recbole_simdiff import checkpoint, load
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.data.frames import write_frame
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.experiments import results
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import SEQUENCES

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


# ---------------------------------------------------------------- RecBole's function


def test_run_recbole_returns_what_recboles_does(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("model: SASRecCE\nhidden_size: 8\n")
    found = recbole_simdiff.run_recbole(
        dataset="toy", config_file_list=[tmp_path / "x.yaml"], config_dict=values
    )
    result = found["result"]
    assert result.config["values"]["hidden_size"] == 8
    assert found["best_valid_result"] == result.valid["history kept"]
    assert found["test_result"] == result.test["history kept"]
    assert found["best_valid_score"] == result.valid["history kept"]["ndcg@5"]
    assert found["valid_score_bigger"] is True
    assert (
        recbole_simdiff.run_recbole("SASRecCE", "toy", None, values | {"hidden_size": 8})[
            "test_result"
        ]
        == found["test_result"]
    )
    with pytest.raises(UserError, match="needs model and dataset"):
        recbole_simdiff.run_recbole("SASRec")


# ---------------------------------------------------------------- a DataFrame as a data set


def frame(**columns: str) -> pd.DataFrame:
    """The data set ``toy``, with other names of columns."""
    rows = [(u, i, t) for u, own in SEQUENCES.items() for t, i in enumerate(own)]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return table.rename(columns=columns)


def test_a_dataframe_is_the_data_set_of_its_interactions(values: dict[str, Any]) -> None:
    toy = recbole_simdiff.run("SASRecCE", "toy", **values)
    table = frame(user_id="session", item_id="sku", timestamp="ts").sample(frac=1, random_state=0)
    names = {"user": "session", "item": "sku", "time": "ts"}
    del values["load_col"]
    result = recbole_simdiff.run("SASRecCE", table, **names, **values)
    assert result.statistics == toy.statistics
    assert result.config["dataset"].startswith("frame-")
    again = recbole_simdiff.run("SASRecCE", table, **names, **values)
    assert again.config["dataset"] == result.config["dataset"]
    assert again.test == result.test
    assert recbole_simdiff.evaluate(result.run_dir).test == result.test
    assert recbole_simdiff.resume(result.run_dir, epochs=3).epochs == 3
    assert load(result.run_dir).history("e") == ["i5", "i6", "i7"]
    assert load(result.run_dir).config.data_root == values["data_path"]
    changed = table.assign(sku=table["sku"].replace("i7", "i6"))
    other = recbole_simdiff.run("SASRecCE", changed, **names, **values)
    assert other.config["dataset"] != result.config["dataset"]


def test_dates_and_numbers_are_ids_and_times(tmp_path: Path) -> None:
    """Exact to the nanosecond, before 1970, and with time zones."""
    times = pd.to_datetime(
        ["1969-12-31 23:59:59.75", "2024-01-01", "2024-01-01 00:00:00.123456789"],
        format="ISO8601",
        utc=True,
    )
    table = pd.DataFrame({"user_id": [1, 1, 2], "item_id": ["a b", 'q"', "ü"], "timestamp": times})
    local = table.assign(timestamp=table["timestamp"].dt.tz_convert("Asia/Tokyo"))
    name = write_frame(table, tmp_path)
    assert write_frame(local, tmp_path) == name
    assert (tmp_path / name / f"{name}.inter").read_text().splitlines() == [
        "user_id:token\titem_id:token\ttimestamp:float",
        "1\ta b\t-0.250000000",
        '1\tq"\t1704067200.000000000',
        "2\tü\t1704067200.123456789",
    ]


@pytest.mark.parametrize(
    ("changed", "given", "message"),
    [
        ({}, {"user": "who"}, r"user='who' must be one column .* it has user_id, item_id, times"),
        ({"item_id": None}, {}, r"item='item_id': 30 of 30 rows have no id; drop them"),
        ({"item_id": "a\tb"}, {}, r"the id 'a\\tb' has a tab or a line break in it"),
        ({"user_id": "a\n"}, {}, r"the id 'a\\n' has a tab or a line break in it"),
        ({"timestamp": "2024-01-01"}, {}, r"must be of numbers or dates, not .* pandas.to_dateti"),
        ({"timestamp": float("nan")}, {}, r"time='timestamp': 30 of 30 rows have no time"),
        ({"timestamp": float("inf")}, {}, r"time='timestamp' must be of finite numbers"),
        ({"timestamp": True}, {}, r"must be of numbers or dates, not bool"),
    ],
)
def test_a_dataframe_that_cannot_be_used(
    values: dict[str, Any], changed: dict[str, Any], given: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        recbole_simdiff.run("SASRec", frame().assign(**changed), **given, **values)


def test_columns_of_what_is_no_dataframe(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="user, item and time name columns of a DataFrame, and"):
        recbole_simdiff.run("SASRec", "toy", user="session", **values)


# ---------------------------------------------------------------- tables, searches, values


def test_results_as_tables(values: dict[str, Any]) -> None:
    result = recbole_simdiff.run("SASRecCE", "toy", **values)
    table = result.to_frame()
    assert list(table["split"]) == ["valid", "valid", "test", "test"]
    assert list(table["protocol"]) == ["history kept", "history removed"] * 2
    assert (
        table.set_index(["split", "protocol"]).loc[("test", "history kept")].to_dict()
        == (result.test["history kept"])
    )


def test_benchmark_returns_its_runs(values: dict[str, Any], tmp_path: Path) -> None:
    """The second call trains what is missing, and returns all that it names."""
    short = values | {"epochs": np.int64(1), "topk": [1, 5]}
    first = recbole_simdiff.benchmark(["SASRecCE"], "toy", seeds=[1], **short)
    table = recbole_simdiff.benchmark(["SASRecCE"], frame(), seeds=(1, 2), **short)
    assert list(first["seed"]) == [1] * 4
    assert list(table["seed"]) == [1] * 4 + [2] * 4
    assert set(table.columns) >= {"row", "model", "dataset", "protocol", "hit@5", "run_dir"}
    (folder,) = (tmp_path / "results").iterdir()
    pd.testing.assert_frame_equal(
        results.to_frame(folder), pd.concat([first, table], ignore_index=True)
    )
    assert len(list(folder.glob("part-*/table.md"))) == 2
    with pytest.raises(UserError, match="give the folder of an experiment"):
        results.to_frame(tmp_path)


def test_messages_name_overrides_and_not_the_command_line(values: dict[str, Any]) -> None:
    (Path.cwd() / "x.hyper").write_text("n_layers choice [1,2]\n")
    for call in (
        lambda: recbole_simdiff.run("SASRec", "toy", learning_rate=np.float64(-1), **values),
        lambda: recbole_simdiff.run("SASRec", "toy", learning_rte=1, **values),
        lambda: recbole_simdiff.benchmark("SASRec", "toy", seed=1, **values),
        lambda: recbole_simdiff.tune("SASRec", "toy", "x.hyper", n_layers=1, **values),
    ):
        with pytest.raises(UserError) as refused:
            call()
        assert "command line" not in str(refused.value)


def test_values_of_numpy_are_numbers(values: dict[str, Any]) -> None:
    given = {
        "learning_rate": np.float32(0.5),
        "hidden_size": np.int64(8),
        "mask_pad_in_softmax": np.bool_(True),
        "topk": np.array([1, 5]),
    }
    result = recbole_simdiff.run("SASRecCE", "toy", **values | given)
    stored = result.config["values"]
    assert (stored["learning_rate"], stored["hidden_size"]) == (0.5, 8)
    assert stored["mask_pad_in_softmax"] is True
    assert stored["topk"] == [1, 5]


def test_arguments_of_the_process_are_not_read(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's kernel has some of its own, and handlers that stay."""
    monkeypatch.setattr(sys, "argv", ["kernel", "--learning_rate=0.5", "-f", "kernel.json"])
    before = list(logging.getLogger().handlers)
    result = recbole_simdiff.run("SASRecCE", "toy", **values)
    assert result.config["values"]["learning_rate"] == 0.001
    assert logging.getLogger().handlers == before
