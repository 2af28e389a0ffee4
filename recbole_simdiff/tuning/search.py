"""Search for the best setting of a model, by its validation score.

A trial is an ordinary run that ends before its test; its folder is named after everything that
shapes it, so a setting drawn twice is trained once and an interrupted trial goes on to the step.
When the search is over, and only then, the best setting is tested, with the weights it has.

Engines, all optional: Optuna (trials in a data base that several processes or machines may share;
resumable; bad trials are stopped early), RecBole's own ``HyperTuning`` on hyperopt, and Ray Tune.
"""

import contextlib
import importlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from recbole.trainer import HyperTuning
from tqdm import tqdm

from recbole_simdiff import files
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.config.config import AUGMENTED, Config
from recbole_simdiff.config.keys import ELSEWHERE_KEYS
from recbole_simdiff.config.layers import read_yaml
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import Interrupted, TrainingDiverged, UserError
from recbole_simdiff.evaluation.protocols import KEPT, kept, protocol_name
from recbole_simdiff.experiments import tables
from recbole_simdiff.experiments.execute import data_checksum
from recbole_simdiff.log import logger, terminal
from recbole_simdiff.pipelines.diffuasr import run_augmented
from recbole_simdiff.runs.identity import code, fingerprint
from recbole_simdiff.runs.result import RunResult, aligned, versions
from recbole_simdiff.runs.run import run, run_once
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.training.progress import OnValidation, Progress
from recbole_simdiff.tuning.space import Dimension

# Engine -> what it can do, its default first, in RecBole's words.
ALGORITHMS = {
    "optuna": ("bayes", "random", "exhaustive"),
    "hyperopt": ("bayes", "random"),  # RecBole's exhaustive search needs a hyperopt before 0.2.7
    "ray": ("random", "exhaustive"),
}

TRIALS, BEST_SETTING, STUDY = "trials.csv", "best.yaml", "study.db"

DONE, PRUNED, FAILED = "done", "pruned", "failed"

# A trial is stopped early when its best score so far is below the median of the others' at the same
# epoch: not before so many trials have finished, and not in its first epochs.
MEDIAN_TRIALS, MEDIAN_WARMUP = 5, 10

# Seconds between signs of life of a trial, and without one until it is given to another process.
HEARTBEAT, SILENCE = 30, 120

RETRIES = 2  # of a trial whose process died

# What a setting that cannot work raises, when built or trained; anything else ends the search.
_IMPOSSIBLE = (UserError, TrainingDiverged, ValueError, RuntimeError, ArithmeticError)


@dataclass(frozen=True)
class Trial:
    """What became of a setting.

    Attributes:
        number (int): counted from 0.
        values (dict): the setting.
        state (str): ``DONE``, ``PRUNED`` (stopped early) or ``FAILED``.
        score (float | None): validation metric of the best epoch; None where it failed.
        epochs (int): epochs trained.
        seconds (float): of training and validation.
        run (str): name of its folder under ``trials/``.
        error (str): why it failed.
    """

    number: int
    values: Mapping[str, Any]
    state: str
    score: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    run: str = ""
    error: str = ""


