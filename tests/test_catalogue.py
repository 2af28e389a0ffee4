"""An approximate catalogue: what is drawn stands for all items, and a step touches few rows."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff import checkpoint, evaluate, load
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.models.sasrecce import SASRecCE
from recbole_simdiff.models.simdiffrec import SimDiffRec
from recbole_simdiff.modules import catalogue, encoder
from recbole_simdiff.modules.catalogue import (
    Candidates,
    draw_candidates,
    estimated_softmax_loss,
)
from recbole_simdiff.modules.losses import full_softmax_loss
from recbole_simdiff.modules.negatives import NegativeSampler
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import write_inter
from tests.test_resume import at, interrupt, train

N = 60  # ids, padding included
GIVEN = torch.tensor([7, 3, 7, 51])
MODELS = ("SASRecCE", "SimDiffRec")
# More items than are drawn, so that something is estimated.
MANY = {f"u{u}": [f"i{(7 * u + 3 * n * (u % 5 + 1)) % 90}" for n in range(6)] for u in range(40)}
DRAWN = {"n_candidates": 48, "catalogue": "approximate", "train_batch_size": 16}


def sampler(n_items: int = N) -> NegativeSampler:
    return NegativeSampler("log_uniform", torch.arange(n_items).flip(0), n_items)


def values_for(model: str, **others: Any) -> dict[str, Any]:
    """Settings of a model, with candidates that are fewer than the items."""
    return {**DRAWN, **others} | ({"k_noise": 3} if model == "SimDiffRec" else {})


# ---------------------------------------------------------------- candidates


def test_the_sum_over_candidates_is_that_over_all_items() -> None:
    """Unbiased: in the mean over many draws, for any scores."""
    torch.manual_seed(0)
    score, draw = torch.randn(N), sampler()
    sums = []
    for _ in range(4_000):
        among = draw_candidates(draw, GIVEN, 16)
        sums.append((score[among.items] - among.offset).exp().sum())
    sums_ = torch.stack(sums)
    error = sums_.std() / len(sums) ** 0.5
    assert abs(sums_.mean() - score[1:].exp().sum()) < 4 * error
    assert error < 0.01 * sums_.mean()


def test_given_items_count_once_and_are_found() -> None:
    torch.manual_seed(0)
    among = draw_candidates(sampler(), GIVEN, 40)
    assert len(among.items) == 44
    assert torch.equal(among.items, among.items.sort().values)
    place = among.place(GIVEN)
    assert torch.equal(among.items[place], GIVEN)
    assert (among.offset[place] == 0).all()
    assert not among.repeated[place].any()
    for item in GIVEN.unique():
        assert among.offset[among.items == item].isfinite().sum() == 1
    distinct = among.items[~among.repeated]
    assert torch.equal(distinct, among.items.unique())


def test_all_items_are_candidates_where_there_are_no_more() -> None:
    among = draw_candidates(sampler(), GIVEN, N - 1)
    assert torch.equal(among.items, torch.arange(1, N))
    assert not among.offset.any()
    assert not among.repeated.any()


@pytest.fixture
def case() -> tuple[Tensor, ...]:
    """Queries [n, H], table [N, H], targets [n]."""
    torch.manual_seed(1)
    query, table = torch.randn(9, 4), torch.randn(N, 4)
    return query.requires_grad_(), table.requires_grad_(), torch.randint(1, N, (9,))


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs)
    return [g.to_dense() if g.is_sparse else g for g in found]


def test_with_all_items_the_loss_is_the_full_softmax(case: tuple[Tensor, ...]) -> None:
    query, table, target = case
    among = draw_candidates(sampler(), target, N)
    loss = estimated_softmax_loss(query, table, target, among, 1e-6)
    exact = full_softmax_loss(query, table[1:], target - 1, 1e-6)
    torch.testing.assert_close(loss, exact)
    for one, other in zip(
        gradients(loss, query, table), gradients(exact, query, table), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_loss_and_its_gradients_are_those_of_its_formula(case: tuple[Tensor, ...]) -> None:
    query, table, target = case
    among = draw_candidates(sampler(), target, 20)
    loss = estimated_softmax_loss(query, table, target, among, 1e-6)
    logits = query @ table[among.items].t() - among.offset
    wanted = (logits.logsumexp(1) - (query * table[target]).sum(1)).sum()
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(
        gradients(loss, query, table), gradients(wanted, query, table), strict=True
    ):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- SimDiffRec


@pytest.fixture
def small(make_config: Any) -> Any:
    """small(key=value, ...) -> SimDiffRec of N - 1 items without data, dropout off."""

    def make(**overrides: Any) -> Any:
        values: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
        config = make_config(**values, **overrides)
        torch.manual_seed(0)
        model = SimDiffRec(config, SimpleNamespace(num=lambda field: N))
        model.item_embedding.weight.data[1:].normal_()
        return model

    return make


def batch() -> Interaction:
    seq = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0], [8, 2, 9, 0]])
    length, target = torch.tensor([4, 2, 1, 3]), torch.tensor([10, 3, 40, 6])
    return Interaction({"item_id_list": seq, "item_length": length, "item_id": target})


@pytest.mark.parametrize("noise_detach", [True, False])
def test_with_all_items_a_step_is_the_exact_one(small: Any, noise_detach: bool) -> None:
    values = {"mask_pad_in_softmax": True, "noise_detach": noise_detach, "reverse_steps": 3}
    found = []
    for kind in ("exact", "approximate"):
        model = small(catalogue=kind, n_candidates=N, **values)
        torch.manual_seed(5)
        losses = model.calculate_loss(batch())
        sum(losses).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert grads["item_embedding.weight"].is_sparse == (kind == "approximate")
        found.append((losses, {n: g.to_dense() for n, g in grads.items()}))
    (exact, of_exact), (approximate, of_approximate) = found
    torch.testing.assert_close(tuple(approximate), tuple(exact))
    assert of_approximate.keys() == of_exact.keys()
    for name, gradient in of_exact.items():
        torch.testing.assert_close(of_approximate[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_estimated_losses_are_exact_in_the_mean(small: Any) -> None:
    """The sums within the logarithm are, so the losses nearly are: a little below (Jensen)."""
    exact = small(mask_pad_in_softmax=True)
    model = small(catalogue="approximate", n_candidates=48)
    torch.manual_seed(5)
    wanted = exact.calculate_loss(batch()).rec
    many = torch.stack([model.calculate_loss(batch()).rec.detach() for _ in range(200)])
    assert many.std() > 0
    torch.testing.assert_close(many.mean(), wanted, rtol=0.04, atol=0)


def test_neighbours_and_choices_are_the_best_candidates(small: Any) -> None:
    model = small(catalogue="approximate", n_candidates=48, k_noise=3, rounding="tied")
    table = model.item_embedding.weight.detach()
    items = batch()["item_id_list"].flatten().unique()[1:]
    among: Candidates = model.catalogue_sample(items)
    distinct = among.items.unique()
    assert len(distinct) < N - 1
    score = table[items] @ table[distinct].t()
    score[items.unsqueeze(1) == distinct] = -torch.inf
    best = distinct[score.topk(3).indices]
    found = model.nearest_items(items, among)
    assert torch.equal(found.sort(1).values, best.sort(1).values)

    query = torch.randn(len(items), table.shape[1])
    ranked = distinct[(query @ table[distinct].t()).topk(2).indices]
    choices = model.choices(query, model.rank_depth, among)
    positive, negative = model.replacements(choices, items)
    assert torch.equal(torch.stack([positive, negative], 1), ranked)
    confidence, first = choices.confidence, choices.items[:, 0]
    assert torch.equal(first, ranked[:, 0])
    sums = ((query @ table[among.items].t()) - among.offset).exp().sum(1)
    wanted = (query * table[first]).sum(1).exp() / sums
    torch.testing.assert_close(confidence, wanted.clamp(max=1.0))


def test_views_hold_candidates_only(small: Any) -> None:
    model = small(catalogue="approximate", n_candidates=48)
    for view in model.augmented_views(batch()).values():
        assert view.min() >= 0
        assert view.max() < N


# ---------------------------------------------------------------- training


@pytest.fixture
def many(data_path: Path) -> str:
    write_inter(data_path, "many", MANY)
    return "many"


@pytest.mark.parametrize("model", MODELS)
def test_a_step_moves_the_rows_it_used_alone(build: Any, many: str, model: str) -> None:
    config, data, _, _, made = build(model, many, **values_for(model, n_candidates=48))
    trainer = PlanTrainer(config, made, Path("run"))
    assert list(trainer.optimizers) == ["optimizer", "optimizer_rows"]
    before = made.item_embedding.weight.detach().clone()
    one = next(iter(data))[:1]
    losses = made.calculate_loss(one)
    sum(losses).backward()
    used = made.item_embedding.weight.grad.coalesce().indices()[0]
    assert 0 not in used
    trainer.optimizers["optimizer_rows"].step()
    moved = (made.item_embedding.weight != before).any(1).nonzero().squeeze(1)
    assert torch.equal(moved, used)
    assert len(used) < len(before) - 1


@pytest.mark.parametrize("model", MODELS)
def test_a_stopped_run_goes_on_exactly(
    make_config: Any, many: str, tmp_path: Path, model: str
) -> None:
    config = make_config(model, many, **values_for(model), epochs=3)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", at(4, interrupt))
    train(config, tmp_path / "cut", resume=True)
    (wanted, content), (found, other) = (
        checkpoint.load(tmp_path / place / LAST) for place in ("whole", "cut")
    )
    assert {"optimizer_rows.0.exp_avg", "model.item_embedding.weight"} <= wanted.keys()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    assert other["optimizer_rows"] == content["optimizer_rows"]
    assert content["optimizer_rows"]["slots"]["0"]["step"] > 4


@pytest.mark.parametrize("model", MODELS)
def test_with_all_items_runs_end_close_to_exact_ones(
    make_config: Any, many: str, model: str
) -> None:
    """Adam moves rows without gradient, too, by their moments; so the runs are not equal."""
    values = {"epochs": 4, "mask_pad_in_softmax": True, "train_batch_size": 64}
    found = {}
    for kind in ("exact", "approximate"):
        config = make_config(model, many, catalogue=kind, n_candidates=200, **values)
        tensors, _ = checkpoint.load(Path(run(config).run_dir) / LAST)
        found[kind] = tensors["model.item_embedding.weight"]
    start = torch.nn.Embedding(*found["exact"].shape).weight  # unrelated rows
    cosine = F.cosine_similarity(found["exact"][1:], found["approximate"][1:])
    assert cosine.mean() > 0.99
    assert F.cosine_similarity(found["exact"][1:], start[1:]).mean() < 0.5


# ---------------------------------------------------------------- what is refused, and said


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("CaDiRec", {}, "model=CaDiRec compares with all items; SASRecCE and SimDiffRec"),
        ("SASRecCE", {"sr_loss": "BCE"}, "needs sr_loss=CE, is BCE: it estimates"),
        ("SASRecCE", {"repeat_bias": "learned"}, "needs repeat_bias=none, is learned"),
        ("SASRecCE", {"learner": "sgd"}, "needs learner=adam, is sgd"),
        ("SASRecCE", {"weight_decay": 0.1}, "needs weight_decay=0.0, is 0.1"),
        ("SASRecCE", {"clip_grad_norm": {"max_norm": 1.0}}, "needs clip_grad_norm=None, is {"),
        ("SASRecCE", {"n_candidates": 15}, "n_candidates=15 must be at least 16"),
        ("SASRecCE", {"catalogue": "some"}, "'some' is not one of exact, approximate"),
        ("SimDiffRec", {"n_candidates": 47}, "n_candidates=47 must be at least 16 times .* 3:"),
        ("SimDiffRec", {"preset": "official"}, "needs pad_in_diffusion_loss=False"),
    ],
)
def test_what_does_not_go_together_is_refused(
    make_config: Any, model: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(model, **{"catalogue": "approximate", **values})


def test_several_processes_are_refused(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "world_size", lambda: 2)
    make_config("SASRecCE")
    with pytest.raises(UserError, match=r"trains in one process.*Give --nproc=1"):
        make_config("SASRecCE", catalogue="approximate")


@pytest.mark.parametrize(("limit", "kind"), [(10, "exact"), (10, "approximate"), (13, "exact")])
def test_the_log_of_many_items_names_it(
    build: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limit: int,
    kind: str,
) -> None:
    """The toy data have 12 items, 13 ids."""
    monkeypatch.setattr(catalogue, "LARGE_CATALOGUE", limit)
    with caplog.at_level(logging.INFO):
        build("SASRecCE", catalogue=kind)
    assert ("12 items: each step compares with all" in caplog.text) == (
        limit == 10 and kind == "exact"
    )
    assert encoder.name_catalogue is catalogue.name_catalogue


# ---------------------------------------------------------------- ranking in blocks


def test_rows_are_ranked_in_blocks_that_fit(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of evaluation and of recommendations; what they find does not depend on it."""
    config = make_config("SASRecCE")
    sizes: list[int] = []
    stock = SASRecCE.full_sort_predict

    def spied(model: SASRecCE, rows: Interaction) -> Tensor:
        sizes.append(len(rows))
        return stock(model, rows)

    monkeypatch.setattr(SASRecCE, "full_sort_predict", spied)
    whole = run(config)
    lists = load(whole.run_dir).recommend([["i1", "i2"], ["i9"], ["i3", "i4"], ["i5"]], k=3)
    assert max(sizes) == 5  # of the rows of validation
    sizes.clear()
    monkeypatch.setattr(catalogue, "SCORES_MB", 4 * 13 * 2 / 2**20)
    blocks = evaluate(whole.run_dir)
    found = load(whole.run_dir).recommend([["i1", "i2"], ["i9"], ["i3", "i4"], ["i5"]], k=3)
    assert max(sizes) == 2
    assert (blocks.valid, blocks.test) == (whole.valid, whole.test)
    assert [row.items for row in found] == [row.items for row in lists]


def test_the_usual_number_of_rows_is_left_alone() -> None:
    assert catalogue.rows_at_once(256, 12_102) == 256
    assert catalogue.rows_at_once(256, 1_200_001) == 111
    assert catalogue.rows_at_once(256, 10**10) == 1
