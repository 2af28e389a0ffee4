"""Time embeddings, and a Transformer denoiser that predicts x_0."""

import math
from typing import Any

import torch
from torch import Tensor, nn

TIME_EMBEDDINGS = ("sinusoidal", "learned")


def timestep_embedding(t: Tensor, width: int, endpoint: bool = False) -> Tensor:
    """Features sin(t w_k), then cos(t w_k), of falling frequencies w_k, [n] -> [n, width].

    Args:
        t (Tensor): steps, [n].
        width (int): number of features.
        endpoint (bool): w_k falls from 1 to 1e-4 inclusive (DDPM's code), or stops one short of it
            (Transformer).

    Returns:
        Tensor: [n, width], sines before cosines; to the linear layer that follows, their order
            makes no difference.
    """
    half = (width + 1) // 2
    exponent = torch.arange(half, device=t.device) / max(half - endpoint, 1)
    angle = t.unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :width]


class TimestepEmbedding(nn.Module):
    """Sinusoid of t, then Linear - SiLU - Linear: t [n] -> [n, H] (DDPM, Appendix B).

    Args:
        hidden_size (int): H.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.SiLU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embedding of each step, [n] -> [n, H]."""
        out: Tensor = self.mlp(timestep_embedding(t, self.hidden_size))
        return out


class DenoiserInput(nn.Module):
    """Input side of a Transformer denoiser f(z_t, t): adds time and positions, normalises, drops.

    The Transformer itself is an argument of ``forward``, so that a model may share its encoder's.

    Args:
        hidden_size (int): H.
        max_length (int): positions, L.
        n_steps (int): T; steps 1..T are legal.
        dropout_prob (float): dropout after the normalisation.
        layer_norm_eps (float): epsilon of the normalisation.
        time_embedding (str): ``sinusoidal`` or ``learned`` (one row a step).
        absolute_positions (bool): add a learned vector for each position; without it, the
            Transformer must know positions.
    """

    def __init__(
        self,
        hidden_size: int,
        max_length: int,
        n_steps: int,
        dropout_prob: float,
        layer_norm_eps: float,
        time_embedding: str,
        absolute_positions: bool = True,
    ) -> None:
        super().__init__()
        self.position_embedding = (
            nn.Embedding(max_length, hidden_size) if absolute_positions else None
        )
        self.time_embedding: nn.Module = (
            TimestepEmbedding(hidden_size)
            if time_embedding == "sinusoidal"
            else nn.Embedding(n_steps + 1, hidden_size)
        )
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout_prob)

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        layout: Any,
        transformer: nn.Module,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Estimate of x_0 for every token, or for some of them.

        Args:
            z_t (Tensor): noised embeddings, [n, H].
            t (LongTensor): step of each row, in 1..T, [B]; or one for all rows, [1].
            layout (TokenLayout): where the n tokens sit; has ``row`` and ``position``, both [n].
            transformer (nn.Module): called as transformer(hidden, layout, causal=..., tokens=...).
            tokens (LongTensor | None): indices of the tokens to estimate, [m].

        Returns:
            Tensor: [n, H], or [m, H] with ``tokens``.
        """
        time = self.time_embedding(t)
        hidden = z_t + (time[layout.row] if len(t) > 1 else time)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(layout.position)
        out: Tensor = transformer(
            self.dropout(self.LayerNorm(hidden)), layout, causal=False, tokens=tokens
        )
        return out
