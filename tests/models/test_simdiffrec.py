"""SimDiffRec against its formulas, against RecBole's SASRec, and on data it must learn."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_simdiff.checkpoint import LAST, load
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.diffusion.denoisers import TIME_EMBEDDINGS, TimestepEmbedding
from recbole_simdiff.diffusion.schedules import FAMILIES
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import KEPT, REMOVED
from recbole_simdiff.models.simdiffrec import OPTIONS, SimDiffRec, Views, overwritten, refilled
from recbole_simdiff.modules import encoder
from recbole_simdiff.modules.losses import info_nce
from recbole_simdiff.modules.negatives import unseen_items
from recbole_simdiff.modules.transformer import TokenLayout
from recbole_simdiff.runs.run import run_one
from recbole_simdiff.training.trainer import PlanTrainer

MAX_LENGTH = 6
SEQ = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [8, 2, 9, 0, 0, 0]])
LEN = torch.tensor([4, 2, 1, 3])
POS = torch.tensor([10, 3, 4, 6])
REAL = torch.arange(MAX_LENGTH) < LEN.unsqueeze(1)
ITEMS = SEQ[REAL]
LAYOUT = TokenLayout(LEN, MAX_LENGTH)
STEP = torch.tensor([3, 20, 1, 11])


def rows(seq: Tensor = SEQ, length: Tensor = LEN, pos: Tensor = POS) -> Interaction:
    return Interaction({"item_id_list": seq, "item_length": length, "item_id": pos})


def take(batch: Interaction, index: list[int]) -> Interaction:
    return rows(*(batch[key][index] for key in ("item_id_list", "item_length", "item_id")))


@pytest.fixture
def small(make_config: Any) -> Any:
    """small(n_items, key=value, ...) -> a model without data, in eval mode, dropout off.

    The item table is standard normal: at its initial 0.02 every ranking is decided by rounding.
    Estimates are read as they are, so that cases can be worked by hand.
    """

    def make(n_items: int = 13, data: dict[str, float] | None = None, **overrides: Any) -> Any:
        values: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
        values |= {"MAX_ITEM_LIST_LENGTH": MAX_LENGTH, "rounding": "tied", **overrides}
        config = make_config(**values)
        torch.manual_seed(0)
        dataset = SimpleNamespace(num=lambda field: n_items, **(data or {}))
        model = SimDiffRec(config, dataset)
        model.item_embedding.weight.data.normal_()
        return model.eval()

    return make


@pytest.fixture
def one_hot(small: Any) -> Any:
    """A model of 8 items whose table is the identity: z_hat = log p rounds to exactly p."""

    def make(**overrides: Any) -> Any:
        model = small(9, MAX_ITEM_LIST_LENGTH=4, **overrides)
        model.item_embedding.weight.data[1:] = torch.eye(8)
        model.item_embedding.weight.data[0] = 1e3  # padding would win everything if it took part
        return model

    return make


def equal_norms(model: Any) -> None:
    """Every item becomes its own best match, as an oracle's rounding needs."""
    table = model.item_embedding.weight.data
    table.copy_(3.0 * F.normalize(table, dim=1))


def forbid(monkeypatch: pytest.MonkeyPatch, model: Any, *names: str) -> None:
    def trap(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this computation has no use and must not run")

    for name in names:
        monkeypatch.setattr(model, name, trap)


def restored_as(monkeypatch: pytest.MonkeyPatch, model: Any, z_hat: Tensor) -> None:
    monkeypatch.setattr(model, "restore", lambda *args: z_hat)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter, zero where the loss does not depend on it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for name, parameter, grad in zip(names, parameters, grads, strict=True)
    }


def reached(model: Any, loss: Tensor) -> set[str]:
    """Top-level modules that a loss sends gradient to."""
    return {name.split(".")[0] for name, g in gradients(model, loss).items() if g.any()}


