"""What ``estimate`` says beside what runs then take, as a table.

    python -m tests.benchmarks.estimate --data_path=DIR

DIR holds amazon-beauty and ml-1m; the first 200 users of the latter are the small data set. Each
estimate and each run has a process of its own and one thread. Seconds are those of the processor,
which the load of a shared machine disturbs less than those of the clock.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from recbole_simdiff.config.config import Config
from recbole_simdiff.experiments.tables import grid
from recbole_simdiff.runs.estimate import estimate
from recbole_simdiff.runs.run import run_one

MODELS = ("SASRecCE", "DreamRec", "CL4SRec", "CaDiRec", "GRU4Rec")
SMALL, USERS = "ml-1m-200", 200
EPOCHS = {SMALL: 5, "amazon-beauty": 1}


def main() -> None:
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="dataset")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--datasets", default=",".join(EPOCHS))
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    given = parser.parse_args()
    if given.part:
        print(json.dumps(measured(given.data_path, *given.part)))
        return
    head = ["data set", "model", "s, estimated", "s, taken", "ratio"]
    head += ["GiB, estimated", "GiB, taken", "ratio"]
    print("\n".join(grid([head]).splitlines()), flush=True)
    with tempfile.TemporaryDirectory() as name:
        write_small(Path(given.data_path), Path(name))
        for dataset in given.datasets.split(","):
            folder = name if dataset == SMALL else given.data_path
            for model in given.models.split(","):
                print(row(folder, dataset, model), flush=True)


def row(folder: str, dataset: str, model: str) -> str:
    """One row of the table."""
    one, two = (in_process(folder, what, dataset, model) for what in ("estimate", "run"))
    cells = [dataset, model]
    for key, unit in (("seconds", 1.0), ("memory_mb", 1024.0)):
        cells += [f"{one[key] / unit:.2f}", f"{two[key] / unit:.2f}", f"{one[key] / two[key]:.2f}"]
    return f"| {' | '.join(cells)} |"


def in_process(folder: str, *part: str) -> dict[str, float]:
    """What ``measured`` returns in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.estimate", f"--data_path={folder}"]
    done = subprocess.run(
        [*command, "--part", *part], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(folder: str, what: str, dataset: str, model: str) -> dict[str, Any]:
    """Seconds of training and validation and peak memory, estimated or taken."""
    torch.set_num_threads(1)
    processor = mock.patch.multiple(
        time, perf_counter=time.process_time, monotonic=time.process_time
    )
    with tempfile.TemporaryDirectory() as saved, processor:
        values = {"data_path": folder, "checkpoint_dir": saved, "epochs": EPOCHS[dataset]}
        values |= {
            "MAX_ITEM_LIST_LENGTH": 20,
            "use_gpu": False,
            "show_progress": False,
            "state": "ERROR",
        }
        settings = "ml-1m" if dataset == SMALL else dataset
        plain = Config(model, settings).plain()["values"] if dataset == SMALL else {}
        config = Config(model, dataset, (), plain | values)
        if what == "estimate":
            found = estimate(config)
            return {"seconds": found.seconds, "memory_mb": found.memory_mb}
        result = run_one(config)
        return {"seconds": result.seconds, "memory_mb": result.peak_memory_mb}


def write_small(source: Path, target: Path) -> None:
    """The interactions of the first users of ml-1m, as a data set of its own."""
    head, *lines = (source / "ml-1m" / "ml-1m.inter").read_text().splitlines()
    users = dict.fromkeys(line.split("\t", 1)[0] for line in lines)
    kept = set(list(users)[:USERS])
    path = target / SMALL / f"{SMALL}.inter"
    path.parent.mkdir()
    path.write_text("\n".join([head, *(li for li in lines if li.split("\t", 1)[0] in kept)]) + "\n")


if __name__ == "__main__":
    main()
