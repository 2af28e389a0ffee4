"""What may be recommended, and to whom something else is: exclude, allowed, fallback."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff import UserError, load
from recbole_simdiff.cli.main import main
from recbole_simdiff.serving.recommender import Recommender, Request
from tests.conftest import SEQUENCES

COUNTS = Counter(item for items in SEQUENCES.values() for item in items)


def test_excluded_items_are_left_out_and_the_others_keep_their_order(
    recommender: Recommender,
) -> None:
    (full,) = recommender.recommend([["i1", "i2"]], k=12)
    barred = full.items[:3]
    (found,) = recommender.recommend([["i1", "i2"]], k=12, exclude=[*barred, "unheard of"])
    assert found.items == full.items[3:]
    assert found.scores == full.scores[3:]


def test_only_allowed_items_are_recommended(recommender: Recommender) -> None:
    (full,) = recommender.recommend([["i1", "i2"]], k=12)
    allowed = {full.items[1], full.items[4], "i1", "unheard of"}
    (found,) = recommender.recommend([["i1", "i2"]], k=12, allowed=allowed)
    assert found.items == [full.items[1], full.items[4]]  # i1 was seen
    (nothing,) = recommender.recommend([["i1"]], k=12, allowed=[])
    assert nothing.items == []


def test_filters_of_a_request_are_its_own_and_add_to_those_of_all(
    recommender: Recommender,
) -> None:
    history = ["i1", "i2"]
    (full,) = recommender.recommend([history], k=12)
    first, second, third, fourth = full.items[:4]
    plain, barred, narrow = recommender.recommend(
        [history, Request(history, exclude=[second]), Request(history, allowed=[first, fourth])],
        k=3,
        exclude=[first],
    )
    assert plain.items == [second, third, fourth]
    assert barred.items == [third, fourth, full.items[4]]
    assert narrow.items == [fourth]
    (both,) = recommender.recommend([Request(history, allowed=[first, third])], allowed=[third])
    assert both.items == [third]


@pytest.mark.parametrize("history", [[], ["nope", "[PAD]"]])
def test_the_fallback_is_the_most_frequent_items(
    recommender: Recommender, history: list[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fallen, own = recommender.recommend([history, ["i1"]], k=12, fallback="popular")
        (cut,) = recommender.recommend([history], k=2, exclude=["i1"], fallback="popular")
    assert fallen.unknown == history
    assert set(fallen.items) == set(COUNTS)
    assert fallen.scores == [COUNTS[item] for item in fallen.items]
    assert fallen.scores == sorted(fallen.scores, reverse=True)
    assert cut.items == [item for item in fallen.items if item != "i1"][:2]
    assert own == recommender.recommend([["i1"]], k=12)[0]  # the model's


def test_without_a_fallback_nothing_is_recommended(recommender: Recommender) -> None:
    assert recommender.recommend([[]])[0].items == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fallback": "random"}, "fallback='random' must be one of popular"),
        ({"exclude": "i1"}, r"exclude='i1' must be a list of ids, such as \['i1'\]"),
        ({"allowed": "i1"}, r"allowed='i1' must be a list of ids, such as \['i1'\]"),
    ],
)
def test_mistakes_are_named(recommender: Recommender, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recommender.recommend([["i1"]], **given)


def test_a_checkpoint_without_counts_has_no_fallback(recommender: Recommender) -> None:
    recommender._counts = None
    with pytest.raises(UserError, match="does not say how often items occur"):
        recommender.recommend([["i1"]], fallback="popular")


# ---------------------------------------------------------------------- the command


@pytest.fixture
def call(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """call(*arguments) -> (code, rows, standard error) of recommend --format=json."""

    def run(*given: str) -> tuple[int, list[Any], str]:
        common = ["recommend", f"--checkpoint={run_dir}", "--use_gpu=false", "--format=json"]
        code = main([*common, *given])
        printed = capsys.readouterr()
        return code, [json.loads(line) for line in printed.out.splitlines()], printed.err

    return run


def test_the_command_reads_ids_from_files(run_dir: Path, tmp_path: Path, call: Any) -> None:
    (full,) = load(run_dir, use_gpu=False).recommend([["i1"]], k=12)
    (tmp_path / "barred").write_text(f"{full.items[0]}\n\nunheard of\n")
    (tmp_path / "fine").write_text("\n".join(full.items[:3]))
    given = (f"--exclude={tmp_path / 'barred'}", f"--allowed={tmp_path / 'fine'}")
    code, (row,), error = call("--history=i1", *given)
    assert code == 0
    assert row["items"] == full.items[1:3]
    assert "--exclude: 1 of 2 ids are not in the training data" in error


def test_a_line_may_have_filters_of_its_own(run_dir: Path, tmp_path: Path, call: Any) -> None:
    (full,) = load(run_dir, use_gpu=False).recommend([["i1"]], k=12)
    rows = [
        {"user": "a", "items": ["i1"], "exclude": full.items[:1]},
        {"user": "b", "items": ["i1"], "allowed": full.items[2:4]},
        {"user": "c", "items": ["i1"], "allowed": None},
    ]
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, rows)))
    code, found, _ = call(f"--input={tmp_path / 'lines'}", "--k=2")
    assert code == 0
    wanted = [full.items[1:3], full.items[2:4], full.items[:2]]
    assert [row["items"] for row in found] == wanted


def test_the_command_falls_back_when_asked(call: Any) -> None:
    code, rows, error = call("--history=zz", "--k=3", "--fallback=popular")
    assert code == 0
    assert rows[0]["scores"] == sorted(COUNTS.values(), reverse=True)[:3]
    assert "history 1: no known item, the popular items: zz" in error
    assert call("--history=zz", "--k=3")[0] == 2


@pytest.mark.parametrize("option", ["exclude", "allowed"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read "),
        ("", "has no id; it must have ids of items, one a line"),
        ("x\ny\n", "no id of it is in the training data; it must have ids such as i1"),
    ],
)
def test_files_of_ids_that_cannot_be_used(
    tmp_path: Path, call: Any, option: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "ids").write_text(text)
    code, rows, error = call("--history=i1", f"--{option}={tmp_path / 'ids'}")
    assert (code, rows) == (2, [])
    assert message in error


def test_filters_may_leave_nothing(tmp_path: Path, call: Any) -> None:
    (tmp_path / "ids").write_text("i1\n")
    code, rows, error = call("--history=i1", f"--allowed={tmp_path / 'ids'}")
    assert (code, rows[0]["items"]) == (0, [])
    assert "history 1: seen items and filters leave nothing to recommend" in error