def seeded_loss(model: Any, batch: Interaction | None = None, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return model.calculate_loss(rows() if batch is None else batch)


# ---------------------------------------------------------------- noise, Eq. 6-7


def brute_force_noise(table: Tensor, v: int, k: int) -> Tensor:
    scores = [(-(table[v] @ table[j]).item(), j) for j in range(1, len(table)) if j != v]
    return torch.stack([table[j] for _, j in sorted(scores)[:k]]).mean(0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_noise_is_the_mean_of_the_best_dot_products(small, k):
    """Invariant 4: brute force over a table of 6 items, for every item."""
    model = small(7, k_noise=k, k_sample=1)
    table = model.item_embedding.weight.detach()
    noise = model.noise(torch.arange(1, 7))
    for v in range(1, 7):
        torch.testing.assert_close(noise[v - 1], brute_force_noise(table, v, k))


def test_noise_of_all_neighbours_is_the_mean_of_the_others(small):
    """Invariant 4: k = V - 1."""
    model = small(7, k_noise=5)
    table = model.item_embedding.weight.detach()
    noise = model.noise(torch.arange(1, 7))
    torch.testing.assert_close(noise, (table[1:].sum(0) - table[1:]) / 5)


def test_noise_holds_neither_padding_nor_the_item_itself(small):
    """Invariant 5: not even when both would score best by far."""
    model = small(k_noise=3)
    table = model.item_embedding.weight.data
    table[0] = 1e3
    table[4] *= 100.0  # item 4 is its own best match
    assert (table[4] @ table[4]) > (table[1:] @ table[4]).topk(2).values[1]
    neighbours = model.nearest_items(torch.arange(1, 13))
    assert neighbours.min() >= 1
    assert not (neighbours == torch.arange(1, 13).unsqueeze(1)).any()
    noise = model.noise(torch.tensor([4]))
    torch.testing.assert_close(noise[0], brute_force_noise(table, 4, 3))


def test_noise_depends_on_the_item_only(small):
    """Invariant 6: bitwise equal wherever an item occurs, and equal to one query per token."""
    model = small()
    items = torch.tensor([3, 9, 3, 1, 9, 3, 12])
    noise = model.noise(items)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[0], noise[5])
    assert torch.equal(noise[1], noise[4])
    dense = model.item_embedding.weight[model.nearest_items(items)].mean(1)
    torch.testing.assert_close(noise, dense)
    torch.testing.assert_close(model.noise(items[2:4]), noise[2:4])


def test_noise_does_not_depend_on_the_memory_budget(small):
    """Several blocks, of 8 rows each, or one."""
    items = torch.arange(1, 13)
    torch.testing.assert_close(small(loss_memory_mb=1e-6).noise(items), small().noise(items))


def test_noise_is_detached_by_default(small):
    """Invariant 7."""
    assert not small().noise(ITEMS).requires_grad


def test_gradient_through_the_noise_is_the_upstream_one_over_k(small):
    """Invariant 7: (C_t / k) times the upstream gradient, into the neighbours and nowhere else."""
    model = small(noise_detach=False)
    item, t = torch.tensor([4]), torch.tensor([7])
    upstream = torch.randn(1, 8)
    z_0 = torch.randn(1, 8)
    model.process.q_sample(z_0, t, model.noise(item)).backward(upstream)
    expected = torch.zeros(13, 8)
    share = (model.process.noise[7] / 3).float() * upstream[0]
    expected[model.nearest_items(item)[0]] = share
    torch.testing.assert_close(model.item_embedding.weight.grad, expected)


def test_noise_detach_decides_whether_the_diffusion_loss_moves_neighbours(small):
    """Invariant 7 in the loss itself: item 12 is nobody's token, only a neighbour."""
    for detach in (True, False):
        model = small(noise_detach=detach, diff_round_weight=0.0)
        table = model.item_embedding.weight
        table.data[12] = 2 * table.data[1]  # the best match of item 1
        assert 12 in model.nearest_items(torch.tensor([1]))
        grad = torch.autograd.grad(seeded_loss(model).diffusion, table)[0]
        assert grad[12].any() == (not detach)
        assert grad[1].any()


def test_neighbours_of_an_epoch_are_those_of_its_start(small):
    """Which items are near is from then, their embeddings are of now; what is analysed is exact."""
    model, items = small(noise_refresh="epoch").train(), torch.arange(1, 13)
    model.begin_epoch("train", 0)
    table = model.item_embedding.weight.data
    near = model.nearest_items(items)
    torch.testing.assert_close(model.noise(items), table[near].mean(1))
    table.copy_(torch.randn_like(table))
    model.begin_epoch("train", 0)  # the rest of an epoch that is resumed
    assert not torch.equal(model.nearest_items(items), near)
    torch.testing.assert_close(model.noise(items), table[near].mean(1))
    torch.testing.assert_close(model.eval().noise(items), noise_of_now(model, items))
    model.train().begin_epoch("train", 1)
    torch.testing.assert_close(model.noise(items), noise_of_now(model, items))


def noise_of_now(model: Any, items: Tensor) -> Tensor:
    """The noise by the table of now."""
    return model.item_embedding.weight.data[model.nearest_items(items)].mean(1)


def test_neighbours_of_an_epoch_are_those_of_each_batch_as_long_as_the_table_stands(small):
    models = [small(noise_refresh=name).train() for name in ("batch", "epoch")]
    models[1].begin_epoch("train", 0)
    batch, epoch = (seeded_loss(model) for model in models)
    torch.testing.assert_close(tuple(epoch), tuple(batch), rtol=0, atol=0)


# ---------------------------------------------------------------- forward and reverse, Eq. 8-11


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_process_is_the_configured_family(small, family):
    """Invariant 1: the model's tables are those of the schedule it names."""
    model = small(forward_coef=family, beta_start=1e-3, beta_end=0.3)
    betas = torch.linspace(1e-3, 0.3, 20, dtype=torch.float64)
    signal, noise = FAMILIES[family](betas)
    assert torch.equal(model.process.signal, signal)
    assert torch.equal(model.process.noise, noise)


def test_fully_noised_sequence_is_the_noise(small):
    """Invariant 3: the default schedule leaves nothing of the items at T."""
    model = small()
    t = torch.full((len(ITEMS),), model.process.n_steps)
    noise = model.noise(ITEMS)
    assert torch.equal(model.process.q_sample(model.item_embedding(ITEMS), t, noise), noise)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_oracle_restores_the_sequence(small, monkeypatch, family, steps):
    """Invariant 8: recovered items equal s at all valid positions, for any S and family."""
    model = small(forward_coef=family, reverse_steps=steps)
    equal_norms(model)
    truth = model.item_embedding(ITEMS)
    monkeypatch.setattr(model, "denoise", lambda z_t, t, layout: truth)
    z_hat = model.restore(ITEMS, model.noise(ITEMS), torch.full((4,), 20), LAYOUT)
    torch.testing.assert_close(z_hat, truth)
    recovered = (z_hat @ model.item_embedding.weight[1:].t()).argmax(1) + 1
    assert torch.equal(recovered, ITEMS)


def test_one_reverse_step_is_one_prediction(small):
    """Invariant 9: f(z_T, T)."""
    model = small(reverse_steps=1)
    noise, t = model.noise(ITEMS), torch.full((4,), 20)
    z_t = model.process.q_sample(model.item_embedding(ITEMS), t[LAYOUT.row], noise)
    torch.testing.assert_close(
        model.restore(ITEMS, noise, t, LAYOUT), model.denoise(z_t, t, LAYOUT)
    )


def test_reverse_steps_is_the_number_of_denoiser_calls(small, monkeypatch):
    """Each with the step of every row, in 1..T."""
    model = small(reverse_steps=5)
    denoise, seen = model.denoise, []

    def count(z_t: Tensor, t: Tensor, layout: TokenLayout) -> Tensor:
        seen.append(t.tolist())
        return denoise(z_t, t, layout)

    monkeypatch.setattr(model, "denoise", count)
    model.restore(ITEMS, model.noise(ITEMS), torch.tensor([20, 20, 20, 10]), LAYOUT)
    assert seen == [[t, t, t, t // 2] for t in (20, 16, 12, 8, 4)]


def test_clamped_estimates_are_embeddings_of_their_nearest_items(small, monkeypatch):
    """Inside the chain; the last estimate, whose confidence is asked for, is the denoiser's."""
    model = small(reverse_steps=4, reverse_clamp="nearest")
    equal_norms(model)
    truth = model.item_embedding(ITEMS).detach()
    inputs = []

    def far_too_long(z_t: Tensor, t: Tensor, layout: TokenLayout) -> Tensor:
        inputs.append(z_t)
        return 40.0 * truth

    monkeypatch.setattr(model, "denoise", far_too_long)
    noise, start = model.noise(ITEMS), torch.full((4,), 20)
    assert torch.equal(model.restore(ITEMS, noise, start, LAYOUT), 40.0 * truth)
    for z_t, t in zip(inputs, (20, 15, 10, 5), strict=True):  # on the path that training saw
        expected = model.process.q_sample(truth, torch.full((len(ITEMS),), t), noise)
        torch.testing.assert_close(z_t, expected)
    model.reverse_clamp = "none"
    inputs.clear()
    model.restore(ITEMS, noise, start, LAYOUT)
    assert inputs[1].norm() > 5 * expected.norm()


@pytest.mark.parametrize("rounding", OPTIONS["rounding"])
def test_a_trained_denoiser_restores_as_well_in_many_steps_as_in_one(small, rounding):
    """Every allowed number of steps; an oracle has the right length by construction, this has not.

    60 items in a cycle. Without the clamp a longer chain leaves what the denoiser was trained on.
    """
    model = small(61, rounding=rounding, hidden_size=16, inner_size=32, k_noise=5, cl_weight=0.0)
    torch.manual_seed(0)
    model.apply(model.init_weights)
    start = torch.arange(60).unsqueeze(1)
    seq = (start + torch.arange(MAX_LENGTH)) % 60 + 1
    length = torch.full((60,), MAX_LENGTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(300):
        optimizer.zero_grad()
        losses = model.calculate_loss(rows(seq, length, (start[:, 0] + MAX_LENGTH) % 60 + 1))
        (losses.rec + 10 * losses.diffusion).backward()
        optimizer.step()
    layout = TokenLayout(length, MAX_LENGTH)
    items = layout.pack(seq)

    def accuracy(steps: int, clamp: str) -> float:
        model.reverse_steps, model.reverse_clamp = steps, clamp
        with torch.no_grad():
            z_hat = model.restore(items, model.noise(items), torch.full((60,), 20), layout)
        return (model.choices(z_hat, 1).items[:, 0] == items).float().mean().item()

    one = accuracy(1, "none")
    assert one > 0.9
    assert min(accuracy(steps, "nearest") for steps in range(1, 21)) >= 0.95 * one
    assert accuracy(20, "none") < 0.9 * one


# ---------------------------------------------------------------- denoiser, Eq. 10


def test_scaled_rounding_reads_the_output_itself(small):
    """g z_hat is what the Transformer wrote, and z_hat has the items' length at first."""
    tied, scaled = small(), small(rounding="scaled")
    z = tied.item_embedding(ITEMS).detach()
    out = tied.denoise(z, STEP, LAYOUT)
    z_hat = scaled.denoise(z, STEP, LAYOUT)
    torch.testing.assert_close(z_hat, 0.02 * out)
    torch.testing.assert_close(scaled.rounding_query(z_hat), out)
    assert torch.equal(scaled.choices(z_hat, 3).items, tied.choices(out, 3).items)
    grads = gradients(scaled, seeded_loss(scaled).diffusion)
    assert grads["estimate_scale"] != 0


def test_the_squared_error_alone_teaches_the_scale(small):
    """The rounding loss does not depend on it: what it leaves is noise, which Adam would follow."""
    assert not small(rounding="scaled", diff_mse_weight=0.0).estimate_scale.requires_grad
    whole = small(rounding="scaled")
    torch.manual_seed(5)
    both = gradients(whole, whole.calculate_loss(rows()).diffusion)["estimate_scale"]
    whole.diff_round_weight = 0.0
    torch.manual_seed(5)
    alone = gradients(whole, whole.calculate_loss(rows()).diffusion)["estimate_scale"]
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)
    assert alone != 0


@pytest.mark.parametrize("detach", [True, False])
def test_round_detach_table_keeps_the_rounding_loss_off_the_softmax_side(small, detach):
    """Item 12 is nobody's token and nobody's neighbour that moves: only a class of the softmax."""
    model = small(round_detach_table=detach, diff_mse_weight=0.0)
    grads = gradients(model, seeded_loss(model).diffusion)
    assert grads["item_embedding.weight"][12].any() == (not detach)
    assert any(grad.any() for name, grad in grads.items() if name.startswith("denoiser_encoder"))


def test_denoiser_sees_newer_items(small):
    """Invariant 20: changing the last item changes the estimate at position 0."""
    model = small()
    z = model.item_embedding(ITEMS).detach()
    before = model.denoise(z, STEP, LAYOUT)
    z[3] = torch.randn(8)  # the newest item of row 0
    moved = (model.denoise(z, STEP, LAYOUT) - before).abs().amax(1) > 1e-5
    assert moved.tolist() == [True] * 4 + [False] * 6


@pytest.mark.parametrize("time_embedding", TIME_EMBEDDINGS)
def test_denoiser_sees_the_step(small, time_embedding):
    """Of its own row only."""
    model = small(time_embedding=time_embedding)
    z = model.item_embedding(ITEMS)
    later = STEP.clone()
    later[1] = 5
    moved = (model.denoise(z, later, LAYOUT) - model.denoise(z, STEP, LAYOUT)).abs().amax(1) > 1e-5
    assert moved.tolist() == [False] * 4 + [True] * 2 + [False] * 4


@pytest.mark.parametrize("hidden_size", [8, 7])
def test_sinusoidal_features_by_hand(hidden_size):
    """sin and cos of t over 10000^(i / half), before the two linear layers."""
    time = TimestepEmbedding(hidden_size)
    time.mlp = torch.nn.Identity()
    half = (hidden_size + 1) // 2
    angle = [3 / 10000 ** (i / half) for i in range(half)]
    expected = [*map(math.sin, angle), *map(math.cos, angle)][:hidden_size]
    assert time(torch.tensor([3]))[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("share", [True, False])
def test_share_denoiser_encoder_uses_the_encoders_transformer(small, share):
    """Invariant 28: the encoder hears of L_d only when its Transformer is shared."""
    model = small(share_denoiser_encoder=share)
    assert (model.denoiser_encoder is None) == share
    with torch.no_grad():
        before = model.denoise(model.item_embedding(ITEMS), STEP, LAYOUT)
        next(model.trm_encoder.parameters()).mul_(-1)
        after = model.denoise(model.item_embedding(ITEMS), STEP, LAYOUT)
    assert torch.equal(before, after) == (not share)
    assert ("trm_encoder" in reached(model, seeded_loss(model).diffusion)) == share


def test_one_table_serves_every_use(small):
    """Invariant 23: one Parameter of that size, with gradient from every use of it."""
    model = small()
    tables = [p for p in model.parameters() if p.shape == (13, 8)]
    assert len(tables) == 1
    assert tables[0] is model.item_embedding.weight
    item = torch.tensor([3])
    layout = TokenLayout(torch.tensor([1]), 1)
    embedded = model.item_embedding(item)
    uses = {
        "encoder": model(item.unsqueeze(0), layout.lengths),
        "denoiser input": model.denoise(embedded, torch.tensor([2]), layout),
        "noise": model.similarity_noise(item),
        "scoring": model.full_sort_predict(rows(item.unsqueeze(0), layout.lengths)),
    }
    for use, out in uses.items():
        weight = torch.randn_like(out)
        assert torch.autograd.grad((out * weight).sum(), tables[0])[0].any(), use
    rounding = model.diffusion_loss(item, torch.zeros(1, 8), torch.tensor([2]), layout)
    grad = torch.autograd.grad(rounding, tables[0])[0]
    assert grad[5].any()  # an item that is neither input nor neighbour


def test_number_of_parameters(small):
    """Invariant 23: table, two position tables, time MLP, 2 + 1 layers, two LayerNorms."""
    h, inner = 8, 16
    layer = 4 * (h * h + h) + 2 * 2 * h + (h * inner + inner) + (inner * h + h)
    time = (h * 4 * h + 4 * h) + (4 * h * h + h)
    expected = 13 * h + 2 * MAX_LENGTH * h + time + 3 * layer + 2 * 2 * h
    assert sum(p.numel() for p in small().parameters()) == expected


# ---------------------------------------------------------------- diffusion loss, Eq. 13


def expected_diffusion_loss(model: Any, items: Tensor, t: Tensor, layout: TokenLayout) -> Tensor:
    """The two means of Eq. 13 written out with dense logits over real items."""
    noise, z_0 = model.noise(items), model.item_embedding(items)
    z_hat = model.denoise(model.process.q_sample(z_0, t[layout.row], noise), t, layout)
    mse = ((z_0 - z_hat) ** 2).mean()
    rounding = F.cross_entropy(z_hat @ model.item_embedding.weight[1:].t(), items - 1)
    return model.diff_mse_weight * mse + model.diff_round_weight * rounding


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_diffusion_loss_is_a_mean_over_real_tokens(small, weights):
    """Sec. 3.12 of the paper's Eq. 13: reconstruction and rounding of f(z_t, t)."""
    model = small(diff_mse_weight=weights[0], diff_round_weight=weights[1])
    loss = model.diffusion_loss(ITEMS, model.noise(ITEMS), STEP, LAYOUT)
    torch.testing.assert_close(loss, expected_diffusion_loss(model, ITEMS, STEP, LAYOUT))


def test_diffusion_loss_is_divided_by_the_expected_tokens(small):
    """A batch of short histories must not weigh as much as one of long histories."""
    model, plain = small(data={"tokens_per_batch": 40.0}), small()
    noise = model.noise(ITEMS)
    torch.testing.assert_close(
        40.0 * model.diffusion_loss(ITEMS, noise, STEP, LAYOUT),
        len(ITEMS) * plain.diffusion_loss(ITEMS, noise, STEP, LAYOUT),
    )


def test_released_diffusion_loss_counts_padding_as_class_0(small, monkeypatch):
    """Averaged over all B x L cells, with the padding row among the classes."""
    model = small(pad_in_diffusion_loss=True, diff_mse_weight=0.0, diff_weight=1.0)
    steps, diffusion_loss = [], model.diffusion_loss

    def record(items: Tensor, noise: Tensor, t: Tensor, *others: Any) -> Tensor:
        steps.append(t)
        return diffusion_loss(items, noise, t, *others)

    monkeypatch.setattr(model, "diffusion_loss", record)
    loss = seeded_loss(model, rows(SEQ[:, :4])).diffusion  # a trimmed batch is padded up again
    cells, items = TokenLayout(LEN, MAX_LENGTH, with_padding=True), SEQ.flatten()
    t, noise = steps[0], model.noise(items)
    z_t = model.process.q_sample(model.item_embedding(items), t[cells.row], noise)
    z_hat = model.denoise(z_t, t, cells)
    expected = F.cross_entropy(z_hat @ model.item_embedding.weight.t(), items)
    torch.testing.assert_close(loss, expected)


def test_diffusion_loss_ignores_padding(small):
    """Invariant 18: neither its row of the table nor its amount changes the loss or a gradient."""
    model = small()
    short = rows(SEQ[:, :4])
    losses = [seeded_loss(model, short).diffusion]
    grads = [gradients(model, losses[0])]
    losses.append(seeded_loss(model, rows()).diffusion)  # two more columns of padding
    grads.append(gradients(model, losses[1]))
    model.item_embedding.weight.data[0] = 1e3
    losses.append(seeded_loss(model, rows()).diffusion)
    grads.append(gradients(model, losses[2]))
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        for name, value in grad.items():
            torch.testing.assert_close(value, grads[0][name], atol=1e-5, rtol=1e-4)
    assert not grads[0]["item_embedding.weight"][0].any()


def test_mse_target_can_be_detached(small):
    """Then the table learns from the prediction's side only."""
    grads = []
    for detach in (True, False):
        model = small(mse_detach_target=detach, diff_round_weight=0.0)
        noise = model.noise(ITEMS)
        z_0 = model.item_embedding(ITEMS)
        z_hat = model.denoise(model.process.q_sample(z_0, STEP[LAYOUT.row], noise), STEP, LAYOUT)
        target = z_0.detach() if detach else z_0
        want = torch.autograd.grad(((target - z_hat) ** 2).mean(), model.item_embedding.weight)[0]
        loss = model.diffusion_loss(ITEMS, noise, STEP, LAYOUT)
        got = torch.autograd.grad(loss, model.item_embedding.weight)[0]
        torch.testing.assert_close(got, want)
        grads.append(got)
    assert not torch.allclose(*grads)


def test_training_steps_are_uniform_over_1_to_t_one_a_sequence(small, monkeypatch):
    """Never 0: z_0 itself has nothing to restore."""
    model, seen = small(cl_weight=0.0, diffusion_steps=5), []

    def record(items: Tensor, noise: Tensor, t: Tensor, *others: Any) -> Tensor:
        assert t.shape == (1000,)
        seen.extend(t.tolist())
        return torch.zeros(())

    monkeypatch.setattr(model, "diffusion_loss", record)
    seeded_loss(model, take(rows(), [0, 1, 2, 3] * 250))
    counts = [seen.count(t) for t in range(7)]
    assert counts[0] == counts[6] == 0
    assert min(counts[1:6]) > 150  # 200 expected, standard deviation 13


def test_term_weights_of_zero_skip_the_term(small, monkeypatch):
    """Rounding is the one product with the whole table."""
    model = small(diff_round_weight=0.0)
    monkeypatch.setattr(
        "recbole_simdiff.models.simdiffrec.full_softmax_loss",
        lambda *args: pytest.fail("a rounding loss of weight 0 was computed"),
    )
    assert model.diffusion_loss(ITEMS, model.noise(ITEMS), STEP, LAYOUT) > 0


# ---------------------------------------------------------------- confidence, Eq. 14-15


def test_confidence_is_the_largest_rounding_probability(small):
    """Invariant 10: max softmax over real items, within [1/V, 1]."""
    model = small()
    model.item_embedding.weight.data[0] = 1e3
    z_hat = torch.cat([torch.randn(20, 8), torch.zeros(1, 8), 50 * torch.randn(1, 8)])
    confidence, top, items = model.choices(z_hat, 3)
    logits = z_hat @ model.item_embedding.weight[1:].t()
    torch.testing.assert_close(confidence, logits.softmax(1).amax(1), atol=1e-6, rtol=1e-5)
    assert confidence.min() >= 1 / 12 - 1e-6
    assert confidence.max() <= 1
    assert confidence[20].item() == pytest.approx(1 / 12)
    ranking = (logits.amax(1) - logits.logsumexp(1)).argsort()
    assert torch.equal(confidence[:20].argsort(), ranking[ranking < 20])
    ranked = logits.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(top, ranked.values[:, :3])
    untied = torch.arange(len(z_hat)) != 20
    assert torch.equal(items[untied], ranked.indices[untied, :3] + 1)


def test_confidence_ignores_a_constant_added_to_a_rows_logits(one_hot):
    """Invariant 10: large logits alone are not confidence."""
    model = one_hot()
    z_hat = torch.tensor([[2.0, 1.0, *[0.0] * 6], [1.5, 0.0, *[0.0] * 6]])
    shifted = z_hat + torch.tensor([[0.0], [100.0]])
    of_shifted, of_z_hat = model.choices(shifted, 1), model.choices(z_hat, 1)
    torch.testing.assert_close(of_shifted.confidence, of_z_hat.confidence)


def test_confidence_reads_a_written_distribution(one_hot):
    """Invariant 10: an identity table turns log p into p."""
    p = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.04, 0.03, 0.02, 0.01], [0.125] * 8])
    assert one_hot().choices(p.log(), 1).confidence.tolist() == pytest.approx([0.5, 0.125])


def test_confidence_does_not_depend_on_the_memory_budget(small):
    z_hat = torch.randn(9, 8)
    few, many = small(loss_memory_mb=1e-6), small()
    torch.testing.assert_close(tuple(few.choices(z_hat, 3)), tuple(many.choices(z_hat, 3)))


# ---------------------------------------------------------------- position selection, Eq. 16


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [(0.2, [1, 1, 1, 1]), (0.5, [2, 1, 1, 1]), (0.7, [2, 1, 1, 2]), (1.0, [4, 2, 1, 3])],
)
def test_most_confident_share_of_each_row_is_selected(small, ratio, counts):
    """Invariant 11: exactly K_b valid positions, none left out that is more confident."""
    model = small(aug_ratio=ratio)
    torch.manual_seed(1)
    for _ in range(20):
        score = torch.randn(len(ITEMS))
        token = model.select_positions(score, LAYOUT)
        assert torch.bincount(LAYOUT.row[token], minlength=4).tolist() == counts
        chosen = torch.zeros(len(ITEMS), dtype=torch.bool).index_fill(0, token, True)
        for b in range(4):
            inside, outside = (score[(LAYOUT.row == b) & m] for m in (chosen, ~chosen))
            assert len(outside) == 0 or inside.min() >= outside.max()


