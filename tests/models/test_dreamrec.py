"""DreamRec against its formulas, its closed form against its chain, and on data it must learn."""

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

from recbole_simdiff import checkpoint, load
from recbole_simdiff.checkpoint import BEST, load_model_state
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.diffusion import samplers
from recbole_simdiff.diffusion.process import ForwardProcess
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.dreamrec import OPTIONS, SCHEDULES, DreamRec
from recbole_simdiff.modules.batch import PSEUDO_LENGTH
from recbole_simdiff.modules.transformer import TokenLayout
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import write_inter

MAX_LENGTH = 6
SEQ = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [8, 2, 9, 0, 0, 0]])
LEN = torch.tensor([4, 2, 1, 3])
POS = torch.tensor([10, 3, 4, 6])
USER = torch.tensor([3, 1, 4, 2])
LAYOUT = TokenLayout(LEN, MAX_LENGTH)
ENCODERS = {"official_block": {}, "recbole": {"encoder": "recbole", "n_layers": 2, "n_heads": 2}}
EVERY_ENCODER = pytest.mark.parametrize("encoder", OPTIONS["encoder"])
EVERY_DENOISER = pytest.mark.parametrize("denoiser", OPTIONS["denoiser"])


def rows(**changes: Tensor | None) -> Interaction:
    columns = {"item_id_list": SEQ, "item_length": LEN, "item_id": POS, "user_id": USER} | changes
    return Interaction({key: value for key, value in columns.items() if value is not None})


@pytest.fixture
def small(make_config: Any) -> Any:
    """small(n_items, key=value, ...) -> a model without data, in eval mode, dropout off."""

    def make(n_items: int = 13, data: dict[str, float] | None = None, **overrides: Any) -> Any:
        values: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
        values |= {"MAX_ITEM_LIST_LENGTH": MAX_LENGTH, **overrides}
        config = make_config("DreamRec", **values)
        torch.manual_seed(0)
        dataset = SimpleNamespace(num=lambda field: n_items, **(data or {}))
        return DreamRec(config, dataset).eval()

    return make


def seeded_loss(model: Any, batch: Interaction | None = None, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return model.calculate_loss(rows() if batch is None else batch)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter, zero where the loss does not depend on it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for name, parameter, grad in zip(names, parameters, grads, strict=True)
    }


def forbid_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def trap(*args: Any) -> Any:
        raise AssertionError("the null branch must not be evaluated")

    monkeypatch.setattr(samplers, "classifier_free", trap)


# ---------------------------------------------------------------- encoder


def reference_block(block: Any, embedded: Tensor) -> Tensor:
    """The block of spec section 3.2 for one sequence without padding, word by word, [m, H]."""
    size = embedded.shape[1]

    def norm(module: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
        return centred / scale * module.weight + module.bias

    def linear(module: Any, x: Tensor) -> Tensor:
        return x @ module.weight.t() + module.bias

    normed = norm(block.norm_query, embedded)
    q, k, v = (
        linear(block.query, normed),
        linear(block.key, embedded),
        linear(block.value, embedded),
    )
    width = size // block.n_heads
    attended = torch.zeros_like(q)
    for i in range(len(embedded)):
        for head in range(block.n_heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack([q[i, part] @ k[j, part] for j in range(i + 1)]) / math.sqrt(size)
            attended[i, part] = scores.softmax(0) @ v[: i + 1, part]
    z = norm(block.norm_attention, attended + normed)
    inner = linear(block.outer, linear(block.inner, z).clamp(min=0)) + z
    return norm(block.norm_out, norm(block.norm_forward, inner))


@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_the_block_is_the_released_one(small: Any, n_heads: int) -> None:
    """T16: with boolean masks; the scale is sqrt(H) for any number of heads."""
    model = small(n_heads=n_heads, hidden_size=8).double()
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter)
    states = model.guide(SEQ, LAYOUT, last_only=False)
    newest = model.guide(SEQ, LAYOUT, last_only=True)
    start = 0
    for row, length in enumerate(LEN.tolist()):
        embedded = model.item_embedding.weight[SEQ[row, :length]]
        embedded = embedded + model.position_embedding.weight[:length]
        expected = reference_block(model.encoder, embedded)
        torch.testing.assert_close(states[start : start + length], expected)
        torch.testing.assert_close(newest[row], expected[-1])
        start += length


def test_real_positions_whose_vector_sums_to_zero_still_attend(small: Any) -> None:
    """Released masks drop keys, and queries, whose entries sum to exactly 0."""
    model = small().double()
    model.item_embedding.weight.data[2] = 0.0
    model.position_embedding.weight.data[1] = 0.0
    embedded = model.item_embedding.weight[SEQ[0, :4]] + model.position_embedding.weight[:4]
    assert (embedded[1] == 0).all()
    expected = reference_block(model.encoder, embedded)
    torch.testing.assert_close(model.guide(SEQ, LAYOUT, last_only=False)[:4], expected)


def test_the_other_encoder_is_recboles(small: Any, make_config: Any) -> None:
    """Embeddings normalised, then its Transformer; the state of the newest item."""
    model = small(**ENCODERS["recbole"], layer_norm_eps=1e-3)
    for name, parameter in model.named_parameters():
        if name.startswith(("encoder.", "input_norm.")):
            torch.nn.init.normal_(parameter)
    values = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "layer_norm_eps": 1e-3}
    config = make_config(MAX_ITEM_LIST_LENGTH=MAX_LENGTH, n_layers=2, n_heads=2, **values)
    theirs = SASRec(config, SimpleNamespace(num=lambda field: 13)).eval()
    names = {"encoder": "trm_encoder", "input_norm": "LayerNorm"}
    state = {
        ".".join([names.get(first, first), *rest]): value
        for name, value in model.state_dict().items()
        for first, *rest in [name.split(".")]
        if first not in ("denoiser", "null_guidance")
    }
    theirs.load_state_dict(state)
    torch.testing.assert_close(model.guide(SEQ, LAYOUT, last_only=True), theirs(SEQ, LEN))


@EVERY_ENCODER
def test_cells_beyond_the_length_do_not_count(small: Any, encoder: str) -> None:
    """T15: other ids there leave h bit-identical."""
    model = small(**ENCODERS[encoder])
    other = torch.where(SEQ == 0, 11, SEQ)
    assert torch.equal(
        model.guide(SEQ, LAYOUT, last_only=True), model.guide(other, LAYOUT, last_only=True)
    )


