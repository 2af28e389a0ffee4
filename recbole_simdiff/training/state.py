"""What a checkpoint of a training holds, and how a training is put back from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recbole_simdiff import checkpoint, distributed, files
from recbole_simdiff.checkpoint import (
    load_model_state,
    load_optimizer_state,
    optimizer_mismatch,
    optimizer_state,
)
from recbole_simdiff.log import logger
from recbole_simdiff.modules.random_state import preserved_rng, seeded_states, set_random_states
from recbole_simdiff.training.progress import Progress


def pack(
    model: nn.Module, progress: Progress, payload: Mapping[str, Any], data: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON content of a checkpoint that a model can be used from.

    Args:
        model (nn.Module): for its weights.
        progress (Progress): where training stands.
        payload (Mapping): further JSON content.
        data (Mapping): further tensors.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"data.{k}": v for k, v in data.items()}
    return tensors, {**payload, "progress": asdict(progress)}


def add_resumable(
    tensors: dict[str, Tensor],
    content: dict[str, Any],
    optimizers: Mapping[str, Optimizer],
    random_states: Sequence[Mapping[str, Tensor]],
) -> None:
    """Add what a training needs besides to go on exactly.

    Args:
        tensors, content (dict): as ``pack`` returned them.
        optimizers (Mapping): name -> optimiser.
        random_states (Sequence): of each process, in the order of ranks.
    """
    for key, optimizer in optimizers.items():
        state, content[key] = optimizer_state(optimizer)
        tensors |= {f"{key}.{k}": v for k, v in state.items()}
    content["processes"] = len(random_states)
    for number, states in enumerate(random_states):
        tensors |= {f"{_rng_key(number)}.{k}": v for k, v in states.items()}


class Resumed:
    """A ``last`` checkpoint that is about to be continued.

    Args:
        path (Path): the file.

    Attributes:
        progress (Progress): where training stood.

    Raises:
        UserError: if it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self.content = checkpoint.load(path)
        if "progress" not in self.content:
            raise checkpoint.foreign(path, "it lacks progress")
        self.progress = Progress(**self.content["progress"])

    def load_model(self, model: nn.Module) -> None:
        """Put the weights into the model.

        Raises:
            UserError: if they do not fit.
        """
        load_model_state(model, checkpoint.subset(self.tensors, "model"), self.path)

    def load_optimizers(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Put back the optimisers' states.

        Raises:
            UserError: if they are not those of these optimisers.
        """
        for key, optimizer in optimizers.items():
            if key not in self.content:
                raise checkpoint.foreign(self.path, f"it lacks {key}")
            state = checkpoint.subset(self.tensors, key)
            if problem := optimizer_mismatch(optimizer, state, self.content[key]):
                raise checkpoint.foreign(self.path, f"its {key} has {problem}")
            load_optimizer_state(optimizer, state, self.content[key])

    def random_states(self) -> dict[str, Tensor]:
        """Those of this process, which have been tried.

        If another number of processes wrote them, they are drawn anew, the same ones each time.

        Raises:
            UserError: if they are none.
        """
        before, n, number = self.content.get("processes", 1), distributed.world_size(), 0
        if before == n:
            number = distributed.rank()
        states = checkpoint.subset(self.tensors, _rng_key(number))
        try:
            with preserved_rng():
                set_random_states(states)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise checkpoint.foreign(self.path, f"its random states are none ({error})") from None
        if before == n:
            return states
        logger.info(
            f"the random states are drawn anew: {before} processes wrote those of {self.path}, and "
            f"the number is {n} now"
        )
        name = torch.tensor([n, distributed.rank()])
        return seeded_states(int(files.digest({**states, "process": name})[:8], 16))


def _rng_key(process: int) -> str:
    """Name of a process's random states in checkpoints."""
    return f"rng{process}" if process else "rng"
