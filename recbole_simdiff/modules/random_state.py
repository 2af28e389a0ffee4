"""The random states of torch, each GPU, NumPy and Python, saved and put back."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the random states as they were, also when the block is interrupted."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)


def random_states() -> dict[str, Tensor]:
    """All random states as tensors: torch, each GPU, NumPy, Python."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(
            [float("nan") if gauss is None else gauss], dtype=torch.float64
        ),
        "numpy": torch.from_numpy(np.append(keys, [position, has_gauss]).astype(np.int64)),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():  # to ask a GPU that a run on the CPU never used would start it
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def seeded_states(seed: int) -> dict[str, Tensor]:
    """All random states of a fresh program with this seed; the present ones stay.

    Args:
        seed (int): in 0..2^32 - 1.
    """
    with preserved_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return random_states()


def set_random_states(states: dict[str, Tensor]) -> None:
    """Put back what ``random_states`` returned.

    Raises:
        OverflowError, RuntimeError, TypeError, ValueError: if these are no random states.
    """
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(gauss) else gauss))
    numbers = states["numpy"].numpy()
    np.random.set_state(
        (
            "MT19937",
            numbers[:-2].astype(np.uint32),
            int(numbers[-2]),
            int(numbers[-1]),
            states["numpy_gauss"].item(),
        )
    )
    if torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda{i}"], i)
