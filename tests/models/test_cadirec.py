"""CaDiRec against its formulas, against naive code, and on data it must learn."""

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_simdiff.config.config import Config
from recbole_simdiff.diffusion.denoisers import timestep_embedding
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.cadirec import OPTIONS, CaDiRec, DiffCLRec, Noised
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.losses import nt_xent
from recbole_simdiff.modules.transformer import PackedTransformer, RelativeTransformer, TokenLayout
from tests.conftest import write_inter

MAX_LENGTH = 6
SEQ = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [8, 2, 9, 0, 0, 0]])
LEN = torch.tensor([4, 2, 1, 3])
POS = torch.tensor([10, 3, 4, 6])
REAL = torch.arange(MAX_LENGTH) < LEN.unsqueeze(1)
ITEMS = SEQ[REAL]
LAYOUT = TokenLayout(LEN, MAX_LENGTH)
T = 20


def rows(seq: Tensor = SEQ, length: Tensor = LEN, pos: Tensor = POS) -> Interaction:
    return Interaction({"item_id_list": seq, "item_length": length, "item_id": pos})


@pytest.fixture
def small(make_config: Any) -> Any:
    """small(n_items, key=value, ...) -> a model without data, in eval mode, dropout off.

    The item table is standard normal: at its initial 0.02 every ranking is decided by rounding.
    """

    def make(n_items: int = 13, **overrides: Any) -> Any:
        values: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
        values |= {"MAX_ITEM_LIST_LENGTH": MAX_LENGTH, "denoiser_dropout": 0.0, **overrides}
        config = make_config("CaDiRec", **values)
        torch.manual_seed(0)
        model = CaDiRec(config, SimpleNamespace(num=lambda field: n_items))
        model.item_embedding.weight.data.normal_()
        return model.eval()

    return make


def chosen(*cells: tuple[int, int], n_masks: int = 1) -> Noised:
    """The positions (row, i), all rows kept that have one; rows 4..7 are the second views."""
    table = torch.zeros(n_masks * 4, MAX_LENGTH, dtype=torch.bool)
    for row, i in cells:
        table[row, i] = True
    kept = table.any(1)
    layout = TokenLayout(LEN.repeat(n_masks)[kept], MAX_LENGTH)
    token = layout.pack(table[kept]).nonzero().squeeze(1)
    return Noised(
        items=layout.pack(SEQ.repeat(n_masks, 1)[kept]),
        layout=layout,
        host_token=token,
        token=token,
        cell=table.flatten().nonzero().squeeze(1),
        n_rows=n_masks * 4,
    )


THREE = chosen((0, 1), (0, 3), (3, 0))


