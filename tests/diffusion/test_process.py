"""The forward process at any step, and the step of its Gaussian posterior."""

import pytest
import torch
from diffusers import DDPMScheduler

from recbole_simdiff.diffusion.process import ForwardProcess
from recbole_simdiff.diffusion.schedules import (
    FAMILIES,
    cosine_betas,
    exponential_betas,
    linear_betas,
    variance_preserving,
)

T = 50
BETAS = {
    "linear": linear_betas(T, 1e-4, 0.02),
    "exp": exponential_betas(T, 0.1, 10.0),
    "cosine": cosine_betas(T, 1e-4, 0.9999),
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", sorted(BETAS))


def make_process(family: str = "vp_zsnr", n_steps: int = T) -> ForwardProcess:
    return ForwardProcess(*FAMILIES[family](linear_betas(n_steps, 1e-4, 0.02)))


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- forward


def test_q_sample_by_hand():
    process = ForwardProcess(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 2.0, 3.0]))
    x_0 = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    eps = torch.tensor([[10.0, 0.0], [10.0, 1.0], [10.0, 1.0]])
    out = process.q_sample(x_0, torch.tensor([0, 1, 2]), eps)
    assert process.n_steps == 2
    assert out.tolist() == [[1.0, 2.0], [20.5, 3.0], [30.0, 3.0]]


def test_q_sample_reads_each_rows_own_step():
    process, x_0, eps = make_process(), vectors(T + 1, 4), vectors(T + 1, 4, seed=1)
    t = torch.arange(T + 1)
    out = process.q_sample(x_0, t, eps)
    for i in range(T + 1):
        torch.testing.assert_close(out[i], process.signal[i] * x_0[i] + process.noise[i] * eps[i])


def test_last_step_is_exactly_the_noise():
    """Invariant 3: with zero terminal signal z_T is the noise, whatever z_0 is."""
    process, eps = make_process(), vectors(3, 4).float()
    t = torch.full((3,), T)
    for scale in (1.0, 1e4):
        assert torch.equal(process.q_sample(scale * vectors(3, 4, seed=2).float(), t, eps), eps)


@pytest.mark.parametrize("family", ["vp", "convex"])
def test_last_step_of_the_other_families_keeps_some_signal(family):
    """Invariant 3 is a property of the rescaled schedule only."""
    process, eps = make_process(family), vectors(3, 4)
    t = torch.full((3,), T)
    assert not torch.equal(process.q_sample(vectors(3, 4, seed=2), t, eps), eps)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_eps_from_inverts_q_sample(family):
    process, x_0, eps = make_process(family), vectors(T, 4), vectors(T, 4, seed=1)
    t = torch.arange(1, T + 1)
    torch.testing.assert_close(process.eps_from(process.q_sample(x_0, t, eps), t, x_0), eps)


def test_output_has_the_networks_type():
    """Tables are float64; a float32 network must not be promoted by them, bfloat16 gets float32."""
    process, t = make_process(), torch.tensor([3])
    assert process.signal.dtype == torch.float64
    for dtype, expected in [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ]:
        x = torch.ones(1, 2, dtype=dtype)
        assert process.q_sample(x, t, x).dtype == expected


def test_tables_are_not_part_of_a_checkpoint():
    """They follow from the configuration; a stored copy could contradict it."""
    assert make_process().state_dict() == {}


@pytest.mark.parametrize("family", ["vp", "convex"])
def test_x_0_from_inverts_q_sample(family):
    """DiffuASR T7: eps <-> x_0 goes back and forth, wherever there is signal."""
    process, x_0, eps = make_process(family), vectors(T, 4), vectors(T, 4, seed=1)
    t = torch.arange(1, T + 1)
    x_t = process.q_sample(x_0, t, eps)
    torch.testing.assert_close(process.x_0_from(x_t, t, eps), x_0)
    torch.testing.assert_close(process.eps_from(x_t, t, process.x_0_from(x_t, t, eps)), eps)


def test_conversions_in_float32():
    """DiffuASR T7: to 1e-5 for t <= 800 of the linear schedule with T = 1000."""
    process = make_process("vp", 1000)
    x_0, eps = vectors(800, 4).float(), vectors(800, 4, seed=1).float()
    t = torch.arange(1, 801)
    back = process.eps_from(process.q_sample(x_0, t, eps), t, x_0)
    assert (back - eps).abs()[50:].max() < 1e-5  # at small t eps is divided by its small weight
    forth = process.x_0_from(process.q_sample(x_0, t, eps), t, eps)
    assert (forth - x_0).abs().max() < 1e-5


@EVERY_SCHEDULE
def test_q_sample_equals_add_noise_of_diffusers(schedule):
    """DreamRec T3, DiffuASR T4; their index t - 1 is our t, their tables are float32."""
    process = ForwardProcess(*variance_preserving(BETAS[schedule]))
    other = DDPMScheduler(T, trained_betas=BETAS[schedule].numpy())
    x_0, eps, t = vectors(T, 4), vectors(T, 4, seed=1), torch.arange(1, T + 1)
    theirs = other.add_noise(x_0, eps, t - 1)
    torch.testing.assert_close(process.q_sample(x_0, t, eps), theirs, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- posterior


@EVERY_SCHEDULE
@pytest.mark.parametrize("stride", [1, 2, 7, T])
def test_posterior_is_gaussian_conditioning(schedule, stride):
    """DreamRec T2: q(x_to | x_t, x_0) by conditioning the joint Gaussian of (x_to, x_t) given x_0.

    The forward chain is multiplied out beta by beta, not read from the tables under test.
    """
    betas = BETAS[schedule]
    process = ForwardProcess(*variance_preserving(betas))
    for end in range(stride, T + 1):
        to = end - stride
        mean_to = mean_end = torch.ones((), dtype=torch.float64)  # multiples of x_0
        var_to = var_end = torch.zeros((), dtype=torch.float64)
        link = torch.ones((), dtype=torch.float64)  # x_end = link x_to + independent noise
        for i, beta in enumerate(betas[:end]):
            a = (1 - beta).sqrt()
            mean_end, var_end = a * mean_end, a**2 * var_end + beta
            if i < to:
                mean_to, var_to = mean_end, var_end
            else:
                link = a * link
        slope = link * var_to / var_end  # Cov(x_to, x_end) / Var(x_end)
        expected = (mean_to - slope * mean_end, slope, var_to - slope * link * var_to)
        found = process.posterior(torch.tensor([end]), torch.tensor([to]))
        for ours, value in zip(found, expected, strict=True):
            assert ours.item() == pytest.approx(value.item(), abs=1e-12)


@EVERY_SCHEDULE
def test_posterior_by_the_formula_of_ddpm(schedule):
    """DreamRec T2: c_0, c_t and variance of DDPM Eq. 7; at the clean end (1, 0, 0) exactly."""
    betas = BETAS[schedule]
    process = ForwardProcess(*variance_preserving(betas))
    bar = torch.cat([torch.ones(1).double(), (1 - betas).cumprod(0)])
    t = torch.arange(1, T + 1)
    c_0, c_t, variance = process.posterior(t, t - 1)
    left = 1 - bar[t]
    torch.testing.assert_close(c_0, betas * bar[t - 1].sqrt() / left, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        c_t, (1 - bar[t - 1]) * (1 - betas).sqrt() / left, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(variance, betas * (1 - bar[t - 1]) / left, atol=1e-12, rtol=0)
    assert (c_0[0], c_t[0], variance[0]) == (1, 0, 0)
