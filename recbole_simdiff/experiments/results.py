"""What the records of an experiment say: means over seeds, comparisons, and impossible rows."""

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

RESAMPLES = 1000  # of the bootstrap


class Cell(NamedTuple):
    """Where a value of an experiment belongs: a row, a data set, and a point of the sweep."""

    row: str
    dataset: str
    swept: tuple[str, Any] | None


@dataclass(frozen=True)
class Measured:
    """The finished runs of a cell, one a seed.

    Attributes:
        lines (dict): seed -> record.
        folders (dict): seed -> run folder.
    """

    lines: Mapping[int, Mapping[str, Any]]
    folders: Mapping[int, Path]

    def values(self, metric: str, protocol: str, split: str = "test") -> dict[int, float]:
        """Seed -> unrounded value."""
        return {
            seed: line[split][protocol][metric]
            for seed, line in self.lines.items()
            if protocol in line[split]
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
        """The runs of these seeds."""
        kept = list(seeds)
        return Measured({s: self.lines[s] for s in kept}, {s: self.folders[s] for s in kept})

    def by_row(self, metric: str, protocol: str) -> pd.Series:
        """The metric of each test row, mean over the seeds; indexed by user and target."""
        column = f"rank_{protocol.removeprefix('history ')}"
        parts = []
        for seed in self.lines:
            ranks = read_ranks(self.folders[seed] / RANKS)[column]
            parts.append(pd.Series(metric_of_rank(ranks.to_numpy(), metric), ranks.index))
        return pd.concat(parts, axis=1).mean(axis=1)


@lru_cache(
    maxsize=64
)  # of a data set: every metric, protocol and comparison asks for the same files
def read_ranks(path: Path) -> pd.DataFrame:
    """``rank_kept`` and ``rank_removed`` of a run, indexed by user, target, and a number.

    The number tells rows of one user with the same target apart.
    """
    # Users and items may well be called NA.
    ranks = pd.read_csv(path, dtype={"user": str, "item": str}, keep_default_na=False)
    own = ranks.groupby(["user", "item"]).cumcount()
    names = ["user", "item", "number"]
    ranks.index = pd.MultiIndex.from_arrays([ranks["user"], ranks["item"], own], names=names)
    return ranks[["rank_kept", "rank_removed"]]


def metric_of_rank(rank: NDArray[np.int64], metric: str) -> NDArray[np.float64]:
    """Hit, NDCG or MRR at a cutoff of one relevant item at each rank, [n] -> [n].

    Args:
        rank (NDArray): ranks from 1.
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
    """A row against another one, on one data set, metric and protocol.

    Attributes:
        difference, relative (float): of the means; relative to the other row, NaN if that is 0.
        p_seeds (float): paired t-test over the seeds both have, two-sided; NaN for fewer than two.
        p_users (float): the same over users, each user's metric averaged over the seeds and, where
            a user has several test rows, over them.
        effect (float): Cohen's d of the paired differences of users.
        low, high (float): 95 % bootstrap interval of the difference, over users.
        seeds, users (int): how many were compared.
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


def compare(
    experiment: Experiment, cells: Mapping[Cell, Measured], dataset: str, protocol: str
) -> list[Comparison]:
    """Every row against the reference, on one data set, p Holm-corrected over the rows.

    Args:
        experiment (Experiment): which one the reference is, and the metrics.
        cells (Mapping): finished runs of an experiment without a sweep.
        dataset (str): the data set.
        protocol (str): one of ``PROTOCOLS``.
    """
    runs = _rows(experiment, cells, dataset)
    found: list[Comparison] = []
    for metric in experiment.metrics if experiment.reference in runs else ():
        part = [
            one
            for row in runs
            if row != experiment.reference
            and (one := _compare(runs, row, experiment.reference, dataset, metric, protocol))
        ]
        by_seed = holm([one.p_seeds for one in part])
        by_user = holm([one.p_users for one in part])
        found += [
            replace(one, p_seeds=s, p_users=u)
            for one, s, u in zip(part, by_seed, by_user, strict=True)
        ]
    return found


def best_against_second(
    experiment: Experiment, cells: Mapping[Cell, Measured], dataset: str, protocol: str
) -> list[Comparison]:
    """By metric, the row with the greatest mean against the next one, of three rows or more.

    Args:
        experiment (Experiment): the metrics.
        cells (Mapping): finished runs of an experiment without a sweep.
        dataset (str): the data set.
        protocol (str): one of ``PROTOCOLS``.
    """
    runs = {
        row: own
        for row, own in _rows(experiment, cells, dataset).items()
        if own.values(experiment.metrics[0], protocol)
    }
    found = []
    for metric in experiment.metrics if len(runs) > 2 else ():
        best, second, *_ = sorted(runs, key=lambda r: runs[r].mean(metric, protocol), reverse=True)
        if one := _compare(runs, best, second, dataset, metric, protocol):
            found.append(one)
    return found


def _rows(
    experiment: Experiment, cells: Mapping[Cell, Measured], dataset: str
) -> dict[str, Measured]:
    """The rows there are on one data set, in the experiment's order."""
    return {
        row: cells[cell] for row in experiment.rows if (cell := Cell(row, dataset, None)) in cells
    }


def _compare(
    runs: Mapping[str, Measured], row: str, against: str, dataset: str, metric: str, protocol: str
) -> Comparison | None:
    """Over the seeds both have; None if they share none."""
    both = sorted(runs[row].lines.keys() & runs[against].lines.keys())
    if not both:
        return None
    rival, reference = runs[row].only(both), runs[against].only(both)
    ours, theirs = (m.values(metric, protocol) for m in (rival, reference))
    by_row = rival.by_row(metric, protocol).sub(reference.by_row(metric, protocol))
    differences = by_row.groupby(level="user").mean().to_numpy()
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    low, high = interval(differences)
    base = reference.mean(metric, protocol)
    difference = rival.mean(metric, protocol) - base
    return Comparison(
        row=row,
        against=against,
        dataset=dataset,
        metric=metric,
        protocol=protocol,
        difference=difference,
        relative=difference / base if base else math.nan,
        p_seeds=paired_p([ours[s] - theirs[s] for s in both]),
        p_users=paired_p(differences),
        effect=float(differences.mean()) / spread if spread else math.nan,
        low=low,
        high=high,
        seeds=len(both),
        users=len(differences),
    )


def paired_p(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """Two-sided p of a paired t-test; 1 where no pair differs.

    NaN for fewer than two pairs, and where all differ by the same: their spread is no estimate.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return math.nan
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        return math.nan if values.any() else 1.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979); NaN stays NaN and is not counted."""
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    corrected, largest = list(p), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p[i]))
        corrected[i] = largest
    return corrected


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; NaN for fewer than two values."""
    if len(differences) < 2:
        return math.nan, math.nan
    if not np.ptp(differences):
        return float(differences[0]), float(differences[0])
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(differences)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


# ---------------------------------------------------------------------- arithmetic


def impossible(metrics: Mapping[str, float], unit: float = 0.0) -> list[str]:
    """Why these hit rates and NDCGs cannot both have been measured with one relevant item a row.

    A hit at rank r adds 1 / log2(r + 1) to NDCG, so what NDCG gains between two cutoffs is bounded
    by what the hit rate gains. It holds for means over users and over runs.

    Args:
        metrics (Mapping): such as ``hit@5``, ``ndcg@5``, ``hit@10``, ``ndcg@10``.
        unit (float): last digit of rounded numbers, such as 1e-4; 0 for unrounded ones.

    Returns:
        list: one text a violation; empty if all is well.
    """
    cutoffs = sorted(
        {int(k) for name, _, k in (m.partition("@") for m in metrics) if name == "hit"}
    )
    cutoffs = [k for k in cutoffs if f"ndcg@{k}" in metrics]
    found = []
    slack = unit + 1e-9  # two rounded numbers are subtracted, each half a unit off
    for a, b in zip([0, *cutoffs], cutoffs, strict=False):
        hit, ndcg = (
            metrics[f"{name}@{b}"] - (metrics[f"{name}@{a}"] if a else 0)
            for name in ("hit", "ndcg")
        )
        low, high = (hit - slack) / math.log2(b + 1), (hit + slack) / math.log2(a + 2)
        if not low - slack <= ndcg <= high + slack:
            span = f"from @{a} to @{b}" if a else f"@{b}"
            found.append(
                f"NDCG {span} is {ndcg:.4f}; with a hit rate of {hit:.4f} it lies between "
                f"{max(low, 0):.4f} and {high:.4f}"
            )
    return found


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
