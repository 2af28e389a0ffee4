"""Coefficient tables against the recursion they stand for and against published values."""

import pytest
import torch

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
