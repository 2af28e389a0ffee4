"""MCLRec against the numbers of its formulas, and its two steps parameter by parameter."""

import math
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import REMOVED
from recbole_simdiff.models.mclrec import MCLRec, regularizer_of
from recbole_simdiff.models.simdiffrec import SimDiffRec
from recbole_simdiff.modules.losses import nt_xent
from recbole_simdiff.training.trainer import PlanTrainer

MAX_LENGTH = 6
SEQ = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [8, 2, 9, 0, 0, 0]])
LEN = torch.tensor([4, 2, 1, 3])
POS = torch.tensor([10, 3, 4, 6])
EYE = torch.eye(2)
ONE, TWO = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}


def rows() -> Interaction:
    return Interaction({"item_id_list": SEQ, "item_length": LEN, "item_id": POS})


@pytest.fixture
def small(make_config: Any) -> Any:
    """small(key=value, ...) -> a model without data, in training mode, dropout off."""

    def make(**overrides: Any) -> Any:
        values = NO_DROPOUT | {"MAX_ITEM_LIST_LENGTH": MAX_LENGTH, "cl_weight": 0.3}
        config = make_config("MCLRec", **(values | {"meta_weight": 0.5} | overrides))
        torch.manual_seed(0)
        return MCLRec(config, SimpleNamespace(num=lambda field: 13))

    return make


def trained(build: Any, tmp_path: Any, name: str = "run", **overrides: Any) -> Any:
    """(trainer, training loader, validation loader) on toy."""
    weights = {"cl_weight": 0.3, "meta_weight": 0.5}
    config, train, valid, _, model = build("MCLRec", **(weights | overrides))
    return PlanTrainer(config, model, tmp_path / name), train, valid


def moments(optimizer: Any) -> set[int]:
    """How many steps each parameter has taken."""
    return {int(slots["step"]) for slots in optimizer.state_dict()["state"].values()}


def grads(loss: Any, parameters: Any) -> list[Tensor]:
    gradients = torch.autograd.grad(sum(loss), parameters, allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
    ]


def theta_names(model: Any) -> list[str]:
    return [n for n, _ in model.named_parameters() if not n.startswith("extractors.")]


# ---------------------------------------------------------------- formulas


def test_contrast_of_known_views() -> None:
    """Invariant 1: the mean of both directions, dot products, temperature 1."""
    assert nt_xent(EYE, EYE, 1.0, "dot").item() == pytest.approx(0.551445, abs=1e-6)
    assert nt_xent(ONE, TWO, 1.0, "dot").item() == pytest.approx(1.5313, abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "by_row", "value"),
    [
        (EYE, EYE, True, 2.0),
        (EYE, EYE, False, 2.0),
        (ONE, TWO, True, 0.75),
        (ONE, TWO, False, 1.75),
    ],
)
def test_regularizer_of_known_views(
    first: Tensor, second: Tensor, by_row: bool, value: float
) -> None:
    """Invariant 2."""
    assert regularizer_of(first, second, by_row).item() == pytest.approx(value)


def literal_regularizer(first: Tensor, second: Tensor, by_row: bool) -> float:
    """By loops over pairs."""
    size = len(first)
    views = torch.cat([first, second]).tolist()
    dot = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in views] for u in views]
    right = [dot[i][(i + size) % (2 * size)] for i in range(2 * size)]
    wrong = [
        [dot[i][j] for j in range(2 * size) if j not in (i, (i + size) % (2 * size))]
        for i in range(2 * size)
    ]
    down, up = [], []
    for i in range(2 * size):
        ends = (
            (right[i], max(wrong[i]))
            if by_row
            else (min(right), max(v for row in wrong for v in row))
        )
        down.append(max(right[i] - min(ends), 0))
        up += [max(max(ends) - value, 0) for value in wrong[i]]
    return sum(down) / len(down) + sum(up) / len(up)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_regularizer_is_its_definition(by_row: bool, size: int) -> None:
    """Invariant 3: and never negative."""
    torch.manual_seed(size)
    first, second = torch.randn(2, size, 5)
    value = regularizer_of(first, second, by_row).item()
    assert value >= 0
    assert value == pytest.approx(literal_regularizer(first, second, by_row), rel=1e-5)


