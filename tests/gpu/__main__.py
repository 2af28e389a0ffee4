"""Check and measure everything that only a GPU can show, in at most nine minutes.

    python -m tests.gpu --data_path=<folder with amazon-beauty> --output=FOLDER

Parts run in order of importance, each within a time of its own; what one does not use the next
ones may. Rows are written to FOLDER/results.jsonl and FOLDER/results.md as they come. Without a GPU
``--device=cpu`` runs the same in a reduced form, on tiny data. The exit code is 1 if a check fails.
``tests/gpu/wheels.py`` collects what a machine without a package index needs.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.gpu.parity import parity
from tests.gpu.runs import resume, seeds
from tests.gpu.session import Row, Session
from tests.gpu.steps import busy, catalogue, epoch, waits
from tests.gpu.system import collectives, environment, memory

# Part -> what runs it, and its seconds.
PARTS: dict[str, tuple[Callable[[Session], Iterator[Row]], float]] = {
    "environment": (environment, 5),
    "parity": (parity, 90),
    "resume": (resume, 50),
    "nccl": (collectives, 10),
    "memory": (memory, 5),
    "waits": (waits, 60),
    "busy": (busy, 70),
    "epoch": (epoch, 80),
    "catalogue": (catalogue, 40),
    "seeds": (seeds, 130),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for; 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="dataset", help="folder of the data set")
    parser.add_argument("--dataset", default="amazon-beauty")
    parser.add_argument("--output", required=True, type=Path, help="folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=540, help="of all parts together")
    given = parser.parse_args(arguments)
    names = given.parts.split(",")
    if unknown := sorted(set(names) - PARTS.keys()):
        parser.error(f"--parts={given.parts}: {', '.join(unknown)} must be of {', '.join(PARTS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch finds no GPU here; --device=cpu runs the reduced form")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    output, data_path = given.output.absolute(), str(Path(given.data_path).absolute())
    reduced = given.device == "cpu"
    session = Session(given.device, data_path, given.dataset, output, reduced, given.seconds)
    os.chdir(output)  # RecBole writes TensorBoard files where it runs
    spare = 0.0
    for name in names:
        part, seconds = PARTS[name]
        before = sum(row["took"] for row in session.rows if "took" in row)
        session.run(name, part, seconds + spare)
        spent = sum(row["took"] for row in session.rows if "took" in row) - before
        spare = max(0.0, spare + seconds - spent)
    return int(any(row.get("ok") is False for row in session.rows))


if __name__ == "__main__":
    sys.exit(main())
