"""The commands on experiments: benchmark, ablate, sweep, plot, analyze."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recbole_simdiff import files
from recbole_simdiff.cli.parser import COMMANDS, add_model_file
from recbole_simdiff.cli.settings import config_files
from recbole_simdiff.config.keys import NOT_IN_RESULT
from recbole_simdiff.config.layers import parse_value, read_yaml
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import kept
from recbole_simdiff.experiments import analysis, execute, plots, report, spec
from recbole_simdiff.experiments.embeddings import sequences
from recbole_simdiff.experiments.results import Cell, Measured, measured
from recbole_simdiff.experiments.tables import as_csv, plain
from recbole_simdiff.models.registry import accept
from recbole_simdiff.runs.identity import digest_of
from recbole_simdiff.runs.result import RESULT, read_result

# Command -> the kinds of experiments that it runs.
KINDS_OF_COMMAND = {
    "benchmark": ("benchmark", "statistics"),
    "ablate": ("ablation",),
    "sweep": ("sweep",),
}

ORIGIN = "the command line"

WITHOUT_TRAINING = {"plot", "analyze"}

# Command -> options that can replace an experiment's name.
INSTEAD_OF_NAME = {"benchmark": "--models"} | dict.fromkeys(WITHOUT_TRAINING, "--models or --runs")

ANALYSES = (*analysis.GROUPS, "views")

DATASET = "ml-100k"  # of a benchmark without a file

MAX_NAME = 80  # characters of a file's name made from run folders


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of one of these commands."""
    text = COMMANDS[command].help
    name = "[NAME]" if command in INSTEAD_OF_NAME else "NAME"
    parser.usage = f"%(prog)s {name} [options] [--key=value ...]"
    note = (
        "Nothing is trained."
        if command in WITHOUT_TRAINING
        else "The same command continues interrupted runs, repeats failed ones, and trains nothing "
        "twice."
    )
    parser.description = (
        f"{text[0].upper()}{text[1:]}. An experiment is a file under properties/experiment/, named "
        "without .yaml, or any .yaml file; other --key=value override the settings of all its "
        "runs. Each run writes a line to <output>/<experiment>/runs.jsonl. Tables and figures are "
        f"made from these lines. {note}"
    )
    other = f"; or give {INSTEAD_OF_NAME[command]}" if command in INSTEAD_OF_NAME else ""
    parser.add_argument("--experiment", metavar="NAME", help=f"name or .yaml file{other}")
    for option, metavar, text in (
        ("--models", "A,B", "only these rows"),
        ("--datasets", "D,D", "replace the experiment's"),
        ("--seeds", "N,N", "replace the experiment's"),
    ):
        parser.add_argument(option, type=_words, default=(), metavar=metavar, help=text)
    parser.add_argument(
        "--config_files",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="YAML files of settings for all runs; later ones override earlier ones, --key=value "
        "overrides all",
    )
    parser.add_argument("--output", default="results", metavar="DIR", help="default results")
    _add_own_arguments(parser, command)