def test_whole_rows_are_selected_at_ratio_one(small):
    """Invariant 11, also for a product that rounding puts below the whole number."""
    assert small(aug_ratio=1.0).select_positions(torch.randn(10), LAYOUT).tolist() == [*range(10)]
    layout = TokenLayout(torch.tensor([50]), 50)
    model = small(aug_ratio=0.58, MAX_ITEM_LIST_LENGTH=50)
    assert len(model.select_positions(torch.randn(50), layout)) == 29  # 0.58 * 50 = 28.999...


def test_padding_is_never_selected(small):
    """Invariant 11: real tokens may score below anything, kept padding cells above."""
    model = small(aug_ratio=1.0)
    cells = TokenLayout(LEN, MAX_LENGTH, with_padding=True)
    score = torch.where(cells.keys.flatten(), -1e6, 1e6)
    assert torch.equal(model.select_positions(score, cells), cells.keys.flatten().nonzero()[:, 0])
    assert len(model.select_positions(torch.full((10,), -1e6), LAYOUT)) == 10


def test_newest_item_can_be_selected(small):
    """Invariant 11: the position the encoder reads is not protected."""
    score = torch.arange(10.0)
    token = small(aug_ratio=0.2).select_positions(score, LAYOUT)
    assert torch.equal(token, LAYOUT.last)


def test_fixed_count_is_of_the_maximum_length(small):
    """Not of the length a batch happens to be trimmed to, and never more than a row has."""
    model = small(aug_count="fixed", aug_ratio=0.5, pad_in_diffusion_loss=True)  # int(3.0)
    for length in (4, MAX_LENGTH):
        token = model.select_positions(torch.rand(10), TokenLayout(LEN, length))
        assert torch.bincount(LAYOUT.row[token], minlength=4).tolist() == [3, 2, 1, 3]


# ---------------------------------------------------------------- views


def make_views(model: Any, seq: Tensor = SEQ, length: Tensor = LEN) -> Views:
    layout = TokenLayout(length, seq.shape[1])
    t = torch.full_like(length, 2)
    return model.make_views(seq, model.noise(layout.pack(seq)), t, layout)


