"""The trainer: what it measures, what it selects, and when it stops."""

import math
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from recbole.data.dataloader import NegSampleEvalDataLoader
from recbole.evaluator import Collector, Evaluator
from recbole.utils import init_seed
from torch import Tensor, nn

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST, LAST, load_optimizer_state, optimizer_state
from recbole_simdiff.errors import Interrupted, TrainingDiverged
from recbole_simdiff.evaluation.collector import TargetCollector
from recbole_simdiff.evaluation.protocols import KEPT, PROTOCOLS, REMOVED
from recbole_simdiff.modules.base import SequentialModel
from recbole_simdiff.modules.plan import Phase
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import SEQUENCES, write_inter


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On tensors this small threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stub(SequentialModel):
    """A model whose scores and losses are given, so that a test decides what the trainer sees."""

    def __init__(
        self,
        scores: Callable[[Any], Tensor] | None = None,
        loss: Callable[["Stub"], Any] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(3))
        self.scores = scores or (lambda batch: torch.rand(len(batch), 13))
        self.loss = loss or (lambda model: model.weight.sum())
        self.losses = self.rankings = 0

    def calculate_loss(self, interaction: Any) -> Any:
        self.losses += 1
        return self.loss(self)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        self.rankings += 1
        return self.scores(interaction)


@pytest.fixture
def make(build: Any, tmp_path: Path) -> Any:
    """make(stub, key=value, ...) -> (trainer, training, validation and test loader) on toy."""

    def trainer(stub: Stub, **overrides: Any) -> Any:
        config, train, valid, test, _ = build("SimDiffRec", **overrides)
        stub.epochs = config["epochs"]
        found = PlanTrainer(config, stub, tmp_path / "run")
        found.evaluator.data_collect(train)
        return found, train, valid, test

    return trainer


def target(batch: Any, n_items: int = 13) -> Tensor:
    """One-hot scores of each row's target: an oracle."""
    return nn.functional.one_hot(batch["item_id"], n_items).float()


# ---------------------------------------------------------------------- metrics


def measured(collector: Any, config: Any, batches: list[Any]) -> Any:
    for scores, rows, items in batches:
        collector.eval_batch_collect(scores, None, rows, items)
    evaluator = Evaluator(config)
    for metric in evaluator.metric_class.values():
        metric.decimal_place = 15
    return evaluator.evaluate(collector.get_data_struct())