def _add_own_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options that only some of these commands have."""
    if command in WITHOUT_TRAINING:
        parser.add_argument(
            "--runs", type=_words, default=(), metavar="RUN,RUN", help="run folders"
        )
        add_model_file(parser)
    else:
        parser.add_argument(
            "--jobs", type=int, default=1, metavar="N", help="runs at the same time (default 1)"
        )
    if command == "plot":
        parser.add_argument(
            "--figures", type=_words, default=(), metavar="F,F", help=",".join(spec.FIGURES)
        )
    elif command == "analyze":
        parser.add_argument(
            "--by",
            type=_words,
            default=tuple(analysis.GROUPS),
            metavar="A,B",
            help=f"{','.join(ANALYSES)} (default the first two)",
        )
        parser.add_argument(
            "--table",
            metavar="RUN",
            help="run whose item embeddings measure similarity",
        )


def _words(text: str) -> tuple[str, ...]:
    """A list separated by commas, for argparse."""
    words = tuple(part.strip() for part in text.split(",") if part.strip())
    if not words:
        raise argparse.ArgumentTypeError("is empty; leave the option out for its default")
    for word in words:
        if words.count(word) > 1:
            raise argparse.ArgumentTypeError(f"has {word} twice")
    return words


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Run one of these commands.

    Args:
        namespace (Namespace): parsed arguments.
        overrides (dict): other ``--key=value``.

    Returns:
        int: 0, or 1 if a run failed.

    Raises:
        UserError: for a mistake in the experiment or the arguments.
        Interrupted: after a signal; the same command continues.
    """
    overrides = _file_settings(namespace) | overrides
    if namespace.command in WITHOUT_TRAINING:
        accept(namespace.model_file)
        return (_plot if namespace.command == "plot" else _analyze)(namespace, overrides)
    if namespace.jobs < 1:
        raise UserError(f"--jobs={namespace.jobs} must be at least 1")
    experiment = _experiment(namespace, overrides)
    kinds = KINDS_OF_COMMAND[namespace.command]
    if experiment.kind not in kinds:
        command = next(
            name for name in KINDS_OF_COMMAND if experiment.kind in KINDS_OF_COMMAND[name]
        )
        raise UserError(
            f"{namespace.experiment} is of kind {experiment.kind}; use: {command} "
            f"{namespace.experiment}"
        )
    folder = Path(namespace.output) / experiment.name
    if experiment.kind == "statistics":
        folder = _table_folder(namespace, overrides, experiment, folder)
        print(report.statistics(experiment, folder))
        return 0
    if experiment.sweep or experiment.figures:
        plots.pyplot()  # refuses a missing matplotlib before the runs are trained
    planned = execute.plan(experiment)
    path = folder / execute.LINES
    execute.execute(planned, path, namespace.jobs)
    collected = execute.collect(planned, path)
    folder = _table_folder(namespace, overrides, experiment, folder)
    print(report.report(experiment, collected, len(planned), folder))
    print(f"\ntables and figures: {folder}; records: {path}")
    return 0 if all(line["status"] == execute.DONE for _, line in collected) else 1


