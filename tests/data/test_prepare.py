"""Preparing data sets: every format, the k-core, order of time, reports, whole files only."""

import gzip
import json
import os
import random
import shlex
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recbole
from recbole.data.dataset import SequentialDataset

from recbole_simdiff.cli import main as cli
from recbole_simdiff.cli.parser import EPILOG
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import parse_overrides
from recbole_simdiff.data import prepare as module
from recbole_simdiff.data.dataset import FlatDataset, create_dataset
from recbole_simdiff.data.interactions import Selection, k_core, select
from recbole_simdiff.data.prepare import prepare
from recbole_simdiff.data.raw_formats import SOURCES
from recbole_simdiff.data.recbole_fixes import RecBoleFixes
from recbole_simdiff.data.statistics import Statistics, published
from recbole_simdiff.errors import UserError
from tests.conftest import SEQUENCES

# Lines of two users in the order of their files; "u1" has two interactions at the same time.
YELP = [("u2", "b1", 4.0, 1546300800), ("u1", "b2", 1.0, 1546300801), ("u1", "b1", 5.0, 1546300801)]
UNIX = [("9", "31", 2.5, 1260759144), ("1", "2", 3.0, 978300760), ("9", "2", 4.0, 1260759144)]


def amazon_json(user: str, item: str, rating: float, time: int) -> dict[str, Any]:
    """A review as in the 5-core files."""
    return {
        "reviewerID": user,
        "asin": item,
        "helpful": [0, 1],
        "reviewText": 'it\'s "fine"\n',
        "overall": rating,
        "unixReviewTime": time,
    }


def amazon_2023(user: str, item: str, rating: float, time: int) -> dict[str, Any]:
    """A review as in the files of 2023, in milliseconds; the item is one of several variants."""
    return {
        "rating": rating,
        "title": "Great",
        "asin": f"variant of {item}",
        "parent_asin": item,
        "user_id": user,
        "timestamp": 1000 * time,
        "verified_purchase": True,
    }


def yelp_json(user: str, item: str, rating: float, time: int) -> str:
    """A review as in the releases from 2018 on, with the time of day."""
    date = datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")
    review = {"review_id": "r", "user_id": user, "business_id": item, "stars": rating}
    return json.dumps({**review, "useful": 0, "text": "good\nfood", "date": date})


# name -> (source, lines, interactions they hold)
FORMATS: dict[str, tuple[str, list[str], list[tuple[str, str, float, int]]]] = {
    "amazon reviews": ("amazon", [json.dumps(amazon_json(*row)) for row in UNIX], UNIX),
    "amazon loose reviews": ("amazon", [repr(amazon_json(*row)) for row in UNIX], UNIX),
    "amazon ratings": ("amazon", [f"{u},{i},{r},{t}" for u, i, r, t in UNIX], UNIX),
    "amazon 2023 reviews": ("amazon", [json.dumps(amazon_2023(*row)) for row in UNIX], UNIX),
    "amazon 2023 ratings": (
        "amazon",
        ["user_id,parent_asin,rating,timestamp", *(f"{u},{i},{r},{t}000" for u, i, r, t in UNIX)],
        UNIX,
    ),
    "yelp reviews": ("yelp", [yelp_json(*row) for row in YELP], YELP),
    "ratings.dat": ("movielens", [f"{u}::{i}::{r}::{t}" for u, i, r, t in UNIX], UNIX),
    "ratings.csv": (
        "movielens",
        ["userId,movieId,rating,timestamp", *(f"{u},{i},{r},{t}" for u, i, r, t in UNIX)],
        UNIX,
    ),
    "u.data": ("movielens", [f"{u}\t{i}\t{r}\t{t}" for u, i, r, t in UNIX], UNIX),
    "sequences": (
        "sequences",
        ["7 3 3 5", "2 4"],
        [("7", "3", 0, 1), ("7", "3", 0, 2), ("7", "5", 0, 3), ("2", "4", 0, 1)],
    ),
}
WRAPPERS = {
    "plain": lambda lines: "\n".join(lines).encode(),
    "gzip": lambda lines: gzip.compress("\n".join([*lines, ""]).encode()),
    "byte order mark": lambda lines: b"\xef\xbb\xbf" + "\n".join([*lines, ""]).encode(),
    "windows line ends": lambda lines: "\r\n".join([*lines, ""]).encode(),
    "blank lines": lambda lines: ("\n \n" + "\n\n".join(lines) + "\n\r\n\n").encode(),
}


def write(path: Path, content: bytes | str | list[str]) -> Path:
    """Write a file of bytes, text, or lines."""
    if isinstance(content, list):
        content = "".join(f"{line}\n" for line in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path: Path) -> list[tuple[str, ...]]:
    """Header and rows of an atomic file."""
    text = path.read_bytes().decode()
    assert text.endswith("\n")
    assert "\r" not in text
    return [tuple(line.split("\t")) for line in text[:-1].split("\n")]


def histories(path: Path) -> dict[str, list[str]]:
    """User -> items as they stand in an ``.inter`` file; a user's lines stand together."""
    found: dict[str, list[str]] = {}
    last = None
    for user, item, *_ in rows(path)[1:]:
        assert user == last or user not in found
        found.setdefault(user, []).append(item)
        last = user
    return found


def loaded(folder: Path, name: str, **values: Any) -> FlatDataset:
    """The data set as training reads it."""
    load = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}} if name == "toy" else {}
    values = {"data_path": str(folder), **load, **values}
    dataset = create_dataset(Config("SASRec", name, overrides=values))
    dataset.build()
    return dataset


