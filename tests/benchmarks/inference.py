"""What a recommendation costs: one request, and rows a second in batches, by the number of items.

    python -m tests.benchmarks --parts=inference

Weights are untrained and histories random, of 3 to 15 items, the same ones for every model. A
request is one history: its scores and the ten best items, or the search of an index of the extra
``ann``. Each model has a process of its own. Rounds go in turn; ratios to the encoder are medians
over rounds, of the processor's time, which other programs disturb less than the clock's. DiffuASR
is the backbone that it trains.
"""

import math
import sys
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.catalogue import rows_at_once
from recbole_simdiff.runs.histories import history_batch, history_scores
from recbole_simdiff.serving.ranking import ApproximateIndex
from recbole_simdiff.serving.vectors import item_matrix, user_matrix
from tests.benchmarks.figures import Figures
from tests.benchmarks.measure import SIZES, Synthetic, resident
from tests.benchmarks.measure import synthetic_config as config_of
from tests.benchmarks.process import Child, Ended, Late, serve

ENCODER, STOCK, K = "SASRecCE", "SASRec", 10
MODELS = (ENCODER, "SimDiffRec", "CaDiRec", "DiffuASR", "DreamRec", "CL4SRec", "DuoRec")
MODELS += ("MCLRec", "ECLSR", "ESASRec", STOCK)

# Requests and rows of a batch in a round, and rounds, by the number of items.
REQUESTS = {12_000: 100, 120_000: 40, 1_200_000: 10}
BATCH, ROUNDS = 256, 5
PATIENCE = 120.0  # seconds for an answer


class Server:
    """A model of random weights that answers requests in this process."""

    def __init__(self, name: str, n_items: int) -> None:
        torch.manual_seed(0)
        values = {"backbone": ENCODER} if name == "DiffuASR" else {}
        self.config = config_of(name, **values)
        self.model = self.config.model_class(self.config, Synthetic(n_items + 1)).eval()
        self.name, self.n_items = self.config.name, n_items
        self.index: ApproximateIndex | None = None
        self.generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def answer(self, search: str, requests: int, rows: int) -> dict[str, Any]:
        """Seconds of each of some requests, and of a batch; of the processor; peak memory, GiB."""
        if search == "approximate" and self.index is None:
            try:
                self.check_product()
                self.index = ApproximateIndex(item_matrix(self.name, self.model))
            except UserError as error:
                return {"error": str(error)}
        seconds, histories = [], self.histories(requests)
        cpu = time.process_time()
        for history in histories:
            begin = time.perf_counter()
            self.best([history], search)
            seconds.append(time.perf_counter() - begin)
        cpu = time.process_time() - cpu
        histories, at_once = self.histories(rows), rows_at_once(rows, self.n_items + 1)
        begin, batch_cpu = time.perf_counter(), time.process_time()
        for start in range(0, rows, at_once):
            self.best(histories[start : start + at_once], search)
        batch, batch_cpu = time.perf_counter() - begin, time.process_time() - batch_cpu
        found = {"seconds": seconds, "cpu": cpu, "batch": batch, "batch_cpu": batch_cpu}
        return {**found, "peak": resident("VmHWM")}

    def histories(self, n: int) -> list[list[int]]:
        """Random ones, in the same order for every model."""
        sizes = torch.randint(3, 16, (n,), generator=self.generator).tolist()
        return [
            torch.randint(1, self.n_items + 1, (size,), generator=self.generator).tolist()
            for size in sizes
        ]

    def best(self, histories: list[list[int]], search: str) -> list[Tensor]:
        """The ten best items of each history."""
        if self.index is None or search == "exact":
            scores = history_scores(self.config, self.model, histories)[:, : self.n_items + 1]
            return list(scores.topk(K).indices)
        vectors = user_matrix(self.name, self.model, history_batch(self.config, histories))
        nothing = torch.zeros(self.n_items + 1, dtype=torch.bool)
        return [self.index.best(vector, nothing, K)[0] for vector in vectors]

    def check_product(self) -> None:
        """See that a score is the product of two vectors; else there is nothing to search."""
        vectors = user_matrix(self.name, self.model, history_batch(self.config, [[1, 2, 3]]))
        scores = history_scores(self.config, self.model, [[1, 2, 3]])[:, : self.n_items + 1]
        wanted = vectors @ item_matrix(self.name, self.model).t()
        if not torch.allclose(scores[:, 1:], wanted[:, 1:], atol=1e-3):
            raise UserError(f"{self.name} does not score by the product of two vectors")