@dataclass(frozen=True)
class Search:
    """A search, checked; made by ``plan``.

    Attributes:
        model, dataset (str): names.
        files (tuple): configuration files under the setting.
        settings (dict): values over the files, the same for all trials.
        space (tuple): what is searched.
        engine, algo (str): see ``ALGORITHMS``.
        trials (int): how many.
        jobs (int): at the same time, each in a process of its own.
        pruning (bool): whether bad trials are stopped early; Optuna and Ray.
        storage (str): URL of Optuna's data base.
        folder (Path): where everything goes.
        data (str): checksum of the data.
        metric (str): the validation metric, as in results.
        protocol (str): under which it is measured.
        bigger (bool): whether more of it is better.
        seed (int): of the trials and of the search.
    """

    model: str
    dataset: str
    files: tuple[str, ...]
    settings: Mapping[str, Any]
    space: tuple[Dimension, ...]
    engine: str
    algo: str
    trials: int
    jobs: int
    pruning: bool
    storage: str
    folder: Path
    data: str
    metric: str
    protocol: str
    bigger: bool
    seed: int

    def __str__(self) -> str:
        return f"{self.model} on {self.dataset}"

    def config(self, values: Mapping[str, Any]) -> Config:
        """The configuration of a setting.

        Raises:
            UserError: if it is impossible.
        """
        everything = {**self.settings, **values, "show_progress": False}
        return Config(self.model, self.dataset, self.files, everything, "search")

    def run_dir(self, config: Config) -> Path:
        """The folder of a setting's run."""
        return self.folder / "trials" / fingerprint(config, self.data)

    def measure(
        self, config: Config, report: Callable[[Progress], None] | None = None, test: bool = False
    ) -> RunResult:
        """Train a setting, or read what was found before.

        Args:
            config (Config): of the setting.
            report (Callable | None): called with the progress after every validation.
            test (bool): whether the test part is read.
        """
        begin = run_augmented if self.model == AUGMENTED else run
        listeners = [OnValidation(report)] if report else []
        return run_once(config, self.run_dir(config), begin, listeners, test)

    def score(self, metrics: Mapping[str, float]) -> float:
        """What is compared.

        Raises:
            ValueError: if it is not a number.
        """
        if not math.isfinite(metrics[self.metric]):
            raise ValueError(f"{self.metric} is {metrics[self.metric]}")
        return metrics[self.metric]

    def value(self, trial: Trial) -> float:
        """The score of a trial such that more is better; a failed one has the worst."""
        if trial.state != DONE or trial.score is None:
            return -math.inf
        return trial.score if self.bigger else -trial.score

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """The finished trials, best first; of equal ones the earlier."""
        done = [trial for trial in trials if trial.state == DONE]
        return sorted(done, key=lambda trial: (-self.value(trial), trial.number))

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of draws.

        Raises:
            UserError: if they cannot be counted.
        """
        keys = [dimension.key for dimension in self.space]
        draws = [dimension.grid() for dimension in self.space]
        return [
            dict(zip(keys, combination, strict=True)) for combination in itertools.product(*draws)
        ]


def plan(
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
        engine (str): see ``ALGORITHMS``.
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
    for dimension in space:
        if dimension.key in settings:
            logger.info(f"{dimension.key}={settings[dimension.key]!r} is given and not searched")
        _check_comparable(config, dimension)
    space = tuple(dimension for dimension in space if dimension.key not in settings)
    if not space:
        raise UserError("there is nothing to search: the command line fixes every parameter")
    folder = (output / f"tune-{config.name}-{config['dataset']}").absolute()
    # Workers of Ray are elsewhere.
    settings["data_path"] = os.path.abspath(config.data_root)
    if config.name == AUGMENTED:
        for key in ("augmentation_cache", "baseline_checkpoint"):
            if config[key] is not None:
                settings[key] = os.path.abspath(config[key])
    search = Search(
        model=config.name,
        dataset=config["dataset"],
        files=tuple(os.path.abspath(file) for file in files),
        settings=settings,
        space=space,
        engine=engine,
        algo=algo or ALGORITHMS[engine][0],
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


def _check_engine(
    engine: str, algo: str | None, trials: int, jobs: int, storage: str | None
) -> None:
    if engine not in ALGORITHMS:
        raise UserError(f"--engine={engine} is not one of {', '.join(ALGORITHMS)}")
    if algo is not None and algo not in ALGORITHMS[engine]:
        other = f"; optuna has {', '.join(ALGORITHMS['optuna'])}" if engine != "optuna" else ""
        raise UserError(
            f"--algo={algo}: engine {engine} has {', '.join(ALGORITHMS[engine])}{other}"
        )
    for key, number in (("trials", trials), ("jobs", jobs)):
        if number < 1:
            raise UserError(f"--{key}={number} must be at least 1")
    if engine == "hyperopt" and jobs > 1:
        raise UserError(
            f"--jobs={jobs}: RecBole's HyperTuning makes one trial after another; use "
            "--engine=optuna"
        )
    if engine != "optuna" and storage is not None:
        raise UserError(f"--storage is Optuna's; engine {engine} goes on from the trials' folders")
    library(engine)


def _check_comparable(config: Config, dimension: Dimension) -> None:
    """Refuse keys that change what is measured, or nothing."""
    key = dimension.key
    groups = ("General", "Evaluation", "Dataset")
    measured = {name for group in groups for name in config.parameters[group]}
    if key in (measured | ELSEWHERE_KEYS) - {"MAX_ITEM_LIST_LENGTH"}:
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


def library(engine: str) -> Any:
    """An engine's module, imported when it is asked for.

    Raises:
        UserError: saying what to install, if it is not there or does not run here.
    """
    name = {"ray": "ray.tune"}.get(engine, engine)
    try:
        module = importlib.import_module(name)
        if engine == "ray" and not hasattr(module, "RunConfig"):
            raise ImportError(f"ray {importlib.import_module('ray').__version__} is too old")
    except (ImportError, AttributeError) as error:
        reason = f"engine {engine} cannot be used ({type(error).__name__}: {error})"
        if engine == "ray":
            raise UserError(
                f"{reason}. The ray that RecBole pins, 2.6.3, does not run with today's NumPy and "
                "setuptools, and nothing here needs that one: pip install --upgrade 'ray[tune]'"
            ) from None
        raise UserError(f"{reason}: pip install 'recbole_simdiff[tune]'") from None
    return module


def tune(search: Search) -> list[Trial]:
    """All trials of a search, in order; those of an earlier start of the same one are not repeated.

    Args:
        search (Search): what ``plan`` returned.

    Raises:
        UserError: if no trial could be finished, or the storage holds another search.
        Interrupted: after a signal; the same command continues.
    """
    engine = {"optuna": _tune_optuna, "hyperopt": _tune_hyperopt, "ray": _tune_ray}[search.engine]
    try:
        trials = engine(search)
    except Interrupted as stop:
        stop.same_command = True
        raise
    _write_trials(search, trials)
    ranked = search.ranked(trials)
    if not ranked:
        reasons = Counter(trial.error for trial in trials).most_common(1)
        raise UserError(
            f"none of {len(trials)} trials could be finished"
            + "".join(f"; {n} failed with {reason}" for reason, n in reasons)
        )
    _write_best(search, trials)
    return trials


def test(search: Search, best: Trial) -> RunResult:
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


class _Screen(io.TextIOBase):
    """What the terminal shows of a search: one bar, with the last words of the run; and a line for
    each trial that ends.
    """

    def __init__(self, search: Search, trials: Sequence[Trial]) -> None:
        self.search, self.shown = search, {trial.number for trial in trials}
        self.terminal = sys.stderr
        self.bar = tqdm(
            total=search.trials,
            initial=len(trials),
            desc=f"tune {search}",
            unit="trial",
            disable=None if search.settings.get("show_progress", True) else True,
        )

    def write(self, text: str) -> int:
        for line in filter(None, text.split("\n")):
            self.bar.set_postfix_str(line)
        return len(text)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within the block, what is written to standard error goes to the bar."""
        try:
            with contextlib.redirect_stderr(self):
                yield
        finally:
            self.bar.set_postfix_str("")

    def show(self, trials: Sequence[Trial]) -> None:
        """Lines for trials that were not shown yet."""
        for trial in trials:
            if trial.number not in self.shown:
                self.shown.add(trial.number)
                setting = ", ".join(f"{k}={_short(v)}" for k, v in trial.values.items())
                score = "" if trial.score is None else f" {self.search.metric} {trial.score:.5f}"
                # Hyperopt puts a stream of its own in the place of standard error.
                with contextlib.redirect_stderr(self.terminal), tqdm.external_write_mode():
                    logger.info(
                        f"trial {trial.number} {trial.state}{score}, {trial.epochs} epochs: "
                        f"{setting}" + (f" ({trial.error})" if trial.error else "")
                    )
        self.bar.n = len(trials)
        self.bar.refresh()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _forget(search: Search, trials: Sequence[Trial], newest: Trial) -> None:
    """Drop the weights of all trials but the best one; their results stay."""
    best = search.ranked(trials)[:1]
    kept = {trial.run for trial in best}
    finished = {trial.run for trial in trials if trial.state == DONE}
    for name in {newest.run, *finished} - kept - {""}:
        run_dir = search.folder / "trials" / name
        # Another process may be about to try the same setting.
        with files.turn(run_dir) if name not in finished else contextlib.nullcontext():
            for weights in (BEST, LAST):
                (run_dir / weights).unlink(missing_ok=True)


