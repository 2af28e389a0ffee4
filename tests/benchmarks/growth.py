"""Seconds of a training step and peak memory, by the number of items and the length of histories.

    python -m tests.benchmarks --parts=growth

Rows are random and of one length: 256 rows of 6 items as items grow, 16 full rows of L items as L
grows. A row has a target at each of its positions, but one in RecBole's SASRec, whose rows are
prefixes. Each case has a process of its own, a time limit, and a first step that is not timed.
"""

import math
import time
from functools import partial
from typing import Any, NamedTuple

import torch

from recbole_simdiff.models.diffuasr.generator import DiffuASR
from recbole_simdiff.models.diffuasr.training import CONDITION, TARGET, GeneratorTraining
from recbole_simdiff.modules.transformer import Batch
from recbole_simdiff.training.loss_values import UnreadLosses
from recbole_simdiff.training.updates import build_optimizers, take_steps, updates_of
from tests.benchmarks.figures import Figures
from tests.benchmarks.measure import (
    SIZES,
    Synthetic,
    diverged,
    measured,
    synthetic_batch,
    timed,
)
from tests.benchmarks.measure import synthetic_config as config_of
from tests.benchmarks.process import Child, Ended, Late, serve

LENGTHS = (50, 200, 1000)
PATIENCE, BUDGET = 100.0, 690.0  # seconds: of a case, of all
MOST = 20.0  # GiB: a case that is predicted to need more is not tried

# Figures of a case that gives none: its limits are missed.
UNKNOWN = {"seconds": math.nan, "peak": math.nan, "over_start": math.nan}

# What is measured -> model and settings.
SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder": ("SASRecCE", {}),
    "encoder, approximate": ("SASRecCE", {"catalogue": "approximate"}),
    "SimDiffRec": ("SimDiffRec", {}),
    "SimDiffRec, approximate": ("SimDiffRec", {"catalogue": "approximate"}),
    "CaDiRec": ("CaDiRec", {}),
    "DiffuASR's generator": ("DiffuASR", {"diffuasr_embeddings": "scratch_trainable"}),
    "DreamRec": ("DreamRec", {}),
    "RecBole's SASRec": ("SASRec", {}),
}


class Case(NamedTuple):
    """What is measured: a key of ``SUBJECTS``, items V, rows of a batch, items of a row."""

    subject: str
    n_items: int
    rows: int
    length: int

    def __str__(self) -> str:
        shape = f"{self.rows:>4} rows of {self.length:>4}"
        return f"{self.subject:<24} {self.n_items:>10,} items, {shape}"

    def predicted(self) -> float:
        """GiB of RecBole's SASRec: table, gradient and optimiser; logits, softmax, gradients."""
        return (4 * self.n_items * 64 + 4 * self.rows * self.n_items) * 4 / 2**30


def cases(short: bool) -> list[Case]:
    """In the order in which they run: what is cheap first."""
    items = SIZES[:1] if short else SIZES
    lengths = LENGTHS[:1] if short else LENGTHS
    found = [Case(subject, n, 256, 6) for n in items for subject in SUBJECTS]
    found += [
        Case(subject, SIZES[0], 16, n)
        for n in lengths
        for subject in SUBJECTS
        if not subject.endswith("approximate")
    ]
    found += [Case("SimDiffRec, approximate", 1_200_000, 256, 6)] if short else []
    found += [Case("RecBole's SASRec", 1_200_000, 2048, 6)]
    found += [] if short else [Case("SimDiffRec, approximate", 12_000_000, 256, 6)]
    return sorted(found, key=lambda case: case.n_items * case.rows * case.length)


def run(figures: Figures, short: bool = False) -> None:
    """Print a line for each case."""
    print(f"growth: a step; at most {PATIENCE:g} s a case, {BUDGET:g} s in all")
    deadline = time.monotonic() + BUDGET
    for case in cases(short):
        left = min(PATIENCE, deadline - time.monotonic())
        if case.subject == "RecBole's SASRec" and case.predicted() > MOST:
            needs = f"predicted {case.predicted():.0f} GiB, more than {MOST:g}"
            print(f"  {case}: not tried, {needs}", flush=True)
            continue
        keep(figures, case, UNKNOWN)
        if left <= 0:
            print(f"  {case}: not tried, no time left of {BUDGET:g} s", flush=True)
            continue
        child = Child(__name__)
        try:
            found = child.ask(left, **case._asdict())
            print(
                f"  {case}: {found['seconds']:8.3f} s ({found['cpu']:8.3f} s of the processor), "
                f"peak {found['peak']:5.2f} GiB, {found['over_start']:5.2f} over the start",
                flush=True,
            )
            keep(figures, case, found)
        except Late:
            print(f"  {case}: no step within {left:.0f} s", flush=True)
        except Ended as error:
            print(f"  {case}: {error}", flush=True)
        finally:
            child.close()


def keep(figures: Figures, case: Case, found: dict[str, float]) -> None:
    """Note what has a limit."""
    if case.subject == "SimDiffRec, approximate" and case.n_items == 1_200_000:
        figures.keep("approximate step", found["seconds"])
        figures.keep("approximate memory", found["over_start"])
    if case.n_items == 12_000_000:
        figures.keep("large memory", found["peak"])


def step(subject: str, n_items: int, rows: int, length: int) -> dict[str, float]:
    """Seconds of a step of the clock and of the processor, and peak memory, GiB."""
    name, settings = SUBJECTS[subject]
    config = config_of(
        name, train_batch_size=rows, MAX_ITEM_LIST_LENGTH=max(50, length), **settings
    )
    generator = torch.Generator().manual_seed(0)
    with measured() as memory:
        batch: Any = synthetic_batch(rows, length, n_items, generator)
        if name == "DiffuASR":
            model: Any = GeneratorTraining(config, DiffuASR(config, n_items + 1, None))
            target = torch.randint(1, n_items + 1, (rows, config["n_pseudo"]), generator=generator)
            batch = Batch({TARGET: target, CONDITION: batch["item_id_list"]})
        else:
            model = config.model_class(config, Synthetic(n_items + 1))
        updates = updates_of(model, model.training_plan()[0])
        optimizers = build_optimizers(updates, lambda own: torch.optim.Adam(own, lr=1e-3))
        losses = UnreadLosses(config["device"], diverged)

        def work() -> None:
            take_steps(model, config, updates, optimizers, batch, partial(losses.check, 0))

        first = timed(work)
        steps = 1 if first > 10 else 3
        cpu = time.process_time()
        seconds = timed(lambda: [work() for _ in range(steps)]) / steps
        cpu = (time.process_time() - cpu) / steps
    return {"seconds": seconds, "cpu": cpu, "peak": memory.peak, "over_start": memory.over_start}


if __name__ == "__main__":
    serve(step)