def random_batches(n_items: int = 40) -> list[Any]:
    """Three batches of scores with many ties, one target a row, padding ruled out."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size in (64, 64, 17):
        scores = torch.randint(0, 25, (size, n_items), generator=generator).float()
        scores[:, 0] = -torch.inf
        items = torch.randint(1, n_items, (size,), generator=generator)
        batches.append((scores, torch.arange(size), items))
    return batches


def test_target_collector_equals_recboles_bit_for_bit(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(metrics=["Hit", "NDCG", "MRR", "Recall", "Precision", "MAP"], topk=[1, 5])
    stock = measured(Collector(config), config, random_batches())
    assert 0 < stock["hit@5"] < 1

    def unused(*_: Any) -> None:
        raise AssertionError("RecBole's users x items matrix was built")

    monkeypatch.setattr(Collector, "eval_batch_collect", unused)
    assert measured(TargetCollector(config), config, random_batches()) == stock


def test_several_targets_a_row_go_to_recboles_collector(make_config: Any) -> None:
    config = make_config()
    rows, items = torch.tensor([0, 0, 1]), torch.tensor([3, 7, 2])
    batch = [(torch.rand(2, 20, generator=torch.Generator().manual_seed(1)), rows, items)]
    assert measured(TargetCollector(config), config, batch) == measured(
        Collector(config), config, batch
    )


@pytest.mark.parametrize("seed", range(5))
def test_ndcg_grows_with_hits_between_rank_6_and_10(make_config: Any, seed: int) -> None:
    """A hit at rank r is worth 1 / log2(r + 1): 0.3562 at rank 6, 0.2891 at rank 10."""
    config = make_config(topk=[5, 10])
    scores = torch.rand(200, 30, generator=torch.Generator().manual_seed(seed))
    batch = (scores, torch.arange(200), torch.arange(200) % 29 + 1)
    found = measured(TargetCollector(config), config, [batch])
    hits = found["hit@10"] - found["hit@5"]
    assert hits > 0
    assert 0.2890 * hits < found["ndcg@10"] - found["ndcg@5"] < 0.3563 * hits


def test_coverage_metrics_work(make: Any) -> None:
    """RecBole 1.2.1 crashes on these; here the first place always goes to item 1."""
    metrics = ["NDCG", "ItemCoverage", "GiniIndex", "AveragePopularity", "TailPercentage"]
    stub = Stub(lambda batch: -torch.arange(13.0).expand(len(batch), 13))
    trainer, train, valid, _ = make(stub, metrics=metrics, topk=[1, 5])
    counts = [int((train.dataset.train_items == i).sum()) for i in range(1, 6)]
    for _ in range(2):  # the training counts must survive the first evaluation
        found = trainer.evaluator.evaluate(valid, (KEPT,))[KEPT]
        assert found["itemcoverage@1"] == pytest.approx(1 / 12)
        assert found["itemcoverage@5"] == pytest.approx(5 / 12)
        assert found["giniindex@1"] == pytest.approx(11 / 12)
        assert found["averagepopularity@1"] == counts[0]
        assert found["averagepopularity@5"] == pytest.approx(sum(counts) / 5)
        assert 0 <= found["tailpercentage@5"] <= 1


def test_a_metric_without_a_ranking_list_is_measured_too(make: Any) -> None:
    trainer, _, valid, _ = make(Stub(target), metrics=["GAUC"], valid_metric="GAUC")
    assert trainer.evaluator.evaluate(valid, (KEPT,))[KEPT]["gauc"] == pytest.approx(1.0)


def test_an_oracle_is_perfect_on_both_protocols(make: Any) -> None:
    trainer, _, valid, test = make(Stub(target))
    for data in (valid, test):
        for found in trainer.evaluator.evaluate(data).values():
            assert all(found[f"{metric}@{k}"] == 1 for metric in ("hit", "ndcg") for k in (1, 5))


def test_metrics_are_not_rounded(make: Any) -> None:
    """Epochs are compared on these; every target has two better items here."""

    def third(batch: Any) -> Tensor:
        items = batch["item_id"]
        better = [nn.functional.one_hot((items + i) % 12 + 1, 13) for i in (0, 1)]
        return target(batch) + 2 * better[0] + 3 * better[1]

    trainer, _, valid, _ = make(Stub(third))
    found = trainer.evaluator.evaluate(valid, (KEPT,))[KEPT]
    assert found["mrr@5"] == pytest.approx(1 / 3, abs=1e-12)


# ---------------------------------------------------------------------- protocols


@pytest.fixture
def rankings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(scores, interaction) of every batch that reaches a collector, in order."""
    seen: list[Any] = []
    stock = TargetCollector.eval_batch_collect

    def record(self: Any, scores: Tensor, interaction: Any, *rest: Tensor) -> None:
        seen.append((scores.clone(), interaction))
        stock(self, scores, interaction, *rest)

    monkeypatch.setattr(TargetCollector, "eval_batch_collect", record)
    return seen


def excluded(rankings: list[Any], dataset: Any) -> dict[str, set[str]]:
    """User -> raw items that cannot be ranked, padding left out."""
    found = {}
    for scores, interaction in rankings:
        assert torch.isneginf(scores[:, 0]).all()
        for user, row in zip(interaction["user_id"], scores, strict=True):
            ids = torch.isneginf(row).nonzero().squeeze(1)[1:]
            name = dataset.id2token("user_id", int(user))
            found[str(name)] = {str(dataset.id2token("item_id", int(i))) for i in ids}
    return found


