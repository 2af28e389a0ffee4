"""Phases and updates: who moves when, with which optimiser, and what survives a stop."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.errors import Interrupted, TrainingDiverged
from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.modules.base import SequentialModel
from recbole_simdiff.modules.plan import Phase, Update
from recbole_simdiff.training.trainer import PlanTrainer

STEPS = 2  # batches an epoch on toy


class Parts(NamedTuple):
    near: Tensor
    far: Tensor


class Pair(SequentialModel):
    """Two groups of parameters, and a plan that a test chooses."""

    def __init__(self, plan: Callable[["Pair"], list[Phase]]) -> None:
        nn.Module.__init__(self)
        self.first = nn.Linear(2, 1, bias=False)
        self.second = nn.Linear(2, 1, bias=False)
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.second.weight.fill_(2.0)
        self.plan, self.calls, self.noise = plan, [], torch.zeros(())

    def training_plan(self) -> list[Phase]:
        return self.plan(self)

    def product(self) -> Tensor:
        """Depends on both groups."""
        return (self.first.weight * self.second.weight).sum() * self.fixed.squeeze()

    def calculate_loss(self, batch: Any) -> Tensor:
        """Draws what all losses of the batch share."""
        self.calls.append("first")
        self.noise = torch.rand(())
        return self.product() + self.noise * self.first.weight.sum()

    def other_loss(self, batch: Any) -> Any:
        self.calls.append("second")
        return Parts(self.product(), (self.second.weight - self.noise).pow(2).sum())

    def own_loss(self, batch: Any) -> Any:
        """As ``other_loss``, with a draw of its own."""
        self.noise = torch.rand(())
        return self.other_loss(batch)

    def full_sort_predict(self, batch: Any) -> Tensor:
        return torch.rand(len(batch), 13)


def alternate(model: Pair) -> tuple[Update, ...]:
    return (
        Update("first", list(model.first.parameters()), model.calculate_loss),
        Update("second", list(model.second.parameters()), model.other_loss),
    )


def one_phase(model: Pair) -> list[Phase]:
    return [Phase("both", 2, updates=alternate(model))]


@pytest.fixture
def make(build: Any, tmp_path: Path) -> Any:
    """make(plan, folder, key=value, ...) -> (trainer, training loader, validation loader)."""

    def trainer(plan: Any = one_phase, folder: str = "run", **overrides: Any) -> Any:
        overrides = {"train_batch_size": 6, "stopping_step": 99} | overrides
        config, train, valid, _, _ = build("SimDiffRec", **overrides)
        assert len(train) == STEPS
        torch.manual_seed(3)
        return PlanTrainer(config, Pair(plan), tmp_path / folder), train, valid

    return trainer


def scored(trainer: Any, scores: list[float]) -> list[Tensor]:
    """Give these validation scores; the weights at each validation."""
    seen: list[Tensor] = []

    def evaluate(*_: Any) -> Any:
        seen.append(trainer.model.first.weight.detach().clone())
        return {KEPT: {"ndcg@5": scores[len(seen) - 1]}}

    trainer.evaluator.evaluate = evaluate
    return seen


# ---------------------------------------------------------------------- updates


def test_updates_run_in_order_on_each_batch(make: Any) -> None:
    trainer, train, _ = make()
    trainer.fit(train)
    assert trainer.model.calls == ["first", "second"] * STEPS * 2


def test_without_updates_one_optimiser_moves_everything(make: Any) -> None:
    trainer, train, _ = make(lambda model: [Phase("train", 1)])
    assert list(trainer.optimizers) == ["optimizer"]
    assert trainer.optimizers["optimizer"] is trainer.optimizer
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    log = trainer.fit(train).log
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"first.weight", "second.weight"}
    assert list(log[0]["loss"]) == ["loss"]


def test_each_update_moves_its_own_parameters_only(make: Any) -> None:
    """With SGD of rate 1: by its own gradient, seen after the move of the one before."""
    trainer, train, _ = make(learner="sgd", learning_rate=1.0)
    model = trainer.model
    first, second = (m.weight.detach().clone() for m in (model.first, model.second))
    trainer._step(next(iter(train)), trainer._updates())
    first = first - (second + model.noise)
    second = second - (first + 2 * (second - model.noise))
    torch.testing.assert_close(model.first.weight.detach(), first)
    torch.testing.assert_close(model.second.weight.detach(), second)


def test_other_parameters_are_constants(make: Any) -> None:
    trainer, train, _ = make()
    model = trainer.model
    seen = []

    def spy(loss: Any) -> Any:
        def call(batch: Any) -> Any:
            seen.append([p.requires_grad for p in model.parameters()])
            return loss(batch)

        return call

    updates = tuple(u._replace(loss=spy(u.loss)) for u in trainer._updates())
    trainer._step(next(iter(train)), updates[:1])
    assert model.second.weight.grad is None
    trainer._step(next(iter(train)), updates)
    assert seen == [[False, True, False], [False, True, False], [False, False, True]]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]


def test_flags_are_put_back_after_an_error(make: Any) -> None:
    trainer, train, _ = make()

    def fail(batch: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer._step(next(iter(train)), (trainer._updates()[0]._replace(loss=fail),))
    assert [p.requires_grad for p in trainer.model.parameters()] == [False, True, True]


def test_equal_names_share_an_optimiser(make: Any) -> None:
    def plan(model: Pair) -> list[Phase]:
        updates = alternate(model)
        return [Phase("both", 1, updates=(*updates, updates[0]))]

    trainer, train, _ = make(plan)
    trainer.fit(train)
    assert list(trainer.optimizers) == ["optimizer_first", "optimizer_second"]
    steps = [
        {int(slots["step"]) for slots in optimizer.state_dict()["state"].values()}
        for optimizer in trainer.optimizers.values()
    ]
    assert steps == [{2 * STEPS}, {STEPS}]
    assert trainer.model.calls == ["first", "second", "first"] * STEPS


def test_updates_of_one_name_must_move_the_same(make: Any) -> None:
    def plan(model: Pair) -> list[Phase]:
        first, second = alternate(model)
        return [Phase("both", 1, updates=(first, second._replace(name="first")))]

    with pytest.raises(ValueError, match="updates named 'first' must have the same parameters"):
        make(plan)


def test_loss_parts_carry_the_name_of_their_update(make: Any) -> None:
    trainer, train, _ = make(learning_rate=1e-12)
    trainer.model.monitored = lambda: {"watched": torch.tensor(0.5)}
    entry = trainer.fit(train).log[0]
    assert list(entry["loss"]) == ["first.loss", "second.near", "second.far"]
    assert entry["loss"]["second.near"] == pytest.approx(4.0)
    assert entry["monitor"] == {"watched": 0.5}


def test_a_diverging_update_is_named(make: Any) -> None:
    trainer, train, _ = make()
    trainer.model.other_loss = lambda batch: Parts(
        trainer.model.product() * math.nan, trainer.model.product()
    )
    with pytest.raises(TrainingDiverged, match=r"loss part 'second\.near' is nan at epoch 0"):
        trainer.fit(train)
    assert checkpoint.load(trainer.run_dir / LAST)[1]["progress"]["step"] == 0


def test_gradients_are_clipped_update_by_update(make: Any) -> None:
    trainer, train, _ = make(learner="sgd", learning_rate=1.0, clip_grad_norm={"max_norm": 0.5})
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer._step(next(iter(train)), trainer._updates())
    for name in ("first.weight", "second.weight"):
        moved = trainer.model.state_dict()[name] - before[name]
        assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_autocast_holds_in_every_update(make: Any) -> None:
    trainer, train, _ = make(enable_amp=True)
    on = []

    def spy(update: Update) -> Update:
        def call(batch: Any) -> Any:
            on.append(torch.is_autocast_enabled("cpu"))
            return update.loss(batch)

        return update._replace(loss=call)

    trainer._step(next(iter(train)), tuple(map(spy, trainer._updates())))
    assert on == [True, True]


# ---------------------------------------------------------------------- stopping and resuming


def state(trainer: Any) -> dict[str, Any]:
    found = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    for key, optimizer in trainer.optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            found |= {f"{key}.{index}.{k}": torch.as_tensor(v) for k, v in slots.items()}
    return found


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def two_phases(model: Pair) -> list[Phase]:
    """Alternating, then the second group alone under a name of its own."""
    alone = Update("alone", list(model.second.parameters()), model.own_loss)
    return [Phase("both", 2, updates=alternate(model)), Phase("alone", 2, updates=(alone,))]


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8])
def test_a_stopped_run_ends_as_an_unbroken_one(make: Any, stop: int) -> None:
    """In both phases, in the middle and at the end of an epoch; every optimiser's moments too."""
    unbroken, train, valid = make(two_phases, "unbroken")
    log = unbroken.fit(train, valid).log
    assert [entry["phase"] for entry in log] == ["both"] * 2 + ["alone"] * 2
    assert len([key for key in state(unbroken) if key.startswith("optimizer_alone")]) == 3

    stopped, train, valid = make(two_phases, "stopped")
    stock, steps = stopped.model.other_loss, []

    def interrupt(batch: Any) -> Any:
        steps.append(batch)
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return stock(batch)

    stopped.model.other_loss = interrupt
    with pytest.raises(Interrupted):
        stopped.fit(train, valid)
    _, content = checkpoint.load(stopped.run_dir / LAST)
    names = {key for key in content if key.startswith("optimizer")}
    both = {"optimizer_first", "optimizer_second"}
    assert names == (both if stop <= 2 * STEPS else {"optimizer_alone"})

    resumed, train, valid = make(two_phases, "stopped")
    torch.manual_seed(9)
    resumed.resume(resumed.run_dir / LAST)
    again = resumed.fit(train, valid).log
    assert_same(state(resumed), state(unbroken))
    assert [e["loss"] for e in again] == [e["loss"] for e in log]


