"""Whole trainings: resumed ones, and as many seeds of a comparison as time allows."""

import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.errors import Interrupted
from tests.gpu.session import Row, Session

SCRIPT = Path(__file__).parents[2] / "run_recbole_simdiff.py"
STOP_AT = 3  # step of a training that is resumed


def resume(session: Session) -> Iterator[Row]:
    """A training twice from the start, and once stopped and resumed: are the weights the same bits?

    With torch's deterministic algorithms, and without; operations that have none are listed.
    """
    for name in session.each(session.trained_models()[:4]):
        for strict in (False, True):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.use_deterministic_algorithms(strict, warn_only=True)
                try:
                    first, second, resumed = (
                        trained(session, name, kind) for kind in ("first", "second", "resumed")
                    )
                finally:
                    torch.use_deterministic_algorithms(False)
            without = {str(w.message).split()[0] for w in caught if "determinis" in str(w.message)}
            row: Row = {"model": name, "deterministic algorithms": strict}
            row |= {"repeated": same(first, second), "resumed": same(first, resumed)}
            row["without one"] = " ".join(sorted(without))
            # Resuming may change nothing that repeating does not.
            row["ok"] = row["resumed"] or not row["repeated"]
            yield row


def trained(session: Session, name: str, kind: str) -> dict[str, Tensor]:
    """Weights after two epochs; ``resumed``: stopped after some steps and taken up again."""
    folder = f"resume-{name}-{kind}-{time.monotonic_ns()}"
    trainer, train, valid = session.trainer(session.toy(name), folder)
    if kind == "resumed":
        steps, go_on = 0, trainer.model.end_step

        def end_step() -> None:
            nonlocal steps
            steps += 1
            if steps == STOP_AT:
                trainer.stop.signum = signal.SIGINT
            go_on()

        trainer.model.end_step = end_step
        try:
            trainer.fit(train, valid)
            raise AssertionError("it was not stopped")
        except Interrupted:
            trainer, train, valid = session.trainer(session.toy(name), folder)
            trainer.resume(trainer.run_dir / LAST)
    trainer.fit(train, valid)
    return {key: value.cpu() for key, value in trainer.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two models have the same weights, bit for bit."""
    return all(torch.equal(value, other[key]) for key, value in one.items())


def seeds(session: Session) -> Iterator[Row]:
    """Encoder, SimDiffRec and RecBole's SASRec, seed by seed, several side by side on the device.

    What is not done when the time is over is ended, and left out.
    """
    models = ["SASRecCE", "SimDiffRec", "SASRec"]
    waiting = [(seed, model) for seed in range(2020, 2030) for model in models]
    at_once = 4 if session.device == "cuda" else 2
    if session.reduced:
        waiting = waiting[:1]
    running: dict[tuple[int, str], subprocess.Popen[str]] = {}
    try:
        while (waiting or running) and session.left() > 0:
            while waiting and len(running) < at_once:
                key = waiting.pop(0)
                running[key] = begin(session, *key)
            time.sleep(0.2)
            for key in [key for key, process in running.items() if process.poll() is not None]:
                yield result(session, *key, running.pop(key).returncode)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    if running or waiting:
        yield {"left out": ", ".join(f"{m} {s}" for s, m in [*running, *waiting])}


def begin(session: Session, seed: int, model: str) -> "subprocess.Popen[str]":
    """Start a training in a process of its own; its output goes to a file beside its run."""
    folder = session.output / "seeds" / f"{model}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {"model": model, "dataset": session.dataset, "seed": seed}
    values |= {"data_path": session.data_path, "checkpoint_dir": folder.absolute()}
    values |= {"use_gpu": session.device == "cuda", "show_progress": False}
    if session.reduced:
        values |= {"epochs": 1, "topk": [10]}
    command = [sys.executable, str(SCRIPT), *(f"--{k}={v}" for k, v in values.items())]
    with (folder / "output.txt").open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, text=True, cwd=folder)


def result(session: Session, seed: int, model: str, code: int) -> Row:
    """What a training ended with."""
    folder = session.output / "seeds" / f"{model}-{seed}"
    row: Row = {"model": model, "seed": seed}
    files = sorted(folder.glob("*/result.json"))
    if code or not files:
        lines = (folder / "output.txt").read_text().strip().splitlines()
        return {**row, "error": f"exit code {code}: {lines[-1] if lines else ''}", "ok": False}
    found = json.loads(files[-1].read_text())
    row["valid ndcg@10"] = found["valid"]["history kept"]["ndcg@10"]
    row["test ndcg@10"] = found["test"]["history kept"]["ndcg@10"]
    return {**row, "best epoch": found["best_epoch"]}
