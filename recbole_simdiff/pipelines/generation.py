"""Training of DiffuASR's generator, and the pseudo-items that it writes."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from recbole.utils import init_seed
from torch import Tensor
from tqdm import tqdm

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import (
    LAST,
    load_model_state,
    load_optimizer_state,
    optimizer_state,
)
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import TrainingDiverged
from recbole_simdiff.log import logger
from recbole_simdiff.models.diffuasr.generator import (
    DiffuASR,
    averaged,
)
from recbole_simdiff.models.diffuasr.guide import Guide
from recbole_simdiff.pipelines.pairs import Pairs, learning_pairs
from recbole_simdiff.training import tracking
from recbole_simdiff.training.interrupt import StopRequest

SAVE_EVERY_SECONDS = 60

USERS = 2048  # users whose items are written between two looks at signals


def generate(
    config: Config, items: Tensor, ends: Tensor, n_items: int, recommender: Any, place: Path
) -> tuple[Tensor, dict[str, Any]]:
    """Train the generator on the training interactions and write M items for every user.

    Args:
        config (Config): of ``--model=DiffuASR``.
        items (LongTensor): training items of all users, [n].
        ends (LongTensor): where each user's end, [users].
        n_items (int): number of ids, padding included.
        recommender (nn.Module): the trained baseline.
        place (Path): folder of the generator's checkpoints.

    Returns:
        tuple: ids [users, M], and a log of the training.

    Raises:
        UserError: if too few users have a history long enough to learn from.
        Interrupted: after a signal; the state is saved.
    """
    device, size, longest = config["device"], config["n_pseudo"], config["MAX_ITEM_LIST_LENGTH"]
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    pairs, held_out = learning_pairs(config, items, ends)
    init_seed(config["seed"], config["reproducibility"])
    guide = Guide(recommender, device)
    model = DiffuASR(config, n_items, guide, items.unique()).to(device)
    log = _train(config, model, pairs, held_out, place)
    logger.info(f"diffuser: writing {size} items for {int((lengths > 0).sum()):,} users")
    users = (lengths > 0).nonzero().squeeze(1)
    newest = ends[users]
    start = torch.maximum(newest - lengths[users], newest - longest)
    span = torch.arange(longest)
    inside = span < (newest - start).unsqueeze(1)
    history = items[torch.where(inside, start.unsqueeze(1) + span, 0)].masked_fill(~inside, 0)
    first = items[newest - lengths[users]]  # Sec. 3.4: the label is the first real item
    started = time.monotonic()
    pseudo = torch.zeros(len(ends), size, dtype=torch.long)
    stop = StopRequest()
    bar = tqdm(
        torch.arange(len(users)).split(USERS),
        desc="writing",
        leave=False,
        disable=None if config["show_progress"] else True,
    )
    with stop.listen():
        for part in bar:
            batch = [values[part].to(device) for values in (history, users, first)]
            written = model.generate(batch[0], batch[1], batch[2], config["seed"])
            pseudo[users[part]] = written.cpu()
            stop.check(place)
    log["generation_seconds"] = time.monotonic() - started
    return pseudo, log


class _Fitting:
    """The generator's training and all that a continued one needs.

    Attributes:
        state (dict): epochs trained, their seconds, best monitored loss and its epoch, and the
            losses of each epoch.
    """

    def __init__(self, config: Config, model: DiffuASR, last: Path) -> None:
        self.config, self.model, self.last = config, model, last
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trainable, lr=config["diffuasr_learning_rate"])
        decay = config["diffuasr_ema_decay"]
        self.average = averaged(model, decay) if decay else None
        self.best = _copy(model)
        self.state: dict[str, Any] = {
            "epoch": 0,
            "training_seconds": 0.0,
            "best": None,
            "best_epoch": 0,
        }
        self.state |= {"train": [], "held_out": []}
        if last.is_file():
            self._restore()

    def _restore(self) -> None:
        tensors, content = checkpoint.load(self.last)
        if lacking := {"optimizer", "state"} - content.keys():
            raise checkpoint.foreign(self.last, f"it lacks {min(lacking)}")
        load_model_state(self.model, checkpoint.subset(tensors, "model"), self.last)
        self.best = checkpoint.subset(tensors, "best")
        if self.average is not None:
            self.average.load_state_dict(checkpoint.subset(tensors, "average"))
        stored = checkpoint.subset(tensors, "optimizer")
        load_optimizer_state(self.optimizer, stored, content["optimizer"])
        self.state = content["state"]
        logger.info(f"diffuser: resumed at epoch {self.state['epoch']}")

    def save(self) -> None:
        values, content = optimizer_state(self.optimizer)
        groups = {"model": self.model.state_dict(), "best": self.best, "optimizer": values}
        groups["average"] = {} if self.average is None else self.average.state_dict()
        tensors = {f"{g}.{k}": v for g, part in groups.items() for k, v in part.items()}
        checkpoint.save(self.last, tensors, {"state": self.state, "optimizer": content})

    @property
    def finished(self) -> bool:
        """Whether all epochs are over, or too many without improvement."""
        waited = self.state["epoch"] - self.state["best_epoch"]
        return (
            self.state["epoch"] >= self.config["diffuasr_epochs"]
            or waited >= self.config["diffuasr_patience"]
        )

    def epoch(self, pairs: Pairs, held_out: Pairs) -> None:
        """One pass over the pairs, its losses noted, and the weights kept if they are the best.

        Raises:
            TrainingDiverged: if a loss is NaN or infinite.
        """
        state, started = self.state, time.monotonic()
        train_loss = monitored = self._pass(*pairs)
        chosen: Any = self.model if self.average is None else self.average.module
        if len(held_out[0]):
            monitored = chosen.fixed_noise_loss(*held_out, self.config["seed"])
            state["held_out"].append(monitored)
        state["train"].append(train_loss)
        state["epoch"] += 1
        if state["best"] is None or monitored < state["best"]:
            state["best"], state["best_epoch"] = monitored, state["epoch"]
            self.best = _copy(chosen)
        state["training_seconds"] += time.monotonic() - started

    def _pass(self, target: Tensor, condition: Tensor) -> float:
        """Mean loss over the pairs."""
        # Each epoch has a random state of its own, so that a resumed run repeats it exactly.
        torch.manual_seed(self.config["seed"] * 1_000_003 + self.state["epoch"])
        self.model.train()
        total = 0.0
        for index in torch.randperm(len(target)).split(self.config["diffuasr_batch_size"]):
            self.optimizer.zero_grad()
            loss = self.model.loss(target[index], condition[index])
            if not math.isfinite(loss.item()):
                raise TrainingDiverged(
                    f"the generator's loss is {loss.item()} at epoch {self.state['epoch']}; a "
                    "smaller diffuasr_learning_rate may help"
                )
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(index)
            if self.average is not None:
                self.average.update_parameters(self.model)
        return total / len(target)


def _copy(model: DiffuASR) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _train(
    config: Config, model: DiffuASR, pairs: Pairs, held_out: Pairs, place: Path
) -> dict[str, Any]:
    """Fit the generator; the weights of the best epoch are in ``model`` afterwards.

    Paper, Code: stop on the training loss. Here: on the loss of one user in 20 who is held out,
    with fixed noise, unless ``diffuasr_monitor: train_loss``.
    """
    n, n_held = len(pairs[0]), len(held_out[0])
    logger.info(
        f"diffuser: {n:,} pairs of {config['n_pseudo']} items and what follows them, "
        f"{n_held:,} held out"
    )
    cosine = model.mean_cosine()
    fitting = _Fitting(config, model, place / LAST)
    state, stop, saved = fitting.state, StopRequest(), time.monotonic()
    bar = tqdm(
        total=config["diffuasr_epochs"],
        initial=state["epoch"],
        desc="diffuser",
        leave=False,
        disable=None if config["show_progress"] else True,
    )
    with tracking.tracked(config, place) as tracked, stop.listen(), bar:
        tracked.send(_epochs(state))
        while not fitting.finished:
            fitting.epoch(pairs, held_out)
            tracked.send(_epochs(state))
            bar.update()
            losses = f"loss {state['train'][-1]:.4f} best {state['best']:.4f}"
            bar.set_postfix_str(losses, refresh=False)
            if stop.signum is not None or time.monotonic() - saved > SAVE_EVERY_SECONDS:
                fitting.save()
                saved = time.monotonic()
            stop.check(place)
        model.load_state_dict(fitting.best)
        fitting.save()
        tracked.on_end({"best_epoch": state["best_epoch"], "loss": state["best"]})
    logger.info(
        f"diffuser: best epoch {state['best_epoch']} of {state['epoch']}, training loss "
        f"{state['train'][state['best_epoch'] - 1]:.4f}"
        + (f", held out {state['best']:.4f}" if n_held else "")
        + f"; mean cosine of two items {cosine:.3f} before, {model.mean_cosine():.3f} after"
    )
    return {"pairs": n, "held_out_pairs": n_held, **state}


def _epochs(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The generator's log so far, as trackers know it."""
    held_out = [{"held_out": loss} for loss in state["held_out"]] or [{}] * state["epoch"]
    return [
        {"phase": "diffuser", "epoch": number, "loss": {"loss": loss}, "monitor": monitor}
        for number, (loss, monitor) in enumerate(zip(state["train"], held_out, strict=True))
    ]