def replacements(model: Any, z_hat: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    return model.replacements(model.choices(z_hat, model.rank_depth), original)


def test_views_differ_from_the_sequence_only_where_it_was_selected(one_hot, monkeypatch):
    """Invariant 12: padding stays 0, lengths stay, replacements are real items."""
    model = one_hot(aug_ratio=0.5, k_sample=3)
    seq = torch.tensor([[1, 2, 3, 4], [5, 1, 0, 0], [6, 0, 0, 0]])
    length = torch.tensor([4, 2, 1])
    layout = TokenLayout(length, 4)
    z_hat = torch.randn(7, 8)
    z_hat[:, [6, 7, 5]] += torch.tensor([30.0, 20.0, 10.0])  # choices are 7, 8, 6 everywhere
    restored_as(monkeypatch, model, z_hat)
    views = make_views(model, seq, length)
    selected = torch.zeros(7, dtype=torch.bool)
    selected[model.select_positions(model.choices(z_hat, 1).confidence, layout)] = True
    selected = layout.unpack(selected.float()).bool()
    assert selected.sum(1).tolist() == [2, 1, 1]
    assert torch.equal(views.positive, torch.where(selected, 7, seq))
    assert torch.equal(views.negative, torch.where(selected, 6, seq))
    assert torch.equal(views.positive_len, length)
    assert torch.equal(views.negative_len, length)


def test_views_hold_real_items_and_padding_stays_padding(small):
    """Invariant 12: whatever the denoiser says; E[0] would win every ranking."""
    model = small(aug_ratio=1.0, k_sample=12)
    model.item_embedding.weight.data[0] = 1e3
    views = make_views(model)
    for view in (views.positive, views.negative):
        assert torch.equal(view != 0, REAL)
        assert view.max() <= 12


@pytest.mark.parametrize("rank", [1, 2, 5, 12])
def test_replacements_follow_the_denoisers_ranking(small, rank):
    """Invariant 13: the first choice, and the k_sample-th of a full sort."""
    model = small(k_sample=rank)
    model.item_embedding.weight.data[0] = 1e3
    z_hat = torch.randn(10, 8)
    order = (z_hat @ model.item_embedding.weight[1:].t()).argsort(1, descending=True) + 1
    positive, negative = replacements(model, z_hat, ITEMS)
    assert torch.equal(positive, order[:, 0])
    assert torch.equal(negative, order[:, rank - 1])


def test_views_are_equal_at_rank_one(small):
    """Invariant 13: k_sample = 1 makes the hard negative the positive."""
    views = make_views(small(k_sample=1, aug_ratio=1.0))
    assert torch.equal(views.positive, views.negative)


def test_views_differ_at_rank_two(small):
    """Invariant 13: at every selected position."""
    views = make_views(small(k_sample=2, aug_ratio=1.0))
    assert torch.equal(views.positive != views.negative, REAL)


def test_replacements_do_not_depend_on_the_memory_budget(small):
    z_hat = torch.randn(10, 8)
    for a, b in zip(
        replacements(small(loss_memory_mb=1e-6), z_hat, ITEMS),
        replacements(small(), z_hat, ITEMS),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_original_item_can_be_excluded_from_either_view(small):
    """The rank is then counted among the other items."""
    z_hat = torch.randn(10, 8)
    model = small(pos_exclude_original=True, neg_exclude_original=True, k_sample=3)
    logits = z_hat @ model.item_embedding.weight[1:].t()
    order = logits.argsort(1, descending=True) + 1
    for rank in range(12):  # the original item stands at each rank once
        original = order[:, rank]
        others = order[order != original.unsqueeze(1)].view(10, 11)
        positive, negative = replacements(model, z_hat, original)
        assert torch.equal(positive, others[:, 0])
        assert torch.equal(negative, others[:, 2])


def test_oracle_keeps_the_sequence(small, monkeypatch):
    """Invariant 14: then s+ == s and its cosine with the anchor is 1."""
    model = small(aug_ratio=1.0)
    equal_norms(model)
    restored_as(monkeypatch, model, model.item_embedding(ITEMS))
    views = make_views(model)
    assert torch.equal(views.positive, SEQ)
    cosine = torch.cosine_similarity(model(SEQ, LEN), model(views.positive, views.positive_len))
    torch.testing.assert_close(cosine, torch.ones(4), atol=1e-6, rtol=0)


def test_views_are_a_pure_function_of_weights_and_sequence(small):
    """Invariant 26: no randomness, no training step, no neighbours in the batch."""
    model = small(aug_ratio=0.5)
    torch.manual_seed(1)
    views = make_views(model)
    torch.manual_seed(2)
    noise = model.noise(ITEMS)
    again = model.make_views(SEQ, noise, torch.full_like(LEN, 19), LAYOUT)
    assert torch.equal(again.positive, views.positive)
    assert torch.equal(again.negative, views.negative)
    for b in range(4):
        alone = make_views(model, SEQ[b : b + 1, : LEN[b]], LEN[b : b + 1])
        assert torch.equal(alone.positive[0], views.positive[b, : LEN[b]])
        assert torch.equal(alone.negative[0], views.negative[b, : LEN[b]])


def test_views_start_from_the_fully_noised_sequence(small, monkeypatch):
    """Or, as released, from the step drawn for training."""
    for confidence_t, expected in (("T", [20] * 4), ("train_t", STEP.tolist())):
        model = small(confidence_t=confidence_t)
        seen, restore = [], model.restore

        def record(items, noise, start, *others, seen=seen, restore=restore):
            seen.append(start.tolist())
            return restore(items, noise, start, *others)

        monkeypatch.setattr(model, "restore", record)
        model.make_views(SEQ, model.noise(ITEMS), STEP, LAYOUT)
        assert seen == [expected]


def test_dropout_is_off_while_views_are_made(small, monkeypatch):
    """Unless asked for; the modules come back in the mode they were in."""
    for aug_dropout in (False, True):
        for share in (False, True):
            model = small(
                aug_dropout=aug_dropout, share_denoiser_encoder=share, hidden_dropout_prob=0.5
            )
            for training in (True, False):
                model.train(training)
                restored, restore = [], model.restore

                def record(*args, restored=restored, restore=restore):
                    restored.append(restore(*args))
                    return restored[-1]

                with monkeypatch.context() as patch:
                    patch.setattr(model, "restore", record)
                    make_views(model)
                    make_views(model)
                assert torch.equal(*restored) == (not aug_dropout)
                assert all(module.training == training for module in model.modules())


def test_denoiser_mode_comes_back_after_an_error(small, monkeypatch):
    model = small().train()
    forbid(monkeypatch, model, "restore")
    with pytest.raises(AssertionError, match="must not run"):
        make_views(model)
    assert all(module.training for module in model.modules())


def test_views_carry_no_gradient(small):
    views = make_views(small())
    assert not any(value.requires_grad for value in views.monitor.values())


# ---------------------------------------------------------------- monitor


def test_monitor_of_a_case_worked_by_hand(one_hot, monkeypatch):
    """Rows [1 2 3 4], [5 6]; the most confident half of each, that is 2 + 1 tokens."""
    p = torch.full((6, 8), 0.01)
    #       item:  1     2     3     4     5     6     7     8
    p[0] = torch.tensor([0.90, 0.04, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01])  # keeps 1, then 2
    p[1] = torch.tensor([0.20, 0.30, 0.10, 0.10, 0.10, 0.08, 0.07, 0.05])  # not selected
    p[2] = torch.tensor([0.01, 0.01, 0.30, 0.01, 0.64, 0.01, 0.01, 0.01])  # 5, then its own 3
    p[3] = torch.tensor([0.20, 0.10, 0.10, 0.25, 0.10, 0.10, 0.10, 0.05])  # not selected
    p[4] = torch.tensor([0.13, 0.13, 0.12, 0.12, 0.14, 0.12, 0.12, 0.12])  # not selected
    p[5] = torch.tensor([0.05, 0.05, 0.05, 0.05, 0.05, 0.10, 0.50, 0.15])  # 7, then 8
    torch.testing.assert_close(p.sum(1), torch.ones(6))
    model = one_hot(aug_ratio=0.5)
    restored_as(monkeypatch, model, p.log())
    views = make_views(model, torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2]))
    assert views.positive.tolist() == [[1, 2, 5, 4], [5, 7, 0, 0]]
    assert views.negative.tolist() == [[2, 2, 3, 4], [5, 8, 0, 0]]
    monitor = {name: value.item() for name, value in views.monitor.items()}
    assert monitor["positive_is_original"] == pytest.approx(1 / 3)
    assert monitor["negative_is_original"] == pytest.approx(1 / 3)
    # Own items come first at places 0 (1 -> 1) and 3 (4 -> 4) of the first row and nowhere else:
    # 2 -> 2 at place 1, but 3 -> 5; and 5 -> 5 in the second row, but 6 -> 7.
    assert monitor["restored"] == pytest.approx(4 / 6)
    assert monitor["restored_selected"] == pytest.approx(1 / 3)
    assert monitor["confidence"] == pytest.approx((0.9 + 0.3 + 0.64 + 0.25 + 0.14 + 0.5) / 6)


def test_monitored_confidence_leaves_padding_out(one_hot, monkeypatch):
    """With the released layout padding cells are tokens, too, but nobody's recommendation."""
    model = one_hot(pad_in_diffusion_loss=True)
    z_hat = torch.zeros(8, 8)
    z_hat[[2, 3, 5, 6, 7], 0] = 50.0  # padding: certain
    restored_as(monkeypatch, model, z_hat)
    cells = TokenLayout(torch.tensor([2, 1]), 4, with_padding=True)
    seq = torch.tensor([[1, 2, 0, 0], [5, 0, 0, 0]])
    views = model.make_views(seq, torch.zeros(8, 8), torch.tensor([1, 1]), cells)
    assert views.monitor["confidence"].item() == pytest.approx(1 / 8)


def test_monitor_is_of_the_last_step_and_empty_without_views(small):
    model = small()
    seeded_loss(model)
    of_views = {"restored", "restored_selected", "confidence"}
    of_views |= {"positive_is_original", "negative_is_original"}
    assert set(model.monitored()) == of_views | {"item_norm"}
    norms = model.item_embedding.weight[1:].norm(dim=1)
    assert model.monitored()["item_norm"].item() == pytest.approx(norms.mean().item())
    model.cl_weight = 0.0
    seeded_loss(model)
    assert set(model.monitored()) == {"item_norm"}


# ---------------------------------------------------------------- contrast, Eq. 17


def test_contrastive_loss_compares_encoded_sequences(small):
    """Invariant 15: anchors, positives and hard negatives all come from the encoder."""
    model = small(aug_ratio=1.0, k_sample=4)
    views = make_views(model)
    states = [model(seq, LEN) for seq in (SEQ, views.positive, views.negative)]
    expected = info_nce(states[0], states[1], model.tau, states[2])
    torch.testing.assert_close(model.contrastive_loss(states[0], views), expected)
    assert expected > 0


def test_one_sequence_with_equal_views_costs_log_two(small):
    """Invariant 15: B = 1 and k_sample = 1, at weight 1."""
    model = small(k_sample=1, cl_weight=1.0)
    loss = seeded_loss(model, take(rows(), [0]))
    assert loss.contrastive.item() == pytest.approx(math.log(2), rel=1e-4)


def test_without_hard_negatives_only_the_positives_count(small):
    """Invariant 16: the first B columns; the negative view is not even encoded."""
    model = small(cl_negatives="pos_only", aug_ratio=1.0)
    views = make_views(model)
    state = model(SEQ, LEN)
    expected = info_nce(state, model(views.positive, LEN), model.tau)
    ruined = views._replace(negative=torch.full_like(SEQ, -1), negative_len=LEN)
    torch.testing.assert_close(model.contrastive_loss(state, ruined), expected)
    loss = seeded_loss(small(cl_negatives="pos_only", cl_weight=1.0), take(rows(), [0]))
    assert loss.contrastive.item() == 0.0


def test_contrast_reads_the_newest_state_in_every_sampling(small):
    """All positions are encoded for user_all, the newest ones for prefix_last."""
    losses = [
        seeded_loss(small(train_sampling=sampling)).contrastive
        for sampling in ("user_all", "prefix_last")
    ]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("negatives", OPTIONS["cl_negatives"])
def test_contrast_by_dot_product_does_not_normalise(small, negatives):
    model = small(cl_similarity="dot", tau=1.0, cl_negatives=negatives, aug_ratio=1.0, k_sample=4)
    views = make_views(model)
    anchor, positive, negative = (model(seq, LEN) for seq in (SEQ, views.positive, views.negative))
    keys = positive if negatives == "pos_only" else torch.cat([positive, negative])
    expected = F.cross_entropy(anchor @ keys.t(), torch.arange(4))
    torch.testing.assert_close(model.contrastive_loss(anchor, views), expected)


@pytest.mark.parametrize("scale", [0.02, -0.02])
def test_what_is_most_confident_is_what_replaces(small, scale):
    """Also where training has turned the sign of the learned scale."""
    model = small(rounding="scaled")
    model.estimate_scale.data.fill_(scale)
    z_hat = torch.randn(len(ITEMS), 8) * scale
    positive, _ = replacements(model, z_hat, ITEMS)
    assert torch.equal(positive, model.choices(z_hat, 1).items[:, 0])


def with_users(users: list[int], pos: Tensor = POS) -> Interaction:
    return Interaction({**rows(pos=pos).interaction, "user_id": torch.tensor(users)})


@pytest.mark.parametrize("positives", OPTIONS["cl_positives"])
@pytest.mark.parametrize("negatives", OPTIONS["cl_negatives"])
def test_contrast_at_every_state_worked_by_hand(small, negatives, positives):
    """Anchor by anchor; rows 0 and 3 are windows of one user, and item 3 follows twice."""
    model = small(
        contrast_at="every",
        cl_negatives=negatives,
        cl_positives=positives,
        cl_similarity="dot",
        tau=4.0,
        aug_ratio=0.5,
    )
    batch, views = with_users([7, 5, 6, 7]), make_views(model)
    anchor, positive, negative = (
        model.encode(seq, LAYOUT) for seq in (SEQ, views.positive, views.negative)
    )
    target = model.labels(SEQ, LAYOUT, POS).tolist()  # 2 3 4 10 | 6 3 | 4 | 2 9 6
    owner = [7, 7, 7, 7, 5, 5, 6, 7, 7, 7]
    total = torch.zeros(())
    for m in range(10):
        others = [j for j in range(10) if owner[j] != owner[m]]
        right = [m]
        if positives == "same_target":
            right += [j for j in others if target[j] == target[m]]
        keys = right + [j for j in others if target[j] != target[m]]
        scores = [(anchor[m] @ positive[j] / 4).exp() for j in keys]
        if negatives == "pos_and_hard":
            scores.append((anchor[m] @ negative[m] / 4).exp())
        each = [-((anchor[m] @ positive[p] / 4).exp() / sum(scores)).log() for p in right]
        total = total + sum(each) / len(right)
    loss = model.contrast_every_state(anchor, LAYOUT, batch, views)
    torch.testing.assert_close(loss, total / 10)
    # As the next-item loss, a sum over the expected number of targets.
    model.targets_per_batch = 4.0
    loss = model.contrast_every_state(anchor, LAYOUT, batch, views)
    torch.testing.assert_close(loss, total / 4)


def test_states_are_drawn_where_there_are_too_many(small):
    """Without bias: the mean over draws of a linear loss is that of all states."""
    model = small(contrast_at="every", contrast_states=4)
    batch, views, hidden = with_users([1, 2, 3, 4]), make_views(model), torch.randn(10, 8)
    seen = []

    def count(anchor: Tensor, *args: Any, weight: Tensor, **kwargs: Any) -> Tensor:
        seen.append(anchor)
        return weight.sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recbole_simdiff.models.simdiffrec.state_info_nce", count)
        for _ in range(50):
            loss = model.contrast_every_state(hidden, LAYOUT, batch, views)
            assert loss.item() == pytest.approx(1.0)
    drawn = torch.cat(seen)
    assert drawn.shape == (200, 8)
    counts = (drawn.unsqueeze(1) == hidden).all(2).sum(0)
    assert counts.min() > 5