def test_the_best_checkpoint_has_no_optimiser(make: Any) -> None:
    trainer, train, valid = make()
    trainer.fit(train, valid)
    tensors, content = checkpoint.load(trainer.run_dir / BEST)
    assert not [key for key in (*tensors, *content) if key.startswith("optimizer")]


# ---------------------------------------------------------------------- phases


def optimizer_states(trainer: Any) -> dict[str, Any]:
    """As they are now: steps go on in the same tensors."""
    return {k: v.clone() for k, v in state(trainer).items() if k.startswith("optimizer")}


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("same_names", [False, True])
def test_only_a_refining_phase_keeps_the_optimisers(
    make: Any, refine: bool, same_names: bool
) -> None:
    """Where its updates have the names of those before; every other phase has fresh ones."""

    def plan(model: Pair) -> list[Phase]:
        updates = alternate(model)
        after = updates if same_names else ()
        return [Phase("a", 1, updates=updates), Phase("b", 1, updates=after, refine=refine)]

    trainer, train, _ = make(plan)
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    stock = trainer._begin_phase

    def begin(*args: Any) -> None:
        before.update(optimizer_states(trainer))
        stock(*args)
        after.update(optimizer_states(trainer))
        tensors, _ = checkpoint.load(trainer.run_dir / LAST)
        saved.update({k: v for k, v in tensors.items() if k.startswith("optimizer")})

    trainer._begin_phase = begin
    trainer.fit(train)
    kept = refine and same_names
    names = ["optimizer_first", "optimizer_second"] if same_names else ["optimizer"]
    assert list(trainer.optimizers) == names
    for found in (after, saved):
        assert_same(found, before if kept else {})
    steps = {int(value) for key, value in optimizer_states(trainer).items() if "step" in key}
    assert steps == {2 * STEPS if kept else STEPS}


