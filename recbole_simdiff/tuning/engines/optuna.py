"""Optuna: trials in a database that several processes or machines may share.

A search can be resumed, and bad trials are stopped early.
"""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recbole_simdiff import files
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.evaluation.protocols import kept
from recbole_simdiff.log import logger, terminal
from recbole_simdiff.runs.identity import contents, source_checksum
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.training.progress import Progress
from recbole_simdiff.tuning.screen import Screen
from recbole_simdiff.tuning.space import Dimension
from recbole_simdiff.tuning.trials import (
    DONE,
    FAILED,
    IMPOSSIBLE,
    MEDIAN_TRIALS,
    MEDIAN_WARMUP,
    PRUNED,
    STUDY,
    Engine,
    Search,
    Trial,
    drop_weights,
    import_engine,
    reason,
    write_trials,
)

# Seconds between heartbeats of a trial, and without one until another process repeats the trial.
HEARTBEAT, SILENCE = 30, 120

RETRIES = 2  # of a trial whose process ended


def run_trials(search: Search) -> list[Trial]:
    """All trials of a search; see ``trials.Engine``."""
    search.folder.mkdir(parents=True, exist_ok=True)
    study = _open_study(search)
    if search.algo == "exhaustive":
        with files.exclusive(search.folder / STUDY):
            for draws in search.grid():
                study.enqueue_trial(draws, skip_if_exists=True)
    screen = Screen(search, _recorded(search, study))
    logger.info(f"{search.folder}: {len(screen.shown)} of {search.trials} trials are finished")
    try:
        if search.jobs > 1:
            _supervise(search, study, screen)
        else:
            _make_trials(search, study, screen)
    finally:
        screen.bar.close()
    return _recorded(search, study)