def test_processes_draw_as_many_states_together_as_one(small, monkeypatch):
    model = small(contrast_at="every", contrast_states=6)
    seen = []

    def keep(anchor: Tensor, *args: Any, weight: Tensor, **kwargs: Any) -> Tensor:
        seen.append(len(anchor))
        return weight.sum()

    monkeypatch.setattr("recbole_simdiff.models.simdiffrec.state_info_nce", keep)
    monkeypatch.setattr("recbole_simdiff.models.simdiffrec.world_size", lambda: 3)
    batch = with_users([1, 2, 3, 4])
    loss = model.contrast_every_state(torch.randn(10, 8), LAYOUT, batch, make_views(model))
    assert seen == [2]
    assert loss.item() == pytest.approx(1.0)


def test_pseudo_items_have_no_state_to_contrast(small, monkeypatch):
    """As in the next-item loss, whose positions they are."""
    model = small(contrast_at="every")
    batch = with_users([1, 2, 3, 4])
    batch = Interaction({**batch.interaction, "pseudo_length": torch.tensor([2, 0, 0, 1])})
    hidden, seen = torch.randn(10, 8), []

    def keep(anchor: Tensor, positive: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(anchor)
        return anchor.sum()

    monkeypatch.setattr("recbole_simdiff.models.simdiffrec.state_info_nce", keep)
    model.contrast_every_state(hidden, LAYOUT, batch, make_views(model))
    assert torch.equal(seen[0], hidden[[2, 3, 4, 5, 6, 8, 9]])


@pytest.mark.parametrize("negatives", OPTIONS["cl_negatives"])
def test_states_of_views_with_more_padding_are_those_of_the_batch(small, negatives):
    """``pad_in_diffusion_loss`` fills rows up to the longest that any batch can have."""
    model = small(contrast_at="every", pad_in_diffusion_loss=True, cl_negatives=negatives)
    seq = SEQ[:, :4]
    layout, batch = TokenLayout(LEN, 4), with_users([1, 2, 3, 4])
    batch = Interaction({**batch.interaction, "item_id_list": seq})
    hidden, views = model.encode(seq, layout), Views(seq, LEN, seq.flip(0), LEN, {})
    longer = Views(F.pad(seq, (0, 2)), LEN, F.pad(seq.flip(0), (0, 2)), LEN, {})
    losses = [model.contrast_every_state(hidden, layout, batch, some) for some in (views, longer)]
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"contrast_at": "every", "train_sampling": "prefix_last"},
            "needs train_sampling=user",
        ),
        ({"cl_positives": "same_target"}, "cl_positives=same_target needs contrast_at=every"),
        ({"contrast_states": 1}, "contrast_states=1 must be at least 2"),
        ({"cl_similarity": "euclid"}, "cl_similarity"),
        ({"reverse_clamp": "norm"}, "reverse_clamp"),
    ],
)
def test_impossible_contrasts_are_refused(make_config, values, message):
    with pytest.raises(UserError, match=message):
        make_config(**values)


# ---------------------------------------------------------------- balanced weight of the contrast

BALANCED: dict[str, dict[str, Any]] = {
    "newest": {},
    "prefixes": {"train_sampling": "prefix_last"},
    "every state": {"contrast_at": "every", "cl_positives": "same_target"},
    "dropout of its own": {"cl_dropout": 0.0},
}


def gradient_norm(loss: Any, states: Tensor) -> float:
    """Norm of the gradient of ``loss(states)`` at the states, from a graph of its own."""
    leaf = states.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0].norm().item()


@pytest.mark.parametrize("case", BALANCED)
def test_balanced_weight_is_the_ratio_of_mean_gradient_norms(small, case):
    """Slow reference: each loss from states that nothing else knows, means with all their terms."""
    model = small(cl_balance=0.3, cl_weight=9.0, **BALANCED[case])
    batches = [with_users([1, 2, 3, 4]), with_users([1, 2, 3, 4], POS.flip(0))]
    batches.append(Interaction({k: v[:3] for k, v in batches[0].interaction.items()}))
    norms = []
    for batch in batches:
        seq, length = batch["item_id_list"], batch["item_length"]
        layout = TokenLayout(length, MAX_LENGTH)
        hidden = model.encode(seq, layout, last_only=model.last_target_only)
        views = make_views(model, seq, length)

        def rec(states, layout=layout, batch=batch):
            return model.recommendation_loss(states, layout, batch)

        def contrast(states, layout=layout, batch=batch, views=views):
            if model.contrast_at == "every":
                return model.contrast_every_state(states, layout, batch, views)
            newest = states if model.last_target_only else states[layout.last]
            return model.contrastive_loss(newest, views)

        norms.append((gradient_norm(rec, hidden), gradient_norm(contrast, hidden)))
        decay = [0.99**age for age in range(len(norms))][::-1]
        of_rec, of_contrast = (
            sum(d * n[i] for d, n in zip(decay, norms, strict=True)) / sum(decay) for i in (0, 1)
        )
        losses = model.calculate_loss(batch)
        weight = model.monitored()["cl_weight"].item()
        assert weight == pytest.approx(0.3 * of_rec / of_contrast, rel=1e-4)
        assert losses.contrastive.item() == pytest.approx(
            weight * contrast(hidden).item(), rel=1e-4
        )
    assert len({round(a / b, 4) for a, b in norms}) == 3  # the batches do differ


