"""Single runs that are finished, as the rows of one table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from recbole_simdiff.config.keys import naming
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import PROTOCOLS
from recbole_simdiff.evaluation.rankings import RANKS
from recbole_simdiff.experiments.checks import TESTED_ROWS
from recbole_simdiff.experiments.results import Cell, Measured
from recbole_simdiff.experiments.spec import METRICS, Experiment
from recbole_simdiff.experiments.tables import setting
from recbole_simdiff.runs.identity import digest_of
from recbole_simdiff.runs.result import RunResult, read_result


class Collected(NamedTuple):
    """Runs in the form of an experiment.

    Attributes:
        experiment (Experiment): has their rows, data sets, seeds and metrics.
        cells (dict): the runs by row and data set.
        configs (dict): data set -> values of the runs there.
        unranked (list): folders without rankings; significance needs those of all runs.
    """

    experiment: Experiment
    cells: dict[Cell, Measured]
    configs: dict[str, list[Mapping[str, Any]]]
    unranked: list[Path]


def collect(folders: Sequence[Path], reference: str | None = None) -> Collected:
    """Runs with the same settings but the seed become one row.

    A row is called after its model; where one model has several settings on a data set, also after
    what differs.

    Args:
        folders (Sequence): run folders.
        reference (str | None): the row that others are compared with; the first by default.

    Raises:
        UserError: if a run is not finished or not tested, two have the same settings and seed, or
            runs on one data set were tested on different rows.
    """
    results = {folder: _tested(folder) for folder in folders}
    _check_same_rows(results)
    groups: dict[str, dict[Path, RunResult]] = {}
    for folder, result in results.items():
        groups.setdefault(_settings(result), {})[folder] = result
    cells: dict[Cell, Measured] = {}
    for label, group in zip(_labels(groups), groups.values(), strict=True):
        cell = Cell(label, next(iter(group.values())).config["dataset"], None)
        cells[cell] = _measured(group)
    rows: dict[str, dict[str, Any]] = {cell.row: {} for cell in cells}
    if reference and reference not in rows:
        raise UserError(f"--reference={reference} is not one of the rows {'; '.join(rows)}")
    configs: dict[str, list[Mapping[str, Any]]] = {}
    for result in results.values():
        configs.setdefault(result.config["dataset"], []).append(result.config["values"])
    experiment = Experiment(
        name="collected",
        kind="benchmark",
        title=", ".join(rows),
        datasets=tuple(configs),
        seeds=tuple(dict.fromkeys(r.config["values"]["seed"] for r in results.values())),
        rows=rows,
        reference=reference or next(iter(rows)),
        metrics=_metrics(list(results.values())),
    )
    unranked = [folder for folder in folders if not (folder / RANKS).is_file()]
    return Collected(experiment, cells, configs, unranked)


def _tested(folder: Path) -> RunResult:
    result = read_result(folder)
    if not set(PROTOCOLS) <= result.test.keys():
        found = ", ".join(result.test) or "nothing"
        raise UserError(
            f"{folder} was tested on {found}; a table needs {' and '.join(PROTOCOLS)}, all items "
            "ranked"
        )
    return result


def _check_same_rows(results: Mapping[Path, RunResult]) -> None:
    """Refuse runs on one data set that were tested on different rows."""
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder, result in results.items():
        values = result.config["values"]
        tested = {key: values[key] for key in TESTED_ROWS if key in values}
        tested |= {key: result.statistics[key] for key in ("users", "items", "actions")}
        other, expected = first.setdefault(result.config["dataset"], (folder, tested))
        for key, value in tested.items():
            if key in expected and value != expected[key]:
                raise UserError(
                    f"{other} has {key}={expected[key]}, {folder} has {key}={value}; their metrics "
                    "cannot be compared"
                )


def _settings(result: RunResult) -> str:
    """Name of the settings of a run but its seed."""
    plain = naming(result.config)
    return digest_of({**plain, "values": plain["values"] | {"seed": None}})


def _labels(groups: Mapping[str, Mapping[Path, RunResult]]) -> list[str]:
    """A label for each group of runs."""
    configs = [naming(next(iter(group.values())).config) for group in groups.values()]
    labels = []
    for config in configs:
        same = [c for c in configs if all(c[key] == config[key] for key in ("model", "dataset"))]
        keys = dict.fromkeys(key for c in same for key in c["values"] if key != "seed")
        values = {key: [c["values"].get(key) for c in same] for key in keys}
        differing = [key for key, found in values.items() if any(v != found[0] for v in found)]
        shown = [setting(key, config["values"].get(key)) for key in differing]
        labels.append(", ".join([config["model"], *shown]).replace("|", "/"))
    return labels


def _measured(group: Mapping[Path, RunResult]) -> Measured:
    folders: dict[int, Path] = {}
    for folder, result in group.items():
        seed = result.config["values"]["seed"]
        if seed in folders:
            raise UserError(f"{folders[seed]} and {folder} have the same settings and seed={seed}")
        folders[seed] = folder
    return Measured({seed: asdict(group[folder]) for seed, folder in folders.items()}, folders)


def _metrics(results: Sequence[RunResult]) -> tuple[str, ...]:
    """Columns that all runs have: the usual ones, or else any."""
    common = set.intersection(*(set(result.test[PROTOCOLS[0]]) for result in results))
    usual = tuple(metric for metric in METRICS if metric in common)
    first = results[0].test[PROTOCOLS[0]]
    ranked = [m for m in first if m in common and m.startswith(("hit@", "ndcg@"))]
    if not usual and not ranked:
        raise UserError("the runs have no Hit or NDCG of the same cutoff; give all the same topk")
    return usual or tuple(ranked)