def run(figures: Figures, short: bool = False) -> None:
    """Print the tables."""
    print(f"inference: histories of 3 to 15 items, top {K}, batches of {BATCH}")
    models = (ENCODER, "SimDiffRec", "CaDiRec", "DreamRec", STOCK) if short else MODELS
    for n_items in SIZES[:1] if short else SIZES:
        children = {name: Child(__name__, name, str(n_items)) for name in models}
        try:
            for search in ("exact", "approximate"):
                size(figures, children, n_items, search, 3 if short else ROUNDS)
        finally:
            for child in children.values():
                child.close()


def size(
    figures: Figures, children: dict[str, Child], n_items: int, search: str, rounds: int
) -> None:
    """The lines of a number of items; with the first one each process loads its model."""
    few = {"search": search, "requests": 3, "rows": 8}
    many = {"search": search, "requests": REQUESTS[n_items], "rows": BATCH}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, child in [*children.items()]:
        if search == "approximate" and name == STOCK:
            continue  # full_sort_predict is all that RecBole has
        if answered(name, child, few):
            found[name] = []
    for _ in range(rounds):
        for name in [*found]:
            if answer := answered(name, children[name], many):
                found[name].append(answer)
            else:
                del found[name]
                children.pop(name).close()
    print(f"  {n_items:,} items, {search}, {rounds} rounds of {many['requests']} requests in turn:")
    for name, answers in found.items():
        print(line(name, answers, found.get(ENCODER)), flush=True)
    if n_items == SIZES[0] and search == "exact":
        for name, to in (("SimDiffRec", ENCODER), ("CaDiRec", ENCODER), (ENCODER, STOCK)):
            value = ratio(found[name], found[to]) if {name, to} <= found.keys() else math.nan
            figures.keep(f"inference, {name}", value)


def answered(name: str, child: Child, request: dict[str, Any]) -> dict[str, Any] | None:
    """The answer of a process; None, and a line that says why, if it has none."""
    try:
        answer = child.ask(PATIENCE, **request)
    except Late:
        answer = {"error": f"no answer within {PATIENCE:g} s"}
    except Ended as error:
        answer = {"error": str(error)}
    if "error" in answer:
        print(f"    {name:<12} {request['search']}: {answer['error']}", flush=True)
        return None
    return answer


def ratio(one: list[dict[str, Any]], other: list[dict[str, Any]], key: str = "cpu") -> float:
    """Of the processor's time of two models: the median over rounds."""
    return median(a[key] / b[key] for a, b in zip(one, other, strict=True))


def line(name: str, answers: list[dict[str, Any]], encoder: list[dict[str, Any]] | None) -> str:
    """The figures of a model."""
    seconds = sorted(second for answer in answers for second in answer["seconds"])
    late = seconds[math.ceil(0.99 * len(seconds)) - 1]
    rate = BATCH / median(answer["batch"] for answer in answers)
    peak = max(answer["peak"] for answer in answers)
    text = f"    {name:<12} p50 {1e3 * median(seconds):8.2f} ms, p99 {1e3 * late:8.2f} ms, "
    text += f"{rate:8.0f} rows a second, peak {peak:5.2f} GiB"
    if encoder is None:
        return text
    of_batch = ratio(answers, encoder, "batch_cpu")
    return f"{text}; {ratio(answers, encoder):5.2f} x {ENCODER}, in batches {of_batch:5.2f} x"


def main(name: str, n_items: str) -> None:
    """The process of a model."""
    made: list[Server] = []

    def answer(**request: Any) -> dict[str, Any]:
        if not made:
            made.append(Server(name, int(n_items)))
        return made[0].answer(**request)

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
