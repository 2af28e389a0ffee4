"""Reverse processes as functions of (denoise, x, process)."""

from collections.abc import Callable

import torch
from torch import Tensor

from recbole_simdiff.diffusion.process import AffineProcess


def ddim(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    process: AffineProcess,
    start: Tensor,
    n_steps: int,
) -> Tensor:
    """Deterministic strided sampler (DDIM with eta = 0, Song et al. 2021, Eq. 12).

    At each step the denoiser's x_0 gives the eps that explains x_t, and both are mixed again with
    the coefficients of the next of n_steps evenly spaced steps. The last estimate of x_0 is
    returned.

    Args:
        denoise (Callable): (x_t [n, H], t [n]) -> estimate of x_0 [n, H].
        x (Tensor): vectors at step ``start``, [n, H].
        process (AffineProcess): the forward process that made x.
        start (LongTensor): the step each vector is at, in [1, T], [n].
        n_steps (int): denoiser calls.

    Returns:
        Tensor: estimate of x_0, [n, H].
    """
    t, estimate = start, x
    for i in range(1, n_steps + 1):
        live = (t > 0).unsqueeze(-1)
        estimate = torch.where(live, denoise(x, t.clamp(min=1)), estimate)
        if i == n_steps:
            break
        following = torch.div(start * (n_steps - i), n_steps, rounding_mode="floor")
        eps = process.eps_from(x, t.clamp(min=1), estimate)
        x = torch.where(live, process.q_sample(estimate, following, eps), x)
        t = following
    return estimate
