"""The forward process x_t = signal_t x_0 + noise_t eps, for any eps, random or not."""

import torch
from torch import Tensor, nn


class ForwardProcess(nn.Module):
    """A forward process given by its two coefficient tables.

    eps is an argument of ``q_sample``: Gaussian for a DDPM, the mean of the nearest items for
    SimDiffRec. The tables are kept in float64 and converted when used.

    Args:
        signal (Tensor): weight of x_0 at t = 0..T, [T + 1].
        noise (Tensor): weight of eps at t = 0..T, [T + 1].
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, signal: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.register_buffer("signal", signal.double(), persistent=False)
        self.register_buffer("noise", noise.double(), persistent=False)

    @property
    def n_steps(self) -> int:
        """T, the number of noising steps."""
        return len(self.signal) - 1

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = signal_t x_0 + noise_t eps (DDPM Eq. 4; SimDiffRec Eq. 9).

        Args:
            x_0 (Tensor): clean vectors, [n, ...].
            t (LongTensor): steps in [0, T], [n].
            eps (Tensor): noise vectors, [n, ...].

        Returns:
            Tensor: noised vectors, [n, ...].
        """
        return self.at(self.signal, t, x_0) * x_0 + self.at(self.noise, t, x_0) * eps

    def eps_from(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """The eps for which q_sample(x_0, t, eps) = x_t; t must be at least 1. Shapes as above."""
        return (x_t - self.at(self.signal, t, x_t) * x_0) / self.at(self.noise, t, x_t)

    def x_0_from(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 for which q_sample(x_0, t, eps) = x_t; signal_t must not be 0."""
        return (x_t - self.at(self.noise, t, x_t) * eps) / self.at(self.signal, t, x_t)

    def posterior(self, t: Tensor, to: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of q(x_to | x_t, x_0) = N(c_0 x_0 + c_t x_t, variance) for Gaussian eps.

        With to = t - 1 this is DDPM Eq. 7; with larger strides, the same rule for the shortened
        chain. At to = 0 it is x_0 itself.

        Args:
            t (LongTensor): steps in [1, T], [n].
            to (LongTensor): earlier steps in [0, t), [n].

        Returns:
            tuple: c_0, c_t and variance, float64, [n].
        """
        ratio = self.signal[t] / self.signal[to]  # signal of the transition to -> t
        added = self.noise[t] ** 2 - ratio**2 * self.noise[to] ** 2  # and its variance
        total = self.noise[t] ** 2
        c_0 = added * self.signal[to] / total
        return c_0, ratio * self.noise[to] ** 2 / total, added * self.noise[to] ** 2 / total

    @staticmethod
    def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """table[t] in ``like``'s type, with as many dimensions, [n] -> [n, 1, ...]."""
        values = table[t].to(torch.promote_types(like.dtype, torch.float32))
        return values.view(-1, *[1] * (like.dim() - 1))
