"""Figures of experiments and runs, each as PDF, SVG and PNG."""

import itertools
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sklearn.manifold import TSNE

from recbole_simdiff import files
from recbole_simdiff.errors import UserError
from recbole_simdiff.experiments.embeddings import Sequences
from recbole_simdiff.experiments.results import Cell, Measured
from recbole_simdiff.experiments.spec import Experiment

FORMATS = ("pdf", "svg", "png")
# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow, faint on paper, last.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"),
)
MARKERS = "osD^vP*X"  # of rows, so that colour alone says nothing


def pyplot() -> Any:
    """``matplotlib.pyplot``, set up for files.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import matplotlib
        from cycler import cycler  # comes with matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'recbole_simdiff[plots]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "recbole_simdiff",
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> list[Path]:
    """Write a figure in every format and close it.

    Args:
        figure (Any): matplotlib's figure.
        path (Path): path of the files, without suffix.

    Returns:
        list: the files.
    """
    written = []
    for suffix in FORMATS:
        target = path.with_name(f"{path.name}.{suffix}")
        metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
        files.write_atomically(
            target,
            lambda name, s=suffix, m=metadata: figure.savefig(name, format=s, dpi=150, metadata=m),
        )
        written.append(target)
    pyplot().close(figure)
    return written


def sweep(
    experiment: Experiment, cells: Mapping[Cell, Measured], protocol: str, folder: Path
) -> list[Path]:
    """One figure for each data set: a panel for each swept key and metric, a curve for each row.

    The band is the mean plus and minus one standard deviation over the seeds.

    Args:
        experiment (Experiment): of kind sweep.
        cells (Mapping): its finished runs.
        protocol (str): one of ``PROTOCOLS``.
        folder (Path): folder of the files.

    Returns:
        list: the files.
    """
    plt = pyplot()
    written = []
    for dataset in experiment.datasets:
        if not any(cell.dataset == dataset for cell in cells):
            continue
        keys, metrics = list(experiment.sweep), experiment.metrics
        size = (3.2 * len(metrics), 2.6 * len(keys))
        figure, axes = plt.subplots(len(keys), len(metrics), figsize=size, squeeze=False)
        for i, key in enumerate(keys):
            for j, metric in enumerate(metrics):
                _curves(axes[i][j], experiment, cells, dataset, key, metric, protocol)
                axes[i][j].set(xlabel=key, ylabel=metric)
        if len(experiment.rows) > 1:
            handles, labels = axes[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=3)
        written += _save_titled(figure, experiment, dataset, protocol, folder)
    return written


def _save_titled(
    figure: Any, experiment: Experiment, dataset: str, protocol: str, folder: Path
) -> list[Path]:
    """Write a figure of means over seeds, which its title says, under the experiment's name."""
    n = len(experiment.seeds)
    seeds = f"mean ± standard deviation over {n} seeds" if n > 1 else "one seed"
    figure.suptitle(f"{dataset}, test, {protocol}, {seeds}", fontsize="medium")
    name = f"{experiment.name}-{dataset}-{protocol.replace(' ', '-')}"
    return save(figure, folder / name)


def ablation(
    experiment: Experiment, cells: Mapping[Cell, Measured], protocol: str, folder: Path
) -> list[Path]:
    """One figure for each data set: a panel for each metric, a bar for each row.

    A bar is the mean over the seeds, its line one standard deviation to each side; the dashed line
    is the mean of the row that others are compared with.

    Args:
        experiment (Experiment): of kind ablation.
        cells (Mapping): its finished runs.
        protocol (str): one of ``PROTOCOLS``.
        folder (Path): folder of the files.

    Returns:
        list: the files.
    """
    plt, metrics = pyplot(), experiment.metrics
    written = []
    for dataset in experiment.datasets:
        found = {row: cells.get(Cell(row, dataset, None)) for row in experiment.rows}
        runs = {row: one for row, one in found.items() if one and one.values(metrics[0], protocol)}
        if not runs:
            continue
        labels = [textwrap.fill(row, 28) for row in runs]
        height = 0.9 + 0.2 * sum(1 + text.count("\n") for text in labels) + 0.1 * len(labels)
        size = (2.2 + 2.1 * len(metrics), height)
        figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
        for axis, metric in zip(axes[0], metrics, strict=True):
            _bars(axis, experiment.reference, runs, metric, protocol)
        axes[0][0].set_yticks(range(len(runs)), labels, fontsize="small")
        axes[0][0].invert_yaxis()  # the first row is above
        written += _save_titled(figure, experiment, dataset, protocol, folder)
    return written


