"""Coverage and popularity over what can be recommended: lists short of k, padding out."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_simdiff import evaluate
from recbole_simdiff.evaluation.collector import TargetCollector
from recbole_simdiff.evaluation.coverage import COVERAGE
from recbole_simdiff.evaluation.protocols import KEPT, REMOVED
from recbole_simdiff.evaluation.rankings import LISTS
from recbole_simdiff.runs.run import run_one as run
from tests.conftest import write_inter

NAMES = ["NDCG", "ItemCoverage", "GiniIndex", "ShannonEntropy", "AveragePopularity"]
NAMES += ["TailPercentage"]
ITEMS = [f"i{n}" for n in range(5)]
# Everyone has every item; so often is each a training target: items 1..5 of the file.
FIVE = {f"u{n}": ITEMS[n % 5 :] + ITEMS[: n % 5] for n in range(10)}


def measure(
    lists: list[list[int]], k: int, counts: dict[int, int], n_items: int, tail: Any = None
) -> dict[str, float]:
    """The five metrics of these lists, 0 for no item, among ``n_items`` real items."""
    config = {"topk": [k], "metric_decimal_place": 15, "tail_ratio": tail}
    data = {
        "rec.items": torch.tensor(lists),
        "data.num_items": n_items + 1,
        "data.count_items": counts,
    }
    struct = SimpleNamespace(get=data.__getitem__)
    found: dict[str, float] = {}
    for metric in COVERAGE.values():
        found |= metric(config).calculate_metric(struct)
    return found


def test_lists_of_different_lengths() -> None:
    """Two lists, of three and of one item; six items there are."""
    found = measure([[1, 2, 3], [2, 0, 0]], 3, {1: 5, 2: 1, 3: 3, 4: 7}, 6, tail=0.5)
    assert found["itemcoverage@3"] == 3 / 6
    # Sorted counts are 0 0 0 1 1 2 of 4: sum (2i - 7) P(i) = 1 + 3 + 10.
    assert found["giniindex@3"] == pytest.approx(14 / (6 * 4))
    assert found["shannonentropy@3"] == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(2))
    assert found["averagepopularity@3"] == pytest.approx(((5 + 1 + 3) / 3 + 1) / 2)
    assert found["tailpercentage@3"] == pytest.approx((2 / 3 + 1) / 2)  # items 2 and 3


@pytest.mark.parametrize(("tail", "share"), [(1, 1.0), (2, 0.25), (5, 0.75), (0.25, 0.25)])
def test_a_tail_is_a_share_or_a_count(tail: float, share: float) -> None:
    """Items 1..4 with 5, 1, 3 and 7 training targets."""
    found = measure([[1, 2, 3, 4]], 4, {1: 5, 2: 1, 3: 3, 4: 7}, 4, tail)
    assert found["tailpercentage@4"] == share


@pytest.mark.parametrize("by_recbole", [False, True])
def test_items_of_score_minus_infinity_are_in_no_list(make_config: Any, by_recbole: bool) -> None:
    """Also where RecBole's collector takes part, as for GAUC."""
    metrics = ["NDCG", "ItemCoverage"] + ["GAUC"] * by_recbole
    collector = TargetCollector(make_config(metrics=metrics, topk=[3], valid_metric="NDCG@3"))
    scores = torch.tensor([[-math.inf, 2.0, -math.inf, 1.0], [-math.inf, 1.0, 2.0, 3.0]])
    for _ in range(2):
        collector.eval_batch_collect(scores, None, torch.arange(2), torch.tensor([1, 1]))
    lists = collector.get_data_struct().get("rec.items")
    assert lists.tolist() == [[1, 3, 0], [3, 2, 1]] * 2


@pytest.fixture
def five(make_config: Any, data_path: Path) -> Callable[..., Any]:
    """five(key=value, ...) -> result of a run on ten users with all of five items each."""
    write_inter(data_path, "five", FIVE)

    def go(**changes: Any) -> Any:
        values = {"metrics": NAMES, "topk": [5], "valid_metric": "NDCG@5", "epochs": 1} | changes
        return run(make_config("SASRec", "five", **values))

    return go


def test_lists_of_the_whole_catalogue(five: Callable[..., Any]) -> None:
    """History kept, every list has all five items; removed, only the target is left."""
    result = five(tail_ratio=0.5, save_rankings=True)
    for metrics in (result.test[KEPT], result.test[REMOVED]):
        assert metrics["itemcoverage@5"] == 1.0
        assert metrics["giniindex@5"] == pytest.approx(0.0, abs=1e-12)
        assert metrics["shannonentropy@5"] == pytest.approx(math.log(5))
        assert metrics["tailpercentage@5"] == pytest.approx(2 / 5)
    assert result.test[REMOVED]["ndcg@5"] == 1.0
    lists = pd.read_csv(Path(result.run_dir) / LISTS)
    assert lists.groupby("history").size().to_dict() == {"kept": 50, "removed": 10}
    assert set(lists["item"]) == set(ITEMS)
    removed = lists[lists["history"] == "removed"]
    assert dict(zip(removed["user"], removed["item"], strict=True)) == {
        user: items[-1] for user, items in FIVE.items()
    }


def test_the_tail_can_be_another_in_an_evaluation(five: Callable[..., Any]) -> None:
    """Each item is the training target of four users, so 4 of them are not more than 4."""
    result = five()
    assert result.test[KEPT]["tailpercentage@5"] == pytest.approx(1 / 5)  # 10 %, one at least
    again = {n: evaluate(result.run_dir, {"tail_ratio": n}).test[KEPT] for n in (0.8, 3, 4)}
    assert [m["tailpercentage@5"] for m in again.values()] == pytest.approx([4 / 5, 0, 1])


def test_no_list_at_all_is_no_division_by_zero() -> None:
    with np.errstate(all="raise"):
        found = measure([[1, 2], [0, 0]], 2, {1: 2, 2: 4}, 2)
    assert found["averagepopularity@2"] == 3 / 2
