"""Means, comparisons and arithmetic, against formulas and tables computed by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recbole_simdiff.evaluation.protocols import KEPT, REMOVED
from recbole_simdiff.evaluation.rankings import RANKS
from recbole_simdiff.experiments.results import (
    Cell,
    Measured,
    best_against_second,
    compare,
    holm,
    impossible,
    interval,
    metric_of_rank,
    paired_p,
    read_ranks,
    signed_rank_p,
)
from recbole_simdiff.experiments.spec import Experiment


def measured(folder: Path, ranks: dict[int, list[int]]) -> Measured:
    """Runs whose test rows have these ranks, by seed; removed: one better where possible."""
    lines, folders = {}, {}
    for seed, own in ranks.items():
        place = folder / str(seed)
        place.mkdir(parents=True)
        rows = [f"u{n},i{n},9,4,{r},{max(1, r - 1)}" for n, r in enumerate(own)]
        head = "user,item,length,train_count,rank_kept,rank_removed"
        (place / RANKS).write_text("\n".join([head, *rows]) + "\n")
        metrics = {
            p: {
                m: float(metric_of_rank(np.array(r), m).mean())
                for m in ("hit@5", "hit@10", "ndcg@5", "ndcg@10", "mrr@10")
            }
            for p, r in ((KEPT, own), (REMOVED, [max(1, r - 1) for r in own]))
        }
        lines[seed] = {"test": metrics, "valid": metrics, "seconds": 10.0 * seed}
        folders[seed] = place
    return Measured(lines, folders)


def experiment(**changes: Any) -> Experiment:
    fields: dict[str, Any] = {
        "name": "parts",
        "kind": "ablation",
        "title": "Parts",
        "datasets": ("toy",),
        "seeds": (1, 2),
        "rows": {"A": {}, "B": {}, "C": {}},
        "reference": "A",
        "metrics": ("ndcg@10",),
    }
    return Experiment(**(fields | changes))


def test_metrics_of_ranks() -> None:
    rank = np.array([1, 3, 10, 11])
    assert metric_of_rank(rank, "hit@10").tolist() == [1, 1, 1, 0]
    assert metric_of_rank(rank, "ndcg@10") == pytest.approx([1, 1 / 2, 1 / math.log2(11), 0])
    assert metric_of_rank(rank, "mrr@5") == pytest.approx([1, 1 / 3, 0, 0])
    with pytest.raises(ValueError, match="gauc"):
        metric_of_rank(rank, "gauc@5")


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    runs = measured(tmp_path, {1: [1, 20, 20, 20], 2: [1, 2, 20, 20]})
    assert runs.mean("hit@5", KEPT) == pytest.approx(0.375)
    assert runs.deviation("hit@5", KEPT) == pytest.approx(0.125 * math.sqrt(2))
    assert math.isnan(measured(tmp_path / "one", {1: [1]}).deviation("hit@5", KEPT))


def test_names_that_pandas_takes_for_missing_values_are_names(tmp_path: Path) -> None:
    path = tmp_path / RANKS
    path.write_text(
        "user,item,length,train_count,rank_kept,rank_removed\nNA,null,1,1,3,2\nnan,NA,1,1,5,4\n"
    )
    assert read_ranks(path).index.tolist() == [("NA", "null", 0), ("nan", "NA", 0)]


def test_users_are_averaged_over_seeds_and_matched_by_name(tmp_path: Path) -> None:
    runs = measured(tmp_path, {1: [1, 6], 2: [6, 1]})
    assert runs.by_row("hit@5", KEPT).tolist() == [0.5, 0.5]
    lines = (tmp_path / "2" / RANKS).read_text().splitlines()
    (tmp_path / "2" / RANKS).write_text("\n".join([lines[0], lines[2], lines[1]]) + "\n")
    read_ranks.cache_clear()
    again = Measured(runs.lines, runs.folders).by_row("hit@5", KEPT)
    assert again.loc[("u0", "i0", 0)] == 0.5


def test_two_rows_of_one_user_and_target_stay_two(tmp_path: Path) -> None:
    runs = measured(tmp_path, {1: [1, 9]})
    text = (tmp_path / "1" / RANKS).read_text().replace("u1,i1", "u0,i0")
    (tmp_path / "1" / RANKS).write_text(text)
    assert runs.by_row("hit@5", KEPT).tolist() == [1.0, 0.0]


def test_comparison_against_scipy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ranks = {
        row: {seed: rng.integers(1, 30 - 8 * i, 60).tolist() for seed in (1, 2)}
        for i, row in enumerate("ABC")
    }
    cells = {Cell(row, "toy", None): measured(tmp_path / row, ranks[row]) for row in "ABC"}
    found = {c.row: c for c in compare(experiment(), cells, "toy", KEPT)}
    assert list(found) == ["B", "C"]
    raw = {}
    for row, one in found.items():
        per_user = {
            r: np.mean([metric_of_rank(np.array(ranks[r][s]), "ndcg@10") for s in (1, 2)], axis=0)
            for r in ("A", row)
        }
        per_seed = {
            r: [metric_of_rank(np.array(ranks[r][s]), "ndcg@10").mean() for s in (1, 2)]
            for r in ("A", row)
        }
        difference = per_user[row] - per_user["A"]
        assert one.difference == pytest.approx(difference.mean())
        assert one.relative == pytest.approx(difference.mean() / per_user["A"].mean())
        assert one.effect == pytest.approx(difference.mean() / difference.std(ddof=1))
        assert one.low < one.difference < one.high
        assert (one.users, one.seeds) == (60, 2)
        raw[row] = (
            stats.ttest_rel(per_user[row], per_user["A"]).pvalue,
            stats.ttest_rel(per_seed[row], per_seed["A"]).pvalue,
            stats.wilcoxon(np.round(difference, 12)).pvalue,
        )
    for place, name in enumerate(("p_users", "p_seeds", "p_wilcoxon")):
        small, large = sorted(raw, key=lambda row: raw[row][place])
        assert getattr(found[small], name) == pytest.approx(min(1, 2 * raw[small][place]))
        assert getattr(found[large], name) == pytest.approx(
            max(raw[large][place], getattr(found[small], name))
        )


def test_best_against_second(tmp_path: Path) -> None:
    """The pair is that of the means, which may not include the reference; p is not corrected."""
    ranks = {"A": [9, 9, 9, 9, 9], "B": [1, 1, 1, 1, 9], "C": [1, 2, 1, 9, 9]}
    cells = {Cell(r, "toy", None): measured(tmp_path / r, {1: ranks[r]}) for r in ranks}
    own = experiment(metrics=("hit@5",))
    (one,) = best_against_second(own, cells, "toy", KEPT)
    assert (one.row, one.against) == ("B", "C")
    assert one.difference == pytest.approx(1 / 5)
    assert one.p_users == pytest.approx(stats.ttest_1samp([0, 0, 0, 1, 0], 0).pvalue)
    del cells[Cell("A", "toy", None)]  # of two rows one is compared with the reference anyway
    assert best_against_second(own, cells, "toy", KEPT) == []


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    cells = {
        Cell("A", "toy", None): measured(tmp_path / "A", {1: [1, 2], 2: [3, 4], 3: [1, 1]}),
        Cell("B", "toy", None): measured(tmp_path / "B", {2: [1, 2], 3: [4, 4]}),
    }
    own = experiment(rows={"A": {}, "B": {}}, metrics=("mrr@10",))
    (one,) = compare(own, cells, "toy", KEPT)
    assert one.seeds == 2
    # Seeds 2 and 3 of both: 1, 1/2, 1/4, 1/4 against 1/3, 1/4, 1, 1.
    assert one.difference == pytest.approx(2 / 4 - (1 / 3 + 1 / 4 + 2) / 4)
    cells[Cell("B", "toy", None)] = measured(tmp_path / "C", {9: [1, 2]})
    assert compare(own, cells, "toy", KEPT) == []


def test_a_user_counts_once_however_many_rows_there_are(tmp_path: Path) -> None:
    """As under a global split: the rows of a user are no independent samples."""
    cells = {
        Cell("A", "toy", None): measured(tmp_path / "A", {1: [9, 9, 9, 9, 1]}),
        Cell("B", "toy", None): measured(tmp_path / "B", {1: [1, 1, 1, 9, 1]}),
    }
    for row in "AB":
        path = tmp_path / row / "1" / RANKS
        path.write_text(path.read_text().replace("u1,", "u0,").replace("u2,", "u0,"))
    (one,) = compare(experiment(rows={"A": {}, "B": {}}, metrics=("hit@5",)), cells, "toy", KEPT)
    assert one.users == 3  # of whom the first gains 1, the others nothing
    assert one.difference == pytest.approx(3 / 5)  # of the table's means, over rows
    assert one.p_users == pytest.approx(stats.ttest_1samp([1, 0, 0], 0).pvalue)


def test_without_the_reference_there_is_nothing_to_compare(tmp_path: Path) -> None:
    cells = {Cell("B", "toy", None): measured(tmp_path, {1: [1, 2]})}
    assert compare(experiment(), cells, "toy", KEPT) == []


def test_holm_by_hand() -> None:
    """Holm (1979): the smallest times 3, the next times 2, never falling, never above 1."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    with_nan = holm([math.nan, 0.02, 0.03])
    assert math.isnan(with_nan[0])
    assert with_nan[1:] == pytest.approx([0.04, 0.04])


