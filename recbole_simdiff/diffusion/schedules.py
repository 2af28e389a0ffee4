"""Coefficient tables of forward processes x_t = signal[t] x_0 + noise[t] eps, t = 0..T, float64.

Index 0 is the clean end (signal 1, noise 0). Each function returns the pair (signal, noise), both
[T + 1].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def linear_betas(n_steps: int, start: float, end: float) -> Tensor:
    """beta_1..beta_T, evenly spaced, [T] (DDPM, Ho et al. 2020, Sec. 4)."""
    return torch.linspace(start, end, n_steps, dtype=torch.float64)


def quadratic_betas(n_steps: int, start: float, end: float) -> Tensor:
    """beta whose square root is evenly spaced, [T] (released DDIM code)."""
    return torch.linspace(start**0.5, end**0.5, n_steps, dtype=torch.float64) ** 2


def sigmoid_betas(n_steps: int, start: float, end: float) -> Tensor:
    """beta along a sigmoid from -6 to 6, [T] (released DDIM code)."""
    u = torch.linspace(-6, 6, n_steps, dtype=torch.float64)
    return torch.sigmoid(u) * (end - start) + start


def cosine_betas(n_steps: int, minimum: float, maximum: float) -> Tensor:
    """Signal variance cos^2((u + s) / (1 + s) pi / 2), s = 0.008; beta within [minimum, maximum].

    [T] (Nichol & Dhariwal 2021, Eq. 17).
    """
    u = torch.arange(n_steps + 1, dtype=torch.float64) / n_steps
    return _betas_of(torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2).clamp(minimum, maximum)


def sqrt_betas(n_steps: int) -> Tensor:
    """Signal variance 1 - sqrt(u + 1e-4); beta at most 0.999, [T] (Diffusion-LM, App. A)."""
    u = torch.arange(n_steps + 1, dtype=torch.float64) / n_steps
    return _betas_of(1 - (u + 1e-4).sqrt()).clamp(max=0.999)


def exponential_betas(n_steps: int, start: float, end: float) -> Tensor:
    """1 - exp(-start / T - (end - start) u / 2T^2), u evenly from 1 to 2T + 1, [T].

    The variance-preserving SDE (Song et al. 2021, App. C) in steps, as the released DreamRec has
    it; the textbook's last u is 2T - 1.
    """
    u = torch.linspace(1, 2 * n_steps + 1, n_steps, dtype=torch.float64)
    return 1 - torch.exp(-start / n_steps - 0.5 * (end - start) * u / n_steps**2)


def _betas_of(signal_variance: Tensor) -> Tensor:
    """1 - a[i + 1] / a[i] of a falling table, [T + 1] -> [T]."""
    return 1 - signal_variance[1:] / signal_variance[:-1]


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