def test_balanced_weight_changes_no_gradient_but_by_its_size(small):
    model = small(cl_balance=0.3)
    losses = seeded_loss(model)
    weight = model.monitored()["cl_weight"]
    assert not weight.requires_grad
    plain = small(cl_weight=weight.item())
    expected = gradients(plain, sum(seeded_loss(plain)))
    for name, gradient in gradients(model, sum(losses)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_balanced_weight_grows_over_the_warm_up(small):
    full = small(cl_balance=0.3)
    seeded_loss(full)
    model = small(cl_balance=0.3, cl_warmup_epochs=4)
    seeded_loss(model)
    assert "cl_weight" not in model.monitored()
    assert not model.gradient_norms.any()  # no contrast, no mean
    model.begin_epoch("train", 1)
    seeded_loss(model)
    assert model.monitored()["cl_weight"] == full.monitored()["cl_weight"] / 4


def test_balanced_weight_is_kept_where_nothing_is_trained(small):
    model = small(cl_balance=0.3)
    seeded_loss(model)
    before = model.gradient_norms.clone()
    with torch.no_grad():
        loss = seeded_loss(model, take(rows(), [0, 3]))
    assert torch.equal(model.gradient_norms, before)
    assert loss.contrastive > 0


def test_balanced_weight_of_a_contrast_without_gradient_is_zero(small):
    """One row has no other to be told from."""
    model = small(cl_balance=0.3, cl_negatives="pos_only")
    assert seeded_loss(model, take(rows(), [0])).contrastive == 0
    assert model.monitored()["cl_weight"] == 0


def test_balanced_weight_goes_on_where_a_run_was_stopped(make_config):
    """The means are in checkpoints, and only in those of such runs."""
    values = {"cl_balance": 0.3, "cl_dropout": 0.1, "pos_sample": 2, "k_sample": 4}
    whole = run_one(make_config(epochs=3, **values))
    part = run_one(make_config(epochs=1, **values))
    last = Path(part.run_dir) / LAST
    resumed = run_one(make_config(epochs=3, **values), resume=last)
    assert (resumed.valid, resumed.test) == (whole.valid, whole.test)
    expected, tensors = (load(Path(r.run_dir) / LAST)[0] for r in (whole, resumed))
    assert expected.keys() == tensors.keys()
    for name, value in expected.items():  # with the optimiser's and the random states
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    assert (expected["model.gradient_norms"] > 0).all()
    log = json.loads((Path(resumed.run_dir) / "result.json").read_text())["log"]
    assert all(entry["monitor"]["cl_weight"] > 0 for entry in log)


def test_without_balance_nothing_is_added(small):
    model = small()
    seeded_loss(model)
    assert "cl_weight" not in model.monitored()
    assert "gradient_norms" not in model.state_dict()


# ---------------------------------------------------------------- dropout of the contrast


def passes(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[tuple[int, set[float]]]:
    """Rows and dropout probabilities of each pass of the encoder, as they come."""
    encode, seen = model.encode, []

    def record(item_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        modules = [model.dropout, *model.trm_encoder.modules()]
        drops = {module.p for module in modules if isinstance(module, torch.nn.Dropout)}
        seen.append((len(item_seq), drops))
        return encode(item_seq, *args, **kwargs)

    monkeypatch.setattr(model, "encode", record)
    return seen


@pytest.mark.parametrize("sampling", ["user_all", "prefix_last"])
def test_the_contrast_has_its_own_dropout(small, monkeypatch, sampling):
    """Anchor, then both views; the next-item pass has the encoder's, before and after."""
    dropout = {"hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.4, "train_sampling": sampling}
    for values, expected in (
        ({}, [(4, {0.5, 0.4}), (8, {0.5, 0.4})]),  # h(s) is that of the next-item pass
        ({"cl_dropout": 0.1}, [(4, {0.5, 0.4}), (4, {0.1}), (8, {0.1})]),
    ):
        model = small(**dropout, **values).train()
        seen = passes(monkeypatch, model)
        seeded_loss(model)
        assert seen == expected
        seeded_loss(model)
        assert seen == expected * 2


@pytest.mark.parametrize("at", OPTIONS["contrast_at"])
def test_without_dropout_the_contrast_is_that_of_evaluation(small, at):
    """Slow reference: everything encoded in eval mode, where nothing is dropped."""
    values = {"hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.5, "contrast_at": at}
    model = small(cl_dropout=0.0, cl_weight=1.0, **values)
    batch, views = with_users([1, 2, 3, 4]), make_views(model)
    if at == "every":
        expected = model.contrast_every_state(model.encode(SEQ, LAYOUT), LAYOUT, batch, views)
    else:
        expected = model.contrastive_loss(model(SEQ, LEN), views)
    model.train()
    first, second = seeded_loss(model, batch, 5), seeded_loss(model, batch, 6)
    assert first.rec != second.rec
    torch.testing.assert_close(first.contrastive, expected)
    torch.testing.assert_close(second.contrastive, expected)


def test_the_encoders_dropout_comes_back_after_an_error(small, monkeypatch):
    model = small(hidden_dropout_prob=0.5, cl_dropout=0.1)
    forbid(monkeypatch, model, "contrastive_loss")
    with pytest.raises(AssertionError, match="must not run"):
        seeded_loss(model)
    assert model.dropout.p == 0.5
    assert model.trm_encoder.layer[0].multi_head_attention.attn_dropout.p == 0.0


# ---------------------------------------------------------------- sampled positive views


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("rank", [0, 2, 8])
def test_positive_items_are_drawn_by_their_probability(small, exclude, rank):
    """From ranks 1 to 5 of a full sort; the original stands at rank ``rank`` + 1."""
    model = small(pos_sample=5, k_sample=7, pos_exclude_original=exclude, rounding="scaled")
    z_hat = torch.randn(8) * 0.01
    table = model.item_embedding.weight[1:]
    p = (z_hat / model.estimate_scale @ table.t()).softmax(0)
    order = p.argsort(descending=True)
    choices = [i for i in order[:5].tolist() if not (exclude and i == order[rank])]
    expected = torch.zeros(12)
    expected[choices] = p[choices] / p[choices].sum()
    n = 20000
    original = (order[rank] + 1).expand(n)
    torch.manual_seed(3)
    positive, negative = replacements(model, z_hat.expand(n, 8), original)
    share = torch.bincount(positive - 1, minlength=12) / n
    torch.testing.assert_close(share, expected.detach(), rtol=0, atol=0.015)
    assert not share[expected == 0].any()
    assert torch.equal(negative, (order[6] + 1).expand(n))  # as without sampling


def test_sampled_positives_are_logged_as_others_are(one_hot, monkeypatch):
    p = torch.tensor([0.5, 0.3, 0.1, 0.02, 0.02, 0.02, 0.02, 0.02])
    seq, length = torch.ones(400, 1, dtype=torch.long), torch.ones(400, dtype=torch.long)
    for exclude, share in ((False, 0.5 / 0.9), (True, 0.0)):
        model = one_hot(aug_ratio=1.0, pos_sample=3, k_sample=4, pos_exclude_original=exclude)
        restored_as(monkeypatch, model, p.log().expand(400, 8))
        torch.manual_seed(0)
        views = make_views(model, seq, length)
        same = (views.positive == 1).float().mean()
        assert views.monitor["positive_is_original"] == same
        assert same.item() == pytest.approx(share, abs=0.08)
        assert views.monitor["restored"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cl_balance": -1.0}, "cl_balance=-1.0 must be at least 0"),
        ({"cl_balance": 0.3, "cl_weight": 0.0}, "cl_balance=0.3 weighs a contrast that cl_weight"),
        ({"cl_dropout": 1.0}, r"cl_dropout=1.0 must lie in \[0, 1\), or be ~"),
        ({"cl_dropout": "little"}, r"cl_dropout='little' must lie in \[0, 1\), or be ~"),
        ({"pos_sample": 1}, "pos_sample=1 must be 0, or at least 2"),
        ({"pos_sample": -2}, "pos_sample=-2 must be 0, or at least 2"),
        ({"pos_sample": 5, "k_sample": 5}, "k_sample=5 must be larger than pos_sample=5"),
        ({"pos_sample": 2, "k_sample": 4, "aug_items": "random"}, "pos_sample, .* nothing to rank"),
        ({"pos_exclude_original": True}, "pos_exclude_original=True .* its second goes into both"),
    ],
)
def test_impossible_trials_are_refused(make_config, values, message):
    with pytest.raises(UserError, match=message):
        make_config(**values)


def test_more_sampled_ranks_than_items_are_refused(small):
    values = {"k_sample": 2, "cl_negatives": "pos_only"}  # no hard negative to be kept apart
    assert small(pos_sample=12, **values).pos_sample == 12
    with pytest.raises(UserError, match="pos_sample=13 must not exceed the number of items, 12"):
        small(pos_sample=13, **values)


# ---------------------------------------------------------------- recommendation, Eq. 2-3


def test_recommendation_loss_is_a_mean_over_targets(small):
    """Dense cross-entropy of next items at all positions, or of the target at the newest one."""
    for sampling in ("user_all", "prefix_last"):
        model = small(train_sampling=sampling)
        hidden = model.encode(SEQ, LAYOUT)
        label = model.labels(SEQ, LAYOUT, POS)
        if sampling == "prefix_last":
            hidden, label = hidden[LAYOUT.last], POS
        expected = F.cross_entropy(hidden @ model.item_embedding.weight.t(), label)
        torch.testing.assert_close(seeded_loss(model).rec, expected)


def test_sum_over_prefixes_equals_one_row_with_all_targets(small):
    """Invariant 21: the same training signal, in loss and in every gradient."""
    items = torch.tensor([3, 1, 4, 11, 5, 9])
    prefixes = torch.zeros(5, MAX_LENGTH, dtype=torch.long)
    for i in range(5):
        prefixes[i, : i + 1] = items[: i + 1]
    batch = rows(prefixes, torch.arange(1, 6), items[1:])
    whole = rows(items[None, :5], torch.tensor([5]), items[5:])
    weights = {"cl_weight": 0.0, "diff_weight": 0.0}
    last = small(train_sampling="prefix_last", data={"targets_per_batch": 1.0}, **weights)
    every = small(train_sampling="user_all", data={"targets_per_batch": 1.0}, **weights)
    losses = [seeded_loss(last, batch).rec, seeded_loss(every, whole).rec]
    torch.testing.assert_close(losses[0], losses[1])
    theirs = gradients(every, losses[1])
    for name, grad in gradients(last, losses[0]).items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_mask_pad_in_softmax_takes_the_padding_row_out(small, masked):
    """RecBole's SASRec keeps it in, which is the default."""
    model = small(mask_pad_in_softmax=masked)
    before = seeded_loss(model).rec
    table = model.item_embedding.weight[1:] if masked else model.item_embedding.weight
    label = model.labels(SEQ, LAYOUT, POS) - int(masked)
    expected = F.cross_entropy(model.encode(SEQ, LAYOUT) @ table.t(), label)
    torch.testing.assert_close(before, expected)
    model.item_embedding.weight.data[0].normal_(std=5.0)
    assert torch.equal(seeded_loss(model).rec, before) == masked


def test_bce_negatives_avoid_history_and_target(small):
    """And reach every other item about equally often."""
    model = small(sr_loss="BCE")
    seen = torch.cat([SEQ, POS.unsqueeze(1)], 1)
    torch.manual_seed(0)
    for owner in (torch.arange(4), LAYOUT.row):
        draws = torch.stack([unseen_items(SEQ, POS, owner, model.n_items) for _ in range(400)])
        assert draws.shape == (400, len(owner))
        for token, b in enumerate(owner.tolist()):
            allowed = set(range(1, 13)) - set(seen[b].tolist())
            values, counts = draws[:, token].unique(return_counts=True)
            assert set(values.tolist()) == allowed
            assert counts.min() > 0.5 * 400 / len(allowed)


@pytest.mark.parametrize("sampling", ["user_all", "prefix_last"])
def test_bce_loss_is_one_negative_a_target(small, monkeypatch, sampling):
    """Eq. 3 written out, with negatives fixed to item 12."""
    model = small(sr_loss="BCE", train_sampling=sampling)
    monkeypatch.setattr(
        encoder,
        "unseen_items",
        lambda seq, pos, row, n_items: torch.full_like(row, 12),
    )
    hidden, label = model.encode(SEQ, LAYOUT), model.labels(SEQ, LAYOUT, POS)
    if sampling == "prefix_last":
        hidden, label = hidden[LAYOUT.last], POS
    table = model.item_embedding.weight
    right, wrong = (hidden * table[label]).sum(1), hidden @ table[12]
    expected = -(right.sigmoid().log() + (1 - wrong.sigmoid()).log()).mean()
    torch.testing.assert_close(seeded_loss(model).rec, expected)


# ---------------------------------------------------------------- total loss, Eq. 18


def test_terms_are_named_and_weighted(small):
    """The same random draws, other weights: each term scales with its own."""
    loss = seeded_loss(small(cl_weight=0.1, diff_weight=0.1))
    other = seeded_loss(small(cl_weight=0.4, diff_weight=0.3))
    assert loss._fields == ("rec", "contrastive", "diffusion")
    torch.testing.assert_close(other.rec, loss.rec)
    torch.testing.assert_close(other.contrastive, 4 * loss.contrastive)
    torch.testing.assert_close(other.diffusion, 3 * loss.diffusion)
    assert min(loss) > 0


DIFFUSION_CODE = ("noise", "nearest_items", "denoise", "diffusion_loss", "make_views", "restore")


def test_plain_encoder_runs_no_diffusion_code(small, monkeypatch):
    """Invariant 17: both weights 0. Nor does it draw a random number."""
    model = small(cl_weight=0.0, diff_weight=0.0)
    forbid(monkeypatch, model, *DIFFUSION_CODE, "contrastive_loss")
    forbid(monkeypatch, model.process, "q_sample")
    forbid(monkeypatch, model.denoiser, "forward")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loss = model.calculate_loss(rows())
    assert torch.equal(torch.get_rng_state(), before)
    assert loss.rec > 0
    assert loss.contrastive == loss.diffusion == 0
    assert reached(model, sum(loss)) == {
        "item_embedding",
        "position_embedding",
        "trm_encoder",
        "LayerNorm",
    }


def test_diffusion_weight_of_zero_skips_the_diffusion_loss(small, monkeypatch):
    model = small(diff_weight=0.0)
    forbid(monkeypatch, model, "diffusion_loss")
    loss = seeded_loss(model)
    assert loss.diffusion == 0
    assert loss.contrastive > 0


def test_contrastive_weight_of_zero_skips_the_views(small, monkeypatch):
    model = small(cl_weight=0.0)
    forbid(monkeypatch, model, "make_views", "contrastive_loss", "restore", "choices")
    loss = seeded_loss(model)
    assert loss.contrastive == 0
    assert loss.diffusion > 0


def test_contrastive_weight_grows_over_the_warm_up(small, monkeypatch):
    """Epochs 0, 1, 2, 3, ... of a warm-up of 4: nothing, a quarter, a half, ..., all."""
    full = seeded_loss(small()).contrastive
    model = small(cl_warmup_epochs=4)
    for epoch, share in [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0), (9, 1.0)]:
        model.begin_epoch("train", epoch)
        torch.testing.assert_close(seeded_loss(model).contrastive, share * full)
    model.begin_epoch("train", 0)
    forbid(monkeypatch, model, "make_views")
    assert seeded_loss(model).contrastive == 0


def test_each_loss_reaches_its_own_modules(small):
    """Invariant 28: the denoiser learns from L_d only, the encoder not from L_d."""
    encoder = {"position_embedding", "trm_encoder", "LayerNorm"}
    denoiser = {"denoiser", "denoiser_encoder"}
    model = small()
    loss = seeded_loss(model)
    assert reached(model, loss.rec) == encoder | {"item_embedding"}
    loss = seeded_loss(model)
    assert reached(model, loss.contrastive) == encoder | {"item_embedding"}
    loss = seeded_loss(model)
    assert reached(model, loss.diffusion) == denoiser | {"item_embedding"}


def test_every_parameter_of_the_denoiser_learns(small):
    """Invariant 28: no part of it is idle (the position table at the lengths that occur)."""
    model = small()
    grads = gradients(model, seeded_loss(model).diffusion)
    for name, grad in grads.items():
        if name.startswith("denoiser") and not name.endswith("key.bias"):  # softmax cancels it
            assert grad.any(), name


def test_same_seed_gives_the_same_losses_for_three_steps(small):
    """Invariant 26: dropout, steps and updates included, to the last bit."""
    runs = []
    for _ in range(2):
        model = small(hidden_dropout_prob=0.3, attn_dropout_prob=0.3).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        torch.manual_seed(7)
        values = []
        for _ in range(3):
            loss = model.calculate_loss(rows())
            optimizer.zero_grad()
            sum(loss).backward()
            optimizer.step()
            values.append([part.item() for part in loss])
        runs.append(values)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_bfloat16_losses_stay_close_to_float32(small):
    """The whole loss under autocast: recommendation and diffusion 1 %, contrast 5 %.

    The views are those of one run, as a near tie may be ranked otherwise in bfloat16.
    """
    model = small(aug_ratio=1.0)
    views = make_views(model)
    model.make_views = lambda *args: views
    full = seeded_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = seeded_loss(model)
    for name, tolerance in (("rec", 0.01), ("diffusion", 0.01), ("contrastive", 0.05)):
        got, want = getattr(low, name), getattr(full, name)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(want.item(), rel=tolerance)
        assert got.item() != want.item()
    theirs = gradients(model, sum(full))
    for name, grad in gradients(model, sum(low)).items():
        if not name.endswith("key.bias"):  # zero up to rounding, as softmax cancels it
            assert (grad - theirs[name]).norm() < 0.1 * theirs[name].norm(), name


def test_views_can_be_made_in_bfloat16(small):
    """Ids stay legal and confidences float32 when the denoiser runs under autocast."""
    model = small(aug_ratio=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        views = make_views(model)
    assert torch.equal(views.positive != 0, REAL)
    assert views.monitor["confidence"].dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and not value.is_sparse:
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("sampling", ["user_all", "prefix_last"])
def test_no_tensor_holds_logits_of_all_tokens(small, sampling):
    """Neither forward nor backward: 8 x 20 tokens x 2,000 items would be 320,000 numbers."""
    batch, length, n_items = 8, 20, 2001
    sizes = {"MAX_ITEM_LIST_LENGTH": length, "train_sampling": sampling}
    torch.manual_seed(0)
    data = rows(
        torch.randint(1, n_items, (batch, length)),
        torch.full((batch,), length),
        torch.randint(1, n_items, (batch,)),
    )

    def largest(memory_mb: float) -> int:
        model = small(n_items, loss_memory_mb=memory_mb, **sizes)
        with LargestTensor() as mode:
            sum(model.calculate_loss(data)).backward()
        return mode.numel

    assert largest(0.0625) <= n_items * 8 + 1000  # the table itself; a block is 16,384 numbers
    # The recorder does see logits: a generous budget lets those of all tokens exist.
    assert largest(16.0) >= batch * length * (n_items - 1)


# ---------------------------------------------------------------- presets and ablations


def test_paper_preset_is_the_default():
    assert Config("SimDiffRec", "none")["preset"] == "paper"
    values = Config("SimDiffRec", "none").final_config_dict
    paper = Config("SimDiffRec", "none", overrides={"preset": "paper"}).final_config_dict
    assert values == paper


def test_official_preset_sets_the_released_behaviour():
    """Every value of the specification's list, D4 to D21."""
    config = Config("SimDiffRec", "none", overrides={"preset": "official"})
    expected = {
        "train_sampling": "prefix_all",
        "train_batch_size": 2048,
        "valid_metric": "MRR@10",
        "noise_detach": False,
        "denoiser_layers": 2,
        "share_denoiser_encoder": True,
        "time_embedding": "learned",
        "diff_mse_weight": 0.0,
        "pad_in_diffusion_loss": True,
        "confidence_t": "train_t",
        "reverse_steps": 1,
        "aug_count": "fixed",
        "aug_items": "random",
        "aug_dropout": True,
        "forward_coef": "vp_zsnr",
        "aug_position": "confidence",
        "cl_negatives": "pos_and_hard",
        "sr_loss": "CE",
        "tau": 0.05,
        "aug_ratio": 0.2,
    }
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        ("wo_k_noise", {"noise_source": "gaussian"}),
        ("wo_c_aug", {"aug_position": "random"}),
        ("wo_k_sample", {"cl_negatives": "pos_only"}),
    ],
)
def test_ablation_presets_change_one_thing(preset, change):
    paper = Config("SimDiffRec", "none").final_config_dict
    ablation = Config("SimDiffRec", "none", overrides={"preset": preset}).final_config_dict
    assert {k: v for k, v in ablation.items() if v != paper[k]} == {"preset": preset, **change}


def test_unknown_preset_is_refused():
    with pytest.raises(UserError, match=r"preset='wo_all' .* is not one of paper, official"):
        Config("SimDiffRec", "none", overrides={"preset": "wo_all"})


def test_wo_k_noise_draws_gaussian_noise(small, monkeypatch):
    """A fresh standard normal vector for every token, whatever the table says."""
    model = small(preset="wo_k_noise")
    forbid(monkeypatch, model, "nearest_items", "similarity_noise")
    torch.manual_seed(0)
    noise = model.noise(torch.full((2000,), 3))
    assert noise.shape == (2000, 8)
    assert abs(noise.mean().item()) < 0.03
    assert noise.std().item() == pytest.approx(1.0, abs=0.03)
    assert len(noise.unique(dim=0)) == 2000
    assert all(torch.isfinite(part) for part in seeded_loss(model))


def test_wo_c_aug_selects_positions_at_random(one_hot, monkeypatch):
    """As many as before, each about equally often, however confident the denoiser is of one."""
    z_hat = torch.zeros(4, 8)
    z_hat[:, 7] = torch.tensor([9.0, 1.0, 1.0, 1.0])  # sure of the first; 8 is no original item
    seq, length = torch.tensor([[1, 2, 3, 4]]), torch.tensor([4])
    changed = {}
    for preset in ("paper", "wo_c_aug"):
        model = one_hot(preset=preset, aug_ratio=0.5)
        restored_as(monkeypatch, model, z_hat)
        torch.manual_seed(0)
        masks = [make_views(model, seq, length).positive[0] == 8 for _ in range(300)]
        changed[preset] = torch.stack(masks)
        assert (changed[preset].sum(1) == 2).all()
    assert changed["paper"][:, 0].all()
    rate = changed["wo_c_aug"].float().mean(0)
    assert (rate - 0.5).abs().max() < 0.12  # standard deviation 0.03


def test_wo_k_sample_leaves_hard_negatives_out(small):
    """Invariant 16: k_sample has no effect any more; with the paper's preset it has."""
    for preset, equal in (("wo_k_sample", True), ("paper", False)):
        losses = [
            seeded_loss(small(preset=preset, k_sample=k, aug_ratio=1.0)).contrastive for k in (2, 9)
        ]
        assert torch.equal(*losses) == equal


@pytest.fixture
def official(small: Any) -> Any:
    """official(...) -> released behaviour at L = 50, the other sizes small."""

    def make(**overrides: Any) -> Any:
        values = {"preset": "official", "reverse_steps": 1, "MAX_ITEM_LIST_LENGTH": 50}
        return small(**(values | overrides))

    return make


def test_official_preset_replaces_ten_cells_of_short_rows(official):
    """Invariant 30: padding included, since ten cells are more than the items there are."""
    model = official()
    lengths = torch.tensor([3, 1, 9, 40])
    cells = TokenLayout(lengths, 50, with_padding=True)
    torch.manual_seed(0)
    token = model.select_positions(torch.rand(200), cells)
    assert torch.bincount(cells.row[token], minlength=4).tolist() == [10, 10, 10, 10]
    real = cells.keys.flatten()[token]  # real items are confident, padding has confidence 0
    assert torch.bincount(cells.row[token][real], minlength=4).tolist() == [3, 1, 9, 10]


def test_official_views_are_random_and_longer_than_the_history(official):
    """Invariant 30: replaced padding lengthens short rows up to ten items, less the holes of 0."""
    model = official()
    torch.manual_seed(0)
    seq = F.pad(SEQ, (0, 44))
    cells = TokenLayout(LEN, 50, with_padding=True)
    noise = model.noise(seq.flatten())
    lengths, first = [], []
    for _ in range(100):
        views = model.make_views(seq, noise, STEP, cells)
        for view, length in (
            (views.positive, views.positive_len),
            (views.negative, views.negative_len),
        ):
            assert torch.equal(view != 0, torch.arange(50) < length.unsqueeze(1))
            lengths.append(length)
        first.append(views.positive[:, 0])
    lengths = torch.stack(lengths).float()
    assert lengths.max() == 10
    # Ten draws of 13 ids, one of them 0: 120 / 13 real ones are expected.
    assert lengths.mean().item() == pytest.approx(120 / 13, abs=0.15)
    assert set(torch.cat(first).tolist()) == set(range(1, 13))


def test_official_loss_trains_every_module(official):
    """Invariant 30: all three terms are finite and nothing is left without a gradient."""
    model = official(hidden_dropout_prob=0.5, attn_dropout_prob=0.5).train()
    loss = seeded_loss(model)
    assert all(torch.isfinite(part) and part > 0 for part in loss)
    assert reached(model, sum(loss)) == {name.split(".")[0] for name, _ in model.named_parameters()}


def test_refilled_padding_stands_before_the_history():
    """The released left-padded layout, moved to the right: holes of 0 are closed."""
    layout = TokenLayout(torch.tensor([2, 2, 1]), 4, with_padding=True)
    seq = torch.tensor([[1, 2, 0, 0], [1, 2, 0, 0], [3, 0, 0, 0]])
    token = torch.tensor([0, 2, 3, 4, 6, 7, 8])
    new = torch.tensor([9, 7, 8, 9, 0, 8, 0])
    view, length = refilled(overwritten(seq, layout, token, new), seq, layout)
    # [9 2 | 7 8] is [7 8 9 2] left-padded; [9 2 | 0 8] loses its hole; an empty row stays.
    assert view.tolist() == [[7, 8, 9, 2], [8, 9, 2, 0], [3, 0, 0, 0]]
    assert length.tolist() == [4, 3, 1]


def test_random_items_ignore_the_denoiser(small):
    """Uniform over 1..V; equal in both views at k_sample = 1, else different."""
    z_hat = torch.zeros(1200, 8)
    original = torch.ones(1200, dtype=torch.long)
    torch.manual_seed(0)
    for rank in (1, 2):
        model = small(aug_items="random", k_sample=rank)
        positive, negative = replacements(model, z_hat, original)
        for ids in (positive, negative):
            counts = torch.bincount(ids, minlength=13)
            assert counts[0] == 0
            assert counts[1:].min() > 60  # 100 expected
        assert torch.equal(positive, negative) == (rank == 1)
        assert rank == 1 or not (positive == negative).any()


# ---------------------------------------------------------------- impossible settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k_noise": 0}, "k_noise=0 must be at least 1"),
        ({"k_sample": 0}, "k_sample=0 must be at least 1"),
        ({"diffusion_steps": 1, "reverse_steps": 1}, "diffusion_steps=1 must be at least 2"),
        ({"reverse_steps": 0}, "reverse_steps=0 must be at least 1"),
        ({"denoiser_layers": 0}, "denoiser_layers=0 must be at least 1"),
        ({"denoiser_heads": 0}, "denoiser_heads=0 must be at least 1"),
        ({"cl_weight": -0.1}, "cl_weight=-0.1 must be at least 0"),
        ({"diff_weight": -0.1}, "diff_weight=-0.1 must be at least 0"),
        ({"diff_mse_weight": -1.0}, "diff_mse_weight=-1.0 must be at least 0"),
        ({"diff_round_weight": -1.0}, "diff_round_weight=-1.0 must be at least 0"),
        ({"cl_warmup_epochs": -1}, "cl_warmup_epochs=-1 must be at least 0"),
        (
            {"diff_mse_weight": 0.0, "diff_round_weight": 0.0},
            "diff_weight=0.1 weighs nothing: diff_mse_weight=0 and diff_round_weight=0. To train",
        ),
        (
            {"noise_refresh": "epoch", "noise_source": "gaussian"},
            "noise_refresh=epoch keeps the neighbours of all items, which noise_source=gaussian",
        ),
        ({"noise_refresh": "epoch", "catalogue": "approximate"}, "catalogue=approximate does not"),
        ({"aug_ratio": 0.0}, r"aug_ratio=0.0 must lie in \(0, 1\]"),
        ({"aug_ratio": 1.1}, r"aug_ratio=1.1 must lie in \(0, 1\]"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"tau": -0.05}, "tau=-0.05 must be positive"),
        ({"tau": math.nan}, "tau=nan must be positive"),
        ({"cl_weight": math.nan}, "cl_weight=nan must be finite"),
        ({"beta_start": 0.0}, "beta_start=0.0 and beta_end=0.02 must satisfy"),
        ({"beta_start": 0.5}, "0 < beta_start <= beta_end < 1"),
        ({"beta_end": 1.0}, "beta_end=1.0 must satisfy"),
        ({"reverse_steps": 21}, "reverse_steps=21 must not exceed diffusion_steps=20"),
        ({"denoiser_heads": 3}, "hidden_size=8 must be a multiple of denoiser_heads=3"),
        ({"n_heads": 3}, "hidden_size=8 must be a multiple of n_heads=3"),
    ],
)
def test_impossible_values_are_refused(make_config, values, message):
    """Before any data is read."""
    with pytest.raises(UserError, match=message):
        make_config(**values)


