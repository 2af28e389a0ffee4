"""CL4SRec against its formulas, against RecBole's SASRec, and on data it must learn.

Invariants are those of CL4SRec; the operators have their own tests.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec
from torch import Tensor

from recbole_simdiff.errors import UserError
from recbole_simdiff.models import cl4srec
from recbole_simdiff.models.cl4srec import CL4SRec
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.losses import nt_xent
from recbole_simdiff.modules.transformer import TokenLayout

N_ITEMS = 13  # ids 1..12, 0 is padding, 13 the mask token
SEQ = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [8, 2, 9, 0, 0, 0]])
LEN = torch.tensor([4, 2, 1, 3])
POS = torch.tensor([10, 3, 4, 6])
FIRST = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
SECOND = torch.tensor([[2.0, 0.0], [1.0, 1.0]])


def rows(seq: Tensor = SEQ, length: Tensor = LEN, pos: Tensor = POS) -> Interaction:
    return Interaction({"item_id_list": seq, "item_length": length, "item_id": pos})


@pytest.fixture
def small(make_config: Any) -> Any:
    """small(key=value, ...) -> a model without data, in eval mode, dropout off, visible scores."""

    def make(model: type = CL4SRec, **overrides: Any) -> Any:
        values: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
        values |= {"MAX_ITEM_LIST_LENGTH": 6, **overrides}
        config = make_config("CL4SRec", **values)
        torch.manual_seed(0)
        instance = model(config, SimpleNamespace(num=lambda field: N_ITEMS))
        instance.item_embedding.weight.data.normal_()
        return instance.eval()

    return make


def without_mask_row(model: CL4SRec) -> dict[str, Tensor]:
    """The weights that SASRec has, too."""
    state = dict(model.state_dict())
    state["item_embedding.weight"] = state["item_embedding.weight"][:N_ITEMS].clone()
    return state


def trap(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this computation has no use and must not run")


# ---------------------------------------------------------------- NT-Xent


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_nt_xent_of_two_unit_vectors(similarity):
    """Invariant 1: log(1 + 2 / e)."""
    loss = nt_xent(torch.eye(2), torch.eye(2), 1.0, similarity)
    assert loss.item() == pytest.approx(math.log(1 + 2 / math.e), abs=1e-6)
    assert loss.item() == pytest.approx(0.551445, abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "similarity", "value"),
    [(1.0, "dot", 1.5313), (0.5, "dot", 2.3069), (1.0, "cosine", 1.1736)],
)
def test_nt_xent_of_two_by_two(temperature, similarity, value):
    """Invariants 2 and 4: by hand; the order of the views and of the rows does not matter."""
    loss = nt_xent(FIRST, SECOND, temperature, similarity)
    assert loss.item() == pytest.approx(value, abs=5e-5)
    assert nt_xent(SECOND, FIRST, temperature, similarity).item() == pytest.approx(loss.item())
    flipped = nt_xent(FIRST.flip(0), SECOND.flip(0), temperature, similarity)
    assert flipped.item() == pytest.approx(loss.item())


@pytest.mark.parametrize(("batch", "value"), [(256, 6.236370), (2048, 8.317522)])
def test_nt_xent_of_equal_vectors_is_a_guess(batch, value):
    """Invariant 3: log(2 B - 1)."""
    z = torch.ones(batch, 2)
    assert nt_xent(z, z, 1.0, "dot").item() == pytest.approx(value, abs=1e-5)


def test_nt_xent_of_one_row_is_zero(small):
    """Invariant 5: no wrong answers; the gradient exists."""
    model = small()
    loss = model.contrastive_loss(rows(SEQ[:1], LEN[:1], POS[:1]))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_the_contrastive_loss_is_nt_xent_of_the_views_states(monkeypatch, small, similarity):
    """With known views, encoded one at a time; with its weight, temperature and similarity."""
    model = small(cl_weight=0.3, tau=0.7, cl_similarity=similarity)
    views = (torch.cat([SEQ, SEQ.flip(0)]), torch.cat([LEN, LEN.flip(0)]))
    asked: list[Any] = []

    def known(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return views

    monkeypatch.setattr(cl4srec, "two_views", known)
    loss = model.calculate_loss(rows()).contrastive
    expected = 0.3 * nt_xent(model(SEQ, LEN), model(SEQ.flip(0), LEN.flip(0)), 0.7, similarity)
    torch.testing.assert_close(loss, expected)
    ((args, kwargs),) = asked
    assert args[2:] == (0.6, 0.3, 0.6, N_ITEMS)
    assert kwargs == {"replacement": False}


def test_settings_reach_the_views(monkeypatch, small):
    """Operators may coincide, on demand."""
    ratios = {"crop_ratio": 0.5, "mask_ratio": 0.4, "reorder_ratio": 0.8}
    model = small(operators="independent", **ratios)
    asked: list[Any] = []
    draw = cl4srec.two_views

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append((args[2:], kwargs))
        return draw(*args, **kwargs)

    monkeypatch.setattr(cl4srec, "two_views", spy)
    model.calculate_loss(rows())
    assert asked == [((0.5, 0.4, 0.8, N_ITEMS), {"replacement": True})]


@pytest.mark.parametrize(
    ("fn_mask", "wrong"),
    [
        ("none", {(i, j) for i in range(4) for j in range(4) if i != j}),
        ("user", {(i, j) for i in range(4) for j in range(4) if i != j and {i, j} != {0, 3}}),
        ("target", {(i, j) for i in range(4) for j in range(4) if i != j and {i, j} != {1, 2}}),
    ],
)
def test_rows_of_one_user_or_target_may_be_left_out(monkeypatch, small, fn_mask, wrong):
    """By a loop: each view against its partner and both views of the rows that are wrong."""
    model = small(fn_mask=fn_mask, cl_weight=1.0)
    batch = rows(pos=torch.tensor([10, 3, 3, 6]))
    batch.update(Interaction({"user_id": torch.tensor([7, 5, 9, 7])}))
    views = recorded_views(monkeypatch)
    loss = model.calculate_loss(batch).contrastive
    z = torch.stack(views)  # [2, 4, H]
    terms = []
    for i in range(4):
        for view in range(2):
            anchor = z[view, i]
            right = anchor @ z[1 - view, i]
            others = [anchor @ z[v, j] for j in range(4) for v in range(2) if (i, j) in wrong]
            terms.append(torch.logsumexp(torch.stack([right, *others]), 0) - right)
    torch.testing.assert_close(loss, torch.stack(terms).mean())


@pytest.mark.parametrize("sampling", ["prefix_last", "user_all"])
def test_without_contrast_it_is_sasrec(monkeypatch, small, sampling):
    """Invariant 12: loss and gradients; no view is drawn, the mask row is not touched."""
    model = small(cl_weight=0.0, train_sampling=sampling)
    theirs = small(SASRec if sampling == "prefix_last" else EncoderRecommender)
    if sampling == "user_all":
        theirs.last_target_only = False
    theirs.load_state_dict(without_mask_row(model))
    monkeypatch.setattr(cl4srec, "two_views", trap)
    before = torch.get_rng_state()
    losses = model.calculate_loss(rows())
    assert torch.equal(torch.get_rng_state(), before)
    assert losses.contrastive == 0
    if sampling == "prefix_last":
        expected = theirs.calculate_loss(rows())
    else:
        layout = TokenLayout(LEN, 6)
        expected = theirs.recommendation_loss(theirs.encode(SEQ, layout), layout, rows())
    torch.testing.assert_close(losses.rec, expected)
    sum(losses).backward()
    expected.backward()
    ours = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        grad = ours[name].grad
        if name == "item_embedding.weight":
            assert not grad[N_ITEMS].any()
            grad = grad[:N_ITEMS]
        torch.testing.assert_close(grad, parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_next_item_loss_does_not_depend_on_the_views(small):
    """The state that predicts is that of the clean row."""
    model, plain = small(), small(cl_weight=0.0)
    torch.testing.assert_close(model.calculate_loss(rows()).rec, plain.calculate_loss(rows()).rec)


def test_every_position_predicts_under_user_all(small):
    """Then the views are still compared by their newest states."""
    last, every = small(), small(train_sampling="user_all")
    losses = []
    for model in (last, every):
        torch.manual_seed(3)
        losses.append(model.calculate_loss(rows()))
    assert losses[0].rec.item() != pytest.approx(losses[1].rec.item(), abs=1e-3)
    torch.testing.assert_close(losses[0].contrastive, losses[1].contrastive)


def recorded_views(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The states that are contrasted from now on: z_i, z_j, z_i, ..."""
    seen: list[Tensor] = []

    def record(z_i: Tensor, z_j: Tensor, *rest: Any) -> Tensor:
        seen.extend((z_i, z_j))
        return nt_xent(z_i, z_j, *rest)

    monkeypatch.setattr(cl4srec, "nt_xent", record)
    return seen


