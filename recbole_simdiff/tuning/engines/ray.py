"""Ray Tune, on this machine or on a cluster."""

import contextlib
import importlib
import math
import os
from collections.abc import Mapping
from typing import Any

from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import kept
from recbole_simdiff.training.progress import Progress
from recbole_simdiff.tuning.space import Dimension
from recbole_simdiff.tuning.trials import (
    DONE,
    FAILED,
    MEDIAN_TRIALS,
    MEDIAN_WARMUP,
    PRUNED,
    Engine,
    Search,
    Trial,
    drop_weights,
    import_engine,
)


def run_trials(search: Search) -> list[Trial]:
    """All trials of a search, on this machine or on the cluster of ``RAY_ADDRESS``.

    Every machine of the cluster needs the package, and the data under the same path.
    """
    tune = import_engine("ray")
    schedulers = importlib.import_module("ray.tune.schedulers")
    generator = importlib.import_module("ray.tune.search.basic_variant").BasicVariantGenerator
    # By default each worker changes to a folder of its own, where relative paths do not hold.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    exhaustive = search.algo == "exhaustive"
    space = {
        d.key: tune.grid_search(d.grid()) if exhaustive else _domain(tune, d) for d in search.space
    }
    mode = "max" if search.bigger else "min"
    median = schedulers.MedianStoppingRule(
        time_attr="epochs",
        metric="score",
        mode=mode,
        grace_period=MEDIAN_WARMUP,
        min_samples_required=MEDIAN_TRIALS,
    )
    resources = {
        "cpu": max(1, (os.cpu_count() or 1) // search.jobs),
        "gpu": int(search.config({})["device"].type == "cuda"),
    }
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, search=search), resources),
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=1 if exhaustive else search.trials,
            search_alg=generator(max_concurrent=search.jobs, random_state=search.seed),
            scheduler=median if search.pruning else None,
        ),
        run_config=tune.RunConfig(name="ray", storage_path=str(search.folder), verbose=1),
    )
    trials = [_trial_of(search, number, result) for number, result in enumerate(tuner.fit())]
    for trial in trials:
        drop_weights(search, trials, trial)
    return trials


def _domain(tune: Any, dimension: Dimension) -> Any:
    low, high = dimension.low, dimension.high
    if dimension.kind == "choice":
        return tune.choice(list(dimension.texts))
    if dimension.kind == "quniform":
        return tune.quniform(low, high, dimension.q)
    if dimension.kind == "loguniform":
        return tune.loguniform(math.exp(low), math.exp(high))
    return tune.uniform(low, high)


def _trial(drawn: Mapping[str, Any], search: Search) -> None:
    """Train a setting in a worker of Ray, and report after each validation."""
    tune = import_engine("ray")

    def report(progress: Progress) -> None:
        score = search.score(progress.log[-1]["valid"])
        tune.report({"score": score, "epochs": len(progress.log), "seconds": progress.seconds})

    config = search.config(search.values(drawn))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        result = search.measure(config, report)
    score = search.score(kept(result.valid))
    tune.report(
        {"score": score, "finished": True, "epochs": result.epochs, "seconds": result.seconds}
    )


def _trial_of(search: Search, number: int, result: Any) -> Trial:
    """The record of a trial from Ray's result."""
    values, metrics = search.values(result.config), result.metrics or {}
    try:
        name = search.run_dir(search.config(values)).name
    except UserError:
        name = ""
    state = DONE if metrics.get("finished") else FAILED if result.error else PRUNED
    return Trial(
        number,
        values,
        state,
        None if state == FAILED else metrics.get("score"),
        metrics.get("epochs", 0),
        metrics.get("seconds", 0.0),
        name,
        str(result.error).strip().splitlines()[-1] if state == FAILED else "",
    )


ENGINE = Engine("ray", ("random", "exhaustive"), run_trials)