def read_histories(dataset: FlatDataset) -> dict[str, list[str]]:
    """User -> items in the order in which models see them."""
    users = dataset.field2id_token[dataset.uid_field][dataset.flat[dataset.uid_field]]
    items = dataset.field2id_token[dataset.iid_field][dataset.flat[dataset.iid_field]]
    found = defaultdict(list)
    for user, item in zip(users, items, strict=True):
        found[str(user)].append(str(item))
    return dict(found)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(tmp_path: Path, form: str, wrapper: str) -> None:
    source, lines, held = FORMATS[form]
    raw = write(tmp_path / "raw", WRAPPERS[wrapper](lines))
    done = prepare(source, [raw], tmp_path / "toy", k=0)
    assert done.path == tmp_path / "toy" / "toy.inter"
    header, *found = rows(done.path)
    users = list(dict.fromkeys(user for user, *_ in held))
    expected = sorted(held, key=lambda row: (users.index(row[0]), row[3]))
    if source == "sequences":
        assert header == ("user_id:token", "item_id:token", "timestamp:float")
        assert found == [(u, i, str(t)) for u, i, _, t in expected]
    else:
        assert header == ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
        assert [(u, i, float(r), int(t)) for u, i, r, t in found] == expected
    assert (done.n_read, done.n_selected, done.malformed) == (len(held), len(held), 0)


def test_every_source_has_a_format_here() -> None:
    assert {source for source, _, _ in FORMATS.values()} == set(SOURCES)
    assert sum(len(source.interactions) for source in SOURCES.values()) == len(FORMATS) - 2


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock is ten hours ahead of UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "XYZ-10")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_east")
def test_a_day_is_read_as_its_midnight_in_utc(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", [broken("yelp", date="1970-01-02")])
    done = prepare("yelp", [raw], tmp_path / "toy", k=0)
    assert rows(done.path)[1] == ("u", "b", "1.0", "86400")


def test_files_are_read_one_after_the_other_whatever_their_formats(tmp_path: Path) -> None:
    first = write(tmp_path / "a", FORMATS["ratings.csv"][1])
    second = write(tmp_path / "b", gzip.compress(b"9::77::1::1260759144\n"))
    done = prepare("movielens", [first, second], tmp_path / "toy", k=0)
    assert histories(done.path) == {"9": ["31", "2", "77"], "1": ["2"]}


AWKWARD = ["NA", "null", "0", "-1", 'a"b', "é漢字", "it's", "#1", "x y", "nan", "\u2028z", "\x85z"]


def test_awkward_ids_survive_to_training(tmp_path: Path) -> None:
    lines = [json.dumps(amazon_json(f"u{u}", i, 5, t)) for u in "ab" for t, i in enumerate(AWKWARD)]
    lines += [json.dumps(amazon_json(name, "0", 1, 1)) for name in AWKWARD for _ in range(3)]
    done = prepare("amazon", [write(tmp_path / "raw", lines)], tmp_path / "toy", k=0)
    found = read_histories(loaded(tmp_path, "toy"))
    assert found == {"ua": AWKWARD, "ub": AWKWARD, **{name: ["0"] * 3 for name in AWKWARD}}
    assert done.statistics == Statistics(2 + len(AWKWARD), len(AWKWARD), len(lines))


def test_ids_may_be_numbers_and_ratings_are_kept_exactly(tmp_path: Path) -> None:
    lines = [json.dumps(amazon_json(7, 10**20, 4.3, "1"))]  # type: ignore[arg-type]
    done = prepare("amazon", [write(tmp_path / "raw", lines)], tmp_path / "toy", k=0)
    assert rows(done.path)[1] == ("7", "1" + "0" * 20, "4.3", "1")


def test_quoted_csv(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", ['"userId","movieId","rating","timestamp"', '"1","2","3.5","4"'])
    done = prepare("movielens", [raw], tmp_path / "toy", k=0)
    assert rows(done.path)[1] == ("1", "2", "3.5", "4")


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("amazon", "[1, 2]", r"begins with '\[1, 2\]', which is none of: reviews, a JSON object"),
        ("amazon", "PK\x03\x04", r"ratings 'user,item,rating,timestamp' \(plain or .gz\)"),
        ("yelp", "u,b,5,2019-01-01", "none of: reviews, a JSON object a line"),
        ("movielens", "1,2,3,4", r"none of: ratings.dat; ratings.csv; u.data"),
        ("movielens", "user,movie,rating,timestamp", "ratings.csv"),
        ("sequences", "1\t2\t3\t4", r"begins with '1\\t2\\t3\\t4'"),
        ("sequences", "1,2,3", "lines 'user item item ...'"),
        ("sequences", "1::2::3 ::4", "lines 'user item item ...'"),
        ("sequences", '{"a": 1}', "lines 'user item item ...'"),
        ("sequences", "x" * 500, r"begins with 'x{77}\.\.\.', which"),
    ],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path, source: str, content: str, message: str
) -> None:
    raw = write(tmp_path / "raw", content)
    with pytest.raises(UserError, match=message) as caught:
        prepare(source, [raw], tmp_path / "toy", skip_malformed=True)
    assert str(caught.value).startswith(str(raw))
    assert not (tmp_path / "toy").exists()


def test_missing_damaged_and_empty_files(tmp_path: Path) -> None:
    output = tmp_path / "toy"
    with pytest.raises(UserError, match="nowhere is not a file; give files as downloaded"):
        prepare("yelp", [tmp_path / "nowhere"], output)
    with pytest.raises(UserError, match="none of 0 interactions is selected"):
        prepare("yelp", [write(tmp_path / "empty", "\n \n")], output)
    packed = gzip.compress(json.dumps(amazon_json("u", "i", 1, 1)).encode() + b"\n", mtime=0)
    lines = gzip.compress(os.urandom(30).hex().encode() + b",i,1,1\n") + packed
    cut = write(tmp_path / "cut.gz", packed[:-9])
    with pytest.raises(UserError, match=r"cut.gz is damaged after line \d: "):
        prepare("amazon", [cut], output, k=0, skip_malformed=True)
    torn = write(tmp_path / "torn.gz", lines[:40] + b"\0\0\0" + lines[43:])
    with pytest.raises(UserError, match=r"torn.gz is damaged after line \d: "):
        prepare("amazon", [torn], output, k=0, skip_malformed=True)
    assert not output.exists()


