"""A search whose trials are in a database server, which several machines share and which fails."""

import contextlib
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.log import logger
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.tuning.engines import optuna as engine
from recbole_simdiff.tuning.engines import storage as storage_module
from recbole_simdiff.tuning.engines.storage import WaitingStorage, open_storage, told_first
from tests.conftest import SMALL

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
]

SCRIPT = Path(__file__).resolve().parents[2] / "run_recbole_simdiff.py"


# ---------------------------------------------------------------- without a server


def away() -> StorageInternalError:
    """What Optuna raises when its server is away."""
    error = StorageInternalError("in a commit")
    error.__cause__ = OperationalError("SELECT 1", {}, Exception("connection refused\nhint"))
    return error


class Failing:
    """A storage whose next calls fail before or after they have done their work."""

    def __init__(self, storage: Any) -> None:
        self.storage, self.before, self.after, self.error = storage, 0, 0, away()

    def __getattr__(self, name: str) -> Any:
        def call(*values: Any, **named: Any) -> Any:
            if self.before:
                self.before -= 1
                raise self.error
            answer = getattr(self.storage, name)(*values, **named)
            if self.after:
                self.after -= 1
                raise self.error
            return answer

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that only waiting moves; the number of waits."""
    clock = SimpleNamespace(now=0.0, sleeps=0)

    def wait(seconds: float) -> None:
        clock.now += seconds
        clock.sleeps += 1

    monkeypatch.setattr(storage_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(
        storage_module, "Event", lambda: SimpleNamespace(wait=wait, set=lambda: None)
    )
    return clock


@pytest.fixture
def failing(tmp_path: Path) -> Failing:
    """A file with heartbeats that can be made to fail."""
    return Failing(open_storage(f"sqlite:///{tmp_path / 'study.db'}", 30, 120, 2))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_call_waits_for_the_server_and_is_done_once(
    failing: Failing, clock: SimpleNamespace, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    study = optuna.create_study(storage=WaitingStorage(failing))
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    with caplog.at_level("WARNING", logger.name):
        setattr(failing, when, 3)
        trial.report(0.5, step=1)
        setattr(failing, when, 3)
        study.tell(trial, 0.25)
    assert clock.sleeps == 6
    (stored,) = study.trials
    assert (stored.state, stored.value) == (TrialState.COMPLETE, 0.25)
    assert stored.intermediate_values == {1: 0.5}
    said = [text for name, _, text in caplog.record_tuples if name == logger.name]
    assert said == 2 * [
        "the storage does not answer (connection refused); waiting, at most 10 minutes",
        "the storage answers again",
    ]


def test_a_finished_trial_cannot_be_finished_otherwise(
    failing: Failing, clock: SimpleNamespace
) -> None:
    waiting = WaitingStorage(failing)
    study = optuna.create_study(storage=waiting)
    trial = study.ask()
    study.tell(trial, 0.25)
    with pytest.raises(UpdateFinishedTrialError):
        waiting.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def test_no_call_waits_for_ever(failing: Failing, clock: SimpleNamespace) -> None:
    """The trial that was under way is not told either; else each call would wait in its turn."""
    study = optuna.create_study(storage=WaitingStorage(failing))
    trial = study.ask()
    failing.before = 10**6
    with pytest.raises(ConnectionError, match=r"has not answered for 10 minutes \(connection"):
        trial.report(0.5, step=1)
    assert 600 <= clock.now <= 603
    with pytest.raises(ConnectionError, match="the same command goes on"):
        study.tell(trial, 0.5)
    assert clock.now <= 603


def test_other_errors_are_not_waited_out(failing: Failing, clock: SimpleNamespace) -> None:
    waiting = WaitingStorage(failing)
    with pytest.raises(KeyError):
        waiting.get_study_id_from_name("unknown")
    assert clock.sleeps == 0


def refused(driver_error: Exception, kind: Any = OperationalError) -> StorageInternalError:
    """What Optuna raises when its server refuses a statement."""
    error = StorageInternalError("in a commit")
    error.__cause__ = kind("SELECT 1", {}, driver_error)
    return error


def by_psycopg(state: str) -> Exception:
    psycopg = pytest.importorskip("psycopg")
    error: Exception = psycopg.errors.lookup(state)(f"state {state}")
    return error


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: by_psycopg("28P01"), OperationalError),  # wrong password
        (lambda: by_psycopg("28000"), OperationalError),  # the role may not log in
        (lambda: by_psycopg("3D000"), OperationalError),  # no such database
        (lambda: by_psycopg("42501"), ProgrammingError),  # no right to the table
        (lambda: by_psycopg("42P01"), ProgrammingError),  # no such table
        (lambda: Exception(1045, "Access denied"), OperationalError),  # as drivers of MySQL
        (lambda: Exception(1142, "SELECT command denied"), OperationalError),
    ],
)
def test_what_stays_refused_is_not_waited_for(
    failing: Failing, clock: SimpleNamespace, make: Any, kind: Any
) -> None:
    storage = WaitingStorage(failing)
    trial = optuna.create_study(storage=storage).ask()
    failing.before, failing.error = 1, refused(make(), kind)
    with pytest.raises(UserError, match=r"the storage refuses this search \(.*\)\. Mend that"):
        trial.report(0.5, step=1)
    with pytest.raises(UserError, match="the storage refuses this search"):
        trial.report(0.5, step=1)
    storage.record_heartbeat(trial._trial_id)  # in a thread of its own, where nobody would catch it
    assert clock.sleeps == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: by_psycopg("57P01"),  # the server is shut down
        lambda: by_psycopg("53300"),  # too many connections
        lambda: by_psycopg("40001"),  # transactions at the same time
        lambda: Exception(2003, "Can't connect to MySQL server"),
        lambda: Exception(1040, "Too many connections"),
    ],
)
def test_what_passes_is_waited_for(failing: Failing, clock: SimpleNamespace, make: Any) -> None:
    study = optuna.create_study(storage=WaitingStorage(failing))
    trial = study.ask()
    failing.before, failing.error = 3, refused(make())
    trial.report(0.5, step=1)
    assert clock.sleeps == 3
    assert study.trials[0].intermediate_values == {1: 0.5}


def test_a_search_ends_with_what_ended_its_storage(
    failing: Failing, clock: SimpleNamespace
) -> None:
    """Optuna itself ends with an error of its own where it cannot read the failed trial."""
    study = optuna.create_study(storage=WaitingStorage(failing))

    def objective(trial: Any) -> float:
        failing.before, failing.error = 10**6, refused(Exception(1045, "Access denied"))
        trial.report(0.5, step=1)
        return 0.5

    with pytest.raises(UserError, match="Access denied"), told_first(study._storage):
        study.optimize(objective, n_trials=1, catch=(UserError,))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_waits_at_once(failing: Failing, signum: signal.Signals) -> None:
    """Also one that a training would take note of, and the thread of the heartbeats."""
    study = optuna.create_study(storage=WaitingStorage(failing))

    def objective(trial: Any) -> float:
        failing.before = 10**6
        Timer(0.3, os.kill, (os.getpid(), signum)).start()
        with StopRequest().listen():
            trial.report(0.5, step=1)
        return 0.5

    begun, handler = time.monotonic(), signal.getsignal(signum)
    with pytest.raises(Interrupted) as stopped, told_first(study._storage):
        study.optimize(objective, n_trials=1)
    assert time.monotonic() - begun < 10
    assert (stopped.value.signum, stopped.value.same_command) == (signum, True)
    assert signal.getsignal(signum) == handler
    with pytest.raises(Interrupted):
        study.get_trials()


def test_after_a_signal_no_call_waits(failing: Failing, clock: SimpleNamespace) -> None:
    """It came during the training: its trial is noted if the server is there, else it is not."""
    study = optuna.create_study(storage=WaitingStorage(failing))
    study.ask()
    stop = Interrupted(signal.SIGINT, Path())
    storage_module.wait_no_more(study._storage, stop)
    study.enqueue_trial({})
    failing.before = 10**6
    with pytest.raises(Interrupted) as stopped:
        study.enqueue_trial({})
    assert stopped.value is stop
    assert clock.sleeps == 0


def test_nobody_is_declared_dead_before_he_could_speak(
    failing: Failing, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the server was away every trial has been silent for as long."""
    monkeypatch.setattr(failing.storage, "_get_stale_trial_ids", lambda study: [7])
    waiting = WaitingStorage(failing)
    assert waiting._get_stale_trial_ids(1) == []
    clock.now = 31
    assert waiting._get_stale_trial_ids(1) == [7]
    failing.before = 2
    assert waiting._get_stale_trial_ids(1) == []
    clock.now += 29
    assert waiting._get_stale_trial_ids(1) == []
    clock.now += 2
    assert waiting._get_stale_trial_ids(1) == [7]