def test_history_removed_takes_out_all_earlier_items_and_kept_none(
    make: Any, rankings: list[Any]
) -> None:
    """All of them, not only the MAX_ITEM_LIST_LENGTH = 4 newest that the model reads."""
    trainer, _, _, test = make(Stub())
    trainer.evaluator.evaluate(test, (REMOVED,))
    tested = {u: items for u, items in SEQUENCES.items() if len(items) >= 3}
    assert excluded(rankings, test._dataset) == {u: set(s[:-1]) for u, s in tested.items()}
    rankings.clear()
    trainer.evaluator.evaluate(test, (KEPT,))
    assert excluded(rankings, test._dataset) == {u: set() for u in tested}


def test_a_repeated_target_stays_in_the_ranking(make: Any, data_path: Path, rankings: Any) -> None:
    sequences = {"u": ["x", "y", "z", "w", "x"], "v": ["y", "x", "z", "w", "y", "z"]}
    write_inter(data_path, "repeats", sequences)
    trainer, _, _, test = make(
        Stub(lambda batch: target(batch, 5)),
        dataset="repeats",
        k_noise=1,
        topk=[1, 2],
        valid_metric="NDCG@2",
    )
    found = trainer.evaluator.evaluate(test)
    assert found[REMOVED]["hit@1"] == 1
    assert excluded(rankings[1::2], test._dataset) == {"u": {"y", "z", "w"}, "v": {"y", "x", "w"}}


def test_kept_history_can_win_the_ranking(make: Any) -> None:
    """A model that repeats the newest item: always wrong here when seen items may be ranked."""
    newest = Stub(
        lambda batch: (
            nn.functional.one_hot(
                batch["item_id_list"].gather(1, batch["item_length"].unsqueeze(1) - 1).squeeze(1),
                13,
            )
            + 0.5 * target(batch)
        )
    )
    trainer, _, _, test = make(newest)
    found = trainer.evaluator.evaluate(test)
    assert found[KEPT]["hit@1"] == 0
    assert found[KEPT]["hit@2"] == 1
    assert found[REMOVED]["hit@1"] == 1


def test_both_protocols_in_one_pass_equal_two_passes(make: Any) -> None:
    fixed = torch.rand(13, 13, generator=torch.Generator().manual_seed(3))
    stub = Stub(lambda batch: fixed[batch["item_id"]].clone())
    trainer, _, _, test = make(stub, eval_batch_size=2)
    both = trainer.evaluator.evaluate(test)
    assert stub.rankings == len(test) > 1
    assert both[KEPT] != both[REMOVED]
    assert both == {name: trainer.evaluator.evaluate(test, (name,))[name] for name in PROTOCOLS}


def test_sampled_ranking_knows_one_protocol(build: Any, tmp_path: Path) -> None:
    config, train, valid, _, model = build(
        "SASRec",
        eval_args={
            "split": {"LS": "valid_and_test"},
            "group_by": "user",
            "order": "TO",
            "mode": "uni3",
        },
    )
    trainer = PlanTrainer(config, model, tmp_path / "run")
    trainer.evaluator.data_collect(train)
    found = trainer.evaluator.evaluate(valid)
    assert list(found) == [KEPT]
    assert found[KEPT]["hit@5"] == 1  # the target and 3 others


def per_user(batch: Any) -> Tensor:
    """Scores of all 13 items that depend on the row alone."""
    place = torch.arange(13.0) * (batch["user_id"] + 3 * batch["item_length"]).unsqueeze(1)
    return (place * 0.37).sin()


