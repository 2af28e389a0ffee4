"""DuoRec against its formulas, RecBole's FEARec and SASRec, and brute force over its rows.

Invariants are those of DuoRec.
"""

import copy
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import FEARec, SASRec
from scipy.stats import chisquare
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.duorec import DuoRec, SameTargetIndex
from recbole_simdiff.modules.batch import PSEUDO_LENGTH, ROW_NUMBER
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.losses import nt_xent
from recbole_simdiff.modules.transformer import TokenLayout

N_ITEMS = 13  # ids 1..12, 0 is padding
SEQ = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [8, 2, 9, 0, 0, 0]])
LEN = torch.tensor([4, 2, 1, 3])
POS = torch.tensor([10, 3, 4, 6])
OFF = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
MODES = ["us_x", "us", "su", "un"]


def rows() -> Interaction:
    return Interaction({"item_id_list": SEQ, "item_length": LEN, "item_id": POS})


@pytest.fixture
def small(make_config: Any) -> Any:
    """small(key=value, ...) -> a model without data, in eval mode, dropout off, visible scores."""

    def make(model: type = DuoRec, **overrides: Any) -> Any:
        config = make_config("DuoRec", **OFF, MAX_ITEM_LIST_LENGTH=6, **overrides)
        torch.manual_seed(0)
        instance = model(config, SimpleNamespace(num=lambda field: N_ITEMS))
        instance.item_embedding.weight.data.normal_()
        return instance.eval()

    return make


@pytest.fixture
def toy(build: Any) -> Any:
    """toy(key=value, ...) -> (training loader, longest batch, model with visible scores)."""

    def make(**overrides: Any) -> Any:
        _, train, _, _, model = build("DuoRec", **{"train_batch_size": 8, **overrides})
        model.item_embedding.weight.data.normal_()
        return train, max(train, key=lambda batch: batch["item_id_list"].shape[1]), model

    return make


def trap(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this computation has no use and must not run")


# ---------------------------------------------------------------- NT-Xent


@pytest.mark.parametrize(
    ("temperature", "similarity", "value"),
    [(1.0, "dot", 1.5313), (0.5, "dot", 2.3069), (1.0, "cosine", 1.1736)],
)
def test_matching_by_hand(small, temperature, similarity, value):
    """Invariants 1 and 15: with the model's temperature and similarity; the order is free."""
    model = small(tau=temperature, cl_similarity=similarity)
    first, second = torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([[2.0, 0], [1, 1]])
    assert model.matching(first, second).item() == pytest.approx(value, abs=5e-5)
    assert model.matching(second, first).item() == pytest.approx(value, abs=5e-5)


def test_matching_of_unit_and_of_equal_vectors(small):
    """Invariant 1."""
    model = small()
    assert model.matching(torch.eye(2), torch.eye(2)).item() == pytest.approx(0.551445, abs=1e-6)
    equal = torch.ones(256, 2)
    assert model.matching(equal, equal).item() == pytest.approx(math.log(511), abs=1e-5)


@pytest.mark.parametrize("batch", [2, 7, 256])
@pytest.mark.parametrize(("ours", "theirs"), [("dot", "dot"), ("cosine", "cos")])
def test_matching_is_recboles(small, batch, ours, theirs):
    """Invariant 2: FEARec holds a copy of the released loss; values and gradients."""
    model = small(tau=0.7, cl_similarity=ours)
    torch.manual_seed(1)
    views = torch.randn(2, batch, 8, requires_grad=True)
    loss = model.matching(*views)
    fearec = SimpleNamespace(batch_size=batch)
    fearec.mask_default = FEARec.mask_correlated_samples(fearec, batch)
    expected = F.cross_entropy(*FEARec.info_nce(fearec, *views, 0.7, batch, theirs))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, views)[0] for x in (loss, expected)))


# ---------------------------------------------------------------- rows with the same target


def group(index: SameTargetIndex, row: int) -> list[int]:
    """All rows with this row's target, by brute force."""
    return (index.target == index.target[row]).nonzero().flatten().tolist()


