"""RecBole's Transformer run on real tokens only.

Layout, said once: ``item_seq`` [B, L] is right-padded with 0 and ``item_seq_len`` [B] is at least
1. Everything pointwise runs on the packed tokens [n, H], row after row without padding; only
attention sees the padded layout.
"""

from collections.abc import Iterable
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.layers import TransformerEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.modules.host import to_device


class Batch(Interaction):
    """A batch that keeps its columns on the host, so that nobody waits for their values.

    Args:
        columns (dict): name -> values of the rows.
        host (dict | None): the same on the CPU; by default ``columns``, which then are there.
    """

    def __init__(self, columns: dict[str, Tensor], host: dict[str, Tensor] | None = None) -> None:
        super().__init__(columns)
        self._host = columns if host is None else host
        # Which values those on the host are: a model may put others in their place, or write to
        # them, which raises the version.
        self._loaded = {
            name: (values, values._version) for name, values in self.interaction.items()
        }

    def to(
        self, device: torch.device, selected_field: str | Iterable[str] | None = None
    ) -> "Batch":
        """The batch with its columns, or the selected ones, on a device, and on the host, too."""
        chosen = {selected_field} if isinstance(selected_field, str) else selected_field
        chosen = set(self.columns if chosen is None else chosen)
        there = {
            name: to_device(values, device) if name in chosen else values
            for name, values in self.interaction.items()
        }
        return Batch(there, {name: self.on_host(name) for name in there})

    def on_host(self, column: str) -> Tensor:
        """A column on the CPU; read from the device if it is not as it was loaded."""
        values = self.interaction[column]
        loaded, version = self._loaded.get(column, (None, 0))
        if values is loaded and values._version == version:
            return self._host[column]
        return values.cpu()


def on_host(batch: Interaction, column: str) -> Tensor:
    """A column of a batch on the host; read from the device if the batch is no ``Batch``.

    Args:
        batch (Interaction): of any loader.
        column (str): name of the column.
    """
    return batch.on_host(column) if isinstance(batch, Batch) else batch[column].cpu()


def layout_of(batch: Interaction, items: str, lengths: str) -> "TokenLayout":
    """The layout of a batch as it was loaded.

    Args:
        batch (Interaction): right-padded rows.
        items (str): name of the column of items, [B, L].
        lengths (str): name of the column of lengths, [B].
    """
    seq = batch[items]
    return TokenLayout(on_host(batch, lengths), seq.shape[1], device=seq.device)


class TokenLayout:
    """Where the tokens of a right-padded batch sit.

    All of it is computed on the host. Names with ``host_`` stay there; the rest goes to the device.

    Args:
        item_seq_len (LongTensor): real length of each row, >= 1; best on the host, since otherwise
            it is read from the device, [B].
        length (int): padded length L.
        with_padding (bool): pack the padding cells too; they never serve as attention keys.
        keys (BoolTensor | None): the attention keys, if not all real tokens are, [B, L].
        device (torch.device | None): of the batch; by default that of ``item_seq_len``.
    """

    def __init__(
        self,
        item_seq_len: Tensor,
        length: int,
        with_padding: bool = False,
        keys: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.batch, self.length = len(item_seq_len), length
        device = device or item_seq_len.device
        self.lengths = to_device(item_seq_len, device)
        self.host_lengths = known = item_seq_len.cpu()
        self.real = torch.arange(length, device=device) < self.lengths.unsqueeze(1)
        self.keys = self.real if keys is None else keys
        self.cells = torch.ones_like(self.real) if with_padding else self.real  # [B, L]
        # [B], tokens of each row
        self.host_packed = torch.full_like(known, length) if with_padding else known
        self.host_packed = self.host_packed.clamp(max=length)
        n = int(self.host_packed.sum())
        self.full = n == self.batch * length
        first = self.host_packed.cumsum(0) - self.host_packed  # [B], each row's oldest token
        # [n], row of each token, and its flat position b * L + i
        self.host_row = torch.repeat_interleave(
            torch.arange(self.batch), self.host_packed, output_size=n
        )
        self.host_index = torch.arange(n) + (self.host_row * length - first[self.host_row])
        self.row, self.index = (to_device(x, device) for x in (self.host_row, self.host_index))
        self.host_last = first + known - 1  # [B], each row's newest token
        self.last = to_device(self.host_last, device)

    @property
    def position(self) -> Tensor:
        """Position of each token within its row, [n]."""
        return self.index % self.length

    def host_tokens_from(self, first: Tensor) -> Tensor:
        """Tokens from some position of their row on.

        Args:
            first (LongTensor): that position, on the host, [B].

        Returns:
            LongTensor: packed indices in ascending order, on the host, [m].
        """
        return (self.host_position >= first[self.host_row]).nonzero().squeeze(1)

    @property
    def host_position(self) -> Tensor:
        """``position`` on the host, [n]."""
        return self.host_index % self.length

    def of_real(self, values: Tensor) -> Tensor:
        """The values of real tokens, [n] -> [n] or, where padding is packed, fewer."""
        if self.cells is self.real:
            return values
        real = self.host_position < self.host_lengths[self.host_row]
        return values[to_device(real.nonzero().squeeze(1), values.device)]

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

    def host_pack(self, padded: Tensor) -> Tensor:
        """``pack`` on the host, of items that may be padded to fewer columns: [B, l] -> [n]."""
        padded = F.pad(padded, (0, self.length - padded.shape[1]))
        return padded.flatten()[self.host_index]

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
