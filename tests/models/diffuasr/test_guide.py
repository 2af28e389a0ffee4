"""Embeddings put into a trained recommender: scores as by id, right gradients, no trace left."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.diffuasr.guide import Guide

N_ITEMS = 13
IDS = torch.tensor([[3, 1, 12, 7], [5, 5, 2, 9], [11, 4, 8, 6]])
NEXT = torch.tensor([4, 9, 1])
SMALL = {
    "MAX_ITEM_LIST_LENGTH": 6,
    "hidden_size": 16,
    "embedding_size": 16,
    "inner_size": 32,
    "k_noise": 3,
}
USABLE = ("SASRec", "GRU4Rec", "BERT4Rec", "S3Rec", "SimDiffRec")


def recommender(name: str, **overrides: Any) -> Any:
    """A recommender of 12 items without data, with scores that differ."""
    known = Config(name, "toy").final_config_dict
    config = Config(name, "toy", overrides={k: v for k, v in SMALL.items() if k in known})
    for key, value in overrides.items():
        config[key] = value
    torch.manual_seed(0)
    data = SimpleNamespace(
        num=lambda field: N_ITEMS, item_num=N_ITEMS, user_num=9, get_item_feature=lambda: None
    )
    model = config.model_class(config, data)
    with torch.no_grad():
        model.item_embedding.weight.normal_()
        model.item_embedding.weight[0] = 0
    return model


def by_id(name: str, model: Any, ids: Tensor) -> Tensor:
    """Scores of all items, from the ids, without anything of ``Guide``."""
    length = torch.full((len(ids),), ids.shape[1])
    if name == "BERT4Rec":
        mask = torch.full((len(ids), 1), model.mask_token)
        state = model(torch.cat([ids, mask], 1))[:, -1]
        return state @ model.item_embedding.weight[:N_ITEMS].t() + model.output_bias
    if name == "S3Rec":
        return model(ids, bidirectional=False)[:, -1] @ model.item_embedding.weight[:N_ITEMS].t()
    rows = {"item_id_list": ids, "item_length": length}
    return model.full_sort_predict(Interaction(rows))


@pytest.fixture(params=USABLE)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_table_holds_the_items_and_nothing_else(name):
    """T16: no mask row; a copy, so that scaling it leaves the recommender alone."""
    model = recommender(name)
    table = Guide(model, "cpu").table()
    assert table.shape == (N_ITEMS, 16)
    assert torch.equal(table, model.item_embedding.weight[:N_ITEMS])
    assert not table.requires_grad
    table += 1
    assert not torch.equal(table, model.item_embedding.weight[:N_ITEMS])


def test_embeddings_score_as_their_ids(name):
    """T15: softmax over the items without padding, and each item by itself."""
    model = recommender(name)
    guide = Guide(model, "cpu")
    guide.check(4)
    score = by_id(name, model, IDS)
    x = guide.table()[IDS]
    row = torch.arange(3)
    expected = {
        "softmax": score[:, 1:].log_softmax(1)[row, NEXT - 1],
        "bce": F.logsigmoid(score[row, NEXT]),
    }
    for kind, log_p in expected.items():
        torch.testing.assert_close(guide.log_prob(x, NEXT, kind), log_p)
    assert not torch.allclose(guide.log_prob(x.flip(1), NEXT, "softmax"), expected["softmax"])


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_several_labels_are_averaged_over_the_real_ones(kind):
    guide = Guide(recommender("SASRec"), "cpu")
    x = guide.table()[IDS]
    label = torch.tensor([[4, 2, 0], [9, 0, 0], [1, 12, 7]])
    one = torch.stack([guide.log_prob(x, column.clamp(min=1), kind) for column in label.t()], 1)
    expected = [one[0, :2].mean(), one[1, 0], one[2].mean()]
    torch.testing.assert_close(guide.log_prob(x, label, kind), torch.stack(expected))


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_gradients_match_finite_differences(name, kind):
    """T12: central differences in float64, through the whole recommender."""
    guide = Guide(recommender(name).double(), "cpu")
    x = guide.table()[IDS[:2, :2]].requires_grad_()

    def log_prob(x: Tensor) -> Tensor:
        return guide.log_prob(x, NEXT[:2], kind)

    assert torch.autograd.gradcheck(log_prob, (x,), rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(log_prob(x).sum(), x)
    assert (gradient.abs().amax((1, 2)) > 0).all()


def test_the_recommender_is_left_alone(name):
    """T14: eval mode, weights and gradients untouched, no hook left, the same value twice."""
    model = recommender(name).train()
    before = copy.deepcopy(model.state_dict())
    guide = Guide(model, "cpu")
    x = guide.table()[IDS].requires_grad_()
    first = guide.log_prob(x, NEXT, "softmax")
    first.sum().backward()
    assert torch.equal(guide.log_prob(x, NEXT, "softmax"), first)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert not model.item_embedding._forward_hooks


def test_the_hook_goes_when_the_recommender_fails(monkeypatch):
    model = recommender("SASRec")
    guide = Guide(model, "cpu")
    monkeypatch.setattr(model, "full_sort_predict", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guide.log_prob(torch.zeros(1, 2, 16), NEXT[:1], "bce")
    assert not model.item_embedding._forward_hooks


def test_a_copy_of_the_weights_shares_the_guide():
    guide = Guide(recommender("SASRec"), "cpu")
    assert copy.deepcopy(guide) is guide


def test_one_pseudo_item(name):
    """T34: M = 1, a batch of one."""
    model = recommender(name)
    guide = Guide(model, "cpu")
    guide.check(1)
    x = guide.table()[IDS[:, :1]]
    many = guide.log_prob(x, NEXT, "softmax")
    expected = by_id(name, model, IDS[:, :1])[:, 1:].log_softmax(1)
    torch.testing.assert_close(many, expected[torch.arange(3), NEXT - 1])
    torch.testing.assert_close(guide.log_prob(x[:1], NEXT[:1], "softmax"), many[:1])


# ---------------------------------------------------------------- what cannot guide


def test_models_without_an_item_table_are_refused():
    model = recommender("SASRec")
    del model.item_embedding
    with pytest.raises(UserError, match=r"backbone=SASRec has no item_embedding.*SASRec"):
        Guide(model, "cpu")


def test_tables_that_are_too_short_are_refused():
    model = recommender("SASRec")
    model.n_items = N_ITEMS + 1
    with pytest.raises(UserError, match="no item_embedding with a row per item"):
        Guide(model, "cpu")


def test_models_that_need_more_than_items_are_refused():
    with pytest.raises(UserError, match=r"backbone=HGN cannot score 3 items given alone \('user"):
        Guide(recommender("HGN"), "cpu").check(3)


@pytest.mark.parametrize("change", ["ids", "padding", "no gradient"])
def test_scores_that_do_not_follow_from_the_embeddings_are_refused(monkeypatch, change):
    """By way of the ids, of the padded length, or of a generator without gradient."""
    model = recommender("SASRec")
    score = model.full_sort_predict

    def full_sort_predict(rows: Interaction) -> Tensor:
        items = rows["item_id_list"]
        if change == "ids":
            return score(rows) + items[:, :1]
        if change == "padding":
            return score(rows) * items.shape[1]
        return score(rows).detach()

    guide = Guide(model, "cpu")
    guide.check(3)
    monkeypatch.setattr(model, "full_sort_predict", full_sort_predict)
    with pytest.raises(UserError, match="the scores of backbone=SASRec do not follow from"):
        guide.check(3)