def test_rows_are_drawn_uniformly_among_the_others(toy):
    """Invariants 3 and 4: never the row itself, unless nobody else has its target."""
    torch.manual_seed(0)
    _, _, model = toy()
    index = model.same_target
    sizes = set()
    for row in range(len(index.target)):
        counts = Counter(index.draw(torch.full((3000,), row)).tolist())
        others = [j for j in group(index, row) if j != row] or [row]
        assert set(counts) == set(others)
        if len(others) > 1:
            assert chisquare([counts[j] for j in others]).pvalue > 1e-3
        sizes.add(len(group(index, row)))
    assert sizes >= {1, 2, 3}  # the toy data have all cases


def test_rows_of_a_batch_are_drawn_independently(toy):
    """The same row many times in one batch gets all of its others; rows do not mix."""
    _, _, model = toy()
    index = model.same_target
    row = torch.arange(len(index.target)).repeat(200)
    drawn = index.draw(row)
    assert torch.equal(index.target[drawn], index.target[row])
    alone = index.count[index.target[row]] == 1
    assert torch.equal(drawn == row, alone)
    assert alone.any()
    assert not alone.all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_row_numbers_survive_shuffling(toy, shuffle):
    """Invariant 6: the stored row of that number is the row of the batch."""
    train, _, model = toy(shuffle=shuffle)
    seen = []
    for epoch in range(2):
        train.set_epoch(epoch)
        for batch in train:
            row = batch[ROW_NUMBER]
            items, length = model.same_target.sequences(row)
            assert torch.equal(items, batch["item_id_list"])
            assert torch.equal(length, batch["item_length"])
            assert torch.equal(model.same_target.target[row], batch["item_id"])
            seen += row.tolist()
    assert Counter(seen) == dict.fromkeys(range(len(train.dataset)), 2)


def test_no_item_of_validation_or_test_is_read(build):
    """Invariant 5: rows and their targets end two items before each user's last."""
    _, train, valid, test, model = build("DuoRec")
    index = model.same_target
    held_out = set()
    for part in (valid, test):
        held_out |= set(part._dataset.inter_feat["_target"].tolist())
    place = torch.arange(int(index.row_length.max()))
    used = (index.row_start.unsqueeze(1) + place)[place < index.row_length.unsqueeze(1)]
    assert held_out
    assert not held_out & set(used.tolist())
    assert torch.equal(index.target, index.items[index.row_start + index.row_length])
    assert not held_out & set((index.row_start + index.row_length).tolist())
    assert len(index.target) == len(train.dataset)


def test_views_hold_real_items_only(build):
    """Rows that an augmenter lengthened are drawn without what it invented."""
    config, train, _, _, _ = build("DuoRec")
    dataset = train.dataset
    plain = SameTargetIndex(dataset).sequences(torch.arange(len(dataset)))
    dataset.prepend(torch.full((dataset.user_num, 2), 12), keep_rows=False)
    assert dataset.inter_feat[PSEUDO_LENGTH].any()
    items, length = DuoRec(config, dataset).same_target.sequences(torch.arange(len(dataset)))
    assert torch.equal(items, plain[0])
    assert torch.equal(length, plain[1])


def test_a_row_and_its_lengthened_twin_are_one(build):
    """Neither is drawn for the other; rows that have a twin are not drawn more often."""
    config, train, _, _, plain = build("DuoRec")
    dataset, n_rows = train.dataset, len(train.dataset)
    pseudo = torch.full((dataset.user_num, 2), 12)
    pseudo[1:3] = 0  # users without, whose rows have no twin
    dataset.prepend(pseudo, keep_rows=True)
    index = DuoRec(config, dataset).same_target
    invented = dataset.inter_feat[PSEUDO_LENGTH]
    assert 0 < (invented > 0).sum() == len(dataset) - n_rows < n_rows
    place = dataset.inter_feat["_target"]
    twin = [(place[:n_rows] == place[row]).nonzero().item() for row in range(len(dataset))]
    items, length = index.sequences(torch.arange(len(dataset)))
    assert torch.equal(items, items[twin])
    assert torch.equal(length, length[twin])
    torch.manual_seed(0)
    sizes = set()
    for row in range(len(dataset)):
        counts = Counter(index.draw(torch.full((2000,), row)).tolist())
        others = [j for j in group(plain.same_target, twin[row]) if j != twin[row]]
        assert set(counts) == set(others or [twin[row]])
        if len(others) > 1:
            assert chisquare([counts[j] for j in others]).pvalue > 1e-3
        sizes.add((len(others), row >= n_rows))
    assert sizes >= {(0, True), (1, True), (2, True), (0, False)}