def _tune_optuna(search: Search) -> list[Trial]:
    search.folder.mkdir(parents=True, exist_ok=True)
    study = _open_study(search)
    if search.algo == "exhaustive":
        with files.turn(search.folder / STUDY):
            for draws in search.grid():
                study.enqueue_trial(draws, skip_if_exists=True)
    screen = _Screen(search, _recorded(search, study))
    logger.info(f"{search.folder}: {len(screen.shown)} of {search.trials} trials there")
    try:
        if search.jobs > 1:
            _supervise(search, study, screen)
        else:
            _work_on(search, study, screen)
    finally:
        screen.bar.close()
    return _recorded(search, study)


def _open_study(search: Search) -> Any:
    """The study of a search in its storage, made if it is not there.

    Raises:
        UserError: if the storage cannot be used, or what it holds is another search.
    """
    optuna = library("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback
    try:
        with files.turn(search.folder / STUDY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heartbeats are called experimental
            storage = optuna.storages.RDBStorage(
                search.storage,
                heartbeat_interval=HEARTBEAT,
                grace_period=SILENCE,
                heartbeat_stale_trial_callback=retry(max_retry=RETRIES),
            )
            study = optuna.create_study(
                storage=storage,
                study_name=f"{search.model}-{search.dataset}",
                direction="maximize" if search.bigger else "minimize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(MEDIAN_TRIALS, MEDIAN_WARMUP)
                if search.pruning
                else optuna.pruners.NopPruner(),
            )
    except Exception as error:  # of SQLAlchemy, of its driver, of the system
        raise UserError(f"--storage cannot be used: {_reason(error)}") from None
    made_with = _made_with(search)
    theirs = study.user_attrs.get("made_with")
    if theirs is None or not study.get_trials(deepcopy=False):
        study.set_user_attr("made_with", made_with)
        return study
    for key in made_with.keys() | theirs.keys():
        ours, other = made_with.get(key), theirs.get(key)
        if ours != other:
            raise UserError(
                f"the study in {search.folder if STUDY in search.storage else 'the storage'} was "
                f"made with {key}={other!r}, and now it is {ours!r}: scores cannot be compared. "
                "Give another --output (and --storage), or delete it"
            )
    return study


def _made_with(search: Search) -> dict[str, Any]:
    """What all trials of a study have in common, as JSON gives it back."""
    values = search.config({}).identity()["values"]
    searched = {dimension.key: f"search over {dimension}" for dimension in search.space}
    common = {k: v for k, v in values.items() if k not in searched}
    common |= searched | {"data": search.data, "code of recbole_simdiff": code()}
    found: dict[str, Any] = json.loads(json.dumps(common, default=str))
    return found


def _recorded(search: Search, study: Any) -> list[Trial]:
    """The trials of a study that are over."""
    names = {"COMPLETE": DONE, "PRUNED": PRUNED, "FAIL": FAILED}
    found = []
    for stored in study.get_trials(deepcopy=False):
        notes = stored.user_attrs
        # A trial that was interrupted, or whose process died, is repeated under another number.
        if stored.state.name not in names or (stored.state.name == "FAIL" and "error" not in notes):
            continue
        values = {d.key: d.value(stored.params[d.key]) for d in search.space}
        score = stored.value if stored.state.name == "COMPLETE" else None
        if stored.state.name == "PRUNED" and stored.intermediate_values:
            score = (max if search.bigger else min)(stored.intermediate_values.values())
        found.append(Trial(stored.number, values, names[stored.state.name], score, **notes))
    return found


def _work_on(search: Search, study: Any, screen: _Screen) -> None:
    """Make trials until there are enough and none is open, be it by this process or another."""
    optuna = library("optuna")

    def after(_: Any, stored: Any) -> None:
        trials = _recorded(search, study)
        for trial in trials:
            if trial.number == stored.number:
                _forget(search, trials, trial)
        _write_trials(search, trials)
        screen.show(trials)

    command = multiprocessing.parent_process()
    while command is None or command.is_alive():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optuna.storages.fail_stale_trials(study)
        with contextlib.ExitStack() as claim:
            # Counted and begun in one turn; two processes would else begin the last trial twice.
            claim.enter_context(files.turn(search.folder / STUDY))
            states = Counter(stored.state.name for stored in study.get_trials(deepcopy=False))
            over = len(_recorded(search, study))
            if states["WAITING"] or over + states["RUNNING"] < search.trials:
                objective = _Objective(search, screen, begun=claim.close)
                study.optimize(objective, n_trials=1, catch=_IMPOSSIBLE, callbacks=[after])
                continue
        if not states["RUNNING"]:
            return
        screen.write(f"waiting for {states['RUNNING']} trials of other processes")
        time.sleep(1)


class _Objective:
    """The score of one of Optuna's trials; ``begun`` is called once the trial is in the storage."""

    def __init__(self, search: Search, screen: _Screen, begun: Callable[[], None]) -> None:
        self.search, self.screen, self.begun, self.reported = search, screen, begun, 0

    def __call__(self, trial: Any) -> float:
        self.begun()
        search = self.search
        self._set_sampler(trial)
        values = {d.key: d.value(_suggest(trial, d)) for d in search.space}
        try:
            config = search.config(values)
            trial.set_user_attr("run", search.run_dir(config).name)
            with self.screen.quiet():
                result = search.measure(config, lambda progress: self._report(trial, progress))
            score = search.score(kept(result.valid))
        except (Interrupted, KeyboardInterrupt):
            trial.study.enqueue_trial(trial.params)
            raise
        except _IMPOSSIBLE as error:
            trial.set_user_attr("error", _reason(error))
            raise
        trial.set_user_attr("epochs", result.epochs)
        trial.set_user_attr("seconds", result.seconds)
        return score

    def _set_sampler(self, trial: Any) -> None:
        """Processes that share a study would draw the same numbers from one seed."""
        samplers = library("optuna").samplers
        seed = (self.search.seed * 1_000_003 + trial.number) % 2**32
        if self.search.algo == "bayes":
            trial.study.sampler = samplers.TPESampler(seed=seed)
        else:
            trial.study.sampler = samplers.RandomSampler(seed=seed)

    def _report(self, trial: Any, progress: Progress) -> None:
        # All evaluations, also those before an interruption.
        for epoch, entry in list(enumerate(progress.log))[self.reported :]:
            if "valid" in entry:
                trial.report(self.search.score(entry["valid"]), epoch)
        self.reported = len(progress.log)
        if trial.should_prune():
            trial.set_user_attr("epochs", len(progress.log))
            trial.set_user_attr("seconds", progress.seconds)
            raise library("optuna").TrialPruned


def _suggest(trial: Any, dimension: Dimension) -> Any:
    """Draw a value in Optuna's way."""
    key, low, high = dimension.key, dimension.low, dimension.high
    if dimension.kind == "choice":
        return trial.suggest_categorical(key, list(dimension.texts))
    if dimension.kind == "quniform":
        return trial.suggest_float(key, low, high, step=dimension.q)
    if dimension.kind == "loguniform":
        return trial.suggest_float(key, math.exp(low), math.exp(high), log=True)
    return trial.suggest_float(key, low, high)


def _supervise(search: Search, study: Any, screen: _Screen) -> None:
    """Let ``jobs`` processes work on a study, and show what becomes of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    threads = max(1, (os.cpu_count() or 1) // search.jobs)
    logs = [search.folder / f"worker-{i}.log" for i in range(search.jobs)]
    workers = [context.Process(target=_work, args=(search, threads, log)) for log in logs]
    stop, asked = StopRequest(), False
    with stop.listen():
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            if stop.signum is not None and not asked:
                asked = True
                for worker in workers:
                    worker.terminate()  # each saves its state and ends
            time.sleep(0.5)
            screen.show(_recorded(search, study))
        stop.check(search.folder)
    for worker, log in zip(workers, logs, strict=True):
        if worker.exitcode and len(screen.shown) < search.trials:
            raise UserError(f"a worker of the search ended with code {worker.exitcode}; see {log}")


def _work(search: Search, threads: int, log: Path) -> None:
    """A process that makes trials; what it says is in a file."""
    os.setpgid(0, 0)  # Ctrl-C reaches the command alone, which asks each process to stop, once

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt  # where no run listens: nothing is lost there but the trial's draw

    signal.signal(signal.SIGTERM, stop)
    # Open to the end, for the traceback of what may go wrong.
    sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(threads)
    quiet = replace(search, settings={**search.settings, "show_progress": False})
    with terminal(), contextlib.suppress(Interrupted, KeyboardInterrupt):
        study = _open_study(search)
        _work_on(search, study, _Screen(quiet, _recorded(search, study)))


def _tune_hyperopt(search: Search) -> list[Trial]:
    """RecBole's ``HyperTuning``; the same command draws the same settings, and trains them once."""
    hp = library("hyperopt").hp
    space = {}
    for d in search.space:
        if d.kind == "choice":
            space[d.key] = hp.choice(d.key, d.grid())
        elif d.kind == "quniform":
            space[d.key] = hp.quniform(d.key, d.low, d.high, d.q)
        else:
            space[d.key] = getattr(hp, d.kind)(d.key, d.low, d.high)
    trials: list[Trial] = []
    screen = _Screen(search, trials)

    def objective(drawn: Mapping[str, Any], files: Any = None) -> dict[str, Any]:
        values = {d.key: d.value(drawn[d.key]) for d in search.space}
        trial = Trial(len(trials), values, FAILED)
        try:
            config = search.config(values)
            trial = replace(trial, run=search.run_dir(config).name)
            with screen.quiet():
                result = search.measure(config)
            score = search.score(kept(result.valid))
            trial = replace(
                trial, state=DONE, score=score, epochs=result.epochs, seconds=result.seconds
            )
        except _IMPOSSIBLE as error:
            trial = replace(trial, error=_reason(error))
        trials.append(trial)
        _forget(search, trials, trial)
        _write_trials(search, trials)
        screen.show(trials)
        return {
            "model": search.model,
            "best_valid_score": search.value(trial),
            "valid_score_bigger": True,
            "best_valid_result": {search.metric: trial.score},
            "test_result": {},  # not before the search is over
        }

    tuning = HyperTuning(
        objective,
        space=space,
        algo=search.algo,
        max_evals=search.trials,
        early_stop=search.trials + 1,  # it would stop after 10 trials without a better one
    )
    logging.getLogger("hyperopt").setLevel(logging.WARNING)
    before = os.environ.get("HYPEROPT_FMIN_SEED")
    os.environ["HYPEROPT_FMIN_SEED"] = str(search.seed)  # HyperTuning has no other way to seed it
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a bar and every setting
            tuning.run()
    finally:
        screen.bar.close()
        if before is None:
            del os.environ["HYPEROPT_FMIN_SEED"]
        else:
            os.environ["HYPEROPT_FMIN_SEED"] = before
    return trials


def _tune_ray(search: Search) -> list[Trial]:
    """Ray Tune, on this machine or on the cluster of ``RAY_ADDRESS``, whose machines need the
    package and the data at the same place.
    """
    tune = library("ray")
    schedulers = importlib.import_module("ray.tune.schedulers")
    generator = importlib.import_module("ray.tune.search.basic_variant").BasicVariantGenerator
    # Workers would otherwise look for everything in a folder of their own.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    exhaustive = search.algo == "exhaustive"
    space = {
        d.key: tune.grid_search(d.grid()) if exhaustive else _ray_domain(tune, d)
        for d in search.space
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
        tune.with_resources(tune.with_parameters(_ray_trial, search=search), resources),
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=1 if exhaustive else search.trials,
            search_alg=generator(max_concurrent=search.jobs, random_state=search.seed),
            scheduler=median if search.pruning else None,
        ),
        run_config=tune.RunConfig(name="ray", storage_path=str(search.folder), verbose=1),
    )
    trials = [_ray_record(search, number, found) for number, found in enumerate(tuner.fit())]
    for trial in trials:
        _forget(search, trials, trial)
    return trials


def _ray_domain(tune: Any, dimension: Dimension) -> Any:
    low, high = dimension.low, dimension.high
    if dimension.kind == "choice":
        return tune.choice(list(dimension.texts))
    if dimension.kind == "quniform":
        return tune.quniform(low, high, dimension.q)
    if dimension.kind == "loguniform":
        return tune.loguniform(math.exp(low), math.exp(high))
    return tune.uniform(low, high)


def _ray_trial(drawn: Mapping[str, Any], search: Search) -> None:
    """In a worker of Ray: train a setting and report after each evaluation."""
    tune = library("ray")

    def report(progress: Progress) -> None:
        score = search.score(progress.log[-1]["valid"])
        tune.report({"score": score, "epochs": len(progress.log), "seconds": progress.seconds})

    config = search.config(_ray_values(search, drawn))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        result = search.measure(config, report)
    found = {"score": search.score(kept(result.valid)), "finished": True}
    tune.report({**found, "epochs": result.epochs, "seconds": result.seconds})


def _ray_values(search: Search, drawn: Mapping[str, Any]) -> dict[str, Any]:
    return {d.key: d.value(drawn[d.key]) for d in search.space}


def _ray_record(search: Search, number: int, found: Any) -> Trial:
    values, metrics = _ray_values(search, found.config), found.metrics or {}
    try:
        name = search.run_dir(search.config(values)).name
    except UserError:
        name = ""
    state = DONE if metrics.get("finished") else FAILED if found.error else PRUNED
    return Trial(
        number,
        values,
        state,
        None if state == FAILED else metrics.get("score"),
        metrics.get("epochs", 0),
        metrics.get("seconds", 0.0),
        name,
        str(found.error).strip().splitlines()[-1] if state == FAILED else "",
    )


def _write(path: Path, text: str) -> None:
    files.write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _write_trials(search: Search, trials: Sequence[Trial]) -> None:
    rows = [
        {
            "trial": trial.number,
            "state": trial.state,
            search.metric: trial.score,
            "epochs_trained": trial.epochs,
            "seconds": trial.seconds,
            "run": trial.run,
            "error": trial.error,
            **trial.values,
        }
        for trial in trials
    ]
    _write(search.folder / TRIALS, tables.as_csv(rows))


def _write_best(search: Search, trials: Sequence[Trial]) -> None:
    """The best setting, with all that was given for the search, as a configuration file."""
    best = search.ranked(trials)[0]
    config = search.config(best.values)
    given = {key for file in search.files for key in read_yaml(file)} | search.settings.keys()
    given -= ELSEWHERE_KEYS | best.values.keys() | {"model", "dataset"}
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
    _write(path, "\n".join(lines) + "\n")


def summary(search: Search, trials: Sequence[Trial], first: int = 5) -> str:
    """The best trials as a table, and how to use the best one.

    Args:
        search (Search): the search.
        trials (Sequence): all of its trials.
        first (int): how many to show.
    """
    rows = [["trial", search.metric, "epochs", *(d.key for d in search.space)]]
    for trial in search.ranked(trials)[:first]:
        values = (_short(trial.values[d.key]) for d in search.space)
        rows.append([str(trial.number), f"{trial.score:.5f}", str(trial.epochs), *values])
    counts = Counter(trial.state for trial in trials)
    path = os.path.relpath(search.folder / BEST_SETTING)
    return (
        f"{search}: {counts[DONE]} trials {DONE}, {counts[PRUNED]} {PRUNED}, {counts[FAILED]} "
        f"{FAILED}; validation, {search.protocol}\n{aligned(rows, 1)}\n\n"
        f"best setting: {path}\n"
        f"use it with: --model={search.model} --dataset={search.dataset} --config_files={path}"
    )
