"""Search for the best setting of a model, by its validation score.

A trial is an ordinary run that ends before its test; its folder is named after everything that
shapes it, so a setting drawn twice is trained once and an interrupted trial goes on to the step.
When the search is over, and only then, the best setting is tested, with the weights it has.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recbole_simdiff.config.config import Config
from recbole_simdiff.config.keys import NOT_IN_RESULT
from recbole_simdiff.config.layers import read_yaml
from recbole_simdiff.config.lookup import portable
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.evaluation.protocols import KEPT, protocol_name
from recbole_simdiff.experiments.execute import data_checksum
from recbole_simdiff.log import logger
from recbole_simdiff.runs.result import RunResult, aligned, versions
from recbole_simdiff.tuning.engines import hyperopt, optuna, ray
from recbole_simdiff.tuning.space import Dimension
from recbole_simdiff.tuning.trials import (
    DONE,
    FAILED,
    PRUNED,
    STUDY,
    Search,
    Trial,
    import_engine,
    shortened,
    write_text,
    write_trials,
)

ENGINES = {module.ENGINE.name: module.ENGINE for module in (optuna, hyperopt, ray)}

BEST_SETTING = "best.yaml"


def new_search(
    config: Config,
    space: Sequence[Dimension],
    files: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    engine: str = "optuna",
    algo: str | None = None,
    trials: int = 50,
    jobs: int = 1,
    pruning: bool = True,
    storage: str | None = None,
    output: Path = Path("results"),
) -> Search:
    """A search with everything checked that can be before training.

    Args:
        config (Config): of files and settings, without a trial's values.
        space (Sequence): what to search. A parameter that ``settings`` fixes is left out.
        files (Sequence): configuration files under the setting.
        settings (Mapping | None): values over the files.
        engine (str): one of ``ENGINES``.
        algo (str | None): one of its algorithms; the first by default.
        trials (int): how many; an exhaustive search has as many as there are combinations.
        jobs (int): trials at the same time.
        pruning (bool): whether bad trials are stopped early.
        storage (str | None): URL of Optuna's data base; a file in the output folder by default.
        output (Path): folder of results.

    Raises:
        UserError: for the first mistake.
    """
    settings = dict(settings or {})
    _check_engine(engine, algo, trials, jobs, storage)
    space = _free(config, space, settings)
    # Trials in this process find what was typed into it.
    typed = config.own is not None and not config.own.reference and not config.wraps
    alone = typed and jobs == 1 and engine != "ray"
    folder = (output / f"tune-{config.name}-{config['dataset']}").absolute()
    search = Search(
        model=config.name,
        reference=config.name if alone else portable(config)["model"],
        dataset=config["dataset"],
        files=tuple(os.path.abspath(file) for file in files),
        settings=settings | _absolute_paths(config) | _own_backbone(config),
        space=space,
        engine=engine,
        algo=algo or ENGINES[engine].algorithms[0],
        trials=trials,
        jobs=jobs,
        pruning=pruning,
        storage=storage or f"sqlite:///{folder / STUDY}",
        folder=folder,
        data=data_checksum(config),
        metric=config["valid_metric"].lower(),
        protocol=protocol_name(KEPT, config["eval_args"]["mode"]["valid"]),
        bigger=config["valid_metric_bigger"],
        seed=config["seed"],
    )
    if search.algo == "exhaustive":
        search = replace(search, trials=len(search.grid()))
    _check_values(search)
    _, valid_data, _ = create_loaders(config, create_dataset(config))
    if not valid_data:
        raise UserError(f"eval_args={config['eval_args']}: a search needs a validation part")
    return search


def _free(
    config: Config, space: Sequence[Dimension], settings: Mapping[str, Any]
) -> tuple[Dimension, ...]:
    """What is left to search where ``settings`` fixes some of it."""
    for dimension in space:
        if dimension.key in settings:
            logger.info(f"{dimension.key}={settings[dimension.key]!r} is given and not searched")
        _check_comparable(config, dimension)
    free = tuple(dimension for dimension in space if dimension.key not in settings)
    if not free:
        raise UserError("there is nothing to search: every parameter is given")
    return free


def _absolute_paths(config: Config) -> dict[str, str]:
    """Paths of the configuration as workers find them, which Ray starts in other folders."""
    paths = {"data_path": config.data_root}
    own = ("augmentation_cache", "baseline_checkpoint")
    paths |= {key: config[key] for key in own if key in config}
    return {key: os.path.abspath(path) for key, path in paths.items() if path is not None}


def _own_backbone(config: Config) -> dict[str, str]:
    """Of a method around a model of the user's own, where workers find that."""
    return (
        {"backbone": portable(config)["values"]["backbone"]} if config.wraps and config.own else {}
    )


def _check_engine(
    engine: str, algo: str | None, trials: int, jobs: int, storage: str | None
) -> None:
    if engine not in ENGINES:
        raise UserError(f"--engine={engine} is not one of {', '.join(ENGINES)}")
    chosen, first = ENGINES[engine], optuna.ENGINE
    if algo is not None and algo not in chosen.algorithms:
        other = "" if chosen is first else f"; {first.name} has {', '.join(first.algorithms)}"
        raise UserError(f"--algo={algo}: engine {engine} has {', '.join(chosen.algorithms)}{other}")
    for key, number in (("trials", trials), ("jobs", jobs)):
        if number < 1:
            raise UserError(f"--{key}={number} must be at least 1")
    if jobs > 1 and not chosen.parallel:
        raise UserError(
            f"--jobs={jobs}: RecBole's HyperTuning makes one trial after another; use "
            "--engine=optuna"
        )
    if storage is not None and not chosen.storage:
        raise UserError(f"--storage is Optuna's; engine {engine} goes on from the trials' folders")
    import_engine(engine)


