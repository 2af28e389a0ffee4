"""Runs what is missing of an experiment, each run in a process, and records each as one JSON line.

A run's folder is named after everything that shapes its result. So experiments share runs, and an
interrupted run continues from its next step. Tables and figures are made from the lines.
"""

import io
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from recbole_simdiff import files
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.keys import naming
from recbole_simdiff.config.lookup import portable
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.errors import Interrupted, OutOfMemory, TrainingDiverged, UserError
from recbole_simdiff.evaluation.rankings import RANKS
from recbole_simdiff.experiments.checks import check
from recbole_simdiff.experiments.spec import Experiment, RunSpec
from recbole_simdiff.log import logger, terminal
from recbole_simdiff.pipelines.start import start
from recbole_simdiff.runs import record
from recbole_simdiff.runs.identity import digest_of, fingerprint
from recbole_simdiff.runs.result import RESULT, versions
from recbole_simdiff.runs.run import run_once
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.training.progress import Listener, Progress, epoch_line

LINES = "runs.jsonl"
OTHER = "other code of this package or other data"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
# Messages of a run before it ends: number of epochs and the last one's line; a line of output.
EPOCH, LINE = "epoch", "line"
# Bar of a run's epochs. The remaining time is an upper limit, because of early stopping.
BAR = "{desc}{bar:10} {n}/{total} at most {remaining} {postfix}"


@dataclass(frozen=True)
class Planned:
    """A run of an experiment with its configuration.

    Attributes:
        spec (RunSpec): its place in the experiment.
        config (Config): its configuration.
        fingerprint (str): name of its result, see ``runs.identity.fingerprint``.
        data (str): checksum of its data.
    """

    spec: RunSpec
    config: Config
    fingerprint: str
    data: str

    @property
    def run_dir(self) -> Path:
        """Its folder, shared by all experiments that need the same run."""
        name = f"{self.config.name}-{self.config['dataset']}-{self.fingerprint}"
        return Path(self.config["checkpoint_dir"]) / name


def plan(experiment: Experiment) -> list[Planned]:
    """Every run of the experiment. All mistakes are found here, before anything is trained.

    Raises:
        UserError: for the first mistake.
    """
    checksums: dict[str, str] = {}
    planned = []
    for spec, config in check(experiment):
        if config["data_path"] not in checksums:
            checksums[config["data_path"]] = data_checksum(config)
        data = checksums[config["data_path"]]
        portable(config)  # refuses what the process of a run could not find
        planned.append(Planned(spec, config, fingerprint(config, data), data))
    return planned


def data_checksum(config: Config) -> str:
    """Checksum of the data set's atomic files; if missing, they are downloaded where RecBole can.

    Raises:
        UserError: if there are none.
    """
    if not _data_are_here(config):
        create_dataset(config)
    return record.data_checksum(config)


def _data_are_here(config: Config) -> bool:
    return any(Path(config["data_path"]).glob(f"{config['dataset']}.*inter"))


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The newest line of each fingerprint; an incomplete line at the end is ignored.

    Raises:
        UserError: for a line that is not the record of a run.
    """
    lines = {}
    text = path.read_bytes().decode() if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            lines[entry["fingerprint"]] = entry
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number} is not the record of a run") from None
    return lines


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append a line; an incomplete line that a crash left at the end is removed first.

    Args:
        path (Path): file of the lines.
        entry (Mapping): the record of a run; values that JSON can hold.
    """
    with files.exclusive(path), open(path, "a+b") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def execute(planned: list[Planned], path: Path, jobs: int = 1) -> None:
    """Run everything without a finished line. A failed run also writes a line; the others go on.

    Args:
        planned (list): what ``plan`` returned.
        path (Path): file of the lines.
        jobs (int): runs at the same time, each in its own process; they share the processor's cores
            or the GPU.

    Raises:
        UserError: if the file cannot be read or written.
        Interrupted: after a signal; every run has saved its state.
    """
    _check_writable(path)
    lines = read_lines(path)
    missing = {
        p.fingerprint: p
        for p in planned
        if lines.get(p.fingerprint, {}).get("status") != DONE or not (p.run_dir / RANKS).is_file()
    }
    n_finished = len({p.fingerprint for p in planned}) - len(missing)
    recorded = _by_settings(lines)
    repeated = sum(_settings(p.config) in recorded for f, p in missing.items() if f not in lines)
    note = f", {repeated} of them already run with {OTHER}" if repeated else ""
    logger.info(f"{path}: {n_finished} runs are finished, {len(missing)} to do{note}")
    if missing:
        _Pool(list(missing.values()), path, jobs).work()


