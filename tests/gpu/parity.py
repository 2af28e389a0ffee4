"""Losses, gradients, scores and metrics of every model on the device, beside those of the CPU.

Both sides have the same weights, the same batch and the same random numbers: those of the CPU.
Dropout is off.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from recbole_simdiff.evaluation.evaluator import Evaluator
from recbole_simdiff.evaluation.protocols import KEPT, Metrics
from recbole_simdiff.models.registry import plugin_models
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.training.updates import _named_losses, updates_of
from tests.gpu.session import Row, Session

# Largest relative difference that float32 may have; metrics: largest absolute one.
LIMITS = {"loss": 1e-4, "gradient": 2e-3, "scores": 1e-4, "metrics": 2e-3}

DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm}
DRAWS_LIKE = {torch.rand_like, torch.randn_like}


class HostRandom(TorchFunctionMode):
    """Within the block, random numbers for any device are those of the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS and kwargs.get("device") is not None:
            device = kwargs["device"]
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        if func in DRAWS_LIKE:
            return func(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        if func is Tensor.exponential_:
            return args[0].copy_(func(args[0].cpu(), *args[1:], **kwargs))
        return func(*args, **kwargs)


class Computed(NamedTuple):
    """What one side computed, on the CPU."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    scores: Tensor
    metrics: Metrics


def parity(session: Session) -> Iterator[Row]:
    """A row a model: the largest differences, float32 judged by ``LIMITS``, bfloat16 stated."""
    names = ["SimDiffRec", "MCLRec", "EASE"] if session.reduced else sorted(plugin_models())
    for name in session.each(names):
        wanted, found = (computed(session, name, device) for device in ("cpu", session.device))
        low = computed(session, name, session.device, enable_amp=True)
        row: Row = {"model": name}
        row |= {
            "loss": relative(found.losses, wanted.losses),
            "gradient": norms(found.gradients, wanted.gradients),
            "scores": distance(found.scores, wanted.scores),
            "metrics": max(abs(found.metrics[k] - v) for k, v in wanted.metrics.items()),
        }
        row["ok"] = all(row[key] <= limit for key, limit in LIMITS.items())
        row |= {
            "bf16 loss": relative(low.losses, wanted.losses),
            "bf16 gradient": norms(low.gradients, wanted.gradients),
            "bf16 scores": distance(low.scores, wanted.scores),
        }
        yield {k: float(f"{v:.2e}") if isinstance(v, float) else v for k, v in row.items()}


def computed(session: Session, name: str, device: str, **values: Any) -> Computed:
    """Losses and gradients of a batch, scores of another, and metrics of the validation part."""
    config = session.toy(name, device, **values)
    _, train, valid, _, model = build_run(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    phase = model.training_plan()[0]
    model.begin_epoch(phase.name, 1)
    losses: dict[str, float] = {}
    if phase.fit:
        phase.fit(train._dataset)
    else:
        batch = next(iter(train)).to(config["device"])
        torch.manual_seed(0)
        amp = torch.autocast(device, dtype=torch.bfloat16, enabled=config["enable_amp"])
        with HostRandom():
            for update in updates_of(model, phase):
                with amp:
                    parts = _named_losses(update.loss(batch))
                torch.stack(list(parts.values())).sum().backward()
                losses |= {f"{update.name}.{k}": v.item() for k, v in parts.items()}
    gradients = {k: p.grad.cpu() for k, p in model.named_parameters() if p.grad is not None}
    model.eval()
    rows = next(iter(valid))[0].to(config["device"])
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=config["enable_amp"]):
        scores = model.full_sort_predict(rows).float().cpu()
    metrics = Evaluator(config, model, config["device"]).evaluate(valid, (KEPT,))[KEPT]
    return Computed(losses, gradients, scores.view(len(rows), -1)[:, 1:], metrics)


def relative(found: dict[str, float], wanted: dict[str, float]) -> float:
    """Largest relative difference of two sets of numbers."""
    assert found.keys() == wanted.keys()
    return max((abs(found[k] - v) / max(abs(v), 1e-6) for k, v in wanted.items()), default=0.0)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def norms(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """``distance`` of all gradients together; a missing one counts as 0."""
    assert found.keys() == wanted.keys()
    if not wanted:
        return 0.0
    one, other = (torch.cat([g[k].flatten() for k in wanted]) for g in (found, wanted))
    return distance(one, other)