def test_a_file_is_used_as_it_is(failing: Failing) -> None:
    assert type(failing.storage) is optuna.storages.RDBStorage


def test_of_trials_begun_at_the_same_time_the_later_one_is_surplus() -> None:
    study = optuna.create_study()
    search = SimpleNamespace(trials=2, values=dict, bigger=True)
    study.ask()
    study.ask()
    study.ask()
    study.enqueue_trial({})
    study.ask()
    found = [engine._is_surplus(search, study, number) for number in range(4)]  # type: ignore[arg-type]
    assert found == [False, False, True, False]
    study.tell(0, state=TrialState.FAIL)  # interrupted
    assert not engine._is_surplus(search, study, 2)  # type: ignore[arg-type]


# ---------------------------------------------------------------- with one


class Server:
    """A PostgreSQL server in a temporary folder; as root it runs as the user postgres."""

    def __init__(self, programs: Path, folder: Path, user: str | None) -> None:
        self.programs, self.folder, self.user = programs, folder, user
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql+psycopg://search@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-D", "data", "-U", "search", "--auth=trust", "--no-sync")
        self.process: subprocess.Popen[bytes] | None = None

    def _run(self, program: str, *arguments: str) -> None:
        place = {"cwd": self.folder, "user": self.user, "extra_groups": [] if self.user else None}
        subprocess.run(
            [self.programs / program, *arguments], check=True, capture_output=True, **place
        )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        for _ in range(60):
            self.process = subprocess.Popen(
                [self.programs / "postgres", "-D", "data", "-p", str(self.port), "-k", ""],
                cwd=self.folder,
                user=self.user,
                extra_groups=[] if self.user else None,
                stderr=subprocess.DEVNULL,
            )
            while self.process.poll() is None:
                with contextlib.suppress(subprocess.CalledProcessError):
                    self._run("pg_isready", "-h", "127.0.0.1", "-p", str(self.port))
                    return
                time.sleep(0.2)
            time.sleep(0.5)  # the processes of a killed one are still there
        raise AssertionError("the server does not start")

    def kill(self) -> None:
        """As when its machine loses power."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'recbole_simdiff[postgres]'")
    known = [*glob.glob("/usr/lib/postgresql/*/bin/initdb"), shutil.which("initdb")]
    found = next(filter(None, known), None)
    if found is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        user = None
        if os.getuid() == 0:  # as whom PostgreSQL refuses to run
            user = "postgres"
            shutil.chown(name, user)
        server = Server(Path(found).parent, Path(name), user)
        server.start()
        yield server
        server.kill()
        time.sleep(1)


def test_a_server_that_turns_away_is_not_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL's library has no code for a connection that fails, but can ask the server."""
    monkeypatch.setattr(storage_module, "REFUSAL", 2.0)
    url = server.url.replace("search@", "low@")
    owner = create_engine(server.url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.execute(text("CREATE ROLE low LOGIN"))
        with pytest.raises(ProgrammingError, match="permission denied"):
            open_storage(url, 30, 120, 2)
        connection.execute(text("GRANT CREATE ON SCHEMA public TO low"))
        storage = open_storage(url, 30, 120, 2)
        study = optuna.create_study(storage=storage)
        connection.execute(text("ALTER ROLE low CONNECTION LIMIT 0"))
        with pytest.raises(OperationalError, match="too many connections") as full:
            open_storage(url, 30, 120, 2)
        assert not storage_module.is_turned_away(full.value)  # another one may end
        connection.execute(text("ALTER ROLE low NOLOGIN"))
        connection.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'low'")
        )
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"refuses this search .*not permitted to log in"):
            study.ask()
        assert time.monotonic() - begun < 30
    with pytest.raises(OperationalError, match='database "nowhere" does not exist'):
        open_storage(server.url.replace("/postgres", "/nowhere"), 30, 120, 2)