def _open_study(search: Search) -> Any:
    """The study of a search in its storage; created if it does not exist.

    Raises:
        UserError: if the storage cannot be used, or holds another search under the same name.
    """
    optuna = import_engine("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    from recbole_simdiff.tuning.engines.storage import open_storage  # which imports optuna

    try:
        with files.exclusive(search.folder / STUDY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that heartbeats are experimental
            study = optuna.create_study(
                storage=open_storage(search.storage, HEARTBEAT, SILENCE, RETRIES),
                study_name=f"{search.model}-{search.dataset}",
                direction="maximize" if search.bigger else "minimize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(MEDIAN_TRIALS, MEDIAN_WARMUP)
                if search.pruning
                else optuna.pruners.NopPruner(),
            )
    except (ConnectionError, Interrupted, UserError):
        raise
    except Exception as error:  # of SQLAlchemy, of its driver, of the system
        raise UserError(f"--storage cannot be used: {reason(error)}") from None
    _check_same_search(search, study)
    return study


def _check_same_search(search: Search, study: Any) -> None:
    """Refuse a study of another search; a study without trials is taken over."""
    current = _identity(search)
    stored = study.user_attrs.get("made_with")
    if stored is None or not study.get_trials(deepcopy=False):
        study.set_user_attr("made_with", current)
        return
    for key in current.keys() | stored.keys():
        if current.get(key) != stored.get(key):
            raise UserError(
                f"the study in {search.folder if STUDY in search.storage else 'the storage'} was "
                f"made with {key}={stored.get(key)!r}, and now it is {current.get(key)!r}: scores "
                "cannot be compared. Give another --output (and --storage), or delete it"
            )


def _identity(search: Search) -> dict[str, Any]:
    """Everything that all trials of a study share, in the form in which JSON stores it."""
    config = search.config({})
    values = config.identity()["values"]
    searched = {dimension.key: f"search over {dimension}" for dimension in search.space}
    shared = {k: v for k, v in values.items() if k not in searched}
    shared |= searched | {"data": search.data, "code of recbole_simdiff": source_checksum()}
    shared |= {f"content of {name}": found for name, found in contents(config).items()}
    identity: dict[str, Any] = json.loads(json.dumps(shared, default=str))
    return identity


def _recorded(search: Search, study: Any) -> list[Trial]:
    """The trials of a study that have ended."""
    names = {"COMPLETE": DONE, "PRUNED": PRUNED, "FAIL": FAILED}
    trials = []
    for stored in study.get_trials(deepcopy=False):
        notes = stored.user_attrs
        # An interrupted trial, or one whose process ended, is repeated under another number.
        if stored.state.name not in names or (stored.state.name == "FAIL" and "error" not in notes):
            continue
        values = search.values(stored.params)
        score = stored.value if stored.state.name == "COMPLETE" else None
        if stored.state.name == "PRUNED" and stored.intermediate_values:
            score = (max if search.bigger else min)(stored.intermediate_values.values())
        trials.append(Trial(stored.number, values, names[stored.state.name], score, **notes))
    return trials


def _make_trials(search: Search, study: Any, screen: Screen) -> None:
    """Make trials until all are done, also those that other processes are running."""
    optuna = import_engine("optuna")
    from recbole_simdiff.tuning.engines.storage import told_first  # which imports optuna

    def after(_: Any, stored: Any) -> None:
        trials = _recorded(search, study)
        for trial in trials:
            if trial.number == stored.number:
                drop_weights(search, trials, trial)
        write_trials(search, trials)
        screen.show(trials)

    command, seen = multiprocessing.parent_process(), set[int]()
    while command is None or command.is_alive():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optuna.storages.fail_stale_trials(study)
        # One whose process ended before its first sign of life would never be missed.
        for stored in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if stored.number not in seen:
                seen.add(stored.number)
                study._storage.record_heartbeat(stored._trial_id)
        with contextlib.ExitStack() as claim:
            # Counted and begun under one lock; else two processes could both begin the last trial.
            claim.enter_context(files.exclusive(search.folder / STUDY))
            states = Counter(stored.state.name for stored in study.get_trials(deepcopy=False))
            n_ended = len(_recorded(search, study))
            if states["WAITING"] or n_ended + states["RUNNING"] < search.trials:
                objective = _Objective(search, screen, begun=claim.close)
                caught = (*IMPOSSIBLE, _Surplus)
                with told_first(study._storage):
                    study.optimize(objective, n_trials=1, catch=caught, callbacks=[after])
                continue
        if not states["RUNNING"]:
            return
        screen.write(f"waiting for {states['RUNNING']} trials of other processes")
        time.sleep(1)


class _Surplus(Exception):
    """Machines that counted at the same time have begun more trials than there should be."""


def _is_surplus(search: Search, study: Any, number: int) -> bool:
    """Whether a trial that has begun is one too many; the later one is, on every machine."""
    trials = study.get_trials(deepcopy=False)
    if trials[number].system_attrs:  # asked for: of a grid, or a repetition
        return False
    counted = {trial.number for trial in _recorded(search, study)}
    counted |= {stored.number for stored in trials if not stored.state.is_finished()}
    return sum(other < number for other in counted) >= search.trials


class _Objective:
    """The score of an Optuna trial; ``begun`` is called when the trial is in the storage."""

    def __init__(self, search: Search, screen: Screen, begun: Callable[[], None]) -> None:
        self.search, self.screen, self.begun, self.reported = search, screen, begun, 0

    def __call__(self, trial: Any) -> float:
        from recbole_simdiff.tuning.engines.storage import wait_no_more  # which imports optuna

        self.begun()
        search = self.search
        if _is_surplus(search, trial.study, trial.number):
            raise _Surplus
        self._set_sampler(trial)
        values = {d.key: d.value(_suggest(trial, d)) for d in search.space}
        try:
            config = search.config(values)
            trial.set_user_attr("run", search.run_dir(config).name)
            with self.screen.quiet():
                result = search.measure(config, lambda progress: self._report(trial, progress))
            score = search.score(kept(result.valid))
        except (Interrupted, KeyboardInterrupt) as stop:
            wait_no_more(trial.study._storage, stop)
            trial.study.enqueue_trial(trial.params)
            raise
        except IMPOSSIBLE as error:
            trial.set_user_attr("error", reason(error))
            raise
        trial.set_user_attr("epochs", result.epochs)
        trial.set_user_attr("seconds", result.seconds)
        return score

    def _set_sampler(self, trial: Any) -> None:
        """Seed by trial: with one seed, processes that share a study would draw the same values."""
        samplers = import_engine("optuna").samplers
        seed = (self.search.seed * 1_000_003 + trial.number) % 2**32
        if self.search.algo == "bayes":
            trial.study.sampler = samplers.TPESampler(seed=seed)
        else:
            trial.study.sampler = samplers.RandomSampler(seed=seed)

    def _report(self, trial: Any, progress: Progress) -> None:
        # All validations, also those before an interruption.
        for epoch, entry in list(enumerate(progress.log))[self.reported :]:
            if "valid" in entry:
                trial.report(self.search.score(entry["valid"]), epoch)
        self.reported = len(progress.log)
        if trial.should_prune():
            trial.set_user_attr("epochs", len(progress.log))
            trial.set_user_attr("seconds", progress.seconds)
            raise import_engine("optuna").TrialPruned


def _suggest(trial: Any, dimension: Dimension) -> Any:
    """Draw a value of a parameter with Optuna."""
    key, low, high = dimension.key, dimension.low, dimension.high
    if dimension.kind == "choice":
        return trial.suggest_categorical(key, list(dimension.texts))
    if dimension.kind == "quniform":
        return trial.suggest_float(key, low, high, step=dimension.q)
    if dimension.kind == "loguniform":
        return trial.suggest_float(key, math.exp(low), math.exp(high), log=True)
    return trial.suggest_float(key, low, high)


def _supervise(search: Search, study: Any, screen: Screen) -> None:
    """Let ``jobs`` processes make the trials of a study, and show the trials that end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    threads = max(1, (os.cpu_count() or 1) // search.jobs)
    logs = [search.folder / f"worker-{i}.log" for i in range(search.jobs)]
    workers = [context.Process(target=_work, args=(search, threads, log)) for log in logs]
    stop = StopRequest()
    with stop.listen(), contextlib.ExitStack() as ending:
        for worker in workers:
            worker.start()
            ending.callback(worker.terminate)  # it saves its state and ends
        while any(worker.is_alive() for worker in workers):
            if stop.signum is not None:
                ending.close()
            time.sleep(0.5)
            screen.show(_recorded(search, study))
        stop.check(search.folder)
    for worker, log in zip(workers, logs, strict=True):
        if worker.exitcode and len(screen.shown) < search.trials:
            raise UserError(f"a worker of the search ended with code {worker.exitcode}; see {log}")


def _work(search: Search, threads: int, log: Path) -> None:
    """The main function of a process that makes trials; its output goes to a log file."""
    os.setpgid(0, 0)  # Ctrl-C reaches the command only, which sends one signal to each process

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt  # outside a run, where only the draw of the trial is lost

    signal.signal(signal.SIGTERM, stop)
    # Not closed, so that a traceback still reaches the file.
    sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(threads)
    quiet = replace(search, settings={**search.settings, "show_progress": False})
    with terminal(), contextlib.suppress(Interrupted, KeyboardInterrupt):
        study = _open_study(search)
        _make_trials(search, study, Screen(quiet, _recorded(search, study)))


ENGINE = Engine("optuna", ("bayes", "random", "exhaustive"), run_trials, storage=True)
