"""Reverse processes: against oracles, whole chains of diffusers, and exact moments."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from recbole_simdiff.diffusion import samplers
from recbole_simdiff.diffusion.process import ForwardProcess
from recbole_simdiff.diffusion.schedules import (
    FAMILIES,
    cosine_betas,
    exponential_betas,
    linear_betas,
    sqrt_betas,
    variance_preserving,
)

T = 50
FAMILY_AND_STEPS = [(family, steps) for family in sorted(FAMILIES) for steps in (1, 2, 10, T)]
BETAS: dict[str, Callable[[int], torch.Tensor]] = {
    "linear": lambda n: linear_betas(n, 1e-4, 0.02),
    "exp": lambda n: exponential_betas(n, 0.1, 10.0),
    "cosine": lambda n: cosine_betas(n, 1e-4, 0.9999),
    "sqrt": sqrt_betas,
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", sorted(BETAS))


def make_process(family: str = "vp_zsnr", n_steps: int = T) -> ForwardProcess:
    return ForwardProcess(*FAMILIES[family](linear_betas(n_steps, 1e-4, 0.02)))


def gaussian_process(schedule: str, n_steps: int) -> ForwardProcess:
    return ForwardProcess(*variance_preserving(BETAS[schedule](n_steps)))


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Smooth, bounded, different at every step."""
    return torch.tanh(x.flip(-1)) + torch.sin(t.unsqueeze(-1).to(x.dtype))


# ---------------------------------------------------------------- DDIM and oracles


@pytest.mark.parametrize(("family", "steps"), FAMILY_AND_STEPS)
def test_oracle_denoiser_is_followed_to_the_clean_end(family, steps):
    """Invariant 8: a denoiser that knows z_0 gives z_0 back, for any number of steps."""
    process, x_0 = make_process(family), vectors(4, 3)
    t = torch.full((4,), T)
    x = process.q_sample(x_0, t, vectors(4, 3, seed=1))
    assert not torch.allclose(x, x_0, atol=0.1)
    assert torch.equal(samplers.ddim(lambda *_: x_0, x, process, samplers.trailing(t, steps)), x_0)


@pytest.mark.parametrize(("family", "steps"), FAMILY_AND_STEPS)
def test_every_intermediate_state_lies_on_the_forward_path(family, steps):
    """Invariant 8: with an oracle the sampler revisits q_sample(z_0, t, noise) at each step."""
    process, x_0, eps = make_process(family), vectors(4, 3), vectors(4, 3, seed=1)
    seen = []

    def oracle(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(x, process.q_sample(x_0, t, eps), atol=1e-8, rtol=0)
        seen.append(t.unique().tolist())
        return x_0

    start = torch.full((4,), T)
    samplers.ddim(
        oracle, process.q_sample(x_0, start, eps), process, samplers.trailing(start, steps)
    )
    visited = [t for (t,) in seen]
    assert len(visited) == steps
    assert visited[0] == T
    assert visited == sorted(set(visited), reverse=True)
    assert visited[-1] >= 1


def test_one_step_is_one_call_of_the_denoiser():
    """Invariant 9: S = 1 equals f(z_T, T)."""
    process, x = make_process(), vectors(4, 3)
    start = torch.full((4,), T)
    out = samplers.ddim(
        lambda x, t: x.sin() + t.unsqueeze(-1), x, process, samplers.trailing(start, 1)
    )
    assert torch.equal(out, x.sin() + T)


def test_two_steps_by_hand():
    """The second call sees the first estimate mixed with the noise that explains x_T."""
    process, x = make_process("vp"), vectors(4, 3)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) + 0.01 * t.unsqueeze(-1)

    first = torch.tanh(x) + 0.01 * T
    eps = (x - process.signal[T] * first) / process.noise[T]
    half = T // 2
    middle = process.signal[half] * first + process.noise[half] * eps
    expected = torch.tanh(middle) + 0.01 * half
    out = samplers.ddim(denoise, x, process, samplers.trailing(torch.full((4,), T), 2))
    torch.testing.assert_close(out, expected)


def test_rows_may_start_at_different_steps():
    """A row with fewer steps than calls stops at its end and keeps its last estimate."""
    process, x_0, eps = make_process(), vectors(3, 2), vectors(3, 2, seed=1)
    start = torch.tensor([1, 7, T])
    calls: list[list[int]] = []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(t.tolist())
        return x_0 + len(calls)

    x = process.q_sample(x_0, start, eps)
    out = samplers.ddim(denoise, x, process, samplers.trailing(start, 10))
    assert [row[0] for row in calls] == [1] * 10
    assert [row[2] for row in calls] == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]
    torch.testing.assert_close(out[0], x_0[0] + 1)  # live in the first call only
    torch.testing.assert_close(out[1], x_0[1] + 9)  # steps 7, 6, 5, 4, 4, 3, 2, 2, 1, then 0
    torch.testing.assert_close(out[2], x_0[2] + 10)


