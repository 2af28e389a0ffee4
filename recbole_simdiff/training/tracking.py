"""Weights & Biases and MLflow, beside RecBole's TensorBoard files; each where it is asked for.

    pip install 'recbole_simdiff[wandb]'     --log_wandb=true  --wandb_project=NAME
    pip install 'recbole_simdiff[mlflow]'    --log_mlflow=true --mlflow_experiment=NAME
    where it goes is the libraries' own affair: WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI, ...

A tracked run is named after the folder of the run, and a file there identifies it: a training that
is continued continues its tracked run, and the epochs that are not there yet are sent, whether an
interruption or a server that did not answer kept them back.

A tracker that cannot be opened is an error before training starts. One that fails later costs one
warning, and nothing is sent to it until the end of the training, when what is missing is.
"""

import importlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from recbole_simdiff import distributed, files
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.evaluation.protocols import Metrics
from recbole_simdiff.log import logger
from recbole_simdiff.modules.random_state import preserved_rng
from recbole_simdiff.training.progress import Listener, Progress

IDENTITY = "tracked_as"  # file in a run's folder: what its tracked runs are found by

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"

# The libraries' own settings where the user has none. Their defaults let a server that does not
# answer hold a training for twenty minutes, longer than the processes of a group wait for one
# another, or for good.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT": "300",
}

_PARAMETERS = 100  # MLflow takes so many at once


class Tracker(Protocol):
    """One tracked run.

    Attributes:
        key (str): of the configuration, that asks for it.
        name (str): of the service, for messages.
        library (str): to import, and the extra that installs it.
        epochs (int): how many are there already.

    Args:
        config (Config): resolved configuration.
        name (str): of the run.
        identity (str): what a tracked run that is to be continued is found by.
    """

    key: ClassVar[str]
    name: ClassVar[str]
    library: ClassVar[str]
    epochs: int

    def __init__(self, config: Config, name: str, identity: str) -> None: ...

    def log(self, values: Metrics, step: int) -> None:
        """Add the values of an epoch; ``step`` counts epochs from 1, over all phases."""

    def conclude(self, values: Metrics) -> None:
        """Add the result of the whole run."""

    def end(self, status: str) -> None:
        """Close the run as finished, failed or killed."""


class WandB(Tracker):
    """See ``Tracker``."""

    key, name, library = "log_wandb", "W&B", "wandb"

    def __init__(self, config: Config, name: str, identity: str) -> None:
        self.run = importlib.import_module(self.library).init(
            project=str(config["wandb_project"]),
            name=name,
            id=identity,
            resume="allow",
            reinit="create_new",  # a run that the caller has open stays as it is
            config=_settings(config),
            allow_val_change=True,
        )
        # The step it would give by itself. Offline it knows of no earlier part of a run, and gets
        # all epochs once more: each file is whole, and the newest is the one to synchronise.
        self.epochs = max(self.run.step - 1, 0)

    def log(self, values: Metrics, step: int) -> None:
        """See ``Tracker``."""
        self.run.log(values, step=step, commit=True)

    def conclude(self, values: Metrics) -> None:
        """See ``Tracker``."""
        self.run.summary.update(values)

    def end(self, status: str) -> None:
        """See ``Tracker``."""
        self.run.finish(exit_code={FINISHED: 0, FAILED: 1, KILLED: 255}[status])


class MLflow(Tracker):
    """See ``Tracker``."""

    key, name, library = "log_mlflow", "MLflow", "mlflow"

    def __init__(self, config: Config, name: str, identity: str) -> None:
        mlflow = importlib.import_module(self.library)
        experiment = mlflow.set_experiment(str(config["mlflow_experiment"])).experiment_id
        self.client, self.metric = mlflow.MlflowClient(), mlflow.entities.Metric
        tag = f"recbole_simdiff.{IDENTITY}"
        runs = self.client.search_runs([experiment], f"tags.`{tag}` = '{identity}'")
        run = runs[0] if runs else self.client.create_run(experiment, None, {tag: identity}, name)
        self.run_id: str = run.info.run_id
        self.client.update_run(self.run_id, "RUNNING")
        # MLflow does not let parameters change: those that a continuation changed keep their value.
        settings = {k: v for k, v in _settings(config).items() if k not in run.data.params}
        parameters = [mlflow.entities.Param(name, str(value)) for name, value in settings.items()]
        for start in range(0, len(parameters), _PARAMETERS):
            self.client.log_batch(self.run_id, params=parameters[start : start + _PARAMETERS])
        history = self.client.get_metric_history(self.run_id, "epoch")
        self.epochs = max((metric.step for metric in history), default=0)

    def log(self, values: Metrics, step: int) -> None:
        """See ``Tracker``."""
        now = int(time.time() * 1000)
        # MLflow refuses @ in names.
        named = {name.replace("@", "_at_"): value for name, value in values.items()}
        metrics = [self.metric(name, value, now, step) for name, value in named.items()]
        self.client.log_batch(self.run_id, metrics)

    def conclude(self, values: Metrics) -> None:
        """See ``Tracker``."""
        self.log(values, self.epochs)

    def end(self, status: str) -> None:
        """See ``Tracker``."""
        self.client.set_terminated(self.run_id, status)


