"""The forward process at any step, and the strided sampler that undoes it."""

import pytest
import torch

from recbole_simdiff.diffusion import samplers
from recbole_simdiff.diffusion.process import AffineProcess
from recbole_simdiff.diffusion.schedules import FAMILIES, linear_betas

T = 50
FAMILY_AND_STEPS = [(family, steps) for family in sorted(FAMILIES) for steps in (1, 2, 10, T)]


def make_process(family: str = "vp_zsnr", n_steps: int = T) -> AffineProcess:
    return AffineProcess(*FAMILIES[family](linear_betas(n_steps, 1e-4, 0.02)))


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- forward


def test_q_sample_by_hand():
    process = AffineProcess(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 2.0, 3.0]))
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


# ---------------------------------------------------------------- reverse


@pytest.mark.parametrize(("family", "steps"), FAMILY_AND_STEPS)
def test_oracle_denoiser_is_followed_to_the_clean_end(family, steps):
    """Invariant 8: a denoiser that knows z_0 gives z_0 back, for any number of steps."""
    process, x_0 = make_process(family), vectors(4, 3)
    t = torch.full((4,), T)
    x = process.q_sample(x_0, t, vectors(4, 3, seed=1))
    assert not torch.allclose(x, x_0, atol=0.1)
    assert torch.equal(
        samplers.ddim(lambda *_: x_0, x, process, samplers.evenly_spaced(t, steps)), x_0
    )


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
        oracle, process.q_sample(x_0, start, eps), process, samplers.evenly_spaced(start, steps)
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
        lambda x, t: x.sin() + t.unsqueeze(-1), x, process, samplers.evenly_spaced(start, 1)
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
    out = samplers.ddim(denoise, x, process, samplers.evenly_spaced(torch.full((4,), T), 2))
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
    out = samplers.ddim(denoise, x, process, samplers.evenly_spaced(start, 10))
    assert [row[0] for row in calls] == [1] * 10
    assert [row[2] for row in calls] == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]
    torch.testing.assert_close(out[0], x_0[0] + 1)  # live in the first call only
    torch.testing.assert_close(out[1], x_0[1] + 9)  # steps 7, 6, 5, 4, 4, 3, 2, 2, 1, then 0
    torch.testing.assert_close(out[2], x_0[2] + 10)