def record(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Arguments of every call of a method from now on."""
    calls = []
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def forbid(monkeypatch: pytest.MonkeyPatch, model: Any, *names: str) -> None:
    def trap(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this computation has no use and must not run")

    for name in names:
        monkeypatch.setattr(model, name, trap)


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


# ---------------------------------------------------------------- schedule and forward process


PUBLISHED = {  # step counted from 0 -> sqrt(abar), sqrt(1 - abar)
    0: (0.98823, 0.15297),
    1: (0.98174, 0.19023),
    9: (0.95320, 0.30235),
    49: (0.88544, 0.46475),
    99: (0.83097, 0.55631),
    249: (0.71060, 0.70360),
    499: (0.54386, 0.83918),
    749: (0.36779, 0.92991),
    899: (0.22756, 0.97376),
    998: (0.02132, 0.99977),
    999: (0.00067, 1.00000),
}


def test_schedule_is_diffusion_lms_square_root(small):
    """Invariant 1: the released values, which are our steps 1..T."""
    process = small(diffusion_steps=1000).process
    for i, (signal, noise) in PUBLISHED.items():
        assert process.signal[i + 1].item() == pytest.approx(signal, abs=1e-5)
        assert process.noise[i + 1].item() == pytest.approx(noise, abs=1e-5)
    alpha_bar = process.signal**2
    assert (alpha_bar.diff() < 0).all()
    assert 0 < alpha_bar[-1] < alpha_bar[1] < 1
    u = torch.arange(1001, dtype=torch.float64) / 1000
    g = 1 - (u + 1e-4).sqrt()
    torch.testing.assert_close(alpha_bar[1:1000], g[1:1000] / g[0], rtol=0, atol=1e-12)
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    assert beta[0].item() == pytest.approx(0.0234003, abs=1e-7)
    assert beta[-1].item() == pytest.approx(0.999)


def test_closed_form_equals_the_iterated_kernel_in_distribution(small):
    """Invariant 2: x_t from x_0 at once or step by step; mean and variance of 1e5 draws."""
    process, n, t = small().process, 100_000, 7
    x_0 = torch.full((n, 1), 1.7)
    torch.manual_seed(0)
    x = x_0
    for step in range(1, t + 1):
        signal = (process.signal[step] / process.signal[step - 1]).float()
        x = signal * x + (1 - signal**2).sqrt() * torch.randn(n, 1)
    at_once = process.q_sample(x_0, torch.full((n,), t), torch.randn(n, 1))
    exact = process.q_sample(x_0, torch.full((n,), t), torch.zeros(n, 1))
    torch.testing.assert_close(exact, process.signal[t].float() * x_0)
    spread = process.noise[t].item()
    for sample in (x, at_once):
        assert sample.mean().item() == pytest.approx(exact[0].item(), abs=3 * spread / n**0.5)
        assert sample.var().item() == pytest.approx(spread**2, abs=3 * spread**2 * (2 / n) ** 0.5)


# ---------------------------------------------------------------- positions


def choose(model: Any, n_masks: int, seq: Tensor = SEQ, length: Tensor = LEN) -> Noised:
    return model.choose_positions(seq, TokenLayout(length, seq.shape[1]), n_masks)


def mask_of(noised: Noised, length: int = MAX_LENGTH) -> Tensor:
    """The chosen cells of all rows, [n_rows, L]."""
    flat = torch.zeros(noised.n_rows * length, dtype=torch.bool)
    flat[noised.cell] = True
    return flat.view(noised.n_rows, length)


def test_helper_places_tokens_and_cells():
    """The noised positions that other tests use, against the sequences they were written for."""
    assert THREE.items.tolist() == [1, 2, 3, 4, 8, 2, 9]
    assert THREE.token.tolist() == [1, 3, 4]
    assert THREE.cell.tolist() == [1, 3, 18]


@pytest.mark.parametrize("n_masks", [1, 2])
@pytest.mark.parametrize("aug_mask", OPTIONS["aug_mask"])
def test_items_tokens_and_cells_describe_the_same_positions(small, n_masks, aug_mask):
    """Invariant 4: a subset of the real positions, in rows that have one."""
    model = small(aug_mask=aug_mask, aug_ratio=0.3)
    for seed in range(20):
        torch.manual_seed(seed)
        noised = choose(model, n_masks)
        mask = mask_of(noised)
        assert noised.n_rows == 4 * n_masks
        assert not (mask & ~REAL.repeat(n_masks, 1)).any()
        kept = mask.any(1)
        assert torch.equal(noised.layout.lengths, LEN.repeat(n_masks)[kept])
        assert torch.equal(
            noised.items, SEQ.repeat(n_masks, 1)[kept][REAL.repeat(n_masks, 1)[kept]]
        )
        assert torch.equal(noised.items[noised.token], SEQ.repeat(n_masks, 1)[mask])
        assert torch.equal(noised.layout.pack(mask[kept]).nonzero().squeeze(1), noised.token)


def test_rows_without_a_noised_position_are_left_out(small):
    model = small(aug_mask="shared", aug_ratio=0.1)
    torch.manual_seed(0)
    sizes = {len(choose(model, 1).layout.lengths) for _ in range(40)}
    assert min(sizes) == 0
    assert max(sizes) > 1


@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_each_position_is_drawn_with_the_ratio(small, ratio):
    """Invariant 4: 40,000 draws, 3 standard errors; and no row is favoured."""
    length, batch = 50, 800
    model = small(100, aug_ratio=ratio, MAX_ITEM_LIST_LENGTH=length, aug_mask="shared")
    seq = torch.randint(1, 100, (batch, length))
    torch.manual_seed(1)
    mask = mask_of(choose(model, 1, seq, torch.full((batch,), length)), length)
    error = (ratio * (1 - ratio) / mask.numel()) ** 0.5
    assert mask.float().mean().item() == pytest.approx(ratio, abs=3 * error)
    assert mask.float().mean(0).std() < 3 * (ratio * (1 - ratio) / batch) ** 0.5


def test_every_row_gets_a_position_and_no_place_is_favoured(small):
    """Invariant 4: at ratio 0 exactly one in each row, uniformly; at 0.1 at least one."""
    one, more = small(aug_ratio=0.0), small(aug_ratio=0.1)
    total = torch.zeros(4, MAX_LENGTH)
    torch.manual_seed(0)
    for _ in range(400):
        mask = mask_of(choose(one, 2))
        assert (mask.sum(1) == 1).all()
        total += mask[:4].float() + mask[4:].float()
        assert (mask_of(choose(more, 2)).sum(1) >= 1).all()
    share = total / total.sum(1, keepdim=True)
    expected = REAL / LEN.unsqueeze(1)
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 800).sqrt() + 1e-9).all()


def test_ratio_one_takes_every_position(small):
    assert torch.equal(mask_of(choose(small(aug_ratio=1.0), 2)), REAL.repeat(2, 1))


def test_masks_of_the_two_views_are_independent(small, monkeypatch):
    """Invariant 4: two draws for each row; the released code has one for both views."""
    model = small(aug_ratio=0.5)
    assert model.n_masks == 2
    torch.manual_seed(0)
    pairs = [mask_of(choose(model, 2)).chunk(2) for _ in range(50)]
    assert sum(torch.equal(a, b) for a, b in pairs) < 5
    first, second = (torch.stack(side)[:, REAL].float() for side in zip(*pairs, strict=True))
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.2
    assert small(aug_mask="shared").n_masks == 1


# ---------------------------------------------------------------- partial noising


def network_input(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[tuple[Any, ...]]:
    return record(monkeypatch, model.denoiser, "forward")


def test_only_chosen_positions_are_noised(small, monkeypatch):
    """Invariant 3: at every step the others are E[s] to the last bit."""
    model = small()
    seen = network_input(monkeypatch, model)
    steps = set()
    for seed in range(60):
        torch.manual_seed(seed)
        model.estimate(model.clean(THREE), THREE)
        x, t, *_ = seen[-1]
        steps |= set((t + 1).tolist())
        context = torch.ones(len(x), dtype=torch.bool)
        context[THREE.token] = False
        table = model.item_embedding.weight
        assert torch.equal(x[context], table[THREE.items][context])
        assert (x[~context] != table[THREE.items][~context]).all()
    assert steps == set(range(1, T + 1))


def test_noised_vectors_follow_the_process(small, monkeypatch):
    """x_t = signal x_0 + noise eps, one step t a row, with the draws made in this order."""
    model = small()
    seen = network_input(monkeypatch, model)
    x_0 = torch.randn(7, 8)
    torch.manual_seed(3)
    model.estimate(x_0, THREE)
    torch.manual_seed(3)
    t = torch.randint(1, T + 1, (2,))
    eps = torch.randn(3, 8)
    assert torch.equal(seen[0][1], t - 1)
    for k, (token, row) in enumerate([(1, 0), (3, 0), (4, 1)]):
        signal, noise = model.process.signal[t[row]], model.process.noise[t[row]]
        expected = signal.float() * x_0[token] + noise.float() * eps[k]
        torch.testing.assert_close(seen[0][0][token], expected)


def test_clean_vectors_carry_noise_of_the_first_step_where_chosen(small):
    """x_0 = E[s] + noise_1 eps; nothing in the context."""
    model = small()
    many = chosen(*[(row, i) for row in range(4) for i in range(int(LEN[row]))][::2])
    difference = torch.stack(
        [model.clean(many) - model.item_embedding.weight[many.items] for _ in range(400)]
    )
    at = torch.zeros(len(many.items), dtype=torch.bool)
    at[many.token] = True
    assert not difference[:, ~at].any()
    assert difference[:, at].std().item() == pytest.approx(model.process.noise[1].item(), rel=0.03)
    assert abs(difference[:, at].mean()) < 0.01


def test_clean_noise_can_cover_the_context_or_be_left_out(small):
    table = small().item_embedding.weight
    model = small(x0_noise_context=True)
    everywhere = torch.stack([model.clean(THREE) - table[THREE.items] for _ in range(200)])
    assert (everywhere != 0).all()
    assert everywhere.std().item() == pytest.approx(model.process.noise[1].item(), rel=0.04)
    assert torch.equal(small(x0_noise=False).clean(THREE), table[THREE.items])


# ---------------------------------------------------------------- reverse process


def oracle(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[tuple[Any, ...]]:
    """A denoiser that knows the items; its calls."""
    calls = []

    def denoise(x_0: Tensor, x_t: Tensor, t: Tensor, noised: Noised) -> Tensor:
        calls.append((x_t, t))
        return model.item_embedding.weight[noised.items[noised.token]]

    monkeypatch.setattr(model, "denoise", denoise)
    return calls


@pytest.mark.parametrize("steps", [1, 2, 10, T])
def test_oracle_restores_the_items(small, monkeypatch, steps):
    """Invariants 5, 6: exactly, in as many calls as asked for, from step T down to 1 or more."""
    model = small(reverse_steps=steps)
    calls = oracle(monkeypatch, model)
    restored = model.generate(THREE)
    assert torch.equal(restored, model.item_embedding.weight[torch.tensor([2, 4, 8])])
    assert len(calls) == steps
    times = [t.item() for _, t in calls]
    assert times[0] == T
    assert times == sorted(set(times), reverse=True)
    assert times[-1] >= 1


def test_oracle_sees_the_interpolation_between_noise_and_item(small, monkeypatch):
    """Invariant 5: DDIM keeps the eps it started with."""
    model = small(reverse_steps=4)
    calls = oracle(monkeypatch, model)
    torch.manual_seed(2)
    model.generate(THREE)
    start = calls[0][0]
    item = model.item_embedding.weight[torch.tensor([2, 4, 8])]
    eps = (start - model.process.signal[T].float() * item) / model.process.noise[T].float()
    for x_t, t in calls[1:]:
        signal, noise = model.process.signal[t].float(), model.process.noise[t].float()
        torch.testing.assert_close(x_t, signal * item + noise * eps, rtol=1e-4, atol=1e-5)


def test_reverse_process_starts_from_pure_noise(small, monkeypatch):
    model = small()
    calls = oracle(monkeypatch, model)
    for _ in range(500):
        model.generate(THREE)
    start = torch.stack([x_t for x_t, t in calls if t.item() == T])
    assert start.mean().abs() < 0.03
    assert start.std().item() == pytest.approx(1.0, abs=0.03)


def test_context_is_held_fixed_in_every_step(small, monkeypatch):
    """Invariant 5: the network sees E[s] to the last bit, whatever the sampler does."""
    model = small(reverse_steps=4)
    seen = network_input(monkeypatch, model)
    model.generate(THREE)
    assert len(seen) == 4
    context = torch.ones(7, dtype=torch.bool)
    context[THREE.token] = False
    for x, *_ in seen:
        assert torch.equal(x[context], model.item_embedding.weight[THREE.items][context])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_one_reverse_step_is_one_prediction(small):
    """Invariant 6: the last estimate is returned."""
    model = small(reverse_steps=1)
    torch.manual_seed(4)
    restored = model.generate(THREE)
    torch.manual_seed(4)
    x_0 = model.clean(THREE)
    expected = model.denoise(x_0, torch.randn(3, 8), torch.tensor([T]), THREE)
    torch.testing.assert_close(restored, expected)


def test_generation_has_no_dropout_no_gradient_and_keeps_the_mode(small, monkeypatch):
    """Invariant 27: a function of weights, sequence, positions and noise."""
    noisy, plain = small(denoiser_dropout=0.9), small()
    torch.manual_seed(1)
    expected = plain.generate(THREE)
    noisy.train()
    for module in noisy.denoiser.modules():
        assert module.training
    torch.manual_seed(1)
    restored = noisy.generate(THREE)
    assert torch.equal(restored, expected)
    assert not restored.requires_grad
    assert all(module.training for module in noisy.modules())

    def fail(*args: Any) -> Any:
        raise ArithmeticError

    assert not any(module.training for module in plain.modules())
    monkeypatch.setattr(noisy, "denoise", fail)
    with pytest.raises(ArithmeticError):
        noisy.generate(THREE)
    assert all(module.training for module in noisy.modules())


@pytest.mark.parametrize(
    ("values", "calls"),
    [
        ({}, 1 + 4),
        ({"diff_weight": 0.0}, 4),
        ({"cl_weight": 0.0}, 1),
        ({"reverse_steps": 0}, 1),
        ({"reverse_steps": 0, "cl_weight": 0.0}, 1),
        ({"reverse_steps": 0, "diff_weight": 0.0}, 1),
    ],
)
def test_number_of_denoiser_passes(small, monkeypatch, values, calls):
    model = small(**values)
    seen = network_input(monkeypatch, model)
    loss = seeded_loss(model)
    assert len(seen) == calls
    assert (loss.contrastive > 0) == (model.cl_weight > 0)
    assert (loss.diffusion > 0) == (model.diff_weight > 0)


@pytest.mark.parametrize("aug_mask", OPTIONS["aug_mask"])
def test_one_shot_views_use_the_prediction_being_trained(small, monkeypatch, aug_mask):
    """Released behaviour: same positions, same estimates, dropout on, no gradient."""
    model = small(reverse_steps=0, aug_mask=aug_mask, aug_ratio=0.5).train()
    forbid(monkeypatch, model, "generate")
    loss = record(monkeypatch, model, "diffusion_loss")
    views = record(monkeypatch, model, "make_views")
    seeded_loss(model)
    (x_hat, _, trained), (_, restored, noised) = loss[0], views[0]
    assert trained is noised
    assert noised.n_rows == (4 if aug_mask == "shared" else 8)
    assert torch.equal(restored, x_hat)
    assert x_hat.requires_grad
    assert not restored.requires_grad


def test_loss_and_views_draw_their_own_positions_otherwise(small, monkeypatch):
    model = small()
    calls = record(monkeypatch, model, "choose_positions")
    seeded_loss(model)
    assert [n_masks for *_, n_masks in calls] == [1, 2]


# ---------------------------------------------------------------- denoiser


def all_outputs(model: Any, x: Tensor, t: Tensor, layout: TokenLayout) -> Tensor:
    """The network's estimate of every position, [n, H]."""
    return model.denoiser(x, t - 1, layout, model.denoiser_encoder)


BOTH_POSITIONS = pytest.mark.parametrize("pos", OPTIONS["denoiser_pos"])


@BOTH_POSITIONS
@pytest.mark.parametrize("layers", [1, 2])
def test_estimates_at_noised_positions_are_those_of_a_full_pass(small, pos, layers):
    """Leaving out what is not needed changes no value."""
    model = small(denoiser_pos=pos, denoiser_layers=layers)
    x_0, x_t, t = torch.randn(7, 8), torch.randn(3, 8), torch.tensor([4, 17])
    x = x_0.clone()
    x[THREE.token] = x_t
    full = all_outputs(model, x, t, THREE.layout)
    assert full.shape == (7, 8)
    torch.testing.assert_close(model.denoise(x_0, x_t, t, THREE), full[THREE.token])


def test_one_step_for_all_rows_is_that_step_in_each(small):
    model = small()
    x_0, x_t = torch.randn(7, 8), torch.randn(3, 8)
    torch.testing.assert_close(
        model.denoise(x_0, x_t, torch.tensor([9]), THREE),
        model.denoise(x_0, x_t, torch.tensor([9, 9]), THREE),
    )


@BOTH_POSITIONS
def test_denoiser_sees_both_sides_and_the_order(small, pos):
    """Invariant 16: newer and older items; and where they stand."""
    model = small(denoiser_pos=pos)
    for module in (model.denoiser, model.denoiser_encoder):
        for parameter in module.parameters():
            parameter.data.normal_()
    layout, t = TokenLayout(torch.tensor([4]), 4), torch.tensor([5])
    x = torch.randn(4, 8)
    out = all_outputs(model, x, t, layout)
    for changed, place in [(3, 0), (0, 3)]:
        other = x.clone()
        other[changed] *= -1.0
        assert not torch.allclose(all_outputs(model, other, t, layout)[place], out[place])
    swapped = all_outputs(model, x[[0, 2, 1, 3]], t, layout)
    assert not torch.allclose(swapped[0], out[0], atol=1e-4)


@BOTH_POSITIONS
def test_positions_enter_the_denoiser_in_one_way(small, pos):
    """As vectors added to the input, or as a bias of the attention; the encoder keeps vectors."""
    model = small(denoiser_pos=pos)
    relative = pos == "relative"
    assert (model.denoiser.position_embedding is None) == relative
    assert isinstance(model.denoiser_encoder, RelativeTransformer) == relative
    assert model.position_embedding.num_embeddings == MAX_LENGTH


@BOTH_POSITIONS
def test_denoiser_ignores_padding_and_other_rows(small, pos):
    """Invariant 16: rows alone, together, and padded further agree."""
    model = small(denoiser_pos=pos)
    x, t = torch.randn(10, 8), torch.tensor([1, 5, 9, 20])
    together = all_outputs(model, x, t, LAYOUT)
    start = 0
    for row, length in enumerate(LEN.tolist()):
        alone_layout = TokenLayout(LEN[row : row + 1], length)
        alone = all_outputs(model, x[start : start + length], t[row : row + 1], alone_layout)
        torch.testing.assert_close(together[start : start + length], alone)
        start += length


def test_step_is_counted_from_zero_in_the_time_embedding(small, monkeypatch):
    """Invariant 22: first noised step = 0, whose features are zeros and ones."""
    model = small()
    seen = record(monkeypatch, model.denoiser.time_embedding, "forward")
    model.denoise(torch.randn(7, 8), torch.randn(3, 8), torch.tensor([1, T]), THREE)
    assert seen[0][0].tolist() == [0, T - 1]
    features = timestep_embedding(torch.arange(1000), 64)
    assert torch.equal(features[0], torch.tensor([0.0] * 32 + [1.0] * 32))
    torch.testing.assert_close(
        features[37, 32:], torch.cos(37 * torch.exp(-math.log(1e4) * torch.arange(32) / 32))
    )
    assert torch.cdist(features, features).fill_diagonal_(1.0).min() > 1e-3


def test_denoiser_sees_the_step(small):
    model = small()
    x_0, x_t = torch.randn(7, 8), torch.randn(3, 8)
    first, last = (model.denoise(x_0, x_t, torch.tensor([t]), THREE) for t in (1, T))
    assert not torch.allclose(first, last)


def test_denoiser_has_its_own_sizes(small):
    model = small(denoiser_layers=3, denoiser_heads=4, denoiser_inner=24, denoiser_dropout=0.3)
    encoder = model.denoiser_encoder
    assert len(encoder.layer) == 3
    assert encoder.layer[0].multi_head_attention.num_attention_heads == 4
    assert encoder.layer[0].feed_forward.dense_1.out_features == 24
    dropouts = [m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts == [0.3] * len(dropouts)
    assert model.denoiser.dropout.p == 0.3
    assert model.denoiser.LayerNorm.eps == 1e-5
    assert model.trm_encoder.layer[0].feed_forward.dense_1.out_features == 16
    assert model.dropout.p == 0.0


@pytest.mark.parametrize("items", OPTIONS["denoiser_items"])
def test_initial_weights_of_the_denoiser(make_config, items):
    """N(0, 0.02) everywhere, biases 0, norms 1, as in the encoder."""
    config = make_config("CaDiRec", hidden_size=32, denoiser_items=items)
    model = CaDiRec(config, SimpleNamespace(num=lambda field: 40))
    parts = ("denoiser.", "denoiser_encoder.", "denoiser_items.")
    parts_of_denoiser = {name: p for name, p in model.named_parameters() if name.startswith(parts)}
    assert ("denoiser_items.weight" in parts_of_denoiser) == (items == "separate")
    for name, value in parts_of_denoiser.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "LayerNorm" in name:
            assert (value == 1).all(), name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.25), name


# ---------------------------------------------------------------- relative positions

SIZES = {
    "n_layers": 2,
    "n_heads": 2,
    "hidden_size": 8,
    "inner_size": 16,
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def relative() -> RelativeTransformer:
    torch.manual_seed(0)
    transformer = RelativeTransformer(MAX_LENGTH, **SIZES)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return transformer


def test_bias_depends_on_head_and_signed_distance():
    transformer = relative()
    bias = transformer.position_bias(4)
    table = transformer.distance_bias.weight
    assert bias.shape == (2, 4, 4)
    for head in range(2):
        for query in range(4):
            for key in range(4):
                assert bias[head, query, key] == table[key - query + MAX_LENGTH - 1, head]


def test_bias_is_added_to_the_attention_scores():
    """One layer of attention written out, with padding."""
    transformer = relative()
    attention = transformer.layer[0].multi_head_attention
    x = torch.randn(int(LEN.sum()), 8)
    got = transformer.attend(
        attention, x, LAYOUT, False, False, transformer.position_bias(MAX_LENGTH)
    )
    start = 0
    for length in LEN.tolist():
        row_states = x[start : start + length]
        q, k, v = (
            linear(row_states).view(length, 2, 4).transpose(0, 1)
            for linear in (attention.query, attention.key, attention.value)
        )
        scores = q @ k.transpose(1, 2) / 2.0 + transformer.position_bias(length)
        expected = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(got[start : start + length], expected)
        start += length


def test_without_bias_it_is_the_plain_transformer():
    transformer = relative()
    transformer.distance_bias.weight.data.zero_()
    plain = PackedTransformer(**SIZES)
    plain.load_state_dict(
        {k: v for k, v in transformer.state_dict().items() if "distance" not in k}
    )
    x = torch.randn(int(LEN.sum()), 8)
    torch.testing.assert_close(transformer(x, LAYOUT, causal=False), plain(x, LAYOUT, causal=False))


def test_named_tokens_are_those_of_a_full_pass():
    """Also of a causal one, and in any order."""
    plain = PackedTransformer(**SIZES).eval()
    x, tokens = torch.randn(int(LEN.sum()), 8), torch.tensor([6, 0, 9])
    for causal in (True, False):
        full = plain(x, LAYOUT, causal=causal)
        torch.testing.assert_close(plain(x, LAYOUT, causal=causal, tokens=tokens), full[tokens])


def test_relative_positions_are_bidirectional_only():
    with pytest.raises(RuntimeError):
        relative()(torch.randn(int(LEN.sum()), 8), LAYOUT, causal=True)


# ---------------------------------------------------------------- diffusion loss


def dense_nll(model: Any, x: Tensor, t: Tensor, noised: Noised) -> list[tuple[int, float]]:
    """(row, -log p) of every noised position, from logits of all positions over items 1..V."""
    logits = all_outputs(model, x, t, noised.layout) @ model.item_embedding.weight[1:].t()
    losses = F.cross_entropy(logits, noised.items - 1, reduction="none")
    return [(int(noised.layout.row[k]), losses[k].item()) for k in noised.token.tolist()]


def test_rounding_loss_equals_a_dense_reference(small):
    """Invariant 8: all cells computed, then masked; both reductions."""
    x_0, x_t, t = torch.randn(7, 8), torch.randn(3, 8), torch.tensor([4, 17])
    x = x_0.clone()
    x[THREE.token] = x_t
    for reduction in OPTIONS["nll_reduction"]:
        model = small(nll_reduction=reduction)
        cells = dense_nll(model, x, t, THREE)
        assert len(cells) == 3
        if reduction == "token":
            expected = sum(loss for _, loss in cells) / 3
        else:  # rows 0 and 3 of four have 2 and 1 positions
            by_row = [[loss for row, loss in cells if row == r] for r in (0, 1)]
            expected = sum(sum(losses) / (len(losses) + 1e-5) for losses in by_row) / 4
        loss = model.rounding_loss(model.denoise(x_0, x_t, t, THREE), THREE)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_padding_is_no_class_of_the_rounding(small):
    model = small()
    model.item_embedding.weight.data[0] = 1e3
    loss = model.rounding_loss(torch.ones(3, 8), THREE)
    logits = model.item_embedding.weight[1:].sum(1)
    expected = logits.logsumexp(0) - logits[torch.tensor([2, 4, 8]) - 1].mean()
    torch.testing.assert_close(loss, expected)


def test_reductions_agree_when_every_row_has_as_many_positions(small):
    """Invariant 23: up to the 1e-5 in the denominator."""
    noised = chosen((0, 1), (0, 3), (1, 0), (1, 1), (3, 0), (3, 2))
    noised = noised._replace(n_rows=3)
    guess = torch.randn(6, 8)
    token = small().rounding_loss(guess, noised)
    sequence = small(nll_reduction="sequence").rounding_loss(guess, noised)
    torch.testing.assert_close(token, sequence, rtol=2e-5, atol=0)


def test_squared_error_is_a_mean_over_noised_positions_and_dimensions(small):
    model = small(diff_nll_weight=0.0, diff_mse_weight=2.0)
    x_0, x_hat = torch.randn(7, 8), torch.randn(3, 8)
    expected = 2 * sum(((x_0[k] - x_hat[i]) ** 2).sum() for i, k in enumerate([1, 3, 4])) / 24
    torch.testing.assert_close(model.diffusion_loss(x_hat, x_0, THREE), expected)


def test_every_noised_position_weighs_the_same(build):
    """Whichever batch of similar lengths it falls in: the sum over batches is that of all rows."""
    _, loader, _, _, model = build(
        "CaDiRec", train_batch_size=2, diff_mse_weight=1.0, x0_noise=False
    )
    model.item_embedding.weight.data.normal_()
    model.eval()

    def diffusion_loss(batch: Interaction) -> float:
        layout = TokenLayout(batch["item_length"], batch["item_id_list"].shape[1])
        items = layout.pack(batch["item_id_list"])
        every = torch.arange(len(items))
        noised = Noised(items, layout, every, every, layout.index, layout.batch)
        x_0 = model.clean(noised)
        return model.diffusion_loss(x_0.flip(1), x_0, noised).item()

    everything = loader.collate(torch.arange(len(loader.dataset)))
    parts = [diffusion_loss(batch) for batch in loader]
    assert len(parts) > 1
    assert sum(parts) == pytest.approx(diffusion_loss(everything), rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "steps"),
    [("shared", 0), ("shared", 3), ("independent_min1", 0), ("independent_min1", 3)],
)
def test_expected_number_of_noised_positions(build, mask, steps):
    values = {"aug_ratio": 0.3, "aug_mask": mask, "reverse_steps": steps}
    _, loader, _, _, model = build("CaDiRec", train_batch_size=100, **values)
    batch = loader.collate(torch.arange(len(loader.dataset)))
    layout = TokenLayout(batch["item_length"], batch["item_id_list"].shape[1])
    n_masks = model.n_masks if steps == 0 else 1
    drawn = [
        len(model.choose_positions(batch["item_id_list"], layout, n_masks).token)
        for _ in range(2000)
    ]
    assert model.noised_per_batch == pytest.approx(sum(drawn) / len(drawn), rel=0.03)


@pytest.mark.parametrize("reduction", OPTIONS["nll_reduction"])
def test_no_noised_position_costs_nothing(small, reduction):
    """Invariant 8, C8: 0 and no NaN; the contrast of two untouched views goes on."""
    model = small(aug_mask="shared", aug_ratio=0.0, nll_reduction=reduction, diff_mse_weight=1.0)
    for steps in (0, 4):
        model.reverse_steps = steps
        loss = seeded_loss(model)
        assert loss.diffusion == 0
        assert loss.contrastive > 0
        sum(loss).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(grad).all() for grad in grads)