@EVERY_ENCODER
def test_positions_see_the_past_only(small: Any, encoder: str) -> None:
    """T15: changing item j leaves every earlier position as it was, and j itself not."""
    model = small(**ENCODERS[encoder])
    before = LAYOUT.unpack(model.guide(SEQ, LAYOUT, last_only=False))
    for j in range(4):
        seq = SEQ.clone()
        seq[0, j] = 12
        after = LAYOUT.unpack(model.guide(seq, LAYOUT, last_only=False))
        torch.testing.assert_close(after[0, :j], before[0, :j])
        assert not torch.allclose(after[0, j:4], before[0, j:4])
        assert torch.equal(after[1:], before[1:])


@EVERY_ENCODER
def test_guidance_is_the_state_of_the_newest_item(small: Any, encoder: str) -> None:
    """T15: read at len - 1, also for histories of one item."""
    model = small(**ENCODERS[encoder])
    states = LAYOUT.unpack(model.guide(SEQ, LAYOUT, last_only=False))
    newest = torch.stack([states[row, length - 1] for row, length in enumerate(LEN)])
    torch.testing.assert_close(model.guide(SEQ, LAYOUT, last_only=True), newest)


def test_dropout_sits_where_the_released_block_has_it(small: Any) -> None:
    """After the embeddings, on the attention weights and after the feed-forward layer."""
    model = small(hidden_dropout_prob=0.3, attn_dropout_prob=0.4).train()
    assert (model.dropout.p, model.encoder.dropout.p) == (0.3, 0.3)
    assert model.encoder.attn_dropout_prob == 0.4
    for name in ("dropout", "encoder.dropout"):
        only = small(hidden_dropout_prob=0.3).train()
        for other in ("dropout", "encoder.dropout"):
            if other != name:
                only.get_submodule(other).p = 0.0
        first, second = (only.guide(SEQ, LAYOUT, last_only=True) for _ in range(2))
        assert not torch.equal(first, second), name
    only = small(attn_dropout_prob=0.4).train()
    assert not torch.equal(*(only.guide(SEQ, LAYOUT, last_only=True) for _ in range(2)))


