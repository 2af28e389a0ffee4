"""ECL-SR: its masks, what reaches whom, and its two stages."""

import math
from collections import Counter
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec
from scipy.stats import chisquare
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.eclsr import ALL_TERMS, ECLSR, WITHOUT_DISCRIMINATOR
from recbole_simdiff.modules.losses import info_nce
from recbole_simdiff.modules.transformer import TokenLayout
from recbole_simdiff.training.progress import OnValidation
from recbole_simdiff.training.trainer import PlanTrainer

MAX_LENGTH = 6
SEQ = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [8, 2, 9, 0, 0, 0]])
LEN = torch.tensor([4, 2, 1, 3])
POS = torch.tensor([10, 3, 4, 6])
LAYOUT = TokenLayout(LEN, MAX_LENGTH)
ITEMS = LAYOUT.pack(SEQ)
N_ITEMS = 13
MASK = N_ITEMS
TERMS = ("cl_weight", "disc_weight", "gen_weight")


def rows(seq: Tensor = SEQ, length: Tensor = LEN) -> Interaction:
    return Interaction({"item_id_list": seq, "item_length": length, "item_id": POS[: len(seq)]})


@pytest.fixture
def small(make_config: Any) -> Any:
    """small(key=value, ...) -> a model without data, dropout off, all weights 1."""

    def make(n_items: int = N_ITEMS, **overrides: Any) -> Any:
        values: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
        values |= {"MAX_ITEM_LIST_LENGTH": MAX_LENGTH} | dict.fromkeys(TERMS, 1.0)
        config = make_config("ECLSR", **(values | overrides))
        torch.manual_seed(0)
        model = ECLSR(config, SimpleNamespace(num=lambda field: n_items))
        model.item_embedding.weight.data.normal_()
        return model

    return make


