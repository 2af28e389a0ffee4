"""Tables of a user's own: separators, names, dates, Parquet; and the manifest of what was made."""

import gzip
import hashlib
import json
import sys
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.cli import main as cli
from recbole_simdiff.data.interactions import select
from recbole_simdiff.data.prepare import Prepared, prepare
from recbole_simdiff.data.tables import TableColumns
from recbole_simdiff.data.times import parse_any_time
from recbole_simdiff.errors import UserError
from tests.data.test_prepare import histories, loaded, read_histories, rows, write

# Users in order of appearance; "b" has two events at one time, in the order of the file.
EVENTS = [
    ("ann", "x y", 5.0, 1_600_000_100),
    ("b", "p", 2.0, 1_600_000_050),
    ("ann", "q", 1.5, 1_600_000_000),
    ("b", "x y", 4.0, 1_600_000_050),
]
HISTORIES = {"ann": ["q", "x y"], "b": ["p", "x y"]}
TIMES = ["1600000000", "1600000050", "1600000050", "1600000100"]
NAMED = "person,sku,when,stars"


def table(separator: str, header: bool = True, quote: str = "") -> list[str]:
    """The events as lines, with a column in front that nothing names."""
    cells = [["0", quote + u + quote, quote + i + quote, str(t), str(r)] for u, i, r, t in EVENTS]
    names = [["id", *NAMED.split(",")]] if header else []
    return [separator.join(row) for row in [*names, *cells]]


def prepared(tmp_path: Path, content: Any, columns: str, **options: Any) -> Prepared:
    """The table as a data set ``toy`` without a k-core."""
    path = write(tmp_path / "raw.csv", content)
    chosen = TableColumns.of(columns, options.pop("separator", None), options.pop("form", None))
    return prepare("table", [path], tmp_path / "toy", table=chosen, k=0, **options)


@pytest.mark.parametrize("separator", ["\t", "::", ";", "|", ","])
@pytest.mark.parametrize("columns", [NAMED, "2,3,4,5"])
@pytest.mark.parametrize("header", [True, False])
def test_separators_and_names_are_recognised(
    tmp_path: Path, separator: str, columns: str, header: bool
) -> None:
    if columns == NAMED and not header:
        with pytest.raises(UserError, match=r"raw\.csv: the first line .* has other columns"):
            prepared(tmp_path, table(separator, header), columns)
        return
    done = prepared(tmp_path, gzip.compress("\n".join(table(separator, header)).encode()), columns)
    assert histories(done.path) == HISTORIES
    assert sorted(row[3] for row in rows(done.path)[1:]) == TIMES
    assert [float(row[2]) for row in rows(done.path)[1:]] == [1.5, 5, 2, 4]
    line = f"table, separator {separator!r}, {'first' if header else 'no'} line of names, user="
    assert line in done.report()
    assert done.n_read == len(EVENTS)


def test_quotes_blanks_and_a_given_separator(tmp_path: Path) -> None:
    done = prepared(tmp_path, table(",", quote='"'), "person,sku,when")
    assert histories(done.path) == HISTORIES
    assert rows(done.path)[0] == ("user_id:token", "item_id:token", "timestamp:float")
    blanks = ["a i1 3", "a i2 1"]
    assert histories(prepared(tmp_path, blanks, "1,2,3", overwrite=True).path) == {
        "a": ["i2", "i1"]
    }
    odd = ["a#i1#3", "a#i2#1"]
    with pytest.raises(UserError, match=r"--separator gives another"):
        prepared(tmp_path, odd, "1,2,3", overwrite=True)
    done = prepared(tmp_path, odd, "1,2,3", overwrite=True, separator="#")
    assert histories(done.path) == {"a": ["i2", "i1"]}


