"""Evaluation of an experiment's records: means over seeds, comparisons, impossible rows."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.rankings import RANKS
from recbole_simdiff.experiments.execute import DONE, LINES, Planned, read_lines
from recbole_simdiff.experiments.spec import Experiment

RESAMPLES = 1000  # bootstrap resamples


class Cell(NamedTuple):
    """A cell of an experiment: a row, a data set, and a key and value of the sweep, if any."""

    row: str
    dataset: str
    swept: tuple[str, Any] | None


@dataclass(frozen=True)
class Measured:
    """The finished runs of a cell, one for each seed.

    Attributes:
        lines (dict): seed -> record.
        folders (dict): seed -> run folder.
    """

    lines: Mapping[int, Mapping[str, Any]]
    folders: Mapping[int, Path]

    def values(self, metric: str, protocol: str) -> dict[int, float]:
        """Seed -> unrounded test metric."""
        return {
            seed: line["test"][protocol][metric]
            for seed, line in self.lines.items()
            if protocol in line["test"]
        }

    def mean(self, metric: str, protocol: str) -> float:
        """Mean over seeds; NaN without any."""
        values = list(self.values(metric, protocol).values())
        return statistics.fmean(values) if values else math.nan

    def deviation(self, metric: str, protocol: str) -> float:
        """Standard deviation over seeds, of a sample; NaN for fewer than two."""
        values = list(self.values(metric, protocol).values())
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def only(self, seeds: Iterable[int]) -> "Measured":
        """The runs of these seeds only."""
        chosen = list(seeds)
        return Measured({s: self.lines[s] for s in chosen}, {s: self.folders[s] for s in chosen})

    def by_row(self, metric: str, protocol: str) -> pd.Series:
        """The metric of each test row, mean over the seeds, indexed as in ``read_ranks``."""
        column = f"rank_{protocol.removeprefix('history ')}"
        parts = []
        for seed in self.lines:
            ranks = read_ranks(self.folders[seed] / RANKS)[column]
            parts.append(pd.Series(metric_of_rank(ranks.to_numpy(), metric), ranks.index))
        return pd.concat(parts, axis=1).mean(axis=1)


@lru_cache(maxsize=64)  # files; each metric, protocol and comparison of a data set reads the same
def read_ranks(path: Path) -> pd.DataFrame:
    """``rank_kept`` and ``rank_removed`` of a run, indexed by user, target, and a number.

    The number distinguishes rows of one user with the same target.
    """
    # The id of a user or an item may be NA.
    ranks = pd.read_csv(path, dtype={"user": str, "item": str}, keep_default_na=False)
    number = ranks.groupby(["user", "item"]).cumcount()
    names = ["user", "item", "number"]
    ranks.index = pd.MultiIndex.from_arrays([ranks["user"], ranks["item"], number], names=names)
    return ranks[["rank_kept", "rank_removed"]]


def metric_of_rank(rank: NDArray[np.int64], metric: str) -> NDArray[np.float64]:
    """Hit, recall, NDCG or MRR of rows with one relevant item, by its rank: [n] -> [n].

    Args:
        rank (NDArray): ranks, counted from 1.
        metric (str): such as ``ndcg@10``.

    Raises:
        ValueError: for another metric.
    """
    name, _, k = metric.partition("@")
    gain = {"hit": lambda r: np.ones(len(r)), "ndcg": lambda r: 1 / np.log2(r + 1)}
    gain |= {"mrr": lambda r: 1 / r, "recall": gain["hit"]}
    if name not in gain:
        raise ValueError(f"{metric} does not follow from the rank of one item")
    return np.where(rank <= int(k), gain[name](rank), 0.0)


def measured(collected: Sequence[tuple[Planned, Mapping[str, Any]]]) -> dict[Cell, Measured]:
    """The finished runs by cell."""
    cells: dict[Cell, tuple[dict[int, Any], dict[int, Path]]] = {}
    for planned, line in collected:
        spec = planned.spec
        if line["status"] == DONE:
            lines, folders = cells.setdefault(Cell(spec.row, spec.dataset, spec.swept), ({}, {}))
            lines[spec.seed], folders[spec.seed] = line, planned.run_dir
    return {cell: Measured(lines, folders) for cell, (lines, folders) in cells.items()}


# ---------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Comparison:
    """A row compared with another, on one data set, metric and protocol.

    Attributes:
        row, against (str): labels of the row and of the other row.
        dataset, metric, protocol (str): names.
        difference (float): of the means.
        relative (float): difference relative to the other row's mean; NaN if that is 0.
        p_seeds (float): p of a two-sided paired t-test over the seeds of both rows; NaN for fewer
            than two.
        p_users (float): the same over users. A user's metric is averaged over the seeds and over
            the user's test rows.
        effect (float): Cohen's d of the paired differences of users.
        low, high (float): 95 % bootstrap interval of the difference, over users.
        seeds, users (int): number of those compared.
        p_wilcoxon (float): p of a two-sided Wilcoxon signed-rank test over users. It asks nothing
            of the distribution; a user's Hit differs by -1, 0 or 1.
    """

    row: str
    against: str
    dataset: str
    metric: str
    protocol: str
    difference: float
    relative: float
    p_seeds: float
    p_users: float
    effect: float
    low: float
    high: float
    seeds: int
    users: int
    p_wilcoxon: float


def compare(
    experiment: Experiment, cells: Mapping[Cell, Measured], dataset: str, protocol: str
) -> list[Comparison]:
    """Compare every row with the reference on one data set; p is Holm-corrected over the rows.

    Args:
        experiment (Experiment): has the reference and the metrics.
        cells (Mapping): finished runs of an experiment without a sweep.
        dataset (str): the data set.
        protocol (str): one of ``PROTOCOLS``.
    """
    runs = _rows(experiment, cells, dataset)
    corrected: list[Comparison] = []
    for metric in experiment.metrics if experiment.reference in runs else ():
        compared = [
            comparison
            for row in runs
            if row != experiment.reference
            and (comparison := _compare(runs, row, experiment.reference, dataset, metric, protocol))
        ]
        by_seed = holm([comparison.p_seeds for comparison in compared])
        by_user = holm([comparison.p_users for comparison in compared])
        by_rank = holm([comparison.p_wilcoxon for comparison in compared])
        corrected += [
            replace(comparison, p_seeds=s, p_users=u, p_wilcoxon=w)
            for comparison, s, u, w in zip(compared, by_seed, by_user, by_rank, strict=True)
        ]
    return corrected


def best_against_second(
    experiment: Experiment, cells: Mapping[Cell, Measured], dataset: str, protocol: str
) -> list[Comparison]:
    """Compare, for each metric, the row with the greatest mean with the second; needs three rows.

    Args:
        experiment (Experiment): has the metrics.
        cells (Mapping): finished runs of an experiment without a sweep.
        dataset (str): the data set.
        protocol (str): one of ``PROTOCOLS``.
    """
    runs = {
        row: row_runs
        for row, row_runs in _rows(experiment, cells, dataset).items()
        if row_runs.values(experiment.metrics[0], protocol)
    }
    compared = []
    for metric in experiment.metrics if len(runs) > 2 else ():
        best, second, *_ = sorted(runs, key=lambda r: runs[r].mean(metric, protocol), reverse=True)
        if comparison := _compare(runs, best, second, dataset, metric, protocol):
            compared.append(comparison)
    return compared


def _rows(
    experiment: Experiment, cells: Mapping[Cell, Measured], dataset: str
) -> dict[str, Measured]:
    """The rows with runs on one data set, in the experiment's order."""
    return {
        row: cells[cell] for row in experiment.rows if (cell := Cell(row, dataset, None)) in cells
    }


