"""Coefficient tables of forward processes x_t = signal[t] x_0 + noise[t] eps, t = 0..T, float64.

Index 0 is the clean end (signal 1, noise 0). Each function returns the pair (signal, noise), both
[T + 1].
"""

from collections.abc import Callable

import torch
from torch import Tensor


def linear_betas(n_steps: int, start: float, end: float) -> Tensor:
    """beta_1..beta_T, evenly spaced, [T] (DDPM, Ho et al. 2020, Sec. 4)."""
    return torch.linspace(start, end, n_steps, dtype=torch.float64)


def variance_preserving(betas: Tensor) -> tuple[Tensor, Tensor]:
    """signal = sqrt(prod(1 - beta)), noise = sqrt(1 - signal^2) (DDPM Eq. 4)."""
    signal = torch.cumprod(1 - betas, 0).sqrt()
    return _with_clean_end(signal, (1 - signal**2).sqrt())


def zero_terminal_snr(betas: Tensor) -> tuple[Tensor, Tensor]:
    """Variance preserving, shifted and scaled so that step T carries no signal at all.

    Step 1 keeps its value (Lin et al. 2024, Algorithm 1; the released SimDiffRec code).
    """
    signal = torch.cumprod(1 - betas, 0).sqrt()
    first, last = signal[0], signal[-1]
    signal = (signal - last) * first / (first - last)
    return _with_clean_end(signal, (1 - signal**2).sqrt())


def convex(betas: Tensor) -> tuple[Tensor, Tensor]:
    """signal = prod(1 - beta), noise = 1 - signal: a convex mixture at every step."""
    signal = torch.cumprod(1 - betas, 0)
    return _with_clean_end(signal, 1 - signal)


def _with_clean_end(signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    one, zero = signal.new_ones(1), signal.new_zeros(1)
    return torch.cat([one, signal]), torch.cat([zero, noise])


FAMILIES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "vp_zsnr": zero_terminal_snr,
    "vp": variance_preserving,
    "convex": convex,
}
