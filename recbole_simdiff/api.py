"""The Python interface: the same functions for every model and every pipeline.

What takes a second to import (scipy, matplotlib, the engines of searches) is imported by the
functions that need it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.keys import NOT_IN_RESULT
from recbole_simdiff.config.layers import plain_value, read_yaml
from recbole_simdiff.data.frames import write_frame
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import kept
from recbole_simdiff.models import own
from recbole_simdiff.models.registry import accept, get_model
from recbole_simdiff.pipelines.start import start
from recbole_simdiff.runs.identity import digest_of
from recbole_simdiff.runs.restore import resumed_config
from recbole_simdiff.runs.result import RunResult

Files = Sequence[str | Path]


def run(
    model: str | type,
    dataset: str | pd.DataFrame,
    config_files: Files = (),
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    **values: Any,
) -> RunResult:
    """Train a model on a data set, select on validation, test once, save.

    Args:
        model (str | type): name of a model of this package, of RecBole or of an installed package,
            or DiffuASR; of your own, the class or ``FILE.py:CLASS``.
        dataset (str | DataFrame): name of the data set; or interactions, which are written to the
            folder ``data_path`` as a data set that is named after its content.
        config_files (Sequence): YAML files, later ones override earlier ones.
        user, item, time (str | None): columns of a DataFrame; by default user_id, item_id and
            timestamp. Times are numbers or dates.
        **values: settings that override every file, as ``--key=value`` on the command line.

    Returns:
        RunResult: also written to ``result.json`` in the run's folder.

    Raises:
        UserError: if data or settings cannot be used.
        ConnectionError: if a tracked run cannot be opened.
        TrainingDiverged: if a loss becomes NaN or infinite.
        OutOfMemory: if memory runs out.
        Interrupted: after a signal; the state is saved.
    """
    name, values = _data_set(dataset, (user, item, time), values, config_files)
    return start(Config(model, name, config_files, values))


def resume(
    location: str | Path, model: str | Path | type | None = None, **values: Any
) -> RunResult:
    """Continue a stopped run from its next training step.

    Args:
        location (str | Path): a run folder, or its ``last`` checkpoint.
        model (str | Path | type | None): of a run of your own model, its class or its ``FILE.py``.
        **values: settings that may change: how long it is trained, where its data are, and what is
            shown.

    Returns:
        RunResult: see ``run``.

    Raises:
        UserError: if the checkpoint cannot be used, or a key may not be given; and as ``run``.
    """
    accept(model)
    path = checkpoint.resolve(location, LAST)
    return start(resumed_config(path, values), path)


def run_recbole(
    model: str | type | None = None,
    dataset: str | pd.DataFrame | None = None,
    config_file_list: Files | None = None,
    config_dict: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``run`` with the arguments and the result of RecBole's function of that name.

    Args:
        model (str | type | None): see ``run``; by default the ``model`` of files or values.
        dataset (str | DataFrame | None): see ``run``; by default the ``dataset`` of them.
        config_file_list (Sequence | None): YAML files; later ones override earlier ones.
        config_dict (Mapping | None): values that override every file.

    Returns:
        dict: ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result`` and
        ``test_result``, unrounded and under RecBole's protocol, in which the items of the history
        stay in the ranking; and ``result``, the ``RunResult``.

    Raises:
        UserError: if no model or data set is named; and as ``run``.
    """
    values, files = dict(config_dict or {}), tuple(config_file_list or ())
    named: dict[str, Any] = {}
    for content in (*map(read_yaml, files), values):
        named |= {key: content[key] for key in ("model", "dataset") if key in content}
    model = named.get("model") if model is None else model
    dataset = named.get("dataset") if dataset is None else dataset
    if model is None or dataset is None:
        raise UserError("run_recbole needs model and dataset, as arguments or in config_dict")
    result = run(model, dataset, files, **values)
    valid = kept(result.valid) if result.valid else {}
    settings = result.config["values"]
    return {
        "best_valid_score": valid.get(settings["valid_metric"].lower()),
        "valid_score_bigger": settings["valid_metric_bigger"],
        "best_valid_result": valid,
        "test_result": kept(result.test) if result.test else {},
        "result": result,
    }