def test_the_index_is_not_saved(toy, build):
    """Invariant 13: copies work, and weights fit a model of another split."""
    _, batch, model = toy()
    assert not [name for name in model.state_dict() if "same_target" in name]
    clone = copy.deepcopy(model)
    _, _, _, _, other = build("DuoRec", eval_args={"split": {"LS": "test_only"}})
    assert len(other.same_target.target) > len(model.same_target.target)
    other.load_state_dict(model.state_dict())
    for twin in (clone, other):
        torch.testing.assert_close(
            twin.eval().full_sort_predict(batch), model.eval().full_sort_predict(batch)
        )


def test_without_rows_it_can_score(small):
    """As for serving; invariant 14."""
    model = small()
    assert model.same_target is None
    assert model.full_sort_predict(rows()).shape == (4, N_ITEMS)


def test_without_pairs_of_rows_there_is_no_index(toy):
    assert toy(contrast="un")[2].same_target is None


def test_ready_made_prefixes_are_refused():
    with pytest.raises(UserError, match="ready-made prefixes of benchmark_filename use contrast=u"):
        SameTargetIndex(SimpleNamespace(list_fields={}))


# ---------------------------------------------------------------- the loss


def fixed_draws(monkeypatch: pytest.MonkeyPatch, model: Any, row: Tensor) -> Tensor:
    """Make the drawn rows known; returns their states."""
    drawn = model.same_target.draw(row)
    monkeypatch.setattr(model.same_target, "draw", lambda row: drawn)
    return model(*model.same_target.sequences(drawn))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("mode", MODES)
def test_the_modes(monkeypatch, toy, mode, similarity):
    """Invariants 9 and 12: without dropout h' = h, so every mode has a formula."""
    weights = {"unsupervised_weight": 0.3, "supervised_weight": 0.2}
    _, batch, model = toy(**OFF, **weights, contrast=mode, tau=0.7, cl_similarity=similarity)
    h = model(batch["item_id_list"], batch["item_length"])
    h_s = None if mode == "un" else fixed_draws(monkeypatch, model, batch[ROW_NUMBER])
    un = 0.3 * nt_xent(h, h, 0.7, similarity)
    su = None if h_s is None else 0.2 * nt_xent(h, h_s, 0.7, similarity)
    expected = {"us_x": su, "su": su, "un": un, "us": un if su is None else un + su}[mode]
    torch.testing.assert_close(model.calculate_loss(batch).contrastive, expected)


def test_us_x_matches_the_two_views_and_not_the_row_itself(monkeypatch, toy):
    """The paper's pair: h' and h_s'."""
    _, batch, model = toy(supervised_weight=0.2)
    first, second = torch.randn(2, len(batch), 8)
    monkeypatch.setattr(model, "unsupervised_view", lambda interaction: first)
    monkeypatch.setattr(model, "supervised_view", lambda interaction: second)
    loss = model.calculate_loss(batch).contrastive
    torch.testing.assert_close(loss, 0.2 * nt_xent(first, second, 1.0, "dot"))


@pytest.mark.parametrize(
    ("mode", "key"), [("us_x", "unsupervised_weight"), ("su", "unsupervised_weight")]
)
def test_weights_without_a_term_change_nothing(toy, mode, key):
    """Invariant 10."""
    losses = []
    for weight in (0.0, 5.0):
        _, batch, model = toy(**{"contrast": mode, key: weight})
        torch.manual_seed(0)
        losses.append(model.calculate_loss(batch).contrastive)
    assert torch.equal(*losses)
    assert losses[0] > 0


@pytest.mark.parametrize("mode", ["us_x", "us", "un"])
def test_the_unsupervised_view_has_its_own_dropout(toy, mode):
    """Invariants 7 and 11: in training mode two passes differ, in evaluation mode they do not."""
    _, batch, model = toy(contrast=mode)
    model.train()
    assert not torch.allclose(model.unsupervised_view(batch), model.unsupervised_view(batch))
    h = model(batch["item_id_list"], batch["item_length"])
    assert not torch.allclose(model.unsupervised_view(batch), h)
    model.eval()
    h = model(batch["item_id_list"], batch["item_length"])
    assert torch.equal(model.unsupervised_view(batch), h)