def _check_writable(path: Path) -> None:
    """Refuse a file of lines that cannot be written, before anything is trained."""
    try:
        with files.exclusive(path), open(path, "ab"):
            pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}: {error.filename}); give another --output"
        ) from None


class _Pool:
    """Runs in at most ``jobs`` processes at a time, with bars on the terminal."""

    def __init__(self, todo: list[Planned], path: Path, jobs: int) -> None:
        # Processes are forked from a server that has imported everything and has no threads.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        self.todo, self.path, self.jobs = todo[::-1], path, min(jobs, len(todo))
        self.stop = StopRequest()
        self.running: dict[Connection, tuple[Planned, Any, tqdm]] = {}
        # disable=None: bars are shown on a terminal only.
        self.total = tqdm(total=len(todo), desc=path.parent.name, unit="run", disable=None)
        self.bars = [
            tqdm(position=i + 1, leave=False, disable=None, bar_format=BAR)
            for i in range(self.jobs)
        ]

    def work(self) -> None:
        with self.stop.listen():
            try:
                self._work()
            finally:
                for bar in (*self.bars, self.total):
                    bar.close()

    def _work(self) -> None:
        stopping = False
        while self.running or (self.todo and self.stop.signum is None):
            while self.todo and len(self.running) < self.jobs and self.stop.signum is None:
                self._start(self.todo.pop())
            for receiver in wait(list(self.running), timeout=0.5):
                assert isinstance(receiver, Connection)
                self._receive(receiver)
            if self.stop.signum is not None and not stopping:
                stopping = True
                for _, process, _ in self.running.values():
                    process.terminate()  # each saves its state and ends
        try:
            self.stop.check(self.path)
        except Interrupted as stop:
            stop.same_command = True
            raise

    def _start(self, planned: Planned) -> None:
        receiver, sender = self.context.Pipe(duplex=False)
        n_cores = max(1, (os.cpu_count() or 1) // self.jobs)
        threads = n_cores if self.jobs > 1 and "OMP_NUM_THREADS" not in os.environ else None
        plain = portable(planned.config)
        work = (plain["model"], plain["dataset"], plain["values"], planned.run_dir, threads, sender)
        process = self.context.Process(target=_work, args=work)
        process.start()
        sender.close()
        bar = self.bars.pop()
        bar.reset(total=planned.config["epochs"])
        bar.set_description_str(f"  {planned.spec}")
        self.running[receiver] = planned, process, bar

    def _receive(self, receiver: Connection) -> None:
        planned, process, bar = self.running[receiver]
        try:
            kind, *contents = receiver.recv()
        except EOFError:  # the process ended without a message
            process.join()
            kind, contents = FAILED, [{"error": f"the process ended with code {process.exitcode}"}]
            if self.stop.signum is not None:  # stopped before it had anything to save
                kind = STOPPED
        if kind == EPOCH:
            bar.n = contents[0]
        if kind in (EPOCH, LINE):
            bar.set_postfix_str(contents[-1])
            return
        process.join()
        receiver.close()
        del self.running[receiver]
        self.bars.append(bar)
        if kind == STOPPED:
            return
        entry = {
            "status": kind,
            "fingerprint": planned.fingerprint,
            "data": planned.data,
            "seed": planned.spec.seed,
            "row": planned.spec.row,
            "swept": planned.spec.swept,
            "jobs": self.jobs,
            "device": str(planned.config["device"]),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        content = contents[0]
        if kind == DONE:
            content = json.loads((planned.run_dir / RESULT).read_text())
            (planned.run_dir / LAST).unlink(missing_ok=True)  # needed to resume only
        else:
            content = {"config": planned.config.plain(), "versions": versions(), **content}
        append_line(self.path, {**entry, **content})
        with tqdm.external_write_mode():
            score = content.get("error") or _score(content)
            logger.info(f"{planned.spec}: {score}")
        self.total.update()


def _score(result: Mapping[str, Any]) -> str:
    name = result["config"]["values"]["valid_metric"].lower()
    parts = [f"{s} {name} {v:.4f}" for s in ("valid", "test") for v in _kept(result[s], name)]
    return f"{', '.join(parts)}, {result['epochs']} epochs in {result['seconds']:.0f} s"


def _kept(split: Mapping[str, Mapping[str, float]], name: str) -> list[float]:
    return [metrics[name] for metrics in list(split.values())[:1]]


# ---------------------------------------------------------------------- in the process of a run


class _Lines(io.TextIOBase):
    """Standard output and error of a run, sent line by line to the experiment."""

    def __init__(self, sender: Connection) -> None:
        self.sender, self.rest = sender, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(None, lines):
            _send(self.sender, (LINE, line))
        return len(text)


class _Epochs(Listener):
    """Each epoch of a run, sent to the experiment."""

    def __init__(self, sender: Connection, config: Config) -> None:
        self.sender, self.config = sender, config

    def on_epoch(self, entry: Mapping[str, Any], progress: Progress) -> None:
        """See ``Listener``."""
        text = epoch_line(self.config, entry, progress)
        _send(self.sender, (EPOCH, progress.epoch, text))


def _send(sender: Connection, message: tuple[Any, ...]) -> None:
    try:
        sender.send(message)
    except OSError:  # the experiment's process has ended: save and stop
        os.kill(os.getpid(), signal.SIGTERM)


def _work(
    model: str,
    dataset: str,
    values: Mapping[str, Any],
    run_dir: Path,
    threads: int | None,
    sender: Connection,
) -> None:
    """The main function of a run's process; its last message is done, failed or stopped."""
    os.setpgid(0, 0)  # Ctrl-C reaches the experiment only, which sends one signal to each run
    sys.stdout = sys.stderr = _Lines(sender)
    if threads:
        torch.set_num_threads(threads)
    message: tuple[str, Any] = (DONE, None)
    try:
        # Before training starts a signal simply ends the process: there is nothing to save yet.
        config = Config(model, dataset, (), values, "experiment")
        with terminal():
            run_once(config, run_dir, start, [_Epochs(sender, config)])
    except (UserError, TrainingDiverged, OutOfMemory, OSError) as error:
        message = (FAILED, {"error": f"{type(error).__name__}: {error}"})
    except Interrupted:
        message = (STOPPED, None)
    except Exception as error:
        message = (
            FAILED,
            {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()},
        )
    sender.send(message)


def collect(planned: list[Planned], path: Path) -> list[tuple[Planned, dict[str, Any]]]:
    """Each run of the experiment that has a line, with this line.

    Args:
        planned (list): what ``plan`` returned.
        path (Path): file of the lines.
    """
    lines = read_lines(path)
    return [(p, lines[p.fingerprint]) for p in planned if p.fingerprint in lines]


def finished(experiment: Experiment, path: Path) -> list[tuple[Planned, dict[str, Any]]]:
    """Each run of the experiment that was finished with the same settings, with its line.

    Tables and figures can so be made again without training. If no line has the current code and
    data, the newest line is used, and a warning says so. Neither data nor run folders are needed.

    Args:
        experiment (Experiment): the experiment.
        path (Path): file of the lines.

    Raises:
        UserError: if the experiment is impossible, or has no such line.
    """
    lines = read_lines(path)
    recorded = _by_settings(lines)
    checksums: dict[str, str] = {}
    collected, n_outdated = [], 0
    for spec, config in check(experiment):
        lines_of_run = recorded.get(_settings(config), [])
        if not lines_of_run:
            continue
        folder, newest = config["data_path"], lines_of_run[-1]
        if folder not in checksums:
            checksums[folder] = data_checksum(config) if _data_are_here(config) else newest["data"]
        current = fingerprint(config, checksums[folder])
        line = next((line for line in lines_of_run if line["fingerprint"] == current), newest)
        n_outdated += line["fingerprint"] != current
        collected.append((Planned(spec, config, line["fingerprint"], line["data"]), line))
    if not collected:
        others = f", only {len(lines)} lines of other settings or seeds" if lines else ""
        raise UserError(
            f"{path} has no finished run of {experiment.name} with its current settings{others}; "
            "train them with benchmark, ablate or sweep"
        )
    if n_outdated:
        logger.warning(
            f"{path}: {n_outdated} of these {len(collected)} runs were made with {OTHER} than now; "
            "repeat them with benchmark, ablate or sweep"
        )
    return collected


def _by_settings(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The finished lines by settings, oldest first."""
    by_settings: dict[str, list[Any]] = {}
    for line in lines.values():
        if line.get("status") == DONE:
            by_settings.setdefault(_settings_key(line["config"]), []).append(line)
    return by_settings


def _settings(config: Config) -> str:
    return _settings_key(config.plain())


def _settings_key(plain: Mapping[str, Any]) -> str:
    """A run's name by its settings only, without code and data as in ``fingerprint``."""
    return digest_of(naming(plain))
