"""DiffuASR's generator: pairs, loss, guidance, sampling, rounding, each by its definition."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.diffusion import samplers, schedules
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.diffuasr import generator as diffuasr
from recbole_simdiff.models.diffuasr.generator import (
    GENERATION_KEYS,
    OPTIONS,
    DiffuASR,
    antithetic_steps,
    check_config,
    noise_schedule,
    training_pairs,
)
from recbole_simdiff.models.diffuasr.guide import Guide
from recbole_simdiff.models.diffuasr.training import averaged

M, D, V = 3, 16, 12
STEPS = 40
DEFAULTS = read_yaml(properties_dir() / "model" / "DiffuASR.yaml")
SMALL = {
    "n_pseudo": M,
    "hidden_size": D,
    "loss_memory_mb": 16.0,
    "MAX_ITEM_LIST_LENGTH": 5,
    "seed": 2020,
    "diffuasr_diffusion_steps": STEPS,
    "diffuasr_sample_steps": 4,
    "sunet_base_channels": 4,
    "sunet_channel_mult": [1, 2],
    "sunet_res_blocks": 1,
    "sunet_groups": 2,
}
TARGET = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
HISTORY = torch.tensor([[4, 5, 6, 7, 8], [2, 9, 1, 0, 0], [12, 0, 0, 0, 0], [3, 3, 5, 1, 0]])
USERS = torch.tensor([3, 0, 17, 5])
FIRST = HISTORY[:, 0]


class Settings(dict[str, Any]):
    """Like RecBole's Config: None for a missing key."""

    def __missing__(self, key: str) -> None:
        return None


def settings(**overrides: Any) -> Settings:
    return Settings(DEFAULTS | SMALL | overrides)