def test_without_the_diffusion_loss_its_parts_weigh_nothing(make_config):
    make_config(diff_weight=0.0, diff_mse_weight=0.0, diff_round_weight=0.0)


def test_unknown_choices_are_refused_with_the_known_ones(make_config):
    assert len(OPTIONS) == 14
    for key, allowed in OPTIONS.items():
        with pytest.raises(UserError) as error:
            make_config(**{key: "other"})
        assert str(error.value).startswith(f"{key}='other' is not one of {', '.join(allowed)} (")


def test_every_known_choice_trains(small):
    """One model for each value of each switch."""
    for key, allowed in OPTIONS.items():
        for value in allowed:
            needs = {
                "fixed": {"pad_in_diffusion_loss": True},
                "same_target": {"contrast_at": "every"},
            }.get(value, {})
            loss = seeded_loss(small(**{key: value}, **needs), with_users([1, 2, 3, 4]))
            assert all(torch.isfinite(part) for part in loss), (key, value)


def test_more_neighbours_than_items_are_refused(small):
    """12 items leave 11 neighbours for each."""
    assert small(k_noise=11).k_noise == 11
    message = "k_noise=12 must be smaller than the number of items: the data set has 12, which "
    with pytest.raises(UserError, match=message + "leaves 11 neighbours for each"):
        small(k_noise=12)