@pytest.mark.parametrize(
    ("text", "form", "seconds", "unit"),
    [
        ("1588687728", None, 1588687728, "seconds"),
        ("1588687728.25", None, 1588687728.25, "seconds"),
        ("1.588687728e9", None, 1588687728, "seconds"),
        ("1588687728923", None, 1588687728.923, "milliseconds"),
        ("1588687728923000", None, 1588687728.923, "microseconds"),
        ("1588687728923000000", None, 1588687728.923, "nanoseconds"),
        ("-1.5", None, -1.5, "seconds"),
        ("2020-05-05", None, 1588636800, "dates"),
        ("2020-05-05 14:08:48", None, 1588687728, "dates"),
        ("2020-05-05T14:08:48.923Z", None, 1588687728.923, "dates"),
        ("2020-05-05T16:08:48+02:00", None, 1588687728, "dates"),
        ("5.5.2020", "%d.%m.%Y", 1588636800, "dates"),
        ("20200505", "%Y%m%d", 1588636800, "dates"),
        ("05/May/2020:16:08:48 +0200", "%d/%b/%Y:%H:%M:%S %z", 1588687728, "dates"),
        (datetime(2020, 5, 5, 14, 8, 48), None, 1588687728, "dates"),
        (
            datetime(2020, 5, 5, 16, 8, 48, tzinfo=timezone(timedelta(hours=2))),
            None,
            1588687728,
            "dates",
        ),
        (date(2020, 5, 5), None, 1588636800, "dates"),
    ],
)
def test_times(text: Any, form: str | None, seconds: float, unit: str) -> None:
    assert parse_any_time(text, form) == (round(seconds * 10**6), unit)