class LinearGuide:
    """A classifier whose log-probability is linear in the embeddings, and a table of its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.items = 0.1 * torch.randn(V + 1, D, generator=generator)
        self.items[0] = 0
        self.weight = torch.randn(V + 1, M, D, generator=generator)
        self.seen: list[tuple[Tensor, Tensor, str]] = []

    def table(self) -> Tensor:
        return self.items.clone()

    def check(self, length: int) -> None:
        assert length == M

    def log_prob(self, x: Tensor, label: Tensor, kind: str) -> Tensor:
        self.seen.append((x.detach(), label, kind))
        weight = self.weight[label] if label.dim() == 1 else self.weight[label].mean(1)
        return (x * weight).sum((1, 2))

    def __deepcopy__(self, memo: Any) -> "LinearGuide":
        return self


def build(guide: Any = None, seed: int = 0, **overrides: Any) -> DiffuASR:
    torch.manual_seed(seed)
    made = DiffuASR(settings(**overrides), V + 1, guide or LinearGuide())
    if made.null.requires_grad:  # as after training: no longer zero
        made.null.data.normal_()
    return made.eval()


def noised(rows: int = 4, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and c."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, M, D, generator=generator)
    t = torch.randint(1, STEPS + 1, (rows,), generator=generator)
    return x, t, torch.randn(rows, D, generator=generator)


class Network(nn.Module):
    """A noise predictor given by a function; it keeps what it was asked."""

    def __init__(self, predict: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.predict, self.asked = predict, []

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.asked.append((x_t, t, c))
        return self.predict(x_t, t, c)


def spy(model: DiffuASR) -> Network:
    real = model.network
    watching = Network(lambda x_t, t, c: real(x_t, t, c))
    model.network = watching
    return watching


def generate(model: DiffuASR, rows: Any = slice(None), seed: int = 7) -> Tensor:
    return model.generate(HISTORY[rows], USERS[rows], FIRST[rows], seed)


# ---------------------------------------------------------------- settings


def test_defaults_are_possible():
    check_config(Config("DiffuASR", "ml-100k"))
    check_config(Config("DiffuASR", "ml-100k", overrides={"preset": "official"}))
    check_config(settings())


def test_the_released_behaviour():
    """Everything in which the released code differs, and nothing else; no setting leaks labels."""
    released = {
        "pseudo_mix": "replace",
        "pseudo_at_evaluation": True,
        "diffuasr_embeddings": "scratch_trainable",
        "diffuasr_scale": "none",
        "diffuasr_condition": "sum",
        "diffuasr_strength": 1,
        "diffuasr_cf_training": "combined",
        "diffuasr_cg_log_prob": "bce",
        "diffuasr_cg_scale": "const_first",
        "diffuasr_cg_sign": "flipped",
        "diffuasr_guide_in_training": True,
        "diffuasr_sample_steps": 5,
        "diffuasr_monitor": "train_loss",
        "sunet_base_channels": 8,
        "sunet_channel_mult": [1, 2, 2, 2],
    }
    official = read_yaml(properties_dir() / "preset" / "DiffuASR" / "official.yaml")
    assert official == released
    assert all(DEFAULTS[key] != value for key, value in released.items())


def test_generation_keys_are_all_that_shape_the_generator():
    own = {key for key in DEFAULTS if key.startswith(("diffuasr_", "sunet_"))}
    more = {"n_pseudo", "MAX_ITEM_LIST_LENGTH"}
    assert set(GENERATION_KEYS) == own | more
    assert len(set(GENERATION_KEYS)) == len(GENERATION_KEYS) == 30


@pytest.mark.parametrize("key", OPTIONS)
def test_unknown_options_are_refused(key):
    assert DEFAULTS[key] in OPTIONS[key]
    with pytest.raises(UserError, match=f"{key}='other' is not one of {OPTIONS[key][0]}"):
        check_config(settings(**{key: "other"}))
    for value in OPTIONS[key]:
        check_config(settings(**{key: value}))


@pytest.mark.parametrize("key", ["n_pseudo", "diffuasr_epochs", "diffuasr_patience"])
@pytest.mark.parametrize("augmenter", ["diffuasr", "random"])
def test_counts_below_one_are_refused(key, augmenter):
    with pytest.raises(UserError, match=f"{key}=0 must be at least 1"):
        check_config(settings(augmenter=augmenter, **{key: 0}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffuasr_strength": -0.1}, "diffuasr_strength=-0.1 must be at least 0"),
        ({"diffuasr_strength": math.nan}, "diffuasr_strength=nan must be at least 0"),
        ({"diffuasr_diffusion_steps": 1}, "diffuasr_diffusion_steps=1 must be at least 2"),
        ({"diffuasr_sample_steps": 0}, "diffuasr_sample_steps=0 must be at least 1"),
        ({"diffuasr_sample_steps": 41}, "=41 must not exceed diffuasr_diffusion_steps=40"),
        ({"diffuasr_diffusion_steps": 20}, "largest beta, 1, must be below 1"),
        ({"diffuasr_batch_size": 0}, "diffuasr_batch_size=0 must be at least 1"),
        ({"diffuasr_learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"diffuasr_p_uncond": 1.0}, r"diffuasr_p_uncond=1.0 must lie in \[0, 1\)"),
        ({"diffuasr_ema_decay": 1.0}, r"diffuasr_ema_decay=1.0 must lie in \[0, 1\)"),
        ({"sunet_dropout": -0.1}, r"sunet_dropout=-0.1 must lie in \[0, 1\)"),
        ({"sunet_channel_mult": []}, r"sunet_channel_mult=\[\] must be a list of whole numbers"),
        ({"sunet_channel_mult": [1, 0]}, "must be a list of whole numbers of at least 1"),
        ({"sunet_groups": 3}, "sunet_groups=3 must divide .*=4 times 1 is 4"),
        (
            {"diffuasr_guidance": "classifier", "diffuasr_embeddings": "scratch_trainable"},
            "classifier needs embeddings that the recommender knows",
        ),
        (
            {"diffuasr_guidance": "classifier", "n_pseudo": 5},
            "n_pseudo=5 must be smaller than MAX_ITEM_LIST_LENGTH=5",
        ),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_config(settings(**change))


@pytest.mark.parametrize(
    ("width", "levels", "near"),
    [
        (60, 4, "are 64$"),
        (100, 4, "are 64 and 256$"),
        (128, 4, "are 64 and 256$"),
        (300, 4, "are 256 and 576$"),
        (8, 2, "are 4 and 16$"),
    ],
)
def test_widths_that_make_no_picture_are_refused(width, levels, near):
    """T2: with the nearest ones that do."""
    change = {"hidden_size": width, "sunet_channel_mult": [1] * levels}
    with pytest.raises(UserError, match=f"width {width} .*{near}"):
        check_config(settings(**change))
    with pytest.raises(UserError, match=f"width {width} .*{near}"):
        DiffuASR(settings(diffuasr_embeddings="scratch_trainable", **change), V + 1, None)
    check_config(settings(augmenter="random", **change))


@pytest.mark.parametrize("width", [64, 256])
def test_widths_that_make_a_picture(width):
    """T2: an item table narrower than the hidden states counts by itself."""
    check_config(settings(hidden_size=width, sunet_channel_mult=[1, 2, 2, 2]))
    check_config(settings(hidden_size=100, embedding_size=width, sunet_channel_mult=[1, 2, 2, 2]))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"diffuasr_embeddings": "pretrained_trainable"},
        {"diffuasr_embeddings": "scratch_trainable", "diffuasr_guidance": "classifier"},
    ],
)
def test_a_missing_recommender_is_refused(change):
    with pytest.raises(UserError, match="needs a recommender trained on the raw data"):
        DiffuASR(settings(**change), V + 1, None)


def test_a_recommender_of_other_items_is_refused():
    with pytest.raises(UserError, match="knows 12 items, the data set 13"):
        DiffuASR(settings(), V + 2, LinearGuide())


# ---------------------------------------------------------------- schedules and sampler


def test_signal_of_the_linear_schedule():
    """T4: to six digits, at the papers' indices 0, 200, ..., 999."""
    signal, _ = schedules.variance_preserving(noise_schedule("linear", 1000))
    expected = [0.9999, 0.656347, 0.193572, 0.0255675, 0.00150752, 4.03583e-05]
    found = signal[[1, 201, 401, 601, 801, 1000]] ** 2
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", OPTIONS["diffuasr_schedule"])
@pytest.mark.parametrize("n_steps", [50, 1000])
def test_signals_fall(name, n_steps):
    """T4: strictly, inside (0, 1); fewer steps add the same noise in total."""
    signal, noise = schedules.variance_preserving(noise_schedule(name, n_steps))
    assert len(signal) == n_steps + 1
    assert (signal.diff() < 0).all()
    assert signal[1] < 1
    assert signal[-1] > 0
    assert (noise[1:] > 0).all()
    # At least as noisy at its end as the standard one is at three quarters.
    assert signal[-1] ** 2 < 0.01


