"""How a model that is no recommender is trained."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recbole_simdiff.evaluation.protocols import Metrics


@dataclass(frozen=True)
class FitSettings:
    """What replaces a recommender's settings and its validation by rankings.

    The optimiser is Adam without weight decay, gradient clipping and mixed precision. Every epoch
    is validated, and smaller is better.

    Attributes:
        learning_rate (float): of Adam.
        patience (int): epochs without improvement before training ends.
        metric (str): of those that ``validate`` returns, the one that is compared.
        validate (Callable): means of the epoch's losses by name -> metrics by name.
        remedy (str): sentence that ends the message of a training that diverged.
        log_every (int): epochs for each line of the log.
    """

    learning_rate: float
    patience: int
    metric: str
    validate: Callable[[Metrics], Metrics]
    remedy: str
    log_every: int = 1

    def applied_to(self, config: Any) -> Any:
        """A copy of a configuration with these settings, under RecBole's keys.

        Args:
            config (Config): resolved configuration; it stays as it is.
        """
        values = {
            "learner": "adam",
            "learning_rate": self.learning_rate,
            "weight_decay": 0.0,
            "clip_grad_norm": None,
            "enable_amp": False,
            "eval_step": 1,
            "stopping_step": self.patience,
            "stopping_updates": 0,
            "valid_metric": self.metric,
            "valid_metric_bigger": False,
            "eval_args": {"mode": {"valid": "full"}},
        }
        changed = copy.copy(config)
        changed.final_config_dict = config.final_config_dict | values
        return changed