class Predicting(Stub):
    """A stub that also scores one item a row, as it ranks it or ``gap`` away."""

    def __init__(self, gap: float = 0.0, ranks: bool = True) -> None:
        super().__init__(per_user)
        self.gap, self.ranks, self.passes = gap, ranks, 0

    def full_sort_predict(self, interaction: Any) -> Tensor:
        if not self.ranks:
            raise NotImplementedError
        return super().full_sort_predict(interaction)

    def predict(self, interaction: Any) -> Tensor:
        self.passes += len(interaction)
        found = per_user(interaction).gather(1, interaction["item_id"].unsqueeze(1)).squeeze(1)
        return found + self.gap * interaction["item_id"]


SAMPLED = {"group_by": "user", "order": "TO", "mode": "uni6"}


@pytest.mark.parametrize("part", [{"LS": "valid_and_test"}, {"RS": [0.4, 0.3, 0.3]}])
def test_drawn_candidates_are_scored_in_one_pass_a_row(make: Any, part: dict[str, Any]) -> None:
    """With the metrics of one pass a candidate; users have several rows in the second split."""
    args = {"eval_args": SAMPLED | {"split": part}, "eval_batch_size": 3, "topk": [1, 2, 5]}
    args["metrics"] = ["Hit", "NDCG", "MRR", "GAUC"]
    found = {}
    for stub in (Predicting(), Predicting(ranks=False)):
        trainer, _, valid, _ = make(stub, **args)
        found[stub.ranks] = trainer.evaluator.evaluate(valid)
        n_rows, n_batches = len(valid._dataset), len(valid)
        if stub.ranks:
            assert n_batches > 1
            assert stub.rankings == n_batches + 1  # and once to see that both agree
            assert stub.passes <= 8 * 8
        else:
            assert stub.passes == 7 * n_rows
    assert found[True] == found[False]
    assert 0 < found[True][KEPT]["ndcg@5"] < 1


def test_where_a_model_predicts_otherwise_its_predictions_count(make: Any) -> None:
    """One pass a candidate, as in RecBole: here predictions rise with the item's number."""
    args = {"eval_args": SAMPLED | {"split": {"LS": "valid_and_test"}}, "topk": [1, 2, 5]}
    trainer, _, _, test = make(Predicting(gap=100.0), **args)
    ranks = [int((row > row[0]).sum()) for _, rows, *_ in _draws(trainer, test) for row in rows]
    wanted = sum(1 / math.log2(rank + 2) for rank in ranks if rank < 5) / len(ranks)
    assert trainer.evaluator.evaluate(test)[KEPT]["ndcg@5"] == pytest.approx(wanted)


def test_candidates_are_those_of_recboles_loader(make: Any) -> None:
    for part in ({"LS": "valid_and_test"}, {"RS": [0.4, 0.3, 0.3]}):
        trainer, _, _, test = make(Stub(), eval_args=SAMPLED | {"split": part})
        stock = NegSampleEvalDataLoader(trainer.config, test._dataset, test._sampler)
        ours = [
            (int(user), item)
            for rows, drawn, number, _ in _draws(trainer, test)
            for n in number.unique()
            for user, item in zip(
                rows["user_id"][number == n].repeat(drawn.shape[1]),
                drawn[number == n].t().flatten().tolist(),
                strict=True,
            )
        ]
        theirs = [
            pair
            for rows, *_ in _draws(trainer, stock)
            for pair in zip(rows["user_id"].tolist(), rows["item_id"].tolist(), strict=True)
        ]
        assert len(ours) == 7 * len(test._dataset)
        assert ours == theirs


def _draws(trainer: PlanTrainer, data: Any) -> list[Any]:
    """The batches of an evaluation."""
    init_seed(trainer.config["seed"], trainer.config["reproducibility"])
    return list(data)


# ---------------------------------------------------------------------- randomness


