"""The records that the tables are made of: of each row its runs, one a seed.

``runs/`` holds what ``keep.py`` took over: ``NAME.json``, and ``NAME.npz`` where the run had
stored the test rank of every user. ``amazon-beauty.csv`` has the metrics of older runs, all with
seed 2020.
``rows.txt`` has the order of the rows; after a bar, the encoder that a row is compared with.
"""

import csv
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from recbole_simdiff import files
from recbole_simdiff.evaluation.protocols import PROTOCOLS
from recbole_simdiff.evaluation.rankings import RANKS

HERE = Path(__file__).parent
RUNS = HERE / "runs"
FIRST_SEED = 2020  # of the runs that older records hold, and of a file without a seed in its name
FARTHEST = 255  # stands for this rank and all that are greater; the metrics end at 20


@dataclass(frozen=True)
class Run:
    """One run of a row.

    Attributes:
        arguments (str): of its command, without data set and seed.
        seed (int): its seed.
        best_epoch (int): counted from 0.
        epochs (int): how many were trained.
        ended (str): patience, epochs, or by hand.
        metrics (dict): (split, protocol) -> metric -> value.
        name (str): of its file; empty for one of the older runs.
        log (list): of its epochs; empty for one of the older runs.
    """

    arguments: str
    seed: int
    best_epoch: int
    epochs: int
    ended: str
    metrics: Mapping[tuple[str, str], Mapping[str, float]]
    name: str = ""
    log: Sequence[Mapping[str, Any]] = ()

    @property
    def seconds_per_epoch(self) -> float:
        """Median of the log's epochs, validation included."""
        return statistics.median(epoch["seconds"] for epoch in self.log)

    @property
    def updates_to_best(self) -> int:
        """Optimiser steps until the end of the best epoch."""
        return max(epoch["updates"] for epoch in self.log if epoch["epoch"] == self.best_epoch)

    @property
    def ranks(self) -> Path:
        """File of the ranks of its users, which need not exist, see ``load_ranks``."""
        return RUNS / f"{self.name or 'none'}.npz"


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        label (str): its name.
        against (str): label of the encoder that it is compared with; empty for none.
        runs (list): its runs, by seed.
    """

    label: str
    against: str
    runs: list[Run] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The label, with the number of runs where there are several."""
        return f"{self.label} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.label

    def values(self, split: str, protocol: str, metric: str) -> list[float]:
        """The metric of each run."""
        return [run.metrics[split, protocol][metric] for run in self.runs]

    def mean(self, split: str, protocol: str, metric: str) -> float:
        """Mean over the runs."""
        return statistics.fmean(self.values(split, protocol, metric))


def order() -> dict[str, str]:
    """Label of each row, in the order of the tables -> label of its encoder, or nothing."""
    lines = (HERE / "rows.txt").read_text().splitlines()
    return {label: against for label, _, against in (line.partition(" | ") for line in lines)}


def rows() -> dict[str, Row]:
    """Every row that has runs, in order.

    Raises:
        ValueError: if a row is not in ``rows.txt``, has two runs of a seed, or has a run with
            settings beside an older one, whose settings nobody could compare.
    """
    found = {label: Row(label, against) for label, against in order().items()}
    for label, run in [*_older(), *_kept()]:
        if label not in found:
            raise ValueError(f"{label!r} has a run and no line in rows.txt")
        if run.seed in {other.seed for other in found[label].runs}:
            raise ValueError(f"{label!r} has two runs with seed {run.seed}; remove one")
        if run.name and any(not other.name for other in found[label].runs):
            raise ValueError(
                f"{label!r} has an older run, of which no settings are recorded, beside "
                f"{run.name}; train seed {FIRST_SEED} anew, and remove its lines from "
                "amazon-beauty.csv"
            )
        found[label].runs.append(run)
    for row in found.values():
        row.runs.sort(key=lambda run: run.seed)
    return {label: row for label, row in found.items() if row.runs}


def _older() -> list[tuple[str, Run]]:
    lines: dict[str, list[dict[str, str]]] = {}
    with (HERE / "amazon-beauty.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            lines.setdefault(line["row"], []).append(line)
    return [
        (
            label,
            Run(
                first["arguments"],
                FIRST_SEED,
                int(first["best_epoch"]),
                int(first["epochs"]),
                first["ended"],
                {
                    (line["split"], line["protocol"]): {
                        name: float(value) for name, value in line.items() if "@" in name
                    }
                    for line in of_row
                },
            ),
        )
        for label, of_row in lines.items()
        for first in of_row[:1]
    ]


def _kept() -> list[tuple[str, Run]]:
    kept = []
    for path in sorted(RUNS.glob("*.json")):
        record = json.loads(path.read_text())
        metrics = {
            (split, protocol): record[split][protocol]
            for split in ("valid", "test")
            for protocol in PROTOCOLS
        }
        keys = ("arguments", "best_epoch", "epochs", "ended", "log")
        run = {key: record[key] for key in keys}
        seed = record["config"]["values"]["seed"]
        kept.append((record["row"], Run(**run, seed=seed, metrics=metrics, name=path.stem)))
    return kept


def read_ranks(run_dir: Path) -> dict[str, NDArray[Any]] | None:
    """The test rank of each user of a run, by id of the user; None if the run has not stored it.

    Runs on the same data have their users in the same order; a checksum of users and targets tells
    whether they do.

    Args:
        run_dir (Path): folder of the run.

    Returns:
        dict: ``kept`` and ``removed`` [users], and ``users``, the checksum.

    Raises:
        ValueError: if a user has several test rows.
    """
    if not (run_dir / RANKS).is_file():
        return None
    text = {"user": str, "item": str}
    ranks = pd.read_csv(run_dir / RANKS, dtype=text, keep_default_na=False).sort_values("user")
    if ranks["user"].duplicated().any():
        raise ValueError(f"{run_dir / RANKS} has several rows of a user")
    targets = "\n".join(ranks["user"] + "\t" + ranks["item"])
    columns = {"users": np.array(hashlib.blake2b(targets.encode(), digest_size=8).hexdigest())}
    for name in ("kept", "removed"):
        columns[name] = ranks[f"rank_{name}"].to_numpy()
    return columns


def save_ranks(ranks: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write what ``read_ranks`` returned, ranks in a byte each; for amazon-beauty about 25 kB."""
    small = {n: np.minimum(ranks[n], FARTHEST).astype(np.uint8) for n in ("kept", "removed")}
    files.write_atomically(path, partial(_savez, columns={**ranks, **small}))


def load_ranks(path: Path) -> dict[str, NDArray[Any]]:
    """What ``save_ranks`` wrote."""
    with np.load(path) as stored:
        ranks = {name: stored[name].astype(np.int64) for name in ("kept", "removed")}
        return ranks | {"users": stored["users"]}


def _savez(path: str, columns: Mapping[str, NDArray[Any]]) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, **columns)
