"""Many requests from many connections to ``serve``: latency, lost and wrong answers.

    python -m tests.benchmarks.serving --data_path=DIR [--requests=20000] [--connections=32]

DIR holds amazon-beauty/amazon-beauty.inter, on which SASRecCE is trained for one epoch; or give a
run with --checkpoint. Server and client share the machine: the client's own work is part of what
is measured. Ends with an error if an answer is lost or differs from what ``recommend`` gives.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np

from recbole_simdiff import load, run
from tests.serving.client import running, send

K = 10


def main() -> int:
    """Train if need be, serve, ask, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="dataset")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.checkpoint or trained(arguments.data_path, folder)
        return measure(place, arguments.requests, arguments.connections)


def trained(data_path: str, folder: str) -> Path:
    """A run of one epoch on amazon-beauty."""
    values = {"epochs": 1, "show_progress": False, "checkpoint_dir": folder, "use_gpu": False}
    return Path(run("SASRecCE", "amazon-beauty", data_path=data_path, **values).run_dir)


def measure(place: Path, n_requests: int, connections: int) -> int:
    """Print what a load of requests meets; 1 if an answer was lost or wrong."""
    recommender = load(place, use_gpu=False)
    users = recommender.users
    histories = [recommender.history(users[i % len(users)]) for i in range(n_requests)]
    bodies = [{"items": items, "k": K} for items in histories]
    wanted = recommender.recommend(histories, k=K)
    with running(place) as server:
        asyncio.run(send(server.url, bodies[:200], connections))  # to warm up
        before = cpu_seconds(server.url)
        met = asyncio.run(send(server.url, bodies, connections))
        work = cpu_seconds(server.url) - before
    lost = sum(answer is None or answer[0] >= 500 for answer in met.answers)
    refused = sum(answer is not None and 400 <= answer[0] < 500 for answer in met.answers)
    wrong = 0
    for answer, own in zip(met.answers, wanted, strict=True):
        if answer is not None and answer[0] == 200:
            wrong += not same(answer[1]["items"], answer[1]["scores"], own.items, own.scores)
    middle, late = np.percentile(met.seconds, [50, 99]) * 1000
    print(
        f"{n_requests} requests over {connections} connections, {len(recommender.item_ids) - 1} "
        f"items, k={K}: {n_requests / met.total:.0f} a second"
    )
    print(f"server: {1000 * work / n_requests:.2f} ms of CPU a request")
    print(f"p50 {middle:.1f} ms, p99 {late:.1f} ms")
    print(f"{lost} lost, {refused} refused, {wrong} wrong")
    return int(bool(lost or refused or wrong))


def cpu_seconds(url: str) -> float:
    """CPU time that the server has taken."""
    text = httpx.get(f"{url}/metrics").text
    (line,) = (line for line in text.splitlines() if line.startswith("process_cpu_seconds_total"))
    return float(line.split()[1])


def same(items: list[str], scores: list[float], own: list[str], own_scores: list[float]) -> bool:
    """Whether two answers agree: in their scores, and in their items but for equal scores."""
    if len(items) != len(own) or not np.allclose(scores, own_scores, rtol=1e-5, atol=1e-5):
        return False
    gaps = np.abs(np.diff(own_scores, prepend=np.inf, append=-np.inf))
    clear = np.minimum(gaps[:-1], gaps[1:])[: len(own)] > 1e-5
    return all(a == b for a, b, c in zip(items, own, clear, strict=True) if c)


if __name__ == "__main__":
    sys.exit(main())
