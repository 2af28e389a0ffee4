"""Figures of experiments, each as PDF, SVG and PNG."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_simdiff import checkpoint
from recbole_simdiff.errors import UserError
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
        checkpoint.write_atomically(
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
