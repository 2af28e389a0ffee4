"""Values of columns: missing ones, sequences, numbers, additional files."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.dataset import SequentialDataset

from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import UserError
from tests.data.toy import LOAD, RecBoleRows, raw, write_atomic


@pytest.fixture
def with_holes(data_path: Path) -> Path:
    """A data set whose optional columns have empty cells."""
    folder = data_path / "holes"
    write_atomic(
        folder / "holes.inter",
        "user_id:token,item_id:token,timestamp:float,rating:float,place:token,tags:token_seq",
        [
            "u1,i1,1,2.0,home,red blue",
            "u1,i2,2,,,",
            "u1,i3,3,4.0,shop,blue",
            "u1,i1,4,3.0,home,",
            "u2,i2,1,,shop,red",
            "u2,i3,2,3.0,,green",
            "u2,i1,3,3.0,home,red",
            "u2,i2,4,3.0,home,red",
        ],
    )
    write_atomic(
        folder / "holes.item",
        "item_id:token,kind:token,genre:token_seq,year:float,vector:float_seq",
        ["i1,a,x y,1990,0.5 1.5", "i2,,,,", "i3,b,y,2000,2.5"],
    )
    return folder


def test_missing_values_of_interactions(make_config: Any, with_holes: Path) -> None:
    config = make_config(dataset="holes", load_col=None, k_noise=1)
    dataset = create_dataset(config)
    dataset.build()
    flat = dataset.flat
    assert flat["rating"].tolist() == [2.0, 3.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0]  # 3.0 is the mean
    assert raw(dataset, "place", flat["place"]) == [
        *("home", "[PAD]", "shop", "home"),
        *("shop", "[PAD]", "home", "home"),
    ]
    assert [raw(dataset, "tags", row) for row in flat["tags"]] == [
        ["red", "blue"],
        ["[PAD]", "[PAD]"],
        ["blue", "[PAD]"],
        ["[PAD]", "[PAD]"],
        ["red", "[PAD]"],
        ["green", "[PAD]"],
        ["red", "[PAD]"],
        ["red", "[PAD]"],
    ]


def test_missing_values_of_items(make_config: Any, with_holes: Path) -> None:
    config = make_config(
        dataset="holes",
        load_col={**LOAD, "item": ["item_id", "kind", "genre", "year", "vector"]},
        k_noise=1,
    )
    dataset = create_dataset(config)
    dataset.build()
    item = dataset.get_item_feature()
    ids = raw(dataset, "item_id", item["item_id"])
    rows = {name: k for k, name in enumerate(ids)}
    assert raw(dataset, "kind", item["kind"][[rows["i1"], rows["i2"], rows["i3"]]]) == [
        *("a", "[PAD]", "b")
    ]
    assert raw(dataset, "genre", item["genre"][rows["i1"]]) == ["x", "y"]
    assert raw(dataset, "genre", item["genre"][rows["i2"]]) == ["[PAD]", "[PAD]"]
    assert item["year"][[rows["i1"], rows["i2"], rows["i3"]]].tolist() == [1990, 1995, 2000]
    assert item["vector"][rows["i2"]].tolist() == [0, 0]
    assert item["vector"][rows["i3"]].tolist() == [2.5, 0]


def test_items_without_a_line_in_the_item_file(make_config: Any, with_holes: Path) -> None:
    path = with_holes / "holes.item"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # i3 is gone
    config = make_config(
        dataset="holes",
        load_col={**LOAD, "item": ["item_id", "kind", "genre"]},
        filter_inter_by_user_or_item=False,
        k_noise=1,
    )
    dataset = create_dataset(config)
    dataset.build()
    item = dataset.get_item_feature()
    row = raw(dataset, "item_id", item["item_id"]).index("i3")
    assert raw(dataset, "genre", item["genre"][row]) == ["[PAD]", "[PAD]"]
    assert raw(dataset, "kind", item["kind"][[row]]) == ["[PAD]"]


def test_sequence_cells_are_cut_to_seq_len(make_config: Any, with_holes: Path) -> None:
    config = make_config(
        dataset="holes",
        load_col={**LOAD, "item": ["item_id", "genre"]},
        seq_len={"genre": 1},
        k_noise=1,
    )
    dataset = create_dataset(config)
    dataset.build()
    item = dataset.get_item_feature()
    row = raw(dataset, "item_id", item["item_id"]).index("i1")
    assert raw(dataset, "genre", item["genre"][row]) == ["x"]


@pytest.fixture
def with_numbers(data_path: Path) -> Path:
    """toy.item with two sequences of numbers and a brand; toy.ent with ids of its own."""
    rows = ["i1,b0,1 3", "i2,b1,5", "i3,b0,", "i4,b1,2 2 9"]
    rows += [f"i{k},b0,1" for k in range(5, 13)]
    header = "item_id:token,brand:token,emb:float_seq"
    write_atomic(data_path / "toy/toy.item", header, rows)
    write_atomic(data_path / "toy/toy.ent", "ent_id:token,price:float", ["x,1", "y,3", "z,2"])
    return data_path


WITH_ITEMS = {"load_col": LOAD | {"item": ["item_id", "brand", "emb"]}}


def item_column(config: Any, field: str) -> dict[str, list[Any]]:
    """Raw item id -> its values of a column of items."""
    dataset = create_dataset(config)
    train = dataset.build()[0]
    names = dataset.field2id_token["item_id"]
    return dict(zip(names, train.item_feat[field].tolist(), strict=True))


def test_sequences_of_numbers_are_normalised(make_config: Any, with_numbers: Path) -> None:
    """From the least of all cells, 1, to the greatest, 9."""
    found = item_column(make_config("SASRec", normalize_field=["emb"], **WITH_ITEMS), "emb")
    assert found["i1"] == [0, 0.25, 0]  # padded to three
    assert found["i4"] == [0.125, 0.125, 1]
    assert found["i3"] == [0, 0, 0]  # an empty cell


def test_sequences_of_numbers_become_features(make_config: Any, with_numbers: Path) -> None:
    """Pairs of a weight and a row of the embedding table; row 0 is padding."""
    found = item_column(make_config("SASRec", numerical_features=["emb"], **WITH_ITEMS), "emb")
    assert found["i4"] == [[2, 1], [2, 1], [9, 1]]
    assert found["i1"] == [[1, 1], [3, 1], [0, 0]]
    assert found["i3"] == [[0, 0]] * 3


@pytest.mark.parametrize(
    ("how", "rows", "number"),
    [
        ({"method": "ED", "bucket": 4}, {1: 1, 2: 1, 3: 1, 5: 2, 9: 4}, 5),  # width 2 and a little
        ({"method": "LD"}, {1: 0, 2: 1, 3: 1, 5: 2, 9: 3}, 4),  # floor(ln(x)^2 + 1) over 2
    ],
)
def test_sequences_of_numbers_are_put_into_buckets(
    make_config: Any, with_numbers: Path, how: dict[str, Any], rows: dict[int, int], number: int
) -> None:
    values = {"numerical_features": ["emb"], "discretization": {"emb": how}}
    config = make_config("SASRec", **values, **WITH_ITEMS)
    found = item_column(config, "emb")
    assert found["i4"] == [[1, rows[2]], [1, rows[2]], [1, rows[9]]]
    assert found["i1"][:2] == [[1, rows[1]], [1, rows[3]]]
    assert found["i2"][0] == [1, rows[5]]
    assert create_dataset(config).num("emb") == number


def test_single_numbers_are_scaled_and_put_into_buckets_as_in_recbole(
    make_config: Any, with_numbers: Path
) -> None:
    """Columns of one number a cell never failed; RecBole's own methods give the right values."""

    class RecBoleNumbers(RecBoleRows):
        _normalize, _discretization = (
            SequentialDataset._normalize,
            SequentialDataset._discretization,
        )

    for values in (
        {"normalize_field": ["timestamp"]},
        {"numerical_features": ["timestamp"]},
        {
            "numerical_features": ["timestamp"],
            "discretization": {"timestamp": {"method": "ED", "bucket": 3}},
        },
        {"numerical_features": ["timestamp"], "discretization": {"timestamp": {"method": "LD"}}},
    ):
        config = make_config("SASRec", **values)
        ours, theirs = RecBoleRows(config), RecBoleNumbers(config)
        assert [list(np.atleast_1d(v)) for v in ours.inter_feat["timestamp"]] == [
            list(np.atleast_1d(v)) for v in theirs.inter_feat["timestamp"]
        ]
        assert ours.num("timestamp") == theirs.num("timestamp")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"numerical_features": ["price"]},
            r"numerical_features=\['price'\]: the column 'price' is",
        ),
        ({"numerical_features": ["brand"]}, "brand is token; only columns of float and float_seq"),
        ({"normalize_field": ["brand"]}, "brand is token; only columns of float and float_seq"),
        ({"normalize_field": ["emd"]}, "'emd' is not loaded; did you mean emb.* load_col="),
        ({"discretization": {"emb": {"method": "LD"}}}, "emb must be among numerical_features="),
        (
            {"val_interval": {"rating": "[3,inf)"}},
            r"column 'rating' is not loaded. load_col=\{'int",
        ),
        ({"unused_col": {"user": ["age"]}}, r"no column of .user is loaded; load_col="),
    ],
)
def test_columns_that_settings_name_must_be_there(
    make_config: Any, with_numbers: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        create_loaders(
            config := make_config("SASRec", **WITH_ITEMS, **values), create_dataset(config)
        )


def test_a_label_of_a_column_that_is_not_loaded(make_config: Any, with_numbers: Path) -> None:
    with pytest.raises(UserError, match=r"threshold=.* 'rating' is not loaded.* load_col="):
        create_dataset(make_config("DIN", threshold={"rating": 3}, **WITH_ITEMS))


def test_additional_files_have_ids_of_their_own(make_config: Any, with_numbers: Path) -> None:
    """Without an alias RecBole leaves them text, of which no tensor can be made."""
    values = {"additional_feat_suffix": ["ent"], "load_col": LOAD | {"ent": ["ent_id", "price"]}}
    dataset = create_dataset(make_config("SASRec", **values))
    assert dataset.item_num == 13
    train = dataset.build()[0]
    assert train.ent_feat["ent_id"].tolist() == [1, 2, 3]
    assert dataset.field2id_token["ent_id"].tolist() == ["[PAD]", "x", "y", "z"]
    shared = create_dataset(make_config("SASRec", alias_of_item_id=["ent_id"], **values))
    assert shared.item_num == 16  # with an alias they are items, as before


def test_arrays_are_copied_before_torch_may_write_to_them(make_config: Any) -> None:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            create_dataset(make_config()).build()
    finally:
        torch.set_warn_always(False)
    assert [str(w.message) for w in caught if "writable" in str(w.message)] == []
