"""Reverse processes as functions of (denoise, x, process, times).

``denoise(x_t, t)`` returns an estimate of x_0. ``times`` is a falling list of steps that ends with
0, the clean end: a [K + 1] tensor for all vectors, or [K + 1, n] for each of them.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from recbole_simdiff.diffusion.process import ForwardProcess

Denoise = Callable[[Tensor, Tensor], Tensor]


def trailing(start: Tensor, n_steps: int) -> Tensor:
    """start, then n_steps - 1 evenly spaced steps below it, then 0.

    Args:
        start (LongTensor): first step, in [0, T]; any shape.
        n_steps (int): K, denoiser calls.

    Returns:
        LongTensor: [K + 1, *start.shape]. A step repeats where start < K.
    """
    remaining = torch.arange(n_steps, -1, -1, device=start.device).view(-1, *[1] * start.dim())
    return torch.div(start * remaining, n_steps, rounding_mode="floor")


def leading(total: int, n_steps: int) -> Tensor:
    """The steps 1, 1 + T // K, 1 + 2 (T // K), ... in falling order, then 0 (DDIM, App. D.3).

    These are the indices 0, T // K, ... of the papers that count from 0; the chain starts below T.

    Args:
        total (int): T.
        n_steps (int): K, denoiser calls, at most T.

    Returns:
        LongTensor: [K + 1].
    """
    steps = 1 + torch.arange(n_steps - 1, -1, -1) * (total // n_steps)
    return torch.cat([steps, steps.new_zeros(1)])


def ddim(
    denoise: Denoise,
    x: Tensor,
    process: ForwardProcess,
    times: Tensor,
    clamp: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Deterministic strided sampler (DDIM with eta = 0, Song et al. 2021, Eq. 12).

    At each step the denoiser's x_0 gives the eps that explains x_t, and both are mixed again with
    the coefficients of the next step. The last estimate of x_0 is returned.

    Args:
        denoise (Callable): (x_t [n, ...], t [n]) -> estimate of x_0 [n, ...].
        x (Tensor): vectors at step times[0], [n, ...].
        process (ForwardProcess): the forward process that made x.
        times (LongTensor): falling steps, ending with 0, [K + 1] or [K + 1, n].
        clamp (Callable | None): takes the place of each estimate inside the chain, [n, ...] ->
            [n, ...]; the last estimate is returned as it is ("clamping trick" of Diffusion-LM, Li
            et al. 2022, Sec. 4.2).

    Returns:
        Tensor: estimate of x_0, [n, ...].
    """
    estimate = x
    pairs = _pairs(times, len(x), x.device)
    for number, (t, following) in enumerate(pairs, start=1):
        live = (t > 0).view(-1, *[1] * (x.dim() - 1))
        estimate = torch.where(live, denoise(x, t.clamp(min=1)), estimate)
        if number == len(pairs):  # at the clean end, where nothing is mixed again
            break
        x_0 = estimate if clamp is None else clamp(estimate)
        eps = process.eps_from(x, t.clamp(min=1), x_0)
        x = torch.where(live, process.q_sample(x_0, following, eps), x)
    return estimate


def ancestral(
    denoise: Denoise,
    x: Tensor,
    process: ForwardProcess,
    times: Tensor,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Stochastic sampler: x_to ~ q(x_to | x_t, x_0) at the estimated x_0 (DDPM Algorithm 2).

    Equal to DDIM with eta = 1, and with every step of 1..T in ``times`` to DDPM with the variance
    of Eq. 7 ("fixed small"). The last step adds no noise.

    Args:
        denoise (Callable): (x_t [n, ...], t [n]) -> estimate of x_0 [n, ...].
        x (Tensor): vectors at step times[0], [n, ...].
        process (ForwardProcess): a Gaussian forward process.
        times (LongTensor): strictly falling steps, ending with 0, [K + 1].
        draw (Callable): standard Gaussian noise of the shape of its argument.

    Returns:
        Tensor: sample of x_0, [n, ...].
    """
    for t, following in _pairs(times, len(x), x.device):
        c_0, c_t, variance = process.posterior(t, following)
        shape = (-1, *[1] * (x.dim() - 1))
        x = c_0.view(shape).to(x.dtype) * denoise(x, t) + c_t.view(shape).to(x.dtype) * x
        if following.any():
            x = x + variance.sqrt().view(shape).to(x.dtype) * draw(x)
    return x


def classifier_free(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """(1 + w) f(x, t, c) - w f(x, t, null) (Ho & Salimans 2022, Eq. 6), any shape."""
    return (1 + strength) * conditional - strength * unconditional


def _pairs(times: Tensor, n: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Each step and the one after it, [n] both."""
    steps = [t.to(device).expand(n) for t in times]
    return list(pairwise(steps))