# ---------------------------------------------------------------- malformed lines

GOOD = {"amazon": json.dumps(amazon_json("u", "i", 1, 1)), "yelp": yelp_json("u", "b", 1, 1)}
GOOD |= {"movielens": "1::2::3::4", "sequences": "u a b"}


def broken(source: str, **changes: Any) -> str:
    """A good JSON line with other values; None takes a field out."""
    values = json.loads(GOOD[source]) | changes
    return json.dumps({key: value for key, value in values.items() if value is not None})


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        ("amazon", '{"reviewerID": "A1", ', "not JSON"),
        ("amazon", '{"a": ' * 100_000, "not JSON"),
        ("amazon", "{'a': __import__('os').getpid()}", "not JSON"),
        ("amazon", "[1]", "not a JSON object"),
        ("amazon", broken("amazon", asin=None), "no field asin"),
        ("amazon", broken("amazon", asin=""), "'' is not an id"),
        ("amazon", broken("amazon", asin=" "), "' ' is not an id"),
        ("amazon", broken("amazon", asin="a\tb"), r"'a\\tb' is not an id"),
        ("amazon", broken("amazon", asin="a\nb"), r"'a\\nb' is not an id"),
        ("amazon", broken("amazon", asin="a\rb"), r"'a\\rb' is not an id"),
        ("amazon", broken("amazon", asin="a\0b"), r"'a\\x00b' is not an id"),
        ("amazon", broken("amazon", asin="\ud800"), r"'\\ud800' is not an id"),
        ("amazon", broken("amazon", reviewerID=["u"]), r"\['u'\] is not an id"),
        ("amazon", broken("amazon", reviewerID=True), "True is not an id"),
        ("amazon", broken("amazon", reviewerID=1.5), "1.5 is not an id"),
        ("amazon", broken("amazon", overall="good"), "rating 'good' is not a number"),
        ("amazon", broken("amazon", overall=float("nan")), "rating nan is not a number"),
        ("amazon", broken("amazon", overall="inf"), "rating 'inf' is not a number"),
        ("amazon", broken("amazon", overall=[5]), r"rating \[5\] is not a number"),
        (
            "amazon",
            broken("amazon", unixReviewTime=1.5),
            "time 1.5 is not a whole number of seconds",
        ),
        ("amazon", broken("amazon", unixReviewTime=2**63), "is not a whole number of seconds"),
        ("amazon", broken("amazon", unixReviewTime=[]), r"time \[\] is not a whole number"),
        ("yelp", "{'user_id': 'u'}", "not JSON"),
        ("yelp", broken("yelp", date="2019-1-1"), "date '2019-1-1' is not YYYY-MM-DD or"),
        ("yelp", broken("yelp", date="2019-W01-1"), "date '2019-W01-1' is not YYYY-MM-DD"),
        ("yelp", broken("yelp", date="2019-02-30"), "day is out of range for month"),
        ("yelp", broken("yelp", date="2019-01-01 24:00:00"), "hour must be in"),
        ("yelp", broken("yelp", date="2019-01-01 00:00:00 "), "is not YYYY-MM-DD"),
        ("yelp", broken("yelp", date=20190101), "date 20190101 is not YYYY-MM-DD"),
        ("yelp", broken("yelp", stars=None, date=None), "no field stars, date"),
        ("movielens", "1::2::3", "3 fields instead of 4"),
        ("movielens", "1::2::3::4::5", "5 fields instead of 4"),
        ("movielens", "1::::3::4", "'' is not an id"),
        ("movielens", "1::2::::4", "rating '' is not a number"),
        ("movielens", "1::2::3::", "time '' is not a whole number"),
        ("sequences", "lonely", "user 'lonely' has no items"),
        ("sequences", "u c", "user 'u' has a line already"),
    ],
)
def test_malformed_lines_are_named_or_counted(
    tmp_path: Path, source: str, line: str, reason: str
) -> None:
    raw = write(tmp_path / "raw", [GOOD[source], "", line])
    with pytest.raises(UserError, match=reason) as caught:
        prepare(source, [raw], tmp_path / "toy", k=0)
    assert str(caught.value).startswith(f"{raw}, line 3: ")
    assert str(caught.value).endswith(". --skip_malformed counts such lines and goes on")
    assert repr(line[:20])[1:-1] in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(raw))
    assert not (tmp_path / "toy").exists()
    done = prepare(source, [raw], tmp_path / "toy", k=0, skip_malformed=True)
    assert (done.malformed, len(done.shown)) == (1, 1)
    assert done.shown[0].startswith(f"{raw}, line 3: ")
    assert len(rows(done.path)) == (3 if source == "sequences" else 2)


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, stock = write(tmp_path / "raw", ["1::2::3::4"]), open

    def denied(name: Any, *given: Any, **named: Any) -> Any:
        if str(name) == str(raw):
            raise PermissionError(13, "Permission denied", str(raw))
        return stock(name, *given, **named)

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(UserError, match=f"{raw} cannot be read: Permission denied"):
        prepare("movielens", [raw], tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_bytes_that_are_not_utf_8_are_malformed(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", b"1::2::3::4\r\n\xe9::2::3::4\r\n")
    with pytest.raises(UserError, match="line 2: 'utf-8' codec can't decode byte 0xe9"):
        prepare("movielens", [raw], tmp_path / "toy", k=0)


def test_the_end_of_a_line_is_no_part_of_it(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", b"1::2::3::4\r\n1::2::3::x\r\n")
    with pytest.raises(UserError, match=r"time 'x' is not a whole .* unit: '1::2::3::x'"):
        prepare("movielens", [raw], tmp_path / "toy", k=0)


def test_a_line_that_csv_cannot_read(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", ["u,i,1,1", f"{'x' * 200_000},i,1,1"])
    with pytest.raises(UserError, match=r"line 2: not CSV \(field larger than field limit"):
        prepare("amazon", [raw], tmp_path / "toy", k=0)


def test_all_malformed_lines_are_counted_and_some_are_shown(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", ["1::2::3::4", *(f"bad{n}" for n in range(40)), "1::3::3::5"])
    done = prepare("movielens", [raw], tmp_path / "toy", k=0, skip_malformed=True)
    assert done.malformed == 40
    assert [line.partition(": ")[2] for line in done.shown] == [
        f"1 fields instead of 4: 'bad{n}'" for n in range(5)
    ]
    assert histories(done.path) == {"1": ["2", "3"]}
    only = write(tmp_path / "only", ["1::2::x::4"])
    with pytest.raises(UserError, match=r"none of 0 .*\n.*only, line 1: rating 'x'"):
        prepare("movielens", [only], tmp_path / "toy2", skip_malformed=True)


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("start", "end", "kept"),
    [
        (None, None, "abcde"),
        ("2019-01-02", None, "bcde"),
        (None, "2019-01-02", "abcd"),
        (None, "2019-01-02 00:00:00", "ab"),
        ("2019-01-02 00:00:01", "2019-01-02 12:00:00", "c"),
        ("2019-01-02T00:00:01", "2019-01-02T23:59:59", "cd"),
    ],
)
def test_the_window_includes_both_ends(
    tmp_path: Path, start: str | None, end: str | None, kept: str
) -> None:
    dates = ["01-01 23:59:59", "01-02 00:00:00", "01-02 12:00:00", "01-02 23:59:59", "01-03"]
    lines = [
        broken("yelp", business_id=item, date=f"2019-{date}")
        for item, date in zip("abcde", dates, strict=True)
    ]
    done = prepare(
        "yelp",
        [write(tmp_path / "raw", lines)],
        tmp_path / "toy",
        k=0,
        selection=select(start, end, None),
    )
    assert "".join(item for _, item, *_ in rows(done.path)[1:]) == kept
    assert (done.n_read, done.n_selected) == (5, len(kept))


def test_the_least_rating_is_kept(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", [f"1::{r}::{r}::4" for r in (3, 3.5, 4, 5, 0)])
    done = prepare("movielens", [raw], tmp_path / "toy", k=0, selection=select(None, None, 4))
    assert histories(done.path) == {"1": ["4", "5"]}
    with pytest.raises(UserError, match="none of 5 interactions is selected"):
        prepare("movielens", [raw], tmp_path / "b", selection=Selection(min_rating=6))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("2019", None, None), "--from=2019: date '2019' is not YYYY-MM-DD or YYYY-MM-DD HH"),
        ((None, "2019-13-01", None), "--to=2019-13-01: month must be in 1..12"),
        (("2019-01-02", "2019-01-01", None), "--from=2019-01-02 is after --to=2019-01-01"),
        ((None, None, float("nan")), "--min_rating=nan must be a number"),
    ],
)
def test_impossible_selections(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(*given)


# ---------------------------------------------------------------- k-core


def naive_core(pairs: list[tuple[int, int]], k: int) -> list[int]:
    """Take out one interaction at a time until every user and item has k."""
    left = list(range(len(pairs)))
    while True:
        users = Counter(pairs[p][0] for p in left)
        items = Counter(pairs[p][1] for p in left)
        for p in left:
            if users[pairs[p][0]] < k or items[pairs[p][1]] < k:
                left.remove(p)
                break
        else:
            return left


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
def test_k_core_is_that_of_taking_out_one_by_one(k: int) -> None:
    rng = np.random.default_rng(k)
    sizes = []
    for n_users, n_items, n in [(12, 9, 45), (30, 40, 120), (25, 10, 100), (3, 3, 40), (1, 1, 1)]:
        pairs = [(int(u), int(i)) for u, i in rng.integers(0, (n_users, n_items), (n, 2))]
        user, item = np.array(pairs, np.int32).T
        found = k_core(user, item, k)
        assert found.tolist() == naive_core(pairs, k)
        sizes.append((len(found), n))
    assert any(left > 0 for left, _ in sizes)
    assert k < 2 or any(left < n for left, n in sizes)


def test_k_core_reaches_a_fixed_point() -> None:
    """With k = 2 a chain is taken apart from its loose ends; a square stays."""
    n = 50
    chain = [(u, i) for u in range(n) for i in (u - 1, u) if i >= 0]
    square = [(u, i) for u in (n, n + 1) for i in (n, n + 1)]
    user, item = np.array(chain + square, np.int32).T
    assert k_core(user, item, 2).tolist() == list(range(len(chain), len(chain) + 4))


def test_repeated_visits_count_and_stay(tmp_path: Path) -> None:
    lines = [f"u::i::5::{t}" for t in (3, 1, 2)] + ["v::j::5::1", "v::i::5::1"]
    raw = write(tmp_path / "raw", lines)
    done = prepare("movielens", [raw], tmp_path / "toy", k=3)
    assert rows(done.path)[1:] == [("u", "i", "5.0", str(t)) for t in (1, 2, 3)]
    assert done.n_repeated == 2
    assert "2 repeat an item of their user; rm_dup_inter decides" in done.report()
    assert done.statistics == Statistics(1, 1, 3)
    assert "1 items, 3 actions, average length 3.00, sparsity 0.00%" in done.report()


def test_pairs_that_are_dropped_later_change_no_result(tmp_path: Path) -> None:
    """Reading drops repeated pairs and takes the k-core: the same with and without one before."""
    rng = random.Random(1)
    lines = [f"{rng.randrange(25)}::{rng.randrange(20)}::1::{t}" for t in range(300)]
    raw = write(tmp_path / "raw", lines)
    settings = {f"{name}_inter_num_interval": "[5,inf)" for name in ("user", "item")}
    found = []
    for k in (0, 5):
        done = prepare("movielens", [raw], tmp_path / f"k{k}" / "toy", k=k)
        left = {(user, item) for user, items in histories(done.path).items() for item in items}
        assert done.n_repeated == done.statistics.actions - len(left) > 50
        found.append(
            read_histories(loaded(tmp_path / f"k{k}", "toy", rm_dup_inter="first", **settings))
        )
    assert found[0] == found[1]
    assert 0 < len(found[0]) < 25


def test_nothing_left(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", ["1::2::3::4"])
    with pytest.raises(UserError, match="--k_core=5 leaves none of 1 interactions"):
        prepare("movielens", [raw], tmp_path / "toy")
    with pytest.raises(UserError, match="--k_core=-1 must be at least 0"):
        prepare("movielens", [raw], tmp_path / "toy", k=-1)
    assert not (tmp_path / "toy").exists()


# ---------------------------------------------------------------- order of time


class RecBoleRows(RecBoleFixes, SequentialDataset):
    """RecBole's own order, by float32 times; only what stops it on today's pandas is mended."""


def test_training_sees_the_order_of_time_and_of_the_files(tmp_path: Path) -> None:
    """Times a second apart, which float32 cannot tell, and many ties, in files of mixed users."""
    rng = random.Random(0)
    events = [
        (f"u{rng.randrange(6)}", f"i{rng.randrange(40)}", 1_400_000_000 + rng.randrange(60))
        for _ in range(400)
    ]
    for name, part in (("one", events[:250]), ("two", events[250:])):
        write(tmp_path / name, [f"{u},{i},5.0,{t}" for u, i, t in part])
    done = prepare("amazon", [tmp_path / "one", tmp_path / "two"], tmp_path / "toy")
    expected: dict[str, list[str]] = {user: [] for user, _, _ in events}
    for user, item, _ in sorted(events, key=lambda event: event[2]):  # stable
        expected[user].append(item)
    assert len({np.float32(t) for _, _, t in events}) < 3
    assert histories(done.path) == expected
    assert list(histories(done.path)) == list(expected)
    assert read_histories(loaded(tmp_path, "toy")) == expected

    load = {"data_path": str(tmp_path), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    theirs = RecBoleRows(Config("SASRec", "toy", overrides=load))
    theirs._change_feat_format()  # sorts, then makes one row of each item but a user's first
    names = theirs.field2id_token["item_id"]
    for number, user in enumerate(theirs.field2id_token["user_id"][1:], start=1):
        seen = theirs.inter_feat["item_id"][theirs.inter_feat["user_id"] == number]
        assert list(names[seen]) == expected[str(user)][1:]


UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_of_times_is_told_by_their_size(tmp_path: Path, unit: str) -> None:
    """Windows hold the dates that were meant, and the file has seconds, whatever the unit."""
    days = {"a": "1973-06-01", "b": "1999-12-31", "c": "2023-05-01", "d": "2023-05-02"}
    seconds = {
        i: int(datetime.fromisoformat(f"{d}T23:59:59Z").timestamp()) for i, d in days.items()
    }
    raw = write(tmp_path / "raw", [f"u,{i},5,{t * UNITS[unit]}" for i, t in seconds.items()])
    done = prepare("amazon", [raw], tmp_path / "all", k=0)
    assert rows(done.path)[1:] == [("u", i, "5.0", str(t)) for i, t in seconds.items()]
    written = "" if unit == "seconds" else ", written as seconds"
    span = "1973-06-01T23:59:59 to 2023-05-02T23:59:59, UTC"
    assert f"\ntimes taken for {unit} since 1970{written}: {span}\n" in done.report()
    window = select("1999-12-31", "2023-05-01", None)
    done = prepare("amazon", [raw], tmp_path / "some", k=0, selection=window)
    assert [item for _, item, *_ in rows(done.path)[1:]] == ["b", "c"]
    with pytest.raises(UserError, match=f"none of 4 .* is selected; times taken for {unit} since"):
        prepare("amazon", [raw], tmp_path / "none", k=0, selection=select("2024-01-01", None, None))


def test_parts_of_a_second_keep_their_order(tmp_path: Path) -> None:
    """Also beside a file in seconds: a first, then b, c and d within one second, then e."""
    fine = [f"u,{i},5,{1_600_000_000_000 + ms}" for i, ms in (("d", 900), ("c", 30), ("b", 2))]
    files = [write(tmp_path / "fine", fine), tmp_path / "coarse"]
    write(tmp_path / "coarse", [f"u,{i},5,{1_600_000_000 + s}" for i, s in (("e", 1), ("a", -1))])
    done = prepare("amazon", files, tmp_path / "toy", k=0)
    assert [(item, float(time)) for _, item, _, time in rows(done.path)[1:]] == [
        ("a", 1_599_999_999),
        ("b", 1_600_000_000.002),
        ("c", 1_600_000_000.03),
        ("d", 1_600_000_000.9),
        ("e", 1_600_000_001),
    ]
    assert "times taken for milliseconds (3) and seconds (2) since 1970, writ" in done.report()
    assert read_histories(loaded(tmp_path, "toy")) == {"u": list("abcde")}


def test_dates_are_no_numbers(tmp_path: Path) -> None:
    """The last year that can be written is no number of milliseconds."""
    raw = write(tmp_path / "raw", [yelp_json("u", "b", 5, 253_402_300_799)])
    done = prepare("yelp", [raw], tmp_path / "toy", k=0)
    assert rows(done.path)[1:] == [("u", "b", "5.0", "253402300799")]
    assert "times taken for dates, written as seconds since 1970: 9999-12-31T23:59" in done.report()


def test_sequences_keep_their_order(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", [f"{user} {' '.join(s)}" for user, s in SEQUENCES.items()])
    prepare("sequences", [raw], tmp_path / "toy", k=0)
    assert read_histories(loaded(tmp_path, "toy")) == SEQUENCES


# ---------------------------------------------------------------- titles


def u_item(item: str, title: str) -> str:
    """A line of ml-100k's u.item."""
    return "|".join([item, title, "01-Jan-1995", "", "http://x", *"0" * 19])


TITLES: dict[str, tuple[str, bytes]] = {
    "amazon metadata": (
        "amazon",
        b"{'asin': 'b', 'title': 'Soap\\tbar \"A\"', 'price': 1.5}\n{'asin': 'a', 'rank': {}}\n"
        b'{"asin": "c", "title": "it\'s\\u0000\\udcff \\u00e9"}\n'
        b"{'asin': 'z', 'title': 'not here'}\n{'asin': 'b', 'title': 'again'}\n",
    ),
    "businesses": (
        "yelp",
        "\n".join(
            json.dumps({"business_id": item, "name": name, "stars": 4})
            for item, name in [
                ("b", 'Soap\tbar\n"A"'),
                ("c", "it's é"),
                ("z", "not here"),
                ("a", ""),
            ]
        ).encode(),
    ),
    "movies.dat": (
        "movielens",
        'z::no::X\nb::Soap\tbar "A"::Drama\nc::it\'s é::'.encode("latin-1"),
    ),
    "movies.csv": (
        "movielens",
        'movieId,title,genres\nb,"Soap\tbar ""A""",Drama\nc,it\'s é,X\nz,no,X\n'.encode(),
    ),
    "u.item": (
        "movielens",
        "\n".join([u_item("b", 'Soap bar "A"'), u_item("c", "it's é")]).encode("latin-1"),
    ),
}
LINES = {
    "amazon": lambda item, time: json.dumps(amazon_json("u", item, 1, time)),
    "yelp": lambda item, time: yelp_json("u", item, 1, time),
    "movielens": lambda item, time: f"u::{item}::1::{time}",
}


@pytest.mark.parametrize("form", TITLES)
def test_titles(tmp_path: Path, form: str) -> None:
    source, content = TITLES[form]
    raw = write(tmp_path / "raw", [LINES[source](item, t) for t, item in enumerate("abcb")])
    titles = write(tmp_path / "titles", content)
    done = prepare(source, [raw], tmp_path / "toy", k=0, titles=titles)
    header, *found = rows(tmp_path / "toy" / "toy.item")
    assert header == ("item_id:token", "title:token_seq")
    assert sorted(found) == [("b", 'Soap bar "A"'), ("c", "it's é")]
    assert done.n_titles == 2
    dataset = loaded(tmp_path, "toy", item_title_field="title")
    assert dataset.item_titles() == dict(found)


def test_titles_of_the_k_core_under_the_name_in_the_settings(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", ["1::a::1::1", "1::a::1::2", "1::b::1::3"])
    titles = write(tmp_path / "titles", ["b::B::", "a::A::"])
    prepare("movielens", [raw], tmp_path / "ml-100k", k=2, titles=titles)
    found = rows(tmp_path / "ml-100k" / "ml-100k.item")
    assert found == [("item_id:token", "movie_title:token_seq"), ("a", "A")]


def test_malformed_titles_count_too(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", ["1::a::1::1", "oops"])
    titles = write(tmp_path / "titles", ["a::A::", "b::B"])
    done = prepare("movielens", [raw], tmp_path / "toy", k=0, titles=titles, skip_malformed=True)
    assert done.malformed == 2
    assert done.shown[1].startswith(f"{titles}, line 2: 2 fields instead of 3")
    with pytest.raises(UserError, match=r"none of: movies\.dat; movies\.csv; u\.item"):
        prepare("movielens", [raw], tmp_path / "b", k=0, titles=raw, skip_malformed=True)
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------- files


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A ratings.dat of one user."""
    return write(tmp_path / "ratings.dat", ["1::a::1::1", "1::b::1::2"])


def test_existing_files_are_refused_before_anything_is_read(tmp_path: Path, raw: Path) -> None:
    done = prepare("movielens", [raw], tmp_path / "toy", k=0)
    before = done.path.read_bytes()
    with pytest.raises(UserError, match=r"toy.inter exists; --overwrite replaces it"):
        prepare("movielens", [tmp_path / "nowhere"], tmp_path / "toy", k=0)
    assert done.path.read_bytes() == before
    write(raw, ["1::c::1::1"])
    prepare("movielens", [raw], tmp_path / "toy", k=0, overwrite=True)
    assert histories(done.path) == {"1": ["c"]}


def test_titles_and_the_output_are_tried_before_anything_is_read(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the interactions may take hours."""

    def read(*_: object) -> None:
        raise AssertionError("interactions were read")

    monkeypatch.setattr(module.Table, "read", read)
    there = {path.name for path in tmp_path.iterdir()}
    titles = tmp_path / "movise.dat"
    with pytest.raises(UserError, match=r"movise\.dat is not a file"):
        prepare("movielens", [raw], tmp_path / "toy", titles=titles)
    with pytest.raises(UserError, match=r"which is none of: movies\.dat; movies"):
        prepare("movielens", [raw], tmp_path / "toy", titles=raw)
    with pytest.raises(UserError, match=r"--output=.*below cannot be written: .*Not a directory"):
        prepare("movielens", [raw], raw / "folder" / "below")
    assert {path.name for path in tmp_path.iterdir()} == there


def test_titles_of_other_data_are_not_left_beside_new_data(tmp_path: Path, raw: Path) -> None:
    titles = write(tmp_path / "movies.dat", ["a::A::"])
    item = write(tmp_path / "toy.item", "").rename(tmp_path / "kept")
    (tmp_path / "toy").mkdir()
    item.rename(tmp_path / "toy" / "toy.item")
    with pytest.raises(UserError, match=r"toy.item exists; --overwrite replaces it"):
        prepare("movielens", [raw], tmp_path / "toy", k=0)
    with pytest.raises(UserError, match=r"toy.item belongs to the data to be replaced; give --ti"):
        prepare("movielens", [raw], tmp_path / "toy", k=0, overwrite=True)
    prepare("movielens", [raw], tmp_path / "toy", k=0, titles=titles, overwrite=True)
    assert rows(tmp_path / "toy" / "toy.item")[1:] == [("a", "A")]


@pytest.mark.parametrize("failing", ["inter", "item"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_while_writing_changes_nothing(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, failing: str, existing: bool
) -> None:
    titles = write(tmp_path / "movies.dat", ["a::A::", "b::B::"])
    folder = tmp_path / "toy"
    if existing:
        prepare("movielens", [raw], folder, k=0, titles=titles)
    before = {path: path.read_bytes() for path in folder.glob("**/*")}
    write(raw, ["1::b::1::1"])
    real = module._write

    def fail(frame: Any, path: str) -> None:
        real(frame, path)
        assert Path(path).stat().st_size > 0
        if f"toy.{failing}" in path:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare("movielens", [raw], folder, k=0, titles=titles, overwrite=True)
    assert {path: path.read_bytes() for path in folder.glob("**/*")} == before
    assert len(before) == (3 if existing else 0)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".", r"--output=\. must be a folder with the name of the data set: DIR/NAME makes"),
        ("dataset/..", "must be a folder with the name"),
        ("dataset/toy.inter", "must be a folder with the name"),
        ("ratings.dat", "is a file; it must be a folder, new or not"),
    ],
)
def test_impossible_outputs(raw: Path, output: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare("movielens", [raw], output, k=0)
    assert [path.name for path in raw.parent.iterdir() if path.is_dir()] == []


def test_what_sequences_do_not_have(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", ["1 2 3"])
    with pytest.raises(UserError, match="--source=sequences has no dates and no ratings"):
        prepare("sequences", [raw], tmp_path / "toy", selection=select(None, None, 0))
    with pytest.raises(UserError, match="raw: --source=sequences has no titles"):
        prepare("sequences", [raw], tmp_path / "toy", titles=raw)


class Bar:
    """Stands for tqdm and records what it is told."""

    made: "list[Bar]"

    def __init__(self, **options: Any) -> None:
        self.options, self.n = options, 0
        type(self).made.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int) -> None:
        """Move on by ``n`` bytes."""
        assert n >= 0
        self.n += n


def test_progress_is_in_bytes_of_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    content = "".join(f"{n}::i::1::1\n" for n in range(10_000)).encode()
    plain, packed = write(tmp_path / "a", content), write(tmp_path / "b", gzip.compress(content))
    prepare("movielens", [plain, packed], tmp_path / "quiet", k=0)
    assert capfd.readouterr() == ("", "")  # not a terminal
    monkeypatch.setattr(Bar, "made", [], raising=False)
    monkeypatch.setattr("recbole_simdiff.data.reader.tqdm", Bar)
    prepare("movielens", [plain, packed], tmp_path / "toy", k=0)
    (bar,) = Bar.made
    assert bar.options["total"] == bar.n == plain.stat().st_size + packed.stat().st_size
    assert bar.options["disable"] is None


def test_memory_is_some_numbers_a_line(tmp_path: Path) -> None:
    """A dictionary or tuple a line would take several hundred bytes; the text takes a thousand."""
    text, peak = "x" * 1000, []
    for n in (5_000, 25_000):
        review = yelp_json("U", "B", 1, 1546300800).replace("good", text)
        lines = (
            review.replace('"U"', f'"user{k % 40}"').replace('"B"', f'"shop{k % 30}"')
            for k in range(n)
        )
        raw = write(tmp_path / f"{n}", "\n".join(lines))
        tracemalloc.start()
        try:
            prepare("yelp", [raw], tmp_path / f"y{n}")
            peak.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert (peak[1] - peak[0]) / 20_000 < 150


# ---------------------------------------------------------------- data sets with settings


def test_yelp_is_written_as_its_settings_read_it(tmp_path: Path) -> None:
    """Column names and window of properties/dataset/yelp.yaml; reading takes nothing more out."""
    rng = random.Random(3)
    edges = [int(datetime(2019, *day, tzinfo=UTC).timestamp()) for day in ((1, 1), (12, 31))]
    lines = [
        yelp_json(f"u{rng.randrange(12)}", f"b{rng.randrange(12)}", 5, time + rng.randrange(-9, 10))
        for time in edges
        for _ in range(200)
    ]
    raw = write(tmp_path / "raw", lines)
    titles = write(tmp_path / "titles", '{"business_id": "b1", "name": "One"}')
    window = select("2019-01-01", "2019-12-31 00:00:00", None)
    done = prepare("yelp", [raw], tmp_path / "yelp", selection=window, titles=titles)
    assert 100 < done.n_selected < 300
    assert rows(done.path)[0] == (
        "user_id:token",
        "business_id:token",
        "rating:float",
        "date:float",
    )
    times = [int(row[3]) for row in rows(done.path)[1:]]
    assert (min(times), max(times)) == tuple(edges)
    dataset = loaded(tmp_path, "yelp", item_title_field="title")
    assert dataset.statistics == done.statistics
    assert read_histories(dataset) == histories(done.path)
    assert dataset.item_titles() == {"b1": "One"}
    assert done.hint == f"--dataset=yelp --data_path={tmp_path} --item_title_field=title"
    assert "differs from SimDiffRec, Table 1: 30,431 users, 20,033 items, 316,354" in done.report()


ML_100K = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k.inter"


def test_movielens_100k_goes_round(tmp_path: Path) -> None:
    """The file that RecBole ships, as u.data and as sequences: the same histories, its counts."""
    lines = ML_100K.read_text().splitlines()[1:]
    done = prepare("movielens", [write(tmp_path / "u.data", lines)], tmp_path / "ml-100k", k=0)
    expected = defaultdict(list)
    for user, item, _, _ in sorted(map(str.split, lines), key=lambda row: int(row[3])):
        expected[user].append(item)
    assert histories(done.path) == expected
    assert "agrees with GroupLens' u.info: 943 users, 1,682 items, 100,000 actions" in done.report()

    text = write(tmp_path / "text", [" ".join([user, *s]) for user, s in expected.items()])
    again = prepare("sequences", [text], tmp_path / "again" / "ml-100k")
    dataset = loaded(tmp_path, "ml-100k")
    assert dataset.statistics == again.statistics != done.statistics
    assert read_histories(dataset) == histories(again.path)


@pytest.mark.parametrize("delta", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_published_statistics_must_agree_in_every_count(delta: tuple[int, int, int]) -> None:
    (beauty,) = published("amazon-beauty")
    assert beauty.statistics == Statistics(22_363, 12_101, 198_502)
    counts = [a + b for a, b in zip((22_363, 12_101, 198_502), delta, strict=True)]
    path = Path("amazon-beauty/amazon-beauty.inter")
    done = module.Prepared(path, Statistics(*counts), 9, 8, 0, None, "--hint", 0, ())
    verdict = "differs from" if any(delta) else "agrees with"
    assert f"\n  {verdict} SimDiffRec, Table 1: 22,363 users, 12,101 items" in done.report()
    assert f"\namazon-beauty: {Statistics(*counts)}\n" in done.report()
    assert published("toy") == []


# ---------------------------------------------------------------- the command


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """call(*arguments) of the prepare command -> exit code, standard output, standard error."""

    def run(*given: object) -> tuple[int, str, str]:
        try:
            code = cli.main(["prepare", *map(str, given)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return run


def test_command(tmp_path: Path, call: Any) -> None:
    first = write(tmp_path / "one.csv", ["a,x,5,3", "a,y,1,2", "oops", "b,x,4,1"])
    second = write(tmp_path / "two.csv.gz", gzip.compress(b"a,z,5,1\nb,z,5,4\n"))
    titles = write(tmp_path / "meta.json", '{"asin": "z", "title": "Zed"}')
    given = ("--source=amazon", "--input", first, second, f"--titles={titles}")
    given += (f"--output={tmp_path / 'data' / 'toy'}", "--k_core=2", "--min_rating=2")
    code, out, err = call(*given)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {first}, line 3: 1 fields instead of 4: 'oops'")
    code, out, err = call(*given, "--skip_malformed")
    assert code == 0
    assert err == (
        "1 malformed lines skipped, for example\n"
        f"  {first}, line 3: 1 fields instead of 4: 'oops'\n"
    )
    inter = tmp_path / "data" / "toy" / "toy.inter"
    assert histories(inter) == {"a": ["z", "x"], "b": ["x", "z"]}
    assert out.splitlines() == [
        "5 interactions read, 4 selected, 4 left by the k-core",
        "times taken for seconds since 1970: 1970-01-01T00:00:01 to 1970-01-01T00:00:04, UTC",
        "toy: 2 users, 2 items, 4 actions, average length 2.00, sparsity 0.00%, 0 equal times",
        str(inter),
        f"{inter.with_suffix('.item')}, 1 titles",
        f"train on it with --dataset=toy --data_path={tmp_path / 'data'} --item_title_field=title",
    ]
    code, _, err = call(*given, "--skip_malformed")
    assert code == 2
    assert err == f"error: {inter} exists; --overwrite replaces it\n"
    assert call(*given, "--skip_malformed", "--overwrite")[0] == 0


def test_the_printed_arguments_train_on_it(tmp_path: Path, call: Any) -> None:
    raw = write(tmp_path / "raw", [f"{user} {' '.join(s)}" for user, s in SEQUENCES.items()])
    folder = tmp_path / "my data"
    _, out, _ = call(
        "--source=sequences", f"--input={raw}", f"--output={folder / 'fresh'}", "--k_core=0"
    )
    hint = out.splitlines()[-1].removeprefix("train on it with ")
    values = parse_overrides(shlex.split(hint))
    dataset = create_dataset(Config("SASRec", values.pop("dataset"), overrides=values))
    dataset.build()
    assert read_histories(dataset) == SEQUENCES


def test_window_on_the_command_line(tmp_path: Path, call: Any) -> None:
    dates = ("2018-12-31 23:59:59", "2019-01-01", "2019-12-30 23:59:59", "2019-12-31 00:00:00")
    lines = [broken("yelp", business_id=str(n), date=date) for n, date in enumerate(dates)]
    given = ("--source=yelp", f"--input={write(tmp_path / 'raw', lines)}", "--k_core=0")
    given += ("--from=2019-01-01", "--to=2019-12-30", f"--output={tmp_path / 'toy'}")
    assert call(*given)[0] == 0
    assert histories(tmp_path / "toy" / "toy.inter") == {"u": ["1", "2"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--source=netflix"], "invalid choice: 'netflix'"),
        (["--k_core=five"], "argument --k_core: invalid int value: 'five'"),
        (["--input="], "is not a file"),
        (["--kcore=5"], "error: prepare does not know --kcore; see prepare --help"),
        (["--from=yesterday"], "error: --from=yesterday: date 'yesterday' is not YYYY-MM-DD"),
    ],
)
def test_mistakes_exit_with_code_2(
    tmp_path: Path, call: Any, given: list[str], message: str
) -> None:
    base = ["--source=amazon", f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'toy'}"]
    code, out, err = call(*base, *given)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "toy").exists()


def test_help_names_every_option_and_file(call: Any) -> None:
    code, out, _ = call("--help")
    assert code == 0
    words = ["--source", "--input", "--output", "--titles", "--k_core", "--from", "--to", "UTC"]
    words += ["--min_rating", "--skip_malformed", "--overwrite", "ratings.dat", "u.item", *SOURCES]
    for word in words:
        assert word in out, word
    assert "prepare --source=movielens" in EPILOG
