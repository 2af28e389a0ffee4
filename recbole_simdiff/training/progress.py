"""Where a training stands."""

from dataclasses import dataclass, field
from typing import Any

from recbole_simdiff.evaluation.protocols import Metrics


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