@pytest.mark.slow
def test_the_server_fails_in_mid_search_and_no_trial_is_lost_or_trained_twice(
    server: Server, tmp_path: Path, data_path: Path
) -> None:
    """Two machines, which share the server alone: each writes to a folder of its own."""
    (tmp_path / "my.hyper").write_text(
        "learning_rate loguniform -7,-3\nhidden_dropout_prob uniform 0,0.5\n"
    )
    values = SMALL | {"data_path": str(data_path), "epochs": 30, "stopping_step": 30}
    del values["train_batch_size"]
    keys = ("k_noise", "diffusion_steps", "reverse_steps", "p_uncond")
    given = [f"--{key}={value}" for key, value in values.items() if key not in keys]
    given += ["--model=SASRecCE", "--dataset=toy", "--trials=8", "--no_pruning"]
    given += [f"--space={tmp_path / 'my.hyper'}", f"--storage={server.url}"]
    machines = []
    for name in ("one", "other"):
        command = [
            sys.executable,
            SCRIPT,
            "tune",
            *given,
            f"--output={tmp_path / name}",
        ]
        with open(tmp_path / f"{name}.log", "w") as log:
            machines.append(subprocess.Popen(command, stdout=log, stderr=log))
    watched(server, finished=2)
    server.kill()
    assert all(machine.poll() is None for machine in machines)
    time.sleep(5)
    server.start()
    ended = [machine.wait(timeout=300) for machine in machines]
    outputs = [(tmp_path / f"{name}.log").read_text() for name in ("one", "other")]
    assert ended == [0, 0], outputs

    # Also in the log of the trial that was under way.
    logs = "".join(path.read_text() for path in tmp_path.glob("**/*.log"))
    assert "the storage does not answer" in logs
    assert "the storage answers again" in logs
    study = loaded(server)
    trials = study.trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 8
    runs = [trial.user_attrs["run"] for trial in trials]
    assert len(set(runs)) == 8
    places = [path.parent.name for path in tmp_path.glob("*/tune-*/trials/*/result.json")]
    assert set(places) == set(runs)
    best = study.best_trial.user_attrs["run"]  # which the machine without its weights trains again
    assert sorted(places) == sorted([*runs, best])
    for name in ("one", "other"):
        (table,) = (tmp_path / name).glob("tune-*/trials.csv")
        assert len(table.read_text().splitlines()) == 9


def loaded(server: Server) -> Any:
    """The study of the server."""
    (name,) = optuna.get_all_study_names(server.url)
    return optuna.load_study(study_name=name, storage=server.url)


def watched(server: Server, finished: int) -> None:
    """Wait until so many trials are finished and another one is running."""
    for _ in range(1000):
        with contextlib.suppress(Exception):  # it is not there yet
            states = [trial.state for trial in loaded(server).trials]
            if states.count(TrialState.COMPLETE) >= finished and TrialState.RUNNING in states:
                return
        time.sleep(0.2)
    raise AssertionError("no trials")