def test_ranks_beyond_the_items_are_refused(small):
    assert small(k_sample=12).k_sample == 12
    with pytest.raises(UserError, match="k_sample=13 must not exceed the number of items, 12"):
        small(k_sample=13)


def test_the_last_rank_does_not_exist_without_the_original(small):
    """11 items are left to rank when the item itself is skipped."""
    model = small(k_sample=11, neg_exclude_original=True)
    z_hat = torch.randn(10, 8)
    assert not (replacements(model, z_hat, ITEMS)[1] == ITEMS).any()
    message = "k_sample=12 must not exceed the number of items, 12, one less with neg_exclude"
    with pytest.raises(UserError, match=message):
        small(k_sample=12, neg_exclude_original=True)


# ---------------------------------------------------------------- every target weighs the same


@pytest.mark.parametrize("sampling", ["user_all", "prefix_last", "prefix_all"])
@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_every_target_weighs_the_same_in_any_batch(build, sampling, batch_size):
    """Batches hold rows of similar length, so their sums differ; nothing may divide them out."""
    _, loader, _, _, model = build(
        train_sampling=sampling, train_batch_size=batch_size, cl_weight=0.0, diff_weight=0.0
    )
    model.item_embedding.weight.data.normal_()
    model.eval()
    dataset = loader.dataset
    everything = loader.collate(torch.arange(len(dataset)))
    layout = TokenLayout(everything["item_length"], everything["item_id_list"].shape[1])
    hidden = model.encode(everything["item_id_list"], layout)
    label = model.labels(everything["item_id_list"], layout, everything["item_id"])
    if sampling == "prefix_last":
        hidden, label = hidden[layout.last], everything["item_id"]
    total = F.cross_entropy(hidden @ model.item_embedding.weight.t(), label, reduction="sum")

    n_batches = len(dataset) / min(batch_size, len(dataset))
    assert dataset.targets_per_batch == pytest.approx(len(label) / n_batches)
    for epoch in range(3):
        loader.set_epoch(epoch)
        sizes, losses = [], []
        for batch in loader:
            sizes.append(batch["item_length"].sum().item())
            losses.append(model.calculate_loss(batch).rec.item())
        assert sum(losses) == pytest.approx(total.item() / dataset.targets_per_batch, rel=1e-5)
    assert batch_size == 100 or len(set(sizes)) > 1  # the batches do differ in length


def test_every_token_weighs_the_same_in_the_diffusion_loss(build):
    """The same for L_d, at one step for all."""
    _, loader, _, _, model = build(train_batch_size=2)
    model.item_embedding.weight.data.normal_()
    model.eval()

    def diffusion_loss(batch: Interaction) -> float:
        layout = TokenLayout(batch["item_length"], batch["item_id_list"].shape[1])
        items = layout.pack(batch["item_id_list"])
        t = torch.full_like(batch["item_length"], 9)
        return model.diffusion_loss(items, model.noise(items), t, layout).item()

    everything = loader.collate(torch.arange(len(loader.dataset)))
    parts = [diffusion_loss(batch) for batch in loader]
    assert len(parts) > 1
    assert sum(parts) == pytest.approx(diffusion_loss(everything), rel=1e-5)


# ---------------------------------------------------------------- scores


def test_full_ranking_is_one_matrix_and_predict_its_column(small):
    """Invariant 24."""
    model = small()
    scores = model.full_sort_predict(rows())
    assert isinstance(scores, Tensor)
    assert scores.shape == (4, 13)
    torch.testing.assert_close(model.predict(rows()), scores.gather(1, POS[:, None])[:, 0])


def test_scores_need_no_diffusion_and_no_randomness(small):
    """Invariant 24: the denoiser can be deleted; the random state stays where it was."""
    model = small()
    before = torch.get_rng_state()
    scores = model.full_sort_predict(rows())
    assert torch.equal(torch.get_rng_state(), before)
    bare = copy.deepcopy(model)
    del bare.denoiser, bare.denoiser_encoder, bare.process
    assert torch.equal(bare.full_sort_predict(rows()), scores)


def test_items_of_the_history_stay_in_the_ranking(small):
    """Invariant 29: the model masks nothing, so a past item is among the 5 best of 12."""
    scores = small().full_sort_predict(rows())
    assert torch.isfinite(scores).all()
    top = scores[:, 1:].topk(5).indices + 1
    assert (top.unsqueeze(2) == SEQ.unsqueeze(1)).any()


# ---------------------------------------------------------------- ml-100k


@pytest.fixture(scope="module")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Configuration, training and validation loader of ml-100k at prefix_last."""
    config = Config(
        "SimDiffRec",
        "ml-100k",
        overrides={
            "checkpoint_dir": str(tmp_path_factory.mktemp("saved")),
            "use_gpu": False,
            "train_sampling": "prefix_last",
            "train_batch_size": 64,
            "hidden_dropout_prob": 0.0,
            "attn_dropout_prob": 0.0,
            "cl_weight": 0.0,
            "diff_weight": 0.0,
            "metrics": ["Hit", "NDCG"],
            "topk": [1, 2, 5, 10],
            "valid_metric": "NDCG@10",
        },
    )
    train, valid, _ = create_loaders(config, create_dataset(config))
    return config, train, valid


def seeded(model_class: Any, config: Any, dataset: Any) -> Any:
    torch.manual_seed(11)
    return model_class(config, dataset)


def test_initial_weights_are_sasrecs(movies):
    """Invariant 17: the same seed, the same values, before any diffusion module draws."""
    config, train, _ = movies
    theirs = seeded(SASRec, config, train.dataset).state_dict()
    ours = seeded(SimDiffRec, config, train.dataset).state_dict()
    assert set(theirs) < set(ours)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_loss_gradients_and_scores_are_sasrecs(movies):
    """Invariant 17: both weights 0, prefix_last, a batch of train_batch_size rows."""
    config, train, _ = movies
    theirs = seeded(SASRec, config, train.dataset)
    ours = seeded(SimDiffRec, config, train.dataset)
    index = torch.arange(0, 64 * 97, 97)
    trimmed, padded = train.collate(index), train.dataset[index]
    assert padded["item_id_list"].shape == (64, 50)
    assert padded["item_length"].unique().numel() > 10
    loss = theirs.calculate_loss(padded)
    loss.backward()
    for batch in (trimmed, padded):
        total = sum(ours.calculate_loss(batch))
        torch.testing.assert_close(total, loss, atol=1e-5, rtol=1e-5)
        grads = gradients(ours, total)
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(
                grads.pop(name), parameter.grad, atol=1e-5, rtol=1e-5, msg=name
            )
        assert not any(grad.any() for grad in grads.values())  # what SASRec does not have
        torch.testing.assert_close(
            ours.full_sort_predict(batch), theirs.full_sort_predict(padded), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            ours.predict(batch), theirs.predict(padded), atol=1e-5, rtol=1e-5
        )


def test_three_updates_follow_sasrecs(movies):
    """Invariant 17: the losses that training prints, with RecBole's padded rows."""
    config, train, _ = movies
    models = [seeded(cls, config, train.dataset) for cls in (SASRec, SimDiffRec)]
    batch = train.dataset[torch.arange(0, 64 * 97, 97)]
    values = []
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            loss = model.calculate_loss(batch)
            total = sum(loss) if isinstance(loss, tuple) else loss
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.item())
        values.append(losses)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0][2] < values[0][0] - 1e-3


def ranked_by(monkeypatch: Any, movies: Any, tmp_path: Any, score: Any) -> Any:
    """Metrics of the validation part when the model's scores are ``score(interaction)``."""
    config, train, valid = movies
    model = SimDiffRec(config, train.dataset)
    monkeypatch.setattr(model, "full_sort_predict", score)
    trainer = PlanTrainer(config, model, tmp_path)
    trainer.evaluator.data_collect(train)
    return trainer.evaluator.evaluate(valid)


def test_perfect_scores_get_perfect_metrics(monkeypatch, movies, tmp_path):
    """Invariant 27: the target scores highest, so HR@k = NDCG@k = 1."""

    def score(batch: Interaction) -> Tensor:
        return F.one_hot(batch["item_id"], 1350).float()

    for metrics in ranked_by(monkeypatch, movies, tmp_path, score).values():
        assert set(metrics.values()) == {1.0}
        assert len(metrics) == 8


def test_metrics_of_one_target_obey_their_bounds(monkeypatch, movies, tmp_path):
    """Invariant 27: ranks 6 to 10 earn between 1 / log2(11) and 1 / log2(7) each."""
    generator = torch.Generator().manual_seed(0)

    def score(batch: Interaction) -> Tensor:
        noise = torch.randn(len(batch), 1350, generator=generator)
        return noise + 2.5 * F.one_hot(batch["item_id"], 1350)

    for metrics in ranked_by(monkeypatch, movies, tmp_path, score).values():
        hits = metrics["hit@10"] - metrics["hit@5"]
        assert hits > 0.03
        assert 0.2891 * hits <= metrics["ndcg@10"] - metrics["ndcg@5"] <= 0.3562 * hits


def test_history_is_masked_in_one_protocol_only(monkeypatch, movies, tmp_path):
    """Invariant 29: a past item that scores above the target takes rank 1 when history is kept."""

    def score(batch: Interaction) -> Tensor:
        scores = F.one_hot(batch["item_id"], 1350).float()
        newest = batch["item_id_list"].gather(1, batch["item_length"].unsqueeze(1) - 1)
        return scores.scatter(1, newest, 2.0)

    metrics = ranked_by(monkeypatch, movies, tmp_path, score)
    assert (metrics[KEPT]["hit@1"], metrics[KEPT]["hit@2"]) == (0.0, 1.0)
    assert metrics[REMOVED]["hit@1"] == 1.0


def test_switches_that_would_have_no_effect_are_refused(small):
    with pytest.raises(UserError, match=r"aug_count=fixed .* needs pad_in_diffusion_loss=True"):
        small(aug_count="fixed")
    with pytest.raises(UserError, match="with aug_items=random there is nothing to rank"):
        small(aug_items="random", neg_exclude_original=True)


@pytest.mark.slow
def test_on_ml_100k_the_denoiser_gets_better_while_it_is_trained(tmp_path):
    """As in ``make run``. At first the noise alone tells items apart, until they form clusters."""
    values = {"epochs": 30, "checkpoint_dir": str(tmp_path), "use_gpu": False}
    result = run_one(Config("SimDiffRec", "ml-100k", overrides=values))
    log = json.loads((Path(result.run_dir) / "result.json").read_text())["log"]
    restored = [entry["monitor"]["restored"] for entry in log]
    assert sum(restored[25:]) > 2 * sum(restored[8:13])
    assert log[-1]["monitor"]["restored_selected"] > restored[-1]