def reached(model: Any, loss: Tensor) -> set[str]:
    """Top-level modules that a loss sends gradient to."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name.split(".")[0]
        for name, g in zip(names, grads, strict=True)
        if g is not None and g.any()
    }


def losses(model: Any, seed: int = 5, **which: Any) -> Any:
    torch.manual_seed(seed)
    return model.calculate_loss(rows(**which))


# ---------------------------------------------------------------- invariance


def test_contrast_of_known_vectors() -> None:
    """Invariants 1 and 2: one direction, cosine, temperature 0.05, the other view only."""
    eye, one, two = torch.eye(2), torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([[2.0, 0], [1, 1]])
    exact = math.log1p(math.exp(-20))
    assert info_nce(eye.double(), eye.double(), 0.05).item() == pytest.approx(exact, abs=1e-7)
    assert info_nce(one, two, 0.05).item() == pytest.approx(5.0147, abs=1e-4)
    scaled = info_nce(one * torch.tensor([[3.0], [0.1]]), two * 7, 0.05)
    assert scaled.item() == pytest.approx(5.0147, abs=1e-4)
    same = torch.ones(256, 3)
    assert info_nce(same, same, 0.05).item() == pytest.approx(math.log(256), abs=1e-4)


def test_the_contrast_is_between_two_dropout_passes(small: Any) -> None:
    """Invariant 3: without dropout they are equal, and the diagonal is 1 / tau."""
    model = small(disc_weight=0.0, gen_weight=0.0, last_k=2)
    state = model.recent_mean(model.encode(SEQ, LAYOUT), LAYOUT)
    cosine = F.normalize(state) @ F.normalize(state).t() / 0.05
    torch.testing.assert_close(cosine.diagonal(), torch.full((4,), 20.0))
    expected = F.cross_entropy(cosine, torch.arange(4))
    torch.testing.assert_close(losses(model).contrastive, expected)
    wet = small(disc_weight=0.0, gen_weight=0.0, last_k=2, hidden_dropout_prob=0.5)
    assert losses(wet).contrastive > expected + 0.1


@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_mean_of_the_last_states(small: Any, k: int) -> None:
    """Invariant 14: of min(k, n) real ones."""
    model = small(last_k=k)
    hidden = torch.randn(len(ITEMS), 8)
    padded = LAYOUT.unpack(hidden)
    expected = [padded[i, max(0, n - k) : n].mean(0) for i, n in enumerate(LEN.tolist())]
    torch.testing.assert_close(model.recent_mean(hidden, LAYOUT), torch.stack(expected))


# ---------------------------------------------------------------- masks


def drawn(model: Any, lengths: list[int], longest: int, times: int = 1) -> Tensor:
    """Masked cells of so many rows a length, [rows, longest]."""
    length = torch.tensor(lengths).repeat_interleave(times)
    layout = TokenLayout(length, longest)
    chosen = torch.zeros(len(layout.row), dtype=torch.bool)
    positions = model.choose_positions(layout)
    assert torch.equal(positions, positions.sort().values)
    chosen[positions] = True
    return layout.unpack(chosen)


@pytest.mark.parametrize("ratio", [0.2, 0.6, 1.0])
def test_a_fixed_number_of_masks(small: Any, ratio: float) -> None:
    """Invariant 4: min(floor(rho n + 1), n - 1), never the oldest, never padding."""
    model = small(masking="count", mask_ratio=ratio, MAX_ITEM_LIST_LENGTH=50)
    lengths = [1, 2, 3, 5, 10, 49, 50]
    cells = drawn(model, lengths, 50, 20)
    expected = [min(math.floor(ratio * n + 1 + 1e-9), n - 1) for n in lengths for _ in range(20)]
    assert cells.sum(1).tolist() == expected
    assert not cells[:, 0].any()
    length = torch.tensor(lengths).repeat_interleave(20)
    assert not (cells & (torch.arange(50) >= length.unsqueeze(1))).any()


def test_a_fixed_number_of_masks_is_uniform(small: Any) -> None:
    """Invariant 4: of n = 5 and rho = 0.2, 2 of 4, each in half of all rows."""
    torch.manual_seed(0)
    share = drawn(small(masking="count"), [5], 6, 4000).float().mean(0)
    torch.testing.assert_close(share[1:5], torch.full((4,), 0.5), atol=0.04, rtol=0)


@pytest.mark.parametrize(("n", "ratio", "count"), [(5, 0.2, 2), (6, 0.4, 3), (4, 0.2, 1)])
def test_every_set_of_so_many_masks_is_equally_likely(
    small: Any, n: int, ratio: float, count: int
) -> None:
    """Invariant 4: drawn without replacement among all but the oldest."""
    torch.manual_seed(0)
    cells = drawn(small(masking="count", mask_ratio=ratio), [n], MAX_LENGTH, 6000)
    counts = Counter(tuple(row.nonzero().flatten().tolist()) for row in cells)
    assert set(counts) == set(combinations(range(1, n), count))
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_masks_by_probability(small: Any) -> None:
    """Invariant 5: at least one a row, the newest one failing others; at most rho L + 1."""
    model = small(MAX_ITEM_LIST_LENGTH=50, mask_ratio=0.2)
    torch.manual_seed(0)
    assert drawn(model, [1], 50).nonzero().tolist() == [[0, 0]]
    for n in (2, 5, 30, 50):
        cells = drawn(model, [n], 50, 3000)
        counts = cells.sum(1)
        assert counts.min() >= 1
        assert counts.max() <= 11
        assert not cells[:, n:].any()
        free = cells[:, : n - 1].float().mean(0)[: min(n - 1, 25)]
        torch.testing.assert_close(free, torch.full_like(free, 0.2), atol=0.035, rtol=0)
    lone = drawn(model, [5], 50, 3000)
    alone = lone[lone.sum(1) == 1][:, 4].float().mean()
    # the newest one alone: drawn so, or because nothing was drawn
    nothing, itself = 0.8**5, 0.2 * 0.8**4
    assert alone.item() == pytest.approx((nothing + itself) / (nothing + 5 * itself), abs=0.04)


@pytest.mark.parametrize(("ratio", "maximum"), [(0.2, 11), (0.25, 14), (1.0, 50)])
def test_masks_stop_at_the_cap(small: Any, ratio: float, maximum: int) -> None:
    """Invariant 5: the first ones to reach rho L + 1, counted from the oldest."""
    model = small(MAX_ITEM_LIST_LENGTH=50, mask_ratio=ratio)
    torch.manual_seed(0)
    cells = drawn(model, [50], 50, 2000)
    assert cells.sum(1).max() == maximum
    capped = cells[cells.sum(1) == maximum]
    assert len(capped) > 10
    if ratio < 1:
        assert capped[:, :25].float().mean() > 1.2 * capped[:, 25:].float().mean()


def test_masks_do_not_depend_on_padding(small: Any) -> None:
    for masking in ("count", "probability"):
        model = small(masking=masking, mask_ratio=0.5)
        torch.manual_seed(0)
        short = drawn(model, [4, 2, 1, 3], 4)
        torch.manual_seed(0)
        assert torch.equal(drawn(model, [4, 2, 1, 3], 6)[:, :4], short)


# ---------------------------------------------------------------- generator


def watch(monkeypatch: pytest.MonkeyPatch, model: Any, name: str) -> list[Any]:
    """(arguments, result) of the calls of a method."""
    seen, stock = [], getattr(model, name)

    def record(*args: Any) -> Any:
        seen.append((args, stock(*args)))
        return seen[-1][1]

    monkeypatch.setattr(model, name, record)
    return seen


@pytest.mark.parametrize("masking", ["count", "probability"])
def test_replacements_are_items_at_masked_positions(
    small: Any, monkeypatch: pytest.MonkeyPatch, masking: str
) -> None:
    """Invariant 6: no mask token, no padding, nothing elsewhere; single items as the mask says."""
    model = small(masking=masking)
    chosen = watch(monkeypatch, model, "choose_positions")
    seen = watch(monkeypatch, model, "discriminate")
    for seed in range(20):
        losses(model, seed)
    for (_, masked), ((replaced, hidden, layout), _) in zip(chosen, seen, strict=True):
        assert layout.batch == 4
        assert hidden.shape == (len(ITEMS), 8)
        assert ((replaced >= 1) & (replaced < N_ITEMS)).all()
        untouched = torch.ones(len(ITEMS), dtype=torch.bool)
        untouched[masked] = False
        assert torch.equal(replaced[untouched], ITEMS[untouched])
        assert (replaced[masked] != ITEMS[masked]).any()
        assert (6 in masked.tolist()) == (masking == "probability")  # the row of one item


def test_the_generator_reads_both_sides_and_no_masked_item(small: Any) -> None:
    """Invariant 12: its states change with neighbours on either side."""
    model = small().eval()
    masked = torch.tensor([1])  # item 2 of the first row
    base = model.generate(ITEMS, masked, LAYOUT)
    assert base.shape == (1, 8)
    for token, other in ((0, False), (2, False), (1, True), (4, True)):
        changed = ITEMS.clone()
        changed[token] = 11
        assert torch.equal(model.generate(changed, masked, LAYOUT), base) == other


def test_the_generator_loss_is_a_mean_over_masked_items(small: Any) -> None:
    for pad, table in ((False, slice(0, N_ITEMS)), (True, slice(1, N_ITEMS))):
        model = small(mask_pad_in_softmax=pad)
        states, items = torch.randn(3, 8), torch.tensor([4, 12, 1])
        logits = states @ model.item_embedding.weight[table].t()
        expected = F.cross_entropy(logits, items - int(pad))
        torch.testing.assert_close(model.generator_loss(states, items), expected)
        assert model.generator_loss(states[:0], items[:0]) == 0


# With rho = 0.6 no row of the toy data reaches the cap.
@pytest.mark.parametrize(("masking", "ratio"), [("count", 0.2), ("probability", 0.6)])
@pytest.mark.parametrize("batch_size", [4, 512])
def test_expected_number_of_masked_items(
    build: Any, masking: str, ratio: float, batch_size: int
) -> None:
    """Of a full batch, or of all rows where there are fewer; by drawing."""
    changes = {"masking": masking, "mask_ratio": ratio, "train_batch_size": batch_size}
    _, train, _, _, model = build("ECLSR", **changes)
    length = train.dataset.inter_feat["item_length"]
    assert len(set(length.tolist())) > 2
    torch.manual_seed(0)
    layout = TokenLayout(length.repeat(500), int(length.max()))
    a_row = len(model.choose_positions(layout)) / layout.batch
    expected = a_row * min(batch_size, len(length))
    assert model.masked_per_batch == pytest.approx(expected, rel=0.02)


def test_every_masked_item_weighs_the_same_in_training(build: Any) -> None:
    """However many a batch has: the loss is a sum over the number expected of a full one."""
    _, _, _, _, model = build("ECLSR")
    states, items = torch.randn(3, 8), torch.tensor([4, 12, 1])
    logits = states @ model.item_embedding.weight[: model.n_items].t()
    each = F.cross_entropy(logits, items, reduction="none") / model.masked_per_batch
    torch.testing.assert_close(model.generator_loss(states, items), each.sum())
    torch.testing.assert_close(model.generator_loss(states[:1], items[:1]), each[0])
    assert model.generator_loss(states[:0], items[:0]) == 0


def test_guesses(small: Any) -> None:
    """The likeliest item; never padding or the mask token."""
    model = small(n_items=5)
    model.item_embedding.weight.data.zero_()
    model.item_embedding.weight.data[:, 0] = torch.tensor([99.0, 0.0, 1.0, 2.0, 0.5, 99.0])
    states = F.one_hot(torch.zeros(4, dtype=torch.long), 8).float()
    assert model.guesses(states).tolist() == [3, 3, 3, 3]


def test_a_batch_of_single_items_may_have_no_mask(small: Any) -> None:
    model = small(masking="count")
    loss = losses(model, seq=SEQ[2:3], length=LEN[2:3])
    assert loss.generator == 0
    assert loss.discriminator > 0
    assert model.monitored()["guessed"] == 0


# ---------------------------------------------------------------- discriminator


def test_right_guesses_count_as_original(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 7."""
    model = small()
    masked = watch(monkeypatch, model, "choose_positions")
    monkeypatch.setattr(model, "guesses", lambda states: ITEMS[masked[-1][1]])
    seen = watch(monkeypatch, model, "discriminate")
    loss = losses(model).discriminator
    ((replaced, _, _), logit) = seen[-1]
    assert torch.equal(replaced, ITEMS)
    torch.testing.assert_close(loss, -torch.log(1 - torch.sigmoid(logit)).mean())
    assert model.monitored()["guessed"] == 1


