"""RecBole's trainer with named losses, exact resume and evaluation on both protocols."""

import copy
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import init_seed
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from recbole_simdiff import checkpoint, distributed
from recbole_simdiff.checkpoint import (
    BEST,
    LAST,
    _foreign_optimizer,
    load_model_state,
    load_optimizer_state,
    optimizer_state,
)
from recbole_simdiff.errors import Interrupted, TrainingDiverged, UserError
from recbole_simdiff.evaluation.collector import TargetCollector
from recbole_simdiff.evaluation.coverage import COVERAGE
from recbole_simdiff.evaluation.protocols import KEPT, PROTOCOLS, REMOVED, Metrics, protocol_name
from recbole_simdiff.modules.batch import PSEUDO_LENGTH
from recbole_simdiff.modules.plan import Phase, Update
from recbole_simdiff.modules.random_state import _get_rng, _set_rng, preserved_rng
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.training.progress import Progress


class Evaluation(NamedTuple):
    """Metrics of a split, and what they were made of.

    Attributes:
        metrics (dict): protocol -> metric -> unrounded value.
        by_length (dict): input length, such as "6-20", -> metrics with the history kept, and
            ``rows``, how many there are. Empty groups are left out.
        rows (dict): with ``save_rankings``, by row: ``user``, ``item`` (the target), ``length``
            (real items of the input), and by protocol ``rank`` of the target, from 1, [rows], and
            ``list``, the items ranked first, 0 after the last one, [rows, K]:
            ``rows["rank", protocol]``.
    """

    metrics: dict[str, Metrics]
    by_length: dict[str, Metrics]
    rows: dict[Any, Tensor]


