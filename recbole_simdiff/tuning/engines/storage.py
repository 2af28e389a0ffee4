"""A database server that may be away for a while: its calls wait for it. Needs optuna."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Event, current_thread, main_thread
from types import FrameType
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
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.log import logger

try:
    import psycopg
except ImportError:  # another driver, or another kind of database
    psycopg = None  # type: ignore[assignment]

OUTAGE = 600.0  # seconds that a call waits for the server

REFUSAL = 10.0  # seconds that a server which is there may refuse a connection, as one that starts

PAUSE = 1.0  # seconds between two attempts

_AWAY = (InterfaceError, OperationalError)

_ENDS = (ConnectionError, UserError, Interrupted, KeyboardInterrupt)

# Of SQLSTATE: authorization, catalog or schema that is not there; no right, no such table.
_REFUSED_CLASSES, _REFUSED_STATES = ("28", "3D", "3F"), ("42501", "42P01")

# Error numbers of MySQL and MariaDB: access denied (1044, 1045, 1142, 1143, 1227, 1698), no such
# database or table.
_REFUSED_NUMBERS = (1044, 1045, 1049, 1142, 1143, 1146, 1227, 1698)

# What PostgreSQL says, in English, when it has no connection left: that passes.
_FULL = ("too many clients", "too many connections", "connection slots are reserved")


def is_refusal(error: DBAPIError) -> bool:
    """Whether the server says that it will not do this, now or later, by the driver's code."""
    cause = error.orig
    if psycopg is not None and isinstance(cause, psycopg.Error):
        state = cause.sqlstate or ""
        return state[:2] in _REFUSED_CLASSES or state in _REFUSED_STATES
    return cause is not None and bool(cause.args) and cause.args[0] in _REFUSED_NUMBERS


def is_turned_away(error: DBAPIError) -> bool:
    """Whether no connection is made by a server that is there and has one left.

    PostgreSQL's library keeps the SQLSTATE of a failed connection to itself; but it can ask a
    server, without a password, whether it accepts connections. A full one says that it does.
    """
    cause = error.orig
    if psycopg is None or not isinstance(cause, psycopg.OperationalError) or cause.sqlstate:
        return False
    if cause.pgconn is None or cause.pgconn.status == psycopg.pq.ConnStatus.OK:
        return False
    if any(words in str(cause) for words in _FULL):
        return False
    host, port = cause.pgconn.host.decode(), cause.pgconn.port.decode()
    place = psycopg.conninfo.make_conninfo(host=host, port=port, connect_timeout=2)
    return psycopg.pq.PGconn.ping(place.encode()) == psycopg.pq.Ping.OK


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
        except (IntegrityError, ProgrammingError) as error:
            if attempt == 4 or is_refusal(error):
                raise  # else another machine makes the same tables
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
        UserError: likewise, if the server refuses what waiting does not change: the password, the
            database, a right.
        Interrupted: likewise, after a signal that asks to stop and comes while a call waits.
    """

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self._answers_since: float | None = time.monotonic()  # None: it does not answer
        self._turned_away_since: float | None = None
        self._end: BaseException | None = None  # what every call raises
        self._stop: BaseException | None = None  # what ends the next call that would wait
        self._wake = Event()

    def wait_no_more(self, stop: BaseException) -> None:
        """From here on a call that would wait raises ``stop``, also one that waits already."""
        self._stop = stop
        self._wake.set()

    def check(self) -> None:
        """Raise what every call raises, if there is something."""
        if self._end is not None:
            raise self._end

    def record_heartbeat(self, trial_id: int) -> None:
        """A sign of life; in vain and without an error where the storage has ended.

        Optuna calls this in a thread of its own, which would print the error.
        """
        try:
            self._call("record_heartbeat", trial_id)
        except _ENDS as error:
            if error is not self._end:
                raise

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
        attempt = partial(self._attempt, partial(getattr(self._storage, name), *values, **named))
        answer = attempt(deadline)
        if answer is None:
            with self._ended_by_signals():
                while answer is None:
                    self._wake.wait(PAUSE)
                    answer = attempt(deadline)
        return answer[0]

    def _attempt(self, call: Callable[[], Any], deadline: float) -> tuple[Any] | None:
        """The answer, as a tuple of one; None if the call is to be repeated."""
        self.check()
        try:
            answer = call()
        except (StorageInternalError, SQLAlchemyError) as error:
            self.check()  # a signal in mid-call may look like an error of the data base
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            if not isinstance(cause, DBAPIError):
                raise
            verdict = self._verdict(cause, deadline)
            if verdict is not None:
                self._end = self._end or verdict
                raise self._end from None
            if not isinstance(cause, _AWAY):
                raise
            self._say_away(_reason(cause))
            return None
        if self._answers_since is None:
            self._answers_since, self._turned_away_since = time.monotonic(), None
            logger.warning("the storage answers again")
        return (answer,)

    def _verdict(self, error: DBAPIError, deadline: float) -> BaseException | None:
        """What ends the storage after an error; None if the call is to be repeated."""
        now, why = time.monotonic(), _reason(error)
        if not is_turned_away(error):
            self._turned_away_since = None
        elif self._turned_away_since is None:
            self._turned_away_since = now
        since = self._turned_away_since
        if is_refusal(error) or (since is not None and now - since >= REFUSAL):
            return UserError(
                f"the storage refuses this search ({why}). Mend that there, or give another "
                "--storage. Trials are saved in their folders; the same command goes on"
            )
        if isinstance(error, _AWAY) and self._stop is not None:
            return self._stop
        if isinstance(error, _AWAY) and now > deadline:
            return ConnectionError(
                f"the storage has not answered for {OUTAGE / 60:g} minutes ({why}). Trials are "
                "saved in their folders; when it answers, the same command goes on"
            )
        return None

    def _say_away(self, why: str) -> None:
        if self._answers_since is not None:
            self._answers_since = None
            minutes = f"{OUTAGE / 60:g} minutes"
            logger.warning(f"the storage does not answer ({why}); waiting, at most {minutes}")

    @contextlib.contextmanager
    def _ended_by_signals(self) -> Iterator[None]:
        """Within the block a signal ends the storage at once; a training would only take note."""

        def end(signum: int, frame: FrameType | None) -> None:
            stop = Interrupted(signum, Path())
            stop.same_command = True
            self._end = stop
            self.wait_no_more(stop)
            raise stop

        before: dict[int, Any] = {}
        if current_thread() is main_thread():
            for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(asked) != signal.SIG_IGN:
                    before[asked] = signal.signal(asked, end)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _reason(error: DBAPIError) -> str:
    """The first line of what the driver says."""
    return str(error.orig).partition("\n")[0]


def wait_no_more(storage: Any, stop: BaseException) -> None:
    """From here on no call of a storage waits: one that would raises ``stop``."""
    if isinstance(storage, _Waiting):
        storage.wait_no_more(stop)


@contextlib.contextmanager
def told_first(storage: Any) -> Iterator[None]:
    """Within the block, what ended the storage is raised and not what Optuna makes of it."""
    try:
        yield
    except Exception:
        if isinstance(storage, _Waiting):
            storage.check()
        raise


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
