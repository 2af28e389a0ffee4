"""Where a training stands, and who is told about it."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import KEPT, Metrics, protocol_name
from recbole_simdiff.log import logger


@dataclass
class Progress:
    """Where training stands; with the tensors of a checkpoint, all that a resumed run needs."""

    phase: int = 0
    epoch: int = 0
    step: int = 0  # batches of this epoch already trained on
    loss_sums: dict[str, float] = field(default_factory=dict)
    monitor_sums: dict[str, float] = field(default_factory=dict)
    best_score: float | None = None
    best_epoch: int | None = None
    best_result: Metrics = field(default_factory=dict)
    misses: int = 0  # evaluations since the best one
    updates: int = 0  # batches trained on, in all phases
    idle_updates: int = 0  # of them, those since the best evaluation or the phase's beginning
    seconds: float = 0.0
    seconds_before: float = 0.0  # of them, those before this epoch
    log: list[dict[str, Any]] = field(default_factory=list)  # one entry an epoch

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the seconds of the block, also when it is interrupted."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started

    def begin_phase(self, number: int, refine: bool) -> None:
        """Count epochs and misses anew; with ``refine`` the score to beat stays."""
        if not refine:
            self.best_score = None  # the best epoch is one of this phase
        self.phase, self.epoch, self.misses, self.idle_updates = number, 0, 0, 0

    def add_values(self, parts: Metrics, monitor: Metrics) -> None:
        """Add the values of a batch: of its loss parts and of what the model monitors."""
        for sums, values in ((self.loss_sums, parts), (self.monitor_sums, monitor)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value

    def add_step(self) -> None:
        """Count a batch."""
        self.step += 1
        self.updates += 1
        self.idle_updates += 1

    def compare(self, result: Metrics, metric: str, bigger: bool) -> bool:
        """Whether this validation is the best so far; a tie is not.

        Args:
            result (dict): metric -> value.
            metric (str): that is compared.
            bigger (bool): whether more of it is better.
        """
        score = result[metric]
        gain = 0.0 if self.best_score is None else score - self.best_score
        if self.best_score is None or (gain if bigger else -gain) > 0:
            self.best_score, self.best_result = score, result
            self.best_epoch, self.misses, self.idle_updates = self.epoch, 0, 0
            return True
        self.misses += 1
        return False

    def out_of_patience(self, evaluations: int, updates: int) -> bool:
        """Whether so many evaluations and so many updates brought nothing.

        RecBole counts evaluations only: an epoch of user_all has a sixth of the updates of one of
        prefix_last, and so had a sixth of the patience.
        """
        return self.idle_updates >= updates and self.misses >= evaluations

    def entry(self, phase: str) -> dict[str, Any]:
        """What the log says of the epoch that was just trained.

        Args:
            phase (str): name of the phase.
        """

        def means(sums: Metrics) -> Metrics:
            return {name: total / self.step for name, total in sums.items()}

        entry: dict[str, Any] = {"phase": phase, "epoch": self.epoch}
        entry |= {"loss": means(self.loss_sums), "monitor": means(self.monitor_sums)}
        return entry | {"seconds": self.seconds - self.seconds_before, "updates": self.updates}

    def end_epoch(self, entry: dict[str, Any]) -> None:
        """Add the epoch to the log, and begin the next one.

        Args:
            entry (dict): see ``entry``; with ``valid``, where it was validated.
        """
        self.log.append(entry)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sums, self.monitor_sums, self.seconds_before = {}, {}, self.seconds


class Listener:
    """Is told how a training goes. This one does nothing; a listener overrides what it needs."""

    def on_step(self, progress: Progress) -> None:
        """Called after the updates of every batch; it must be fast.

        Args:
            progress (Progress): where training stands; ``step`` counts this batch.
        """

    def on_epoch(self, entry: Mapping[str, Any], progress: Progress) -> None:
        """Called after every epoch, once its state is saved; what it raises ends the training.

        Args:
            entry (Mapping): the epoch in ``progress.log``: ``phase``, ``epoch``, ``loss``,
                ``monitor``, ``seconds``, ``updates`` and, where it was validated, ``valid``.
            progress (Progress): where training stands.
        """

    def on_end(self, result: Mapping[str, Any]) -> None:
        """Called once, after the test.

        Args:
            result (Mapping): name -> number, or such a mapping; None for what there is not.
        """


class OnValidation(Listener):
    """Calls a function with the progress after every epoch that was validated."""

    def __init__(self, call: Callable[[Progress], None]) -> None:
        self.call = call

    def on_epoch(self, entry: Mapping[str, Any], progress: Progress) -> None:
        """See ``Listener``."""
        if "valid" in entry:
            self.call(progress)


class LogLine(Listener):
    """Writes epochs to the log.

    Args:
        config (Config): resolved configuration.
        every (int): epochs for each line.
    """

    def __init__(self, config: Any, every: int = 1) -> None:
        self.config, self.every = config, every

    def on_epoch(self, entry: Mapping[str, Any], progress: Progress) -> None:
        """See ``Listener``."""
        if entry["epoch"] % self.every == 0:
            logger.info(epoch_line(self.config, entry, progress))


def epoch_line(config: Any, entry: Mapping[str, Any], progress: Progress) -> str:
    """An epoch in words: its losses by name, what the model monitors, the validation score.

    Args:
        config (Config): resolved configuration.
        entry (Mapping): see ``Listener.on_epoch``.
        progress (Progress): after the epoch.
    """
    losses = entry["loss"]
    text = f"{entry['phase']} epoch {entry['epoch']:>3}  {entry['updates']:>6} updates  "
    text += f"{entry['seconds']:6.1f}s"
    text += (
        f"  loss {sum(losses.values()):.4f}" if losses else ""
    )  # a model may be computed at once
    if len(losses) > 1:
        text += " = " + " + ".join(f"{k} {v:.4f}" for k, v in losses.items())
    watched = [f"{k} {v:.3f}" for k, v in entry["monitor"].items()]
    text += f" | {', '.join(watched)}" if watched else ""
    if "valid" in entry:
        mode, metric = config["eval_args"]["mode"]["valid"], config["valid_metric"].lower()
        among = "" if mode == "full" else f" ({protocol_name(KEPT, mode)})"
        text += f" | valid {metric} {entry['valid'][metric]:.5f}{among}"
        if progress.misses:
            text += f" (best {progress.best_score:.5f}, epoch {progress.best_epoch})"
    return text


class TensorBoard(Listener):
    """RecBole's scalars under RecBole's names, and every part; epochs run over all phases.

    Args:
        writer (SummaryWriter): RecBole's.
        metric (str): that is validated.
    """

    def __init__(self, writer: Any, metric: str) -> None:
        self.writer, self.metric, self.full = writer, metric, False

    def on_epoch(self, entry: Mapping[str, Any], progress: Progress) -> None:
        """See ``Listener``; a place that takes nothing more must not lose a training."""
        if self.full:
            return
        scalars = {"Loss/Train": sum(entry["loss"].values())}
        scalars |= {f"Train/{name}": v for name, v in (entry["loss"] | entry["monitor"]).items()}
        if "valid" in entry:
            scalars["Vaild_score"] = entry["valid"][self.metric]
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, len(progress.log) - 1)
        except OSError as error:
            self.full = True
            logger.warning(f"TensorBoard: {error.strerror}; no more is written there")


def check_tensorboard() -> None:
    """See that RecBole's trainer can write its TensorBoard files.

    Raises:
        UserError: if there is no place for them.
    """
    folder = Path("log_tensorboard")
    place = folder if folder.exists() else Path()
    writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    if not writable or not shutil.disk_usage(place).free:
        why = "has no room left" if writable else "cannot be written"
        raise UserError(
            f"{folder.absolute()} {why}, and TensorBoard files go there; make room, remove what is "
            "in its place, or start in another folder"
        )
