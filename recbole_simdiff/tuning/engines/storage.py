"""A database server that may be away for a while: its calls wait for it. Needs optuna."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import (
    BaseStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
    get_storage,
)
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, ProgrammingError

from recbole_simdiff.log import logger

OUTAGE = 600.0  # seconds that a call waits for the server

PAUSE = 1.0  # seconds between two attempts

_AWAY = (InterfaceError, OperationalError)


def open_storage(url: str, heartbeat: int, silence: int, retries: int) -> Any:
    """Optuna's storage with heartbeats; that of a server waits when the server is away.

    Args:
        url (str): of the database.
        heartbeat (int): seconds between signs of life of a trial.
        silence (int): seconds without one until a trial is repeated.
        retries (int): how often it is repeated.

    Raises:
        Exception: of SQLAlchemy, of its driver, of the system.
    """
    for attempt in range(5):
        try:
            storage = RDBStorage(
                url,
                heartbeat_interval=heartbeat,
                grace_period=silence,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(retries),
            )
            break
        except (IntegrityError, ProgrammingError):  # another machine makes the same tables
            if attempt == 4:
                raise
            time.sleep(PAUSE)
    return (
        storage if storage.engine.dialect.name == "sqlite" else WaitingStorage(get_storage(storage))
    )


class _Waiting:
    """The calls of a storage, each repeated until the server answers.

    Args:
        storage (BaseStorage): Optuna's own, with heartbeats.

    Raises:
        ConnectionError: by a call, and by all that follow, if it has waited for ``OUTAGE``.
    """

    def __init__(self, storage: Any) -> None:
        self._storage, self._lost = storage, ""
        self._answers_since: float | None = time.monotonic()  # None: it does not answer

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set state and values; no error if they were set before the connection was lost."""
        try:
            done: bool = self._call("set_trial_state_values", trial_id, state, values)
            return done
        except UpdateFinishedTrialError:
            stored = self._call("get_trial", trial_id)
            if (stored.state, stored.values) != (state, None if values is None else list(values)):
                raise
            return True

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Running trials without a sign of life; none as long as they cannot all have given one."""
        found: list[int] = self._call("_get_stale_trial_ids", study_id)
        since, interval = self._answers_since, self._storage.get_heartbeat_interval()
        return found if since is not None and time.monotonic() - since >= interval else []

    def _call(self, name: str, *values: Any, **named: Any) -> Any:
        deadline = time.monotonic() + OUTAGE
        while not self._lost:
            try:
                answer = getattr(self._storage, name)(*values, **named)
            except (StorageInternalError, *_AWAY) as error:
                cause = error.__cause__ if isinstance(error, StorageInternalError) else error
                if not isinstance(cause, _AWAY):
                    raise
                self._wait(str(cause.orig).partition("\n")[0], deadline)
                continue
            if self._answers_since is None:
                self._answers_since = time.monotonic()
                logger.warning("the storage answers again")
            return answer
        raise ConnectionError(self._lost)

    def _wait(self, why: str, deadline: float) -> None:
        minutes = f"{OUTAGE / 60:g} minutes"
        if self._answers_since is not None:
            self._answers_since = None
            logger.warning(f"the storage does not answer ({why}); waiting, at most {minutes}")
        if time.monotonic() > deadline:
            self._lost = (
                f"the storage has not answered for {minutes} ({why}). Trials are saved in their "
                "folders; when it answers, the same command goes on"
            )
        time.sleep(PAUSE)


def _waiting(name: str) -> Callable[..., Any]:
    return lambda self, *values, **named: self._call(name, *values, **named)


_NAMES = (BaseStorage.__abstractmethods__ | BaseHeartbeat.__abstractmethods__) - vars(
    _Waiting
).keys()

# Optuna's interface, whatever it consists of in the installed version.
WaitingStorage: Any = type(
    "WaitingStorage",
    (_Waiting, BaseStorage, BaseHeartbeat),
    {name: _waiting(name) for name in _NAMES},
)