def test_weights_of_the_two_terms(small, monkeypatch):
    """A term of weight 0 is not computed."""
    values = {"diff_weight": 0.3, "cl_weight": 0.0}
    nll = seeded_loss(small(**values)).diffusion
    mse = seeded_loss(small(diff_nll_weight=0.0, diff_mse_weight=1.0, **values)).diffusion
    both = seeded_loss(small(diff_nll_weight=0.5, diff_mse_weight=2.0, **values)).diffusion
    torch.testing.assert_close(both, 0.5 * nll + 2 * mse)
    model = small(diff_nll_weight=0.0, diff_mse_weight=1.0, **values)
    forbid(monkeypatch, model, "rounding_loss")
    seeded_loss(model)


# ---------------------------------------------------------------- candidates and views


def equal_norms(model: Any) -> None:
    """Every item becomes its own best match, as an oracle's rounding needs."""
    table = model.item_embedding.weight.data
    table.copy_(3.0 * F.normalize(table, dim=1))


def test_exact_embeddings_round_to_their_items(small):
    """Invariant 7."""
    model = small(cand_topk=1)
    equal_norms(model)
    items = torch.arange(1, 13)
    assert torch.equal(model.candidates(model.item_embedding.weight[items], items)[0][:, 0], items)


@pytest.mark.parametrize("memory_mb", [1e-6, 16.0])
def test_candidates_are_the_best_items(small, memory_mb):
    """Invariant 9: among 1..V, even where padding would win; in one block or several."""
    model = small(cand_topk=4, loss_memory_mb=memory_mb)
    table = model.item_embedding.weight.data
    table[0] = 1e3
    x_hat, original = torch.rand(40, 8), torch.randint(1, 13, (40,))
    got, rank = model.candidates(x_hat, original)
    for k in range(40):
        score = {j: (x_hat[k] @ table[j]).item() for j in range(1, 13)}
        assert rank[k] == sum(value > score[int(original[k])] for value in score.values())
        assert got[k].tolist() == sorted(score, key=lambda j: -score[j])[:4]


