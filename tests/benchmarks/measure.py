"""What the parts measure with: time, memory, synthetic rows."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from recbole.data.interaction import Interaction

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import TrainingDiverged

SIZES = (12_000, 120_000, 1_200_000)  # numbers of items


class Synthetic:
    """A data set of which only the number of items is known."""

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items

    def num(self, field: str) -> int:
        """Number of ids, padding included."""
        return self.n_items


def synthetic_batch(
    rows: int, length: int, n_items: int, generator: torch.Generator
) -> Interaction:
    """Random rows of one length."""
    draw = torch.randint(1, n_items + 1, (rows, length + 1), generator=generator)
    lengths = torch.full((rows,), length)
    return Interaction(
        {"item_id_list": draw[:, :-1], "item_length": lengths, "item_id": draw[:, -1]}
    )


def synthetic_config(model: str, **values: Any) -> Config:
    """Configuration of a model on the CPU, of which no data are read."""
    fixed = {"use_gpu": False, "show_progress": False}
    return Config(model, "amazon-beauty", overrides={**fixed, **values})


def diverged(name: str, value: float, step: int) -> NoReturn:
    """A loss that is not finite ends the measurement."""
    raise TrainingDiverged(f"{name} is {value}")


def timed(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass
class Memory:
    """High-water mark of the resident set, GiB: of the process, and over the start of the block."""

    peak: float = 0.0
    over_start: float = 0.0


@contextlib.contextmanager
def measured() -> Iterator[Memory]:
    """Peak memory of a block; Linux only."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    start, memory = resident("VmRSS"), Memory()
    yield memory
    memory.peak = resident("VmHWM")
    memory.over_start = memory.peak - start
    gc.collect()


def resident(field: str) -> float:
    """A memory line of /proc/self/status, GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**20
    return 0.0