@EVERY_SCHEDULE
@pytest.mark.parametrize("n_steps", [1, 2, 20])
def test_ancestral_sampling_ends_at_what_the_oracle_knows(schedule, n_steps):
    """DreamRec T7: a denoiser that returns the true e brings any x_T to exactly e."""
    x_0 = vectors(3, 4)
    out = samplers.ancestral(
        lambda *_: x_0,
        100 * vectors(3, 4, seed=1),
        gaussian_process(schedule, n_steps),
        torch.arange(n_steps, -1, -1),
    )
    torch.testing.assert_close(out, x_0, atol=1e-12, rtol=0)


def test_the_true_eps_leads_back_in_one_jump():
    """DiffuASR T8: with the eps that made x_t, one step to the clean end gives x_0, for any t."""
    process, x_0, eps = gaussian_process("linear", T), vectors(T, 4), vectors(T, 4, seed=1)
    t = torch.arange(1, T + 1)
    out = samplers.ddim(
        lambda x, t: process.x_0_from(x, t, eps),
        process.q_sample(x_0, t, eps),
        process,
        torch.stack([t, torch.zeros_like(t)]),
    )
    torch.testing.assert_close(out, x_0)


# ---------------------------------------------------------------- steps visited


def test_trailing_steps():
    assert samplers.trailing(torch.tensor(10), 3).tolist() == [10, 6, 3, 0]
    assert samplers.trailing(torch.tensor(3), 3).tolist() == [3, 2, 1, 0]
    each = samplers.trailing(torch.tensor([1, 4]), 2)
    assert each.tolist() == [[1, 4], [0, 2], [0, 0]]


@pytest.mark.parametrize("n_steps", [5, 20, 50, 100, 1000])
def test_leading_steps_are_those_of_diffusers(n_steps):
    """DiffuASR T5: for 5 of 1000 the indices 800, 600, 400, 200, 0, which are our steps less 1."""
    other = DDIMScheduler(1000, timestep_spacing="leading", steps_offset=0)
    other.set_timesteps(n_steps)
    ours = samplers.leading(1000, n_steps)
    assert (ours[:-1] - 1).tolist() == other.timesteps.tolist()
    assert ours[-1] == 0
    if n_steps == 5:
        assert ours.tolist() == [801, 601, 401, 201, 1, 0]


# ---------------------------------------------------------------- whole chains of diffusers


def exact(scheduler: DDPMScheduler | DDIMScheduler, betas: torch.Tensor) -> None:
    """Give a scheduler float64 tables; its own are float32."""
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)


def their_chain(
    scheduler: DDPMScheduler | DDIMScheduler,
    x: torch.Tensor,
    output: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = denoiser,
    **arguments: float,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    for index in scheduler.timesteps:
        t = (index + 1).expand(len(x))
        x = scheduler.step(output(x, t), index, x, generator=generator, **arguments).prev_sample
    return x


def same_draws() -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


@EVERY_SCHEDULE
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=["64", "32"]
)
@pytest.mark.parametrize("n_steps", [50, 500])
def test_ancestral_chain_equals_ddpm(schedule, dtype, tolerance, n_steps):
    """DreamRec T4: variance fixed small, x_0 prediction, no clipping, shared noise."""
    betas, x = BETAS[schedule](n_steps), vectors(4, 3).to(dtype)
    other = DDPMScheduler(
        n_steps,
        trained_betas=betas.numpy(),
        variance_type="fixed_small",
        prediction_type="sample",
        clip_sample=False,
    )
    exact(other, betas)
    other.set_timesteps(n_steps)
    ours = samplers.ancestral(
        denoiser,
        x,
        gaussian_process(schedule, n_steps),
        torch.arange(n_steps, -1, -1),
        same_draws(),
    )
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, their_chain(other, x), atol=tolerance, rtol=tolerance)


def ddim_of_diffusers(betas: torch.Tensor, n_steps: int, prediction: str) -> DDIMScheduler:
    other = DDIMScheduler(
        len(betas),
        trained_betas=betas.numpy(),
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
        steps_offset=0,
    )
    exact(other, betas)
    other.set_timesteps(n_steps)
    return other


