"""Filters: what is left out is said; what leaves nothing is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.errors import UserError
from tests.data.toy import HEADER, LOAD, raw, readable, write_atomic


def test_lines_without_a_user_or_an_item_are_left_out(
    make_config: Any, data_path: Path, caplog: Any
) -> None:
    lines = [",i1,1", "u1,i1,1", "u1,,2", "u1,i2,3", "u1,i3,4"]
    columns = "user_id:token,item_id:token,timestamp:float"
    write_atomic(data_path / "gaps" / "gaps.inter", columns, lines)
    dataset = create_dataset(make_config(dataset="gaps"))
    dataset.build()
    assert raw(dataset, "item_id", dataset.flat["item_id"]) == ["i1", "i2", "i3"]
    assert "2 of 5 lines of inter_feat have no user_id or no item_id" in caplog.text


def lines_about(path: Path, kind: str, ids: list[str]) -> dict[str, Any]:
    """Write a .user or .item file of these ids; the setting that loads it."""
    write_atomic(
        path.with_suffix(f".{kind}"), f"{kind}_id:token,brand:token", [f"{i},x" for i in ids]
    )
    return {"load_col": {**LOAD, kind: [f"{kind}_id", "brand"]}}


@pytest.mark.parametrize(
    ("kind", "ids", "left"), [("item", ["i1", "i2", "i3"], 9), ("user", ["a", "b"], 14)]
)
def test_events_without_a_line_about_user_or_item_are_counted(
    make_config: Any, data_path: Path, caplog: Any, kind: str, ids: list[str], left: int
) -> None:
    """They were left out in silence."""
    loaded = lines_about(data_path / "toy" / "toy.inter", kind, ids)
    assert create_dataset(make_config(**loaded)).statistics.actions == left
    line = (
        f"toy: {30 - left} of 30 events have {kind}s without a line in toy.{kind} and are left "
        "out (filter_inter_by_user_or_item)"
    )
    assert line in caplog.text
    caplog.clear()
    kept = create_dataset(make_config(**loaded, filter_inter_by_user_or_item=False))
    assert kept.statistics.actions == 30
    assert caplog.text == ""
    wanted = {"val_interval": {"brand": ["y"]}}
    with pytest.raises(UserError, match=rf"toy\.{kind} after val_interval=.* it is empty"):
        create_dataset(make_config(**loaded, **wanted))


@pytest.mark.parametrize(("kind", "first"), [("item", "i1"), ("user", "a")])
def test_ids_that_agree_nowhere_are_named(
    make_config: Any, data_path: Path, kind: str, first: str
) -> None:
    """Nothing but the ids is the cause, and one of each file shows why."""
    loaded = lines_about(data_path / "toy" / "toy.inter", kind, ["0.0", "1.0"])
    with pytest.raises(UserError) as caught:
        create_dataset(make_config(**loaded))
    message = str(caught.value)
    assert f"no event has its {kind} in toy.{kind}." in message
    assert f"The first {kind}_id of the events is '{first}', there it is '0.0';" in message
    assert "interval" not in message


def test_removing_duplicates_keeps_the_order_of_equal_times(
    make_config: Any, data_path: Path
) -> None:
    """Days as times: RecBole's unstable sort shuffles what happened on one day."""
    lines = [(f"u{k % 2}", f"i{k * 7 % 60}", k * 37 % 3) for k in range(200)]
    times = np.array([time for _, _, time in lines], dtype=float)
    by_time = times.argsort(kind="stable")
    assert (times.argsort() != by_time).any()  # what RecBole's sort would do
    expected: dict[str, list[str]] = {"u0": [], "u1": []}
    for user, item, _ in (lines[k] for k in by_time):
        if item not in expected[user]:
            expected[user].append(item)
    rows = [f"{user},{item},{time}" for user, item, time in lines]
    write_atomic(
        data_path / "days" / "days.inter", "user_id:token,item_id:token,timestamp:float", rows
    )
    config = make_config(dataset="days", rm_dup_inter="first", MAX_ITEM_LIST_LENGTH=100)
    dataset = create_dataset(config)
    test = dataset.build()[2]
    assert {user: [*history, target] for user, history, target in readable(test)} == expected
    assert dataset.statistics.actions == sum(map(len, expected.values()))


def test_filters_that_leave_nothing_are_named(make_config: Any, data_path: Path) -> None:
    """And no others: the default leaves out nothing."""
    config = make_config(user_inter_num_interval="[99,inf)")
    message = (
        r"dataset='toy' \(.*toy\) has no interactions, or user_inter_num_interval=\[99,inf\) leave"
    )
    with pytest.raises(UserError, match=message):
        create_dataset(config)
    write_atomic(data_path / "none" / "none.inter", HEADER, [])
    with pytest.raises(UserError, match=r"dataset='none' \(.*none\) has no interactions$"):
        create_dataset(make_config(dataset="none"))


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ({"timestamp": "5"}, r"val_interval: timestamp='5' must be an interval such as"),
        ({"timestamp": "[1,2];5"}, "timestamp='.1,2.;5' must be an interval"),
        ({"timestamp": "[,5]"}, "must be an interval"),
        ({"timestamp": ""}, "must be an interval"),
        ({"timestamp": [1, 2, 3]}, "must be an interval"),
        ({"timestamp": None}, "timestamp=None must be an interval"),
        ({"item_id": "i1"}, "item_id='i1' must be a list of values as text"),
        ({"item_id": [1, 2]}, "must be a list of values as text"),
        ({"nowhere": "[1,2]"}, "column 'nowhere' is not loaded.* load_col="),
        ("[1,2]", r"val_interval='\[1,2\]' must be like \{field: "),
    ],
)
def test_what_is_no_interval_is_refused(make_config: Any, intervals: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_dataset(make_config(val_interval=intervals))


@pytest.mark.parametrize(
    ("intervals", "actions"),
    [
        ({"timestamp": "[1,4)"}, 15),
        ({"timestamp": [1, 3]}, 15),
        ({"timestamp": "[0,0];[7,inf)"}, 8),
        ({"item_id": ["i1", "i12"]}, 6),
        (None, 30),
    ],
)
def test_intervals_filter(make_config: Any, intervals: Any, actions: int) -> None:
    assert create_dataset(make_config(val_interval=intervals)).statistics.actions == actions
