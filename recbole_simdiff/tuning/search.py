"""Search for the best setting of a model, by its validation score.

A trial is an ordinary run without a test. Its folder is named after everything that shapes its
result. So a setting that is drawn twice is trained once, and an interrupted trial continues from
its next step. The best setting is tested after the search, with the weights of its trial.
"""

import json
import os
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
from recbole_simdiff.data.item_vectors import SUFFIXES
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.evaluation.protocols import KEPT, protocol_name
from recbole_simdiff.experiments.execute import data_checksum
from recbole_simdiff.files import write_text
from recbole_simdiff.runs.result import RunResult, aligned, versions
from recbole_simdiff.tuning.checks import check_engine, check_values, searched
from recbole_simdiff.tuning.engines import ENGINES
from recbole_simdiff.tuning.space import Dimension
from recbole_simdiff.tuning.trials import (
    DONE,
    FAILED,
    PRUNED,
    STUDY,
    Search,
    Trial,
    shortened,
    write_trials,
)

BEST_SETTING = "best.yaml"

SHOWN_TRIALS = 5


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
    """A search. Everything is checked that can be checked before training.

    Args:
        config (Config): of files and settings, without a trial's values.
        space (Sequence): parameters to search; those that ``settings`` fixes are left out.
        files (Sequence): configuration files; settings and trials override them.
        settings (Mapping | None): values that override the files, the same for all trials.
        engine (str): one of ``ENGINES``.
        algo (str | None): one of its algorithms; the first by default.
        trials (int): number of trials; an exhaustive search makes one for each combination.
        jobs (int): trials at the same time.
        pruning (bool): whether bad trials are stopped early.
        storage (str | None): URL of Optuna's database; a file in the output folder by default.
        output (Path): folder of results.

    Raises:
        UserError: for the first mistake.
    """
    settings = dict(settings or {})
    check_engine(engine, algo, trials, jobs, storage)
    space = searched(config, space, settings)
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
    return _checked(search, config)


def _checked(search: Search, config: Config) -> Search:
    """The search with its final number of trials, once its values and its data are checked.

    Raises:
        UserError: for an impossible value, or data without a validation part.
    """
    if search.algo == "exhaustive":
        search = replace(search, trials=len(search.grid()))
    check_values(search)
    _, valid_data, _ = create_loaders(config, create_dataset(config))
    if not valid_data:
        raise UserError(f"eval_args={config['eval_args']}: a search needs a validation part")
    return search


def _absolute_paths(config: Config) -> dict[str, str]:
    """Absolute paths of the configuration: Ray starts its workers in other folders."""
    paths = {"data_path": config.data_root}
    optional = (
        "augmentation_cache",
        "baseline_checkpoint",
        "item_table",
        "init_from",
        "epochs_from",
    )
    paths |= {key: config[key] for key in optional if key in config}
    if str(config["item_vectors"]).endswith(SUFFIXES):  # else it names a column
        paths["item_vectors"] = config["item_vectors"]
    return {key: os.path.abspath(path) for key, path in paths.items() if path is not None}


def _own_backbone(config: Config) -> dict[str, str]:
    """Of a method around a model of the user's own, where workers find that."""
    return (
        {"backbone": portable(config)["values"]["backbone"]} if config.wraps and config.own else {}
    )


def tune(search: Search) -> list[Trial]:
    """Make all trials of a search. Trials of an earlier start are not repeated.

    Args:
        search (Search): what ``new_search`` returned.

    Returns:
        list: all trials, in order.

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
    """Test the best setting after the search.

    The weights of its trial are tested. If they are on another machine, it is trained again.

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
    """Write the best setting, and all values given for the search, as a configuration file."""
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


def summary(search: Search, trials: Sequence[Trial]) -> str:
    """The best trials as a table, and the options that use the best one.

    Args:
        search (Search): the search.
        trials (Sequence): all of its trials; the best ``SHOWN_TRIALS`` are shown.
    """
    rows = [["trial", search.metric, "epochs", *(d.key for d in search.space)]]
    for trial in search.ranked(trials)[:SHOWN_TRIALS]:
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
