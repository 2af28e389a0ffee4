"""RecBole's Transformer run on real tokens only.

Layout, said once: ``item_seq`` [B, L] is right-padded with 0 and ``item_seq_len`` [B] is at least
1. Everything pointwise runs on the packed tokens [n, H], row after row without padding; only
attention sees the padded layout.
"""

from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.layers import TransformerEncoder
from torch import Tensor, nn
from torch.nn import functional as F


class Batch(Interaction):
    """A batch that knows the lengths of its rows on the host, so that nobody waits for them.

    Args:
        columns (dict): name -> values of the rows.
        lengths (LongTensor): real length of each row, on the CPU, [B].
    """

    def __init__(self, columns: dict[str, Tensor], lengths: Tensor) -> None:
        super().__init__(columns)
        self.lengths = lengths

    def to(self, device: torch.device, selected_field: Any = None) -> "Batch":
        """The batch with its columns on a device; the lengths stay."""
        return Batch(super().to(device, selected_field).interaction, self.lengths)


def layout_of(batch: Interaction, items: str, lengths: str) -> "TokenLayout":
    """The layout of a batch as it was loaded.

    Args:
        batch (Interaction): right-padded rows.
        items (str): name of the column of items, [B, L].
        lengths (str): name of the column of lengths, [B].
    """
    known = batch.lengths if isinstance(batch, Batch) else None
    return TokenLayout(batch[lengths], batch[items].shape[1], known=known)