def test_an_empty_read_out_knows_nothing(small: Any) -> None:
    """Invariant 7: u = 0 gives log 2, whatever was replaced."""
    model = small()
    model.detector.weight.data.zero_()
    assert losses(model).discriminator.item() == pytest.approx(math.log(2))


def test_the_discriminator_loss_is_a_sum_over_the_expected_tokens(small: Any) -> None:
    model = small()
    logit, r = torch.tensor([0.5, -2.0, 40.0]), torch.tensor([True, False, False])
    one = -math.log(1 / (1 + math.exp(-0.5))) - math.log(1 - 1 / (1 + math.exp(2))) + 40
    assert model.discriminator_loss(logit, r).item() == pytest.approx(one / 3)
    model.tokens_per_batch = 12.0
    assert model.discriminator_loss(logit, r).item() == pytest.approx(one / 12)


@pytest.mark.parametrize("condition", ["sequence", "position", "concatenate"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_input_of_the_discriminator(small: Any, condition: str, shared: bool) -> None:
    """Items, condition, positions; normalised, and through the encoder or a tower of its own."""
    model = small(condition=condition, share_discriminator=shared).eval()
    hidden = torch.randn(len(ITEMS), 8)
    other = ITEMS.roll(1)
    newest = torch.stack([hidden[LAYOUT.last[row]] for row in LAYOUT.row])
    vectors = model.item_embedding(other)
    if condition == "concatenate":
        vectors = torch.cat([newest, vectors], 1) @ model.combine.weight.t()
    else:
        vectors = vectors + (hidden if condition == "position" else newest)
    tower = model if shared else model.discriminator
    vectors = tower.LayerNorm(vectors + tower.position_embedding(LAYOUT.position))
    states = tower.trm_encoder(vectors, LAYOUT, causal=True)
    expected = (states * model.detector.weight).sum(1)
    torch.testing.assert_close(model.discriminate(other, hidden, LAYOUT), expected)


@pytest.mark.parametrize("both_sides", [False, True])
def test_the_discriminator_is_causal_unless_told(small: Any, both_sides: bool) -> None:
    model = small(disc_bidirectional=both_sides).eval()
    hidden = torch.randn(len(ITEMS), 8)
    changed = ITEMS.clone()
    changed[3] = 12  # the newest of the first row
    base, after = (model.discriminate(items, hidden, LAYOUT) for items in (ITEMS, changed))
    assert torch.equal(base[:3], after[:3]) != both_sides
    assert not torch.equal(base[3], after[3])
    assert torch.equal(base[4:], after[4:])


# ---------------------------------------------------------------- what reaches whom

ENCODER = {"item_embedding", "position_embedding", "LayerNorm", "trm_encoder"}


def test_gradients_go_where_they_belong(small: Any) -> None:
    """Invariant 8: guesses pass none; the condition does; all terms share the item table."""
    model = small(hidden_dropout_prob=0.1)
    loss = losses(model)
    assert reached(model, loss.rec + loss.contrastive) == ENCODER
    loss = losses(model)
    assert reached(model, loss.discriminator) == {*ENCODER, "detector"}
    assert reached(model, losses(model).generator) == {"item_embedding", "generator"}
    # The encoder is reached through the condition, with a discriminator of its own, too.
    for condition, more in (("sequence", set()), ("position", set()), ("concatenate", {"combine"})):
        alone = small(share_discriminator=False, condition=condition)
        expected = {*ENCODER, "detector", "discriminator", *more}
        assert reached(alone, losses(alone).discriminator) == expected


def test_the_contrast_moves_the_encoder_through_both_passes(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 8: by itself, without the help of the next-item loss."""
    model = small(hidden_dropout_prob=0.1)
    assert reached(model, losses(model).contrastive) == ENCODER
    called = watch(monkeypatch, model, "contrastive_loss")
    loss = losses(model).contrastive
    (((*passes, _), _),) = called
    assert len(passes) == 2
    theta = (model.item_embedding.weight, model.trm_encoder.layer[0].feed_forward.dense_1.weight)
    for states, grad in zip(
        passes, torch.autograd.grad(loss, passes, retain_graph=True), strict=True
    ):
        assert grad.any(1).all()  # last_k is more than any row has
        assert all(g.any() for g in torch.autograd.grad(states, theta, grad, retain_graph=True))


def test_number_of_parameters(small: Any) -> None:
    """Invariant 9: sharing means no second encoder."""

    def count(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    model = small()
    sizes = {name: count(module) for name, module in model.named_children()}
    of_tower = sizes["trm_encoder"] + sizes["position_embedding"] + sizes["LayerNorm"]
    assert sizes["generator"] == of_tower
    assert sizes["item_embedding"] == (N_ITEMS + 1) * 8
    assert count(model) == 2 * of_tower + sizes["item_embedding"] + 8
    assert count(small(share_discriminator=False)) == count(model) + of_tower


@pytest.mark.parametrize("last", [True, False])
def test_without_its_terms_it_is_sasrec(build: Any, last: bool) -> None:
    """Invariant 10: the loss and gradients of RecBole's SASRec, and no random number."""
    changes = dict.fromkeys(TERMS, 0.0) | {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    sampling = "prefix_last" if last else "user_all"
    config, _, _, _, model = build("ECLSR", train_sampling=sampling, **changes)
    batch = Interaction({"item_id_list": SEQ[:, :4], "item_length": LEN, "item_id": POS % 12 + 1})
    model.targets_per_batch = None
    model.choose_positions = model.generate = model.contrastive_loss = None
    state = torch.get_rng_state()
    loss = model.calculate_loss(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [value.item() for value in loss[1:]] == [0, 0, 0]
    if not last:
        return
    sasrec = SASRec(config, build("SASRec")[1]._dataset)
    known = sasrec.state_dict().keys()
    weights = {k: v for k, v in model.state_dict().items() if k in known}
    weights["item_embedding.weight"] = weights["item_embedding.weight"][:-1]
    sasrec.load_state_dict(weights)
    expected = sasrec.calculate_loss(batch)
    torch.testing.assert_close(loss.rec, expected)
    loss.rec.backward()
    expected.backward()
    for name, parameter in sasrec.named_parameters():
        gradient = model.get_parameter(name).grad[: len(parameter)]
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_target_at_every_position(small: Any) -> None:
    """Invariant 11: the mean over real positions, by a loop over rows and positions."""
    model = small(train_sampling="user_all", **dict.fromkeys(TERMS, 0.0))
    states = model.encode(SEQ, LAYOUT)
    padded, terms = LAYOUT.unpack(states), []
    for row, n in enumerate(LEN.tolist()):
        targets = [*SEQ[row, 1:n].tolist(), POS[row].item()]
        for i, target in enumerate(targets):
            logits = model.item_embedding.weight[:N_ITEMS] @ padded[row, i]
            terms.append(F.cross_entropy(logits, torch.tensor(target)))
    torch.testing.assert_close(losses(model).rec, torch.stack(terms).mean())


PADDED = {"train_sampling": "user_all", "align": "left", "pad_in_loss": True}


def left_padded_states(model: Any, left: Tensor) -> Tensor:
    """RecBole's layers over left-padded rows with the released mask, [B, L, H]."""
    hidden = model.LayerNorm(model.item_embedding(left) + model.position_embedding.weight)
    seen = (left != 0).unsqueeze(1) & torch.ones(left.shape[1], left.shape[1]).tril().bool()
    mask = torch.where(seen, 0.0, -1e4).unsqueeze(1)
    for layer in model.trm_encoder.layer:
        hidden = layer(hidden, mask)
    return hidden


@pytest.mark.parametrize("width", [4, MAX_LENGTH])
@pytest.mark.parametrize("cl_weight", [0.0, 1.0])
def test_padding_in_the_loss_is_that_of_left_padded_rows(
    small: Any, width: int, cl_weight: float
) -> None:
    """Invariant 11: a mean over B L cells, of which padding is to predict what comes next."""
    model = small(**PADDED, **(dict.fromkeys(TERMS, 0.0) | {"cl_weight": cl_weight}))
    left = torch.zeros(4, MAX_LENGTH, dtype=torch.long)
    target = torch.zeros(4, MAX_LENGTH, dtype=torch.long)
    for row, n in enumerate(LEN.tolist()):
        left[row, MAX_LENGTH - n :] = SEQ[row, :n]
        target[row, MAX_LENGTH - n - 1 :] = torch.tensor([*SEQ[row, :n].tolist(), POS[row].item()])
    logits = left_padded_states(model, left) @ model.item_table.t()
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    loss = losses(model, seq=SEQ[:, :width])
    torch.testing.assert_close(loss.rec, expected)
    loss.rec.backward()
    ours = model.item_embedding.weight.grad.clone()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(ours, model.item_embedding.weight.grad, atol=1e-6, rtol=1e-4)


def test_padding_in_the_loss_leaves_the_other_terms_alone(small: Any) -> None:
    """They are about real tokens; also for a row without padding."""
    full = torch.tensor([[1, 2, 3, 4, 5, 6], [5, 6, 0, 0, 0, 0]])
    for seq, length in ((SEQ, LEN), (full, torch.tensor([6, 2]))):
        loss = losses(small(**PADDED), seq=seq, length=length)
        plain = losses(small(**PADDED | {"pad_in_loss": False}), seq=seq, length=length)
        torch.testing.assert_close(loss[1:], plain[1:])
        assert not torch.isclose(loss.rec, plain.rec)


@pytest.mark.parametrize("batch_size", [4, 512])
def test_padding_weighs_as_much_in_every_batch(build: Any, batch_size: int) -> None:
    """The sum is over the L cells of each row of a full batch, or of all rows if fewer."""
    _, train, _, _, model = build("ECLSR", **PADDED, train_batch_size=batch_size)
    n_rows = len(train.dataset)
    assert 4 < n_rows < 512
    assert model.targets_per_batch == min(batch_size, n_rows) * 4


@pytest.mark.parametrize(
    ("off", "gone"),
    [
        ("cl_weight", ("contrastive_loss",)),
        ("disc_weight", ("guesses", "discriminate")),
        ("gen_weight", ("generator_loss",)),
    ],
)
def test_a_weight_of_zero_costs_nothing(
    small: Any, monkeypatch: pytest.MonkeyPatch, off: str, gone: Any
) -> None:
    model = small(**{off: 0.0})
    generated = watch(monkeypatch, model, "generate")
    for name in gone:
        setattr(model, name, None)
    loss = losses(model)
    zero = {"cl_weight": "contrastive", "disc_weight": "discriminator", "gen_weight": "generator"}
    assert [term for term, value in loss._asdict().items() if value == 0] == [zero[off]]
    assert generated[0][1].requires_grad == (off != "gen_weight")


# ---------------------------------------------------------------- scores and positions


def test_states_are_causal(small: Any) -> None:
    """Invariant 12."""
    model = small().eval()
    changed = SEQ.clone()
    changed[0, 2] = 12
    base, after = model.encode(SEQ, LAYOUT), model.encode(changed, LAYOUT)
    torch.testing.assert_close(after[:2], base[:2])
    assert not torch.allclose(after[2:4], base[2:4])


def test_positions_from_the_newest_item_are_those_of_left_padding(small: Any) -> None:
    """Invariant 13: against a left-padded run of the same blocks with an explicit mask."""
    model = small(align="left").eval()
    states = LAYOUT.unpack(model.encode(SEQ, LAYOUT))
    for row, n in enumerate(LEN.tolist()):
        left = torch.zeros(1, MAX_LENGTH, dtype=torch.long)
        left[0, MAX_LENGTH - n :] = SEQ[row, :n]
        vectors = model.item_embedding(left) + model.position_embedding.weight
        hidden = model.LayerNorm(vectors)
        see = torch.ones(MAX_LENGTH, MAX_LENGTH).tril().bool() & (left != 0)
        mask = torch.where(see, 0.0, -1e4).unsqueeze(0)
        for layer in model.trm_encoder.layer:
            hidden = layer(hidden, mask)
        torch.testing.assert_close(
            states[row, :n], hidden[0, MAX_LENGTH - n :], atol=1e-5, rtol=1e-5
        )
    right = small(align="right")
    assert torch.equal(right.position(LAYOUT), LAYOUT.position)
    for length in (4, MAX_LENGTH):  # however far the batch is padded
        position = model.position(TokenLayout(LEN, length))
        assert position.tolist() == [2, 3, 4, 5, 4, 5, 5, 3, 4, 5]


def test_scores_need_the_encoder_only(small: Any) -> None:
    """Invariant 15."""
    model = small().eval()
    before = model.full_sort_predict(rows())
    assert before.shape == (4, N_ITEMS)
    for parameter in (*model.generator.parameters(), *model.detector.parameters()):
        parameter.data.normal_()
    model.item_embedding.weight.data[MASK] = 99.0
    model.cl_weight = model.disc_weight = model.gen_weight = 0.0
    assert torch.equal(model.full_sort_predict(rows()), before)


# ---------------------------------------------------------------- stages


def test_one_stage_unless_told(small: Any) -> None:
    assert [phase.name for phase in small().training_plan()] == [ALL_TERMS]


def test_two_stages(build: Any, tmp_path: Any) -> None:
    """Invariant 16: then only the first two terms, from the best epoch on; the score only grows."""
    config, train, valid, _, model = build("ECLSR", stages=2, epochs=3, **dict.fromkeys(TERMS, 0.1))
    trainer = PlanTrainer(config, model, tmp_path / "run")
    best: list[Any] = []
    listener = OnValidation(lambda progress: best.append(progress.best_score))
    log = trainer.fit(train, valid, listeners=[listener]).log
    assert [entry["phase"] for entry in log] == [ALL_TERMS] * 3 + [WITHOUT_DISCRIMINATOR] * 3
    for entry in log[:3]:
        assert all(value > 0 for value in entry["loss"].values())
        assert set(entry["monitor"]) == {"guessed", "noticed"}
    for entry in log[3:]:
        assert entry["loss"]["discriminator"] == entry["loss"]["generator"] == 0
        assert entry["loss"]["rec"] > 0
        assert entry["loss"]["contrastive"] > 0
        assert entry["monitor"] == {}
    assert best == sorted(best)


def test_generator_and_discriminator_rest_in_the_second_stage(build: Any, tmp_path: Any) -> None:
    """Invariant 16: bit by bit, although the optimiser goes on with its moments."""
    changes = {"share_discriminator": False, "condition": "concatenate"}
    config, train, _, _, model = build("ECLSR", stages=2, epochs=1, **changes)
    trainer = PlanTrainer(config, model, tmp_path / "run")
    begun, begin = {}, model.begin_epoch

    def mark(phase: str, epoch: int) -> None:
        begun[phase] = {k: v.clone() for k, v in model.state_dict().items()}
        begin(phase, epoch)

    model.begin_epoch = mark
    trainer.fit(train)

    def moved(before: Any, after: Any) -> set[str]:
        return {name.split(".")[0] for name, v in after.items() if not torch.equal(v, before[name])}

    resting = {"generator", "discriminator", "detector", "combine"}
    first, second = begun[ALL_TERMS], begun[WITHOUT_DISCRIMINATOR]
    assert moved(first, second) == ENCODER | resting
    assert moved(second, model.state_dict()) == ENCODER
    for name in resting:
        assert all(p.grad is None for p in getattr(model, name).parameters())


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masking": "prob"}, "masking='prob' is not one of probability, count"),
        ({"condition": "addall"}, "condition='addall' is not one of sequence, position"),
        ({"align": "centre"}, "align='centre' is not one of right, left"),
        ({"disc_weight": -1.0}, "disc_weight=-1.0 must be at least 0"),
        ({"last_k": 0}, "last_k=0 must be at least 1"),
        ({"mask_ratio": 1.5}, r"mask_ratio=1.5 must lie in \[0, 1\]"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"stages": 3}, "stages=3 must be 1 or 2"),
        (PADDED | {"align": "right"}, "pad_in_loss=True, .* needs .*align=left.*; got align=right"),
        (PADDED | {"train_sampling": "prefix_last"}, "pad_in_loss.* got train_sampling=prefix_l"),
        (PADDED | {"sr_loss": "BCE"}, "pad_in_loss=True.* got sr_loss=BCE"),
        (PADDED | {"mask_pad_in_softmax": True}, "pad_in_loss=True.* got mask_pad_in_softmax=True"),
    ],
)
def test_impossible_settings_are_refused(
    make_config: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config("ECLSR", **changes)


SCRIPTS = {  # masking, rho, k, dropout of attention and elsewhere
    "ml-1m": ("count", 0.2, 20, 0.2, 0.2),
    "amazon-sports-outdoors": ("count", 0.2, 10, 0.5, 0.5),
    "amazon-toys-games": ("probability", 0.2, 10, 0.5, 0.5),
    "yelp": ("probability", 0.6, 5, 0.1, 0.2),
}
TOYS_WEIGHTS = (0.1, 0.01, 0.02)  # the published ones of the others belong to other rows


@pytest.mark.parametrize("dataset", SCRIPTS)
def test_settings_of_the_released_scripts(dataset: str) -> None:
    config = Config("ECLSR", dataset)
    keys = ("masking", "mask_ratio", "last_k", "attn_dropout_prob", "hidden_dropout_prob")
    assert tuple(config[key] for key in keys) == SCRIPTS[dataset]
    assert tuple(config[key] for key in TERMS) == TOYS_WEIGHTS
    assert (config["tau"], config["train_sampling"], config["stages"]) == (0.05, "prefix_last", 1)


@pytest.mark.parametrize(
    ("preset", "older", "masking", "last_k", "weights"),
    [
        ("official_sports", 0, ("count", 0.2), 10, (2.0, 0.05, 0.5)),
        ("official_yelp", 0, ("probability", 0.6), 5, (0.3, 0.1, 0.2)),
        ("official_ml1m", 11, ("count", 0.2), 20, (0.001, 0.05, 0.2)),
    ],
)
def test_the_other_released_scripts(
    preset: str, older: int, masking: tuple[str, float], last_k: int, weights: tuple[float, ...]
) -> None:
    config = Config("ECLSR", "toy", overrides={"preset": preset})
    official = Config("ECLSR", "toy", overrides={"preset": "official"})
    for key in ("align", "condition", "valid_metric"):
        assert config[key] == official[key]
    assert (config["train_sampling"], config["pad_in_loss"]) == ("user_all", True)
    assert (config["masking"], config["mask_ratio"]) == masking
    assert (config["older_windows"], config["last_k"]) == (older, last_k)
    assert tuple(config[key] for key in TERMS) == weights


def test_the_released_behaviour() -> None:
    plain, official = (
        Config("ECLSR", "toy", overrides={"preset": preset}) for preset in ("paper", "official")
    )
    differing = {k: v for k, v in official.final_config_dict.items() if plain[k] != v}
    documented = {"align": "left", "condition": "position", "valid_metric": "Hit@10"}
    assert differing == {"preset": "official", **documented}


@pytest.mark.parametrize("dataset", SCRIPTS)
def test_the_released_behaviour_is_that_of_one_script_on_every_data_set(dataset: str) -> None:
    config = Config("ECLSR", dataset, overrides={"preset": "official"})
    assert (config["masking"], config["mask_ratio"], config["last_k"]) == ("probability", 0.2, 10)