def test_the_contrast_moves_the_encoder_through_both_views(monkeypatch, small):
    """Neither state is a constant; the views come from the same encoder."""
    model = small()
    views = recorded_views(monkeypatch)
    loss = model.calculate_loss(rows()).contrastive
    weights = (model.position_embedding.weight, model.trm_encoder.layer[0].feed_forward.dense_1)
    theta = (model.item_embedding.weight, weights[0], weights[1].weight)
    for view, grad in zip(views, torch.autograd.grad(loss, views, retain_graph=True), strict=True):
        assert grad.any(1).all()
        assert all(g.any() for g in torch.autograd.grad(view, theta, grad, retain_graph=True))


def test_each_view_has_its_own_dropout(monkeypatch, small):
    """Also where both views are the row itself."""
    model = small(crop_ratio=1.0, mask_ratio=0.0, reorder_ratio=0.0, hidden_dropout_prob=0.5)
    views = recorded_views(monkeypatch)
    for training in (True, False):
        model.train(training).contrastive_loss(rows())
    assert (views[0] != views[1]).any(1).all()
    torch.testing.assert_close(views[2], views[3])


def test_training_leaves_batch_and_data_alone(build):
    """Invariant 6: bit by bit, where the batch is a window onto the stored items."""
    _, train, _, _, model = build("CL4SRec")
    stored = train.dataset.flat["item_id"]
    items = stored[: len(stored) // 4 * 4].view(-1, 4)
    assert items.data_ptr() == stored.data_ptr()
    batch = rows(items, torch.full((len(items),), 4), items[:, 0].clone())
    before = stored.clone()
    for seed in range(20):
        torch.manual_seed(seed)
        model.calculate_loss(batch)
    assert torch.equal(stored, before)
    assert batch["item_length"].tolist() == [4] * len(items)


# ---------------------------------------------------------------- the mask token


def test_the_mask_token_is_a_visible_key(small):
    """It is an item that nobody knows, not padding: what it holds changes the state."""
    model = small()
    seq = torch.tensor([[1, model.mask_token, 3, 0, 0, 0]])
    before = model(seq, torch.tensor([3]))
    model.item_embedding.weight.data[model.mask_token] += torch.arange(8)
    assert not torch.allclose(model(seq, torch.tensor([3])), before)


def test_the_mask_token_is_learnt_from_the_views_only(small):
    model = small(mask_ratio=1.0)
    torch.manual_seed(0)
    losses = model.calculate_loss(rows())
    table = model.item_embedding.weight
    assert not torch.autograd.grad(losses.rec, table, retain_graph=True)[0][N_ITEMS].any()
    assert torch.autograd.grad(losses.contrastive, table)[0][N_ITEMS].any()


@pytest.mark.parametrize("sr_loss", ["CE", "BCE"])
@pytest.mark.parametrize("mask_pad", [True, False])
def test_the_mask_token_is_never_scored(small, sr_loss, mask_pad):
    """Invariant 13: not by a score, not as a class, not as a negative."""
    model = small(sr_loss=sr_loss, mask_pad_in_softmax=mask_pad, cl_weight=0.0)
    results = []
    for value in (0.0, 1e4):
        model.item_embedding.weight.data[N_ITEMS] = value
        torch.manual_seed(0)
        results.append((model.full_sort_predict(rows()), model.calculate_loss(rows()).rec))
    assert results[0][0].shape == (4, N_ITEMS)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    column = results[0][0].gather(1, POS.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(model.predict(rows()), column)


def test_scores_do_not_depend_on_the_padding(small):
    """Invariant 14."""
    model = small(MAX_ITEM_LIST_LENGTH=50)
    wide = torch.nn.functional.pad(SEQ, (0, 44))
    narrow = model.full_sort_predict(rows(SEQ[:, :4]))
    torch.testing.assert_close(model.full_sort_predict(rows(wide)), narrow, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cl_weight": -0.1}, "cl_weight=-0.1 must be at least 0"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"tau": float("nan")}, "tau=nan must be positive"),
        ({"cl_similarity": "cos"}, "cl_similarity='cos' is not one of cosine, dot"),
        ({"operators": "same"}, "operators='same' is not one of distinct, independent"),
        ({"fn_mask": "item"}, "fn_mask='item' is not one of none, user, target"),
        ({"min_count": 1}, "min_count=1 .*: CL4SRec has this option no more; it works as with"),
        ({"crop_ratio": 1.1}, r"crop_ratio=1.1 must lie in \[0, 1\]"),
        ({"mask_ratio": -0.1}, r"mask_ratio=-0.1 must lie in \[0, 1\]"),
        ({"reorder_ratio": float("nan")}, r"reorder_ratio=nan must be finite"),
        ({"n_heads": 3}, "hidden_size=8 must be a multiple of n_heads=3"),
    ],
)
def test_impossible_settings_are_refused(make_config, values, message):
    with pytest.raises(UserError, match=message):
        make_config("CL4SRec", **values)


def test_options_that_are_gone_may_have_their_old_default(make_config):
    """Files and command lines of former versions name them."""
    config = make_config("CL4SRec", min_count=0, min_window=0)
    assert config.identity() == make_config("CL4SRec").identity()


# ---------------------------------------------------------------- learning


def test_64_rows_are_learnt_by_heart(small):
    """Invariant 15: L_rec below 0.1 in 200 steps, and L_cl less than it was at first."""
    model = small(hidden_size=32, MAX_ITEM_LIST_LENGTH=10).train()
    model.init_weights(model.item_embedding)
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(10)
    length = torch.randint(3, 11, (64,), generator=generator)
    seq = torch.randint(1, N_ITEMS, (64, 10), generator=generator)
    seq = torch.where(place < length.unsqueeze(1), seq, 0)
    batch = rows(seq, length, torch.randint(1, N_ITEMS, (64,), generator=generator))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(200):
        losses = model.calculate_loss(batch)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append(losses)
        if losses.rec < 0.08:
            break
    assert history[-1].rec < 0.1
    first = sum(loss.contrastive.item() for loss in history[:10]) / 10
    assert sum(loss.contrastive.item() for loss in history[-10:]) / 10 < first
