"""Approximate search: near the exact one, within the filters, refused where it cannot be."""

from pathlib import Path

import pytest
import torch

from recbole_simdiff import UserError, load
from recbole_simdiff.cli.main import main
from recbole_simdiff.serving.ranking import ApproximateIndex, best
from recbole_simdiff.serving.recommender import Request
from tests.serving.conftest import train

pytest.importorskip("faiss", reason="the extra ann")

DOCS = Path(__file__).parents[2] / "docs"

N, WIDTH, K = 20_000, 16, 10


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """Items in groups, as trained tables have them."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, WIDTH, generator=generator)
    return centres.repeat(N // 200, 1) + 0.3 * torch.randn(N, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def index(table: torch.Tensor) -> ApproximateIndex:
    return ApproximateIndex(table)


def users(n: int) -> torch.Tensor:
    """Vectors to search for."""
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1))


def test_most_of_the_best_are_found(table: torch.Tensor, index: ApproximateIndex) -> None:
    nothing = torch.zeros(N, dtype=torch.bool)
    hits = 0
    for vector in users(100):
        items, scores = index.best(vector, nothing, K)
        exact, _ = best(table @ vector, nothing, K)
        torch.testing.assert_close(scores, table[items] @ vector)
        assert (scores.diff() <= 0).all()
        hits += len(set(items.tolist()) & set(exact.tolist()))
    assert hits / (100 * K) >= 0.99


def test_it_does_search_and_not_score_everything(index: ApproximateIndex) -> None:
    """Else the recall above would say nothing: with one list read, some of the best are missed."""
    nothing, hits = torch.zeros(N, dtype=torch.bool), 0
    usual = index._index.nprobe
    for vector in users(20):
        index._index.nprobe = usual
        wanted = set(index.best(vector, nothing, K)[0].tolist())
        index._index.nprobe = 1
        hits += len(wanted & set(index.best(vector, nothing, K)[0].tolist()))
    index._index.nprobe = usual
    assert hits < 20 * K


@pytest.mark.parametrize("n_out", [5, 1000, N - 15, N - 3])
def test_what_is_ruled_out_is_never_found(
    table: torch.Tensor, index: ApproximateIndex, n_out: int
) -> None:
    (vector,) = users(1)
    out = torch.zeros(N, dtype=torch.bool)
    out[(table @ vector).argsort(descending=True)[:n_out]] = True
    items, _ = index.best(vector, out, K)
    assert len(items) == min(K, N - n_out)
    assert not out[items].any()
    if n_out > 1000:  # few are left: they are scored
        torch.testing.assert_close(items, best(table @ vector, out, K)[0])


@pytest.mark.parametrize("model", ["SASRecCE", "DreamRec", "GRU4Rec"])
def test_small_tables_give_the_exact_answers(tmp_path: Path, model: str) -> None:
    run_dir = train(tmp_path, model)
    exact = load(run_dir, use_gpu=False)
    near = load(run_dir, use_gpu=False, search="approximate")
    requests = [["i1", "i2"], Request(["i3"], exclude=["i4"]), Request(["i5"], allowed=["i6"])]
    for wanted, found in zip(exact.recommend(requests), near.recommend(requests), strict=True):
        assert found.items == wanted.items
        assert found.scores == pytest.approx(wanted.scores, abs=1e-5)


def test_a_model_without_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model=NextItNet has no vectors of users"):
        load(train(tmp_path, "NextItNet"), use_gpu=False, search="approximate")


def test_mistakes_are_named(run_dir: Path) -> None:
    with pytest.raises(UserError, match="search='fast' must be one of exact, approximate"):
        load(run_dir, search="fast")


def test_the_command_searches_too(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["recommend", f"--checkpoint={run_dir}", "--use_gpu=false", "--history=i1,i2"]
    outputs = []
    for search in ("exact", "approximate"):
        assert main([*given, f"--search={search}"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_the_page_shows_what_the_benchmark_printed() -> None:
    lines = (DOCS / "results" / "approximate.txt").read_text().splitlines()
    assert len(lines) == 4
    assert "\n".join(f"    {line}" for line in lines) in (DOCS / "serving.md").read_text()
