"""The encoder every model stands on, against RecBole's SASRec."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules import encoder
from recbole_simdiff.modules.batch import PSEUDO_LENGTH
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.negatives import unseen_items
from recbole_simdiff.modules.transformer import TokenLayout
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import write_inter

N_ITEMS = 13  # ids 1..12, 0 is padding
SEQ = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0], [8, 2, 9, 0]])
LEN = torch.tensor([4, 2, 1, 3])
POS = torch.tensor([10, 3, 4, 6])
ROWS = Interaction({"item_id_list": SEQ, "item_length": LEN, "item_id": POS})
DATA = SimpleNamespace(num=lambda field: N_ITEMS)


@pytest.fixture
def config(make_config: Any) -> Any:
    return make_config(hidden_dropout_prob=0.0, attn_dropout_prob=0.0)


@pytest.fixture
def model(config: Any) -> EncoderRecommender:
    """With item vectors large enough that scores differ visibly."""
    torch.manual_seed(0)
    model = EncoderRecommender(config, DATA)
    model.item_embedding.weight.data.normal_()
    return model


def hidden_states(model: EncoderRecommender, seq: torch.Tensor, length: torch.Tensor):
    layout = TokenLayout(length, seq.shape[1])
    return model.encode(seq, layout), layout


def test_initial_weights_are_recboles(config):
    """Invariant 17: same names in the same order, same values from the same seed."""
    torch.manual_seed(11)
    theirs = SASRec(config, DATA).state_dict()
    torch.manual_seed(11)
    ours = EncoderRecommender(config, DATA).state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_initial_values_are_those_of_the_paper_s_code(model):
    """N(0, 0.02) everywhere, biases 0, norms 1; only the table was redrawn by the fixture."""
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "LayerNorm" in name:
            assert (value == 1).all(), name
        elif name != "item_embedding.weight":
            assert 0.01 < value.std() < 0.03, name


def test_scores_equal_recboles(config, model):
    theirs = SASRec(config, DATA)
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.full_sort_predict(ROWS), theirs.full_sort_predict(ROWS))
    torch.testing.assert_close(model.predict(ROWS), theirs.predict(ROWS))


def test_forward_is_the_state_of_the_newest_item(model):
    hidden, layout = hidden_states(model, SEQ, LEN)
    torch.testing.assert_close(model(SEQ, LEN), hidden[layout.last])
    assert hidden.shape == (10, 8)


def test_older_states_do_not_see_a_newer_item(model):
    """Invariant 19: changing item i leaves H at positions < i alone."""
    seq, length = SEQ[:1], LEN[:1]
    before, _ = hidden_states(model, seq, length)
    for i in range(4):
        changed = seq.clone()
        changed[0, i] = 11
        after, _ = hidden_states(model, changed, length)
        moved = (after - before).abs().amax(1) > 1e-5
        assert moved.tolist() == [False] * i + [True] * (4 - i)


def test_order_of_items_matters(model):
    """Positions are added: the same items in another order give another state."""
    assert not torch.allclose(model(SEQ[:1], LEN[:1]), model(SEQ[:1, [1, 0, 2, 3]], LEN[:1]))


def test_padding_changes_no_state(model):
    """Invariant 19: neither more of it nor what its row of the table holds."""
    before = model(SEQ[1:], LEN[1:])
    torch.testing.assert_close(model(SEQ[1:, :3], LEN[1:]), before)
    model.item_embedding.weight.data[0] = 1e3
    torch.testing.assert_close(model(SEQ[1:], LEN[1:]), before)


def test_labels_are_the_next_items_and_the_target_last(model):
    """Invariant 22: one label a real token, the target at len - 1, nothing read beyond len."""
    layout = TokenLayout(LEN, 4)
    label = model.labels(SEQ, layout, POS)
    rows = [label[layout.row == b].tolist() for b in range(4)]
    assert rows == [[2, 3, 4, 10], [6, 3], [4], [2, 9, 6]]


def test_labels_do_not_read_padding(model):
    """Invariant 22: whatever stands beyond len."""
    layout = TokenLayout(LEN, 4)
    dirty = torch.where(layout.keys, SEQ, 12)
    assert torch.equal(model.labels(dirty, layout, POS), model.labels(SEQ, layout, POS))


def test_labels_leave_the_batch_alone(model):
    layout = TokenLayout(LEN, 4)
    before = SEQ.clone()
    model.labels(SEQ, layout, POS)
    assert torch.equal(before, SEQ)
    full = torch.tensor([[1, 2], [3, 4]])  # without padding the packed tokens share its memory
    model.labels(full, TokenLayout(torch.tensor([2, 2]), 2), torch.tensor([9, 9]))
    assert full.tolist() == [[1, 2], [3, 4]]


def test_full_ranking_scores_all_items_by_dot_product(model):
    """Invariant 24: one 2-D tensor [B, n_items], without an output bias."""
    scores = model.full_sort_predict(ROWS)
    assert scores.shape == (4, N_ITEMS)
    table = model.item_embedding.weight
    torch.testing.assert_close(scores[2, 5], model(SEQ, LEN)[2] @ table[5])


def test_predict_is_the_targets_column(model):
    """Invariant 24."""
    scores = model.full_sort_predict(ROWS)
    torch.testing.assert_close(model.predict(ROWS), scores.gather(1, POS.unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"n_heads": 0}, "n_heads=0 must be at least 1"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"inner_size": 0}, "inner_size=0 must be at least 1"),
        ({"hidden_size": 10, "n_heads": 4}, "hidden_size=10 must be a multiple of n_heads=4"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob=1.0 must lie in \[0, 1\)"),
        ({"attn_dropout_prob": -0.1}, r"attn_dropout_prob=-0.1 must lie in \[0, 1"),
        ({"loss_memory_mb": 0.0}, "loss_memory_mb=0.0 must be positive"),
    ],
)
def test_impossible_sizes_are_refused(make_config, values, message):
    with pytest.raises(UserError, match=message):
        make_config(**values)


# ---------------------------------------------------------------- rows with invented items

PSEUDO = torch.tensor([2, 1, 0, 0])  # of the rows of SEQ; the third and fourth have none


def batch_with(pseudo: torch.Tensor) -> Interaction:
    return Interaction({**ROWS.interaction, PSEUDO_LENGTH: pseudo})


@pytest.mark.parametrize("mask_pad", [True, False])
def test_invented_items_are_no_targets(make_config, mask_pad):
    """The state before the first real item predicts it in no loss: it was not preceded by them."""
    config = make_config(mask_pad_in_softmax=mask_pad)
    torch.manual_seed(0)
    model = EncoderRecommender(config, DATA).eval()
    model.item_embedding.weight.data.normal_()
    hidden, layout = hidden_states(model, SEQ, LEN)
    scores = hidden @ model.item_embedding.weight.t()
    if mask_pad:
        scores[:, 0] = -torch.inf
    log_p = scores.log_softmax(1)
    terms, token = [], 0
    for row, length in enumerate(LEN.tolist()):
        successors = [*SEQ[row, 1:length].tolist(), int(POS[row])]
        for place, item in enumerate(successors):
            if place >= PSEUDO[row]:
                terms.append(-log_p[token, item])
            token += 1
    assert len(terms) == 10 - 3
    loss = model.recommendation_loss(hidden, layout, batch_with(PSEUDO))
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    none = model.recommendation_loss(hidden, layout, batch_with(torch.zeros_like(PSEUDO)))
    torch.testing.assert_close(none, model.recommendation_loss(hidden, layout, ROWS))
    assert not torch.isclose(none, loss)


def test_the_loss_is_a_sum_over_the_expected_number_of_targets(model):
    hidden, layout = hidden_states(model, SEQ, LEN)
    mean = model.recommendation_loss(hidden, layout, batch_with(PSEUDO))
    model.targets_per_batch = 14.0
    half = model.recommendation_loss(hidden, layout, batch_with(PSEUDO))
    torch.testing.assert_close(half, mean / 2)  # seven targets


def test_no_negative_is_drawn_for_an_invented_target(make_config, monkeypatch):
    config = make_config(sr_loss="BCE")
    torch.manual_seed(0)
    model = EncoderRecommender(config, SimpleNamespace(num=lambda field: 40)).eval()
    hidden, layout = hidden_states(model, SEQ, LEN)
    rows = []

    def record(item_seq, pos_items, row, n_items):
        rows.append(row.tolist())
        return unseen_items(item_seq, pos_items, row, n_items)

    monkeypatch.setattr(encoder, "unseen_items", record)
    assert torch.isfinite(model.recommendation_loss(hidden, layout, batch_with(PSEUDO)))
    assert rows == [[0, 0, 1, 2, 3, 3, 3]]


def test_with_one_target_a_row_every_row_counts(make_config):
    """prefix_last: the target is always real, however much of the row is not."""
    model = EncoderRecommender(make_config(train_sampling="prefix_last"), DATA).eval()
    layout = TokenLayout(LEN, 4)
    hidden = model.encode(SEQ, layout, last_only=True)
    with_some = model.recommendation_loss(hidden, layout, batch_with(PSEUDO))
    assert torch.equal(with_some, model.recommendation_loss(hidden, layout, ROWS))


# ---------------------------------------------------------------- sampled losses, repeat bias


@pytest.mark.parametrize("per", ["batch", "token"])
@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
def test_many_sampled_negatives_give_the_loss_of_the_full_softmax(
    build: Any, per: str, distribution: str
) -> None:
    values = {"sr_loss": "sampled_softmax", "n_negatives": 20_000, "negatives_per": per}
    values |= {"negative_distribution": distribution}
    losses = []
    for changes in (values, {"mask_pad_in_softmax": True}):
        _, train, _, _, model = build("SASRecCE", **changes)
        model.eval()
        losses.append(model.calculate_loss(next(iter(train))).rec.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("style", ["user_all", "prefix_last"])
def test_the_repeat_bias_is_added_to_items_of_the_history(build: Any, style: str) -> None:
    """Loss and scores equal those of logits written out, position by position."""
    _, train, _, test, model = build("SASRecCE", repeat_bias="learned", train_sampling=style)
    model.eval()
    model.repeat_bias.data.fill_(-0.07)
    batch, bias = next(iter(train)), -0.7
    items, lengths = batch["item_id_list"], batch["item_length"].tolist()
    total, n = 0.0, 0
    for row, length in enumerate(lengths):
        history = items[row, :length]
        labels = [*history[1:].tolist(), int(batch["item_id"][row])]
        for place in range(length) if style == "user_all" else [length - 1]:
            prefix = history[: place + 1]
            state = model.forward(prefix.unsqueeze(0), torch.tensor([place + 1]))
            logits = (state @ model.item_embedding.weight.t()).squeeze(0)
            logits[prefix.unique()] += bias
            total -= logits.log_softmax(0)[labels[place]].item()
            n += 1
    loss = model.calculate_loss(batch).rec * (model.targets_per_batch or n)
    assert loss.item() == pytest.approx(total, rel=1e-4)
    asked = next(iter(test))[0]
    with_bias, rows = model.full_sort_predict(asked), asked["item_id_list"]
    column = with_bias.gather(1, asked["item_id"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(model.predict(asked), column)
    model.repeat_bias.data.zero_()
    change = with_bias - model.full_sort_predict(asked)
    expected = torch.zeros_like(change).scatter(1, rows, bias)
    torch.testing.assert_close(change[:, 1:], expected[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("repeats", "falls"), [(False, True), (True, False)])
def test_the_repeat_bias_learns_whether_items_repeat(
    build: Any, data_path: Path, tmp_path: Path, repeats: bool, falls: bool
) -> None:
    """Walks through 40 items: new ones only, or between two items again and again."""
    steps = [0, 1] * 5 if repeats else range(10)
    histories = {f"u{n}": [f"i{(3 * n + k) % 40}" for k in steps] for n in range(60)}
    write_inter(data_path, "walks", histories)
    values = {"repeat_bias": "learned", "epochs": 20, "learning_rate": 0.01, "topk": [5]}
    config, train, _, _, model = build("SASRecCE", "walks", valid_metric="NDCG@5", **values)
    PlanTrainer(config, model, tmp_path / "run").fit(train)
    assert (model.repeat_bias.item() < -0.2) == falls
    assert (model.repeat_bias.item() > 0.05) != falls


def test_the_repeat_bias_needs_the_full_softmax(make_config: Any) -> None:
    with pytest.raises(UserError, match="repeat_bias=learned needs sr_loss=CE, is BCE"):
        make_config("SASRecCE", repeat_bias="learned", sr_loss="BCE")
