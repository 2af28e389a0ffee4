"""The forward process x_t = signal_t x_0 + noise_t eps, for any eps, random or not."""

import torch
from torch import Tensor, nn


class AffineProcess(nn.Module):
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
        """x_t = signal_t x_0 + noise_t eps (SimDiffRec Eq. 9).

        Args:
            x_0 (Tensor): clean vectors, [n, H].
            t (LongTensor): steps in [0, T], [n].
            eps (Tensor): noise vectors, [n, H].

        Returns:
            Tensor: noised vectors, [n, H].
        """
        return self.at(self.signal, t, x_0) * x_0 + self.at(self.noise, t, x_0) * eps

    def eps_from(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """The eps for which q_sample(x_0, t, eps) = x_t; t must be at least 1. Shapes as above."""
        return (x_t - self.at(self.signal, t, x_t) * x_0) / self.at(self.noise, t, x_t)

    @staticmethod
    def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """table[t] as a column of ``like``'s type, [n, 1]."""
        return table[t].to(torch.promote_types(like.dtype, torch.float32)).unsqueeze(-1)
