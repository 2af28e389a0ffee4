"""Runs what is missing of an experiment, one process a run, and records one JSON line for each.

A run's folder is named after everything that shapes its result, so experiments share runs, and an
interrupted one goes on where it stopped, to the step. Tables and figures are made of the lines.
"""

import hashlib
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
from tqdm import tqdm

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
from recbole_simdiff.runs.identity import digest_of, fingerprint
from recbole_simdiff.runs.result import RESULT, versions
from recbole_simdiff.runs.run import run_once
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.training.progress import Listener, Progress, epoch_line

LINES = "runs.jsonl"
OTHER = "other code of this package or other data"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
# What a run sends before it ends: how many epochs there are and what the last one brought; a text.
EPOCH, LINE = "epoch", "line"
# Of a run: its epochs; early stopping may end it before the time that is left.
BAR = "{desc}{bar:10} {n}/{total} at most {remaining} {postfix}"


@dataclass(frozen=True)
class Planned:
    """A run that belongs to an experiment: what it is, how it is configured, what it is called."""

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
    """Every run of the experiment; all mistakes are found here, before anything is trained.

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
    """Checksum of the data set's atomic files, which are fetched first if RecBole knows them.

    Raises:
        UserError: if there are none.
    """
    if not _data_are_here(config):
        create_dataset(config)
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(config["data_path"]).glob(f"{config['dataset']}.*")):
        with open(path, "rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _data_are_here(config: Config) -> bool:
    return any(Path(config["data_path"]).glob(f"{config['dataset']}.*inter"))


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Fingerprint -> its newest line. A line that a crash cut off at the end is not one.

    Raises:
        UserError: for a line that is not JSON.
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
    """Add a line; what a crash left of an unfinished one is cut off first."""
    with files.exclusive(path), open(path, "a+b") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def execute(planned: list[Planned], path: Path, jobs: int = 1, show_progress: bool = True) -> None:
    """Run what has no finished line yet; a run that fails leaves a line too, and the rest goes on.

    Args:
        planned (list): what ``plan`` returned.
        path (Path): file of the lines.
        jobs (int): runs at the same time, each in a process of its own; they share the processor's
            cores, or the GPU.
        show_progress (bool): bars on a terminal.

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
    there = len({p.fingerprint for p in planned}) - len(missing)
    made = _by_settings(lines)
    again = sum(_settings(p.config) in made for f, p in missing.items() if f not in lines)
    note = f", {again} of them again, made before by {OTHER}" if again else ""
    logger.info(f"{path}: {there} runs there, {len(missing)} to do{note}")
    if missing:
        _Pool(list(missing.values()), path, jobs, show_progress).work()


def _check_writable(path: Path) -> None:
    """Refuse a place for the lines that cannot be used, before a run has cost anything."""
    try:
        with files.exclusive(path), open(path, "ab"):
            pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}: {error.filename}); give another --output"
        ) from None


