"""Values of losses: read from the device, and checked before anything is saved with them."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from recbole_simdiff.evaluation.protocols import Metrics
from recbole_simdiff.training.progress import Progress

READ_EVERY = 10  # batches whose values come together from a device that is not the CPU

# Called with name, value and step of a loss part that is not finite; it raises.
Diverged = Callable[[str, float, int], NoReturn]


class LossValues(NamedTuple):
    """What one update computed, perhaps still on the device."""

    parts: tuple[str, ...]  # names of loss parts
    monitor: tuple[str, ...]  # names of what the model monitors
    values: Tensor  # of both, float32, [parts + monitor]


class UnreadLosses:
    """Loss values of the last batches.

    To read a value is to wait until the device has computed it, so on a GPU values of several
    batches are read together. A loss that is not finite stops the training there before anything is
    saved; on the CPU, where values are at hand, before the update.

    Args:
        device (torch.device): where losses are computed.
        diverged (Callable): see ``Diverged``.
    """

    def __init__(self, device: torch.device, diverged: Diverged) -> None:
        self.at_once = device.type == "cpu"
        self._diverged = diverged
        self._steps: list[tuple[int, list[LossValues]]] = []

    @property
    def due(self) -> bool:
        """Whether enough batches have come together to be read."""
        return len(self._steps) >= (1 if self.at_once else READ_EVERY)

    def check(self, step: int, computed: LossValues) -> None:
        """On the CPU: see that the parts are finite, before the update is made.

        Args:
            step (int): of the epoch.
            computed (LossValues): of one update.
        """
        if self.at_once:
            self._finite(step, computed.parts, computed.values.tolist())

    def add(self, step: int, computed: list[LossValues]) -> None:
        """Keep what the updates on one batch computed, until it is read."""
        self._steps.append((step, computed))

    def read_into(self, progress: Progress) -> Metrics:
        """Add all values to the sums of the epoch.

        Returns:
            dict: loss parts of the last batch; empty if there was nothing to read. Where several
            updates have one name, the values are those of the last one.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        numbers = torch.cat([one.values for _, computed in steps for one in computed]).tolist()
        parts: Metrics = {}
        monitor: Metrics
        for step, computed in steps:
            parts, monitor = {}, {}
            for one in computed:
                names = (*one.parts, *one.monitor)
                values, numbers = numbers[: len(names)], numbers[len(names) :]
                self._finite(step, one.parts, values)
                found = dict(zip(names, values, strict=True))
                parts |= {name: found[name] for name in one.parts}
                monitor |= {name: found[name] for name in one.monitor}
            progress.add_values(parts, monitor)
        return parts

    def _finite(self, step: int, names: Sequence[str], values: Sequence[float]) -> None:
        for name, value in zip(names, values, strict=False):
            if not math.isfinite(value):
                self._diverged(name, value, step)