def _file_settings(namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings of ``--config_files``."""
    settings: dict[str, Any] = {}
    for file in config_files(namespace):
        content = read_yaml(file)
        spec.refuse(content, file)
        settings |= content
    return settings


def _table_folder(
    namespace: argparse.Namespace,
    overrides: dict[str, Any],
    experiment: spec.Experiment,
    folder: Path,
) -> Path:
    """Folder of tables and figures; a part of an experiment has one of its own."""
    changed = overrides.keys() - NOT_IN_RESULT
    if namespace.models or namespace.datasets or namespace.seeds or changed:
        return folder / f"part-{digest_of({'spec': repr(experiment)})[:8]}"
    return folder


def _experiment(namespace: argparse.Namespace, overrides: dict[str, Any]) -> spec.Experiment:
    """The experiment that the arguments name, with their rows, data sets, seeds and values."""
    listed = [parse_value(n) for n in namespace.seeds]
    seeds = spec.seeds(listed, "--seeds") if listed else ()
    if namespace.experiment:
        experiment = spec.load_experiment(namespace.experiment)
        return spec.select(
            experiment, namespace.models, namespace.datasets, seeds, overrides, ORIGIN
        )
    if not namespace.models:
        command = namespace.command
        other = f", or {INSTEAD_OF_NAME[command]}" if command in INSTEAD_OF_NAME else ""
        raise UserError(f"{command} needs the name of an experiment{other}")
    metrics: Sequence[str] = spec.METRICS
    if "topk" in overrides:
        topk = overrides["topk"]
        cutoffs = topk if isinstance(topk, list) else [topk]
        metrics = [f"{name}@{k}" for name in ("hit", "ndcg") for k in cutoffs]
    experiment = spec.plain_experiment(
        namespace.models, namespace.datasets or (DATASET,), seeds or (2020,), metrics
    )
    return spec.select(experiment, command=overrides, origin=ORIGIN)


def _analyze(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    for name in namespace.by:
        if name not in ANALYSES:
            raise UserError(f"--by={name} is not one of {', '.join(ANALYSES)}")
    metrics: tuple[str, ...] = spec.METRICS
    if namespace.runs:
        _only_runs(namespace, overrides)
        runs = {run: [Path(run)] for run in namespace.runs}
        stem = _stem(namespace.runs, Path(namespace.output))
    else:
        experiment, cells, folder = _finished(namespace, overrides)
        metrics, stem = experiment.metrics, str(folder / experiment.name)
        runs = {
            f"{spec.label(cell.row, cell.swept)} on {cell.dataset}": list(row.folders.values())
            for cell, row in cells.items()
        }
    parts, rows = _tables(namespace, runs, metrics)
    text = "\n\n".join(parts)
    files.write_text(Path(f"{stem}-analysis.md"), f"{text}\n")
    files.write_text(Path(f"{stem}-analysis.csv"), as_csv(rows))
    print(f"{text}\n\ntables: {stem}-analysis.md, .csv")
    return 0


def _tables(
    namespace: argparse.Namespace, runs: Mapping[str, list[Path]], metrics: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The tables of an analysis as Markdown, and their values as rows.

    Args:
        namespace (Namespace): parsed arguments.
        runs (Mapping): label -> run folders.
        metrics (Sequence): columns.
    """
    table = Path(namespace.table) if namespace.table else None
    parts: list[str] = []
    rows: list[dict[str, Any]] = []
    for label, folders in runs.items():
        for name in namespace.by:
            try:
                tables = analysis.tables(folders, name, metrics, table)
            except UserError as error:
                if len(runs) == 1 or name != "views":
                    raise
                parts.append(str(error))  # other rows may have views
                continue
            for title, groups in tables.items():
                heading = plain(f"{label}: {title}")
                parts.append(f"**{heading}**\n\n{analysis.as_table(groups, name)}")
                rows += [
                    {"row": label, "table": title, "group": group, "measure": m, "value": value}
                    for group, values in groups.items()
                    for m, value in values.items()
                ]
    return parts, rows


def _stem(runs: Sequence[str], folder: Path) -> str:
    """Beginning of the paths of files about single runs, named after their folders."""
    name = "-".join(Path(run).name for run in runs)
    if len(name) > MAX_NAME:
        name = f"{name[:MAX_NAME]}-{digest_of({'runs': list(runs)})[:8]}"
    return str(folder / name)


def _only_runs(namespace: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Refuse options that have no effect on single runs."""
    for name in ("experiment", "models", "datasets", "seeds", "config_files"):
        if getattr(namespace, name):
            raise UserError(f"--{name} cannot be given with --runs")
    if overrides:
        raise UserError(f"{namespace.command} --runs does not know --{next(iter(overrides))}")


def _finished(
    namespace: argparse.Namespace, overrides: dict[str, Any]
) -> tuple[spec.Experiment, dict[Cell, Measured], Path]:
    """An experiment, its finished runs, and the folder of its tables and figures."""
    experiment = _experiment(namespace, overrides)
    folder = Path(namespace.output) / experiment.name
    cells = measured(execute.finished(experiment, folder / execute.LINES))
    return experiment, cells, _table_folder(namespace, overrides, experiment, folder)


def _plot(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    names = spec.figures(namespace.figures, "--figures")
    if namespace.runs:
        _only_runs(namespace, overrides)
        written = _plot_runs([Path(run) for run in namespace.runs], names, Path(namespace.output))
    else:
        experiment, cells, folder = _finished(namespace, overrides)
        experiment = spec.with_figures(experiment, names or spec.FIGURES)
        written = report.figures(experiment, cells, folder)
    for path in written:
        print(path)
    return 0


def _plot_runs(runs: list[Path], names: tuple[str, ...], folder: Path) -> list[Path]:
    """Figures of single runs, named after their folders.

    Raises:
        UserError: if a figure cannot show these runs together.
    """
    results = {str(run): read_result(run) for run in runs}
    metrics = {run: result.config["values"]["valid_metric"] for run, result in results.items()}
    metric = _shared("valid_metric", metrics).lower()
    written = []
    for name in names or ("curves", "embeddings"):
        path = Path(f"{_stem(list(results), folder)}-{name}")
        if name == "curves":
            logs = {run: [json.loads((Path(run) / RESULT).read_text())["log"]] for run in results}
            written += plots.curves(logs, metric, path)
        elif name == "cost":
            points = {}
            for run, result in results.items():
                if not result.test:
                    raise UserError(f"{run} was not tested")
                points[run] = [(report.seconds(asdict(result)), kept(result.test)[metric])]
            protocol = _shared("protocol", {run: next(iter(r.test)) for run, r in results.items()})
            written += plots.cost(points, f"{metric}, {protocol}", path)
        else:
            _shared("dataset", {run: result.config["dataset"] for run, result in results.items()})
            tables = {run: sequences(Path(run)) for run in results}
            users = next(iter(tables.values())).sample(report.N_USERS, seed=0)
            written += plots.embeddings(tables, users, path)
    return written


def _shared(key: str, values: Mapping[str, str]) -> str:
    """The value that all runs share.

    Raises:
        UserError: if they differ.
    """
    (run, value), *others = values.items()
    for other, other_value in others:
        if other_value != value:
            raise UserError(
                f"{run} has {key}={value}, {other} has {other_value}: plot them separately"
            )
    return value