def _bars(
    axis: Any, reference: str, runs: Mapping[str, Measured], metric: str, protocol: str
) -> None:
    """A bar for each row, with its number behind the line of its spread."""
    means = [row.mean(metric, protocol) for row in runs.values()]
    spreads = [row.deviation(metric, protocol) for row in runs.values()]
    spreads = [0.0 if math.isnan(spread) else spread for spread in spreads]
    colors = [PALETTE[row == reference] for row in runs]
    style = {"ecolor": "black", "error_kw": {"capsize": 2, "linewidth": 1}}
    axis.barh(range(len(runs)), means, xerr=spreads, color=colors, height=0.65, **style)
    for place, (mean, spread) in enumerate(zip(means, spreads, strict=True)):
        where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(f"{mean:.4f}", (mean + spread, place), fontsize="x-small", **where)
    if reference in runs:
        line = runs[reference].mean(metric, protocol)
        axis.axvline(line, color=PALETTE[1], linewidth=0.8, linestyle="--", zorder=0)
    axis.set_xlim(0, 1.3 * max(m + s for m, s in zip(means, spreads, strict=True)) or 1)
    axis.locator_params(axis="x", nbins=4)
    axis.tick_params(axis="x", labelsize="x-small")
    axis.set_xlabel(metric, fontsize="small")


def _curves(
    axis: Any,
    experiment: Experiment,
    cells: Mapping[Cell, Measured],
    dataset: str,
    key: str,
    metric: str,
    protocol: str,
) -> None:
    values = experiment.sweep[key]
    # Numbers are on a numeric axis, other values at equal distances.
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    positions: Sequence[Any] = values if numeric else range(len(values))
    for row, marker in zip(experiment.rows, itertools.cycle(MARKERS)):
        points = [
            (x, cells[cell].mean(metric, protocol), cells[cell].deviation(metric, protocol))
            for x, value in zip(positions, values, strict=True)
            if (cell := Cell(row, dataset, (key, value))) in cells
        ]
        if not points:
            continue
        x, mean, spread = zip(*sorted(points), strict=True)
        (curve,) = axis.plot(x, mean, marker=marker, markersize=3, label=row)
        if not any(math.isnan(s) for s in spread):
            _band(axis, x, mean, spread, curve.get_color())
    if numeric and geometric(values):
        axis.set_xscale("log")
        axis.minorticks_off()
    texts = [f"{v:g}" if numeric else str(v) for v in values]
    wide = sum(map(len, texts)) > 24
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if wide else {}
    axis.set_xticks(list(positions), texts, fontsize="small", **turned)


def _band(
    axis: Any, x: Sequence[Any], mean: Sequence[float], spread: Sequence[float], color: str
) -> None:
    """The mean plus and minus a standard deviation."""
    low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, alpha=0.2, color=color, linewidth=0)


def geometric(values: Sequence[float]) -> bool:
    """Whether values, in any order, grow by a factor rather than by a step.

    Args:
        values (Sequence): numbers of a sweep.
    """
    ordered = sorted(set(values))
    if len(ordered) < 3 or ordered[0] <= 0:
        return False
    factors = [b / a for a, b in itertools.pairwise(ordered)]
    steps = [b - a for a, b in itertools.pairwise(ordered)]
    return min(factors) >= 1.5 and max(factors) / min(factors) < max(steps) / min(steps)


def curves(
    logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], metric: str, path: Path
) -> list[Path]:
    """Training curves: for each label a panel with the loss terms and one with the validation.

    Several runs are seeds: their mean, as far as all were trained, with a band of one standard
    deviation; a thin line is one seed's validation, a dot its best epoch.

    Args:
        logs (Mapping): label -> log of each of its runs: one entry for each epoch, in order.
        metric (str): the validation metric, such as ``ndcg@10``.
        path (Path): path of the files, without suffix.

    Returns:
        list: the files.
    """
    plt = pyplot()
    figure, axes = plt.subplots(len(logs), 2, figsize=(8, 2.4 * len(logs)), squeeze=False)
    for (label, runs), (left, right) in zip(logs.items(), axes, strict=True):
        parts = dict.fromkeys(name for log in runs for entry in log for name in entry["loss"])
        for color, name in zip(itertools.cycle(PALETTE), parts):
            points = [
                {n: e["loss"][name] for n, e in enumerate(log) if name in e["loss"]} for log in runs
            ]
            _mean_curve(left, points, color, name)
        valid = [{n: e["valid"][metric] for n, e in enumerate(log) if "valid" in e} for log in runs]
        _validation(right, [points for points in valid if points])
        left.legend(fontsize="small")
        left.set(xlabel="epoch", ylabel="loss, weighted")
        left.set_title(label, fontsize="medium", loc="left")
        right.set(xlabel="epoch", ylabel=f"validation {metric}")
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(integer=True)
    return save(figure, path)


