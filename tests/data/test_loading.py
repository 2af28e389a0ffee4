"""Loading: lines and cells as they are written, causes by file and line, missing files."""

import gzip
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import parse_overrides
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import UserError
from tests.conftest import SEQUENCES, write_inter
from tests.data.toy import (
    HEADER,
    LOAD,
    raw,
    readable,
    write_atomic,
)


@pytest.mark.parametrize("time", ["", "inf"])
def test_events_without_a_time_are_refused(make_config: Any, data_path: Path, time: str) -> None:
    """The mean, which RecBole fills in, would put them anywhere."""
    columns = "user_id:token,item_id:token,timestamp:float"
    write_atomic(data_path / "gaps" / "gaps.inter", columns, ["u1,i1,1", "", f"u1,i2,{time}"])
    message = rf"1 of 2 events.*no finite.*timestamp.*is event 2 of the file \(line 4: '{time}'\)"
    with pytest.raises(UserError, match=message):
        create_dataset(make_config(dataset="gaps"))


@pytest.mark.parametrize("form", ["{}", "{}.0", "{}e0"])
def test_times_that_floats_cannot_tell_apart_keep_their_order(
    make_config: Any, data_path: Path, form: str
) -> None:
    """Nanoseconds: neighbours beyond 2^53 are one float, and would stay in the order of the file.
    A user's events are put in order whatever the settings do with the times."""
    times = [1_700_000_000_000_000_000 + k for k in range(9)]
    assert len(set(map(float, times))) == 1
    newest_first = [f"u,i{k},{form.format(times[k])}" for k in range(8, -1, -1)]
    write_atomic(data_path / "nano" / "nano.inter", HEADER, ["v,i0,2", *newest_first])
    for values in ({}, {"normalize_all": True}, {"rm_dup_inter": "first"}):
        dataset = create_dataset(make_config(dataset="nano", MAX_ITEM_LIST_LENGTH=20, **values))
        _, history, target = readable(dataset.build()[2])[0]
        assert [*history, target] == [f"i{k}" for k in range(9)]


@pytest.mark.parametrize(("field", "cell"), [("timestamp", "nan"), ("when", "1.5.2024")])
def test_a_number_that_is_none_is_named_with_its_line(
    make_config: Any, data_path: Path, field: str, cell: str
) -> None:
    """Neither before the blank line nor in a column that is not loaded."""
    columns = f"user_id:token,item_id:token,other:float,{field}:float"
    write_atomic(data_path / "bad" / "bad.inter", columns, ["u1,i1,y,1", "", f"u1,i2,y,{cell}"])
    config = make_config(
        dataset="bad", TIME_FIELD=field, load_col={"inter": ["user_id", "item_id", field]}
    )
    with pytest.raises(UserError, match=rf"bad\.inter, line 4: {field}:float='{cell}' is not a n"):
        create_dataset(config)


# ---------------------------------------------------------------- lines and their fields

LINES = [f"u{u},i{(u + k) % 6},5,{k}" for u in range(8) for k in range(5)]

RATED = "user_id:token,item_id:token,rating:float,timestamp:float"


@pytest.mark.parametrize("where", [range(40), [0], [33]], ids=["all", "first", "one"])
@pytest.mark.parametrize("more", [",1", ",1,", ",,"])
def test_lines_with_more_fields_than_the_header_are_refused(
    make_config: Any, data_path: Path, where: Any, more: str
) -> None:
    """Whichever columns are loaded; pandas reads all of them from the wrong fields, or none."""
    lines = [line + (more if k in where else "") for k, line in enumerate(LINES)]
    path = write_atomic(data_path / "long" / "long.inter", RATED, lines)
    message = rf"{path}, line {where[0] + 2}: {4 + more.count(',')} fields, but the header has 4"
    for columns in (LOAD, None):
        with pytest.raises(UserError, match=message):
            create_dataset(make_config(dataset="long", load_col=columns))


@pytest.mark.parametrize("header", [RATED, RATED + ","])
def test_a_separator_may_end_a_line(make_config: Any, data_path: Path, header: str) -> None:
    write_atomic(data_path / "ends" / "ends.inter", header, [line + "," for line in LINES])
    dataset = create_dataset(make_config(dataset="ends"))
    assert str(dataset.statistics).startswith("8 users, 6 items, 40 actions")
    dataset.build()
    assert dataset.flat["timestamp"].tolist() == [0, 1, 2, 3, 4] * 8


def test_a_line_with_too_many_fields_among_items_is_refused(
    make_config: Any, data_path: Path
) -> None:
    """As by a tab inside a title; also where only the titles are read."""
    path = data_path / "toy" / "toy.item"
    write_atomic(path, "item_id:token,title:token_seq", ["i1,One", "i2,T,wo"])
    message = r"toy\.item, line 3: 3 fields, but the header has 2 columns"
    with pytest.raises(UserError, match=message):
        create_dataset(make_config(load_col={**LOAD, "item": ["item_id"]}))
    dataset = create_dataset(make_config(item_title_field="title"))
    with pytest.raises(UserError, match=message):
        dataset.item_titles()