@pytest.mark.parametrize("by_row", [True, False])
def test_regularizer_vanishes_where_all_are_alike(by_row: bool) -> None:
    """Invariant 3; and for one sequence, which has no wrong pair."""
    same = torch.ones(3, 4)
    assert regularizer_of(same, same, by_row).item() == 0
    assert regularizer_of(ONE[:1], TWO[:1], by_row).item() == 0


@pytest.mark.parametrize("by_row", [True, False])
def test_gradients_of_the_regularizer(by_row: bool) -> None:
    """They pass through minima and maxima."""
    torch.manual_seed(0)
    views = torch.randn(2, 3, 4, dtype=torch.float32, requires_grad=True)
    regularizer_of(views[0], views[1], by_row).backward()
    step = 1e-2 * torch.randn(2, 3, 4)
    with torch.no_grad():
        there = regularizer_of(*(views + step), by_row)
        back = regularizer_of(*(views - step), by_row)
    assert (views.grad * step).sum().item() == pytest.approx((there - back).item() / 2, rel=0.02)


def test_the_extractors(small: Any) -> None:
    """Invariant 4: d, d/2, d/4, d; two of them; rows of length 1, of zeros too."""
    model = small()
    shapes = [tuple(p.shape) for p in model.extractors[0].parameters()]
    assert shapes == [(4, 8), (4,), (2, 4), (2,), (8, 2), (8,)]
    h1, h2 = torch.randn(2, 5, 8)
    z1, z2 = model.extract(h1, h2)
    for z in (z1, z2):
        torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    assert not torch.allclose(z1, model.extract(h2, h1)[1])
    first = model.extractors[0]
    inner = F.gelu(F.linear(h1, first[0].weight, first[0].bias))
    inner = F.gelu(F.linear(inner, first[2].weight, first[2].bias))
    out = F.linear(inner, first[4].weight, first[4].bias)
    torch.testing.assert_close(z1, out / out.norm(dim=1, keepdim=True))
    for parameter in model.extractors.parameters():
        parameter.data.zero_()
    assert torch.equal(model.extract(h1, h2)[0], torch.zeros(5, 8))


def test_initial_weights_of_the_extractors_are_torchs_own(small: Any) -> None:
    """Uniform within 1 / sqrt(inputs), biases too; not N(0, 0.02) with biases 0."""
    layer = small(hidden_size=64).extractors[0][0]
    assert layer.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    assert layer.bias.abs().min() > 0


@pytest.mark.parametrize("size", [2, 16, 256])
def test_bound_of_the_contrast_of_learned_views(small: Any, size: int) -> None:
    """Invariant 10: rows of length 1 keep it above log(1 + (2B - 2) / e^2)."""
    model = small()
    z1, z2 = model.extract(*torch.randn(2, size, 8))
    bound = math.log(1 + (2 * size - 2) * math.exp(-2))
    assert nt_xent(z1, z2, 1.0, "dot").item() > bound
    if size == 256:
        assert bound == pytest.approx(4.2488, abs=1e-4)


@pytest.mark.parametrize("kind", ["batch", "row"])
def test_the_total_loss(small: Any, kind: str) -> None:
    """All terms from their parts; tau and similarity belong to the random views only."""
    model = small(regularizer=kind, tau=0.5, cl_similarity="cosine", regularizer_weight=0.2)
    losses = model.calculate_loss(rows())
    h1, h2 = model.encode_views(model.views)
    z1, z2 = model.extract(h1, h2)
    pairs = [(h1, z2), (h2, z1), (z1, z2)]
    learned = sum(nt_xent(a, b, 1.0, "dot") for a, b in pairs)
    by_row = kind == "row"
    r = sum(regularizer_of(a, b, by_row) for a, b in (pairs if by_row else pairs[2:]))
    expected = (0.3 * nt_xent(h1, h2, 0.5, "cosine"), 0.5 * learned, 0.5 * 0.2 * r)
    torch.testing.assert_close(losses[1:], expected)
    of_extractors = model.extractor_loss(rows())
    # gamma = 0.1 beta in the paper; no beta in the released code
    torch.testing.assert_close(tuple(of_extractors), (learned, (0.2 if by_row else 0.1) * r))


# ---------------------------------------------------------------- what a step reaches