class Tracking(Listener):
    """The tracked runs of one training: none, one or two."""

    def __init__(self) -> None:
        self._trackers: list[Tracker] = []
        self._silent: list[Tracker] = []
        self._log: Sequence[Mapping[str, Any]] = ()
        self._result: Metrics = {}

    def open(self, tracker: type[Tracker], *arguments: Any) -> None:
        """Add a tracked run.

        Raises:
            ConnectionError: with what the library says, if there can be none.
        """
        try:
            with preserved_rng():
                self._trackers.append(tracker(*arguments))
        except Exception as error:  # of the library, of what it sends with, of the system
            raise ConnectionError(
                f"{tracker.key}: {tracker.name} cannot be used, and nothing was trained: {error}"
            ) from error

    def send(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Send the epochs that are not there yet.

        Args:
            log (Sequence): an entry for each epoch so far, as in ``Progress.log``.
        """
        self._log = log
        for tracker in self._trackers:
            if tracker not in self._silent:
                self._attempt(tracker, self._catch_up, "what is missing is sent when training ends")

    def on_epoch(self, entry: Mapping[str, Any], progress: Progress) -> None:
        """See ``Listener``."""
        self.send(progress.log)

    def on_end(self, result: Mapping[str, Any]) -> None:
        """Note the result, which is sent when the block of ``tracked`` ends."""
        self._result = dict(_flat("result", result))

    def end(self, status: str) -> None:
        """Send what is missing, and close."""

        def close(tracker: Tracker) -> None:
            self._catch_up(tracker)
            if self._result:
                tracker.conclude(self._result)
            tracker.end(status)

        for tracker in self._trackers:
            self._attempt(tracker, close, "it may lack what the folder of the run has")

    def _catch_up(self, tracker: Tracker) -> None:
        for step, entry in enumerate(self._log[tracker.epochs :], start=tracker.epochs + 1):
            tracker.log(_values(entry), step)
            tracker.epochs = step

    def _attempt(self, tracker: Tracker, act: Callable[[Tracker], None], consequence: str) -> None:
        try:
            # What a library draws while it waits must not change what is trained.
            with preserved_rng():
                act(tracker)
        except Exception as error:  # a tracker must not lose a training
            self._silent.append(tracker)
            logger.warning(f"{tracker.name}: {error}; {consequence}")


@contextmanager
def tracked(config: Config, folder: Path) -> Iterator[Tracking]:
    """Tracked runs, as the configuration asks, for the training within the block.

    Process 0 of a group has them, the others none.

    Args:
        config (Config): resolved configuration.
        folder (Path): of the run.

    Raises:
        UserError: if a library is missing.
        ConnectionError: if a tracked run cannot be opened.
    """
    check_libraries(config)
    tracking, trackers = Tracking(), _trackers(config)
    for name, value in _PATIENCE.items() if trackers else ():
        os.environ.setdefault(name, value)
    try:
        for tracker in trackers:
            tracking.open(tracker, config, folder.name, _identity(folder))
        yield tracking
    except BaseException as error:
        # A trial that a search gives up has not failed.
        pruned = getattr(sys.modules.get("optuna"), "TrialPruned", ())
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt, pruned))
        tracking.end(KILLED if stopped else FAILED)
        raise
    tracking.end(FINISHED)


def check_libraries(config: Config) -> None:
    """See that what the configuration asks for is installed.

    Raises:
        UserError: with what to install.
    """
    for tracker in _trackers(config):
        try:
            importlib.import_module(tracker.library)
        except ImportError as error:
            raise UserError(
                f"{tracker.key}=True needs {tracker.library} ({error}): "
                f"pip install 'recbole_simdiff[{tracker.library}]'"
            ) from None


def _trackers(config: Config) -> list[type[Tracker]]:
    trackers: tuple[type[Tracker], ...] = (WandB, MLflow) if distributed.rank() == 0 else ()
    return [tracker for tracker in trackers if config[tracker.key]]


def _identity(folder: Path) -> str:
    """What the tracked runs of a run's folder are found by; made when it is first asked for.

    The folder's name would not do: trained anew after it was removed, it is another run.
    """
    path = folder / IDENTITY
    if not path.is_file():
        text = secrets.token_hex(8)
        files.write_text(path, text)
    return path.read_text().strip()


def _settings(config: Config) -> dict[str, Any]:
    plain = config.plain()
    return {"model": plain["model"], "dataset": plain["dataset"], **plain["values"]}


def _values(entry: Mapping[str, Any]) -> Metrics:
    """An epoch's numbers by name: what was trained under its phase, what was validated under valid.

    Phases that follow one another are validated alike, so theirs is one series.
    """
    trained = {f"{entry['phase']}/{k}": v for k, v in (entry["loss"] | entry["monitor"]).items()}
    validated = {f"valid/{k}": v for k, v in entry.get("valid", {}).items()}
    return trained | validated | {k: entry[k] for k in ("epoch", "seconds") if k in entry}


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            # MLflow refuses commas in names.
            plain = key.removeprefix("history ").replace(",", "")
            yield from _flat(f"{name}/{plain}", part)
    elif value is not None:
        yield name, value