def _compare(
    runs: Mapping[str, Measured], row: str, against: str, dataset: str, metric: str, protocol: str
) -> Comparison | None:
    """Compare two rows over their common seeds; None if there are none."""
    seeds = sorted(runs[row].lines.keys() & runs[against].lines.keys())
    if not seeds:
        return None
    compared, reference = runs[row].only(seeds), runs[against].only(seeds)
    ours, theirs = (m.values(metric, protocol) for m in (compared, reference))
    by_row = compared.by_row(metric, protocol).sub(reference.by_row(metric, protocol))
    differences = by_row.groupby(level="user").mean().to_numpy()
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    low, high = interval(differences)
    base = reference.mean(metric, protocol)
    difference = compared.mean(metric, protocol) - base
    return Comparison(
        row=row,
        against=against,
        dataset=dataset,
        metric=metric,
        protocol=protocol,
        difference=difference,
        relative=difference / base if base else math.nan,
        p_seeds=paired_p([ours[s] - theirs[s] for s in seeds]),
        p_users=paired_p(differences),
        effect=float(differences.mean()) / spread if spread else math.nan,
        low=low,
        high=high,
        seeds=len(seeds),
        users=len(differences),
        p_wilcoxon=signed_rank_p(differences),
    )


def paired_p(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """Two-sided p of a paired t-test; 1 if no pair differs.

    NaN for fewer than two pairs, and if all differ by the same amount: the estimated variance is 0.

    Args:
        differences (Sequence): difference of each pair, [n].
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return math.nan
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        return math.nan if values.any() else 1.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def signed_rank_p(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """Two-sided p of a Wilcoxon signed-rank test, pairs without a difference left out.

    1 if no pair differs; NaN for fewer than two pairs.

    Args:
        differences (Sequence): difference of each pair, [n].
    """
    # The mean over seeds leaves rounding errors, which would break ties.
    values = np.round(np.asarray(differences, dtype=float), 12)
    if len(values) < 2:
        return math.nan
    return float(stats.wilcoxon(values).pvalue) if values.any() else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979); NaN stays NaN and is not counted.

    Args:
        p (Sequence): p values of a family of tests, in any order.

    Returns:
        list: the corrected p values, in the same order.
    """
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    corrected, largest = list(p), 0.0
    for n_smaller, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - n_smaller) * p[i]))
        corrected[i] = largest
    return corrected


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; NaN for fewer than two values.

    Args:
        differences (NDArray): values, [n].

    Returns:
        tuple: lower and upper bound.
    """
    if len(differences) < 2:
        return math.nan, math.nan
    if not np.ptp(differences):
        return float(differences[0]), float(differences[0])
    bounds = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(differences)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


# ---------------------------------------------------------------------- arithmetic


def impossible(metrics: Mapping[str, float], unit: float = 0.0) -> list[str]:
    """Check hit rates and NDCGs of rows with one relevant item for contradictions.

    A hit at rank r adds 1 / log2(r + 1) to NDCG. So the increase of the hit rate between two
    cutoffs bounds the increase of NDCG. This also holds for means over users and over runs.

    Args:
        metrics (Mapping): metric -> value, such as ``hit@5``, ``ndcg@5``, ``hit@10``, ``ndcg@10``.
        unit (float): last digit of rounded numbers, such as 1e-4; 0 for unrounded ones.

    Returns:
        list: one text for each contradiction; empty if there is none.
    """
    cutoffs = sorted(
        {int(k) for name, _, k in (m.partition("@") for m in metrics) if name == "hit"}
    )
    cutoffs = [k for k in cutoffs if f"ndcg@{k}" in metrics]
    violations = []
    slack = unit + 1e-9  # rounding error of the difference of two rounded numbers
    for a, b in zip([0, *cutoffs], cutoffs, strict=False):
        hit, ndcg = (
            metrics[f"{name}@{b}"] - (metrics[f"{name}@{a}"] if a else 0)
            for name in ("hit", "ndcg")
        )
        low, high = (hit - slack) / math.log2(b + 1), (hit + slack) / math.log2(a + 2)
        if not low - slack <= ndcg <= high + slack:
            span = f"from @{a} to @{b}" if a else f"@{b}"
            violations.append(
                f"NDCG {span} is {ndcg:.4f}; with a hit rate of {hit:.4f} it must be between "
                f"{max(low, 0):.4f} and {high:.4f}"
            )
    return violations


def to_frame(folder: str | Path) -> pd.DataFrame:
    """The finished runs of an experiment as a table.

    Args:
        folder (str | Path): ``results/NAME``.

    Returns:
        DataFrame: a row for each run, split and protocol: ``row`` (its label), ``model``,
        ``dataset``, ``seed``, the swept key if there is one, ``split``, ``protocol``, the unrounded
        metrics, ``best_epoch``, ``epochs``, ``seconds`` and ``run_dir``.

    Raises:
        UserError: if there are no records.
    """
    path = Path(folder) / LINES
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder of an experiment")
    return frame(read_lines(path).values())


def frame(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Records of runs as a table, see ``to_frame``; those of runs that failed are left out."""
    rows = []
    for line in lines:
        if line["status"] != DONE:
            continue
        config, swept = line["config"], line["swept"]
        run = {"row": line["row"], "model": config["model"], "dataset": config["dataset"]}
        run |= {"seed": line["seed"]} | (dict([swept]) if swept else {})
        end = {key: line[key] for key in ("best_epoch", "epochs", "seconds", "run_dir")}
        for split in ("valid", "test"):
            for protocol, metrics in line[split].items():
                rows.append(run | {"split": split, "protocol": protocol} | metrics | end)
    return pd.DataFrame(rows)
