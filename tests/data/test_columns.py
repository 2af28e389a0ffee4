"""Files under a known name whose columns are not those of the data set's settings."""

import logging
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.config.columns import ORIGIN
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.errors import UserError
from tests.data.toy import write_atomic

COMMON = "user_id:token,item_id:token,timestamp:float"
DOWNLOAD = "user_id:token,business_id:token,date:float"
LINES = [f"u{u},i{(u + k) % 6},{k}" for u in range(8) for k in range(5)]
FIRST_DAY = 1546300800


def yelp(folder: Path, header: str, lines: list[str] = LINES, **values: Any) -> Config:
    """Configuration of the data set ``yelp`` with a file of these columns."""
    write_atomic(folder / "yelp" / "yelp.inter", header, lines)
    return Config("SASRec", "yelp", overrides={"data_path": str(folder), **values})


def test_common_columns_are_taken_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = yelp(tmp_path, COMMON)
    with caplog.at_level(logging.INFO):
        dataset = create_dataset(config)
    assert dataset.statistics.actions == len(LINES)
    assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}
    assert config["val_interval"] is None
    changed = {key for key, origin in config.origin.items() if origin == ORIGIN}
    assert changed == {"ITEM_ID_FIELD", "TIME_FIELD", "load_col", "val_interval"}
    (line,) = [r.getMessage() for r in caplog.records if "Used:" in r.getMessage()]
    assert line.startswith("yelp: the file has not all columns that properties/dataset/yelp.yaml ")
    assert "ITEM_ID_FIELD=item_id for business_id, TIME_FIELD=timestamp for date" in line


def test_a_file_with_the_columns_of_the_download_is_filtered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f"u{u},i{(u + k) % 6},{FIRST_DAY + k}" for u in range(8) for k in range(5)]
    lines += [f"u{u},i{u % 6},{FIRST_DAY - 1}" for u in range(8)]
    config = yelp(tmp_path, DOWNLOAD, lines)
    with caplog.at_level(logging.INFO):
        assert create_dataset(config).statistics.actions == 40
    assert config["val_interval"] == {"date": "[1546300800,1577750400]"}
    assert ORIGIN not in config.origin.values()
    assert "Used:" not in caplog.text


def test_a_file_with_one_column_of_the_download_keeps_it(tmp_path: Path) -> None:
    lines = [f"u{u},i{(u + k) % 6},{FIRST_DAY + k}" for u in range(8) for k in range(5)]
    config = yelp(tmp_path, "user_id:token,item_id:token,date:float", lines)
    assert create_dataset(config).statistics.actions == 40
    assert config["TIME_FIELD"] == "date"
    assert config["val_interval"] == {"date": "[1546300800,1577750400]"}
    assert config["load_col"] == {"inter": ["user_id", "item_id", "date"]}


def test_a_user_s_own_values_are_never_replaced(tmp_path: Path) -> None:
    interval = {"date": "[0,1]"}
    config = yelp(tmp_path, COMMON, val_interval=interval)
    assert config["val_interval"] == interval
    with pytest.raises(UserError, match=r"val_interval.*the column 'date' is not loaded"):
        create_dataset(config)
    config = yelp(tmp_path, COMMON, ITEM_ID_FIELD="business_id")
    with pytest.raises(UserError, match=r"has no column business_id, date; it has user_id:token"):
        create_dataset(config)


def test_a_file_with_neither_names_what_is_missing(tmp_path: Path) -> None:
    config = yelp(tmp_path, "user_id:token,sku:token,timestamp:float")
    with pytest.raises(UserError, match="has no column business_id, date; it has user_id"):
        create_dataset(config)


def test_titles_of_a_data_set_are_left_out_where_the_file_has_none(tmp_path: Path) -> None:
    write_atomic(tmp_path / "ml-100k" / "ml-100k.inter", COMMON, LINES)
    item = tmp_path / "ml-100k" / "ml-100k.item"
    values = {"data_path": str(tmp_path)}
    assert Config("SASRec", "ml-100k", overrides=values)["item_title_field"] is None
    write_atomic(item, "item_id:token,movie_title:token_seq", ["i1,One"])
    assert Config("SASRec", "ml-100k", overrides=values)["item_title_field"] == "movie_title"
    asked = Config("SASRec", "ml-100k", overrides={**values, "item_title_field": "name"})
    assert asked["item_title_field"] == "name"


def test_a_stored_configuration_is_the_same_again(tmp_path: Path) -> None:
    config = yelp(tmp_path, COMMON)
    plain = config.plain()
    again = Config("SASRec", "yelp", overrides=plain["values"], origin="checkpoint")
    assert again.plain() == plain
    assert again.columns_note is None
