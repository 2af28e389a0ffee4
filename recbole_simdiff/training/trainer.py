"""RecBole's trainer with named losses, phases, exact resume and listeners."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from recbole_simdiff import checkpoint, distributed
from recbole_simdiff.checkpoint import BEST, LAST, load_model_state
from recbole_simdiff.errors import Interrupted, TrainingDiverged
from recbole_simdiff.evaluation.evaluator import Evaluator
from recbole_simdiff.evaluation.protocols import KEPT, Metrics
from recbole_simdiff.log import logger
from recbole_simdiff.modules.plan import Phase, Update, with_epochs
from recbole_simdiff.modules.random_state import random_states, set_random_states
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.training.loss_values import UnreadLosses
from recbole_simdiff.training.progress import Listener, LogLine, Progress, TensorBoard
from recbole_simdiff.training.settings import FitSettings
from recbole_simdiff.training.state import Resumed, add_resumable, pack
from recbole_simdiff.training.updates import build_optimizers, take_steps, updates_of


class PlanTrainer(Trainer):
    """Trains any ``Trainable`` module phase by phase; never loses work.

    A phase takes one optimiser step a batch or several, each over parameters of its own.

    Differences from RecBole's ``Trainer``: losses keep their names; nothing is saved with a NaN;
    the best epoch is chosen on unrounded values and a tie is no improvement; ``last`` and ``best``
    checkpoints hold tensors and JSON only; evaluation draws nothing from the training's random
    states; SIGINT, SIGTERM and SIGHUP save and stop.

    Args:
        config (Config): resolved configuration.
        model (Trainable): the model, on its device.
        run_dir (Path): folder of this run's checkpoints.
        payload (dict): JSON content that every checkpoint carries, e.g. configuration and id maps.
        data (dict): tensors that every checkpoint carries, e.g. users' histories.
        settings (FitSettings | None): of a model that is no recommender; a recommender's are those
            of the configuration, and it is validated by its rankings.
        phase_epochs (Mapping | None): phase -> epochs, in place of those in the model's plan.

    Attributes:
        evaluator (Evaluator): of the model; RecBole's own is inside it.
        progress (Progress): where training stands.
        losses (UnreadLosses): of the last batches.
    """

    def __init__(
        self,
        config: Any,
        model: Any,
        run_dir: Path,
        payload: dict[str, Any] | None = None,
        data: dict[str, Tensor] | None = None,
        settings: FitSettings | None = None,
        phase_epochs: Mapping[str, int] | None = None,
    ) -> None:
        config = config if settings is None else settings.applied_to(config)
        # RecBole's own W&B logger would hand W&B its Config, which is no dictionary, and open a run
        # for an evaluation, too; and it makes the folder that a checkpoint names, anybody's.
        quiet = copy.copy(config)
        own = {"log_wandb": False, "checkpoint_dir": str(run_dir)}
        quiet.final_config_dict = config.final_config_dict | own
        # RecBole looks first and makes the folder then, where a second process may come between.
        run_dir.mkdir(parents=True, exist_ok=True)
        super().__init__(quiet, model)
        self.config, self.settings = config, settings
        self.run_dir, self.payload, self.data = run_dir, payload or {}, data or {}
        self.saved_model_file = str(run_dir / BEST)
        self.phase_epochs = phase_epochs or {}
        self.progress = Progress()
        self.stop = StopRequest()
        self.losses = UnreadLosses(self.device, self._diverged)
        self._resume_rng: dict[str, Tensor] | None = None
        self.evaluator = Evaluator(config, model, self.device, partial(self.stop.check, run_dir))
        self._listeners: tuple[Listener, ...] = ()
        if distributed.rank() == 0:
            log = LogLine(config, settings.log_every if settings else 1)
            self._listeners = (log, TensorBoard(self.tensorboard, self.valid_metric))
        self._told: tuple[Listener, ...] = self._listeners  # with those of ``fit``
        self._build_optimizers()

    # ------------------------------------------------------------------ fitting

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        show_progress: bool = False,
        listeners: Sequence[Listener] = (),
    ) -> Progress:
        """Run the model's phases from where ``progress`` stands.

        Args:
            train_data (DataLoader): training batches.
            valid_data (DataLoader | None): validation; without it every epoch is run.
            show_progress (bool): a progress bar per epoch, on a terminal.
            listeners (Sequence): are called after every epoch, after the log and TensorBoard.

        Returns:
            Progress: best score and epoch, and the log.

        Raises:
            TrainingDiverged: if a loss is NaN or infinite.
            Interrupted: after such a signal, once the state is saved.
        """
        if self.settings is None:
            validate = self._by_rankings(train_data, valid_data, show_progress)
        else:
            validate = self.settings.validate
        phases = with_epochs(self.model.training_plan(), self.phase_epochs)
        if len(phases) > 1:
            listed = ", ".join(f"{p.name} (at most {p.epochs} epochs)" for p in phases)
            logger.info(f"phases: {listed}")
        self._told = (*self._listeners, *listeners)
        with self.stop.listen():
            if distributed.all_reduce_max(not (self.run_dir / LAST).is_file()):
                self.save_state(LAST)  # so that a run killed in its first epoch can be resumed
            for number in range(self.progress.phase, len(phases)):
                if number > self.progress.phase:
                    self._begin_phase(number, phases[number])
                try:
                    self._fit_phase(phases[number], train_data, validate, show_progress)
                except Interrupted:
                    self.save_state(LAST)
                    raise
        return self.progress

    def _by_rankings(
        self, train_data: Any, valid_data: Any, show_progress: bool
    ) -> Callable[[Metrics], Metrics] | None:
        """What validates a recommender after an epoch; None without validation data."""
        self.evaluator.data_collect(train_data)
        if self.config["train_neg_sample_args"].get("dynamic"):
            train_data.get_model(self.model)
        if not valid_data:
            return None
        return lambda _: self.evaluator.evaluate(valid_data, (KEPT,), show_progress)[KEPT]

    def _begin_phase(self, number: int, phase: Phase) -> None:
        if phase.refine:
            self.load_weights(self.run_dir / BEST)
        self.progress.begin_phase(number, phase.refine)
        before = self.optimizers
        self._build_optimizers()
        if phase.refine and before.keys() == self.optimizers.keys():
            for key, optimizer in self.optimizers.items():
                optimizer.load_state_dict(before[key].state_dict())
        self.save_state(LAST)

    def _updates(self) -> tuple[Update, ...]:
        """Those of the present phase."""
        phase = self.model.training_plan()[self.progress.phase]
        return updates_of(self.model, phase)

    def _build_optimizers(self) -> None:
        """A fresh optimiser for each name among the updates of the present phase."""
        self.optimizers: dict[str, Optimizer] = build_optimizers(
            self._updates(), lambda parameters: self._build_optimizer(params=parameters)
        )
        self.optimizer = next(iter(self.optimizers.values()))  # where RecBole has its only one

    def _fit_phase(
        self,
        phase: Phase,
        train_data: Any,
        validate: Callable[[Metrics], Metrics] | None,
        show_progress: bool,
    ) -> None:
        progress, patience = self.progress, self.config["stopping_updates"]
        validate = validate if phase.evaluate else None
        while progress.epoch < phase.epochs:
            # An epoch that was begun is ended: within it there are more idle updates than before.
            if not progress.step and progress.out_of_patience(self.stopping_step, patience):
                break
            self.model.begin_epoch(phase.name, progress.epoch)
            with progress.timed():
                if phase.fit:
                    phase.fit(train_data._dataset)
                else:
                    self._train_epoch(train_data, progress.epoch, show_progress)
            entry, better = progress.entry(phase.name), validate is None
            if validate and (progress.epoch + 1) % self.eval_step == 0:
                with progress.timed():
                    entry["valid"] = result = validate(entry["loss"])
                better = progress.compare(result, self.valid_metric, self.valid_metric_bigger)
            progress.end_epoch(entry)
            if better:
                self.save_state(BEST)
            self.save_state(LAST)
            for listener in self._told:
                listener.on_epoch(entry, progress)

    def _train_epoch(self, train_data: Any, epoch_idx: int, show_progress: bool = False) -> None:
        """Train on the batches of an epoch that are still to come."""
        self.model.train()
        progress, updates = self.progress, self._updates()
        bar = tqdm(
            self._batches(train_data, epoch_idx, progress.step),
            total=len(train_data),
            initial=progress.step,
            desc=f"epoch {epoch_idx}",
            leave=False,
            disable=None if show_progress else True,
        )
        for batch in bar:
            self._step(batch, updates)
            progress.add_step()
            for listener in self._told:
                listener.on_step(progress)
            if self.losses.due:
                parts = self.losses.read_into(progress)
                bar.set_postfix_str(
                    " ".join(f"{k} {v:.3f}" for k, v in parts.items()), refresh=False
                )
            self.stop.check(self.run_dir)
        self.losses.read_into(progress)

    def _batches(self, train_data: Any, epoch: int, done: int) -> Iterator[Interaction]:
        """The epoch's batches from number ``done`` on, in an order fixed by seed and epoch.

        RecBole's loaders may draw random numbers while they make a batch, so a resumed run passes
        over the batches it has seen, and only then takes up the random states it stopped with.
        """
        if not isinstance(train_data, AbstractDataLoader):
            train_data.set_epoch(epoch)
            batches = map(train_data.collate, train_data.batches()[done:])
        else:
            train_data.generator.manual_seed(train_data.config["seed"] + epoch)
            batches = iter(train_data)
            for _ in range(done):
                next(batches)
        if self._resume_rng is not None:
            set_random_states(self._resume_rng)
            self._resume_rng = None
        yield from batches

    def _step(self, batch: Interaction, updates: tuple[Update, ...]) -> None:
        """See ``take_steps``."""
        batch, step = batch.to(self.device), self.progress.step
        check = partial(self.losses.check, step)
        values = take_steps(self.model, self.config, updates, self.optimizers, batch, check)
        self.losses.add(step, values)
        self.model.end_step()

    def _diverged(self, name: str, value: float, step: int) -> NoReturn:
        remedy = "A smaller learning_rate or clip_grad_norm={max_norm: 1.0} may help"
        raise TrainingDiverged(
            f"loss part {name!r} is {value} at epoch {self.progress.epoch}, step {step}; "
            f"training stopped. {self.run_dir / LAST} holds the last good state. "
            + (remedy if self.settings is None else self.settings.remedy)
        )

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Metrics:
        """RecBole's call: metrics with the history kept in the ranking.

        Args:
            eval_data (DataLoader): validation or test.
            load_best_model (bool): evaluate ``model_file`` or, without it, this run's best epoch.
            model_file (str | None): a checkpoint.
            show_progress (bool): a progress bar, on a terminal.

        Returns:
            dict: metric -> value.
        """
        if load_best_model:
            self.load_weights(Path(model_file or self.saved_model_file))
        return self.evaluator.evaluate(eval_data, (KEPT,), show_progress)[KEPT]

    # ------------------------------------------------------------------ saving and resuming

    def save_state(self, name: str) -> None:
        """Write ``last`` or ``best``: weights, optimiser, random states, progress, payload.

        The random states are those of all processes; the rest is the same for all, and process 0
        writes it.
        """
        self.losses.read_into(self.progress)  # nothing is saved with a loss that is not finite
        states = distributed.all_gather(self._resume_rng or random_states())
        if distributed.rank() == 0:
            tensors, content = pack(self.model, self.progress, self.payload, self.data)
            if name == LAST:
                add_resumable(tensors, content, self.optimizers, states)
            checkpoint.save(self.run_dir / name, tensors, content)
        distributed.barrier()

    def load_weights(self, path: Path) -> None:
        """Put the weights of a checkpoint into the model.

        Raises:
            UserError: if they do not fit.
        """
        tensors, _ = checkpoint.load(path)
        load_model_state(self.model, checkpoint.subset(tensors, "model"), path)

    def resume(self, path: Path) -> None:
        """Continue from a ``last`` checkpoint: the next step is the one that was not taken.

        Raises:
            UserError: if the file is not one, or does not fit.
        """
        stored = Resumed(path)
        stored.load_model(self.model)
        self.progress = stored.progress
        phase = self.progress.phase
        if phase >= len(self.model.training_plan()):
            raise checkpoint.foreign(path, f"its progress.phase is {phase}")
        self._build_optimizers()
        stored.load_optimizers(self.optimizers)
        self._resume_rng = stored.random_states()