@pytest.mark.parametrize("stop", [STEPS, STEPS + 1, 2 * STEPS + 1])
def test_a_stopped_refinement_ends_as_an_unbroken_one(make: Any, stop: int) -> None:
    """Before its first step and later on: the moments it began with are not lost."""

    def plan(model: Pair) -> list[Phase]:
        updates = alternate(model)
        return [Phase("a", 1, updates=updates), Phase("b", 2, updates=updates, refine=True)]

    unbroken, train, valid = make(plan, "unbroken")
    unbroken.fit(train, valid)
    stopped, train, valid = make(plan, "stopped")
    stock, steps = stopped.model.other_loss, []

    def interrupt(batch: Any) -> Any:
        steps.append(batch)
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return stock(batch)

    stopped.model.other_loss = interrupt
    with pytest.raises(Interrupted):
        stopped.fit(train, valid)
    resumed, train, valid = make(plan, "stopped")
    torch.manual_seed(9)
    resumed.resume(resumed.run_dir / LAST)
    resumed.fit(train, valid)
    assert_same(state(resumed), state(unbroken))


SCORES = [0.2, 0.5, 0.3, 0.4, 0.45]


def test_a_refining_phase_begins_with_the_best_epoch(make: Any) -> None:
    def plan(model: Pair) -> list[Phase]:
        return [Phase("a", 3), Phase("b", 2, refine=True)]

    trainer, train, valid = make(plan, learner="sgd", learning_rate=1e-12)
    model = trainer.model
    weights = scored(trainer, SCORES)
    begun = []

    def mark(batch: Any) -> Tensor:
        with torch.no_grad():
            if trainer.progress.step == 0:
                begun.append(model.first.weight.clone())
            model.first.weight += 1.0  # so that every epoch ends with weights of its own
        return model.product()

    model.calculate_loss = mark
    progress = trainer.fit(train, valid)
    assert torch.equal(begun[3], weights[1])
    assert not torch.equal(begun[3], weights[2])
    # No epoch of the second phase is better than the first phase's best, which remains.
    assert progress.best_score == 0.5
    assert torch.equal(checkpoint.load(trainer.run_dir / BEST)[0]["model.first.weight"], weights[1])
    assert progress.misses == 2


def test_other_phases_begin_with_the_last_weights_and_no_score(make: Any) -> None:
    trainer, train, valid = make(lambda model: [Phase("a", 3), Phase("b", 2)])
    weights = scored(trainer, SCORES)
    progress = trainer.fit(train, valid)
    assert progress.best_score == 0.45
    assert torch.equal(checkpoint.load(trainer.run_dir / BEST)[0]["model.first.weight"], weights[4])


def test_a_refining_phase_has_patience_of_its_own(make: Any) -> None:
    def plan(model: Pair) -> list[Phase]:
        return [Phase("a", 9), Phase("b", 9, refine=True)]

    trainer, train, valid = make(plan, stopping_step=2, stopping_updates=0)
    scored(trainer, [0.5, 0.4, 0.4, 0.3, 0.6, 0.5, 0.5])
    progress = trainer.fit(train, valid)
    assert [entry["phase"] for entry in progress.log] == ["a"] * 3 + ["b"] * 4
    assert progress.best_score == 0.6