def test_replacements_are_uniform_among_the_candidates(small):
    """Invariant 9: chi-square over ten candidates, 4,000 draws a view; and never another item."""
    model = small(aug_mask="shared", cand_topk=10)
    noised = chosen((0, 1))
    x_hat = torch.randn(1, 8)
    allowed = model.candidates(x_hat, torch.tensor([2]))[0][0]
    torch.manual_seed(0)
    drawn = torch.stack(
        [model.make_views(SEQ, x_hat, noised).items[[0, 4], 1] for _ in range(4000)]
    )
    for view in range(2):
        counts = torch.tensor([(drawn[:, view] == item).sum() for item in allowed])
        assert counts.sum() == 4000
        assert ((counts - 400.0) ** 2 / 400).sum() < 27.9  # 0.1 % of chi-square with 9 degrees
    same = (drawn[:, 0] == drawn[:, 1]).float().mean().item()
    assert same == pytest.approx(0.1, abs=0.015)  # C3: the views draw independently


def test_best_candidate_only_makes_equal_views_of_a_shared_mask(small):
    """Invariant 9: cand_topk 1."""
    model = small(aug_mask="shared", cand_topk=1, aug_ratio=0.5)
    torch.manual_seed(0)
    noised = choose(model, 1)
    views = model.make_views(SEQ, torch.randn(len(noised.token), 8), noised).items
    assert torch.equal(views[:4], views[4:])
    assert not torch.equal(views[:4], SEQ)


