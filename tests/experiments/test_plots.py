"""What figures show: bands, legends, ticks, error bars."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.experiments import plots
from recbole_simdiff.experiments.results import Cell, Measured
from recbole_simdiff.experiments.spec import Experiment


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures, which ``save`` would close."""
    figures: list[Any] = []

    def keep(figure: Any, path: Path) -> list[Path]:
        figure.canvas.draw()
        figures.append(figure)
        return []

    monkeypatch.setattr(plots, "save", keep)
    return figures


def log(n: int, seed: int) -> list[dict[str, Any]]:
    """A training of n epochs, best in epoch n // 2."""
    draw = random.Random(seed)
    return [
        {
            "loss": {"rec": 5.0 - e + draw.random(), "diffusion": 1.0},
            "valid": {"ndcg@10": -abs(e - n // 2) + draw.random() / 9},
        }
        for e in range(n)
    ]


def texts(legend: Any) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_curves_of_several_seeds(drawn: list[Any], tmp_path: Path) -> None:
    plots.curves({"A": [log(4, 1), log(6, 2)], "B": [log(3, 3)]}, "ndcg@10", tmp_path / "f")
    left, right, _, alone = drawn[0].axes
    assert texts(left.get_legend()) == ["rec", "diffusion"]
    assert texts(right.get_legend()) == ["one seed", "mean of 2 seeds", "best epoch"]
    assert len(left.collections) == 2  # a band for each loss
    (band,) = right.collections
    mean = next(line for line in right.lines if line.get_label() == "mean of 2 seeds")
    expected = [
        np.mean([run[e]["valid"]["ndcg@10"] for run in (log(4, 1), log(6, 2))]) for e in range(4)
    ]
    assert mean.get_ydata() == pytest.approx(expected)  # as far as both were trained
    assert band.get_datalim(right.transData).x1 == 3
    best = next(line for line in right.lines if line.get_label() == "best epoch")
    assert list(best.get_xdata()) == [2, 3]
    assert texts(alone.get_legend()) == ["one seed", "best epoch"]
    assert not alone.collections
    for axis in drawn[0].axes:
        assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_cost_has_error_bars_over_seeds(drawn: list[Any], tmp_path: Path) -> None:
    points = {"A": [(10.0, 0.1), (20.0, 0.3)], "B": [(5.0, 0.2)]}
    plots.cost(points, "ndcg@10", tmp_path / "f")
    (axis,) = drawn[0].axes
    first, second = axis.containers
    (x,), (y,) = first.lines[0].get_data()
    assert (x, y) == pytest.approx((15.0, 0.2))
    (vertical,) = first.lines[2][1].get_segments()
    assert vertical[:, 1] == pytest.approx([0.2 - np.std([0.1, 0.3], ddof=1), 0.2 + 0.2 / 2**0.5])
    assert not second.has_yerr
    (legend,) = drawn[0].legends
    assert texts(legend) == ["A", "B"]
    # Beside the points, not over them.
    box = legend.get_window_extent()
    assert box.x0 >= axis.get_window_extent().x1


def test_a_sweep_has_bands_and_a_scale_that_fits(drawn: list[Any], tmp_path: Path) -> None:
    rates = [0.001, 0.0001, 0.01]
    sweep = {"learning_rate": rates, "k_noise": [10, 20, 30], "aug_position": ["a", "b"]}
    experiment = Experiment(
        "s", "sweep", "S", ("toy",), (1, 2), {"A": {}, "B": {}}, sweep=sweep, metrics=("hit@5",)
    )
    cells = {
        Cell(row, "toy", (key, value)): Measured(
            {s: {"test": {KEPT: {"hit@5": s + i}}} for s in (1, 2)}, {}
        )
        for row in "AB"
        for key, values in sweep.items()
        for i, value in enumerate(values)
    }
    plots.sweep(experiment, cells, KEPT, tmp_path)
    rate, linear, words = drawn[0].axes
    assert [axis.get_xscale() for axis in drawn[0].axes] == ["log", "linear", "linear"]
    assert [t.get_text() for t in rate.get_xticklabels()] == ["0.001", "0.0001", "0.01"]
    assert [t.get_text() for t in words.get_xticklabels()] == ["a", "b"]
    assert list(rate.lines[0].get_xdata()) == sorted(rates)  # the line does not turn back
    assert len(linear.collections) == 2
    assert texts(drawn[0].legends[0]) == ["A", "B"]
    colors = [to_hex(line.get_color()).upper() for line in linear.lines]
    assert colors == list(plots.PALETTE[:2])
    assert {line.get_marker() for line in linear.lines} == {"o", "s"}


def test_an_ablation_has_a_bar_a_row_with_its_spread(drawn: list[Any], tmp_path: Path) -> None:
    rows = ("Full", "w/o contrast", "squared error with a target that is detached from the table")
    values = {row: (0.1 + 0.02 * i, 0.12 + 0.02 * i) for i, row in enumerate(rows)}
    experiment = Experiment(
        "a",
        "ablation",
        "A",
        ("toy",),
        (1, 2),
        {row: {} for row in (*rows, "failed")},
        reference="Full",
        metrics=("hit@5", "ndcg@5"),
    )
    cells = {
        Cell(row, "toy", None): Measured(
            {s: {"test": {KEPT: {"hit@5": v, "ndcg@5": v / 2}}} for s, v in enumerate(pair)}, {}
        )
        for row, pair in values.items()
    }
    plots.ablation(experiment, cells, KEPT, tmp_path)
    (figure,) = drawn
    first, second = figure.axes
    assert [bar.get_width() for bar in first.patches] == pytest.approx([0.11, 0.13, 0.15])
    assert [bar.get_width() for bar in second.patches] == pytest.approx([0.055, 0.065, 0.075])
    (spread,) = first.containers[0].lines[2]
    deviation = 0.02 / 2**0.5
    assert spread.get_segments()[1][:, 0] == pytest.approx([0.13 - deviation, 0.13 + deviation])
    colors = [to_hex(bar.get_facecolor()).upper() for bar in first.patches]
    assert colors == [plots.PALETTE[1], plots.PALETTE[0], plots.PALETTE[0]]
    assert [text.get_text() for text in first.texts] == ["0.1100", "0.1300", "0.1500"]
    assert all(axis.get_xlim()[0] == 0 for axis in figure.axes)  # a bar cut off would deceive
    labels = [label.get_window_extent() for label in first.get_yticklabels()]
    assert len(labels) == len(rows)
    texts_of = [[text.get_window_extent() for text in axis.texts] for axis in figure.axes]
    for boxes in (labels, *texts_of):
        assert all(a.y0 >= b.y1 for a, b in itertools.pairwise(boxes))  # none on another
    for axis, boxes in zip(figure.axes, texts_of, strict=True):
        assert all(box.x1 <= axis.get_window_extent().x1 for box in boxes)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.001, 0.003, 0.01, 0.03], True),
        ([64, 16, 32], True),
        ([1, 2, 5, 10], True),
        ([1, 2, 3, 4], False),
        ([5, 10, 20, 30, 40, 50], False),
        ([0, 1, 10, 100], False),
        ([-1, 1, 10], False),
        ([0.1, 1], False),
        ([0.1, 0.2, 0.3], False),
    ],
)
def test_geometric_values(values: list[float], expected: bool) -> None:
    assert plots.geometric(values) is expected


def test_the_palette_is_told_apart_by_all_readers() -> None:
    """Lightness differs, also where red and green look alike (Machado 2009, deuteranopia)."""
    deuteranopia = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in plots.PALETTE])
    seen = rgb @ deuteranopia.T
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distance[~np.eye(len(rgb), dtype=bool)].min() > 0.2
