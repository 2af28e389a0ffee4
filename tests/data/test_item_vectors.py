"""Vectors of items in the item table: every file, every mode, what is missing is counted."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_simdiff import checkpoint, load
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.item_vectors import read_item_vectors
from recbole_simdiff.errors import UserError
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.runs.identity import fingerprint
from recbole_simdiff.runs.restore import evaluate, resumed_config
from recbole_simdiff.runs.run import run_one
from tests.conftest import SEQUENCES
from tests.data.toy import write_atomic

ITEMS = sorted({item for items in SEQUENCES.values() for item in items})
WIDTH = 8
ROWS = np.random.default_rng(3).normal(size=(13, WIDTH)).astype("f4")
VECTORS = dict(zip([*ITEMS, "other"], ROWS, strict=True))
TABLE = "item_embedding.weight"


def write_npz(path: Path, vectors: dict[str, Any] = VECTORS) -> str:
    """The vectors, newest item first, with one of an item that is not in the data."""
    rows = dict(reversed(vectors.items()))
    np.savez(path, ids=np.array([*rows]), vectors=np.array([*rows.values()]))
    return str(path)


def write_list(path: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"vector": [v.tolist() for v in VECTORS.values()], "item_id": [*VECTORS]}
    parquet.write_table(pyarrow.table(rows), path)
    return str(path)


def write_columns(path: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = np.array([*VECTORS.values()])
    columns = {"item_id": [*VECTORS]} | {f"d{k}": rows[:, k] for k in range(WIDTH)}
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def write_item_file(data_path: Path) -> str:
    lines = [f"{item},{' '.join(map(str, vector))}" for item, vector in VECTORS.items()]
    write_atomic(data_path / "toy" / "toy.item", "item_id:token,content:float_seq", lines)
    return "content"


def expected(dataset: Any) -> torch.Tensor:
    return torch.tensor(np.array([VECTORS[item] for item in dataset.item_ids[1:]]))


@pytest.mark.parametrize("kind", ["npz", "list", "columns", "item file"])
def test_vectors_are_those_of_the_items(
    make_config: Any, data_path: Path, tmp_path: Path, kind: str
) -> None:
    given = {
        "npz": lambda: write_npz(tmp_path / "v.npz"),
        "list": lambda: write_list(tmp_path / "v.parquet"),
        "columns": lambda: write_columns(tmp_path / "v.parquet"),
        "item file": lambda: write_item_file(data_path),
    }[kind]()
    config = make_config("SASRecCE", item_vectors=given)
    dataset = create_dataset(config)
    assert torch.equal(read_item_vectors(config, dataset), expected(dataset))


def test_whole_numbers_are_ids(make_config: Any, data_path: Path, tmp_path: Path) -> None:
    lines = [f"u,{k},{k}" for k in range(1, 7)]
    write_atomic(data_path / "n" / "n.inter", "user_id:token,item_id:token,timestamp:float", lines)
    np.savez(tmp_path / "v.npz", ids=np.arange(9), vectors=np.eye(9))
    config = make_config("SASRecCE", "n", item_vectors=str(tmp_path / "v.npz"))
    assert read_item_vectors(config, create_dataset(config)).argmax(1).tolist() == [*range(1, 7)]


@pytest.mark.parametrize("model", ["SASRecCE", "CL4SRec", "CaDiRec", "DreamRec", "GRU4Rec"])
@pytest.mark.parametrize("mode", ["init", "frozen", "added"])
def test_every_mode_trains(make_config: Any, tmp_path: Path, model: str, mode: str) -> None:
    """Also from random vectors that stay as they are, and beside a mask token, which is trained."""
    size = {"embedding_size": WIDTH} if model == "GRU4Rec" else {}
    plain = make_config(model, **size)
    before = build_run(plain)[-1].state_dict()
    given = {"item_vectors": write_npz(tmp_path / "v.npz"), "item_vectors_mode": mode}
    config = make_config(model, **size, **given)
    dataset, *_, network = build_run(config)
    vectors, n = expected(dataset), dataset.item_num
    start = network.state_dict()
    assert start.keys() == before.keys()
    known = before[TABLE][1:n] + vectors if mode == "added" else vectors
    assert torch.equal(start[TABLE][1:n], known)
    assert torch.equal(start[TABLE][n:], before[TABLE][n:])
    assert torch.equal(start[TABLE][0], before[TABLE][0])
    others = [name for name in before if name != TABLE]
    assert all(torch.equal(start[name], before[name]) for name in others)

    result = run_one(config)
    tensors, _ = checkpoint.load(Path(result.run_dir) / LAST)
    after = checkpoint.subset(tensors, "model")
    assert torch.equal(after[TABLE][1:n], known) == (mode == "frozen")
    assert any(not torch.equal(after[name], start[name]) for name in others)
    if model == "CL4SRec":
        assert not torch.equal(after[TABLE][n:], start[TABLE][n:])


def test_a_checkpoint_needs_no_file(make_config: Any, tmp_path: Path) -> None:
    """To recommend, to evaluate and to go on, with the table still frozen."""
    given = {"item_vectors": write_npz(tmp_path / "v.npz"), "item_vectors_mode": "frozen"}
    result = run_one(make_config("CL4SRec", **given))
    (tmp_path / "v.npz").unlink()
    assert load(result.run_dir).recommend([["i1"]], k=2)[0].items
    assert evaluate(result.run_dir).test == result.test
    last = Path(result.run_dir) / LAST
    again = run_one(resumed_config(last, {"epochs": 4, "stopping_step": 9}), resume=last)
    table = checkpoint.subset(checkpoint.load(Path(again.run_dir) / LAST)[0], "model")[TABLE]
    ids = load(result.run_dir).item_ids
    vectors = torch.tensor(np.array([VECTORS[item] for item in ids[1:]]))
    assert torch.equal(table[1 : len(ids)], vectors)


@pytest.mark.parametrize("kind", ["npz", "item file"])
def test_other_vectors_are_another_result(
    make_config: Any, data_path: Path, tmp_path: Path, kind: str
) -> None:
    given = write_npz(tmp_path / "v.npz") if kind == "npz" else write_item_file(data_path)
    config = make_config("SASRecCE", item_vectors=given)
    before = fingerprint(config, "data")
    path = tmp_path / "v.npz" if kind == "npz" else data_path / "toy" / "toy.item"
    path.write_bytes(path.read_bytes() + b"\n")
    assert fingerprint(config, "data") != before


def test_the_log_says_what_was_read(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config("SASRecCE", item_vectors=write_npz(tmp_path / "v.npz"))
    with caplog.at_level(logging.INFO):
        build_run(config)
    assert f"item vectors: 12 of width {WIDTH} from {tmp_path}/v.npz, mode init" in caplog.text


def without(*names: str) -> dict[str, Any]:
    return {item: vector for item, vector in VECTORS.items() if item not in names}


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (without("i1", "i5", "i9"), r"3 of 12 items have no vector, such as i\d+, i\d+, i\d+; ids"),
        (
            VECTORS | {"i3": np.full(WIDTH, np.nan)},
            "1 vectors are not finite, the first that",
        ),
        ({i: v[:3] for i, v in VECTORS.items()}, r"have width 3, the item table has 8\. Set hid"),
    ],
)
def test_vectors_that_do_not_fit(
    make_config: Any, tmp_path: Path, vectors: dict[str, Any], message: str
) -> None:
    config = make_config("SASRecCE", item_vectors=write_npz(tmp_path / "v.npz", vectors))
    with pytest.raises(UserError, match=message):
        build_run(config)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"vectors": np.eye(3)}, "must hold the arrays ids"),
        ({"ids": np.arange(2), "vectors": np.eye(3)}, r"their shapes are \(2,\) and \(3, 3\)"),
        ({"ids": np.array(["a", None]), "vectors": np.eye(2)}, "must hold the arrays ids"),
        ({"ids": np.zeros(3, int), "vectors": np.eye(3)}, "2 ids have more than one vector"),
    ],
)
def test_archives_that_are_none(
    make_config: Any, tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "v.npz", **arrays)
    config = make_config("SASRecCE", item_vectors=str(tmp_path / "v.npz"))
    with pytest.raises(UserError, match=message):
        build_run(config)


def test_places_without_vectors(make_config: Any, data_path: Path, tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "no.npz"): "does not exist",
        "content": "neither a .npz nor a .parquet file, and .*toy.item, .* does not exist",
    }
    for given, message in cases.items():
        with pytest.raises(UserError, match=message):
            build_run(make_config("SASRecCE", item_vectors=given))
    write_item_file(data_path)
    with pytest.raises(UserError, match=r"needs the columns item_id:token and other:float_seq"):
        build_run(make_config("SASRecCE", item_vectors="other"))


def test_models_and_settings_that_cannot_have_them(make_config: Any, tmp_path: Path) -> None:
    given = {"item_vectors": write_npz(tmp_path / "v.npz")}
    with pytest.raises(UserError, match=r"item_vectors_mode='fixed' .* init, frozen, added"):
        make_config("SASRecCE", **given, item_vectors_mode="fixed")
    with pytest.raises(UserError, match=r"frozen needs weight_decay=0, which is 0\.1"):
        build_run(make_config("SASRecCE", **given, item_vectors_mode="frozen", weight_decay=0.1))
    with pytest.raises(UserError, match="model=FPMC has no table of all items"):
        build_run(make_config("FPMC", **given))