@pytest.mark.parametrize("aug_mask", OPTIONS["aug_mask"])
def test_views_differ_from_the_sequence_only_where_it_was_noised(small, aug_mask):
    """Invariant 10: and there by what was drawn; padding, lengths and type stay."""
    model = small(aug_mask=aug_mask, aug_ratio=0.4, cand_topk=1)
    for seed in range(10):
        torch.manual_seed(seed)
        noised = choose(model, model.n_masks)
        x_hat = torch.randn(len(noised.token), 8)
        views = model.make_views(SEQ, x_hat, noised).items
        assert views.shape == (8, MAX_LENGTH)
        assert views.dtype == SEQ.dtype
        mask = mask_of(noised).repeat(2 // model.n_masks, 1)
        assert torch.equal(views[~mask], SEQ.repeat(2, 1)[~mask])
        best = model.candidates(x_hat, noised.items[noised.token])[0][:, 0]
        assert torch.equal(views[mask], best.repeat(2 // model.n_masks))
        assert torch.equal(views > 0, REAL.repeat(2, 1))


def test_without_positions_the_views_are_the_sequence(small, monkeypatch):
    """Invariant 11: ratio 0 with the released mask; without dropout both states are equal."""
    model = small(aug_mask="shared", aug_ratio=0.0)
    views = record(monkeypatch, model, "contrastive_loss")
    loss = seeded_loss(model)
    items, length = views[0]
    assert torch.equal(items, SEQ.repeat(2, 1))
    state = model(SEQ, length)
    torch.testing.assert_close(loss.contrastive, 0.1 * nt_xent(state, state, 1.0, "dot"))
    assert model.monitored()["changed"] == 0
    assert model.monitored()["untouched_views"] == 1


@pytest.mark.parametrize("aug_mask", OPTIONS["aug_mask"])
@pytest.mark.parametrize("steps", [0, 4])
def test_augmented_views_are_made_as_in_training(small, monkeypatch, aug_mask, steps):
    """From the sampler or, as released, from one estimate; each under its own name."""
    model = small(reverse_steps=steps, aug_mask=aug_mask)
    estimated = record(monkeypatch, model, "estimate")
    generated = record(monkeypatch, model, "generate")
    drawn: list[Tensor] = []
    make_views = model.make_views

    def keep(item_seq: Tensor, x_hat: Tensor, noised: Noised) -> Any:
        assert noised.n_rows == 4 * model.n_masks
        views = make_views(item_seq, x_hat, noised)
        drawn.append(views.items)
        return views

    monkeypatch.setattr(model, "make_views", keep)
    views = model.augmented_views(rows())
    assert (len(estimated), len(generated)) == ((1, 0) if steps == 0 else (0, 1))
    assert list(views) == ["first view", "second view"]
    assert torch.equal(views["first view"], drawn[0][:4])
    assert torch.equal(views["second view"], drawn[0][4:])
    assert not torch.equal(drawn[0][:4], drawn[0][4:])


def test_monitor_of_a_case_worked_by_hand(small, monkeypatch):
    """Three cells of the first views replaced, one of them by its own item; 20 real cells."""
    model = small(cand_topk=1)
    noised = chosen((0, 1), (0, 3), (3, 0), (4, 0), n_masks=2)
    best = torch.tensor([[9], [4], [12], [5]])  # item 4 stays itself
    rank = torch.tensor([5, 0, 2, 1])
    monkeypatch.setattr(model, "candidates", lambda *args: (best, rank))
    views = model.make_views(SEQ, torch.randn(4, 8), noised)
    assert views.items[0].tolist() == [1, 9, 3, 4, 0, 0]
    assert views.items[3].tolist() == [12, 2, 9, 0, 0, 0]
    assert views.items[4].tolist() == [5, 2, 3, 4, 0, 0]
    assert views.monitor["changed"].item() == pytest.approx(3 / 20)
    assert views.monitor["untouched_views"].item() == pytest.approx(5 / 8)
    assert views.monitor["restored"].item() == pytest.approx(1 / 4)
    model.cand_topk = 2
    best = best.expand(-1, 2)
    views = model.make_views(SEQ, torch.randn(4, 8), noised)
    assert views.monitor["in_candidates"].item() == pytest.approx(2 / 4)
    norms = [row.norm().item() for row in model.item_embedding.weight[1:]]
    assert views.monitor["item_norm"].item() == pytest.approx(sum(norms) / 12)


def test_monitor_is_of_the_last_step_and_empty_without_views(small):
    model = small()
    seeded_loss(model)
    restoration = {"restored", "in_candidates"}
    assert set(model.monitored()) == {"changed", "untouched_views", "item_norm"} | restoration
    model.cl_weight = 0.0
    seeded_loss(model)
    assert model.monitored() == {}


# ---------------------------------------------------------------- contrast


@pytest.mark.parametrize("similarity", OPTIONS["cl_similarity"])
def test_contrastive_loss_compares_the_states_of_the_views(small, similarity):
    """The encoder's states of both views, and nothing else: no anchor from the sequence itself."""
    model = small(cl_similarity=similarity, tau=0.7)
    views = torch.cat([SEQ, torch.where(SEQ > 0, SEQ % 12 + 1, 0)])
    first, second = model(views[:4], LEN), model(views[4:], LEN)
    torch.testing.assert_close(
        model.contrastive_loss(views, LEN), nt_xent(first, second, 0.7, similarity)
    )


def test_contrastive_loss_leaves_the_item_table_alone(small):
    """Invariant 14: exactly zero for the table, not for the rest of the encoder; a switch."""
    rest = {"position_embedding", "trm_encoder", "LayerNorm"}
    model = small()
    assert reached(model, seeded_loss(model).contrastive) == rest
    model = small(cl_detach_items=False)
    loss = seeded_loss(model)
    assert reached(model, loss.contrastive) == rest | {"item_embedding"}
    torch.testing.assert_close(loss.contrastive, seeded_loss(small()).contrastive)


def test_item_table_is_back_in_place_after_the_contrastive_loss(small):
    model = small()
    table = model.item_embedding.weight
    seeded_loss(model)
    assert model.item_embedding.weight is table
    assert isinstance(table, torch.nn.Parameter)
    assert table.requires_grad


# ---------------------------------------------------------------- total loss


def test_terms_are_named_and_weighted(small):
    """The same random draws, other weights: each term scales with its own."""
    loss = seeded_loss(small(cl_weight=0.1, diff_weight=0.1))
    other = seeded_loss(small(cl_weight=0.4, diff_weight=0.3))
    assert loss._fields == ("rec", "contrastive", "diffusion")
    torch.testing.assert_close(other.rec, loss.rec)
    torch.testing.assert_close(other.contrastive, 4 * loss.contrastive)
    torch.testing.assert_close(other.diffusion, 3 * loss.diffusion)
    assert min(loss) > 0


DIFFUSION_CODE = ("choose_positions", "clean", "denoise", "generate", "make_views", "candidates")


def test_plain_encoder_runs_no_diffusion_code(small, make_config, monkeypatch):
    """Invariant 19: loss, gradients, scores and random draws are the plain encoder's."""
    model = small(cl_weight=0.0, diff_weight=0.0, hidden_dropout_prob=0.2).train()
    forbid(monkeypatch, model, *DIFFUSION_CODE, "estimate", "diffusion_loss", "contrastive_loss")
    config = make_config(
        "CaDiRec", MAX_ITEM_LIST_LENGTH=MAX_LENGTH, hidden_dropout_prob=0.2, attn_dropout_prob=0.0
    )
    plain = EncoderRecommender(config, SimpleNamespace(num=lambda field: 13))
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.train()
    loss = seeded_loss(model)
    after = torch.get_rng_state()
    assert loss.contrastive == loss.diffusion == 0
    torch.manual_seed(5)
    layout = TokenLayout(LEN, MAX_LENGTH)
    expected = plain.recommendation_loss(plain.encode(SEQ, layout), layout, rows())
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(loss.rec, expected)
    ours, theirs = gradients(model, sum(loss)), gradients(plain, expected)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad)
    assert not any(grad.any() for name, grad in ours.items() if name not in theirs)
    model.eval()
    plain.eval()
    assert torch.equal(model.full_sort_predict(rows()), plain.full_sort_predict(rows()))


def test_weight_of_zero_skips_the_term(small, monkeypatch):
    model = small(diff_weight=0.0)
    forbid(monkeypatch, model, "diffusion_loss", "estimate")
    assert seeded_loss(model).diffusion == 0
    model = small(cl_weight=0.0)
    forbid(monkeypatch, model, "generate", "make_views", "contrastive_loss")
    assert seeded_loss(model).contrastive == 0


def test_recommendation_loss_is_one_negative_a_position(small):
    """Invariant 18: with vectors of zero, log 2 for the target and log 2 for the negative."""
    model = small(cl_weight=0.0, diff_weight=0.0)
    assert model.sr_loss == "BCE"
    model.item_embedding.weight.data.zero_()
    assert seeded_loss(model).rec.item() == pytest.approx(2 * math.log(2))
    other = small(cl_weight=0.0, diff_weight=0.0, sr_loss="CE")
    other.item_embedding.weight.data.zero_()
    assert seeded_loss(other).rec.item() == pytest.approx(math.log(13))


ENCODER = {"position_embedding", "trm_encoder", "LayerNorm"}
DENOISER = {"denoiser", "denoiser_encoder"}


@pytest.mark.parametrize("steps", [0, 4])
def test_each_loss_reaches_its_own_modules(small, steps):
    """Invariant 15: the denoiser learns from L_d only, the encoder not from L_d."""
    for weights in ({}, {"diff_nll_weight": 0.0, "diff_mse_weight": 1.0}):
        model = small(reverse_steps=steps, **weights)
        assert reached(model, seeded_loss(model).rec) == ENCODER | {"item_embedding"}
        assert reached(model, seeded_loss(model).contrastive) == ENCODER
        assert reached(model, seeded_loss(model).diffusion) == DENOISER | {"item_embedding"}


def test_one_table_serves_every_use(small):
    """Invariant 28: encoder, noising, rounding and scoring."""
    model = small()
    assert model.diffusion_table is model.item_embedding.weight
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes.count((13, 8)) == 1


def test_separate_table_keeps_the_diffusion_model_to_itself(small):
    """Nothing of L_d reaches the recommender but through the views."""
    model = small(denoiser_items="separate")
    table = model.diffusion_table
    assert table is model.denoiser_items.weight
    assert reached(model, seeded_loss(model).diffusion) == DENOISER | {"denoiser_items"}
    assert reached(model, seeded_loss(model).rec) == ENCODER | {"item_embedding"}
    torch.testing.assert_close(
        small(denoiser_items="separate", x0_noise=False).clean(THREE), table[THREE.items]
    )
    guess = torch.randn(3, 8)
    best = model.candidates(guess, torch.tensor([2, 4, 8]))[0]
    assert torch.equal(best, (guess @ table[1:].t()).topk(10).indices + 1)


def test_scores_need_no_diffusion_and_no_randomness(small):
    """Invariant 20: [B, n_items], whatever the denoiser's weights are."""
    model = small()
    before = torch.get_rng_state()
    scores = model.full_sort_predict(rows())
    assert torch.equal(torch.get_rng_state(), before)
    assert scores.shape == (4, 13)
    for module in (model.denoiser, model.denoiser_encoder):
        for parameter in module.parameters():
            parameter.data.normal_()
    assert torch.equal(model.full_sort_predict(rows()), scores)


def test_training_rows_end_two_items_before_the_history(build):
    """Invariant 21: inputs v_1..v_(n-3), targets v_2..v_(n-2), one row a user."""
    config, train, _, _, model = build("CaDiRec", MAX_ITEM_LIST_LENGTH=9)
    assert config["train_sampling"] == "user_all"
    name = train.dataset.field2id_token["item_id"]
    seen = {}
    for batch in train:
        layout = TokenLayout(batch["item_length"], batch["item_id_list"].shape[1])
        labels = model.labels(batch["item_id_list"], layout, batch["item_id"])
        for row in range(len(batch)):
            in_row = layout.row == row
            inputs = layout.pack(batch["item_id_list"])[in_row]
            seen[tuple(name[i] for i in inputs)] = tuple(name[i] for i in labels[in_row])
    assert seen == {
        ("i1", "i2", "i3", "i4", "i5", "i6"): ("i2", "i3", "i4", "i5", "i6", "i7"),
        ("i2", "i3"): ("i3", "i5"),
        ("i9", "i8", "i7", "i6"): ("i8", "i7", "i6", "i11"),
        ("i4",): ("i2",),
        ("i5",): ("i6",),  # RecBole's rule for two and three items
        ("i10",): ("i1",),
    }


def test_same_seed_gives_the_same_losses_for_three_steps(small):
    """Invariant 27: dropout, draws and updates included, to the last bit."""
    runs = []
    for _ in range(2):
        model = small(hidden_dropout_prob=0.3, denoiser_dropout=0.3).train()
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
    """The same draws; views may differ where two candidates are as good, so no contrast here."""
    values = {"cl_weight": 0.0}
    expected = seeded_loss(small(**values))
    with torch.autocast("cpu", torch.bfloat16):
        loss = seeded_loss(small(**values))
    assert loss.rec.item() == pytest.approx(expected.rec.item(), rel=0.02)
    assert loss.diffusion.item() == pytest.approx(expected.diffusion.item(), rel=0.02)


@BOTH_POSITIONS
@pytest.mark.parametrize("steps", [0, 4])
def test_whole_loss_runs_in_bfloat16(small, pos, steps):
    model = small(denoiser_pos=pos, reverse_steps=steps, diff_mse_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = seeded_loss(model)
    assert min(loss) > 0
    sum(loss).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and not value.is_sparse:
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("values", [{}, {"reverse_steps": 0, "nll_reduction": "sequence"}])
def test_no_tensor_holds_logits_of_all_positions(small, values):
    """Neither forward nor backward: logits of 16 x 20 positions would be 640,000 numbers."""
    batch, length, n_items = 8, 20, 2001
    torch.manual_seed(0)
    data = rows(
        torch.randint(1, n_items, (batch, length)),
        torch.full((batch,), length),
        torch.randint(1, n_items, (batch,)),
    )

    def largest(memory_mb: float, ratio: float) -> int:
        model = small(
            n_items,
            loss_memory_mb=memory_mb,
            aug_ratio=ratio,
            MAX_ITEM_LIST_LENGTH=length,
            denoiser_inner=16,
            **values,
        )
        with LargestTensor() as mode:
            sum(model.calculate_loss(data)).backward()
        return mode.numel

    assert largest(0.0625, 0.5) <= n_items * 8 + 1000  # the table; a block is 16,384 numbers
    # The recorder does see logits, and of noised positions only, however generous the budget.
    assert n_items * 8 < largest(16.0, 0.1) < batch * length * n_items
    assert largest(16.0, 1.0) >= batch * length * (n_items - 1)


# ---------------------------------------------------------------- settings


def differing(config: Any, other: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in config.final_config_dict.items()
        if other[key] != value and key not in ("preset", "model")
    }


def test_paper_preset_is_the_default():
    plain = Config("CaDiRec", "toy")
    assert differing(Config("CaDiRec", "toy", overrides={"preset": "paper"}), plain) == {}
    assert {key: plain[key] for key in ("cl_weight", "diff_weight", "aug_ratio", "tau")} == {
        "cl_weight": 0.1,
        "diff_weight": 0.2,
        "aug_ratio": 0.1,
        "tau": 1.0,
    }
    sizes = ("n_layers", "n_heads", "hidden_size", "inner_size", "hidden_dropout_prob", "cand_topk")
    assert [plain[key] for key in sizes] == [2, 2, 64, 128, 0.5, 10]


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        (
            "official",
            {
                "nll_reduction": "sequence",
                "aug_mask": "shared",
                "x0_noise_context": True,
                "denoiser_layers": 2,
                "denoiser_pos": "relative",
                "reverse_steps": 0,
            },
        ),
        ("separate_items", {"denoiser_items": "separate"}),
        ("cl_trains_items", {"cl_detach_items": False}),
    ],
)
def test_presets_change_what_they_name(preset, change):
    config = Config("CaDiRec", "toy", overrides={"preset": preset})
    assert differing(config, Config("CaDiRec", "toy")) == change


@pytest.mark.parametrize("dataset", ["amazon-beauty", "amazon-toys-games", "yelp", "ml-1m"])
def test_settings_per_data_set(dataset):
    """Released values: dropout, beta, rho, denoiser layers."""
    keys = ("hidden_dropout_prob", "attn_dropout_prob", "diff_weight", "aug_ratio")
    config = Config("CaDiRec", dataset)
    assert [config[key] for key in (*keys, "denoiser_layers")] == {
        "amazon-beauty": [0.5, 0.5, 0.2, 0.1, 2],
        "amazon-toys-games": [0.5, 0.5, 0.2, 0.2, 1],
        "yelp": [0.5, 0.5, 0.2, 0.2, 1],
        "ml-1m": [0.1, 0.1, 0.1, 0.1, 1],
    }[dataset]


def test_diffclrec_is_the_first_release():
    assert issubclass(DiffCLRec, CaDiRec)
    changed = differing(Config("DiffCLRec", "toy"), Config("CaDiRec", "toy"))
    assert changed == {"cl_weight": 1.0, "aug_ratio": 0.2, "epochs": 300}
    for dataset in ("amazon-beauty", "amazon-toys-games"):
        config = Config("DiffCLRec", dataset)
        keys = ("cl_weight", "diff_weight", "aug_ratio", "denoiser_layers")
        assert [config[key] for key in keys] == [1.0, 0.2, 0.2, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cl_weight": -0.1}, "cl_weight=-0.1 must be at least 0"),
        ({"diff_weight": math.nan}, "diff_weight=nan must be finite"),
        ({"diff_nll_weight": -1.0}, "diff_nll_weight=-1.0 must be at least 0"),
        ({"diff_mse_weight": -1.0}, "diff_mse_weight=-1.0 must be at least 0"),
        ({"diffusion_steps": 1, "reverse_steps": 1}, "diffusion_steps=1 must be at least 2"),
        ({"reverse_steps": -1}, "reverse_steps=-1 must be at least 0"),
        ({"reverse_steps": 21}, "reverse_steps=21 must not exceed diffusion_steps=20"),
        ({"denoiser_layers": 0}, "denoiser_layers=0 must be at least 1"),
        ({"denoiser_heads": 0}, "denoiser_heads=0 must be at least 1"),
        ({"denoiser_heads": 3}, "hidden_size=8 must be a multiple of denoiser_heads=3"),
        ({"denoiser_inner": 0}, "denoiser_inner=0 must be at least 1"),
        ({"denoiser_dropout": 1.0}, r"denoiser_dropout=1.0 must lie in \[0, 1\)"),
        ({"cand_topk": 0}, "cand_topk=0 must be at least 1"),
        ({"aug_ratio": 1.1}, r"aug_ratio=1.1 must lie in \[0, 1\]"),
        ({"aug_ratio": -0.1}, r"aug_ratio=-0.1 must lie in \[0, 1\]"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"x0_noise": False, "x0_noise_context": True}, "has no effect with x0_noise=False"),
        ({"n_heads": 3}, "hidden_size=8 must be a multiple of n_heads=3"),
    ],
)
def test_impossible_values_are_refused(make_config, values, message):
    """Before any data is read."""
    with pytest.raises(UserError, match=message):
        make_config("CaDiRec", **values)


