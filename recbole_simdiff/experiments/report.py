"""Tables and figures of an experiment, from its records and its runs' rankings."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recbole_simdiff import files
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.statistics import PrefixStatistics, Statistics, published
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import KEPT, PROTOCOLS
from recbole_simdiff.experiments import plots, tables
from recbole_simdiff.experiments.collect import Collected
from recbole_simdiff.experiments.embeddings import sequences
from recbole_simdiff.experiments.execute import FAILED, Planned
from recbole_simdiff.experiments.results import (
    Cell,
    Comparison,
    Measured,
    best_against_second,
    compare,
    measured,
)
from recbole_simdiff.experiments.spec import Experiment, label
from recbole_simdiff.log import logger

TABLE, LATEX, VALUES, SIGNIFICANCE = "table.md", "table.tex", "table.csv", "significance.csv"
TESTS = {
    compare: "Two-sided Wilcoxon signed-rank tests and paired t-tests over users, metrics averaged "
    "over seeds; paired t-tests over seeds; p Holm-corrected over the rows; d: Cohen's d of the "
    "paired differences of users; bootstrap interval over users.",
    best_against_second: "The same tests, not corrected, of two rows chosen by these means.",
}
N_USERS = 8  # shown in a t-SNE


def report(
    experiment: Experiment,
    collected: Sequence[tuple[Planned, Mapping[str, Any]]],
    planned: int,
    folder: Path,
) -> str:
    """Write the tables and figures of the runs that have a record.

    Args:
        experiment (Experiment): the experiment.
        collected (Sequence): its runs with their records.
        planned (int): number of runs of the experiment.
        folder (Path): folder of the files.

    Returns:
        str: the tables as Markdown, which is also the content of ``table.md``.
    """
    cells = measured(collected)
    configs: dict[str, list[Any]] = {}
    for one, _ in collected:
        configs.setdefault(one.spec.dataset, []).append(one.config)
    parts = write_tables(experiment, cells, configs, folder)
    errors = [f"{p.spec}: {line['error']}" for p, line in collected if line["status"] == FAILED]
    failed = [f"- {tables.plain(text)}" for text in errors]
    if failed or len(collected) < planned:
        missing = planned - len(collected)
        parts.append("\n".join([f"{len(failed)} runs failed, {missing} were not run.", *failed]))
    text = "\n\n".join(parts)
    files.write_text(folder / TABLE, text + "\n")
    for path in figures(experiment, cells, folder):
        logger.info(f"{path}")
    return text


def write_tables(
    experiment: Experiment,
    cells: Mapping[Cell, Measured],
    configs: Mapping[str, Sequence[Mapping[str, Any]]],
    folder: Path,
    tests: bool = True,
) -> list[str]:
    """Write the tables of finished runs as LaTeX and CSV.

    Args:
        experiment (Experiment): its title, rows and metrics.
        cells (Mapping): its finished runs.
        configs (Mapping): data set -> configurations of the runs there, which share a split.
        folder (Path): folder of the files.
        tests (bool): whether rows are compared, which needs the rankings of all runs.

    Returns:
        list: the same as Markdown, in parts.
    """
    parts, latex, values, compared = [], [], [], []
    for dataset in experiment.datasets:
        for protocol in PROTOCOLS:
            rows = tables.rows(experiment, cells, dataset, protocol)
            if not any(row.seeds for row in rows):
                continue
            caption = tables.caption(experiment, dataset, protocol, configs[dataset])
            digits = configs[dataset][0]["metric_decimal_place"]
            found = _comparisons(experiment, cells, dataset, protocol) if tests else {}
            marks = tables.marks(found[compare][0]) if compare in found else None
            shown = (marks, experiment.reference)
            parts.append(_table(rows, experiment.metrics, digits, caption, *shown))
            latex.append(tables.latex(rows, experiment.metrics, digits, caption, *shown))
            for comparisons, text in found.values():
                compared += comparisons
                parts.append(text)
        values += _values(cells, dataset)
    files.write_text(folder / LATEX, "\n\n".join(latex) + "\n")
    files.write_text(folder / VALUES, tables.as_csv(values))
    (folder / SIGNIFICANCE).unlink(missing_ok=True)
    if compared:
        files.write_text(folder / SIGNIFICANCE, tables.as_csv([asdict(c) for c in compared]))
    return parts


def write_tables_of_runs(runs: Collected, folder: Path) -> str:
    """Write the tables of single runs; without all rankings there are no tests of significance.

    Args:
        runs (Collected): what ``collect`` returned.
        folder (Path): folder of the files.

    Returns:
        str: the tables as Markdown, which is also the content of ``table.md``.
    """
    tests = not runs.unranked
    parts = write_tables(runs.experiment, runs.cells, runs.configs, folder, tests)
    if not tests and len(runs.experiment.rows) > 1:
        parts.append(
            f"No tests of significance: {runs.unranked[0]} has no rankings; write them with "
            f"evaluate --checkpoint={runs.unranked[0]} --save_rankings=True"
        )
    text = "\n\n".join(parts)
    files.write_text(folder / TABLE, text + "\n")
    return text


def _table(
    rows: Sequence[tables.Row],
    metrics: Sequence[str],
    digits: int,
    caption: str,
    marks: tables.Marks | None,
    reference: str,
) -> str:
    """One table as Markdown, with a list of arithmetically impossible rows."""
    faults = [f"- {tables.plain(row.label)}: {text}" for row in rows for text in row.faults]
    if faults:
        faults = [f"\n{tables.IMPOSSIBLE} arithmetically impossible:\n", *faults]
    table = tables.markdown(rows, metrics, digits, marks, reference)
    return "\n".join([f"**{tables.plain(caption)}**\n", table, *faults])


def _comparisons(
    experiment: Experiment, cells: Mapping[Cell, Measured], dataset: str, protocol: str
) -> dict[Any, tuple[list[Comparison], str]]:
    """Comparisons of rows and their tables, by what compared them; a sweep has none."""
    found = {}
    titles = {
        compare: f"against {experiment.reference}",
        best_against_second: "best against second",
    }
    for method, title in ({} if experiment.sweep else titles).items():
        if comparisons := method(experiment, cells, dataset, protocol):
            heading = tables.plain(f"{dataset}, {protocol}: {title}.")
            text = f"**{heading}** {TESTS[method]}\n\n{tables.comparisons(comparisons)}"
            found[method] = comparisons, text
    return found


def figures(experiment: Experiment, cells: Mapping[Cell, Measured], folder: Path) -> list[Path]:
    """Draw the figures of an experiment, separate files for each data set.

    Args:
        experiment (Experiment): the experiment, which names its figures.
        cells (Mapping): its finished runs.
        folder (Path): folder of the files.

    Returns:
        list: the files.
    """
    written = []
    of_kind = {"sweep": plots.sweep, "ablation": plots.ablation}
    for protocol in PROTOCOLS if experiment.kind in of_kind else ():
        try:
            written += of_kind[experiment.kind](experiment, cells, protocol, folder)
        except UserError as error:  # without matplotlib an ablation has its tables
            logger.warning(f"{folder}: {error}")
    for dataset in experiment.datasets:
        by_label = {
            label(cell.row, cell.swept): runs
            for cell, runs in cells.items()
            if cell.dataset == dataset
        }
        for name in experiment.figures if by_label else ():
            path = folder / f"{experiment.name}-{dataset}-{name}"
            try:
                written += _figure(name, experiment, by_label, path)
            except UserError as error:  # the tables and other figures are still made
                logger.warning(f"{path}: {error}")
    return written


def _figure(
    kind: str, experiment: Experiment, runs: Mapping[str, Measured], path: Path
) -> list[Path]:
    """One figure of the runs on one data set; ``runs`` maps labels to runs."""
    first = next(iter(next(iter(runs.values())).lines.values()))
    if kind == "curves":
        logs = {name: [line["log"] for line in row.lines.values()] for name, row in runs.items()}
        return plots.curves(logs, first["config"]["values"]["valid_metric"].lower(), path)
    if kind == "cost":
        metric = experiment.metrics[-1]
        points = {
            name: [(seconds(row.lines[s]), v) for s, v in row.values(metric, KEPT).items()]
            for name, row in runs.items()
        }
        return plots.cost(points, f"{metric}, {KEPT}", path)
    by_name = {name: sequences(next(iter(row.folders.values()))) for name, row in runs.items()}
    users = next(iter(by_name.values())).sample(N_USERS, seed=0)
    return plots.embeddings(by_name, users, path)


def seconds(line: Mapping[str, Any]) -> float:
    """Seconds of training and validation in a run's result, earlier stages included."""
    return float(line["seconds"] + line["augmentation"].get("seconds", 0.0))


