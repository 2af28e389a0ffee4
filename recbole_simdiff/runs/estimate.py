"""Memory and seconds of a run before it starts, from a few of its steps."""

import itertools
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.loaders import BucketLoader
from recbole_simdiff.errors import UserError, explained_out_of_memory
from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.log import logger
from recbole_simdiff.modules.plan import Phase, with_epochs
from recbole_simdiff.runs.best_epochs import best_epochs
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.runs.item_table import install_item_table
from recbole_simdiff.runs.result import peak_memory_mb
from recbole_simdiff.training.progress import Listener, Progress
from recbole_simdiff.training.trainer import PlanTrainer

STEPS = 21  # timed of each phase
WARM_UP = 3  # steps that are not timed: the first ones allocate
GROUP = 3  # steps of similar size, of whose times the median counts

SOON = 2.0  # seconds of a run's own steps after which it is told what an epoch will cost,
ENOUGH = 12  # if there were so many,
LATEST = 15.0  # or after so many seconds
WORTH_TELLING = 10.0  # seconds of a whole training

MakeBatch = Callable[[], Interaction]


class PhaseEstimate(NamedTuple):
    """What one phase of the training costs.

    Attributes:
        name (str): of the phase.
        epochs (int): at most this many.
        steps (int): batches of an epoch; 1 for a model that is computed at once.
        step_seconds (float): of a batch of average size.
        validations (float): number of them in an epoch; 0 for a phase without validation.
    """

    name: str
    epochs: int
    steps: int
    step_seconds: float
    validations: float


class Estimate(NamedTuple):
    """What a run will cost on this machine, as busy as it is now.

    Attributes:
        parameters (int): of the model.
        data_seconds (float): reading and filtering the data, building the model.
        validation_seconds (float): of one validation; 0 without validation data.
        save_seconds (float): of writing the state after an epoch.
        phases (list): in order.
        memory_mb (float): largest resident set of the process, MiB.
        gpu_memory_mb (float): most memory that tensors take on a GPU, MiB; 0 without one.
    """

    parameters: int
    data_seconds: float
    validation_seconds: float
    save_seconds: float
    phases: list[PhaseEstimate]
    memory_mb: float
    gpu_memory_mb: float

    def epoch_seconds(self, phase: PhaseEstimate) -> float:
        """Training and validation of one epoch of a phase."""
        return phase.steps * phase.step_seconds + phase.validations * self.validation_seconds

    @property
    def seconds(self) -> float:
        """Training and validation of all epochs; less where training stops early.

        What ``RunResult.seconds`` counts.
        """
        return sum(phase.epochs * self.epoch_seconds(phase) for phase in self.phases)


def estimate(config: Config, steps: int = STEPS) -> Estimate:
    """Build the run, take a few steps of each phase, validate once and save once; keep nothing.

    Args:
        config (Config): resolved configuration.
        steps (int): steps of each phase that are timed, of batches of all sizes.

    Returns:
        Estimate: its memory is that of this process so far, so call it in a fresh one.

    Raises:
        UserError: if data or settings cannot be used, or the method trains in several runs.
        OutOfMemory: if the run would need more memory than there is.
    """
    if config.wraps:
        raise UserError(
            f"model={config.name} trains in several runs; estimate its backbone, "
            f"--model={config.model_class.__name__}"
        )
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    with tempfile.TemporaryDirectory() as folder, explained_out_of_memory(config):
        started = time.perf_counter()
        dataset, train_data, valid_data, _, model = build_run(config)
        install_item_table(config, dataset, model)
        data_seconds = time.perf_counter() - started
        trainer = PlanTrainer(config, model, Path(folder), data=dataset.histories())
        trainer.evaluator.data_collect(train_data)
        plan = model.training_plan()
        phases = [
            _phase(trainer, number, phase, train_data, valid_data, steps)
            for number, phase in enumerate(with_epochs(plan, best_epochs(config, plan)))
        ]
        validation = _seconds(lambda: trainer.evaluator.evaluate(valid_data, (KEPT,)), valid_data)
        saving = _seconds(lambda: trainer.save_state(LAST))
    gpu = torch.cuda.max_memory_allocated() / 2**20
    parameters = sum(p.numel() for p in model.parameters())
    return Estimate(parameters, data_seconds, validation, saving, phases, peak_memory_mb(), gpu)


def _phase(
    trainer: PlanTrainer, number: int, phase: Phase, train_data: Any, valid_data: Any, steps: int
) -> PhaseEstimate:
    """Time some steps of a phase, with optimisers of its own."""
    config, model = trainer.config, trainer.model
    validated = phase.evaluate and valid_data
    validations = 1 / trainer.eval_step if validated else 0.0
    trainer.progress.phase = number
    trainer._build_optimizers()
    model.begin_epoch(phase.name, 0)
    if phase.fit is not None:
        fit = phase.fit
        seconds = _seconds(lambda: fit(train_data._dataset))
        return PhaseEstimate(phase.name, phase.epochs, 1, seconds, validations)
    if config["train_neg_sample_args"].get("dynamic"):
        train_data.get_model(model)
    model.train()
    updates = trainer._updates()
    warm_up, batches = _sample(train_data, steps)

    def take(make: MakeBatch) -> None:
        trainer._step(make(), updates)
        trainer.losses.read_into(trainer.progress)  # so that the device has nothing left to do

    for make in warm_up:
        take(make)
    times = [_seconds(partial(take, make)) for make in batches]
    return PhaseEstimate(
        phase.name, phase.epochs, len(train_data), step_seconds(times), validations
    )