def test_evaluation_draws_nothing_from_the_training(make: Any) -> None:
    def noisy(model: Stub) -> Tensor:
        noise = torch.rand(()).item() + random.random() + np.random.rand()
        return (model.weight - 1).pow(2).sum() + noise

    def sampling(batch: Any) -> Tensor:
        np.random.rand(random.randint(1, 9))
        return torch.rand(len(batch), 13)

    losses = []
    for validate in (True, False):
        stub = Stub(sampling, noisy)
        trainer, train, valid, _ = make(stub, epochs=3, checkpoint_dir=f"saved{validate}")
        trainer.run_dir /= str(validate)
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        progress = trainer.fit(train, valid if validate else None)
        assert (stub.rankings > 0) == validate
        losses.append([entry["loss"] for entry in progress.log])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_anomaly_detection_is_off_during_training(make: Any) -> None:
    """One of RecBole's model files turns it on for the whole process when it is imported."""
    modes = []
    trainer, train, valid, _ = make(
        Stub(loss=lambda m: modes.append(torch.is_anomaly_enabled()) or m.weight.sum()), epochs=1
    )
    trainer.fit(train, valid)
    assert modes
    assert not any(modes)


# ---------------------------------------------------------------------- selection


def selected(make: Any, scores: list[float], bigger: bool = True, **overrides: Any) -> Any:
    """Train with these validation scores; (trainer, weights after each epoch)."""
    stub = Stub()
    trainer, train, valid, _ = make(stub, epochs=len(scores), **overrides)
    trainer.valid_metric_bigger = bigger
    weights, remaining = [], iter(scores)

    def evaluate(*_: Any) -> Any:
        weights.append(stub.weight.detach().clone())
        return {KEPT: {"ndcg@5": next(remaining)}}

    trainer.evaluator.evaluate = evaluate
    trainer.fit(train, valid)
    return trainer, weights


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.1, 0.2, 0.3], 2),
        ([0.3, 0.2, 0.1], 0),
        ([0.12341, 0.12342, 0.12339], 1),  # equal when rounded to 4 digits
        ([0.2, 0.2, 0.2], 0),  # a tie is no improvement
        ([0.0, 0.0, 0.1], 2),
        ([0.0, 0.0, 0.0], 0),
    ],
)
def test_the_best_epoch_and_its_weights_are_kept(make: Any, scores: Any, best: int) -> None:
    trainer, weights = selected(make, scores)
    assert trainer.progress.best_epoch == best
    assert trainer.progress.best_score == scores[best]
    tensors, content = checkpoint.load(trainer.run_dir / BEST)
    assert content["progress"]["best_epoch"] == best
    assert torch.equal(tensors["model.weight"], weights[best])
    assert not torch.equal(weights[0], weights[1])


def test_a_metric_where_less_is_better(make: Any) -> None:
    trainer, _ = selected(make, [0.3, 0.1, 0.2], bigger=False)
    assert trainer.progress.best_epoch == 1


@pytest.mark.parametrize(
    ("scores", "patience", "epochs"),
    [
        ([0.3, 0.2, 0.1, 0.4], 2, 3),
        ([0.1, 0.1, 0.1, 0.4], 2, 3),  # ties are misses
        ([0.2, 0.1, 0.3, 0.2, 0.1, 0.4], 2, 5),  # a success starts the count again
        ([0.3, 0.2, 0.1, 0.4], 3, 4),
    ],
)
def test_early_stopping(make: Any, scores: Any, patience: int, epochs: int) -> None:
    trainer, _ = selected(make, scores, stopping_step=patience, stopping_updates=0)
    assert len(trainer.progress.log) == epochs


def test_patience_is_also_counted_in_updates(make: Any) -> None:
    """Epochs of few updates do not end a run that has hardly begun to learn."""
    scores = [0.1, 0.3, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1, 0.2]
    trainer, _ = selected(make, scores, stopping_step=2, stopping_updates=0)
    an_epoch = trainer.progress.log[0]["updates"]
    assert [entry["updates"] for entry in trainer.progress.log] == [
        an_epoch * n for n in (1, 2, 3, 4)
    ]
    for patience, epochs in ((2 * an_epoch, 4), (2 * an_epoch + 1, 5), (5 * an_epoch, 7)):
        trainer, _ = selected(make, scores, stopping_step=2, stopping_updates=patience)
        assert len(trainer.progress.log) == epochs


