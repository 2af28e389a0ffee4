"""Ready-made prefixes of ``benchmark_filename``."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.training.trainer import PlanTrainer
from tests.data.toy import raw, readable, write_atomic


@pytest.fixture
def benchmark(data_path: Path) -> dict[str, Any]:
    """Pre-split sequences in three files; the configuration that reads them."""
    header = "user_id:token,item_id_list:token_seq,item_id:token"
    files = {
        "train": ["u1,i1,i2", "u1,i1 i2,i3", "u2,i4 i5,i1"],
        "valid": ["u1,i1 i2 i3,i4", "u2,i4 i5 i1,i2"],
        "test": ["u1,i1 i2 i3 i4,i5", "u2,i5 i1 i2,i3"],
    }
    for name, rows in files.items():
        write_atomic(data_path / "split" / f"split.{name}.inter", header, rows)
    return {
        "dataset": "split",
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "alias_of_item_id": ["item_id_list"],
        "benchmark_filename": ["train", "valid", "test"],
        "train_sampling": "prefix_last",
    }


@pytest.mark.parametrize("model", ["SimDiffRec", "SASRec"])
def test_benchmark_files_load_train_and_evaluate(
    build: Any, benchmark: dict[str, Any], tmp_path: Path, model: str
) -> None:
    config, train, valid, test, network = build(model, **benchmark)
    assert readable(train._dataset) == [
        ("u1", ["i1"], "i2"),
        ("u1", ["i1", "i2"], "i3"),
        ("u2", ["i4", "i5"], "i1"),
    ]
    assert readable(valid._dataset)[0] == ("u1", ["i1", "i2", "i3"], "i4")
    assert readable(test._dataset)[1] == ("u2", ["i5", "i1", "i2"], "i3")
    batches = list(train)
    assert sum(map(len, batches)) == 3
    losses = network.calculate_loss(batches[0])
    assert torch.isfinite(sum(losses) if isinstance(losses, tuple) else losses)
    result = PlanTrainer(config, network, tmp_path).evaluator.evaluate(test)
    assert result[KEPT]["hit@5"] == 1.0  # there are five items


def test_benchmark_files_cannot_give_whole_histories(
    make_config: Any, benchmark: dict[str, Any]
) -> None:
    config = make_config(**benchmark | {"train_sampling": "user_all"})
    with pytest.raises(UserError, match="user_all needs one interaction a line; benchmark_filen"):
        create_dataset(config).build()


@pytest.mark.parametrize("item", ["item_id", "product"])
def test_histories_and_targets_of_ready_made_prefixes_share_their_numbers(
    make_config: Any, benchmark: dict[str, Any], data_path: Path, item: str
) -> None:
    """Without being told; also of an item that is never a target, and of other columns."""
    files = {
        "train": ["u1,i1 i9,i2,x y,z", "u2,i4,i1,z,y"],
        "valid": ["u1,i1 i2 i3,i4,x,x"],
        "test": ["u2,i5 i1,i3,y,x"],
    }
    fields = [f"{item}_list", item, "shop_list", "shop"]
    header = "user_id:token,{}:token_seq,{}:token,{}:token_seq,{}:token".format(*fields)
    for name, rows in files.items():
        write_atomic(data_path / "split" / f"split.{name}.inter", header, rows)
    values = benchmark | {"alias_of_item_id": None, "ITEM_ID_FIELD": item}
    columns = {"inter": ["user_id", *fields]}
    dataset = create_dataset(make_config(**values | {"load_col": columns}))
    numbers = dataset.field2token_id
    assert numbers[item] == numbers[f"{item}_list"]
    assert set(numbers[item]) == {"[PAD]", *(f"i{k}" for k in (1, 2, 3, 4, 5, 9))}
    assert numbers["shop"] == numbers["shop_list"]
    assert set(numbers["shop"]) == {"[PAD]", "x", "y", "z"}
    assert dataset.item_num == 7
    train = dataset.build()[0]
    assert [raw(train, item, row[row > 0]) for row in train.inter_feat[f"{item}_list"]] == [
        ["i1", "i9"],
        ["i4"],
    ]
    assert raw(train, item, train.inter_feat[item]) == ["i2", "i1"]
    told = create_dataset(
        make_config(**values | {"load_col": columns, "alias_of_item_id": [f"{item}_list"]})
    )
    assert told.field2token_id == numbers


def test_ready_made_prefixes_are_counted_as_such(
    make_config: Any, benchmark: dict[str, Any]
) -> None:
    """Their number says nothing about the length of histories."""
    dataset = create_dataset(make_config(**benchmark))
    line = "2 users, 5 items, 7 ready-made prefixes"
    assert str(dataset.statistics) == str(dataset.build()[1].statistics) == line


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("benchmark_filename", ["train", "test"], "must name three files: training, validation an"),
        ("benchmark_filename", "train", "must be a list of names"),
        ("alias_of_item_id", ["item_list"], r"\['item_list'\].*: user_id, item_id_list, item_id"),
        ("alias_of_item_id", "item_id_list", "must be a list of names"),
        ("alias_of_user_id", ["item_id_list"], "item_id_list cannot be users and items at once"),
        ("load_col", {"inter": ["user_id", "item_id"]}, "item_id_list:token_seq, is not loaded"),
    ],
)
def test_what_ready_made_prefixes_lack_is_named(
    make_config: Any, benchmark: dict[str, Any], key: str, value: Any, message: str
) -> None:
    values = benchmark | {"alias_of_item_id": None}
    with pytest.raises(UserError, match=message if key == "load_col" else f"{key}=.*{message}"):
        create_dataset(make_config(**values | {key: value}))


def test_ready_made_prefixes_without_a_part_are_left_out(
    make_config: Any, benchmark: dict[str, Any], data_path: Path, caplog: Any
) -> None:
    """Of the file that they are in; padding is no target. A file may be a header alone."""
    folder = data_path / "split"
    header = "user_id:token,item_id_list:token_seq,item_id:token"
    rows = ["u1,i1,i2", "u1,,i3", ",i1,i2", "u2,i4 i5,", "u2,i4,i1"]
    write_atomic(folder / "split.train.inter", header, rows)
    write_atomic(folder / "split.valid.inter", header, [])
    train, valid, test = create_dataset(make_config(**benchmark)).build()
    assert readable(train) == [("u1", ["i1"], "i2"), ("u2", ["i4"], "i1")]
    assert len(valid) == 0
    assert readable(test)[0] == ("u1", ["i1", "i2", "i3", "i4"], "i5")
    assert "3 of 7 ready-made prefixes have no user_id, no item_id or no item_id_lis" in caplog.text


@pytest.mark.parametrize("model", ["Caser", "DIN", "FOSSIL", "HGN", "RepeatNet", "SINE"])
def test_ready_made_prefixes_are_as_wide_as_models_expect(
    build: Any, benchmark: dict[str, Any], model: str
) -> None:
    _, train, _, _, network = build(model, **benchmark | {"MAX_ITEM_LIST_LENGTH": 9})
    batch = next(iter(train))
    assert batch["item_id_list"].shape[1] == 9
    assert batch["item_length"].max() <= 2
    assert torch.isfinite(network.calculate_loss(batch))


def test_a_missing_benchmark_file_is_named(make_config: Any, benchmark: dict[str, Any]) -> None:
    config = make_config(**benchmark | {"benchmark_filename": ["train", "valid", "gone"]})
    with pytest.raises(UserError, match=r"split\.gone\.inter does not exist.*--data_path"):
        create_dataset(config)
