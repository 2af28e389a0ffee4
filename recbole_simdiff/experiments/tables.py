"""Tables of an experiment as Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from recbole_simdiff.config.keys import NOT_IN_RESULT
from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.experiments.results import Cell, Comparison, Measured, impossible
from recbole_simdiff.experiments.spec import Experiment, label

IMPOSSIBLE = "✗"
# Greatest p of a mark -> its sign in Markdown and in LaTeX; the strictest first.
SIGNIFICANT = {0.01: ("‡", r"$^{\ddagger}$"), 0.05: ("†", r"$^{\dagger}$")}
Marks = Mapping[tuple[str, str], float]  # (row, metric) -> a key of SIGNIFICANT
CITED_UNIT = 1e-4  # published numbers have four digits


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        label (str): its first cell.
        seeds (int): number of runs; 0 for cited numbers.
        means, deviations (dict): metric -> value; unknown ones are missing.
        faults (list): why its values are arithmetically impossible; empty if they are possible.
    """

    label: str
    seeds: int
    means: Mapping[str, float]
    deviations: Mapping[str, float]
    faults: Sequence[str]


def rows(
    experiment: Experiment, cells: Mapping[Cell, Measured], dataset: str, protocol: str
) -> list[Row]:
    """The rows of one table: measured ones, then those cited for the same protocol.

    Args:
        experiment (Experiment): has the metrics and the published numbers.
        cells (Mapping): its finished runs.
        dataset (str): the data set.
        protocol (str): one of ``PROTOCOLS``.
    """
    measured = []
    for cell, runs in cells.items():
        if cell.dataset != dataset or not runs.values(experiment.metrics[0], protocol):
            continue
        all_metrics = next(iter(runs.lines.values()))["test"][protocol]
        faults = impossible({m: runs.mean(m, protocol) for m in all_metrics})
        measured.append(
            Row(
                label(cell.row, cell.swept),
                len(runs.lines),
                {m: runs.mean(m, protocol) for m in experiment.metrics},
                {m: runs.deviation(m, protocol) for m in experiment.metrics},
                faults,
            )
        )
    cited = [
        Row(f"{row} [{publication.source}]", 0, values, {}, impossible(values, CITED_UNIT))
        for publication in experiment.cited
        if publication.protocol == protocol
        for row, values in publication.rows(dataset).items()
    ]
    return [*measured, *cited]


def best_two(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """Best and second best mean among the measured rows; NaN if there are fewer."""
    values = sorted({row.means[metric] for row in rows if row.seeds}, reverse=True)
    return tuple([*values, math.nan, math.nan][:2])  # type: ignore[return-value]


def marks(compared: Sequence[Comparison]) -> dict[tuple[str, str], float]:
    """Which means differ from the reference's: (row, metric) -> a bound of its p.

    Args:
        compared (Sequence): comparisons of rows with the reference; their Wilcoxon tests count.
    """
    return {
        (c.row, c.metric): next(bound for bound in SIGNIFICANT if c.p_wilcoxon < bound)
        for c in compared
        if c.p_wilcoxon < max(SIGNIFICANT)
    }


def _legend(reference: str, latex: bool) -> str:
    """The line under a table that explains the marks."""
    signs = ", ".join(
        f"{sign[latex]} p < {bound:g}" for bound, sign in reversed(SIGNIFICANT.items())
    )
    reference = _escape(reference) if latex else plain(reference)
    return (
        f"{signs}: differs from {reference}, two-sided Wilcoxon signed-rank test over users, "
        "Holm-corrected over the rows."
    ).replace("p < ", "$p <$ " if latex else "p < ")


def markdown(
    rows: Sequence[Row],
    metrics: Sequence[str],
    digits: int,
    marks: Marks | None = None,
    reference: str = "",
) -> str:
    """A table as Markdown.

    The best mean is bold, the second underlined; cited rows are in italics, impossible ones marked.

    Args:
        rows (Sequence): rows of the table.
        metrics (Sequence): columns.
        digits (int): decimal places.
        marks (Mapping | None): see ``marks``; None if nothing was compared.
        reference (str): the row that others were compared with.
    """
    best = {m: best_two(rows, m) for m in metrics}
    text = [["row", "seeds", *metrics]]
    for row in rows:
        label = f"*{plain(row.label)}*" if not row.seeds else plain(row.label)
        text.append([f"{label} {IMPOSSIBLE}" if row.faults else label, str(row.seeds or "-")])
        for metric in metrics:
            cell = _value(row, metric, digits, " ± ")
            if row.seeds and row.means[metric] == best[metric][0]:
                cell = f"**{cell}**"
            elif row.seeds and row.means[metric] == best[metric][1]:
                cell = f"<u>{cell}</u>"
            text[-1].append(f"{cell}{_mark(marks, row, metric, latex=False)}")
    if improved := _improved(best):
        text.append(["best over second", "-", *improved])
    return grid(text) if marks is None else f"{grid(text)}\n\n{_legend(reference, latex=False)}"


def _mark(marks: Marks | None, row: Row, metric: str, latex: bool) -> str:
    bound = (marks or {}).get((row.label, metric)) if row.seeds else None
    return "" if bound is None else SIGNIFICANT[bound][latex]


def plain(text: str) -> str:
    """Escape text (labels, names, messages) for a cell of Markdown: HTML, ``|`` and line breaks."""
    special: dict[str, str | int | None] = {
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
        "|": r"\|",
        "\n": " ",
        "\r": " ",
    }
    return text.translate(str.maketrans(special))


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table; the first row is the header."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def latex(
    rows: Sequence[Row],
    metrics: Sequence[str],
    digits: int,
    caption: str,
    marks: Marks | None = None,
    reference: str = "",
) -> str:
    """A table as LaTeX with booktabs, marked as in ``markdown``.

    Args:
        rows (Sequence): rows of the table.
        metrics (Sequence): columns.
        digits (int): decimal places.
        caption (str): its caption, plain text.
        marks (Mapping | None), reference (str): as for ``markdown``.
    """
    best = {m: best_two(rows, m) for m in metrics}
    text = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape(caption)}}}",
        rf"\begin{{tabular}}{{lr{'r' * len(metrics)}}}",
        r"\toprule",
        rf"row & seeds & {' & '.join(map(_escape, metrics))} \\",
        r"\midrule",
    ]
    for row in rows:
        label = _escape(row.label)
        label = rf"\textit{{{label}}}" if not row.seeds else label
        cells = [rf"{label} $\times$" if row.faults else label, str(row.seeds or "--")]
        for metric in metrics:
            cell = _value(row, metric, digits, r" $\pm$ ")
            if row.seeds and row.means[metric] == best[metric][0]:
                cell = rf"\textbf{{{cell}}}"
            elif row.seeds and row.means[metric] == best[metric][1]:
                cell = rf"\underline{{{cell}}}"
            cells.append(f"{cell}{_mark(marks, row, metric, latex=True)}")
        text.append(rf"{' & '.join(cells)} \\")
    if improved := _improved(best):
        text += [r"\midrule", rf"best over second & -- & {' & '.join(map(_escape, improved))} \\"]
    text += [r"\bottomrule", r"\end{tabular}"]
    if marks is not None:
        text += ["", r"\smallskip", rf"{{\footnotesize {_legend(reference, latex=True)}}}"]
    return "\n".join([*text, r"\end{table}"])


