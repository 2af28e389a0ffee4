"""The contract of ``SequentialModel`` as checks that hold for any model, RecBole's included."""

from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_simdiff.modules.base import SequentialModel
from recbole_simdiff.modules.plan import Update


def check_training(model: SequentialModel, batch: Interaction) -> set[str]:
    """Every phase has finite losses and scalars to watch; names of parameters that nothing moves.

    The model must be on the device of the batch.
    """
    model.train()
    moved: set[str] = set()
    phases = model.training_plan()
    assert phases
    for phase in phases:
        model.begin_epoch(phase.name, 0)
        whole = Update("", list(model.parameters()), model.calculate_loss)
        for update in phase.updates or (whole,):
            model.zero_grad(set_to_none=True)
            losses = update.loss(batch)
            total = sum(losses) if isinstance(losses, tuple) else losses
            assert torch.isfinite(total).all()
            for value in model.monitored().values():
                assert value.shape == ()
                assert not value.requires_grad
            total.sum().backward()
            own = {id(parameter) for parameter in update.parameters}
            assert all(p.grad is None or p.grad.isfinite().all() for p in update.parameters)
            moved |= {
                name
                for name, p in model.named_parameters()
                if id(p) in own and p.grad is not None and p.grad.any()
            }
    model.begin_epoch(phases[0].name, 0)
    model.zero_grad(set_to_none=True)
    return {name for name, p in model.named_parameters() if p.requires_grad} - moved


def check_item_table(model: SequentialModel, n_items: int) -> None:
    """Its table, where it has one, is a row an item; what follows are the extra tokens."""
    if model.item_table is None:
        return
    embedding = model.get_submodule("item_embedding")
    assert isinstance(embedding, nn.Embedding)
    assert len(model.item_table) == n_items
    assert torch.equal(model.item_table, embedding.weight[:n_items])
    assert len(embedding.weight) == n_items + model.n_extra_tokens


@torch.no_grad()
def check_sampling(model: SequentialModel, batch: Interaction, score: Any) -> None:
    """Another seed gives other scores if the model says so, and the same seed the same."""
    model.eval()

    def scores(seed: int) -> tuple[bool, Tensor]:
        return model.reseed_sampling(seed), score(batch)

    (draws, first), (_, second), (_, again) = scores(0), scores(1), scores(0)
    assert torch.equal(again, first)
    assert torch.equal(second, first) != draws


def check_views(model: SequentialModel, batch: Interaction, n_items: int) -> None:
    """Views are rows of items for the rows of the batch, and padding stays padding."""
    items = batch[model.ITEM_SEQ]
    for view in model.eval().augmented_views(batch).values():
        assert view.dtype == items.dtype
        assert view.shape == items.shape
        assert not view.requires_grad
        assert view.min() >= 0
        assert view.max() < n_items
        assert torch.equal(view > 0, items > 0)