class PlanTrainer(Trainer):
    """Trains any sequential model phase by phase; never loses work.

    A phase takes one optimiser step a batch or several, each over parameters of its own.

    Differences from RecBole's ``Trainer``: losses keep their names; a NaN stops at its step; the
    best epoch is chosen on unrounded values and a tie is no improvement; ``last`` and ``best``
    checkpoints hold tensors and JSON only; evaluation draws nothing from the training's random
    states; SIGINT, SIGTERM and SIGHUP save and stop.

    Args:
        config (Config): resolved configuration.
        model (SequentialRecommender): the model, on its device.
        run_dir (Path): folder of this run's checkpoints.
        payload (dict): JSON content that every checkpoint carries, e.g. configuration and id maps.
        data (dict): tensors that every checkpoint carries, e.g. users' histories.
        report (Callable | None): called with the progress after every evaluation, once the state is
            saved; what it raises ends the training.
    """

    def __init__(
        self,
        config: Any,
        model: Any,
        run_dir: Path,
        payload: dict[str, Any] | None = None,
        data: dict[str, Tensor] | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        # RecBole's own W&B logger would hand W&B its Config, which is no dictionary, and open a run
        # for an evaluation, too; and it makes the folder that a checkpoint names, anybody's.
        quiet = copy.copy(config)
        own = {"log_wandb": False, "checkpoint_dir": str(run_dir)}
        quiet.final_config_dict = config.final_config_dict | own
        super().__init__(quiet, model)
        self.config = config
        self.run_dir, self.payload, self.data = run_dir, payload or {}, data or {}
        self.report = report
        self.saved_model_file = str(run_dir / BEST)
        self.progress = Progress()
        self.stop = StopRequest()
        self.item_tensor: Any = None
        self._resume_rng: dict[str, Tensor] | None = None
        measures = self.evaluator.metric_class
        measures |= {name: one(config) for name, one in COVERAGE.items() if name in measures}
        for metric in measures.values():
            # RecBole rounds before epochs are compared, so plateaus look like ties.
            metric.decimal_place = 15
        self._build_optimizers()

    # ------------------------------------------------------------------ fitting

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        show_progress: bool = False,
        on_epoch: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> Progress:
        """Run the model's phases from where ``progress`` stands.

        Args:
            train_data (DataLoader): training batches.
            valid_data (DataLoader | None): validation; without it every epoch is run.
            show_progress (bool): a progress bar per epoch, on a terminal.
            on_epoch (Callable | None): called with the log after every epoch, once the state is
                saved.

        Returns:
            Progress: best score and epoch, and the log.

        Raises:
            TrainingDiverged: if a loss is NaN or infinite.
            Interrupted: after such a signal, once the state is saved.
        """
        self.eval_collector.data_collect(train_data)
        if self.config["train_neg_sample_args"].get("dynamic"):
            train_data.get_model(self.model)
        phases = self.model.training_plan()
        if len(phases) > 1:
            listed = ", ".join(f"{p.name} (at most {p.epochs} epochs)" for p in phases)
            self.logger.info(f"phases: {listed}")
        with self.stoppable():
            if distributed.largest(not (self.run_dir / LAST).is_file()):
                self.save_state(LAST)  # so that a run killed in its first epoch can be resumed
            for number in range(self.progress.phase, len(phases)):
                if number > self.progress.phase:
                    self._begin_phase(number, phases[number])
                try:
                    self._fit_phase(phases[number], train_data, valid_data, show_progress, on_epoch)
                except Interrupted:
                    self.save_state(LAST)
                    raise
        return self.progress

    def _begin_phase(self, number: int, phase: Phase) -> None:
        progress = self.progress
        if phase.refine:
            self.load_weights(self.run_dir / BEST)
        else:
            progress.best_score = None  # the best epoch is one of this phase
        progress.phase, progress.epoch, progress.misses = number, 0, 0
        progress.idle_updates = 0
        before = self.optimizers
        self._build_optimizers()
        if phase.refine and before.keys() == self.optimizers.keys():
            for key, optimizer in self.optimizers.items():
                optimizer.load_state_dict(before[key].state_dict())
        self.save_state(LAST)

    def _updates(self) -> tuple[Update, ...]:
        """Those of the present phase."""
        phase = self.model.training_plan()[self.progress.phase]
        whole = Update("", list(self.model.parameters()), self.model.calculate_loss)
        return phase.updates or (whole,)

    def _build_optimizers(self) -> None:
        """A fresh optimiser for each name among the updates of the present phase."""
        parameters: dict[str, list[nn.Parameter]] = {}
        for update in self._updates():
            own = parameters.setdefault(_key(update), list(update.parameters))
            if list(map(id, own)) != list(map(id, update.parameters)):
                raise ValueError(f"updates named {update.name!r} must have the same parameters")
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            key: self._build_optimizer(params=own) for key, own in parameters.items()
        }
        self.optimizer = next(iter(self.optimizers.values()))  # where RecBole has its only one

    def _fit_phase(
        self,
        phase: Phase,
        train_data: Any,
        valid_data: Any,
        show_progress: bool,
        on_epoch: Callable[[list[dict[str, Any]]], None] | None,
    ) -> None:
        progress = self.progress
        while progress.epoch < phase.epochs and not self._out_of_patience():
            self.model.begin_epoch(phase.name, progress.epoch)
            with self._on_the_clock():
                means = self._train_epoch(train_data, progress.epoch, show_progress)
            entry: dict[str, Any] = {"phase": phase.name, "epoch": progress.epoch, "loss": means}
            entry["monitor"] = {k: v / progress.step for k, v in progress.monitor_sums.items()}
            entry["seconds"] = progress.seconds - progress.seconds_before
            entry["updates"] = progress.updates
            better = False
            if phase.evaluate and valid_data and (progress.epoch + 1) % self.eval_step == 0:
                with self._on_the_clock():
                    result = self.evaluate_protocols(valid_data, (KEPT,), show_progress)[KEPT]
                entry["valid"] = result
                better = self._compare(result)
            if distributed.rank() == 0:
                self._log_epoch(entry, better)
            progress.log.append(entry)
            progress.epoch, progress.step = progress.epoch + 1, 0
            progress.loss_sums, progress.monitor_sums = {}, {}
            progress.seconds_before = progress.seconds
            if better or not (phase.evaluate and valid_data):
                self.save_state(BEST)
            self.save_state(LAST)
            if on_epoch is not None:
                on_epoch(progress.log)
            if self.report is not None and "valid" in entry:
                self.report(progress)

    @contextmanager
    def _on_the_clock(self) -> Iterator[None]:
        """Count the seconds of the block, also when it is interrupted."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.progress.seconds += time.monotonic() - started

    def _out_of_patience(self) -> bool:
        """Whether ``stopping_step`` evaluations and ``stopping_updates`` updates brought nothing.

        RecBole counts evaluations only: an epoch of user_all has a sixth of the updates of one of
        prefix_last, and so had a sixth of the patience.
        """
        progress = self.progress
        enough = progress.idle_updates >= self.config["stopping_updates"]
        return enough and progress.misses >= self.stopping_step

    def _compare(self, result: Metrics) -> bool:
        """Whether this evaluation is the best so far; a tie is not."""
        progress = self.progress
        score = result[self.valid_metric]
        gain = 0.0 if progress.best_score is None else score - progress.best_score
        if progress.best_score is None or (gain if self.valid_metric_bigger else -gain) > 0:
            progress.best_score, progress.best_result = score, result
            progress.best_epoch, progress.misses = progress.epoch, 0
            progress.idle_updates = 0
            return True
        progress.misses += 1
        return False

    def _train_epoch(
        self,
        train_data: Any,
        epoch_idx: int,
        show_progress: bool = False,
    ) -> Metrics:
        """Train on the batches of an epoch that are still to come; mean of each loss part."""
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
            parts, monitor = self._step(batch, updates)
            for sums, values in ((progress.loss_sums, parts), (progress.monitor_sums, monitor)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
            progress.step += 1
            progress.updates += 1
            progress.idle_updates += 1
            if progress.step % 10 == 0:
                bar.set_postfix_str(
                    " ".join(f"{k} {v:.3f}" for k, v in parts.items()), refresh=False
                )
            self.stop.check(self.run_dir)
        return {name: total / progress.step for name, total in progress.loss_sums.items()}

    def _batches(self, train_data: Any, epoch: int, done: int) -> Iterator[Interaction]:
        """The epoch's batches from number ``done`` on, in an order fixed by seed and epoch.

        RecBole's loaders may draw random numbers while they make a batch, so a resumed run passes
        over the batches it has seen, and only then takes up the random states it stopped with.
        """
        if hasattr(train_data, "batches"):
            train_data.set_epoch(epoch)
            batches = map(train_data.collate, train_data.batches()[done:])
        else:
            train_data.generator.manual_seed(train_data.config["seed"] + epoch)
            batches = iter(train_data)
            for _ in range(done):
                next(batches)
        if self._resume_rng is not None:
            _set_rng(self._resume_rng)
            self._resume_rng = None
        yield from batches

    def _step(self, batch: Interaction, updates: tuple[Update, ...]) -> tuple[Metrics, Metrics]:
        """All updates on a batch; the value of each loss part and of what the model monitors.

        Where several updates have one name, the values are those of the last one.
        """
        batch = batch.to(self.device)
        parts: Metrics = {}
        monitor: Metrics = {}
        for update in updates:
            with self._others_constant(update):
                values, watched = self._update(
                    batch, update, prefix=f"{update.name}." if len(updates) > 1 else ""
                )
            parts, monitor = parts | values, monitor | watched
        return parts, monitor

    def _update(self, batch: Interaction, update: Update, prefix: str) -> tuple[Metrics, Metrics]:
        """One optimiser step; ``prefix`` stands before the names of the loss parts."""
        optimizer = self.optimizers[_key(update)]
        optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.enable_amp):
            losses = update.loss(batch)
        named = _named_losses(losses)
        total = sum(named.values(), torch.zeros((), device=self.device))
        names = [prefix + name for name in named]
        # Means over a batch are those of all processes, each counting the same.
        n = distributed.n_processes()
        monitor = {k: v.float() / n for k, v in self.model.monitored().items()}
        values = distributed.summed(
            torch.stack([*(v.detach().float() for v in named.values()), *monitor.values()])
        ).tolist()
        parts = dict(zip(names, values[: len(names)], strict=True))
        for name, value in parts.items():
            if not math.isfinite(value):
                self._diverged(name, value)
        total.backward()
        distributed.sum_gradients(update.parameters)
        if self.clip_grad_norm:
            clip_grad_norm_(update.parameters, **self.clip_grad_norm)
        optimizer.step()
        return parts, dict(zip(monitor, values[len(names) :], strict=True))

    @contextmanager
    def _others_constant(self, update: Update) -> Iterator[None]:
        """Within the block, parameters that the update does not move get no gradient."""
        own = {id(parameter) for parameter in update.parameters}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _diverged(self, name: str, value: float) -> None:
        progress = self.progress
        raise TrainingDiverged(
            f"loss part {name!r} is {value} at epoch {progress.epoch}, step {progress.step}; "
            f"training stopped before the update. {self.run_dir / LAST} holds the last good state. "
            "A smaller learning_rate or clip_grad_norm={max_norm: 1.0} may help"
        )

    def _log_epoch(self, entry: dict[str, Any], better: bool) -> None:
        losses = entry["loss"]
        text = f"{entry['phase']} epoch {entry['epoch']:>3}  {entry['updates']:>6} updates  "
        text += f"{entry['seconds']:6.1f}s  "
        text += f"loss {sum(losses.values()):.4f}"
        if len(losses) > 1:
            text += " = " + " + ".join(f"{k} {v:.4f}" for k, v in losses.items())
        watched = [f"{k} {v:.3f}" for k, v in entry["monitor"].items()]
        text += f" | {', '.join(watched)}" if watched else ""
        if "valid" in entry:
            mode = self.config["eval_args"]["mode"]["valid"]
            among = "" if mode == "full" else f" ({protocol_name(KEPT, mode)})"
            text += f" | valid {self.valid_metric} {entry['valid'][self.valid_metric]:.5f}{among}"
            if not better:
                text += f" (best {self.progress.best_score:.5f}, epoch {self.progress.best_epoch})"
        self.logger.info(text)
        self._log_tensorboard(entry)

    def _log_tensorboard(self, entry: dict[str, Any]) -> None:
        """RecBole's scalars under RecBole's names, and every part; epochs run over all phases."""
        step = len(self.progress.log)
        scalars = {"Loss/Train": sum(entry["loss"].values())}
        scalars |= {f"Train/{name}": v for name, v in (entry["loss"] | entry["monitor"]).items()}
        if "valid" in entry:
            scalars["Vaild_score"] = entry["valid"][self.valid_metric]
        try:
            for name, value in scalars.items():
                self.tensorboard.add_scalar(name, value, step)
        except OSError as error:  # must not lose a training
            self.tensorboard.add_scalar = lambda *_: None
            self.logger.warning(f"TensorBoard: {error.strerror}; no more is written there")

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
        return self.evaluate_protocols(eval_data, (KEPT,), show_progress)[KEPT]

    def evaluate_protocols(
        self, eval_data: Any, protocols: Sequence[str] = PROTOCOLS, show_progress: bool = False
    ) -> dict[str, Metrics]:
        """Metrics of the model as it is, each row scored once for all protocols and processes.

        Args:
            eval_data (DataLoader): validation or test.
            protocols (Sequence): of ``KEPT`` (RecBole's) and ``REMOVED`` (a row's earlier items are
                taken out of its ranking, its target excepted).
            show_progress (bool): a progress bar, on a terminal.

        Returns:
            dict: protocol -> metric -> unrounded value. Sampled rankings know ``KEPT`` only; their
            candidates are drawn by ``seed``, the same in every evaluation.

        Raises:
            TrainingDiverged: if a score is NaN.
        """
        structs, _ = self._collect(eval_data, protocols, show_progress)
        return {name: self._metrics(struct) for name, struct in structs.items()}

    def evaluate_in_detail(
        self, eval_data: Any, bounds: Sequence[int], show_progress: bool = False
    ) -> Evaluation:
        """Metrics of both protocols, those of rows of similar length, and the rankings.

        Args:
            eval_data (DataLoader): validation or test.
            bounds (Sequence): greatest input length of each group but the last, rising.
            show_progress (bool): a progress bar, on a terminal.

        Returns:
            Evaluation: without rankings where ``save_rankings`` is false or rankings are sampled.
        """
        structs, rows = self._collect(eval_data, PROTOCOLS, show_progress)
        results = {name: self._metrics(struct) for name, struct in structs.items()}
        collected = {k: v for k, v in structs[KEPT]._data_dict.items() if k.startswith("rec.")}
        groups: dict[str, Metrics] = {}
        # Other entries are not told apart by row.
        full = isinstance(eval_data, FullSortEvalDataLoader)
        by_row = full and collected.keys() <= {"rec.topk", "rec.items", "rec.rank"}
        if by_row and all(len(values) == len(rows["length"]) for values in collected.values()):
            number = torch.bucketize(rows["length"], torch.tensor([*bounds]))
            for g, (low, high) in enumerate(zip([0, *bounds], [*bounds, None], strict=True)):
                inside = number == g
                if inside.any():
                    part = copy.copy(structs[KEPT])
                    part._data_dict = part._data_dict | {k: v[inside] for k, v in collected.items()}
                    name = f"{low + 1}+" if high is None else f"{low + 1}-{high}"
                    groups[name] = {"rows": int(inside.sum()), **self._metrics(part)}
        if not full or len(collected.get("rec.rank", ())) != len(rows["length"]):
            return Evaluation(results, groups, {})
        for name, struct in structs.items():
            rows["rank", name] = struct.get("rec.rank")
            rows["list", name] = struct.get("rec.items")
        return Evaluation(results, groups, rows)

    @torch.no_grad()
    def _collect(
        self, eval_data: Any, protocols: Sequence[str], show_progress: bool
    ) -> tuple[dict[str, Any], dict[Any, Tensor]]:
        """What RecBole's metrics need, by protocol; and user, target and length of each row."""
        self.model.eval()
        full = isinstance(eval_data, FullSortEvalDataLoader)
        self.tot_item_num = eval_data._dataset.item_num
        if full and self.item_tensor is None:
            self.item_tensor = eval_data._dataset.get_item_feature().to(self.device)
        collectors = {name: self._collector() for name in protocols}
        seen: dict[str, list[Tensor]] = {"user": [], "item": [], "length": []}
        one_pass: bool | None = None
        with preserved_rng():
            if not full:  # the same candidates whatever was drawn before, by training or not at all
                init_seed(self.config["seed"], self.config["reproducibility"])
            for batch in tqdm(
                eval_data, desc="evaluate", leave=False, disable=None if show_progress else True
            ):
                self.stop.check(self.run_dir)
                if batch is None:  # the rows of this batch are those of other processes
                    continue
                history = batch[1] if full else None
                if full:
                    found = self._full_sort_batch_eval((batch[0], None, *batch[2:]))
                else:
                    if one_pass is None:
                        one_pass = self._one_pass(eval_data, *batch[:2])
                    found = self._sampled_batch_eval(eval_data, batch, one_pass)
                interaction, scores, positive_u, positive_i = found
                require_numbers(scores)
                length = batch[0][self.config["ITEM_LIST_LENGTH_FIELD"]].cpu()
                invented = batch[0][PSEUDO_LENGTH].cpu() if PSEUDO_LENGTH in batch[0] else 0
                seen["user"].append(batch[0][self.config["USER_ID_FIELD"]].cpu())
                seen["item"].append(positive_i.cpu())
                seen["length"].append(length - invented)
                if KEPT in collectors:
                    collectors[KEPT].eval_batch_collect(scores, interaction, positive_u, positive_i)
                if REMOVED in collectors and history is not None:
                    scores[history[0].to(self.device), history[1].to(self.device)] = -torch.inf
                    collectors[REMOVED].eval_batch_collect(
                        scores, interaction, positive_u, positive_i
                    )

        def whole(rows: Tensor) -> Tensor:
            return distributed.in_order(rows, eval_data.sample_size, eval_data.step)

        structs = {}
        for name, collector in collectors.items():
            if any(key.startswith("rec.") for key in collector.data_struct._data_dict):
                collector.model_collect(self.model)
                structs[name] = struct = collector.get_data_struct()
                for key in [k for k in struct._data_dict if k.startswith("rec.")]:
                    struct.set(key, whole(struct.get(key)))
        return structs, {name: whole(torch.cat(parts)) for name, parts in seen.items()}

    def _one_pass(self, eval_data: Any, rows: Interaction, candidates: Tensor) -> bool:
        """Whether an item's score is the same alone and among all, tried on a few.

        Of RecBole's models CORE ranks by another score than it predicts, DIN only predicts, and
        SASRecCPR only ranks.
        """
        rows, candidates = rows[:8], candidates[:8, :8]
        with preserved_rng():
            try:
                among_all = self._picked_scores(rows, candidates)
            except NotImplementedError:
                return False
            try:
                alone = self._predicted_scores(eval_data, rows, candidates)
            except (AssertionError, NotImplementedError):
                return True
        return bool((among_all - alone).abs().max() <= 1e-4 * alone.abs().max())

    def _sampled_batch_eval(
        self, eval_data: Any, batch: tuple[Interaction, Tensor, Tensor, Tensor], one_pass: bool
    ) -> tuple[Interaction, Tensor, Tensor, Tensor]:
        """As RecBole's for drawn candidates: scores [users, n_items], -inf where not drawn."""
        rows, candidates, positive_u, positive_i = batch
        if one_pass:
            found = self._picked_scores(rows, candidates)
        else:
            found = self._predicted_scores(eval_data, rows, candidates)
        size = (int(positive_u[-1]) + 1, self.tot_item_num)
        scores = found.new_full(size, -torch.inf)
        # In RecBole's order, in which the last row wins an item that two rows of a user share.
        user = positive_u.repeat(candidates.shape[1]).to(self.device)
        scores[user, candidates.t().flatten().to(self.device)] = found.t().flatten()
        return rows, scores, positive_u, positive_i

    def _picked_scores(self, rows: Interaction, candidates: Tensor) -> Tensor:
        """Scores of each row's candidates out of those of all items, [B, 1 + n]."""
        scores = self.model.full_sort_predict(rows.to(self.device))
        return scores.view(len(rows), -1).gather(1, candidates.to(self.device))

    def _predicted_scores(self, eval_data: Any, rows: Interaction, candidates: Tensor) -> Tensor:
        """Scores of each row's candidates, each by a pass of its own, [B, 1 + n]."""
        n = candidates.numel()
        scores = []
        for part in torch.arange(n).tensor_split(-(-n // self.test_batch_size)):
            row, items = part // candidates.shape[1], candidates.reshape(-1)[part]
            batch = eval_data.with_items(rows[row], items)
            scores.append(self.model.predict(batch.to(self.device)).reshape(-1))
        return torch.cat(scores).view(candidates.shape)

    def _metrics(self, struct: Any) -> Metrics:
        return {name: float(value) for name, value in self.evaluator.evaluate(struct).items()}

    def _collector(self) -> TargetCollector:
        """A fresh collector that knows what ``data_collect`` gathered from the training data."""
        collector = TargetCollector(self.config)
        for key, value in self.eval_collector.data_struct._data_dict.items():
            if key.startswith("data."):
                collector.data_struct.set(key, value)
        return collector

    # ------------------------------------------------------------------ saving and resuming

    def save_state(self, name: str) -> None:
        """Write ``last`` or ``best``: weights, optimiser, random states, progress, payload.

        The random states are those of all processes; the rest is the same for all, and process 0
        writes it.
        """
        states = distributed.each(self._resume_rng or _get_rng())
        if distributed.rank() == 0:
            self._write_state(name, states)
        distributed.wait_for_all()

    def _write_state(self, name: str, states: list[dict[str, Tensor]]) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"data.{k}": v for k, v in self.data.items()}
        content = {**self.payload, "progress": asdict(self.progress)}
        if name == LAST:
            for key, optimizer in self.optimizers.items():
                state, content[key] = optimizer_state(optimizer)
                tensors |= {f"{key}.{k}": v for k, v in state.items()}
            content["processes"] = len(states)
            for number, state in enumerate(states):
                tensors |= {f"{_rng_key(number)}.{k}": v for k, v in state.items()}
        checkpoint.save(self.run_dir / name, tensors, content)

    def load_weights(self, path: Path) -> None:
        """Put the weights of a checkpoint into the model.

        Raises:
            UserError: if they do not fit.
        """
        tensors, _ = checkpoint.load(path)
        load_model_state(self.model, checkpoint.split(tensors, "model"), path)

    def resume(self, path: Path) -> None:
        """Continue from a ``last`` checkpoint: the next step is the one that was not taken.

        Raises:
            UserError: if the file is not one, or does not fit.
        """
        tensors, content = checkpoint.load(path)
        n = content.get("processes", 1)
        if n != distributed.n_processes():
            raise UserError(
                f"{path} holds the random states of {n} processes and cannot be resumed by "
                f"{distributed.n_processes()}; give --nproc={n}"
            )
        load_model_state(self.model, checkpoint.split(tensors, "model"), path)
        self.progress = Progress(**content["progress"])
        phase = self.progress.phase
        if phase >= len(self.model.training_plan()):
            raise checkpoint.foreign(path, f"its progress.phase is {phase}")
        self._build_optimizers()
        for key, optimizer in self.optimizers.items():
            if key not in content:
                raise checkpoint.foreign(path, f"it lacks {key}")
            state = checkpoint.split(tensors, key)
            if problem := _foreign_optimizer(optimizer, state, content[key]):
                raise checkpoint.foreign(path, f"its {key} has {problem}")
            load_optimizer_state(optimizer, state, content[key])
        self._resume_rng = checkpoint.split(tensors, _rng_key(distributed.rank()))
        try:
            with preserved_rng():
                _set_rng(self._resume_rng)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise checkpoint.foreign(path, f"its random states are none ({error})") from None

    # ------------------------------------------------------------------ signals and random states

    def stoppable(self) -> AbstractContextManager[None]:
        """See ``StopRequest.listen``."""
        return self.stop.listen()


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


def require_numbers(scores: Tensor) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        TrainingDiverged: if a score is NaN.
    """
    if torch.isnan(scores).any():
        raise TrainingDiverged(
            "the model's scores contain NaN; nothing can be ranked. Training anew with a smaller "
            "learning_rate or clip_grad_norm={max_norm: 1.0} may help"
        )


def _rng_key(process: int) -> str:
    """Name of a process's random states in checkpoints."""
    return f"rng{process}" if process else "rng"


def _key(update: Update) -> str:
    """Name of an update's optimiser in checkpoints."""
    return f"optimizer_{update.name}" if update.name else "optimizer"


def _named_losses(losses: Any) -> dict[str, Tensor]:
    """Loss parts by name: fields of a NamedTuple, else ``loss`` or ``loss_1``, ``loss_2``, ..."""
    if hasattr(losses, "_asdict"):
        named = losses._asdict()
    elif isinstance(losses, tuple):
        named = {f"loss_{i}": loss for i, loss in enumerate(losses, start=1)}
    else:
        named = {"loss": losses}
    return {name: loss.reshape(()) for name, loss in named.items()}  # TransRec's has shape [1]
