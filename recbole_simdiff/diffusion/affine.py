"""Distribution of a reverse chain whose denoiser is affine in x, computed without running it."""

from typing import NamedTuple

import torch
from torch import Tensor

from recbole_simdiff.diffusion.process import ForwardProcess


class ChainDistribution(NamedTuple):
    """x_0 given x_T and h is start x_T + gain h + offset + N(0, noise), all float64.

    Attributes:
        start (Tensor): effect of x_T, [d, d].
        gain (Tensor): effect of the condition, [d, w].
        offset (Tensor): constant part, [d].
        noise (Tensor): covariance of what the steps add, [d, d].
        root (Tensor): symmetric square root of noise + start start^T, the covariance of x_0 for
            x_T ~ N(0, I), [d, d].
    """

    start: Tensor
    gain: Tensor
    offset: Tensor
    noise: Tensor
    root: Tensor


class _Steps(NamedTuple):
    """All steps of a chain as one: x_0 = start x_T + total (B h) + offset + N(0, noise)."""

    start: Tensor
    total: Tensor
    offset: Tensor
    noise: Tensor
    root: Tensor


def affine_chain(
    process: ForwardProcess, out: Tensor, project: Tensor | None, b: Tensor, g: Tensor
) -> ChainDistribution:
    """The distribution after T steps of x <- c_0 (A x + B h + g_t) + c_t x + sigma_t z.

    A is ``out``, or the product ``out @ project`` of a low rank r. In the latter case it acts on
    at most 2 r dimensions, those of the columns of ``out`` and the rows of ``project``. The steps
    are composed in these; in all others A is 0 and each step is a multiplication by a number.

    Args:
        process (ForwardProcess): a Gaussian forward process.
        out (Tensor): A [d, d], or its left factor [d, r], float64.
        project (Tensor | None): right factor of A, [r, d].
        b (Tensor): B, [d, w].
        g (Tensor): g_t for t = 1..T, [T, d].

    Returns:
        ChainDistribution: of x_0.
    """
    if project is not None and 2 * len(project) < len(out):
        return _low_rank_chain(process, out, project, b, g)
    steps = _compose(process, out if project is None else out @ project, g)
    return ChainDistribution(steps.start, steps.total @ b, *steps[2:])


def _low_rank_chain(
    process: ForwardProcess, out: Tensor, project: Tensor, b: Tensor, g: Tensor
) -> ChainDistribution:
    """As ``affine_chain``, without a product of two [d, d] matrices."""
    basis = torch.linalg.qr(torch.cat([out, project.t()], 1)).Q  # [d, 2 r]
    inside = _compose(process, basis.t() @ out @ (project @ basis), g @ basis)
    rest = g - g @ basis @ basis.t()
    outside = _compose(process, out.new_zeros(1, 1), rest.unsqueeze(1))
    complement = torch.eye(len(out), dtype=out.dtype, device=out.device) - basis @ basis.t()

    def joined(inner: Tensor, scalar: Tensor) -> Tensor:
        return basis @ inner @ basis.t() + scalar * complement

    return ChainDistribution(
        joined(inside.start, outside.start),
        basis @ (inside.total @ (basis.t() @ b)) + outside.total * (complement @ b),
        basis @ inside.offset + outside.offset.squeeze(0),
        joined(inside.noise, outside.noise),
        joined(inside.root, outside.root),
    )


def _compose(process: ForwardProcess, a: Tensor, g: Tensor) -> _Steps:
    """Compose the steps t = T..1, from t = 1 up; a is [r, r], g is [T, r] or [T, r, k]."""
    steps = torch.arange(1, process.n_steps + 1, device=a.device)
    c_0, c_t, variance = process.posterior(steps, steps - 1)
    later = torch.eye(len(a), dtype=a.dtype, device=a.device)  # effect of the steps t - 1..1 on x
    total, noise = torch.zeros_like(later), torch.zeros_like(later)
    offset = torch.zeros_like(g[0])
    for i in range(process.n_steps):
        total += c_0[i] * later
        offset += c_0[i] * (later @ g[i])
        noise += variance[i] * (later @ later.t())
        later = c_0[i] * (later @ a) + c_t[i] * later
    # The symmetric root is unique, unlike eigenvectors and their signs.
    values, vectors = torch.linalg.eigh(noise + later @ later.t())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    return _Steps(later, total, offset, noise, root)
