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
    """matplotlib without a screen.

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
    """Write a figure in every format and close it; ``path`` has no suffix."""
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
    """One figure a data set: a panel for each swept key and metric, a curve for each row.

    The band is one standard deviation over the seeds to each side of the mean.

    Args:
        experiment (Experiment): of kind sweep.
        cells (Mapping): its finished runs.
        protocol (str): one of ``PROTOCOLS``.
        folder (Path): where the files go.
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
    # Numbers where they are numbers; names side by side.
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    place: Sequence[Any] = values if numeric else range(len(values))
    for row in experiment.rows:
        points = [
            (x, cells[cell].mean(metric, protocol), cells[cell].deviation(metric, protocol))
            for x, value in zip(place, values, strict=True)
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
        axis.set_xticks(list(place), [str(v) for v in values])


def curves(
    logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], metric: str, path: Path
) -> list[Path]:
    """Training curves: a row of panels for each label, with its loss parts and its validation.

    Args:
        logs (Mapping): label -> log of each of its runs: one entry an epoch, in order.
        metric (str): the validation metric, such as ``ndcg@10``.
        path (Path): of the files, without suffix.
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
    """Training time against quality, a point for each run.

    Args:
        points (Mapping): label -> (seconds of training and validation, test metric) of each run.
        metric (str): the test metric, for the axis.
        path (Path): of the files, without suffix.
    """
    figure, axis = pyplot().subplots(figsize=(5, 3.6))
    for label, runs in points.items():
        axis.plot(*zip(*runs, strict=True), "o", markersize=4, label=label)
    axis.set(xscale="log", xlabel="training, s", ylabel=f"test {metric}")
    axis.legend(fontsize="small")
    return save(figure, path)


def embeddings(tables: Mapping[str, Sequences], users: Sequence[str], path: Path) -> list[Path]:
    """t-SNE of the item embeddings of a few users' sequences, a panel for each run.

    The titles give the mean cosine similarity within all sequences, and within shuffled ones, of
    the embeddings themselves: distances between the clusters of a t-SNE mean nothing.

    Args:
        tables (Mapping): label -> item embeddings and sequences of a run.
        users (Sequence): whose sequences are shown, one colour each.
        path (Path): of the files, without suffix.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, len(tables), figsize=(3.6 * len(tables), 3.8), squeeze=False)
    for axis, (label, found) in zip(axes[0], tables.items(), strict=True):
        items = [found.items(user) for user in users]
        points = found.vectors(items)
        perplexity = min(30.0, (len(points) - 1) / 3)
        flat = TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=0)
        place = flat.fit_transform(points)
        start = 0
        for color, own in enumerate(items):
            part = place[start : start + len(own)]
            axis.plot(part[:, 0], part[:, 1], "o", markersize=3, color=f"C{color % 10}")
            start += len(own)
        inside, shuffled = found.similarity(), found.shuffled(seed=0).similarity()
        axis.set_title(
            f"{label}\nwithin sequences {inside:.3f}, shuffled {shuffled:.3f}", fontsize="small"
        )
        axis.set(xticks=[], yticks=[])
    return save(figure, path)