def test_p_of_degenerate_pairs() -> None:
    assert math.isnan(paired_p([0.1]))
    assert paired_p([0.0, 0.0]) == 1.0
    assert math.isnan(paired_p([0.2, 0.2]))
    assert math.isnan(paired_p([0.1 + 0.2, 0.3]))  # they differ by a rounding error


def test_signed_ranks_of_hits_are_a_sign_test() -> None:
    """Differences of -1, 0 and 1 have one rank: 9 gains and 1 loss, p = 2 (1 + 10) / 2^10."""
    hits = [1.0] * 9 + [-1.0] + [0.0] * 40
    assert signed_rank_p(hits[:10]) == pytest.approx(22 / 1024)
    assert 0.005 < signed_rank_p(hits) < 0.03
    assert signed_rank_p([-d for d in hits]) == pytest.approx(signed_rank_p(hits))
    third = np.array([0.1 + 0.2, -0.3, 0.3, 0.0])  # equal but for rounding
    assert signed_rank_p(third) == pytest.approx(signed_rank_p([0.3, -0.3, 0.3, 0.0]))
    assert signed_rank_p([0.0, 0.0]) == 1.0
    assert math.isnan(signed_rank_p([1.0]))


def test_signed_rank_p_is_uniform_without_an_effect() -> None:
    rng = np.random.default_rng(0)
    draws = [signed_rank_p(rng.integers(-1, 2, 300).astype(float)) for _ in range(400)]
    assert 0.02 < np.mean(np.array(draws) < 0.05) < 0.08


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        low, high = interval(rng.normal(0.3, 1, 80))
        inside += low <= 0.3 <= high
    assert 50 <= inside <= 60
    assert interval(np.array([0.1, 0.1])) == (0.1, 0.1)
    assert all(map(math.isnan, interval(np.array([0.1]))))