@pytest.mark.parametrize("mode", ["us_x", "us", "su"])
def test_the_supervised_view_has_its_own_dropout(monkeypatch, toy, mode):
    """Also for a row that is its own view, as one without another row of its target is."""
    _, batch, model = toy(contrast=mode)
    monkeypatch.setattr(model.same_target, "draw", lambda row: row)
    model.train()
    views = [model.supervised_view(batch) for _ in range(2)]
    for other in (views[1], model.unsupervised_view(batch)):
        assert (views[0] != other).any(1).all()
    model.eval()
    view = model.supervised_view(batch)
    assert torch.equal(model.supervised_view(batch), view)
    torch.testing.assert_close(view, model(batch["item_id_list"], batch["item_length"]))


def test_supervised_views_come_in_the_order_of_the_rows(monkeypatch, toy):
    """They are encoded by length, and put back: also for one row, and for an odd number."""
    train, _, model = toy()
    model.eval()
    for size in (1, 2, 7):
        row = torch.randperm(len(train.dataset), generator=torch.Generator().manual_seed(0))[:size]
        with monkeypatch.context() as patch:
            expected = fixed_draws(patch, model, row)
            view = model.supervised_view(Interaction({ROW_NUMBER: row}))
        torch.testing.assert_close(view, expected, atol=1e-6, rtol=1e-5)


def test_the_gradient_flows_into_both_views(monkeypatch, toy):
    """Items of a same-target row that the batch itself does not hold move, too."""
    _, _, model = toy(**OFF, train_batch_size=2)
    index = model.same_target
    row, other = next(
        (i, j)
        for i in range(len(index.target))
        for j in group(index, i)
        if not set(index.sequences(torch.tensor([i]))[0][0].tolist())
        & set(index.sequences(torch.tensor([j]))[0][0].tolist()) - {0}
    )
    pair = torch.tensor([row, (row + 1) % len(index.target)])
    items, length = index.sequences(pair)
    batch = Interaction(
        {
            "item_id_list": items,
            "item_length": length,
            "item_id": index.target[pair],
            ROW_NUMBER: pair,
        }
    )
    monkeypatch.setattr(index, "draw", lambda rows: torch.tensor([other, other]))
    grad = torch.autograd.grad(
        model.calculate_loss(batch).contrastive, model.item_embedding.weight
    )[0]
    theirs = set(index.sequences(torch.tensor([other]))[0][0].tolist()) - {0}
    ours = set(items[0].tolist()) - {0}
    assert all(grad[item].any() for item in theirs | ours)


@pytest.mark.parametrize(("mode", "contrasted"), [("us_x", 2), ("us", 4), ("su", 2), ("un", 2)])
def test_the_contrast_moves_the_encoder_through_all_passes(monkeypatch, toy, mode, contrasted):
    """No state of a pair is a constant, whatever the mode."""
    weights = {"unsupervised_weight": 0.3, "supervised_weight": 0.2}
    _, batch, model = toy(**OFF, **weights, contrast=mode)
    views, stock = [], model.matching

    def record(first: Tensor, second: Tensor) -> Tensor:
        views.extend((first, second))
        return stock(first, second)

    monkeypatch.setattr(model, "matching", record)
    loss = model.calculate_loss(batch).contrastive
    assert len(views) == contrasted
    theta = (model.item_embedding.weight, model.trm_encoder.layer[0].feed_forward.dense_1.weight)
    for view, grad in zip(views, torch.autograd.grad(loss, views, retain_graph=True), strict=True):
        assert grad.any(1).all()
        assert all(g.any() for g in torch.autograd.grad(view, theta, grad, retain_graph=True))