@EVERY_SCHEDULE
@pytest.mark.parametrize("n_steps", [5, 20, 50, 500])
def test_ddim_chain_equals_diffusers(schedule, n_steps):
    """DreamRec T5: eta = 0, a denoiser that predicts x_0, strided and full chains."""
    betas, x = BETAS[schedule](500), vectors(4, 3)
    other = ddim_of_diffusers(betas, n_steps, "sample")
    times = samplers.leading(500, n_steps)
    ours = samplers.ddim(denoiser, x, gaussian_process(schedule, 500), times)
    torch.testing.assert_close(ours, their_chain(other, x, eta=0.0), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("n_steps", [5, 20, 50])
def test_ddim_chain_of_an_eps_predictor_equals_diffusers(n_steps):
    """DiffuASR T5: arbitrary fixed eps at every step, brought in through ``x_0_from``."""
    betas, x = BETAS["linear"](1000), vectors(4, 3)
    process, eps = gaussian_process("linear", 1000), vectors(1001, 4, 3, seed=1)
    other = ddim_of_diffusers(betas, n_steps, "epsilon")
    ours = samplers.ddim(
        lambda x, t: process.x_0_from(x, t, eps[t[0]]), x, process, samplers.leading(1000, n_steps)
    )
    theirs = their_chain(other, x, lambda x, t: eps[t[0]], eta=0.0)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@EVERY_SCHEDULE
@pytest.mark.parametrize("n_steps", [5, 20, 50, 500])
def test_ancestral_chain_is_ddim_with_eta_1(schedule, n_steps):
    """DreamRec T5, DiffuASR T6: DDPM with all T steps, DDPM of a shortened chain with fewer."""
    betas, x = BETAS[schedule](500), vectors(4, 3)
    other = ddim_of_diffusers(betas, n_steps, "sample")
    ours = samplers.ancestral(
        denoiser,
        x,
        gaussian_process(schedule, 500),
        samplers.leading(500, n_steps),
        same_draws(),
    )
    theirs = their_chain(other, x, eta=1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_ancestral_without_noise_follows_the_posterior_mean():
    """DiffuASR T6."""
    process, x = gaussian_process("linear", T), vectors(4, 3)
    expected = x
    for step in range(T, 0, -1):
        t = torch.tensor([step])
        c_0, c_t, _ = process.posterior(t, t - 1)
        expected = c_0 * denoiser(expected, t.expand(4)) + c_t * expected
    ours = samplers.ancestral(denoiser, x, process, torch.arange(T, -1, -1), torch.zeros_like)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_the_last_step_draws_nothing():
    """Its variance is 0; a draw would shift all later ones."""
    calls = []

    def draw(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return torch.randn_like(x)

    samplers.ancestral(
        denoiser, vectors(2, 3), gaussian_process("exp", 4), torch.arange(4, -1, -1), draw
    )
    assert calls == [2, 2, 2]


# ---------------------------------------------------------------- exact moments

MEAN, VARIANCE = 1.5, 0.49
# Steps of DDIM -> mean and variance of what comes out, with the best possible denoiser.
DDIM_MOMENTS = {
    5: (1.4746585493, 0.1893289559),
    10: (1.4862314715, 0.3117709476),
    20: (1.4903305722, 0.3918698305),
    50: (1.4922843210, 0.4481647776),
    100: (1.4928588190, 0.4685729137),
    1000: (1.4933450000, 0.4877314540),
}


def best_denoiser(process: ForwardProcess) -> samplers.Denoise:
    """E[x_0 | x_t] for x_0 ~ N(1.5, 0.49)."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, c = process.at(process.signal, t, x), process.at(process.noise, t, x)
        return MEAN + VARIANCE * a / (a**2 * VARIANCE + c**2) * (x - a * MEAN)

    return denoise


@pytest.mark.parametrize("n_steps", DDIM_MOMENTS)
def test_moments_of_ddim(n_steps):
    """DreamRec T6, DiffuASR T9: the sampler is the map x -> a x + b, so N(0, 1) gives (b, a^2)."""
    process = gaussian_process("linear", 1000)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    b, end = samplers.ddim(
        best_denoiser(process), ends, process, samplers.leading(1000, n_steps)
    ).squeeze(1)
    mean, variance = DDIM_MOMENTS[n_steps]
    assert b.item() == pytest.approx(mean, abs=1e-9)
    assert ((end - b) ** 2).item() == pytest.approx(variance, abs=1e-9)


def test_moments_of_ddpm():
    """DreamRec T6, DiffuASR T9: the response to each of the 1000 draws on its own, x_T included."""
    process = gaussian_process("linear", 1000)
    x = torch.zeros(1001, 1, dtype=torch.float64)  # row i: draw i is 1, row 1000: none is
    x[0] = 1.0
    number = iter(range(1, 1000))

    def impulse(x: torch.Tensor) -> torch.Tensor:
        row = torch.zeros_like(x)
        row[next(number)] = 1.0
        return row

    out = samplers.ancestral(
        best_denoiser(process), x, process, torch.arange(1000, -1, -1), impulse
    )
    mean = out[1000]
    assert mean.item() == pytest.approx(1.4999703360, abs=1e-9)
    assert ((out[:1000] - mean) ** 2).sum().item() == pytest.approx(0.4842913396, abs=1e-9)
    assert next(number, None) is None


# ---------------------------------------------------------------- guidance


def test_classifier_free_guidance_by_hand():
    """(1 + w) conditional - w unconditional; affine in w, and at w = 0 the conditional itself."""
    conditional, unconditional = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert samplers.classifier_free(conditional, unconditional, 0.0).tolist() == [1, 2]
    assert samplers.classifier_free(conditional, unconditional, 2.0).tolist() == [3, -2]
    assert samplers.classifier_free(conditional, conditional, 7.0).tolist() == [1, 2]
