"""Figures of experiments and runs, each as PDF, SVG and PNG."""

import math
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


def pyplot() -> Any:
    """``matplotlib.pyplot``, set up for files.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'recbole_simdiff[plots]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "recbole_simdiff", "figure.constrained_layout.use": True}
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
        axes[0][0].legend(fontsize="small")
        seeds = f"{len(experiment.seeds)} seeds" if len(experiment.seeds) > 1 else "one seed"
        figure.suptitle(f"{dataset}, test, {protocol}, {seeds}", fontsize="medium")
        name = f"{experiment.name}-{dataset}-{protocol.replace(' ', '-')}"
        written += save(figure, folder / name)
    return written


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
    for row in experiment.rows:
        points = [
            (x, cells[cell].mean(metric, protocol), cells[cell].deviation(metric, protocol))
            for x, value in zip(positions, values, strict=True)
            if (cell := Cell(row, dataset, (key, value))) in cells
        ]
        if not points:
            continue
        x, mean, spread = zip(*points, strict=True)
        (curve,) = axis.plot(x, mean, marker="o", markersize=3, label=row)
        if not any(math.isnan(s) for s in spread):
            low, high = (
                [m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1)
            )
            axis.fill_between(x, low, high, alpha=0.2, color=curve.get_color(), linewidth=0)
    if not numeric:
        axis.set_xticks(list(positions), [str(v) for v in values])


def curves(
    logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], metric: str, path: Path
) -> list[Path]:
    """Training curves: for each label a panel with the loss terms and one with the validation.

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
        for log in runs:
            parts = dict.fromkeys(name for entry in log for name in entry["loss"])
            for color, name in enumerate(parts):
                points = [(n, e["loss"][name]) for n, e in enumerate(log) if name in e["loss"]]
                left.plot(*zip(*points, strict=True), color=f"C{color}", linewidth=1, label=name)
            points = [(n, e["valid"][metric]) for n, e in enumerate(log) if "valid" in e]
            if points:
                right.plot(*zip(*points, strict=True), color="C0", linewidth=1)
                right.plot(*max(points, key=lambda point: point[1]), "o", color="C3", markersize=4)
        handles = dict(zip(*left.get_legend_handles_labels()[::-1], strict=True))
        left.legend(handles.values(), handles.keys(), fontsize="small")
        left.set(title=label, xlabel="epoch", ylabel="loss, weighted")
        right.set(title="validation, best epoch marked", xlabel="epoch", ylabel=metric)
    return save(figure, path)


def cost(
    points: Mapping[str, Sequence[tuple[float, float]]], metric: str, path: Path
) -> list[Path]:
    """Training time and test metric, a point for each run.

    Args:
        points (Mapping): label -> (seconds of training and validation, test metric) of each run.
        metric (str): the test metric, for the label of the axis.
        path (Path): path of the files, without suffix.

    Returns:
        list: the files.
    """
    figure, axis = pyplot().subplots(figsize=(5, 3.6))
    for label, runs in points.items():
        axis.plot(*zip(*runs, strict=True), "o", markersize=4, label=label)
    axis.set(xscale="log", xlabel="training, s", ylabel=f"test {metric}")
    axis.legend(fontsize="small")
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
        for color, items in enumerate(shown):
            part = points[start : start + len(items)]
            axis.plot(part[:, 0], part[:, 1], "o", markersize=3, color=f"C{color % 10}")
            start += len(items)
        within, shuffled = sequences.similarity(), sequences.shuffled(seed=0).similarity()
        axis.set_title(
            f"{label}\nwithin sequences {within:.3f}, shuffled {shuffled:.3f}", fontsize="small"
        )
        axis.set(xticks=[], yticks=[])
    return save(figure, path)