def _values(cells: Mapping[Cell, Measured], dataset: str) -> list[dict[str, Any]]:
    """All metrics of all runs on a data set, for ``table.csv``."""
    return [
        {
            "dataset": dataset,
            "row": cell.row,
            "swept": "" if cell.swept is None else f"{cell.swept[0]}={cell.swept[1]}",
            "seed": seed,
            "split": split,
            "protocol": protocol,
            "metric": metric,
            "value": value,
        }
        for cell, runs in cells.items()
        if cell.dataset == dataset
        for seed, line in runs.lines.items()
        for split in ("valid", "test")
        for protocol, metrics in line[split].items()
        for metric, value in metrics.items()
    ]


def statistics(experiment: Experiment, folder: Path) -> str:
    """Sizes of the data sets after filtering, and published sizes.

    A data set that cannot be read has its error message in place of sizes.

    Args:
        experiment (Experiment): of kind statistics.
        folder (Path): folder of the files.

    Returns:
        str: the table as Markdown.

    Raises:
        UserError: if none of the data sets can be read.
    """
    names = ("users", "items", "actions", "average length", "sparsity %")
    rows, missing = [], []
    for dataset in experiment.datasets:
        values = {**experiment.settings, **experiment.command}
        config = Config("SASRec", dataset, (), values, f"experiment {experiment.name}")
        try:
            measured_sizes = create_dataset(config).statistics
        except UserError as error:
            missing.append(str(error))
            rows.append([dataset, "here", str(error), *("-" for _ in names[1:])])
        else:
            rows.append([dataset, "here", *_sizes(measured_sizes)])
        rows += [[dataset, other.source, *_sizes(other.statistics)] for other in published(dataset)]
    if len(missing) == len(experiment.datasets):
        raise UserError("\n".join(missing))
    lines = [["data set", "source", *names], *rows]
    text = f"**{tables.plain(experiment.title)}**\n\n"
    text += tables.grid([[tables.plain(cell) for cell in line] for line in lines])
    files.write_text(folder / TABLE, text + "\n")
    files.write_text(
        folder / VALUES, tables.as_csv([dict(zip(lines[0], r, strict=True)) for r in rows])
    )
    return text


def _sizes(sizes: Statistics) -> list[str]:
    counts = [f"{n:,}" for n in (sizes.users, sizes.items, sizes.actions)]
    if isinstance(sizes, PrefixStatistics):
        return [*counts, "-", "-"]
    return [*counts, f"{sizes.actions / sizes.users:.2f}", f"{100 * sizes.sparsity:.2f}"]