@pytest.mark.parametrize("schedule", ["linear", "quad"])
def test_noising_is_that_of_diffusers(schedule):
    """T4: the same coefficients at every step."""
    model = build(diffuasr_diffusion_steps=1000, diffuasr_schedule=schedule)
    name = {"linear": "linear", "quad": "scaled_linear"}[schedule]
    oracle = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=name)
    x_0, _, _ = noised()
    eps, t = torch.randn_like(x_0), torch.tensor([1, 200, 731, 1000])
    expected = oracle.add_noise(x_0, eps, t - 1)
    torch.testing.assert_close(model.process.q_sample(x_0, t, eps), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_steps", [5, 20, 50])
def test_chain_is_that_of_diffusers(n_steps):
    """T5: leading indices, noise predictions as given, eta 0, from pure noise."""
    model = build(
        diffuasr_diffusion_steps=1000, diffuasr_sample_steps=n_steps, diffuasr_guidance="none"
    )
    if n_steps == 5:
        assert model.times.tolist() == [801, 601, 401, 201, 1, 0]
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(1001, 4, M, D, generator=generator)
    model.network = Network(lambda x_t, t, c: given[t[0]])
    x, _, c = noised()
    found = model.sample(c, FIRST, x)
    oracle = DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    oracle.set_timesteps(n_steps)
    assert [int(t[0]) - 1 for _, t, _ in model.network.asked] == oracle.timesteps.tolist()
    expected = x
    for t in oracle.timesteps:
        expected = oracle.step(given[t + 1], t, expected).prev_sample
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-5 * scale


def test_true_noise_returns_the_items():
    """T8: from any step, one jump to the clean end gives x_0 and so the items."""
    model = build(diffuasr_diffusion_steps=1000, diffuasr_sample_steps=1000)
    x_0 = model.table[TARGET]
    eps = torch.randn_like(x_0)
    for step in (1, 2, 100, 500, 999, 1000):
        t = torch.full((4,), step)
        x_t = model.process.q_sample(x_0, t, eps)
        estimate = model.process.x_0_from(x_t, t, eps)
        torch.testing.assert_close(estimate, x_0, atol=1e-3, rtol=0)
        assert torch.equal(model.nearest_items(estimate), TARGET)


@pytest.mark.parametrize("sample_steps", [1, 4, 40])
def test_a_perfect_denoiser_generates_the_targets(sample_steps):
    """T8: through the whole chain, whatever the noise."""
    model = build(diffuasr_sample_steps=sample_steps, diffuasr_guidance="none")
    x_0 = model.table[TARGET]
    model.network = Network(lambda x_t, t, c: model.process.eps_from(x_t, t, x_0))
    assert torch.equal(generate(model), TARGET)


@pytest.mark.parametrize(("base", "recovered"), [(2, 0.0), (4, 1.0)])
def test_fewer_channels_than_items_cannot_sample(base, recovered, caplog):
    """The last convolution maps ``base`` channels to M = 3; even a predictor that knows the answer
    and gives the nearest noise it can is lost with 2. Its user is told."""
    change = {"sunet_base_channels": base, "sunet_groups": 2, "diffuasr_diffusion_steps": 1000}
    model = build(diffuasr_guidance="none", diffuasr_sample_steps=50, **change)
    assert ("predictions cannot span the noise" in caplog.text) == (base < M)
    last, side = model.network.conv_out, math.isqrt(D)
    images = torch.eye(base * D).view(-1, base, side, side)
    reach = F.conv2d(images, last.weight, padding=1).flatten(1).detach().double()
    assert torch.linalg.matrix_rank(reach) == min(base, M) * D
    span = torch.linalg.svd(reach, full_matrices=False).Vh[: min(base, M) * D]
    onto = (span.t() @ span).float()
    x_0 = model.table[TARGET]

    def nearest(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return (model.process.eps_from(x_t, t, x_0).flatten(1) @ onto).view_as(x_t)

    model.network = Network(nearest)
    assert abs(float((generate(model) == TARGET).float().mean()) - recovered) < 0.4
    assert DEFAULTS["sunet_base_channels"] >= DEFAULTS["n_pseudo"]


# ---------------------------------------------------------------- training pairs


def by_hand(
    sequences: list[list[int]], m: int, length: int, windows: str
) -> list[tuple[list[int], list[int]]]:
    """Definition: M items that at least 3 follow; of those the newest ``length``."""
    pairs = []
    for sequence in sequences:
        starts = range(len(sequence) - m - 2)
        for start in starts if windows == "all" else starts[:1]:
            after = sequence[start + m :][-length:]
            pairs.append((sequence[start : start + m], after + [0] * (length - len(after))))
    return pairs


@pytest.mark.parametrize("windows", ["first", "all"])
@pytest.mark.parametrize("m", [1, 3, 10])
def test_pairs(windows, m):
    """Users with M + 2 items or fewer give none; the first M items, then what follows."""
    lengths = [5, 0, m + 2, m + 3, 12, m + 4, 30, 1, 14]
    sequences, item = [], 1
    for length in lengths:
        sequences.append(list(range(item, item + length)))
        item += length
    ends = torch.tensor(lengths).cumsum(0)
    target, condition = training_pairs(torch.arange(1, item), ends, m, 6, windows)
    expected = by_hand(sequences, m, 6, windows)
    assert target.dtype == condition.dtype == torch.long
    assert target.tolist() == [pair[0] for pair in expected]
    assert condition.tolist() == [pair[1] for pair in expected]
    assert len(expected) >= 4


def test_no_pairs():
    target, condition = training_pairs(torch.arange(5), torch.tensor([5]), 3, 6, "first")
    assert target.shape == (0, 3)
    assert condition.shape == (0, 6)
    nobody = training_pairs(torch.arange(0), torch.tensor([0, 0]), 3, 6, "all")
    assert [len(part) for part in nobody] == [0, 0]


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_steps_are_antithetic(n):
    """T27: in 1..T, and the second half mirrors the first."""
    t = antithetic_steps(n, STEPS, torch.Generator().manual_seed(n))
    assert t.shape == (n,)
    assert t.min() >= 1
    assert t.max() <= STEPS
    half = n // 2 + 1
    assert torch.equal(t[half:], STEPS + 1 - t[: n - half])


def test_steps_are_uniform():
    """T27: chi-square of 40 cells, at the 0.1 % level; both ends occur."""
    t = antithetic_steps(40_000, STEPS, torch.Generator().manual_seed(0))
    count = t.bincount(minlength=STEPS + 1)[1:].double()
    # Mirrored halves double the variance of each cell.
    assert ((count - 1000) ** 2 / 1000).sum() / 2 < 73.4
    assert count.min() > 0


def test_the_loss_is_the_mean_squared_error_of_the_noise():
    """Against the same draws, made once more."""
    model = build(diffuasr_guidance="none")
    torch.manual_seed(11)
    found = model.loss(TARGET, HISTORY)
    torch.manual_seed(11)
    t = antithetic_steps(4, STEPS)
    x_0 = model.table[TARGET]
    eps = torch.randn_like(x_0)
    x_t = model.process.q_sample(x_0, t, eps)
    c = torch.stack([model.table[row[row > 0]].mean(0) for row in HISTORY])
    expected = ((model.network(x_t, t, c) - eps) ** 2).sum() / (4 * M * D)
    torch.testing.assert_close(found, expected)


def test_a_perfect_predictor_has_no_loss():
    model = build(diffuasr_guidance="none")
    x_0 = model.table[TARGET]
    model.network = Network(lambda x_t, t, c: model.process.eps_from(x_t, t, x_0))
    assert model.loss(TARGET, HISTORY) < 1e-8
    assert model.fixed_noise_loss(TARGET, HISTORY, 3) < 1e-8


def test_conditions():
    """T28: mean and sum differ by the count of items; padding adds nothing."""
    mean, total = build(), build(diffuasr_condition="sum")
    count = (HISTORY > 0).sum(1, keepdim=True)
    expected = torch.stack([mean.table[row].sum(0) for row in HISTORY])
    torch.testing.assert_close(total.condition_vector(HISTORY), expected)
    torch.testing.assert_close(mean.condition_vector(HISTORY) * count, expected)
    longer = F.pad(HISTORY, (0, 4))
    torch.testing.assert_close(mean.condition_vector(longer), mean.condition_vector(HISTORY))


def test_conditions_are_dropped_at_random():
    """T28: within four standard deviations, and replaced by the null vector."""
    model = build(diffuasr_p_uncond=0.3)
    watching = spy(model)
    with torch.no_grad():
        model.null.fill_(7.0)
        model.loss(TARGET.repeat(500, 1), HISTORY.repeat(500, 1))
    (_, _, c), n = watching.asked[0], 2000
    dropped = (c == 7).all(1)
    deviation = math.sqrt(0.3 * 0.7 * n)
    assert abs(int(dropped.sum()) - 0.3 * n) < 4 * deviation
    kept = model.condition_vector(HISTORY.repeat(500, 1))[~dropped]
    torch.testing.assert_close(c[~dropped], kept)


@pytest.mark.parametrize(
    "change",
    [
        {"diffuasr_p_uncond": 0.0},
        {"diffuasr_guidance": "none", "diffuasr_p_uncond": 0.9},
        {"diffuasr_guidance": "classifier", "diffuasr_p_uncond": 0.9},
    ],
)
def test_conditions_are_kept(change):
    """T28: the null vector takes no part, and no random number is drawn for it."""
    model = build(**change)
    model.null.data.fill_(math.nan)
    torch.manual_seed(1)
    assert torch.isfinite(model.loss(TARGET, HISTORY))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    antithetic_steps(4, STEPS)
    torch.randn(4, M, D)
    assert torch.equal(torch.get_rng_state(), after)


def test_combined_training_fits_the_guided_prediction():
    """No condition is dropped, and both branches are in the loss."""
    model = build(diffuasr_cf_training="combined", diffuasr_strength=0.7, diffuasr_p_uncond=0.9)
    torch.manual_seed(2)
    found = model.loss(TARGET, HISTORY)
    torch.manual_seed(2)
    t, x_0 = antithetic_steps(4, STEPS), model.table[TARGET]
    eps = torch.randn_like(x_0)
    x_t, c = model.process.q_sample(x_0, t, eps), model.condition_vector(HISTORY)
    null = model.null.expand_as(c)
    guided = 1.7 * model.network(x_t, t, c) - 0.7 * model.network(x_t, t, null)
    torch.testing.assert_close(found, (guided - eps).square().mean())


def test_the_classifier_is_in_the_loss_only_when_asked():
    guide = LinearGuide()
    kept_out = build(guide, diffuasr_guidance="classifier")
    kept_out.loss(TARGET, HISTORY)
    kept_out.fixed_noise_loss(TARGET, HISTORY, 1)
    assert guide.seen == []
    model = build(
        guide,
        diffuasr_guidance="classifier",
        diffuasr_guide_in_training=True,
        diffuasr_strength=2.0,
    )
    torch.manual_seed(2)
    found = model.loss(TARGET, HISTORY)
    torch.manual_seed(2)
    t, x_0 = antithetic_steps(4, STEPS), model.table[TARGET]
    eps = torch.randn_like(x_0)
    x_t, c = model.process.q_sample(x_0, t, eps), model.condition_vector(HISTORY)
    assert torch.equal(guide.seen[0][1], HISTORY[:, 0])  # the item right after the target
    torch.testing.assert_close(found, (model.guided_noise(x_t, t, c, FIRST) - eps).square().mean())


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_the_fixed_noise_loss_is_fixed(monkeypatch, rows):
    """It draws nothing from the global generator, needs no gradient, has no dropout."""
    monkeypatch.setattr(diffuasr, "ROWS", rows)
    model = build(sunet_dropout=0.5).train()
    state = torch.get_rng_state()
    first = model.fixed_noise_loss(TARGET, HISTORY, 5)
    assert isinstance(first, float)
    assert model.fixed_noise_loss(TARGET, HISTORY, 5) == first
    assert model.fixed_noise_loss(TARGET, HISTORY, 6) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(diffuasr, "ROWS", 4)
    if rows == 512:
        assert model.fixed_noise_loss(TARGET, HISTORY, 5) == pytest.approx(first)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_fixed_noise_loss_is_a_mean_over_pairs(monkeypatch, rows):
    """Each weighs the same, whatever chunk it is in."""
    monkeypatch.setattr(diffuasr, "ROWS", rows)
    model = build()

    def errors(x_0: Tensor, t: Tensor, eps: Tensor, c: Tensor, condition: Tensor) -> Tensor:
        return condition[:, :1, None].float().expand_as(x_0)

    monkeypatch.setattr(model, "_errors", errors)
    expected = FIRST.float().mean().item()
    assert model.fixed_noise_loss(TARGET, HISTORY, 5) == pytest.approx(expected)


@pytest.mark.parametrize("source", OPTIONS["diffuasr_embeddings"])
def test_who_learns(source):
    """Frozen embeddings stay; the padding row never gets a gradient; all else does."""
    model = build(diffuasr_embeddings=source).train()
    model.loss(TARGET, HISTORY).backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learnt >= {"network.conv_in.weight", "null"}
    assert ("table" in learnt) == (source != "pretrained_frozen")
    assert ("table" in dict(model.named_buffers())) == (source == "pretrained_frozen")
    if source != "pretrained_frozen":
        assert model.table.grad[0].abs().max() == 0
        assert (model.table.grad[1:].abs().sum(1) > 0).all()


def test_the_null_vector_learns_only_where_it_is_used():
    for guidance in OPTIONS["diffuasr_guidance"]:
        model = build(diffuasr_guidance=guidance)
        assert model.null.requires_grad == (guidance == "classifier_free")


# ---------------------------------------------------------------- embeddings


@pytest.mark.parametrize("source", ["pretrained_frozen", "pretrained_trainable"])
def test_the_table_is_the_recommenders_at_unit_scale(source):
    guide = LinearGuide()
    model = build(guide, diffuasr_embeddings=source)
    assert float(model.table[1:].detach().std()) == pytest.approx(1)
    torch.testing.assert_close(model.table.detach() * model.scale, guide.items)
    raw = build(guide, diffuasr_embeddings=source, diffuasr_scale="none")
    assert raw.scale == 1
    assert torch.equal(raw.table, guide.items)


@pytest.mark.parametrize("guide", [None, LinearGuide()])
def test_embeddings_from_scratch(guide):
    torch.manual_seed(0)
    config = settings(diffuasr_embeddings="scratch_trainable", diffuasr_scale="unit_std")
    model = DiffuASR(config, 1001, guide)
    assert model.table.shape == (1001, D)
    assert model.scale == 1
    assert not model.table[0].any()
    assert float(model.table[1:].detach().std()) == pytest.approx(1, abs=0.05)


def test_everything_learnt_or_derived_is_saved():
    """A generator made from other embeddings becomes the saved one."""
    model = build(seed=1)
    other = LinearGuide()
    other.items = other.items.flip(1) * 3
    again = build(other, seed=2)
    assert not torch.equal(generate(again), generate(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.scale, model.scale)
    assert torch.equal(generate(again), generate(model))
    assert {"scale", "table", "null"} < set(model.state_dict())


# ---------------------------------------------------------------- guidance


def test_strength_zero_is_no_guidance(monkeypatch):
    """T10: bit for bit, without the classifier and without the null branch."""
    guide = LinearGuide()
    plain = build(guide, diffuasr_guidance="none")
    expected, x_t = generate(plain), noised()
    for guidance in ("classifier", "classifier_free"):
        model = build(guide, diffuasr_guidance=guidance, diffuasr_strength=0.0)
        model.load_state_dict(plain.state_dict())
        model.null.data.fill_(math.nan)
        watching = spy(model)
        assert torch.equal(generate(model), expected)
        assert torch.equal(model.guided_noise(*x_t, FIRST), plain.guided_noise(*x_t, FIRST))
        assert {len(asked[0]) for asked in watching.asked} == {4}
    assert guide.seen == []


def test_classifier_free_identity():
    """T11: with the null condition the strength has no effect; elsewhere it is affine."""
    x_t, t, c = noised()
    found = {}
    for strength in (0.0, 1.0, 2.5):
        model = build(diffuasr_strength=strength)
        null = model.null.detach().expand_as(c)
        plain = model.network(x_t, t, null)
        torch.testing.assert_close(model.guided_noise(x_t, t, null, FIRST), plain)
        found[strength] = model.guided_noise(x_t, t, c, FIRST)
    line = found[0.0] + 2.5 * (found[1.0] - found[0.0])
    torch.testing.assert_close(found[2.5], line)
    conditional = model.network(x_t, t, c)
    torch.testing.assert_close(found[0.0], conditional)
    torch.testing.assert_close(found[1.0], 2 * conditional - model.network(x_t, t, null))
    assert not torch.allclose(found[1.0], found[0.0])


def test_classifier_free_is_one_call():
    model = build()
    watching = spy(model)
    model.guided_noise(*noised(), FIRST)
    assert [len(asked[0]) for asked in watching.asked] == [8]


@pytest.mark.parametrize("sign", ["paper", "flipped"])
@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0])
def test_classifier_guidance_approaches_the_label(sign, strength):
    """T12: log p of the implied x_0 rises at every step, and falls with the flipped sign."""
    guide = LinearGuide()
    model = build(
        guide, diffuasr_guidance="classifier", diffuasr_strength=strength, diffuasr_cg_sign=sign
    )
    for step in range(1, STEPS + 1):
        x_t, _, c = noised(seed=step)
        t = torch.full((4,), step)
        plain = model.process.x_0_from(x_t, t, model.network(x_t, t, c))
        guided = model.process.x_0_from(x_t, t, model.guided_noise(x_t, t, c, FIRST))
        log_p, before = (guide.log_prob(x * model.scale, FIRST, "") for x in (guided, plain))
        assert ((log_p > before) if sign == "paper" else (log_p < before)).all()


@pytest.mark.parametrize("scale", ["per_step", "const_first"])
@pytest.mark.parametrize("sign", ["paper", "flipped"])
def test_classifier_guidance_scale(scale, sign):
    """T13: strength times the noise of the step (or of the first) times the gradient in x_t."""
    guide = LinearGuide()
    model = build(
        guide,
        diffuasr_guidance="classifier",
        diffuasr_strength=0.3,
        diffuasr_cg_scale=scale,
        diffuasr_cg_sign=sign,
    )
    x_t, t, c = noised()
    step = model.guided_noise(x_t, t, c, FIRST) - model.network(x_t, t, c)
    gradient = guide.weight[FIRST] * model.scale
    at = t if scale == "per_step" else torch.ones_like(t)
    noise = model.process.noise[at].float().view(-1, 1, 1)
    expected = (-0.3 if sign == "paper" else 0.3) * noise * gradient
    torch.testing.assert_close(step, expected, atol=1e-6, rtol=1e-4)


def test_the_classifier_sees_its_own_scale_and_label():
    guide = LinearGuide()
    x_t, t, c = noised()
    oldest = torch.tensor([9, 5, 7, 11])  # of histories too long for the condition to hold it
    for label, expected in (("item", oldest), ("seq", HISTORY)):
        guide.seen.clear()
        model = build(
            guide,
            diffuasr_guidance="classifier",
            diffuasr_cg_label=label,
            diffuasr_cg_log_prob="bce",
            diffuasr_strength=1.0,
        )
        model.generate(HISTORY, USERS, oldest, 7)
        assert len(guide.seen) == 4
        assert all(torch.equal(seen, expected) for _, seen, _ in guide.seen)
        assert {kind for _, _, kind in guide.seen} == {"bce"}
    guide.seen.clear()
    model.guided_noise(x_t, t, c, HISTORY)
    torch.testing.assert_close(guide.seen[0][0], x_t * model.scale)


def test_a_real_classifier_guides_and_stays_as_it_is():
    """T14: training and generation leave it, and the frozen table, bit for bit; results repeat."""
    from tests.models.diffuasr.test_guide import recommender

    rec = recommender("SASRec", hidden_dropout_prob=0.5, attn_dropout_prob=0.5).train()
    before = copy.deepcopy(rec.state_dict())
    change = {
        "diffuasr_guidance": "classifier",
        "diffuasr_strength": 3.0,
        "diffuasr_guide_in_training": True,
    }
    model = build(Guide(rec, "cpu"), **change).train()
    table = model.table.clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(TARGET, HISTORY).backward()
        optimizer.step()
    assert torch.equal(generate(model), generate(model))
    assert torch.equal(model.table, table)
    assert all(torch.equal(value, before[key]) for key, value in rec.state_dict().items())
    assert all(p.grad is None for p in rec.parameters())
    other = build(Guide(rec, "cpu"), **change | {"diffuasr_strength": 0.0})
    other.load_state_dict(model.state_dict())
    assert not torch.equal(generate(other), generate(model))


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("memory", [16.0, 1e-9])
def test_rounding_is_the_best_match(memory):
    """T16: brute force, in one block or many; never padding, whatever its row holds."""
    model = build(loss_memory_mb=memory)
    model.table[0] = 100.0
    model.table[4] *= 20.0
    x = torch.randn(40, M, D)
    found = model.nearest_items(x)
    for row in range(40):
        for j in range(M):
            score = model.table[1:] @ x[row, j] / model.table[1:].norm(dim=1)
            assert found[row, j] == score.argmax() + 1
    assert found.min() >= 1
    assert found.max() <= V
    assert torch.equal(model.nearest_items(3.7 * x), found)


def test_an_items_embedding_rounds_to_it():
    """T16: of equal directions, the lowest id."""
    model = build()
    x = model.table[TARGET]
    assert torch.equal(model.nearest_items(x), TARGET)
    model.table[9] = 2 * model.table[2]
    expected = torch.where(TARGET == 9, 2, TARGET)
    assert torch.equal(model.nearest_items(model.table[TARGET]), expected)


def test_items_without_training_interactions_are_never_generated():
    known = torch.tensor([2, 5, 9])
    model = DiffuASR(settings(), V + 1, LinearGuide(), known)
    for x in (model.table[TARGET], torch.randn(4, M, D)):
        assert torch.isin(model.nearest_items(x), known).all()


# ---------------------------------------------------------------- generation


def test_generated_ids_are_items():
    """T16: long tensors of ids 1..V."""
    found = generate(build())
    assert found.shape == (4, M)
    assert found.dtype == torch.long
    assert found.min() >= 1
    assert found.max() <= V


@pytest.mark.parametrize("guidance", OPTIONS["diffuasr_guidance"])
def test_users_do_not_depend_on_one_another(monkeypatch, guidance):
    """T25, T34: any order, any part, any chunk, alone; another seed or number is another draw."""
    model = build(diffuasr_guidance=guidance, diffuasr_strength=1.0)
    found = generate(model)
    assert torch.equal(generate(model), found)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(generate(model, order), found[order])
    for row in range(4):
        assert torch.equal(generate(model, slice(row, row + 1)), found[row : row + 1])
    for rows in (1, 3):
        monkeypatch.setattr(diffuasr, "ROWS", rows)
        assert torch.equal(generate(model), found)
    assert not torch.equal(generate(model, seed=8), found)
    assert not torch.equal(model.generate(HISTORY, USERS + 1, FIRST, 7), found)


def test_generation_leaves_the_global_generator_and_the_mode():
    """T14, T25: a generator in train mode generates without dropout."""
    model = build(sunet_dropout=0.5)
    expected = generate(model)
    model.train()
    state = torch.get_rng_state()
    assert torch.equal(generate(model), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_the_noise_is_standard():
    """And that of a user is no other's."""
    noise = build()._noise_of(torch.arange(600), 1)
    assert noise.shape == (600, M, D)
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.03


@pytest.mark.parametrize("guidance", OPTIONS["diffuasr_guidance"])
def test_one_pseudo_item(guidance):
    """T34: M = 1 trains and generates, alone as in a batch."""
    guide = LinearGuide()
    guide.weight = guide.weight[:, :1]
    guide.check = lambda length: None
    model = build(guide, n_pseudo=1, diffuasr_guidance=guidance, diffuasr_strength=1.0)
    assert torch.isfinite(model.loss(TARGET[:1, :1], HISTORY[:1]))
    assert math.isfinite(model.fixed_noise_loss(TARGET[:1, :1], HISTORY[:1], 1))
    found = generate(model)
    assert found.shape == (4, 1)
    assert torch.equal(generate(model, slice(2, 3)), found[2:3])


def test_a_batch_of_one_has_its_own_loss():
    """T34: the mean over pairs of the losses of each alone."""
    model = build(diffuasr_guidance="none")
    x_0, (_, t, _) = model.table[TARGET], noised()
    eps, c = torch.randn_like(x_0), model.condition_vector(HISTORY)
    together = model._errors(x_0, t, eps, c, HISTORY)
    for i in range(4):
        one = slice(i, i + 1)
        alone = model._errors(x_0[one], t[one], eps[one], c[one], HISTORY[one])
        torch.testing.assert_close(alone, together[one])


# ---------------------------------------------------------------- averages, collapse, learning


def steps(
    model: DiffuASR,
    n: int,
    target: Tensor = TARGET,
    condition: Tensor = HISTORY,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Train for n steps on all pairs at once."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for _ in range(n):
        optimizer.zero_grad()
        model.loss(target, condition).backward()
        optimizer.step()
        after()
    model.eval()


def test_averaged_weights():
    """T31: a moving average of every learnt weight, and the generator made of it."""
    model = build(diffuasr_embeddings="pretrained_trainable")
    average = averaged(model, 0.75)
    expected: dict[str, Tensor] = {}

    def update() -> None:
        average.update_parameters(model)
        for name, p in model.named_parameters():
            old = expected.get(name, p.detach())
            expected[name] = 0.75 * old + 0.25 * p.detach()

    steps(model, 4, after=update)
    kept = average.module
    assert isinstance(kept, DiffuASR)
    for name, p in kept.named_parameters():
        torch.testing.assert_close(p, expected[name])
    assert kept.guide is model.guide
    assert not torch.equal(kept.null, model.null)
    # What is saved are the weights that are used.
    loaded = build(diffuasr_embeddings="pretrained_trainable")
    loaded.load_state_dict(kept.state_dict())
    assert torch.equal(generate(loaded), generate(kept))
    x_t, t, c = noised()
    raw = model.guided_noise(x_t, t, c, FIRST)
    assert not torch.allclose(kept.guided_noise(x_t, t, c, FIRST), raw)


def test_mean_cosine():
    """T30: over all pairs of different items, without padding."""
    model = build()
    unit = F.normalize(model.table[1:], dim=1)
    pairs = [unit[i] @ unit[j] for i in range(V) for j in range(V) if i != j]
    assert model.mean_cosine() == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    model.table[1:] = model.table[1:2]
    assert model.mean_cosine() == pytest.approx(1)


def test_trained_embeddings_move_together():
    """T30: the noise loss alone draws all items to one vector; frozen ones stay."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(1, V + 1, (64, M), generator=generator)
    condition = torch.randint(1, V + 1, (64, 5), generator=generator)
    change = {"diffuasr_guidance": "none", "sunet_dropout": 0.0}
    frozen, trained = build(**change), build(diffuasr_embeddings="scratch_trainable", **change)
    before = [model.mean_cosine() for model in (frozen, trained)]
    steps(frozen, 5, target, condition)
    steps(trained, 250, target, condition)
    assert frozen.mean_cosine() == before[0]
    assert before[1] < 0.1
    assert trained.mean_cosine() > 0.5


def test_it_learns_what_precedes_a_history():
    """T29: 64 users of 8 tastes; without its condition it cannot tell whose items come first."""
    generator = torch.Generator().manual_seed(0)
    n_tastes, n_own = 8, 5
    first = n_own * (torch.arange(64) % n_tastes).unsqueeze(1)
    target = first + torch.arange(1, M + 1)
    condition = first + torch.randint(M + 1, n_own + 1, (64, 4), generator=generator)
    guide = LinearGuide()
    n_items = n_tastes * n_own
    guide.items = F.pad(torch.randn(n_items, D, generator=generator), (0, 0, 1, 0))
    config = settings(
        diffuasr_sample_steps=STEPS,
        diffuasr_strength=0.0,
        sunet_dropout=0.0,
        sunet_base_channels=16,
        sunet_channel_mult=[1],
        sunet_groups=8,
    )
    torch.manual_seed(0)
    model = DiffuASR(config, n_items + 1, guide)
    before = model.fixed_noise_loss(target, condition, 1)
    steps(model, 300, target, condition)
    assert model.fixed_noise_loss(target, condition, 1) < before / 4

    users, label = torch.arange(64), condition[:, 0]
    for n_steps in (2, 5, 10, 20, STEPS):  # shorter chains do not know less
        model.times = samplers.leading(STEPS, n_steps)
        found = model.generate(condition, users, label, 3)
        assert (found == target).float().mean() > 0.3
    model.condition_vector = lambda items: model.null.expand(len(items), -1)
    blind = model.generate(condition, users, label, 3)
    assert (blind == target).float().mean() < 0.15
