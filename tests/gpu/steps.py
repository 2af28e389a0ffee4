"""Training steps on the device: waits of the host, share of time at work, seconds and memory."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from recbole.trainer import Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from recbole_simdiff.modules.transformer import Batch
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.training.loss_values import READ_EVERY
from recbole_simdiff.training.trainer import PlanTrainer
from recbole_simdiff.training.updates import build_optimizers, take_steps, updates_of
from tests.benchmarks.measure import Synthetic, synthetic_batch
from tests.gpu.session import Row, Session

WARM_UP = 3  # steps


def ready(session: Session, name: str) -> tuple[PlanTrainer, list[Any], int]:
    """A trainer after its first steps, some batches of all sizes, and the batches of an epoch.

    Parts that follow one another have the same one.
    """
    if name in session.ready:
        return session.ready[name]
    trainer, train, _ = session.trainer(session.config(name), f"steps-{name}")
    trainer.model.train()
    trainer.model.begin_epoch(trainer.model.training_plan()[0].name, 1)
    order = train.batches()
    n = 3 if session.reduced else 24
    batches = [train.collate(rows) for rows in order[:: max(1, len(order) // n)][:n]]
    for batch in batches[:WARM_UP]:
        trainer._step(batch, trainer._updates())
    trainer.losses.read_into(trainer.progress)
    session.synchronize()
    session.ready[name] = trainer, batches, len(order)
    return session.ready[name]


def seconds_of(session: Session, trainer: PlanTrainer, batches: list[Any]) -> float:
    """Seconds that steps on the batches take, with the reading of their losses."""
    updates = trainer._updates()
    started = time.perf_counter()
    for batch in batches:
        trainer._step(batch, updates)
        if trainer.losses.due:
            trainer.losses.read_into(trainer.progress)
    trainer.losses.read_into(trainer.progress)
    session.synchronize()
    return time.perf_counter() - started


def waits(session: Session) -> Iterator[Row]:
    """Operations for which the host waits within a step, by torch's own count; must be 0.

    Losses are read between steps, every ``READ_EVERY``.
    """
    for name in session.each(session.trained_models()):
        trainer, batches, _ = ready(session, name)
        few, updates = batches[: READ_EVERY - 1], trainer._updates()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if session.device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                for batch in few:
                    trainer._step(batch, updates)
            finally:
                if session.device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        found = [w for w in caught if "synchronizing" in str(w.message)]
        places = sorted({f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in found})
        row = {"model": name, "waits a step": len(found) / len(few), "at": " ".join(places)}
        yield {**row, "ok": not found}


def busy(session: Session) -> Iterator[Row]:
    """Time in kernels, by the profiler, over the time that the same steps take without it."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if session.device == "cuda" else []
    for name in session.each(session.trained_models()):
        trainer, batches, _ = ready(session, name)
        wall = seconds_of(session, trainer, batches)
        with profile(activities=activities) as found:
            seconds_of(session, trainer, batches)
        kernels = [
            event
            for event in found.key_averages()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        on_device = sum(event.self_device_time_total for event in kernels) / 1e6
        yield {
            "model": name,
            "ms a step": round(wall / len(batches) * 1e3, 2),
            "share of time at work": round(on_device / wall, 3),
            "kernels a step": round(sum(event.count for event in kernels) / len(batches)),
        }


def epoch(session: Session) -> Iterator[Row]:
    """Seconds of an epoch, scaled from some of its batches, and memory that its steps need."""
    for name in session.each(["SASRec", *session.trained_models()]):
        if name == "SASRec":  # RecBole's own, by its own trainer
            seconds, steps, memory = stock(session)
        else:
            trainer, batches, steps = ready(session, name)
            with peak(session) as memory:
                seconds = seconds_of(session, trainer, batches) / len(batches) * steps
        yield {"model": name, "seconds an epoch": round(seconds, 3), "steps": steps, **memory}


@contextmanager
def peak(session: Session) -> Iterator[Row]:
    """Memory of the device over what is held at the start; nothing on the CPU."""
    row: Row = {}
    if session.device == "cpu":
        yield row
        return
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    yield row
    row["peak GiB"] = round((torch.cuda.max_memory_allocated() - start) / 2**30, 3)


def stock(session: Session) -> tuple[float, int, Row]:
    """Seconds of an epoch of RecBole's SASRec with RecBole's trainer, its steps, its memory."""
    config = session.config("SASRec")
    _, train, _, _, model = build_run(config)
    trainer = Trainer(config, model)
    n = 2 if session.reduced else 20
    trainer._train_epoch(islice(train, WARM_UP), 0)
    session.synchronize()
    started = time.perf_counter()
    with peak(session) as memory:
        trainer._train_epoch(islice(train, n), 0)
        session.synchronize()
    seconds = time.perf_counter() - started
    return seconds * len(train) / min(n, len(train)), len(train), memory


def catalogue(session: Session) -> Iterator[Row]:
    """SimDiffRec on rows of 6 items of a large catalogue, exact and approximate."""
    n_items, n_rows, steps = (2_000, 8, 2) if session.reduced else (1_200_000, 256, 10)
    for kind in session.each(["approximate", "exact"]):
        config = session.config("SimDiffRec", train_batch_size=n_rows, catalogue=kind)
        with peak(session) as memory:
            device = config["device"]
            model = config.model_class(config, Synthetic(n_items + 1)).to(device)
            updates = updates_of(model, model.training_plan()[0])
            optimizers = build_optimizers(updates, lambda own: torch.optim.Adam(own, lr=1e-3))
            rows_of = synthetic_batch(n_rows, 6, n_items, torch.Generator().manual_seed(0))
            batch = Batch(rows_of.interaction).to(device)
            work = (model, config, updates, optimizers, batch, lambda computed: None)
            take_steps(*work)
            session.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                take_steps(*work)
            session.synchronize()
            seconds = (time.perf_counter() - started) / steps
        milliseconds = round(seconds * 1e3, 2)
        yield {"catalogue": kind, "items": n_items, "ms a step": milliseconds, **memory}
