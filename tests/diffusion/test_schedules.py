"""Coefficient tables against the recursion they stand for and against published values."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from recbole_simdiff.diffusion import schedules
from recbole_simdiff.diffusion.schedules import FAMILIES, linear_betas

T = 1000
BETAS = linear_betas(T, 1e-4, 0.02)
EVERY_FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))


def test_three_families_are_known():
    """The parametrised tests below glob the table; a missing family must not pass silently."""
    assert sorted(FAMILIES) == ["convex", "vp", "vp_zsnr"]


def test_linear_betas_run_from_start_to_end():
    assert BETAS.shape == (T,)
    assert BETAS.dtype == torch.float64
    assert BETAS[[0, -1]].tolist() == [1e-4, 0.02]
    torch.testing.assert_close(BETAS.diff(), torch.full_like(BETAS[1:], 0.0199 / (T - 1)))


@EVERY_FAMILY
def test_tables_start_clean_in_float64(family):
    signal, noise = FAMILIES[family](BETAS)
    assert signal.shape == noise.shape == (T + 1,)
    assert signal.dtype == noise.dtype == torch.float64
    assert (signal[0], noise[0]) == (1, 0)


@EVERY_FAMILY
def test_closed_form_equals_recursion(family):
    """Invariant 1: z_t = a_t z_(t-1) + b_t noise (Eq. 8), iterated, is A_t z_0 + C_t noise."""
    signal, noise = FAMILIES[family](BETAS)
    a = signal[1:] / signal[:-1]
    b = noise[1:] - a * noise[:-1]
    generator = torch.Generator().manual_seed(0)
    z_0, eps = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    z, c = z_0, torch.zeros((), dtype=torch.float64)
    for t in range(1, T + 1):
        z = a[t - 1] * z + b[t - 1] * eps
        c = a[t - 1] * c + b[t - 1]
        torch.testing.assert_close(z, signal[t] * z_0 + noise[t] * eps, atol=1e-10, rtol=0)
        torch.testing.assert_close(c, noise[t], atol=1e-10, rtol=0)
    assert (b > 0).all()


@EVERY_FAMILY
def test_steps_use_the_betas_of_the_family(family):
    """Invariant 1: A_t comes from the betas, not from any decreasing table."""
    signal, _ = FAMILIES[family](BETAS)
    product = torch.ones((), dtype=torch.float64)
    raw = []
    for beta in BETAS:
        product = product * (1 - beta)
        raw.append(product)
    raw = torch.stack(raw)
    if family == "convex":
        expected = raw
    elif family == "vp":
        expected = raw.sqrt()
    else:
        r = raw.sqrt()
        expected = (r - r[-1]) * r[0] / (r[0] - r[-1])
    torch.testing.assert_close(signal[1:], expected, atol=1e-12, rtol=0)


def test_zero_terminal_values():
    """Invariant 2: the values printed in the specification, (t - 1, A_t, C_t)."""
    signal, noise = FAMILIES["vp_zsnr"](BETAS)
    for index, a, c in [
        (0, 0.99995, 0.01000),
        (49, 0.98531, 0.17079),
        (99, 0.94677, 0.32190),
        (199, 0.81061, 0.58559),
        (249, 0.72217, 0.69171),
        (499, 0.27573, 0.96123),
        (749, 0.05186, 0.99865),
        (899, 0.01030, 0.99995),
    ]:
        assert signal[index + 1].item() == pytest.approx(a, abs=1e-5)
        assert noise[index + 1].item() == pytest.approx(c, abs=1e-5)


def test_zero_terminal_ends_in_pure_noise_and_keeps_the_first_step():
    """Invariant 2: A_T == 0 and C_T == 1 exactly; A_1 is unchanged by the rescale."""
    signal, noise = FAMILIES["vp_zsnr"](BETAS)
    assert signal[-1].item() == 0.0
    assert noise[-1].item() == 1.0
    assert signal[1].item() == pytest.approx((1 - 1e-4) ** 0.5, abs=1e-12)


def test_last_values_of_the_families_that_keep_some_signal():
    """Invariant 2: without the rescale the last step still carries a little of z_0."""
    signal, _ = FAMILIES["vp"](BETAS)
    assert signal[-1].item() == pytest.approx(0.006353, abs=1e-6)
    signal, noise = FAMILIES["convex"](BETAS)
    assert signal[-1].item() == pytest.approx(4.036e-5, abs=1e-8)
    assert noise[-1].item() == pytest.approx(0.99996, abs=1e-5)


@EVERY_FAMILY
def test_signal_falls_and_noise_rises(family):
    """Invariant 2: A strictly decreasing, all b_t positive; C rises with it."""
    signal, noise = FAMILIES[family](BETAS)
    assert (signal.diff() < 0).all()
    assert (noise.diff() > 0).all()
    a = signal[1:] / signal[:-1]
    assert (noise[1:] - a * noise[:-1] > 0).all()


def test_coefficients_obey_the_constraint_of_their_family():
    """Invariant 2: A^2 + C^2 = 1 (variance preserving), A + C = 1 (convex)."""
    one = torch.ones(T + 1, dtype=torch.float64)
    for family in ("vp", "vp_zsnr"):
        signal, noise = FAMILIES[family](BETAS)
        torch.testing.assert_close(signal**2 + noise**2, one, atol=1e-12, rtol=0)
    signal, noise = FAMILIES["convex"](BETAS)
    torch.testing.assert_close(signal + noise, one, atol=1e-12, rtol=0)


@EVERY_FAMILY
@pytest.mark.parametrize("steps", [2, 20])
def test_short_schedules_are_finite(family, steps):
    """Few steps are legal; the rescale divides by A_1 - A_T, which must not vanish."""
    for table in FAMILIES[family](linear_betas(steps, 1e-4, 0.02)):
        assert table.shape == (steps + 1,)
        assert torch.isfinite(table).all()


# ---------------------------------------------------------------- betas, by schedule

SCHEDULES = {
    "linear": lambda n: schedules.linear_betas(n, 1e-4, 0.02),
    "quadratic": lambda n: schedules.quadratic_betas(n, 1e-4, 0.02),
    "sigmoid": lambda n: schedules.sigmoid_betas(n, 1e-4, 0.02),
    "cosine": lambda n: schedules.cosine_betas(n, 1e-4, 0.9999),
    "sqrt": schedules.sqrt_betas,
    "exp": lambda n: schedules.exponential_betas(n, 0.1, 10.0),
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", sorted(SCHEDULES))


@EVERY_SCHEDULE
@pytest.mark.parametrize("n_steps", [1, 2, 50, 1000, 2000])
def test_betas_are_noise_shares(schedule, n_steps):
    """DreamRec T1, DiffuASR T4: 0 < beta < 1, and the signal falls strictly."""
    betas = SCHEDULES[schedule](n_steps)
    assert betas.shape == (n_steps,)
    assert betas.dtype == torch.float64
    assert ((betas > 0) & (betas < 1)).all()
    signal, noise = schedules.variance_preserving(betas)
    assert (signal.diff() < 0).all()
    assert signal[-1] > 0
    torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal))


def test_every_schedule_is_tested():
    """A new beta schedule that is not in the table above would go untested."""
    assert len(SCHEDULES) == sum(name.endswith("_betas") for name in vars(schedules))


LAST_SIGNAL = {  # sqrt(abar) at the last of T steps, to two or three digits
    50: (0.777, 0.0762, 3.1e-4, 3.2e-3),
    100: (0.603, 0.0781, 1.6e-4, 2.2e-3),
    200: (0.364, 0.0791, 7.8e-5, 1.6e-3),
    500: (0.0797, 0.0797, 3.1e-5, 9.8e-4),
    1000: (6.4e-3, 0.0799, 1.6e-5, 6.7e-4),
    2000: (4.0e-5, 0.0800, 7.8e-6, 4.5e-4),
}


@pytest.mark.parametrize("n_steps", LAST_SIGNAL)
def test_signal_left_at_the_last_step(n_steps):
    """DreamRec T1: which schedules reach noise, and which do not, for each T of the paper."""
    names = ("linear", "exp", "cosine", "sqrt")
    for name, expected in zip(names, LAST_SIGNAL[n_steps], strict=True):
        signal, _ = schedules.variance_preserving(SCHEDULES[name](n_steps))
        assert signal[-1].item() == pytest.approx(expected, rel=2e-3 if expected > 0.01 else 4e-2)


def test_exponential_betas_of_the_released_dreamrec():
    """DreamRec T1, for T = 500; with the textbook's last u = 2T - 1 the last beta is another."""
    betas = SCHEDULES["exp"](500)
    assert betas[0].item() == pytest.approx(2.1978e-4, abs=1e-8)
    assert betas[-1].item() == pytest.approx(1.9821e-2, abs=1e-6)
    assert (1 - betas).prod().item() == pytest.approx(6.346e-3, abs=1e-6)


