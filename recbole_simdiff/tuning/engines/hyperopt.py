"""RecBole's own ``HyperTuning``, on hyperopt."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from recbole.trainer import HyperTuning

from recbole_simdiff.evaluation.protocols import kept
from recbole_simdiff.tuning.screen import Screen
from recbole_simdiff.tuning.trials import (
    DONE,
    FAILED,
    IMPOSSIBLE,
    Engine,
    Search,
    Trial,
    import_engine,
    reason,
    record,
)


def run_trials(search: Search) -> list[Trial]:
    """All trials of a search. The same command draws the same settings and trains each once."""
    objective = _Objective(search)
    tuning = HyperTuning(
        objective,
        space=_space(search),
        algo=search.algo,
        max_evals=search.trials,
        early_stop=search.trials + 1,  # by default it stops after 10 trials without a better one
    )
    logging.getLogger("hyperopt").setLevel(logging.WARNING)
    try:
        with _seeded(search.seed), contextlib.redirect_stdout(io.StringIO()):
            tuning.run()  # prints a bar and every setting
    finally:
        objective.screen.bar.close()
    return objective.trials


def _space(search: Search) -> dict[str, Any]:
    """The search space as hyperopt's objects."""
    hp = import_engine("hyperopt").hp
    ranges = {"uniform": hp.uniform, "loguniform": hp.loguniform}
    space = {}
    for d in search.space:
        if d.kind == "choice":
            space[d.key] = hp.choice(d.key, d.grid())
        elif d.kind == "quniform":
            space[d.key] = hp.quniform(d.key, d.low, d.high, d.q)
        else:
            space[d.key] = ranges[d.kind](d.key, d.low, d.high)
    return space


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within the block, HyperTuning draws from this seed; it reads one from this variable only."""
    original = os.environ.get("HYPEROPT_FMIN_SEED")
    os.environ["HYPEROPT_FMIN_SEED"] = str(seed)
    try:
        yield
    finally:
        if original is None:
            del os.environ["HYPEROPT_FMIN_SEED"]
        else:
            os.environ["HYPEROPT_FMIN_SEED"] = original


class _Objective:
    """The score of a setting in the form of ``HyperTuning``; collects the records of trials."""

    def __init__(self, search: Search) -> None:
        self.search, self.trials = search, list[Trial]()
        self.screen = Screen(search, self.trials)

    def __call__(self, drawn: Mapping[str, Any], files: Any = None) -> dict[str, Any]:
        search = self.search
        trial = self._trial(search.values(drawn))
        self.trials.append(trial)
        record(search, self.trials, trial)
        self.screen.show(self.trials)
        return {
            "model": search.model,
            "best_valid_score": search.value(trial),
            "valid_score_bigger": True,
            "best_valid_result": {search.metric: trial.score},
            "test_result": {},  # the test part is read after the search only
        }

    def _trial(self, values: Mapping[str, Any]) -> Trial:
        search, trial = self.search, Trial(len(self.trials), values, FAILED)
        try:
            config = search.config(values)
            trial = replace(trial, run=search.run_dir(config).name)
            with self.screen.quiet():
                result = search.measure(config)
            score = search.score(kept(result.valid))
            return replace(
                trial, state=DONE, score=score, epochs=result.epochs, seconds=result.seconds
            )
        except IMPOSSIBLE as error:
            return replace(trial, error=reason(error))


# RecBole's exhaustive search needs a hyperopt before 0.2.7.
ENGINE = Engine("hyperopt", ("bayes", "random"), run_trials, parallel=False)