class TokenLayout:
    """Where the tokens of a right-padded batch sit.

    Args:
        item_seq_len (LongTensor): real length of each row, >= 1, [B].
        length (int): padded length L.
        with_padding (bool): pack the padding cells too; they never serve as attention keys.
        keys (BoolTensor | None): the attention keys, if not all real tokens are, [B, L].
        known (LongTensor | None): the lengths on the CPU; without them they are read from the
            device, [B].
    """

    def __init__(
        self,
        item_seq_len: Tensor,
        length: int,
        with_padding: bool = False,
        keys: Tensor | None = None,
        known: Tensor | None = None,
    ) -> None:
        self.batch, self.length = len(item_seq_len), length
        self.lengths = item_seq_len
        device = item_seq_len.device
        self.known = item_seq_len.cpu() if known is None else known  # lengths on the host, [B]
        self.real = torch.arange(length, device=device) < item_seq_len.unsqueeze(1)
        self.keys = self.real if keys is None else keys
        self.cells = torch.ones_like(self.real) if with_padding else self.real  # [B, L]
        # Tokens of each row, on the host, [B].
        self.packed = torch.full_like(self.known, length) if with_padding else self.known
        self.packed = self.packed.clamp(max=length)
        n = int(self.packed.sum())
        self.full = n == self.batch * length
        counts = self.cells.sum(1)
        first = counts.cumsum(0) - counts  # [B], packed index of each row's oldest token
        self.last = first + item_seq_len - 1  # [B], of the newest
        self.row = torch.repeat_interleave(
            torch.arange(self.batch, device=device), counts, output_size=n
        )  # [n]
        # [n], flat position b * L + i
        self.index = torch.arange(n, device=device) + (self.row * length - first[self.row])

    @property
    def position(self) -> Tensor:
        """Position of each token within its row, [n]."""
        return self.index % self.length

    def of_real(self, values: Tensor) -> Tensor:
        """The values of real tokens, [n] -> [n] or, where padding is packed, fewer."""
        return values if self.cells is self.real else values[self.real.flatten()[self.index]]

    @property
    def seen(self) -> Tensor:
        """Keys that each position of a causal pass attends to, [B, L, L].

        Padding, and a token that would see no key, attend to everything: so they do in RecBole,
        where -10000 on all scores of a row cancels out.
        """
        place = torch.arange(self.length, device=self.keys.device)
        keys = self.keys.unsqueeze(1) & (place <= place.unsqueeze(1)) & self.real.unsqueeze(2)
        return keys | ~keys.any(2, keepdim=True)

    def pack(self, padded: Tensor) -> Tensor:
        """The tokens of a padded tensor: [B, L, ...] -> [n, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.full else flat[self.index]

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """A padded tensor from its tokens, ``fill`` elsewhere: [n, ...] -> [B, L, ...]."""
        if self.full:
            return packed.unflatten(0, (self.batch, self.length))
        flat = packed.new_full((self.batch * self.length, *packed.shape[1:]), fill)
        return flat.index_copy(0, self.index, packed).unflatten(0, (self.batch, self.length))


class PackedTransformer(TransformerEncoder):
    """RecBole's ``TransformerEncoder``: same parameters, names and initial values; faster forward.

    Differences: it takes packed tokens, masks with -inf instead of -10000, and uses the fused
    ``scaled_dot_product_attention``. Values agree with RecBole's on every real token.
    """

    def forward(
        self,
        hidden: Tensor,
        layout: TokenLayout,
        causal: bool,
        last_only: bool = False,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of all tokens, or of each row's newest token or the named ones only.

        Args:
            hidden (Tensor): input of the first layer, [n, H].
            layout (TokenLayout): where the n tokens sit.
            causal (bool): a token sees itself and older ones; otherwise all real ones of its row.
            last_only (bool): compute the last layer for the newest token of each row only.
            tokens (LongTensor | None): return the states of these tokens only, [m].

        Returns:
            Tensor: [n, H], [B, H] with ``last_only``, or [m, H] with ``tokens``.
        """
        place = self.position_bias(layout.length)
        for number, layer in enumerate(self.layer, start=1):
            only = last_only and number == len(self.layer)
            attention, feed_forward = layer.multi_head_attention, layer.feed_forward
            context = self.attend(attention, hidden, layout, causal, only, place)
            if tokens is not None and number == len(self.layer):
                hidden, context = hidden[tokens], context[tokens]
            hidden = hidden[layout.last] if only else hidden
            hidden = attention.LayerNorm(attention.out_dropout(attention.dense(context)) + hidden)
            hidden = self._feed_forward(feed_forward, hidden)
        return hidden

    def position_bias(self, length: int) -> Tensor | None:
        """What every layer adds to the attention scores, [heads, length, length]; nothing here."""
        return None

    @staticmethod
    def attend(
        attention: Any,
        hidden: Tensor,
        layout: TokenLayout,
        causal: bool,
        only: bool,
        place: Tensor | None,
    ) -> Tensor:
        """Attention output before its dense layer, [n, H] or, with ``only``, [B, H]."""
        linears = [attention.query, attention.key, attention.value]
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        heads, width = attention.num_attention_heads, attention.attention_head_size
        qkv = layout.unpack(F.linear(hidden, weight, bias))  # [B, L, 3H]
        q, k, v = qkv.unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4)  # [B, heads, L, width]
        if only:
            newest = (layout.lengths - 1).view(-1, 1, 1, 1).expand(-1, heads, 1, width)
            q = q.gather(2, newest)
        causal = causal and not only  # the newest token sees all keys
        if layout.cells is layout.keys and (causal or layout.full):
            mask = None  # with right padding a causal query never reaches a padding key
        else:
            mask = layout.seen.unsqueeze(1) if causal else layout.keys[:, None, None, :]
        if place is not None:
            mask = torch.where(layout.keys[:, None, None, :], place.to(q.dtype), -torch.inf)
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=attention.attn_dropout.p if attention.training else 0.0,
            is_causal=causal and layout.cells is layout.keys,
        )
        if only:
            return context.flatten(1)
        return layout.pack(context.transpose(1, 2).flatten(2))

    @staticmethod
    def _feed_forward(feed_forward: Any, hidden: Tensor) -> Tensor:
        inner = feed_forward.dense_1(hidden)
        # RecBole writes gelu out in several elementwise steps; F.gelu is the same function, fused.
        act = feed_forward.intermediate_act_fn
        inner = F.gelu(inner) if act == feed_forward.gelu else act(inner)
        out: Tensor = feed_forward.LayerNorm(
            feed_forward.dropout(feed_forward.dense_2(inner)) + hidden
        )
        return out


class RelativeTransformer(PackedTransformer):
    """A ``PackedTransformer`` that knows positions by distance: one bias a head and distance.

    For bidirectional passes over all tokens; torch refuses the others.

    Args:
        max_length (int): longest row, L; distances run from -(L - 1) to L - 1.
        sizes (Any): arguments of ``PackedTransformer``.
    """

    def __init__(self, max_length: int, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.max_length = max_length
        self.distance_bias = nn.Embedding(2 * max_length - 1, sizes["n_heads"])

    def position_bias(self, length: int) -> Tensor:
        """The bias of each query and key by their distance, [heads, length, length]."""
        place = torch.arange(length, device=self.distance_bias.weight.device)
        distance = place - place.unsqueeze(1)  # key minus query
        bias: Tensor = self.distance_bias(distance + self.max_length - 1)
        return bias.permute(2, 0, 1)