def step_seconds(times: Sequence[float]) -> float:
    """Seconds of a step of average size: the mean over groups of their medians.

    A step that the machine held up does not count so.

    Args:
        times (Sequence): of steps on batches of all sizes, the smallest first.
    """
    groups = (times[i : i + GROUP] for i in range(0, len(times), GROUP))
    return statistics.fmean(statistics.median(group) for group in groups)


def batch_sizes(train_data: Any) -> list[int]:
    """Tokens of each batch of an epoch, in order; 1 for each where all are padded to one size."""
    if not isinstance(train_data, BucketLoader):
        return [1] * len(train_data)
    return [train_data.n_tokens(rows) for rows in train_data.batches()]


def _sample(train_data: Any, n: int) -> tuple[list[MakeBatch], list[MakeBatch]]:
    """What makes the batches that are not timed, the largest among them, and those that are."""
    if not isinstance(train_data, BucketLoader):  # RecBole's loader pads all batches to one size
        endless = itertools.chain.from_iterable(itertools.repeat(train_data))
        n = min(n, len(train_data))
        return [lambda: next(endless)] * WARM_UP, [lambda: next(endless)] * n
    order = sorted(train_data.batches(), key=train_data.n_tokens)
    n = min(n, len(order))
    places = [(2 * i + 1) * len(order) // (2 * n) for i in range(n)]  # all sizes, evenly

    def makers(indices: list[Tensor]) -> list[MakeBatch]:
        return [partial(train_data.collate, rows) for rows in indices]

    return makers(order[-1:] * WARM_UP), makers([order[place] for place in places])


def epoch_seconds(times: Sequence[float], sizes: Sequence[int], first: int) -> float:
    """Seconds of all steps of an epoch, from some: a fixed part and one for each token.

    Batches of long rows take several times as long as those of short ones.

    Args:
        times (Sequence): of the steps from number ``first`` on.
        sizes (Sequence): tokens of each batch of the epoch.
        first (int): number of steps before.
    """
    done = sizes[first : first + len(times)]
    time_of_mean, mean = statistics.fmean(times), statistics.fmean(done)
    slope = 0.0
    if len(set(done)) > 1:
        slope = statistics.linear_regression(done, times).slope
        slope = min(max(slope, 0.0), time_of_mean / mean)  # neither part is below 0
    return len(sizes) * (time_of_mean - slope * mean) + slope * sum(sizes)


class FirstEstimate(Listener):
    """Logs what a training will cost, from its own first steps and epoch, so that it costs nothing.

    Args:
        phases (Sequence): of the training; the first one is estimated.
        sizes (Sequence): tokens of each batch of the first epoch, in order.
    """

    def __init__(self, phases: Sequence[Phase], sizes: Sequence[int]) -> None:
        self._phase, self._sizes = phases[0], sizes
        self._times: list[float] = []
        self._name = f" of phase {phases[0].name}" if len(phases) > 1 else ""
        self._began = time.monotonic()
        self._waits = True

    @staticmethod
    def is_due(config: Config, run_dir: Path) -> bool:
        """Whether there is no other run of this model on this data set beside the folder."""
        name = re.compile(
            rf"{re.escape(config.name)}-{re.escape(config['dataset'])}-\d{{8}}-\d{{6}}-"
        )
        return not any(name.match(p.name) for p in run_dir.parent.iterdir() if p != run_dir)

    def on_step(self, progress: Progress) -> None:
        """See ``Listener``; the first steps only start the clock."""
        if not self._waits:
            return
        began, self._began = self._began, time.monotonic()
        if progress.step <= WARM_UP:
            return
        self._times.append(self._began - began)
        seconds = sum(self._times)
        if seconds >= SOON and (len(self._times) >= ENOUGH or seconds >= LATEST):
            self._waits = False
            epoch, n = epoch_seconds(self._times, self._sizes, WARM_UP), len(self._sizes)
            self._tell(epoch, f" without validation: {n:,} steps of {epoch / n:.3f} s")

    def on_epoch(self, entry: Mapping[str, Any], progress: Progress) -> None:
        """See ``Listener``; what is left to come is known best after the first epoch."""
        if len(progress.log) == 1 < self._phase.epochs and self._phase.fit is None:
            with_validation = " and its validation" if "valid" in entry else ""
            memory = f"; peak memory {peak_memory_mb() / 1024:.2f} GiB"
            self._tell(progress.seconds, f"{with_validation}{memory}")
        self._waits = False

    def _tell(self, epoch: float, what: str) -> None:
        whole = epoch * self._phase.epochs
        if whole >= WORTH_TELLING:
            logger.info(
                f"estimate: {duration(epoch)} an epoch{what}; at most {self._phase.epochs:,} "
                f"epochs{self._name}, {duration(whole)}; early stopping may end it sooner"
            )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _seconds(work: Callable[[], Any], needed: Any = True) -> float:
    """Seconds that ``work`` takes, computations on a GPU included; 0 if it is not needed."""
    if not needed:
        return 0.0
    started = time.perf_counter()
    work()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started