def test_eval_step_skips_validations(make: Any) -> None:
    stub = Stub(target)
    trainer, train, valid, _ = make(stub, epochs=4, eval_step=2)
    progress = trainer.fit(train, valid)
    assert ["valid" in entry for entry in progress.log] == [False, True, False, True]


def test_without_validation_the_last_epoch_is_kept(make: Any) -> None:
    stub = Stub()
    trainer, train, _, _ = make(stub, epochs=3)
    trainer.fit(train)
    tensors, _ = checkpoint.load(trainer.run_dir / BEST)
    assert torch.equal(tensors["model.weight"], stub.weight)
    assert len(trainer.progress.log) == 3


# ---------------------------------------------------------------------- losses


class Parts(NamedTuple):
    rec: Tensor
    aux: Tensor


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(make: Any, bad: float) -> None:
    before = {}

    def loss(model: Stub) -> Parts:
        rec = (model.weight - 1).pow(2).sum()
        if model.losses == steps + 2:  # second step of the second epoch
            before["weight"] = model.weight.detach().clone()
            before["last"] = (trainer.run_dir / LAST).read_bytes()
            return Parts(rec, rec * bad)
        return Parts(rec, rec * 0)

    stub = Stub(loss=loss)
    trainer, train, valid, _ = make(stub)
    steps = len(train)
    assert steps == 2
    with pytest.raises(TrainingDiverged, match=rf"loss part 'aux' is {bad} at epoch 1, step 1; "):
        trainer.fit(train, valid)
    assert stub.losses == steps + 2
    assert torch.equal(stub.weight, before["weight"])
    assert (trainer.run_dir / LAST).read_bytes() == before["last"]
    _, content = checkpoint.load(trainer.run_dir / LAST)
    assert (content["progress"]["epoch"], content["progress"]["step"]) == (1, 0)


def test_divergence_says_what_may_help(make: Any) -> None:
    trainer, train, _, _ = make(Stub(loss=lambda model: model.weight.sum() * math.nan))
    with pytest.raises(
        TrainingDiverged, match=r"last\.safetensors holds the last good state.*clip"
    ):
        trainer.fit(train)
    assert checkpoint.load(trainer.run_dir / LAST)[1]["progress"]["epoch"] == 0


def test_nan_scores_are_refused(make: Any) -> None:
    def scores(batch: Any) -> Tensor:
        found = torch.rand(len(batch), 13)
        found[-1, 5] = math.nan
        return found

    trainer, _, valid, _ = make(Stub(scores))
    with pytest.raises(TrainingDiverged, match="scores contain NaN; nothing can be ranked"):
        trainer.evaluator.evaluate(valid)


@pytest.mark.parametrize(
    ("losses", "names"),
    [
        (lambda w: Parts(w + 1, w + 2), {"rec": 1, "aux": 2}),
        (lambda w: (w + 1, w + 2, w + 3), {"loss_1": 1, "loss_2": 2, "loss_3": 3}),
        (lambda w: w + 1, {"loss": 1}),
    ],
)
def test_losses_keep_their_names_and_are_averaged_by_step(
    make: Any, losses: Any, names: dict[str, int]
) -> None:
    trainer, train, _, _ = make(Stub(loss=lambda m: losses(m.weight.sum() * 0 + m.losses)))
    progress = trainer.fit(train)
    mean = (1 + 2) / 2  # two steps an epoch
    assert progress.log[0]["loss"] == {name: mean + value for name, value in names.items()}


def test_the_sum_of_the_parts_is_minimised(make: Any) -> None:
    parts = Stub(loss=lambda m: Parts(m.weight[0] * 2, -m.weight[1]))
    trainer, train, _, _ = make(parts, learner="sgd", learning_rate=1.0, epochs=1)
    trainer.fit(train)
    assert parts.weight.tolist() == [-4.0, 2.0, 0.0]


