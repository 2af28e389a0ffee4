"""Checks of a search before its first trial: engine, keys of the space, values of the space."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_simdiff.config.config import Config
from recbole_simdiff.config.keys import NOT_IN_RESULT
from recbole_simdiff.errors import UserError
from recbole_simdiff.log import logger
from recbole_simdiff.tuning.engines import ENGINES
from recbole_simdiff.tuning.space import Dimension
from recbole_simdiff.tuning.trials import Search, import_engine

ATTEMPTS = 20  # random combinations tried before a value counts as impossible


def check_engine(
    engine: str, algo: str | None, trials: int, jobs: int, storage: str | None
) -> None:
    """Refuse an engine, or options, that cannot be used.

    Args:
        engine, algo, trials, jobs, storage: see ``search.new_search``.

    Raises:
        UserError: naming the option, its value and what is allowed.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine={engine} is not one of {', '.join(ENGINES)}")
    chosen, default = ENGINES[engine], next(iter(ENGINES.values()))
    if algo is not None and algo not in chosen.algorithms:
        hint = "" if chosen is default else f"; {default.name} has {', '.join(default.algorithms)}"
        raise UserError(f"--algo={algo}: engine {engine} has {', '.join(chosen.algorithms)}{hint}")
    for key, number in (("trials", trials), ("jobs", jobs)):
        if number < 1:
            raise UserError(f"--{key}={number} must be at least 1")
    if jobs > 1 and not chosen.parallel:
        raise UserError(
            f"--jobs={jobs}: RecBole's HyperTuning makes one trial after another; use "
            "--engine=optuna"
        )
    if storage is not None and not chosen.storage:
        raise UserError(
            f"--storage is an option of Optuna; engine {engine} continues from the trials' folders"
        )
    import_engine(engine)


def searched(
    config: Config, space: Sequence[Dimension], settings: Mapping[str, Any]
) -> tuple[Dimension, ...]:
    """The parameters to search: those of the space that ``settings`` does not fix.

    Args:
        config, space, settings: see ``search.new_search``.

    Raises:
        UserError: if none is left, or a key must not be searched.
    """
    for dimension in space:
        if dimension.key in settings:
            logger.info(f"{dimension.key}={settings[dimension.key]!r} is given and not searched")
        _check_comparable(config, dimension)
    free = tuple(dimension for dimension in space if dimension.key not in settings)
    if not free:
        raise UserError("there is nothing to search: every parameter is given")
    return free


def _check_comparable(config: Config, dimension: Dimension) -> None:
    """Refuse keys that change how a score is measured, or that do not change it at all."""
    key = dimension.key
    groups = ("General", "Evaluation", "Dataset")
    measured = {name for group in groups for name in config.parameters[group]}
    if key in (measured | NOT_IN_RESULT) - {"MAX_ITEM_LIST_LENGTH"}:
        raise UserError(
            f"{dimension.source}: {key} cannot be searched: it belongs to data, evaluation or "
            "machine, and scores under its values cannot be compared"
        )


def check_values(search: Search) -> None:
    """Refuse unknown keys, and values that are impossible with all values of the other parameters.

    The parameters are first tried all together, so that a correct space needs few configurations.

    Raises:
        UserError: naming file and line of the parameter.
    """
    probes = {dimension.key: dimension.probes() for dimension in search.space}
    for i in range(max(map(len, probes.values()))):
        setting = {key: values[i % len(values)] for key, values in probes.items()}
        if _problem(search, setting):
            for dimension in search.space:
                _check_value(search, dimension, setting[dimension.key], probes)


def _check_value(
    search: Search, dimension: Dimension, value: Any, probes: Mapping[str, Sequence[Any]]
) -> None:
    problem = _problem(search, {dimension.key: value})
    generator = random.Random(0)
    for _ in range(ATTEMPTS if problem else 0):
        others = {key: generator.choice(values) for key, values in probes.items()}
        if not _problem(search, {**others, dimension.key: value}):
            return
    if problem:
        raise UserError(f"{dimension.source}: {problem}")


def _problem(search: Search, values: Mapping[str, Any]) -> str:
    """Why the configuration of a setting is impossible; empty if it is possible."""
    try:
        search.config(values)
    except UserError as error:
        return str(error)
    return ""