def benchmark(
    models: Sequence[str | type],
    datasets: str | pd.DataFrame | Sequence[str],
    seeds: Sequence[int] = (2020,),
    config_files: Files = (),
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    jobs: int = 1,
    output: str | Path = "results",
    **values: Any,
) -> pd.DataFrame:
    """Train models on data sets with several seeds, each run in a process of its own.

    Runs that are finished are not repeated, and interrupted ones go on. Tables with means,
    deviations and tests of significance are in ``OUTPUT/benchmark-MODEL-.../``.

    Args:
        models (Sequence): see ``run``; your own must be in a file.
        datasets (str | DataFrame | Sequence): names of data sets, or one DataFrame.
        seeds (Sequence): of everything random.
        config_files (Sequence): YAML files of settings for all runs, later ones win.
        user, item, time (str | None): columns of a DataFrame, see ``run``.
        jobs (int): runs at the same time.
        output (str | Path): folder of results.
        **values: settings for all runs, over every file.

    Returns:
        DataFrame: see ``results.to_frame``.

    Raises:
        UserError: for the first mistake, before anything is trained.
        Interrupted: after a signal; the same call continues.
    """
    from recbole_simdiff.experiments import execute, report, results, spec

    if jobs < 1:
        raise UserError(f"jobs={jobs} must be at least 1")
    models = [models] if isinstance(models, str | type) else models
    if isinstance(datasets, str | pd.DataFrame):
        name, values = _data_set(datasets, (user, item, time), values, config_files)
        datasets = [name]
    given = _given(values, config_files)
    cutoffs = given.get("topk", [5, 10])
    cutoffs = cutoffs if isinstance(cutoffs, list) else [cutoffs]
    experiment = spec.plain_experiment(
        [_reference(model) for model in models],
        datasets,
        spec.seeds([plain_value(seed) for seed in seeds], "benchmark"),
        [f"{metric}@{k}" for metric in ("hit", "ndcg") for k in cutoffs],
    )
    experiment = spec.select(experiment, command=given)
    planned, folder = execute.plan(experiment), Path(output) / experiment.name
    execute.execute(planned, folder / execute.LINES, jobs)
    collected = execute.collect(planned, folder / execute.LINES)
    if given.keys() - NOT_IN_RESULT:
        folder /= f"part-{digest_of({'spec': repr(experiment)})[:8]}"
    report.report(experiment, collected, len(planned), folder)
    return results.frame(line for _, line in collected)


class Tuned(NamedTuple):
    """What a search found.

    Attributes:
        values (dict): the best setting.
        result (RunResult): of the best setting, tested once, after the search.
        trials (DataFrame): a row a trial, as in ``trials.csv``.
        folder (Path): holds ``trials.csv`` and ``best.yaml``.
    """

    values: dict[str, Any]
    result: RunResult
    trials: pd.DataFrame
    folder: Path


def tune(
    model: str | type,
    dataset: str | pd.DataFrame,
    space: str | Path | None = None,
    config_files: Files = (),
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    engine: str = "optuna",
    algo: str | None = None,
    trials: int = 50,
    jobs: int = 1,
    pruning: bool = True,
    storage: str | None = None,
    output: str | Path = "results",
    **values: Any,
) -> Tuned:
    """Search for the best setting of a model by its validation score, then test it once.

    Args:
        model (str | type), dataset (str | DataFrame): see ``run``.
        space (str | Path | None): a RecBole parameter file; by default the shipped one.
        config_files (Sequence): YAML files under the settings that are tried.
        user, item, time (str | None): columns of a DataFrame, see ``run``.
        engine (str): optuna, hyperopt or ray.
        algo (str | None): bayes, random or exhaustive; the engine's first by default.
        trials (int): how many.
        jobs (int): trials at the same time, each in a process of its own.
        pruning (bool): whether trials that look bad are stopped early.
        storage (str | None): URL of Optuna's database; a file in ``output`` by default.
        output (str | Path): folder of results.
        **values: settings that are fixed and not searched.

    Raises:
        UserError: if space or settings cannot be used, or no trial could be finished.
        Interrupted: after a signal; the same call continues.
    """
    from recbole_simdiff.tuning import search as searches
    from recbole_simdiff.tuning.space import find_space, read_space
    from recbole_simdiff.tuning.trials import TRIALS

    name, values = _data_set(dataset, (user, item, time), values, config_files)
    config = Config(model, name, config_files, values)
    search = searches.new_search(
        config,
        read_space(Path(space) if space else find_space(config.name)),
        [str(file) for file in config_files],
        _given(values, ()),
        engine=engine,
        algo=algo,
        trials=trials,
        jobs=jobs,
        pruning=pruning,
        storage=storage,
        output=Path(output),
    )
    best = search.ranked(searches.tune(search))[0]
    tested = searches.test_best(search, best)
    return Tuned(dict(best.values), tested, pd.read_csv(search.folder / TRIALS), search.folder)


def _given(values: Mapping[str, Any], config_files: Files) -> dict[str, Any]:
    """The settings of files, and over them the values."""
    given: dict[str, Any] = {}
    for file in config_files:
        given |= read_yaml(file)
    return given | {key: plain_value(value) for key, value in values.items()}


def _data_set(
    dataset: str | pd.DataFrame,
    columns: tuple[str | None, str | None, str | None],
    values: dict[str, Any],
    config_files: Files,
) -> tuple[str, dict[str, Any]]:
    """The name of a data set, and the settings with the place of one that is made here."""
    if isinstance(dataset, pd.DataFrame):
        folder = Path(_given(values, config_files).get("data_path", "dataset"))
        named = dict(zip(("user", "item", "time"), columns, strict=True))
        given = {key: column for key, column in named.items() if column is not None}
        return write_frame(dataset, folder, **given), {**values, "data_path": str(folder)}
    if any(column is not None for column in columns):
        raise UserError(
            f"user, item and time name columns of a DataFrame, and dataset={dataset!r} is a name; "
            "USER_ID_FIELD, ITEM_ID_FIELD and TIME_FIELD name those of its file"
        )
    return dataset, values


def _reference(model: str | type) -> str:
    """What other processes call a model."""
    if isinstance(model, str):
        return model
    found = get_model(model)
    one = own.of(found)
    return one.reference_for_others() if one else found.__name__