def _validation(axis: Any, runs: Sequence[Mapping[int, float]]) -> None:
    """The validation of each run, epoch -> value, their mean, and the best epochs."""
    if not runs:
        return
    if len(runs) > 1:
        for points in runs:
            axis.plot(*zip(*points.items(), strict=True), color="0.7", linewidth=0.8)
        axis.plot([], [], color="0.7", linewidth=0.8, label="one seed")
        _mean_curve(axis, runs, PALETTE[0], f"mean of {len(runs)} seeds")
    else:
        _mean_curve(axis, runs, PALETTE[0], "one seed")
    best = [max(points.items(), key=lambda point: point[1]) for points in runs]
    axis.plot(*zip(*best, strict=True), "o", color=PALETTE[1], markersize=4, label="best epoch")
    axis.legend(fontsize="small", loc="lower right")


def _mean_curve(axis: Any, runs: Sequence[Mapping[int, float]], color: str, label: str) -> None:
    """Mean of several curves (epoch -> value) at the epochs that all have, with its band."""
    x = [n for n in runs[0] if all(n in points for points in runs)]
    columns = [[points[n] for points in runs] for n in x]
    mean = [statistics.fmean(column) for column in columns]
    axis.plot(x, mean, color=color, linewidth=1.2, label=label)
    if len(runs) > 1:
        _band(axis, x, mean, [statistics.stdev(column) for column in columns], color)


def cost(
    points: Mapping[str, Sequence[tuple[float, float]]], metric: str, path: Path
) -> list[Path]:
    """Training time and test metric: a point for each run, and their mean with error bars.

    An error bar is one standard deviation over the runs of a label to each side.

    Args:
        points (Mapping): label -> (seconds of training and validation, test metric) of each run.
        metric (str): the test metric, for the label of the axis.
        path (Path): path of the files, without suffix.

    Returns:
        list: the files.
    """
    figure, axis = pyplot().subplots(figsize=(6.4, 3.6))
    styles = zip(itertools.cycle(PALETTE), itertools.cycle(MARKERS))
    for (label, runs), (color, marker) in zip(points.items(), styles, strict=False):
        columns = list(zip(*runs, strict=True))
        center = [statistics.fmean(column) for column in columns]
        bars = [statistics.stdev(column) for column in columns] if len(runs) > 1 else [None, None]
        if len(runs) > 1:
            axis.plot(*columns, ".", color=color, markersize=3, alpha=0.5)
        style = {"color": color, "markersize": 5, "capsize": 2, "linewidth": 1, "label": label}
        axis.errorbar(*center, xerr=bars[0], yerr=bars[1], fmt=marker, **style)
    several = any(len(runs) > 1 for runs in points.values())
    axis.set(xscale="log", xlabel="training, s", ylabel=f"test {metric}")
    if several:
        axis.set_title("mean ± standard deviation over seeds", fontsize="small", loc="left")
    figure.legend(fontsize="small", loc="outside right upper")
    return save(figure, path)


def embeddings(tables: Mapping[str, Sequences], users: Sequence[str], path: Path) -> list[Path]:
    """t-SNE of the item embeddings of a few users' sequences, a panel for each run.

    Distances between the clusters of a t-SNE have no meaning. Therefore the titles give the mean
    cosine similarity of the embeddings within all sequences, and within shuffled ones.

    Args:
        tables (Mapping): label -> item embeddings and sequences of a run.
        users (Sequence): users whose sequences are shown, one colour each.
        path (Path): path of the files, without suffix.

    Returns:
        list: the files.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, len(tables), figsize=(3.6 * len(tables), 3.8), squeeze=False)
    for axis, (label, sequences) in zip(axes[0], tables.items(), strict=True):
        shown = [sequences.items(user) for user in users]
        vectors = sequences.vectors(shown)
        perplexity = min(30.0, (len(vectors) - 1) / 3)
        tsne = TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=0)
        points = tsne.fit_transform(vectors)
        start = 0
        for color, items in zip(itertools.cycle(PALETTE), shown):
            part = points[start : start + len(items)]
            axis.plot(part[:, 0], part[:, 1], "o", markersize=3, color=color)
            start += len(items)
        within, shuffled = sequences.similarity(), sequences.shuffled(seed=0).similarity()
        axis.set_title(
            f"{label}\nwithin sequences {within:.3f}, shuffled {shuffled:.3f}", fontsize="small"
        )
        axis.set(xticks=[], yticks=[])
    return save(figure, path)