def test_the_encoder_learns_through_the_extractors(small: Any) -> None:
    """Invariant 7: and no less when the extractors are constants."""
    model = small()
    theta = model.encoder_parameters
    torch.manual_seed(1)
    with_meta = grads(model.calculate_loss(rows()), theta)
    for parameter in model.extractors.parameters():
        parameter.requires_grad_(False)
    frozen = grads(model.encoder_loss(rows()), theta)
    torch.testing.assert_close(frozen, with_meta)
    model.meta_weight = 0.0
    without = grads(model.encoder_loss(rows()), theta)
    different = [not torch.allclose(a, b) for a, b in zip(with_meta, without, strict=True)]
    assert sum(different) > len(different) / 2


def test_both_views_get_gradient_from_each_contrast(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 7: h1 and h2 from L_cl1, and by way of z1 and z2 from L_cl2 and R."""
    model = small()
    seen: dict[str, Any] = {}

    def watch(name: str) -> None:
        stock = getattr(model, name)

        def record(*args: Any) -> Any:
            seen[name] = stock(*args)
            return seen[name]

        monkeypatch.setattr(model, name, record)

    watch("encode_views")
    watch("extract")
    losses = model.calculate_loss(rows())
    states, learned = seen["encode_views"], seen["extract"]
    theta = (model.item_embedding.weight, model.trm_encoder.layer[0].feed_forward.dense_1.weight)

    def pulled(outputs: Any, inputs: Any, grad: Any = None) -> Any:
        gradients = torch.autograd.grad(outputs, inputs, grad, retain_graph=True)
        assert all(g.any() for g in gradients)
        return gradients

    for state, grad in zip(states, pulled(losses.contrastive, states), strict=True):
        pulled(state, theta, grad)
    for term in (losses.learned, losses.regularizer):
        grads_of_z = pulled(term, learned)
        for z, h, grad in zip(learned, states, grads_of_z, strict=True):
            (through,) = pulled(z, (h,), grad)
            pulled(h, theta, through)


def test_no_gradient_is_lost_in_the_second_step(small: Any) -> None:
    """Invariant 6: encoding without gradient gives the extractors the same gradients."""
    model = small(regularizer="row")
    model.calculate_loss(rows())
    phi = list(model.extractors.parameters())
    detached = grads(model.extractor_loss(rows()), phi)
    full = grads(model.learned_loss(*model.encode_views(model.views), 0.1), phi)
    assert all(g.abs().sum() > 0 for g in detached)
    torch.testing.assert_close(detached, full)
    theta = [p for n, p in model.named_parameters() if not n.startswith("extractors.")]
    assert not any(g.any() for g in grads(model.extractor_loss(rows()), theta))


@pytest.mark.parametrize("regularizer", ["batch", "row"])
def test_what_the_second_step_depends_on(small: Any, regularizer: str) -> None:
    """Invariant 8: not on lambda, and on beta only through the paper's weight of R."""

    def gradients_of(**weights: Any) -> list[Tensor]:
        model = small(regularizer=regularizer, **weights)
        torch.manual_seed(1)
        model.calculate_loss(rows())
        return grads(model.extractor_loss(rows()), list(model.extractors.parameters()))

    base = gradients_of(cl_weight=0.1, meta_weight=0.1)
    torch.testing.assert_close(gradients_of(cl_weight=0.9, meta_weight=0.1), base)
    equal = [
        torch.allclose(a, b)
        for a, b in zip(gradients_of(cl_weight=0.1, meta_weight=0.9), base, strict=True)
    ]
    assert all(equal) == (regularizer == "row")


@pytest.mark.parametrize("steps", [1, 2])
def test_who_moves_when(build: Any, tmp_path: Any, steps: int) -> None:
    """Invariant 5: the encoder on the first step, the extractors on the second, bit for bit."""
    trainer, train, _ = trained(build, tmp_path, encoder_steps=steps)
    model = trainer.model
    batch = next(iter(train))
    names = ["encoder", "extractor", "encoder"][: steps + 1]
    updates = trainer._updates()
    assert [update.name for update in updates] == names
    model.train()
    for update in updates:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        trainer._step(batch, (update,))
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        extractors = {k for k in before if k.startswith("extractors.")}
        assert len(extractors) == 12
        if update.name == "extractor":
            assert moved == extractors
        else:
            # A bias of the keys shifts all scores of a query alike: softmax takes it out.
            assert moved >= {n for n in theta_names(model) if "key.bias" not in n}
            assert not moved & extractors
    assert moments(trainer.optimizers["optimizer_encoder"]) == {steps}
    assert moments(trainer.optimizers["optimizer_extractor"]) == {1}


@pytest.mark.parametrize("steps", [1, 2])
def test_all_steps_of_a_batch_see_the_same_views(
    build: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    trainer, train, _ = trained(build, tmp_path, encoder_steps=steps)
    seen, stock = [], MCLRec.encode_views

    def record(self: Any, views: Any) -> Any:
        seen.append((views[0].clone(), torch.is_grad_enabled()))
        return stock(self, views)

    monkeypatch.setattr(MCLRec, "encode_views", record)
    batch = next(iter(train))
    for _ in range(2):
        trainer._step(batch, trainer._updates())
    one, two = seen[: steps + 1], seen[steps + 1 :]
    assert len(two) == steps + 1
    for part in (one, two):
        assert all(torch.equal(items, part[0][0]) for items, _ in part)
        assert [grad for _, grad in part] == [True, False, True][: steps + 1]
    assert not torch.equal(one[0][0], two[0][0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_step_has_its_own_dropout(
    build: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """On the same views, with weights that do not move."""
    changes = NO_DROPOUT | {"hidden_dropout_prob": dropout}
    still = {"learner": "sgd", "learning_rate": 1e-30}
    trainer, train, _ = trained(build, tmp_path, encoder_steps=2, **changes, **still)
    states, stock = [], MCLRec.encode_views

    def record(self: Any, views: Any) -> Any:
        states.append(stock(self, views))
        return states[-1]

    monkeypatch.setattr(MCLRec, "encode_views", record)
    trainer.model.train()
    trainer._step(next(iter(train)), trainer._updates())
    assert len(states) == 3
    for one, two in combinations(states, 2):
        assert [torch.allclose(a, b) for a, b in zip(one, two, strict=True)] == [dropout == 0] * 2


def test_the_second_encoder_step_needs_no_extractors(build: Any, tmp_path: Any) -> None:
    """With meta_weight 0 there is no step of theirs, and the encoder still takes both of its."""
    trainer, train, _ = trained(build, tmp_path, meta_weight=0.0, encoder_steps=2)
    model = trainer.model
    updates = trainer._updates()
    assert [(update.name, update.loss) for update in updates] == [
        ("encoder", model.calculate_loss),
        ("encoder", model.encoder_loss),
    ]
    model.learned_loss = None
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer._step(next(iter(train)), updates)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved >= {n for n in theta_names(model) if "key.bias" not in n}
    assert not [name for name in moved if name.startswith("extractors.")]
    assert list(trainer.optimizers) == ["optimizer_encoder"]
    assert moments(trainer.optimizers["optimizer_encoder"]) == {2}


def test_joint_mode_is_one_optimiser(build: Any, tmp_path: Any) -> None:
    """Invariant 11: and the loss is that of the first step."""
    trainer, train, _ = trained(build, tmp_path, joint=True)
    (update,) = trainer._updates()
    assert update.loss == trainer.model.calculate_loss
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.fit(train)
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved >= {k for k in before if "key.bias" not in k}
    assert list(trainer.optimizers) == ["optimizer"]


def test_without_contrast_it_is_the_encoder(build: Any, tmp_path: Any) -> None:
    """Invariant 9: the same parameters after several batches, and no view is drawn."""
    changes = NO_DROPOUT | {"train_sampling": "prefix_last"}
    trainer, train, _ = trained(build, tmp_path, cl_weight=0.0, meta_weight=0.0, **changes)
    config, _, _, _, other = build("SimDiffRec", cl_weight=0.0, diff_weight=0.0, **changes)
    state = {k: v for k, v in trainer.model.state_dict().items() if k in other.state_dict()}
    state["item_embedding.weight"] = state["item_embedding.weight"][:-1]
    missing = other.load_state_dict(state, strict=False).missing_keys
    assert all("denoiser" in name or name == "estimate_scale" for name in missing)
    trainer.model.draw_views = None
    plain = PlanTrainer(config, other, tmp_path / "other")
    trainer.fit(train)
    plain.fit(train)
    assert len(trainer.progress.log) == 2
    for name in theta_names(trainer.model):
        value = trainer.model.state_dict()[name]
        if name == "item_embedding.weight":
            value = value[:-1]
        torch.testing.assert_close(value, other.state_dict()[name], msg=name)


def test_weights_of_zero_cost_nothing(small: Any) -> None:
    """A term of weight 0 draws no number and is not computed."""
    model = small(cl_weight=0.0, meta_weight=0.0)
    model.draw_views = model.learned_loss = None
    before = torch.get_rng_state()
    losses = model.calculate_loss(rows())
    assert torch.equal(torch.get_rng_state(), before)
    assert [value.item() for value in losses[1:]] == [0, 0, 0]
    assert [phase.updates for phase in model.training_plan()] == [()]
    model = small(cl_weight=0.3, meta_weight=0.0)
    model.learned_loss = None
    assert model.calculate_loss(rows()).contrastive > 0
    model = small(regularizer_weight=0.0)
    assert model.calculate_loss(rows()).regularizer == 0


# ---------------------------------------------------------------- views, scores, checkpoints


def test_views_leave_the_batch_alone(small: Any) -> None:
    """Invariant 14: copies of at least one item; single items stay, short rows keep one."""
    model = small()
    torch.manual_seed(0)
    batch, kept = rows(), SEQ.clone()
    for _ in range(50):
        items, lengths = model.draw_views(batch)
        assert torch.equal(batch["item_id_list"], kept)
        assert torch.equal(batch["item_length"], LEN)
        assert items.shape == (8, MAX_LENGTH)
        assert (lengths >= 1).all()
        assert torch.equal(items[[2, 6]], SEQ[[2, 2]])
        cropped = lengths < LEN.repeat(2)
        assert torch.equal(lengths[cropped], (LEN.repeat(2)[cropped] // 2).clamp(min=1))


def test_masks_are_tokens_or_padding(small: Any) -> None:
    """Half of a row's items, unless cropped or reordered."""
    for mask_id, token in (("new", 13), ("pad", 0)):
        model = small(mask_id=mask_id)
        torch.manual_seed(0)
        items, lengths = model.draw_views(rows())
        inside = torch.arange(MAX_LENGTH) < lengths.unsqueeze(1)
        masked = ((items == token) & inside).sum(1)
        assert masked.any()
        assert torch.equal(masked[masked > 0], lengths[masked > 0] // 2)


PAD_VIEWS = torch.tensor([[0, 2, 0, 4, 0, 0], [5, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0]])
PAD_LENGTHS = torch.tensor([4, 2, 1])  # masked: the oldest and a middle item; the newest; none


def test_padding_hides_an_item_from_attention(small: Any, make_config: Any) -> None:
    """Invariant 12: as RecBole's mask does, by item 0; the place stays."""
    model = small(mask_id="pad").eval()
    model.item_embedding.weight.data.normal_()
    config = make_config("MCLRec", MAX_ITEM_LIST_LENGTH=MAX_LENGTH)
    theirs = SASRec(config, SimpleNamespace(num=lambda field: 13)).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("extractors.")}
    theirs.load_state_dict(state | {"item_embedding.weight": model.item_table})
    h1, h2 = model.encode_views((PAD_VIEWS.repeat(2, 1), PAD_LENGTHS.repeat(2)))
    torch.testing.assert_close(h1, h2)
    torch.testing.assert_close(h1, theirs(PAD_VIEWS, PAD_LENGTHS), atol=1e-5, rtol=1e-5)


def test_the_mask_token_is_no_item(small: Any) -> None:
    model = small()
    assert model.mask_token == 13
    assert len(model.item_embedding.weight) == 14
    model.eval()
    before = model.full_sort_predict(rows())
    assert before.shape == (4, 13)
    model.item_embedding.weight.data[-1] = 99.0
    assert torch.equal(model.full_sort_predict(rows()), before)


def test_scores_ignore_the_extractors(small: Any) -> None:
    """Invariant 15."""
    model = small().eval()
    before = model.full_sort_predict(rows())
    for parameter in model.extractors.parameters():
        parameter.data.normal_()
    assert torch.equal(model.full_sort_predict(rows()), before)


def test_a_checkpoint_holds_extractors_and_both_optimisers(build: Any, tmp_path: Any) -> None:
    """Invariant 13: training goes on identically, and evaluation gives the same metrics."""
    whole, train, valid = trained(build, tmp_path, "whole", epochs=3)
    whole.fit(train, valid)
    part, train, valid = trained(build, tmp_path, "part", epochs=1)
    part.fit(train, valid)
    tensors, content = checkpoint.load(tmp_path / "part" / LAST)
    assert len([name for name in tensors if name.startswith("model.extractors.")]) == 12
    assert {"optimizer_encoder", "optimizer_extractor"} <= content.keys()
    more, train, valid = trained(build, tmp_path, "part", epochs=3)
    more.resume(tmp_path / "part" / LAST)
    more.fit(train, valid)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(more.model.state_dict()[name], value), name
    for key, optimizer in whole.optimizers.items():
        assert moments(optimizer) == moments(more.optimizers[key])
    metrics = whole.evaluator.evaluate(valid)
    assert more.evaluator.evaluate(valid) == metrics
    stock = Trainer(more.config, more.model)  # masks what the loader says, and rounds
    stock.eval_collector.data_collect(train)
    places = more.config["metric_decimal_place"]
    expected = {name: round(value, places) for name, value in metrics[REMOVED].items()}
    assert stock.evaluate(valid, load_best_model=False) == expected


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regularizer": "code"}, "regularizer='code' is not one of batch, row"),
        ({"cl_similarity": "l2"}, "cl_similarity='l2' is not one of"),
        ({"meta_weight": -1.0}, "meta_weight=-1.0 must be at least 0"),
        ({"hidden_size": 2, "n_heads": 1}, "hidden_size=2 must be at least 4"),
        ({"encoder_steps": 3}, "encoder_steps=3 must be 1 or 2"),
        ({"encoder_steps": 2, "joint": True}, "joint=True makes one step a batch"),
        ({"crop_ratio": 1.5}, r"crop_ratio=1.5 must lie in \[0, 1\]"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"mask_id": 0}, "mask_id=0 is not one of new, pad"),
        ({"mask_id": "pad", "mask_ratio": 1.0}, "mask_ratio=1 hides whole rows; with mask_id=pad"),
    ],
)
def test_impossible_settings_are_refused(
    make_config: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config("MCLRec", **changes)


PAPER = {
    "amazon-beauty": (0, 0.05, 0.5),
    "amazon-sports-outdoors": (0.04, 0.4, 0.5),
    "yelp": (0.03, 0.1, 0.5),
    "amazon-toys-games": (0.01, 0.1, 0.5),
    "ml-1m": (0, 0.01, 0.1),
}


@pytest.mark.parametrize("dataset", PAPER)
def test_published_settings(dataset: str) -> None:
    config = Config("MCLRec", dataset)
    cl_weight, meta_weight, dropout = PAPER[dataset]
    assert (config["cl_weight"], config["meta_weight"]) == (cl_weight, meta_weight)
    assert config["hidden_dropout_prob"] == config["attn_dropout_prob"] == dropout
    views = ("crop_ratio", "mask_ratio", "reorder_ratio", "tau")
    assert [config[key] for key in views] == [0.5, 0.5, 0.8, 1.0]
    assert (config["encoder_steps"], config["regularizer"]) == (1, "batch")


def test_the_released_behaviour() -> None:
    plain, official = (
        Config("MCLRec", "toy", overrides={"preset": preset}) for preset in ("paper", "official")
    )
    differing = {k: v for k, v in official.final_config_dict.items() if plain[k] != v}
    steps = {"encoder_steps": 2, "regularizer": "row", "mask_id": "pad"}
    stopping = {"epochs": 100, "valid_metric": "MRR@10"}
    assert differing == {"preset": "official", **steps, **stopping}


def test_the_encoder_is_the_same_class_of_model() -> None:
    """Nothing of the encoder is overridden, so what is proved of it elsewhere holds here."""
    for name in ("encode", "forward", "recommendation_loss", "full_sort_predict", "predict"):
        assert getattr(MCLRec, name) is getattr(SimDiffRec, name)