def test_dropout_of_the_other_encoder(small: Any) -> None:
    model = small(**ENCODERS["recbole"], hidden_dropout_prob=0.3, attn_dropout_prob=0.4)
    found = {
        name.split(".")[-1]: module.p
        for name, module in model.encoder.named_modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert found == {"attn_dropout": 0.4, "out_dropout": 0.3, "dropout": 0.3}


# ---------------------------------------------------------------- sizes and initial values


@pytest.mark.parametrize(("denoiser", "count"), [("linear", 50_944), ("mlp2", 71_552)])
def test_parameter_count(small: Any, denoiser: str, count: int) -> None:
    """T17: at H = 64 and L = 10, without the item table."""
    model = small(hidden_size=64, MAX_ITEM_LIST_LENGTH=10, denoiser=denoiser)
    counts = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(counts.values()) - counts["item_embedding.weight"] == count


def test_initial_scale(small: Any) -> None:
    """T27: the table and h_0 have the scale of the noise; a generic initialiser would hide them."""
    model = small(2001, hidden_size=64)
    assert model.item_embedding.weight[1:].std().item() == pytest.approx(1.0, rel=0.02)
    assert model.item_embedding.weight[1:].mean().item() == pytest.approx(0.0, abs=0.02)
    assert (model.item_embedding.weight[0] == 0).all()
    assert model.position_embedding.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert model.null_guidance.std().item() == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize("hidden_size", [32, 64, 128])
@EVERY_DENOISER
def test_sizes(small: Any, hidden_size: int, denoiser: str) -> None:
    """T24: other widths, several heads, a batch of one."""
    model = small(hidden_size=hidden_size, n_heads=4, denoiser=denoiser)
    one = rows()[0:1]
    assert model.full_sort_predict(one).shape == (1, 13)
    assert torch.isfinite(seeded_loss(model, one).diffusion)


# ---------------------------------------------------------------- training, Algorithm 1


def by_hand(model: Any, h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates and clean targets, from the draws that ``calculate_loss`` makes, in its order."""
    torch.manual_seed(5)
    e = model.item_embedding.weight[target]
    t = torch.randint(1, 21, (len(target),))
    eps = torch.randn_like(e)
    null = torch.rand(len(target), 1) < model.p_uncond
    bar = (1 - SCHEDULES["exp"](20)).cumprod(0)[t - 1].unsqueeze(1).float()
    x_t = bar.sqrt() * e + (1 - bar).sqrt() * eps
    k = torch.arange(4)
    angle = (t - 1).unsqueeze(1) * torch.exp(-k * math.log(10_000) / 3)
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    first, _, second = model.denoiser.time_mlp
    time = second(F.gelu(first(wave)))
    h = torch.where(null, model.null_guidance, h)
    stacked = torch.cat([x_t, h, time], 1)
    layers = model.denoiser.layers
    if isinstance(layers, torch.nn.Linear):
        return layers(stacked), e
    return layers[2](F.gelu(layers[0](stacked))), e


@EVERY_DENOISER
def test_loss_by_hand(small: Any, denoiser: str) -> None:
    """T18: mean over rows and coordinates of the squared error, for fixed t and eps."""
    model = small(denoiser=denoiser, p_uncond=0.5)
    with torch.no_grad():
        estimate, e = by_hand(model, model.guide(SEQ, LAYOUT, last_only=True), POS)
    loss = seeded_loss(model)
    torch.testing.assert_close(loss.diffusion, ((estimate - e) ** 2).mean())
    assert loss.rec == 0


def test_loss_of_every_position(small: Any) -> None:
    """user_all: the target of a position is the next item, of the newest one the row's."""
    model = small(train_sampling="user_all", p_uncond=0.5)
    target = torch.tensor([2, 3, 4, 10, 6, 3, 4, 2, 9, 6])
    with torch.no_grad():
        estimate, e = by_hand(model, model.guide(SEQ, LAYOUT, last_only=False), target)
    torch.testing.assert_close(seeded_loss(model).diffusion, ((estimate - e) ** 2).mean())


def test_every_position_is_a_row_of_prefixes(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """user_all is prefix_last with its rows merged: guidance and target of each prefix agree."""
    merged = small(train_sampling="user_all").guided_targets(rows())
    prefixes, lengths, targets = [], [], []
    for row, length in enumerate(LEN.tolist()):
        items = [*SEQ[row, :length].tolist(), POS[row].item()]
        for end in range(1, length + 1):
            prefixes.append(items[:end] + [0] * (MAX_LENGTH - end))
            lengths.append(end)
            targets.append(items[end])
    single = small().guided_targets(
        rows(
            item_id_list=torch.tensor(prefixes),
            item_length=torch.tensor(lengths),
            item_id=torch.tensor(targets),
            user_id=None,
        )
    )
    torch.testing.assert_close(merged[0], single[0])
    assert merged[1].tolist() == single[1].tolist() == targets


def test_invented_items_are_no_targets(small: Any) -> None:
    """Nor is the first real item after them."""
    model = small(train_sampling="user_all")
    h, target = model.guided_targets(rows(**{PSEUDO_LENGTH: torch.tensor([2, 0, 0, 1])}))
    assert target.tolist() == [4, 10, 6, 3, 4, 9, 6]
    everything = model.guided_targets(rows())[0]
    torch.testing.assert_close(h, everything[[2, 3, 4, 5, 6, 8, 9]])


@pytest.mark.parametrize("sampling", ["prefix_last", "user_all"])
def test_targets_weigh_alike_in_every_batch(small: Any, sampling: str) -> None:
    """The sum over targets is divided by the expected number, not by the batch's."""
    plain = small(train_sampling=sampling)
    scaled = small(train_sampling=sampling, data={"targets_per_batch": 20.0})
    n = 4 if sampling == "prefix_last" else 10
    expected = seeded_loss(plain).diffusion * n / 20
    torch.testing.assert_close(seeded_loss(scaled).diffusion, expected)


def test_steps_are_uniform_over_all_of_them(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small(diffusion_steps=5), []
    q_sample = ForwardProcess.q_sample

    def spy(self: Any, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        seen.extend(t.tolist())
        assert eps.std() > 0.5
        return q_sample(self, x_0, t, eps)

    monkeypatch.setattr(ForwardProcess, "q_sample", spy)
    for seed in range(250):
        seeded_loss(model, seed=seed)
    counts = torch.tensor(seen).bincount(minlength=6)
    assert counts[0] == 0
    assert ((counts[1:] - 200).abs() < 4 * math.sqrt(1000 * 0.2 * 0.8)).all()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_null_guidance_replaces_whole_rows(small: Any, p: float) -> None:
    """T14: with probability p, row by row, the whole vector."""
    model = small(p_uncond=p, guidance=0.0)
    torch.manual_seed(0)
    h = torch.randn(5000, 8)
    out = model.replace_by_null(h)
    null = (out == model.null_guidance).all(1)
    assert ((out == h).all(1) ^ null).all()
    assert abs(null.float().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / 5000)


def test_null_guidance_and_gradients(small: Any) -> None:
    """T14: replaced rows teach h_0 and not the encoder, the others the reverse."""
    always = small(p_uncond=1.0)
    grads = gradients(always, seeded_loss(always).diffusion)
    assert grads["null_guidance"].any()
    assert not any(g.any() for name, g in grads.items() if name.startswith("encoder."))
    assert not grads["position_embedding.weight"].any()
    never = small(p_uncond=0.0, guidance=0.0)
    grads = gradients(never, seeded_loss(never).diffusion)
    assert not grads["null_guidance"].any()
    assert grads["encoder.query.weight"].any()


def test_without_null_guidance_nothing_is_drawn_for_it(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trap(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("drawn in vain")

    model = small(p_uncond=0.0, guidance=0.0)
    monkeypatch.setattr(torch, "rand", trap)
    seeded_loss(model)


def test_gradient_reaches_history_and_target(small: Any) -> None:
    """T18: the target's embedding is trained through the loss and through x_t; or not at all."""
    history, target_only = [1, 2, 3, 4, 5, 6, 7, 8, 9], 10
    for detach in (False, True):
        model = small(target_detach=detach, p_uncond=0.0, guidance=0.0)
        grad = gradients(model, seeded_loss(model).diffusion)["item_embedding.weight"]
        assert grad[history].any(1).all()
        assert grad[target_only].any() != detach
        assert not grad[[0, 11, 12]].any()


def test_frozen_items_do_not_move(build: Any, tmp_path: Path) -> None:
    """Neither as targets nor in histories, and whatever the loss; all else is trained."""
    for freeze in (False, True):
        values = {"freeze_items": freeze, "ce_weight": 0.1, "weight_decay": 0.1}
        config, train, valid, _, model = build("DreamRec", **values)
        before = copy.deepcopy(model.state_dict())
        trainer = PlanTrainer(config, model, tmp_path / str(freeze))
        trainer.fit(train, valid)
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert ("item_embedding.weight" in moved) != freeze
        assert moved | {"item_embedding.weight"} == before.keys()


def test_gradient_of_the_target_is_complete(small: Any) -> None:
    """T18: d|f(x_t) - e|^2 / de has a part through x_t = a e + ..: 2 (a A - I)^T (f - e)."""
    model = small(p_uncond=1.0)
    estimate, e = by_hand(model, torch.zeros(4, 8), POS)
    torch.manual_seed(5)
    t = torch.randint(1, 21, (4,))
    a = model.denoiser.layers.weight[:, :8]
    row = 0  # item 10 is a target once, and in no history
    jacobian = model.process.signal[t[row]].float() * a - torch.eye(8)
    expected = 2 * jacobian.t() @ (estimate - e)[row] / (4 * 8)
    grad = gradients(model, seeded_loss(model).diffusion)["item_embedding.weight"]
    torch.testing.assert_close(grad[10], expected)


def test_cross_entropy_of_the_estimate(small: Any) -> None:
    """The optional softmax ranks the real items by their inner product with the estimate."""
    model = small(ce_weight=0.3, p_uncond=0.5)
    with torch.no_grad():
        estimate, _ = by_hand(model, model.guide(SEQ, LAYOUT, last_only=True), POS)
    loss = seeded_loss(model)
    table = model.item_embedding.weight[1:]
    torch.testing.assert_close(loss.rec, 0.3 * F.cross_entropy(estimate @ table.t(), POS - 1))
    plain = small(p_uncond=0.5)
    torch.testing.assert_close(loss.diffusion, seeded_loss(plain).diffusion)


def test_cross_entropy_from_pure_noise(small: Any) -> None:
    """ce_steps=last: other targets in x_t leave it as it is, at a noise of its own and step T."""
    model = small(ce_weight=1.0, ce_steps="last", p_uncond=0.0, guidance=0.0)
    found = seeded_loss(model)
    torch.manual_seed(5)
    torch.randint(1, 21, (4,))
    torch.randn(4, 8)
    start, last = torch.randn(4, 8), torch.full((4,), 20)
    h = model.guide(SEQ, LAYOUT, last_only=True)
    logits = (
        model.denoiser(start, h, model.denoiser.time(last)) @ model.item_embedding.weight[1:].t()
    )
    torch.testing.assert_close(found.rec, F.cross_entropy(logits, POS - 1))
    torch.testing.assert_close(
        found.diffusion, seeded_loss(small(p_uncond=0.0, guidance=0.0)).diffusion
    )


def test_the_loss_is_zero_where_all_items_coincide(small: Any) -> None:
    """T19: why the monitors exist. Rank 1 and cosine 1 tell."""
    model = small()
    row = torch.randn(8)
    with torch.no_grad():
        model.item_embedding.weight[1:] = row
        model.denoiser.layers.weight.zero_()
        model.denoiser.layers.bias.copy_(row)
    assert seeded_loss(model).diffusion.item() == 0.0
    assert model.monitored()["item_rank"].item() == pytest.approx(1.0, abs=1e-5)
    assert model.monitored()["item_cosine"].item() == pytest.approx(1.0, abs=1e-5)
    assert model.monitored()["item_norm"].item() == pytest.approx(row.norm().item(), rel=1e-5)


def test_monitors_by_hand(small: Any) -> None:
    """Distinct targets only: an item that is often a target is not similar to itself."""
    model = small()
    with torch.no_grad():
        model.item_embedding.weight[1:4] = torch.eye(8)[:3] * torch.tensor([[1.0], [2.0], [3.0]])
        model.item_embedding.weight[4] = torch.eye(8)[0] * 6
    found = model.collapse(torch.tensor([1, 2, 2, 3, 1]))
    assert found["item_norm"].item() == pytest.approx(2.0)
    assert found["item_cosine"].item() == pytest.approx(0.0, abs=1e-6)
    assert found["item_rank"].item() == pytest.approx(3.0)
    found = model.collapse(torch.tensor([1, 4, 2]))
    assert found["item_cosine"].item() == pytest.approx(1 / 3)
    assert found["item_rank"].item() == pytest.approx(9 / 5)  # eigenvalues 2 and 1
    assert model.collapse(torch.tensor([2]))["item_cosine"].item() == 0.0


# ---------------------------------------------------------------- closed form of the chain


def randomise(model: Any) -> None:
    """Random affine denoiser of gain below 1 everywhere, so that no chain explodes."""
    layer = model.denoiser.layers
    torch.nn.init.normal_(layer.weight, std=0.2)
    torch.nn.init.normal_(layer.bias)


def chain(model: Any, h: Tensor, draw: Any) -> Tensor:
    twin = copy.copy(model)
    twin.sampler = "ddpm"
    return twin.sample(h, draw)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 50, 500])
@torch.no_grad()
def test_closed_form_equals_the_chain(small: Any, schedule: str, n_steps: int) -> None:
    """T8: to 1e-9 in float64 with the noise off, from any x_T, for any w."""
    model = small(diffusion_steps=n_steps, beta_schedule=schedule).double()
    randomise(model)
    h, start = torch.randn(2, 3, 8, dtype=torch.float64)
    dist = model.chain_distribution()
    for w in (0.0, 2.0, 10.0):
        model.guidance, first = w, iter([start])
        expected = chain(model, h, lambda x, first=first: next(first, torch.zeros_like(x)))
        h_guided = (1 + w) * h - w * model.null_guidance
        found = start @ dist.start.t() + h_guided @ dist.gain.t() + dist.offset
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
        mean = chain(model, h, torch.zeros_like)
        torch.testing.assert_close(model.sample(h, torch.zeros_like), mean, atol=1e-9, rtol=1e-9)


def test_closed_form_has_the_distribution_of_the_chain(small: Any) -> None:
    """T9: mean and covariance of 20,000 samples of both kinds, to 5 standard errors."""
    n, size = 20_000, 4
    model = small(hidden_size=size, diffusion_steps=20, guidance=1.0).double()
    randomise(model)
    h = torch.randn(1, size, dtype=torch.float64)
    dist = model.chain_distribution()
    mean = (2 * h - model.null_guidance) @ dist.gain.t() + dist.offset
    covariance = dist.noise + dist.start @ dist.start.t()
    torch.testing.assert_close(dist.root @ dist.root, covariance)
    torch.testing.assert_close(dist.root, dist.root.t())
    torch.manual_seed(1)
    with torch.no_grad():
        for sample in (
            chain(model, h.expand(n, size), torch.randn_like),
            model.sample(h.expand(n, size), torch.randn_like),
        ):
            centred = sample - mean
            error = covariance.diagonal().sqrt() / math.sqrt(n)
            assert (centred.mean(0).abs() < 5 * error).all()
            found = centred.t() @ centred / n
            spread = covariance.diagonal().outer(covariance.diagonal()) + covariance**2
            assert ((found - covariance).abs() < 5 * (spread / n).sqrt()).all()


def test_the_distribution_follows_the_weights(small: Any) -> None:
    """It is kept between batches and made anew after any change, however it was made."""
    model = small()
    first = model.chain_distribution()
    assert model.chain_distribution() is first
    model.denoiser.layers.weight.data.mul_(0.5)
    second = model.chain_distribution()
    assert not torch.allclose(first.gain, second.gain)
    model.denoiser.time_mlp[0].bias.data.add_(1.0)
    assert not torch.allclose(model.chain_distribution().offset, second.offset)


# ---------------------------------------------------------------- a network of another width


@EVERY_ENCODER
@EVERY_DENOISER
def test_a_width_with_trivial_projections_is_the_plain_form(
    small: Any, encoder: str, denoiser: str
) -> None:
    """Loss and scores agree where both projections are the identity."""
    plain = small(**ENCODERS[encoder], denoiser=denoiser)
    wide = small(**ENCODERS[encoder], denoiser=denoiser, width=8)
    wide.load_state_dict(plain.state_dict(), strict=False)
    for projection in (wide.item_projection, wide.denoiser.project):
        projection.weight.data = torch.eye(8)
    torch.testing.assert_close(seeded_loss(wide), seeded_loss(plain))
    torch.testing.assert_close(wide.full_sort_predict(rows()), plain.full_sort_predict(rows()))


def test_only_projections_depend_on_the_item_vectors(small: Any) -> None:
    """All else has the width, but for the output of the denoiser."""
    model = small(hidden_size=40, width=4, n_heads=2, encoder="recbole", n_layers=2)
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    wide = {name: tuple(shape) for name, shape in sizes.items() if 40 in shape}
    assert wide == {
        "item_embedding.weight": (13, 40),
        "item_projection.weight": (4, 40),
        "denoiser.project.weight": (4, 40),
        "denoiser.layers.weight": (40, 12),
        "denoiser.layers.bias": (40,),
    }
    assert model.null_guidance.shape == (4,)


def test_projected_items_have_the_scale_of_the_positions(small: Any) -> None:
    model = small(2001, hidden_size=256, width=32)
    for projection in (model.item_projection, model.denoiser.project):
        projected = projection(model.item_embedding.weight[1:])
        assert projected.std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("width", [2, 4, 6])
@torch.no_grad()
def test_closed_form_of_a_narrow_network_equals_the_chain(small: Any, width: int) -> None:
    """Also where A has so low a rank that the chain is composed in fewer dimensions."""
    model = small(hidden_size=10, width=width, diffusion_steps=50).double()
    randomise(model)
    h, start = torch.randn(3, width).double(), torch.randn(3, 10).double()
    for w in (0.0, 2.0):
        model.guidance, first = w, iter([start])
        expected = chain(model, h, lambda x, first=first: next(first, torch.zeros_like(x)))
        dist = model.chain_distribution()
        h_guided = (1 + w) * h - w * model.null_guidance
        found = start @ dist.start.t() + h_guided @ dist.gain.t() + dist.offset
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
        mean = chain(model, h, torch.zeros_like)
        torch.testing.assert_close(model.sample(h, torch.zeros_like), mean, atol=1e-9, rtol=1e-9)


@EVERY_DENOISER
@pytest.mark.parametrize("sampler", ["auto", "ddim", "ddpm"])
def test_samples_of_a_narrow_network(small: Any, denoiser: str, sampler: str) -> None:
    """Numbers are drawn for item vectors, and every sampler scores all items."""
    model = small(hidden_size=20, width=4, denoiser=denoiser, sampler=sampler, sample_steps=5)
    assert model.generate(rows()).shape == (4, 20)
    scores = model.full_sort_predict(rows())
    assert scores.shape == (4, 13)
    assert torch.isfinite(scores).all()


@EVERY_ENCODER
@pytest.mark.parametrize("width", [None, 4])
def test_histories_in_vectors_of_their_own(small: Any, encoder: str, width: int | None) -> None:
    """The same as shared ones where these are projected into it; targets are read elsewhere."""
    values: dict[str, Any] = {**ENCODERS[encoder], "width": width}
    shared, own = small(**values), small(**values, history_items="own")
    assert tuple(own.history_embedding.weight.shape) == (13, width or 8)
    assert own.history_embedding.weight[1:].std().item() == pytest.approx(1.0, rel=0.3)
    state = shared.state_dict()
    state.pop("item_projection.weight", None)
    own.load_state_dict(state, strict=False)
    own.history_embedding.weight.data = shared.item_projection(shared.item_embedding.weight).data
    torch.testing.assert_close(seeded_loss(own), seeded_loss(shared))
    torch.testing.assert_close(own.full_sort_predict(rows()), shared.full_sort_predict(rows()))


def test_frozen_targets_and_trained_histories(small: Any) -> None:
    """Gradients reach the vectors of the history's items, and no target's."""
    model = small(history_items="own", freeze_items=True, p_uncond=0.0, guidance=0.0)
    loss = seeded_loss(model).diffusion
    (grad,) = torch.autograd.grad(loss, [model.history_embedding.weight])
    assert grad[1:10].any(1).all()
    assert not grad[[0, 10, 11, 12]].any()
    assert not model.item_embedding.weight.requires_grad


class Largest(TorchDispatchMode):
    """Within the block, the size of the largest new tensor is noted."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None:
            self.numel = max(self.numel, out.numel())
        return out


def test_a_step_on_frozen_items_does_not_grow_with_them(small: Any) -> None:
    """Neither [n, N] nor [N, H] is made, forwards or backwards; the trained table's gradient is."""
    sizes = {}
    for freeze in (True, False):
        model = small(5001, hidden_size=32, width=4, freeze_items=freeze).train()
        with Largest() as seen:
            sum(seeded_loss(model)).backward()
        sizes[freeze] = seen.numel
    assert sizes[True] < 5001
    assert sizes[False] >= 5001 * 32


def test_frozen_items_take_no_memory_of_the_optimizer(build: Any, tmp_path: Path) -> None:
    """Adam has two numbers for each number that is trained, and none for the others."""
    kept = {}
    for freeze in (True, False):
        config, train, valid, _, model = build("DreamRec", freeze_items=freeze, hidden_size=16)
        trainer = PlanTrainer(config, model, tmp_path / str(freeze))
        trainer.fit(train, valid)
        state = [s for o in trainer.optimizers.values() for s in o.state.values()]
        kept[freeze] = sum(v.numel() for s in state for v in s.values() if v.dim() > 0)
    assert kept[False] - kept[True] == 2 * model.item_embedding.weight.numel()


# ---------------------------------------------------------------- guidance


@EVERY_DENOISER
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "closed_form"])
def test_without_guidance_the_null_branch_is_not_evaluated(
    small: Any, monkeypatch: pytest.MonkeyPatch, sampler: str, denoiser: str
) -> None:
    """T11: and the result is the conditional chain's, bit for bit."""
    if (sampler, denoiser) == ("closed_form", "mlp2"):
        sampler = "auto"  # the chain
    model = small(denoiser=denoiser, sampler=sampler, guidance=0.0, sample_steps=5)
    if sampler in ("ddpm", "auto") and denoiser == "mlp2":
        h = model.guide(SEQ, LAYOUT, last_only=True)
        time = model.denoiser.time(torch.arange(1, 21))
        expected = samplers.ancestral(
            lambda x, t: model.denoiser(x, h, time[t - 1]),
            torch.zeros_like(h),
            model.process,
            torch.arange(20, -1, -1),
            torch.zeros_like,
        )
        assert torch.equal(model.sample(h, torch.zeros_like), expected)
    forbid_null(monkeypatch)
    model.full_sort_predict(rows())
    model.guidance = 1.0
    with pytest.raises(AssertionError, match="null branch"):
        model.full_sort_predict(rows())


@EVERY_DENOISER
def test_guided_estimate_is_affine_in_its_strength(small: Any, denoiser: str) -> None:
    """T12: three points on a line; for the affine denoiser it is one call at h~."""
    model = small(denoiser=denoiser).double()
    x, h = torch.randn(2, 4, 8, dtype=torch.float64)
    time = model.denoiser.time(torch.tensor([3, 9, 1, 20]))
    estimates = []
    for model.guidance in (0.0, 1.0, 5.0):
        estimates.append(model.guided_estimate(x, h, time))
    at_0, at_1, at_5 = estimates
    torch.testing.assert_close(at_5, at_0 + 5 * (at_1 - at_0))
    assert not torch.allclose(at_0, at_1)
    one_call = model.denoiser(x, 6 * h - 5 * model.null_guidance, time)
    assert torch.allclose(one_call, at_5) == (denoiser == "linear")


@pytest.mark.parametrize("sampler", ["closed_form", "ddpm", "ddim"])
def test_null_guidance_makes_the_strength_irrelevant(small: Any, sampler: str) -> None:
    """T13: h = h_0."""
    model = small(sampler=sampler, sample_steps=5).double()
    h = model.null_guidance.expand(3, 8)
    results = []
    for model.guidance in (0.0, 2.0, 10.0):
        results.append(model.sample(h, torch.zeros_like))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


# ---------------------------------------------------------------- samplers and their noise


def test_auto_takes_the_closed_form_where_there_is_one(small: Any) -> None:
    assert small().sampler == "closed_form"
    assert small(denoiser="mlp2").sampler == "ddpm"
    assert small(sampler="ddim", sample_steps=5).sampler == "ddim"


def test_samplers_agree_with_the_shared_ones(small: Any) -> None:
    """ddpm visits T..1; ddim an even selection that begins at T, where pure noise belongs."""
    model, calls = small(denoiser="mlp2", sampler="ddim", sample_steps=4), []
    estimate = model.guided_estimate

    def spy(x: Tensor, h: Tensor, time: Tensor) -> Tensor:
        calls.append(time[0])
        return estimate(x, h, time)

    model.guided_estimate = spy
    h = torch.randn(2, 8)
    visited = {"ddim": [20, 15, 10, 5], "ddpm": list(range(20, 0, -1))}
    for model.sampler, steps in visited.items():
        calls.clear()
        with torch.no_grad():
            model.sample(h, torch.zeros_like)
            torch.testing.assert_close(torch.stack(calls), model.denoiser.time(torch.tensor(steps)))


SETTINGS = [
    {"denoiser": "linear"},
    {"denoiser": "linear", "n_samples": 3},
    {"denoiser": "mlp2"},
    {"denoiser": "mlp2", "sampler": "ddim", "sample_steps": 5, "n_samples": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_users_sample_is_the_users_own(small: Any, settings: dict[str, Any]) -> None:
    """T20: it does not depend on the batch, on the order of rows, or on earlier evaluations."""
    model = small(**settings)
    whole = model.full_sort_predict(rows())
    assert torch.equal(model.full_sort_predict(rows()), whole)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(model.full_sort_predict(rows()[order]), whole[order])
    for i in range(4):
        torch.testing.assert_close(model.full_sort_predict(rows()[i : i + 1]), whole[i : i + 1])
    other_user = model.full_sort_predict(rows(user_id=torch.tensor([3, 1, 5, 2])))
    changed = [not torch.allclose(a, b) for a, b in zip(whole, other_user, strict=True)]
    assert changed == [False, False, True, False]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_evaluation_leaves_the_global_generator_alone(small: Any, settings: dict[str, Any]) -> None:
    """T20: so that training does not depend on how often it is evaluated."""
    model = small(**settings)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model.full_sort_predict(rows())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_sampling_seed_changes_the_sample(small: Any, settings: dict[str, Any]) -> None:
    """And nothing else does; it may be changed on a finished model."""
    model = small(**settings)
    first = model.full_sort_predict(rows())
    assert model.reseed_sampling(model.sampling_seed + 1)
    second = model.full_sort_predict(rows())
    assert not torch.allclose(first, second)
    model.reseed_sampling(model.sampling_seed - 1)
    assert torch.equal(model.full_sort_predict(rows()), first)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_without_users_or_noise_the_numbers_are_their_mean(
    small: Any, settings: dict[str, Any]
) -> None:
    """A history alone (recommendations from a checkpoint) gets 0 for every Gaussian number."""
    model = small(**settings)
    noisy = model.full_sort_predict(rows())
    anonymous = model.full_sort_predict(rows(user_id=None))
    model.sample_noise = False
    assert torch.equal(model.full_sort_predict(rows()), anonymous)
    assert not torch.allclose(noisy, anonymous)
    assert not model.reseed_sampling(model.sampling_seed + 1)
    assert torch.equal(model.full_sort_predict(rows()), anonymous)


def test_user_numbers_are_standard_normal(small: Any) -> None:
    """Across users, coordinates, successive draws and seeds; one stream goes on at each call."""
    model = small()
    users = torch.arange(1, 501)
    draw = model.gaussian(users)
    first, second = draw(torch.zeros(500, 40)), draw(torch.zeros(500, 40))
    model.reseed_sampling(model.sampling_seed + 1)
    other = model.gaussian(users)(torch.zeros(500, 40))
    numbers = torch.cat([first, second, other], 1)
    assert numbers.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(numbers.numel()))
    assert numbers.var().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / numbers.numel()))
    correlation = torch.corrcoef(numbers.t())
    off = correlation - torch.eye(120)
    assert off.abs().max() < 6 / math.sqrt(500)
    assert torch.corrcoef(first[:60]).sub(torch.eye(60)).abs().max() < 6 / math.sqrt(40)
    assert draw(torch.zeros(500, 3, dtype=torch.float64)).dtype == torch.float64


def test_samples_are_averaged(small: Any) -> None:
    """n_samples: the mean of successive samples of the same users."""
    one, three = small(denoiser="mlp2"), small(denoiser="mlp2", n_samples=3)
    h = one.guide(SEQ, LAYOUT, last_only=True)
    with torch.no_grad():
        draw = one.gaussian(USER)
        singles = [one.sample(h, draw) for _ in range(3)]
    assert not torch.allclose(singles[0], singles[1])
    generated = three.generate(rows())
    torch.testing.assert_close(generated, torch.stack(singles).mean(0))
    assert not generated.requires_grad  # nor does any step of the chain


def test_more_samples_come_closer_to_the_mean(small: Any) -> None:
    model = small(diffusion_steps=2)
    randomise(model)
    noisy = model.generate(rows())
    mean = model.generate(rows(user_id=None))
    model.n_samples = 400
    assert (model.generate(rows()) - mean).norm() < 0.2 * (noisy - mean).norm()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_dropout_is_off_in_evaluation(small: Any, settings: dict[str, Any]) -> None:
    """T22: the released evaluation leaves it on."""
    model = small(hidden_dropout_prob=0.5, attn_dropout_prob=0.5, **settings)
    first, second = (model.full_sort_predict(rows()) for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    assert not torch.allclose(model.full_sort_predict(rows()), first)


# ---------------------------------------------------------------- ranking


def test_scores_by_hand(small: Any) -> None:
    model = small()
    x_0, table = model.generate(rows()), model.item_embedding.weight
    model.score = "ip"
    torch.testing.assert_close(model.full_sort_predict(rows()), x_0 @ table.t())
    model.score = "cos"
    cosine = F.cosine_similarity(x_0.unsqueeze(1), table.unsqueeze(0), dim=-1)
    torch.testing.assert_close(model.full_sort_predict(rows()), cosine)
    model.score = "l2"
    found = model.full_sort_predict(rows())
    distance = torch.cdist(x_0, table)
    assert torch.equal(found.argsort(1), (-distance).argsort(1))
    torch.testing.assert_close(
        found - found[:, :1], (distance[:, :1] ** 2 - distance**2) / 2, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("score", OPTIONS["score"])
@EVERY_DENOISER
def test_predict_agrees_with_full_sort_predict(small: Any, score: str, denoiser: str) -> None:
    """T21: on every (user, item) pair, for any w of the paper's range."""
    model = small(score=score, denoiser=denoiser)
    for model.guidance in (0.0, 10.0):
        scores = model.full_sort_predict(rows())
        assert scores.shape == (4, 13)
        assert torch.isfinite(scores).all()
        for item in range(1, 13):
            column = model.predict(rows(item_id=torch.full((4,), item)))
            torch.testing.assert_close(column, scores[:, item], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "gru"}, "encoder='gru' is not one of official_block, recbole"),
        ({"beta_schedule": "quad"}, "beta_schedule='quad' is not one of exp, linear"),
        ({"denoiser": "mlp3"}, "denoiser='mlp3' is not one of linear, mlp2"),
        ({"history_items": "none"}, "history_items='none' is not one of shared, own"),
        ({"ce_steps": "first"}, "ce_steps='first' is not one of all, last"),
        ({"sampler": "dpm"}, "sampler='dpm' is not one of auto, closed_form"),
        ({"score": "dot"}, "score='dot' is not one of ip, cos, l2"),
        ({"denoiser": "mlp2", "sampler": "closed_form"}, "sampler=closed_form must go with den"),
        ({"sampler": "ddim", "sample_steps": 21}, "sample_steps=21 must not exceed diffusion_s"),
        ({"n_layers": 2}, "n_layers=2 must be 1 with encoder=official_block"),
        ({"n_heads": 3, "width": 4}, "width=4 must be a multiple of n_heads=3"),
        ({"width": 0}, "width=0 must be at least 1, or ~"),
        ({"width": 4.5}, "width=4.5 must be at least 1, or ~"),
        ({"n_heads": 3}, "hidden_size=8 must be a multiple of n_heads=3"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob=1.0 must lie in \[0, 1\)"),
        ({"attn_dropout_prob": -0.1}, r"attn_dropout_prob=-0.1 must lie in \[0, 1"),
        ({"p_uncond": 1.5}, r"p_uncond=1.5 must lie in \[0, 1\]"),
        ({"p_uncond": 0.0}, "guidance=2.0 must be 0 with p_uncond=0"),
        ({"guidance": -1.0}, "guidance=-1.0 must be at least 0"),
        ({"diffusion_steps": 0}, "diffusion_steps=0 must be at least 1"),
        ({"n_samples": 0}, "n_samples=0 must be at least 1"),
        ({"sampling_seed": -1}, "sampling_seed=-1 must be at least 0"),
        ({"ce_weight": math.nan}, "ce_weight=nan must be finite"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(
    make_config: Any, change: dict[str, Any], message: str
) -> None:
    """T10 among them, before any data is read."""
    with pytest.raises(UserError, match=message):
        make_config("DreamRec", **change)


def test_a_schedule_that_never_reaches_noise_is_named(
    small: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        small(beta_schedule="exp", diffusion_steps=500)
    assert caplog.text == ""
    with caplog.at_level("WARNING"):
        small(beta_schedule="linear", diffusion_steps=100)
    assert "diffusion_steps=100 leaves 0.60 of the signal at its last step" in caplog.text


def test_evaluation_keys_are_settings(small: Any) -> None:
    """Each is in the yaml, and an attribute that acts when it is changed on a finished model."""
    own = read_yaml(properties_dir() / "model" / "DreamRec.yaml")
    assert set(DreamRec.evaluation_keys) <= set(own)
    model = small(denoiser="linear", sampler="ddpm", sample_steps=4)
    before = model.full_sort_predict(rows())
    changes = {
        "guidance": 0.0,
        "sampler": "ddim",
        "sample_noise": False,
        "n_samples": 2,
        "sampling_seed": 1,
        "score": "ip",
    }
    others = {"sample_steps", "sampling_seeds"}
    assert set(changes) | others == set(DreamRec.evaluation_keys)
    for key, value in changes.items():
        other = copy.copy(model)
        setattr(other, key, value)
        assert not torch.allclose(other.full_sort_predict(rows()), before), key
    model.sampler = "ddim"
    before = model.full_sort_predict(rows())
    model.sample_steps = 2
    assert not torch.allclose(model.full_sort_predict(rows()), before)


def test_the_released_settings() -> None:
    """Where the preset differs from the default, and where the default is already the release's."""
    official = Config("DreamRec", "amazon-beauty", overrides={"preset": "official"})
    expected = {
        "MAX_ITEM_LIST_LENGTH": 10,
        "train_sampling": "prefix_last",
        "hidden_size": 64,
        "hidden_dropout_prob": 0.1,
        "attn_dropout_prob": 0.1,
        "p_uncond": 0.1,
        "diffusion_steps": 500,
        "beta_schedule": "exp",
        "denoiser": "linear",
        "guidance": 2.0,
        "score": "ip",
        "ce_weight": 0.0,
        "target_detach": False,
        "learner": "adamw",
        "learning_rate": 0.001,
        "weight_decay": 0.0,
        "train_batch_size": 256,
        "epochs": 1000,
        "eval_step": 10,
        "seed": 100,
    }
    assert {key: official[key] for key in expected} == expected


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def trained(make_config: Any) -> Any:
    """(run folder, its result) of two epochs on toy."""
    result = run(make_config("DreamRec"))
    return Path(result.run_dir), result


def test_metrics_repeat_and_do_not_depend_on_the_batch(build: Any, tmp_path: Path) -> None:
    """T20: closed form and chains alike."""
    results = []
    for size in (2, 256):
        for denoiser in OPTIONS["denoiser"]:
            config, _, valid, _, model = build("DreamRec", eval_batch_size=size, denoiser=denoiser)
            trainer = PlanTrainer(config, model, tmp_path)
            first = trainer.evaluator.evaluate(valid)
            assert trainer.evaluator.evaluate(valid) == first
            results.append(first)
    assert results[:2] == results[2:]


def test_losses_do_not_depend_on_evaluations(make_config: Any) -> None:
    """T20: the same losses with an evaluation after every epoch and with none."""
    losses = []
    for eval_step in (1, 10):
        result = run(make_config("DreamRec", eval_step=eval_step, epochs=3))
        log = json.loads((Path(result.run_dir) / "result.json").read_text())["log"]
        losses.append([entry["loss"] for entry in log])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_a_checkpoint_restores_the_scores(trained: Any, make_config: Any) -> None:
    """T25: also with another w and sampler; the tables are made anew, not stored."""
    tensors, _ = checkpoint.load(trained[0] / BEST)
    state = checkpoint.subset(tensors, "model")
    assert not [name for name in state if name.startswith("process")]
    scores = []
    for changes in ({}, {}, {"guidance": 5.0}, {"sampler": "ddpm", "score": "ip"}):
        config = make_config("DreamRec", **changes)
        dataset = create_dataset(config)
        train, _, test = create_loaders(config, dataset)
        model = DreamRec(config, train._dataset).eval()
        load_model_state(model, state, trained[0])
        scores.append(model.full_sort_predict(next(iter(test))[0]))
    assert torch.equal(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])
    assert not torch.allclose(scores[0], scores[3])


def test_a_checkpoint_recommends_without_the_data(trained: Any) -> None:
    """Without a user, the mean of what is generated; hence the same list every time."""
    recommender = load(trained[0], use_gpu=False)
    first, second = (recommender.recommend([["i1", "i2"], ["i5"]], k=3) for _ in range(2))
    assert first == second
    assert all(len(found.items) == 3 for found in first)
    seq = torch.tensor([[recommender._number["i5"], 0, 0, 0]])
    batch = Interaction({"item_id_list": seq, "item_length": torch.tensor([1])})
    model = recommender.model
    model.sample_noise = False
    scores = model.full_sort_predict(batch)[0]
    assert first[1].scores[0] == pytest.approx(
        scores[recommender._number[first[1].items[0]]].item()
    )


HELD_OUT = {  # the last two items of each user occur nowhere else
    user: [f"i{(start + j) % 6}" for j in range(5)] + [f"{user}-valid", f"{user}-test"]
    for user, start in (("a", 0), ("b", 2), ("c", 3), ("d", 5))
}


@pytest.mark.parametrize("sampling", ["prefix_last", "user_all"])
def test_held_out_items_never_enter_training(
    make_config: Any, tmp_path: Path, sampling: str
) -> None:
    """T23: no training batch has them, and other ones leave the weights bit-identical."""
    weights = []
    for swap in (False, True):
        sequences = {user: list(items) for user, items in HELD_OUT.items()}
        if swap:  # with those of another user; all ids keep their numbers
            for items, other in zip(sequences.values(), reversed(HELD_OUT), strict=True):
                items[5:] = [f"{other}-test", f"{other}-valid"]
        path = tmp_path / f"swap{swap}"
        write_inter(path, "leak", sequences)
        config = make_config("DreamRec", "leak", data_path=str(path), train_sampling=sampling)
        dataset = create_dataset(config)
        train, valid, _ = create_loaders(config, dataset)
        names = dataset.field2id_token["item_id"]
        columns = ("item_id_list", "item_id")
        seen = {names[i] for b in train for c in columns for i in b[c].flatten().tolist() if i}
        assert seen == {f"i{n}" for n in range(6)}
        torch.manual_seed(0)
        model = DreamRec(config, train._dataset)
        PlanTrainer(config, model, path / "run").fit(train, valid)
        state = model.state_dict()
        state.pop("item_embedding.weight")
        shared = [i for i, name in enumerate(names) if str(name) in seen]
        weights.append(state | {"items": model.item_embedding.weight.detach()[shared]})
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


def test_it_can_overfit(small: Any) -> None:
    """T26: 50 users, 30 orthonormal frozen items; mlp2 and DDIM find nearly all next items."""
    torch.manual_seed(0)
    seq = torch.randint(1, 31, (50, MAX_LENGTH))
    batch = Interaction(
        {
            "item_id_list": seq,
            "item_length": torch.full((50,), MAX_LENGTH),
            "item_id": torch.randint(1, 31, (50,)),
            "user_id": torch.arange(1, 51),
        }
    )
    model = small(
        31,
        hidden_size=32,
        denoiser="mlp2",
        sampler="ddim",
        sample_steps=50,
        diffusion_steps=100,
        guidance=0.0,
    ).train()
    basis = torch.linalg.qr(torch.randn(32, 32)).Q * math.sqrt(32)
    model.item_embedding.weight.data[1:] = basis[:30]
    model.item_embedding.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 3e-3, weight_decay=0.0
    )
    for _ in range(600):
        optimizer.zero_grad()
        model.calculate_loss(batch).diffusion.backward()
        optimizer.step()
    model.eval()
    found = []
    for steps in (1, 5, 10, 50, 100):
        model.sample_steps = steps
        scores = model.full_sort_predict(batch)
        found.append((scores.argmax(1) == batch["item_id"]).float().mean().item())
    assert found == sorted(found)  # a longer chain adds to what one prediction knows
    assert min(found[1:]) >= 0.95


@pytest.mark.parametrize("std", [1.0, 0.02])
def test_items_and_positions_begin_at_the_given_scale(build: Any, std: float) -> None:
    *_, model = build("DreamRec", initializer_range=std, hidden_size=64)
    for table in (model.item_embedding, model.position_embedding):
        assert table.weight[1:].std().item() == pytest.approx(std, rel=0.1)