class _Pool:
    """At most ``jobs`` processes at a time, and what the terminal shows of them."""

    def __init__(self, todo: list[Planned], path: Path, jobs: int, show_progress: bool) -> None:
        # Forked from a server that has imported everything and started no thread.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        self.todo, self.path, self.jobs = todo[::-1], path, min(jobs, len(todo))
        self.stop = StopRequest()
        self.running: dict[Connection, tuple[Planned, Any, tqdm]] = {}
        hidden = None if show_progress else True
        self.total = tqdm(total=len(todo), desc=path.parent.name, unit="run", disable=hidden)
        self.bars = [
            tqdm(position=i + 1, leave=False, disable=hidden, bar_format=BAR)
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
        asked = False
        while self.running or (self.todo and self.stop.signum is None):
            while self.todo and len(self.running) < self.jobs and self.stop.signum is None:
                self._start(self.todo.pop())
            for receiver in wait(list(self.running), timeout=0.5):
                assert isinstance(receiver, Connection)
                self._receive(receiver)
            if self.stop.signum is not None and not asked:
                asked = True
                for _, process, _ in self.running.values():
                    process.terminate()  # each saves its state and ends
        try:
            self.stop.check(self.path)
        except Interrupted as stop:
            stop.same_command = True
            raise

    def _start(self, planned: Planned) -> None:
        receiver, sender = self.context.Pipe(duplex=False)
        share = max(1, (os.cpu_count() or 1) // self.jobs)
        threads = share if self.jobs > 1 and "OMP_NUM_THREADS" not in os.environ else None
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
        except EOFError:  # the process is gone without a word
            process.join()
            kind, contents = FAILED, [{"error": f"the process ended with code {process.exitcode}"}]
            if self.stop.signum is not None:  # it had nothing to save yet
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
            (planned.run_dir / LAST).unlink(missing_ok=True)  # a finished run is not resumed
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
    except OSError:  # the experiment is gone: save and end
        os.kill(os.getpid(), signal.SIGTERM)


def _work(
    model: str,
    dataset: str,
    values: Mapping[str, Any],
    run_dir: Path,
    threads: int | None,
    sender: Connection,
) -> None:
    """The process of a run; its last message is ``done``, ``failed`` or ``stopped``."""
    os.setpgid(0, 0)  # Ctrl-C reaches the experiment alone, which asks each run to stop, once
    sys.stdout = sys.stderr = _Lines(sender)
    if threads:
        torch.set_num_threads(threads)
    message: tuple[str, Any] = (DONE, None)
    try:
        # A signal that comes before training starts ends a run that has nothing to lose yet.
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
    """Each run of the experiment with its line; runs without one are left out."""
    lines = read_lines(path)
    return [(p, lines[p.fingerprint]) for p in planned if p.fingerprint in lines]


def finished(experiment: Experiment, path: Path) -> list[tuple[Planned, dict[str, Any]]]:
    """Each run of the experiment that was finished with the same settings, with its line.

    So that tables and figures can be made again without the time to train, lines of other code or
    data count where there are none of today's, which a warning says. Neither data nor run folders
    are needed.

    Args:
        experiment (Experiment): the experiment.
        path (Path): file of the lines.

    Raises:
        UserError: if the experiment is impossible, or has no such line.
    """
    lines = read_lines(path)
    made = _by_settings(lines)
    checksums: dict[str, str] = {}
    found, other = [], 0
    for spec, config in check(experiment):
        lines_of_run = made.get(_settings(config), [])
        if not lines_of_run:
            continue
        place, newest = config["data_path"], lines_of_run[-1]
        if place not in checksums:
            checksums[place] = data_checksum(config) if _data_are_here(config) else newest["data"]
        today = fingerprint(config, checksums[place])
        line = next((line for line in lines_of_run if line["fingerprint"] == today), newest)
        other += line["fingerprint"] != today
        found.append((Planned(spec, config, line["fingerprint"], line["data"]), line))
    if not found:
        others = f", only {len(lines)} lines of other settings or seeds" if lines else ""
        raise UserError(
            f"{path} has no finished run of {experiment.name} as it is now{others}; benchmark, "
            "ablate or sweep makes them"
        )
    if other:
        logger.warning(
            f"{path}: {other} of these {len(found)} runs were made by {OTHER} than there are now; "
            "benchmark, ablate or sweep makes them anew"
        )
    return found


def _by_settings(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The finished lines by settings, in their order."""
    found: dict[str, list[Any]] = {}
    for line in lines.values():
        if line.get("status") == DONE:
            found.setdefault(_settings_key(line["config"]), []).append(line)
    return found


def _settings(config: Config) -> str:
    return _settings_key(config.plain())


def _settings_key(plain: Mapping[str, Any]) -> str:
    """What names a run but for code and data, see ``fingerprint``."""
    return digest_of(naming(plain))