def _improved(best: Mapping[str, tuple[float, float]]) -> list[str]:
    """Improvement of the best over the second in per cent; empty if a metric has no second."""
    if any(math.isnan(second) for _, second in best.values()):
        return []
    return [f"{100 * (a / b - 1):+.1f} %" if b else "-" for a, b in best.values()]


def _value(row: Row, metric: str, digits: int, plus_minus: str) -> str:
    if metric not in row.means:
        return "-"
    spread = row.deviations.get(metric, math.nan)
    suffix = "" if math.isnan(spread) else f"{plus_minus}{spread:.{digits}f}"
    return f"{row.means[metric]:.{digits}f}{suffix}"


def _escape(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}"}
    special |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(c, c) for c in text)


def comparisons(compared: Sequence[Comparison]) -> str:
    """Comparisons of rows as a Markdown table."""
    names = ["row", "against", "metric", "difference", "%", "95 % interval", "d"]
    body = [
        [
            plain(c.row),
            plain(c.against),
            c.metric,
            f"{c.difference:+.4f}",
            f"{100 * c.relative:+.1f}",
            f"[{c.low:+.4f}, {c.high:+.4f}]",
            "-" if math.isnan(c.effect) else f"{c.effect:+.3f}",
            _p(c.p_wilcoxon),
            _p(c.p_users),
            _p(c.p_seeds),
        ]
        for c in compared
    ]
    return grid([[*names, "p, Wilcoxon", "p, users", "p, seeds"], *body])


def _p(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mappings with the same keys as CSV, unrounded."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def setting(key: str, value: Any) -> str:
    """A setting in a caption or label; of a path only the last part."""
    return f"{key}={PurePath(value).name if isinstance(value, str) and '/' in value else value}"


def caption(
    experiment: Experiment, dataset: str, protocol: str, configs: Sequence[Mapping[str, Any]]
) -> str:
    """Caption of a table: what was measured, and how.

    Args:
        experiment (Experiment): the experiment.
        dataset (str): the data set.
        protocol (str): one of ``PROTOCOLS``.
        configs (Sequence): configurations of its runs there, which share a split.
    """
    values = configs[0]
    metric = " or ".join(dict.fromkeys(str(config["valid_metric"]) for config in configs))
    n = len(experiment.seeds)
    listed = ", ".join(map(str, experiment.seeds))
    seeds = f"mean ± standard deviation over seeds {listed}" if n > 1 else f"seed {listed}"
    split, group = (values["eval_args"][key] for key in ("split", "group_by"))
    rule = "leave-one-out by time" if "LS" in split else f"split {split} by time"
    rule += "" if group == "user" else ", of all users together"
    primary = "RecBole's protocol" if protocol == KEPT else "earlier items out of the ranking"
    changed = ", ".join(
        setting(k, v) for k, v in experiment.command.items() if k not in NOT_IN_RESULT
    )
    return (
        f"{experiment.title}. {dataset}, test, {rule}, all items ranked, {protocol} ({primary}); "
        f"best epoch by validation {metric}; {seeds}." + (f" With {changed}." if changed else "")
    )
