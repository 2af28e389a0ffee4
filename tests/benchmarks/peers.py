"""An epoch of RecTools' SASRec, gSASRec and eSASRec beside the same model here.

    python -m tests.benchmarks --parts=peers --peers=DIR/bin/python

RecTools needs other versions of NumPy and pandas than this package, so it has an environment of its
own: ``python -m venv DIR && DIR/bin/pip install 'rectools[torch]' torch==VERSION`` with the version
of this one. Both read the same interactions, all but the two newest of a user, and have the same
sizes, batches and negatives. Rounds go in turn, an epoch each.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from tests.benchmarks.measure import timed
from tests.benchmarks.process import Child, Ended, Late

ROUNDS, PATIENCE = 3, 600.0

SIZES = {"hidden_size": 64, "n_layers": 2, "n_heads": 2, "train_batch_size": 256}
SAMPLED = {"n_negatives": 256, "negatives_per": "token", "negative_distribution": "uniform"}

# Peer -> model and settings here; the program of the other environment knows the peers' names.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SASRec, full softmax": ("SASRecCE", {}),
    "gSASRec": ("SASRecCE", {"sr_loss": "gBCE", **SAMPLED}),
    "eSASRec": ("ESASRec", {"sr_loss": "sampled_softmax", **SAMPLED}),
}


def run(data_path: str, ready: Callable[..., Callable[[], Any]], python: str) -> None:
    """Print a line for each peer, or one that says what is missing.

    Args:
        data_path (str): folder of amazon-beauty.
        ready (Callable): model and settings -> what trains an epoch of it.
        python (str): the program of an environment that has RecTools.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "interactions.csv")
        place.write_text(training_part(data_path))
        for name, (model, values) in PEERS.items():
            child = Child("tests.benchmarks.rectools_peer", python=python)
            try:
                started = child.ask(PATIENCE, peer=name, interactions=str(place))
                if "missing" in started:
                    print(
                        f"peers: skipped, {python} has no RecTools ({started['missing']}); "
                        "--peers=PYTHON names one that has",
                        flush=True,
                    )
                    return
                print(beside(name, child, ready(model, **SIZES, **values), started), flush=True)
            except Late:
                print(f"    {name}: no epoch within {PATIENCE:g} s", flush=True)
            except Ended as error:
                print(f"    {name}: {error}", flush=True)
            finally:
                child.close()


def beside(name: str, child: Child, epoch: Callable[[], Any], started: dict[str, Any]) -> str:
    """The figures of a peer: seconds an epoch here and there, as a ratio of rounds in turn."""
    ours, theirs, answer = [], [], started
    for _ in range(ROUNDS):
        ours.append(timed(epoch))
        answer = child.ask(PATIENCE)
        theirs.append(answer["seconds"])
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return (
        f"    {name} : RecTools {started['version']} (torch {started['torch']}) = 1 : "
        f"{median(ratios):.1f} (median of {ROUNDS} rounds in turn, {ratios[0]:.1f} to "
        f"{ratios[-1]:.1f}); {median(ours):.1f} and {median(theirs):.1f} s an epoch, peak of "
        f"RecTools {answer['peak']:.2f} GiB, {torch.get_num_threads()} threads"
    )


def training_part(data_path: str) -> str:
    """Users, items and times of the interactions that training sees, as lines of CSV."""
    config = Config("SASRecCE", "amazon-beauty", overrides={"data_path": data_path})
    dataset = create_dataset(config)
    create_loaders(config, dataset)  # which puts events in order
    found = dataset.histories()
    items, ends = found["history_items"].tolist(), found["history_ends"].tolist()
    lines = ["user,item,time"]
    for user, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        lines += [f"{user},{items[i]},{i}" for i in range(begin, max(begin, end - 2))]
    return "\n".join(lines)