def test_gradients_are_clipped(make: Any) -> None:
    steep = Stub(loss=lambda model: 1000 * model.weight[0])
    trainer, train, _, _ = make(
        steep, learner="sgd", learning_rate=1.0, epochs=1, clip_grad_norm={"max_norm": 0.5}
    )
    trainer.fit(train)
    assert steep.weight[0].item() == pytest.approx(-2 * 0.5, rel=1e-4)


def test_bfloat16_runs_and_learns(build: Any, tmp_path: Path) -> None:
    config, train, valid, _, model = build(
        enable_amp=True,
        epochs=30,
        learning_rate=0.02,
        stopping_step=99,
        hidden_dropout_prob=0.0,
        attn_dropout_prob=0.0,
    )
    seen, stock = set(), model.calculate_loss

    def calculate_loss(batch: Any) -> Any:
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return stock(batch)

    model.calculate_loss = calculate_loss
    progress = PlanTrainer(config, model, tmp_path / "run").fit(train, valid)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    first, last = (progress.log[i]["loss"]["rec"] for i in (0, -1))
    assert last < 0.8 * first


def test_a_phase_that_stops_early_does_not_end_the_next(make: Any) -> None:
    """Each phase has its own patience and its own best epoch."""
    trainer, train, valid, _ = make(Stub(target), stopping_step=1, stopping_updates=0)
    trainer.model.training_plan = lambda: [Phase("first", 4), Phase("second", 4)]
    trainer.fit(train, valid)
    assert [entry["phase"] for entry in trainer.progress.log] == ["first"] * 2 + ["second"] * 2


# ---------------------------------------------------------------------- groups by input length


@pytest.fixture
def by_length(make: Any, data_path: Path) -> Any:
    """by_length(bounds, stub, ...) on toy, whose test rows have 2, 3, 4, 6 and 8 earlier items."""

    def measure(bounds: list[int], stub: Stub | None = None, **changes: Any) -> Any:
        values = {"MAX_ITEM_LIST_LENGTH": 9, "eval_batch_size": 2} | changes
        trainer, _, _, test = make(stub or Stub(), **values)
        return (*trainer.evaluator.evaluate_in_detail(test, bounds)[:2], trainer, test)

    return measure


@pytest.mark.parametrize(
    ("bounds", "rows"),
    [
        ([], {"1+": 5}),
        ([3], {"1-3": 2, "4+": 3}),
        ([2, 3, 7], {"1-2": 1, "3-3": 1, "4-7": 2, "8+": 1}),
        ([1, 4, 5, 20], {"2-4": 3, "6-20": 2}),  # none of 1, 5 or over 20
        ([8], {"1-8": 5}),
    ],
)
def test_groups_by_length(by_length: Any, bounds: list[int], rows: dict[str, int]) -> None:
    """Every row is in one group, and the groups' means make up the mean of all."""
    results, groups, *_ = by_length(bounds)
    assert {name: part["rows"] for name, part in groups.items()} == rows
    assert list(groups) == list(rows)
    assert list(results) == list(PROTOCOLS)
    for metric, value in results[KEPT].items():
        total = sum(part["rows"] * part[metric] for part in groups.values())
        assert total / 5 == pytest.approx(value), metric


def test_the_metrics_of_a_group_are_those_of_its_rows(by_length: Any) -> None:
    """A model that is right about histories of an even length only."""

    def even(batch: Any) -> Tensor:
        return torch.where(
            batch["item_length"].unsqueeze(1) % 2 == 0, target(batch), -target(batch)
        )

    results, groups, trainer, test = by_length([2, 3, 4], Stub(even))
    assert [part["hit@1"] for part in groups.values()] == [1, 0, 1, 1]
    assert results[KEPT]["hit@1"] == pytest.approx(4 / 5)
    again = trainer.evaluator.evaluate(test)
    assert again == results


