"""A search and the records of its trials, as every engine uses them."""

import contextlib
import importlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_simdiff import files
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import TrainingDiverged, UserError
from recbole_simdiff.experiments import tables
from recbole_simdiff.pipelines.start import start
from recbole_simdiff.runs.identity import fingerprint
from recbole_simdiff.runs.result import RunResult
from recbole_simdiff.runs.run import run_once
from recbole_simdiff.training.progress import OnValidation, Progress
from recbole_simdiff.tuning.space import Dimension

TRIALS, STUDY = "trials.csv", "study.db"

DONE, PRUNED, FAILED = "done", "pruned", "failed"

# A trial is stopped early when its best score so far is below the median of the other trials at the
# same epoch. This needs MEDIAN_TRIALS finished trials, and never happens in the first epochs.
MEDIAN_TRIALS, MEDIAN_WARMUP = 5, 10

# Errors of a setting that cannot be built or trained. Any other error ends the search.
IMPOSSIBLE = (UserError, TrainingDiverged, ValueError, RuntimeError, ArithmeticError)


@dataclass(frozen=True)
class Trial:
    """The record of a trial.

    Attributes:
        number (int): counted from 0.
        values (dict): its setting: key -> value of each searched parameter.
        state (str): ``DONE``, ``PRUNED`` (stopped early) or ``FAILED``.
        score (float | None): validation metric of the best epoch; None if it failed.
        epochs (int): epochs trained.
        seconds (float): time of training and validation.
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
    """A checked search, as ``new_search`` returns it.

    Attributes:
        model, dataset (str): names.
        reference (str): what another process calls the model: its name, or the file of your own.
        files (tuple): configuration files; settings and trials override them.
        settings (dict): values that override the files, the same for all trials.
        space (tuple): parameters to search.
        engine, algo (str): an engine's name and one of its algorithms.
        trials (int): number of trials.
        jobs (int): trials at the same time, each in a process of its own.
        pruning (bool): whether bad trials are stopped early; Optuna and Ray only.
        storage (str): URL of Optuna's database.
        folder (Path): folder of all files of the search.
        data (str): checksum of the data.
        metric (str): the validation metric, as in results.
        protocol (str): protocol under which the metric is measured.
        bigger (bool): whether a greater metric is better.
        seed (int): seed of the trials and of the search.
    """

    model: str
    reference: str
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
        overrides = {**self.settings, **values, "show_progress": False}
        return Config(self.reference, self.dataset, self.files, overrides, "search")

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The setting of what an engine drew: key -> value of the configuration."""
        return {d.key: d.value(drawn[d.key]) for d in self.space}

    def run_dir(self, config: Config) -> Path:
        """The folder of a setting's run."""
        return self.folder / "trials" / fingerprint(config, self.data)

    def measure(
        self, config: Config, report: Callable[[Progress], None] | None = None, test: bool = False
    ) -> RunResult:
        """Train a setting, or read its result if it was trained before.

        Args:
            config (Config): configuration of the setting.
            report (Callable | None): called with the progress after every validation.
            test (bool): whether the test part is read.
        """
        listeners = [OnValidation(report)] if report else []
        return run_once(config, self.run_dir(config), start, listeners, test)

    def score(self, metrics: Mapping[str, float]) -> float:
        """The metric that trials are compared by.

        Raises:
            ValueError: if it is NaN or infinite.
        """
        if not math.isfinite(metrics[self.metric]):
            raise ValueError(f"{self.metric} is {metrics[self.metric]}")
        return metrics[self.metric]

    def value(self, trial: Trial) -> float:
        """The score of a trial, negated if less is better; minus infinity unless it is done."""
        if trial.state != DONE or trial.score is None:
            return -math.inf
        return trial.score if self.bigger else -trial.score

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """The finished trials, best first; of equal scores the earlier trial first."""
        done = [trial for trial in trials if trial.state == DONE]
        return sorted(done, key=lambda trial: (-self.value(trial), trial.number))

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of draws.

        Raises:
            UserError: if a parameter is continuous.
        """
        keys = [dimension.key for dimension in self.space]
        draws = [dimension.grid() for dimension in self.space]
        return [
            dict(zip(keys, combination, strict=True)) for combination in itertools.product(*draws)
        ]


@dataclass(frozen=True)
class Engine:
    """The interface of a search engine; each file of ``engines`` defines one.

    Attributes:
        name (str): as given to ``--engine``.
        algorithms (tuple): its algorithms under RecBole's names, the default first.
        run (Callable): makes the trials of a search and returns their records, in order.
        parallel (bool): whether trials may run at the same time.
        storage (bool): whether trials are stored in a database.
    """

    name: str
    algorithms: tuple[str, ...]
    run: Callable[[Search], list[Trial]]
    parallel: bool = True
    storage: bool = False


def import_engine(engine: str) -> Any:
    """Import an engine's library.

    Raises:
        UserError: naming the package to install, if the library is missing or does not run here.
    """
    name = {"ray": "ray.tune"}.get(engine, engine)
    try:
        module = importlib.import_module(name)
        if engine == "ray" and "RunConfig" not in vars(module):
            raise ImportError(f"ray {importlib.import_module('ray').__version__} is too old")
    except (ImportError, AttributeError) as error:
        problem = f"engine {engine} cannot be used ({type(error).__name__}: {error})"
        if engine == "ray":
            raise UserError(
                f"{problem}. The ray that RecBole pins, 2.6.3, does not run with current NumPy and "
                "setuptools. A newer one works: pip install --upgrade 'ray[tune]'"
            ) from None
        raise UserError(f"{problem}: pip install 'recbole_simdiff[tune]'") from None
    return module


def drop_weights(search: Search, trials: Sequence[Trial], newest: Trial) -> None:
    """Delete the weights of all trials but the best one; their results stay.

    Args:
        search (Search): the search.
        trials (Sequence): all finished, pruned and failed trials.
        newest (Trial): the one of them that ended last.
    """
    best = search.ranked(trials)[:1]
    kept = {trial.run for trial in best}
    finished = {trial.run for trial in trials if trial.state == DONE}
    for name in {newest.run, *finished} - kept - {""}:
        run_dir = search.folder / "trials" / name
        # Another process may start the same setting at this moment.
        with files.exclusive(run_dir) if name not in finished else contextlib.nullcontext():
            for weights in (BEST, LAST):
                (run_dir / weights).unlink(missing_ok=True)


def record(search: Search, trials: Sequence[Trial], newest: Trial) -> None:
    """Record a trial that has just ended; arguments as of ``drop_weights``."""
    drop_weights(search, trials, newest)
    write_trials(search, trials)


def write_trials(search: Search, trials: Sequence[Trial]) -> None:
    """Write the table of trials, one row for each."""
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
    files.write_text(search.folder / TRIALS, tables.as_csv(rows))


def reason(error: BaseException) -> str:
    """Why a trial failed, for its record."""
    return f"{type(error).__name__}: {error}"


def shortened(value: Any) -> str:
    """A value of a setting as it is shown: floats with six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