@pytest.mark.parametrize("text", ["", "noon", "5.5.2020", "nan", "inf", "1e30", "2020-13-01"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"time|month"):
        parse_any_time(text)


def test_dates_of_another_form_and_a_line_that_has_none(tmp_path: Path) -> None:
    lines = ["u;i;day", "a;x;31.12.2019", "a;y;1.1.2019", "b;x;2019-01-01"]
    with pytest.raises(UserError, match=r"line 2: time '31.12.2019' is neither a number nor a da"):
        prepared(tmp_path, lines, "u,i,day")
    with pytest.raises(UserError, match=r"line 4: time data '2019-01-01' does not match format"):
        prepared(tmp_path, lines, "u,i,day", form="%d.%m.%Y")
    done = prepared(tmp_path, lines, "u,i,day", form="%d.%m.%Y", skip_malformed=True)
    assert histories(done.path) == {"a": ["y", "x"]}
    assert done.malformed == 1
    line = "times taken for dates, written as seconds since 1970: 2019-01-01T00:00:00 to 2019-12-31"
    assert line in done.report()


def test_lines_of_another_length_are_malformed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"raw\.csv, line 2: 2 fields instead of 3"):
        prepared(tmp_path, ["a,x,1", "a,y"], "1,2,3")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("1,2", "must name three or four different columns"),
        ("1,2,3,4,5", "must name three or four"),
        ("1,1,2", "must name three or four different"),
        ("u,,t", "must name three or four"),
        ("0,1,2", "numbered from 1"),
    ],
)
def test_impossible_columns(columns: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TableColumns.of(columns)


# ---------------------------------------------------------------- Parquet


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    """A Parquet file in small row groups."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


@pytest.mark.parametrize("kind", ["int", "datetime", "text"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    as_kind = {
        "int": lambda t: t * 1000,
        "datetime": lambda t: datetime.fromtimestamp(t, UTC),
        "text": lambda t: datetime.fromtimestamp(t, UTC).isoformat(),
    }[kind]
    columns = {
        "when": [as_kind(t) for *_, t in EVENTS],
        "sku": [i for _, i, _, _ in EVENTS],
        "stars": [r for _, _, r, _ in EVENTS],
        "person": [u for u, *_ in EVENTS],
    }
    path = write_parquet(tmp_path / "raw.parquet", columns)
    for chosen in (NAMED, "4,2,1,3"):
        done = prepare(
            "table",
            [path],
            tmp_path / "toy",
            table=TableColumns.of(chosen),
            k=0,
            overwrite=True,
        )
        assert histories(done.path) == HISTORIES
        assert sorted(row[3] for row in rows(done.path)[1:]) == TIMES
    assert done.units == {"milliseconds" if kind == "int" else "dates": 4}
    assert "Parquet, columns person, sku, when, stars" in done.report()
    with pytest.raises(UserError, match=r"raw\.parquet has the columns when, sku, stars, person; "):
        prepare("table", [path], tmp_path / "b", table=TableColumns.of("user,sku,when"))
    with pytest.raises(UserError, match="is a Parquet file, which --source=table reads"):
        prepare("amazon", [path], tmp_path / "b")


def test_parquet_rows_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"u": ["a", None, "b"], "i": [1, 2, 3], "t": [1, 2, None]}
    path = write_parquet(tmp_path / "raw.parquet", columns)
    chosen = TableColumns.of("u,i,t")
    with pytest.raises(UserError, match=r"raw\.parquet, row 2: None is not an id"):
        prepare("table", [path], tmp_path / "toy", table=chosen, k=0)
    done = prepare("table", [path], tmp_path / "toy", table=chosen, k=0, skip_malformed=True)
    assert histories(done.path) == {"a": ["1"]}
    damaged = write(tmp_path / "damaged", path.read_bytes()[:60])
    with pytest.raises(UserError, match="damaged is not a readable Parquet file"):
        prepare("table", [damaged], tmp_path / "b", table=chosen)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'recbole_simdiff\[parquet\]'"):
        prepare("table", [path], tmp_path / "b", table=chosen)


# ---------------------------------------------------------------- manifest


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_manifest_says_what_was_made_from_what(tmp_path: Path) -> None:
    done = prepared(
        tmp_path, table(","), NAMED, selection=select("2020-09-13", None, 2), skip_malformed=True
    )
    content = json.loads((tmp_path / "toy" / "toy.manifest.json").read_text())
    raw = tmp_path / "raw.csv"
    (source,) = content["sources"]
    assert source["path"] == str(raw)
    assert (source["bytes"], source["sha256"]) == (raw.stat().st_size, digest(raw))
    assert content["files"] == {"toy.inter": digest(done.path)}
    assert content["options"] == {
        "k_core": 0,
        "skip_malformed": True,
        "from": "2020-09-13T00:00:00",
        "to": None,
        "min_rating": 2,
        "columns": NAMED.split(","),
        "separator": None,
        "time_format": None,
    }
    assert content["statistics"]["actions"] == 3
    assert content["statistics"]["ties"] == 1
    assert content["interactions"] == {"read": 4, "selected": 3, "malformed": 0}
    times = {"units": {"seconds": 4}, "first": 1600000050, "last": 1600000100}
    assert content["times"] == times


def test_the_manifest_counts_titles_among_the_files(tmp_path: Path) -> None:
    raw = write(tmp_path / "ratings.dat", ["1::a::1::1", "1::b::1::1"])
    titles = write(tmp_path / "movies.dat", ["a::A::", "b::B::"])
    done = prepare("movielens", [raw], tmp_path / "toy", k=0, titles=titles)
    content = json.loads((tmp_path / "toy" / "toy.manifest.json").read_text())
    item = done.path.with_suffix(".item")
    assert content["files"] == {"toy.inter": digest(done.path), "toy.item": digest(item)}
    assert [Path(source["path"]) for source in content["sources"]] == [raw, titles]
    assert content["statistics"]["ties"] == done.statistics.ties == 1


# ---------------------------------------------------------------- the command


def call(*given: object) -> int:
    return cli.main(["prepare", *map(str, given)])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write(tmp_path / "log.tsv", table("\t"))
    base = ("--source=table", f"--input={raw}", f"--output={tmp_path / 'toy'}", "--k_core=0")
    assert call(*base, "--columns=person,sku,when") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("table, separator '\\t', first line of names, user=person, item=sku")
    assert out[2].startswith("times taken for seconds since 1970: 2020-09-13T12:26:40 to 2020-09-")
    assert out[3].endswith("sparsity 33.33%, 1 equal times")
    assert call(*base, "--columns=2,3,4", r"--separator=\t", "--overwrite") == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--source=table"], "--source=table needs --columns=user,item,time"),
        (["--source=table", "--columns=a"], "--columns=a must name three or four"),
        (["--source=amazon", "--columns=1,2,3"], "--columns: --source=amazon has columns of its"),
        (["--source=yelp", "--separator=;"], "--separator: only --source=table has it"),
        (["--source=table", "--columns=1,2,3", "--min_rating=2"], "needs a fourth name in --colu"),
        (["--source=table", "--columns=1,2,3", "--titles=x"], "--source=table has no titles"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    raw = write(tmp_path / "raw", ["a,b,1"])
    assert call(f"--input={raw}", f"--output={tmp_path / 'toy'}", *given) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "toy").exists()


def test_what_is_prepared_trains(tmp_path: Path) -> None:
    done = prepared(tmp_path, table(";"), NAMED)
    dataset = loaded(tmp_path, "toy")
    assert read_histories(dataset) == HISTORIES
    assert dataset.statistics == done.statistics
    assert dataset.statistics.ties == done.statistics.ties == 1