def test_sampled_rankings_have_no_groups(by_length: Any) -> None:
    """Their rows are candidates, not histories."""
    split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni2"}
    stub = Stub()
    stub.predict = lambda batch: torch.rand(len(batch))
    results, groups, *_ = by_length([3], stub, eval_args=split)
    assert list(results) == [KEPT]
    assert groups == {}


def test_metrics_that_need_more_than_lists_have_no_groups(by_length: Any) -> None:
    """GAUC is measured on ranks that are not told apart by row: no group may show that of all."""
    metrics = {"metrics": ["GAUC", "NDCG"], "valid_metric": "NDCG@5"}
    results, groups, *_ = by_length([3], **metrics)
    assert "gauc" in results[KEPT]
    assert all("gauc" not in part for part in groups.values())


def test_coverage_of_a_group(by_length: Any) -> None:
    """Always items 1..5 of 12: of a group as of all."""
    stub = Stub(lambda batch: -torch.arange(13.0).expand(len(batch), 13))
    results, groups, *_ = by_length([3], stub, metrics=["NDCG", "ItemCoverage"])
    for part in (results[KEPT], *groups.values()):
        assert part["itemcoverage@5"] == pytest.approx(5 / 12)


# ---------------------------------------------------------------------- requests to stop


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_request_waits_until_it_is_honoured(tmp_path: Path, signum: int) -> None:
    before = signal.getsignal(signum)
    stop = StopRequest()
    with stop.listen():
        stop.check(tmp_path)
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        assert signal.getsignal(signum) is before  # a second one is final
        with pytest.raises(Interrupted) as raised:
            stop.check(tmp_path)
        stop.check(tmp_path)  # asked once, stopped once
    assert (raised.value.signum, raised.value.run_dir) == (signum, tmp_path)
    assert not raised.value.same_command
    assert signal.getsignal(signum) is before


def test_a_terminal_that_hangs_up_twice_asks_once(tmp_path: Path) -> None:
    """The shell sends SIGHUP, and so does the system when the shell ends."""
    before, stop = signal.getsignal(signal.SIGHUP), StopRequest()
    with stop.listen():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Interrupted):
            stop.check(tmp_path)
    assert signal.getsignal(signal.SIGHUP) == before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listen():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_listening_within_listening_is_one() -> None:
    """Also there, a second signal is final."""
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    with stop.listen():
        with stop.listen():
            pass
        assert signal.getsignal(signal.SIGINT) is not before
        with stop.listen():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
            assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    with pytest.raises(ValueError, match="lost"), stop.listen():
        raise ValueError("lost")
    assert signal.getsignal(signal.SIGTERM) is before
    with stop.listen():
        assert signal.getsignal(signal.SIGTERM) is not before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    found = []

    def work() -> None:
        with StopRequest().listen():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


# ---------------------------------------------------------------------- an optimiser's state


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["adam", "sgd", "adagrad"],
)
def test_an_optimisers_state_survives_json(make_optimizer: Any, tmp_path: Path) -> None:
    """Through a file, into a fresh one with another rate: the next steps are the same."""

    def fresh() -> tuple[nn.Linear, Any]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, make_optimizer(layer.parameters())

    def step(layer: nn.Linear, optimizer: Any, number: int) -> None:
        optimizer.zero_grad()
        layer(torch.full((1, 3), float(number))).square().sum().backward()
        optimizer.step()

    layer, optimizer = fresh()
    for number in range(3):
        step(layer, optimizer, number)
    tensors, content = optimizer_state(optimizer)
    checkpoint.save(tmp_path / "o.safetensors", tensors, content)
    tensors, content = checkpoint.load(tmp_path / "o.safetensors")
    other, restored = fresh()
    other.load_state_dict(layer.state_dict())
    restored.param_groups[0]["lr"] = 9.0
    load_optimizer_state(restored, tensors, content)
    for number in range(3, 6):
        step(layer, optimizer, number)
        step(other, restored, number)
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.bias, layer.bias)