@pytest.mark.parametrize("seed", range(5))
def test_what_was_measured_is_possible(seed: int) -> None:
    """Also as a mean over runs, at every pair of cutoffs, and rounded to four digits."""
    rng = np.random.default_rng(seed)
    rank = rng.integers(1, 40, 500)
    metrics = {
        f"{m}@{k}": float(metric_of_rank(rank, f"{m}@{k}").mean())
        for m in ("hit", "ndcg")
        for k in (1, 5, 10, 20)
    }
    assert impossible(metrics) == []
    assert impossible({m: round(v, 4) for m, v in metrics.items()}, 1e-4) == []


@pytest.mark.parametrize(
    ("hit5", "hit10", "ndcg5", "ndcg10", "possible"),
    [
        (0.0572, 0.0932, 0.0310, 0.0427, True),  # SimDiffRec paper, Table 2: Beauty, SimDiffRec
        (0.0338, 0.0562, 0.0191, 0.0252, False),  # Sports, SimDiffRec
        (0.0123, 0.0202, 0.0075, 0.0058, False),  # Toys, BERT4Rec: NDCG falls
        (0.0430, 0.0647, 0.0304, 0.0364, False),  # Yelp, MCLRec: a little too low
        (0.0068, 0.0122, 0.0041, 0.0101, False),  # Sports, BERT4Rec: far too high
        (0.1, 0.1, 0.11, 0.11, False),  # more NDCG than hits
        (0.1, 0.1, 0.03, 0.03, False),  # less than hits at rank 5
    ],
)
def test_impossible_cells_of_published_tables(
    hit5: float, hit10: float, ndcg5: float, ndcg10: float, possible: bool
) -> None:
    metrics = {"hit@5": hit5, "hit@10": hit10, "ndcg@5": ndcg5, "ndcg@10": ndcg10}
    assert (impossible(metrics, 1e-4) == []) is possible
