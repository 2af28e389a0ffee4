"""The optimiser steps of a phase: which parameters move, by which loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer, SparseAdam

from recbole_simdiff import distributed
from recbole_simdiff.modules.plan import Phase, Update
from recbole_simdiff.training.loss_values import LossValues

_ROWS = "_rows"  # ends the name of the optimiser of parameters that move by rows


def updates_of(model: Any, phase: Phase) -> tuple[Update, ...]:
    """What a phase does with each batch: its own updates, or one over all parameters."""
    return phase.updates or (Update("", list(model.parameters()), model.calculate_loss),)


def build_optimizers(
    updates: Sequence[Update], build: Callable[[list[nn.Parameter]], Optimizer]
) -> dict[str, Optimizer]:
    """A fresh optimiser for each name among the updates, and one more for parameters by rows.

    Args:
        updates (Sequence): of a phase.
        build (Callable): parameters -> optimiser.

    Returns:
        dict: name in checkpoints -> optimiser.

    Raises:
        ValueError: if updates of one name have different parameters.
    """
    parameters: dict[str, list[nn.Parameter]] = {}
    optimizers: dict[str, Optimizer] = {}
    for update in updates:
        key, by_rows = _key(update), set(map(id, update.by_rows))
        own = parameters.setdefault(key, list(update.parameters))
        if list(map(id, own)) != list(map(id, update.parameters)):
            raise ValueError(f"updates named {update.name!r} must have the same parameters")
        if key not in optimizers:
            optimizers[key] = whole = build([p for p in own if id(p) not in by_rows])
            if by_rows:
                optimizers[key + _ROWS] = SparseAdam(list(update.by_rows), lr=whole.defaults["lr"])
    return optimizers


def take_steps(
    model: Any,
    config: Any,
    updates: Sequence[Update],
    optimizers: Mapping[str, Optimizer],
    batch: Any,
    check: Callable[[LossValues], None],
) -> list[LossValues]:
    """All updates on a batch, one after the other.

    Args:
        model (SequentialRecommender): the model, on its device.
        config (Config): resolved configuration.
        updates (Sequence): of the phase.
        optimizers (Mapping): as ``build_optimizers`` returned them.
        batch (Interaction): on the device.
        check (Callable): called before each update with what it computed; may raise.

    Returns:
        list: what each update computed.
    """
    computed = []
    for update in updates:
        prefix = f"{update.name}." if len(updates) > 1 else ""
        with _others_constant(model, update):
            keys = (_key(update), _key(update) + _ROWS)
            moving = [optimizers[key] for key in keys if key in optimizers]
            for optimizer in moving:
                optimizer.zero_grad()
            device = config["device"]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config["enable_amp"]):
                losses = update.loss(batch)
            named = {prefix + name: loss for name, loss in _named_losses(losses).items()}
            computed.append(_values(model, named))
            check(computed[-1])
            sum(named.values(), torch.zeros((), device=device)).backward()
            distributed.sum_gradients(update.parameters)
            if config["clip_grad_norm"]:
                clip_grad_norm_(update.parameters, **config["clip_grad_norm"])
            for optimizer in moving:
                optimizer.step()
    return computed


def _values(model: Any, losses: Mapping[str, Tensor]) -> LossValues:
    """Loss parts and what the model monitors, over all processes.

    Means over a batch are those of all processes, each counting the same.
    """
    n = distributed.world_size()
    monitor = {k: v.float() / n for k, v in model.monitored().items()}
    values = distributed.all_reduce_sum(
        torch.stack([*(loss.detach().float() for loss in losses.values()), *monitor.values()])
    )
    return LossValues(tuple(losses), tuple(monitor), values)


@contextmanager
def _others_constant(model: nn.Module, update: Update) -> Iterator[None]:
    """Within the block, parameters that the update does not move get no gradient."""
    own = {id(parameter) for parameter in update.parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


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