@pytest.mark.parametrize("mode", MODES)
def test_without_weight_it_is_sasrec(monkeypatch, small, mode):
    """Invariants 8 and 12: loss and gradients; no second pass, no random number."""
    model = small(contrast=mode, unsupervised_weight=0.0, supervised_weight=0.0)
    encoder, theirs = small(EncoderRecommender), small(SASRec)
    for other in (encoder, theirs):
        other.load_state_dict(model.state_dict())
    for name in ("unsupervised_view", "supervised_view"):
        monkeypatch.setattr(model, name, trap)
    before = torch.get_rng_state()
    losses = model.calculate_loss(rows())
    assert torch.equal(torch.get_rng_state(), before)
    assert losses.contrastive == 0
    layout = TokenLayout(LEN, 6)
    alone = encoder.recommendation_loss(encoder(SEQ, LEN), layout, rows())
    assert torch.equal(losses.rec, alone)  # bit by bit
    expected = theirs.calculate_loss(rows())
    torch.testing.assert_close(losses.rec, expected)
    for loss in (sum(losses), expected):
        loss.backward()
    for ours, parameter in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, parameter.grad, atol=1e-6, rtol=1e-4)


def test_un_can_be_trained_on_every_position(toy):
    """The contrasted states are the newest ones."""
    _, batch, model = toy(**OFF, contrast="un", train_sampling="user_all", unsupervised_weight=0.3)
    h = model(batch["item_id_list"], batch["item_length"])
    loss = model.calculate_loss(batch).contrastive
    torch.testing.assert_close(loss, 0.3 * nt_xent(h, h, 1.0, "dot"))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"contrast": "uss"}, "contrast='uss' .* is not one of us_x, un, su, us"),
        ({"supervised_weight": -1.0}, "supervised_weight=-1.0 must be at least 0"),
        ({"unsupervised_weight": -1.0}, "unsupervised_weight=-1.0 must be at least 0"),
        ({"tau": -1.0}, "tau=-1.0 must be positive"),
        ({"cl_similarity": "cos"}, "cl_similarity='cos' is not one of cosine, dot"),
        ({"train_sampling": "user_all"}, "contrast=us_x .* must be prefix_last or prefix_all"),
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(make_config, values, message):
    with pytest.raises(UserError, match=message):
        make_config("DuoRec", **values)


@pytest.mark.parametrize("mode", ["us", "su"])
def test_same_targets_need_one_target_a_row(make_config, mode):
    with pytest.raises(UserError, match=f"contrast={mode} compares rows by their one target"):
        make_config("DuoRec", contrast=mode, train_sampling="user_all")
    make_config("DuoRec", contrast=mode, train_sampling="prefix_all")


def test_the_released_settings():
    """The method is the paper's; only the stopping rule differs."""
    plain, official = (
        Config("DuoRec", "toy", overrides={"preset": preset}) for preset in ("paper", "official")
    )
    differing = {k: v for k, v in official.final_config_dict.items() if plain[k] != v}
    assert differing == {"preset": "official", "epochs": 50, "valid_metric": "MRR@10"}
    assert (plain["contrast"], plain["supervised_weight"], plain["tau"]) == ("us_x", 0.1, 1.0)


@pytest.mark.parametrize(("dataset", "dropout"), [("amazon-beauty", 0.5), ("ml-1m", 0.1)])
def test_dropout_of_the_data_sets(dataset, dropout):
    config = Config("DuoRec", dataset)
    assert config["hidden_dropout_prob"] == config["attn_dropout_prob"] == dropout


# ---------------------------------------------------------------- learning


def test_states_with_the_same_target_come_together(toy):
    """What the supervised view is for: trained on the contrast alone, no next-item loss."""
    train, _, model = toy(**OFF, contrast="su", train_batch_size=16)
    index = model.same_target
    every = index.sequences(torch.arange(len(index.target)))

    def same_minus_other() -> float:
        with torch.no_grad():
            z = F.normalize(model(*every))
        alike = z @ z.t()
        same = index.target == index.target.unsqueeze(1)
        return (
            alike[same & ~torch.eye(len(z), dtype=torch.bool)].mean() - alike[~same].mean()
        ).item()

    before = same_minus_other()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(30):
        train.set_epoch(epoch)
        for batch in train:
            optimizer.zero_grad()
            model.calculate_loss(batch).contrastive.backward()
            optimizer.step()
    assert same_minus_other() > before + 0.3
