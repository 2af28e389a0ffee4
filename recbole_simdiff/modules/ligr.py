"""LiGR layers on real tokens: pre-norm attention and SwiGLU, each added through a learned gate.

Paper: "From Features to Transformers", arXiv 2502.03417, as eSASRec (arXiv 2508.06450) uses it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.modules.transformer import PackedTransformer, TokenLayout


class _Attention(nn.Module):
    """Weights of an attention layer, under the names that ``PackedTransformer`` reads."""

    def __init__(self, n_heads: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = n_heads, hidden_size // n_heads
        self.query, self.key, self.value, self.dense = (
            nn.Linear(hidden_size, hidden_size) for _ in range(4)
        )
        self.attn_dropout = nn.Dropout(dropout)


class LiGRLayer(nn.Module):
    """x + s(W_1 x) attention(norm(x)), then x + s(W_2 x) SwiGLU(norm(x)), s the sigmoid.

    Args:
        n_heads (int): heads of the attention.
        hidden_size (int): width H.
        inner_size (int): width within SwiGLU.
        hidden_dropout_prob (float): within SwiGLU, and after attention and SwiGLU.
        attn_dropout_prob (float): of the attention weights.
        layer_norm_eps (float): of the norms.
    """

    def __init__(
        self,
        n_heads: int,
        hidden_size: int,
        inner_size: int,
        hidden_dropout_prob: float,
        attn_dropout_prob: float,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.attention = _Attention(n_heads, hidden_size, attn_dropout_prob)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention_gate = nn.Linear(hidden_size, hidden_size)
        self.feed_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.feed_gate = nn.Linear(hidden_size, hidden_size)
        self.swish = nn.Linear(hidden_size, inner_size, bias=False)
        self.linear = nn.Linear(hidden_size, inner_size, bias=False)
        self.out = nn.Linear(inner_size, hidden_size, bias=False)
        self.dropout = nn.Dropout(hidden_dropout_prob)

    def forward(self, hidden: Tensor, layout: TokenLayout, causal: bool, only: bool) -> Tensor:
        """One layer, [n, H] -> [n, H] or, with ``only``, the newest token of each row, [B, H]."""
        normed = self.attention_norm(hidden)
        context = PackedTransformer.attend(self.attention, normed, layout, causal, only, None)
        hidden = hidden[layout.last] if only else hidden
        gate = torch.sigmoid(self.attention_gate(hidden))
        hidden = hidden + gate * self.dropout(self.attention.dense(context))
        normed = self.feed_norm(hidden)
        inner = self.dropout(F.silu(self.swish(normed)) * self.linear(normed))
        gate = torch.sigmoid(self.feed_gate(hidden))
        return hidden + gate * self.dropout(self.out(inner))


class LiGRTransformer(nn.Module):
    """LiGR layers one after the other; called as ``PackedTransformer`` is.

    Args:
        n_layers (int): number of layers.
        sizes (Any): arguments of ``LiGRLayer``.
    """

    def __init__(self, n_layers: int, **sizes: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LiGRLayer(**sizes) for _ in range(n_layers))  # type: ignore[arg-type]

    def forward(
        self, hidden: Tensor, layout: TokenLayout, causal: bool, last_only: bool = False
    ) -> Tensor:
        """States of all tokens, [n, H], or of each row's newest one, [B, H]."""
        for number, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, layout, causal, last_only and number == len(self.layers))
        return hidden