def test_unknown_choices_are_refused_with_the_known_ones(make_config):
    assert len(OPTIONS) == 5
    for key, allowed in OPTIONS.items():
        with pytest.raises(UserError) as error:
            make_config("CaDiRec", **{key: "other"})
        assert str(error.value).startswith(f"{key}='other' is not one of {', '.join(allowed)} (")


def test_every_known_choice_trains(small):
    """One model for each value of each switch."""
    switches = dict(OPTIONS)
    for key in ("x0_noise", "x0_noise_context", "cl_detach_items"):
        switches[key] = (True, False)
    for key, allowed in switches.items():
        for value in allowed:
            loss = seeded_loss(small(**{key: value}))
            assert all(torch.isfinite(part) and part > 0 for part in loss), (key, value)


def test_more_candidates_than_items_are_refused(small):
    small(11, cand_topk=10)
    with pytest.raises(UserError, match=r"cand_topk=10 must not exceed the number of items, 9$"):
        small(10, cand_topk=10)


# ---------------------------------------------------------------- learning


def test_denoiser_learns_the_item_from_its_context(build, tmp_path):
    """On a chain any other item decides: the reverse process finds it, starting from pure noise.

    1 in 15 by chance. With the items of the context in random order it must not.
    """
    values: dict[str, Any] = {"cl_weight": 0.0, "diff_weight": 1.0}
    values |= {"denoiser_pos": "relative", "hidden_size": 32}
    values |= {"cand_topk": 1, "aug_ratio": 0.3, "MAX_ITEM_LIST_LENGTH": 8, "train_batch_size": 25}
    values |= dict.fromkeys(("hidden_dropout_prob", "attn_dropout_prob", "denoiser_dropout"), 0.0)
    draw = random.Random(0)
    starts = {f"u{user}": draw.randrange(15) for user in range(100)}
    walks = {user: [f"i{(start + i) % 15}" for i in range(9)] for user, start in starts.items()}
    write_inter(tmp_path, "chain", walks)
    _, train, _, _, model = build("CaDiRec", "chain", data_path=str(tmp_path), **values)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for epoch in range(100):
        train.set_epoch(epoch)
        for batch in train:
            optimizer.zero_grad()
            sum(model.calculate_loss(batch)).backward()
            optimizer.step()
    model.eval()
    model.aug_ratio = 0.0  # one position a row
    batch = next(iter(train))
    layout = TokenLayout(batch["item_length"], batch["item_id_list"].shape[1])
    torch.manual_seed(0)
    noised = model.choose_positions(batch["item_id_list"], layout, 10)
    original = noised.items[noised.token]

    def accuracy(steps: int) -> float:
        model.reverse_steps = steps
        best = model.candidates(model.generate(noised), original)[0][:, 0]
        return (best == original).float().mean().item()

    one = accuracy(1)
    assert one > 0.7
    # A longer chain keeps what one prediction knows.
    assert min(accuracy(steps) for steps in range(2, model.process.n_steps + 1)) > 0.95 * one
    model.reverse_steps = 4
    shuffled = noised._replace(items=noised.items[torch.randperm(len(noised.items))])
    wrong = model.candidates(model.generate(shuffled), original)[0][:, 0]
    assert (wrong == original).float().mean() < 0.15