@pytest.mark.parametrize(
    ("typed", "separator"),
    [
        ("|", "|"),
        (" ", " "),
        ("::", "::"),
        ("||", "||"),
        (".*", ".*"),
        (r"\t", "\t"),
        (r"'\t'", "\t"),
        (r'"\t"', "\t"),
        ("'|'", "|"),
        ("'", "'"),
        ("\N{BROKEN BAR}", "\N{BROKEN BAR}"),
        (r"\t\t", "\t\t"),
    ],
)
def test_a_separator_is_what_was_typed(data_path: Path, typed: str, separator: str) -> None:
    """Never a pattern, and never guessed; a first and a last cell may be empty."""
    columns = ["note:token", *RATED.split(","), "tags:token_seq"]
    lines = [columns, *(["", *line.split(","), "x;y" if k else ""] for k, line in enumerate(LINES))]
    path = data_path / "apart" / "apart.inter"
    path.parent.mkdir()
    path.write_text("\n".join(separator.join(line) for line in lines) + "\n", encoding="utf-8")
    arguments = [f"--field_separator={typed}", "--seq_separator", ";", "--load_col=None"]
    values = parse_overrides([*arguments, f"--data_path={data_path}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        dataset = create_dataset(Config("SASRec", "apart", overrides=values))
    dataset.build()
    assert str(dataset.statistics).startswith("8 users, 6 items, 40 actions")
    assert dataset.flat["timestamp"].tolist() == [0, 1, 2, 3, 4] * 8
    assert raw(dataset, "tags", dataset.flat["tags"][1]) == ["x", "y"]
    assert dataset.flat["note"].tolist() == [0] * 40


def test_files_that_are_no_text_get_their_cause(make_config: Any, data_path: Path) -> None:
    path = data_path / "toy" / "toy.inter"
    text = path.read_text()

    def refused(message: str, name: str = "inter", **values: Any) -> None:
        place = re.escape(str(path.with_suffix(f".{name}")))
        with pytest.raises(UserError, match=place + message):
            create_dataset(make_config(**values))

    path.write_bytes(gzip.compress(text.encode()))
    refused(" is packed by gzip; unpack it")
    refused(" is packed by gzip; unpack it", encoding="latin-1")
    path.write_text("")
    refused(" is empty; its first line names the columns")
    path.write_bytes(text.replace("i12", "\xed12").encode("latin-1"))
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "i12" in row)
    refused(f", line {line} is not text in encoding='utf-8'")
    path.unlink()
    path.mkdir()
    refused(" is a folder, not a file")
    path.rmdir()
    os.mkfifo(path)
    refused(" is not a regular file")
    path.unlink()
    path.write_text(text)
    path.with_suffix(".item").mkdir()
    assert create_dataset(make_config()).statistics.actions == 30  # nothing of it is asked for
    loaded = {**LOAD, "item": ["item_id", "brand"]}
    refused(" is a folder, not a file", "item", load_col=loaded)


@pytest.mark.parametrize("call", ["open", "stat"])
def test_a_file_that_may_not_be_read_is_named(
    make_config: Any, data_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path, config = data_path / "toy" / "toy.inter", make_config()
    stock = {"open": open, "stat": Path.stat}[call]

    def denied(name: Any, *given: Any, **named: Any) -> Any:
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stock(name, *given, **named)

    monkeypatch.setattr(*{"open": ("builtins.open",), "stat": (Path, "stat")}[call], denied)
    with pytest.raises(UserError, match=rf"{path} cannot be read.*Permission denied"):
        create_dataset(config)


def test_a_byte_order_mark_is_no_part_of_the_first_name(make_config: Any, data_path: Path) -> None:
    path = data_path / "toy" / "toy.inter"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert create_dataset(make_config()).statistics.actions == 30


def test_another_encoding_is_named_and_can_be_set(make_config: Any, data_path: Path) -> None:
    path = data_path / "toy" / "toy.inter"
    text = path.read_text().replace("user_id", "usér").replace("i1", "í1")
    path.write_text(text, encoding="latin-1")
    values = {"USER_ID_FIELD": "usér", "load_col": {"inter": ["usér", "item_id", "timestamp"]}}
    with pytest.raises(
        UserError, match=r"toy\.inter, line 1 is not text in encoding=.*--encoding="
    ):
        create_dataset(make_config(**values))
    found = create_dataset(make_config(encoding="latin-1", **values))
    assert "í1" in found.field2id_token["item_id"]


def test_ids_that_look_like_missing_values_stay_ids(make_config: Any, data_path: Path) -> None:
    sequences = {
        "NA": ["NA", "None", "null", "nan", '"x', "NULL"],
        "None": ["None", "n/a", "NA", "null"],
    }
    write_inter(data_path, "odd", sequences)
    dataset = create_dataset(make_config(dataset="odd", train_sampling="prefix_last"))
    test = dataset.build()[2]
    assert {user: [*history, target] for user, history, target in readable(test)} == {
        "NA": ["None", "null", "nan", '"x', "NULL"],  # the newest four, and the target
        "None": ["None", "n/a", "NA", "null"],
    }
    assert str(dataset.statistics).startswith("2 users, 7 items, 10 actions")


# ---------------------------------------------------------------- finding files


def test_an_unknown_data_set_names_the_place_searched(make_config: Any, data_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        create_dataset(make_config(dataset="no-such-data"))
    message = str(caught.value)
    assert f"{data_path}/no-such-data/no-such-data.inter does not exist" in message
    assert "--data_path at the folder that holds no-such-data/no-such-data.inter" in message


def test_a_folder_without_the_file_names_it(make_config: Any, data_path: Path) -> None:
    (data_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/empty\.inter does not exist.*--data_path"):
        create_dataset(make_config(dataset="empty"))


def test_a_missing_column_is_named_with_those_there_are(make_config: Any) -> None:
    columns = ["user_id", "item_id", "timestamp", "rating"]
    with pytest.raises(UserError, match=r"has no column rating; it has user_id:token.*load_col"):
        create_dataset(make_config(load_col={"inter": columns}))


def test_a_file_of_users_items_and_times_needs_no_settings(tmp_path: Path) -> None:
    write_inter(tmp_path, "few", SEQUENCES)
    found = create_dataset(Config("SimDiffRec", "few", overrides={"data_path": str(tmp_path)}))
    assert found.statistics.actions == sum(map(len, SEQUENCES.values()))
    test = readable(create_loaders(found.config, found)[2]._dataset)
    assert [(user, target) for user, _, target in test] == [
        (user, items[-1]) for user, items in SEQUENCES.items() if len(items) > 2
    ]


def test_a_file_without_times_says_what_to_do(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "few" / "few.inter", "user_id:token,item_id:token", ["u,i"])
    with pytest.raises(UserError) as caught:
        create_dataset(Config("SimDiffRec", "few", overrides={"data_path": str(tmp_path)}))
    assert str(caught.value) == (
        f"{path} has no column timestamp; it has user_id:token, item_id:token. TIME_FIELD names "
        "the column of times, which order the events. A file without times needs one, such as the "
        "number of the line as timestamp:float"
    )


@pytest.mark.parametrize("columns", [{}, {"inter": []}, {"inter": ["user_id", "timestamp"]}])
def test_users_and_items_must_be_loaded(make_config: Any, columns: Any) -> None:
    with pytest.raises(UserError, match=r"load_col=.* must have user_id and item_id under inter"):
        create_dataset(make_config(load_col=columns))


@pytest.mark.parametrize(("name", "near"), [("amazon_beauty", "amazon-beauty"), ("toyy", "toy")])
def test_an_unknown_data_set_is_answered_with_the_nearest_name(
    make_config: Any, name: str, near: str
) -> None:
    """Of those with settings here and those in ``data_path``."""
    with pytest.raises(UserError, match=f"dataset='{name}' is not there.* Did you mean {near}\\?"):
        create_dataset(make_config(dataset=name))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("user_id:token,item_id,timestamp:float", "column 'item_id' must be 'name:type'"),
        ("user_id:token,item_id:str,timestamp:float", "column 'item_id:str' must be 'name:type'"),
        (
            "user_id:token,item_id:token,timestamp:float",
            "bad.inter, line 2: timestamp:float='yesterday' is not a number",
        ),
        (
            "user_id:token,item_id:token,timestamp:float_seq",
            "bad.inter, line 2: timestamp:float_seq='yesterday' is not a number",
        ),
        ("user_id:token,item_id:token,item_id:token", "line 1: 2 columns are named 'item_id'"),
        (
            "user_id:token,timestamp:float,timestamp:token",
            r"line 1: 2 columns are named 'timestamp' \(timestamp:float, timestamp:token\)",
        ),
        ("user_id:token,item_id:float,timestamp:float", "holds ids; it must be item_id:token"),
        ("uid:token,item_id:token,timestamp:float", "has no column user_id; .* USER_ID_FIELD and"),
        ("user_id:token;item_id:token", r"separated by field_separator='\\t'"),
    ],
)
def test_unreadable_files_are_named(
    make_config: Any, data_path: Path, header: str, message: str
) -> None:
    path = write_atomic(data_path / "bad" / "bad.inter", header, ["u1,i1,yesterday"])
    with pytest.raises(UserError, match=message) as caught:
        create_dataset(make_config(dataset="bad"))
    assert str(path) in str(caught.value)


def test_a_header_of_megabytes_is_not_printed_whole(make_config: Any, data_path: Path) -> None:
    path = data_path / "toy/toy.inter"
    path.write_text("x" * 10_000_000 + "\n1\n")
    with pytest.raises(
        UserError, match=r"toy.inter: column 'xxx.* \.\.\. .*field_separator"
    ) as error:
        create_dataset(make_config("SASRec"))
    assert len(str(error.value)) < 2_100
