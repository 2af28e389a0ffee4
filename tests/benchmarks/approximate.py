"""Approximate against exact search: recall@10 and time of one search, by the number of items.

    python -m tests.benchmarks.approximate --data_path=DIR [--checkpoint=RUN]

DIR holds amazon-beauty/amazon-beauty.inter, on which SASRecCE is trained for one epoch; or give a
run with --checkpoint. The first table is the run's own. Larger ones are made of it: rows drawn from
the trained ones, each with normal noise of 0.3 times the standard deviation of its column. The
users' vectors are those of the run's own users. One thread.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from recbole_simdiff import load
from recbole_simdiff.serving.ranking import ApproximateIndex, best
from tests.benchmarks.serving import trained

K, N_USERS, SIZES = 10, 300, (12_000, 120_000, 1_200_000)


def main() -> None:
    """Print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="dataset")
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recommender = load(
            arguments.checkpoint or trained(arguments.data_path, folder), use_gpu=False
        )
    histories = {user: recommender.history(user) for user in recommender.users[:N_USERS]}
    users = torch.from_numpy(recommender.user_vectors(histories).values)
    own = torch.from_numpy(recommender.item_vectors().values)
    import faiss

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    print(f"{'items':>9} {'recall@10':>9} {'exact ms':>9} {'search ms':>9} {'build s':>8}")
    for size in SIZES:
        print(row(enlarged(own, size), users), flush=True)


def enlarged(own: Tensor, size: int) -> Tensor:
    """The table itself, cut, or a larger one made of it, [size, H]."""
    if size <= len(own):
        return own[:size]
    generator = torch.Generator().manual_seed(0)
    table = own[torch.randint(len(own), (size,), generator=generator)]
    return table + 0.3 * own.std(0) * torch.randn(table.shape, generator=generator)


def row(table: Tensor, users: Tensor) -> str:
    """The figures of a table; times are CPU seconds of this process, medians over users."""
    begin = time.process_time()
    index = ApproximateIndex(table)
    build = time.process_time() - begin
    nothing = torch.zeros(len(table), dtype=torch.bool)
    hits, exact_times, search_times = 0, [], []
    for user in users:
        begin = time.process_time()
        exact, _ = best(table @ user, nothing, K)
        middle = time.process_time()
        found, _ = index.best(user, nothing, K)
        search_times.append(time.process_time() - middle)
        exact_times.append(middle - begin)
        hits += len(set(exact.tolist()) & set(found.tolist()))
    recall = hits / (K * len(users))
    times = f"{1000 * median(exact_times):9.2f} {1000 * median(search_times):9.2f}"
    return f"{len(table):>9,} {recall:9.3f} {times} {build:8.1f}"


if __name__ == "__main__":
    main()