def _check_comparable(config: Config, dimension: Dimension) -> None:
    """Refuse keys that change what is measured, or nothing."""
    key = dimension.key
    groups = ("General", "Evaluation", "Dataset")
    measured = {name for group in groups for name in config.parameters[group]}
    if key in (measured | NOT_IN_RESULT) - {"MAX_ITEM_LIST_LENGTH"}:
        raise UserError(
            f"{dimension.place}: {key} cannot be searched: it belongs to data, evaluation or "
            "machine, and scores under its values cannot be compared"
        )


def _check_values(search: Search) -> None:
    """Refuse a key that is unknown or a value that fits no setting of the others.

    First all keys at once, so that a sound space costs a few configurations only.
    """
    probes = {dimension.key: dimension.probes() for dimension in search.space}
    for i in range(max(map(len, probes.values()))):
        setting = {key: values[i % len(values)] for key, values in probes.items()}
        if _fault(search, setting):
            for dimension in search.space:
                _check_value(search, dimension, setting[dimension.key], probes)


def _check_value(
    search: Search, dimension: Dimension, value: Any, probes: Mapping[str, Sequence[Any]]
) -> None:
    fault = _fault(search, {dimension.key: value})
    draw = random.Random(0)
    for _ in range(20 if fault else 0):
        others = {key: draw.choice(values) for key, values in probes.items()}
        if not _fault(search, {**others, dimension.key: value}):
            return
    if fault:
        raise UserError(f"{dimension.place}: {fault}")


def _fault(search: Search, values: Mapping[str, Any]) -> str:
    try:
        search.config(values)
    except UserError as error:
        return str(error)
    return ""


def tune(search: Search) -> list[Trial]:
    """All trials of a search, in order; those of an earlier start of the same one are not repeated.

    Args:
        search (Search): what ``new_search`` returned.

    Raises:
        UserError: if no trial could be finished, or the storage holds another search.
        Interrupted: after a signal; the same command continues.
    """
    try:
        trials = ENGINES[search.engine].run(search)
    except Interrupted as stop:
        stop.same_command = True
        raise
    write_trials(search, trials)
    ranked = search.ranked(trials)
    if not ranked:
        reasons = Counter(trial.error for trial in trials).most_common(1)
        raise UserError(
            f"none of {len(trials)} trials could be finished"
            + "".join(f"; {n} failed with {reason}" for reason, n in reasons)
        )
    _write_best(search, trials)
    return trials


def test_best(search: Search, best: Trial) -> RunResult:
    """The test of the best setting, after the search: of the weights it has, or trained again where
    they are on another machine.

    Args:
        search (Search): the search.
        best (Trial): its best trial.

    Raises:
        Interrupted: after a signal; the same command continues.
    """
    try:
        return search.measure(search.config(best.values), test=True)
    except Interrupted as stop:
        stop.same_command = True
        raise


def _write_best(search: Search, trials: Sequence[Trial]) -> None:
    """The best setting, with all that was given for the search, as a configuration file."""
    best = search.ranked(trials)[0]
    config = search.config(best.values)
    given = {key for file in search.files for key in read_yaml(file)} | search.settings.keys()
    given -= NOT_IN_RESULT | best.values.keys() | {"model", "dataset"}
    counts = Counter(trial.state for trial in trials)
    path = search.folder / BEST_SETTING
    lines = [
        f"# The best of {len(trials)} trials of {search} "
        f"({', '.join(f'{counts[state]} {state}' for state in (DONE, PRUNED, FAILED))}).",
        f"# {search.metric} {best.score!r}: validation, {search.protocol}, best epoch of trial "
        f"{best.number}.",
        f"# Engine {search.engine}, {search.algo}, seed {search.seed}; recbole_simdiff "
        f"{versions()['recbole_simdiff']}.",
        *(f"{key}: {json.dumps(config[key])}" for key in best.values),
        *(["# given for the whole search"] if given else []),
        *(f"{key}: {json.dumps(config[key])}" for key in sorted(given)),
    ]
    write_text(path, "\n".join(lines) + "\n")


def summary(search: Search, trials: Sequence[Trial], first: int = 5) -> str:
    """The best trials as a table, and how to use the best one.

    Args:
        search (Search): the search.
        trials (Sequence): all of its trials.
        first (int): how many to show.
    """
    rows = [["trial", search.metric, "epochs", *(d.key for d in search.space)]]
    for trial in search.ranked(trials)[:first]:
        values = (shortened(trial.values[d.key]) for d in search.space)
        rows.append([str(trial.number), f"{trial.score:.5f}", str(trial.epochs), *values])
    counts = Counter(trial.state for trial in trials)
    path = os.path.relpath(search.folder / BEST_SETTING)
    return (
        f"{search}: {counts[DONE]} trials {DONE}, {counts[PRUNED]} {PRUNED}, {counts[FAILED]} "
        f"{FAILED}; validation, {search.protocol}\n{aligned(rows, 1)}\n\n"
        f"best setting: {path}\n"
        f"use it with: --model={search.reference} --dataset={search.dataset} --config_files={path}"
    )