def test_linear_signal_variance():
    """DiffuASR T4: abar of the linear schedule at its listed steps."""
    signal, _ = schedules.variance_preserving(SCHEDULES["linear"](1000))
    for index, expected in [
        (0, 0.9999),
        (200, 0.656347),
        (400, 0.193572),
        (600, 0.0255675),
        (800, 0.00150752),
        (999, 4.03583e-05),
    ]:
        assert signal[index + 1].item() ** 2 == pytest.approx(expected, rel=2e-6)


def test_sqrt_schedule_of_diffusion_lm():
    """CaDiRec 3.4: (index, signal, noise), and both ends of beta, for T = 1000."""
    betas = SCHEDULES["sqrt"](1000)
    assert betas[0].item() == pytest.approx(0.0234003, abs=1e-7)
    assert betas[-1].item() == 0.999
    signal, noise = schedules.variance_preserving(betas)
    for index, a, c in [
        (0, 0.98823, 0.15297),
        (1, 0.98174, 0.19023),
        (9, 0.95320, 0.30235),
        (49, 0.88544, 0.46475),
        (99, 0.83097, 0.55631),
        (249, 0.71060, 0.70360),
        (499, 0.54386, 0.83918),
        (749, 0.36779, 0.92991),
        (899, 0.22756, 0.97376),
        (998, 0.02132, 0.99977),
        (999, 0.00067, 1.00000),
    ]:
        assert signal[index + 1].item() == pytest.approx(a, abs=1e-5)
        assert noise[index + 1].item() == pytest.approx(c, abs=1e-5)


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("linear", "linear"),
        ("quadratic", "scaled_linear"),
        ("sigmoid", "sigmoid"),
        ("cosine", "squaredcos_cap_v2"),
    ],
)
def test_betas_equal_those_of_diffusers(schedule, theirs):
    """DiffuASR T4. For cosine, where neither limit acts: diffusers' are none below and 0.999."""
    ours = SCHEDULES[schedule](1000)
    other = DDPMScheduler(1000, 1e-4, 0.02, theirs).betas.double()
    free = (ours > 1e-4) & (ours < 0.999) if schedule == "cosine" else ours > 0
    assert free.sum() > 900
    torch.testing.assert_close(ours[free], other[free], atol=1e-6, rtol=1e-6)


def test_quadratic_and_sigmoid_betas_by_hand():
    torch.testing.assert_close(
        schedules.quadratic_betas(3, 0.01, 0.09), torch.tensor([0.01, 0.04, 0.09]).double()
    )
    low, middle, high = schedules.sigmoid_betas(3, 0.1, 0.3).tolist()
    assert middle == pytest.approx(0.2)
    assert low == pytest.approx(0.1 + 0.2 / (1 + math.exp(6)))
    assert high == pytest.approx(0.3 - 0.2 / (1 + math.exp(6)))


def test_cosine_limits():
    """The raw schedule leaves them at both ends: its first beta is 4.1e-5, its last 1."""
    raw = schedules.cosine_betas(1000, 0.0, 1.0)
    assert raw[0] < 1e-4
    assert raw[-1] > 0.9999
    limited = schedules.cosine_betas(1000, 1e-4, 0.9999)
    assert (limited.min().item(), limited.max().item()) == (1e-4, 0.9999)
