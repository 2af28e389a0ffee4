"""The SASRec encoder that the models stand on: item table, positions, causal Transformer, scoring.

With no auxiliary loss an ``EncoderRecommender`` is RecBole's SASRec: same modules, same names, same
initial weights from the same seed, same scores.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.base import SequentialModel
from recbole_simdiff.modules.batch import PSEUDO_LENGTH
from recbole_simdiff.modules.catalogue import (
    CATALOGUES,
    Candidates,
    check_catalogue,
    draw_candidates,
    estimated_softmax_loss,
    name_catalogue,
)
from recbole_simdiff.modules.host import to_device
from recbole_simdiff.modules.losses import full_softmax_loss, repeats_in, sampled_bce_loss
from recbole_simdiff.modules.negatives import (
    DISTRIBUTIONS,
    NegativeSampler,
    gbce_beta,
    gbce_loss,
    negative_logits,
    sampled_softmax_loss,
    unseen_items,
)
from recbole_simdiff.modules.plan import Phase, Update
from recbole_simdiff.modules.rules import (
    at_least,
    positive,
    ratio,
    ratio_below_1,
    require,
    require_choice,
    require_multiple,
)
from recbole_simdiff.modules.transformer import (
    PackedTransformer,
    TokenLayout,
    layout_of,
    on_host,
)

RANGES = {
    "n_layers": at_least(1),
    "n_heads": at_least(1),
    "hidden_size": at_least(1),
    "inner_size": at_least(1),
    "hidden_dropout_prob": ratio_below_1,
    "attn_dropout_prob": ratio_below_1,
    "loss_memory_mb": positive,
    "n_negatives": at_least(1),
    "n_candidates": at_least(16),
    "gbce_t": ratio,
}

OPTIONS = {
    "sr_loss": ("CE", "BCE", "gBCE", "sampled_softmax"),
    "negatives_per": ("batch", "token"),
    "negative_distribution": DISTRIBUTIONS,
    "repeat_bias": ("none", "learned"),
    "catalogue": CATALOGUES,
}

_BIAS_STEP = 10.0  # the bias is this times a parameter, so that Adam moves it this much faster


class NextItemLoss(NamedTuple):
    """The next-item loss, by its name."""

    rec: Tensor


class EncoderRecommender(SequentialModel):
    """SASRec's encoder, scoring and next-item loss (SimDiffRec Sec. 3.2, Eq. 1-3).

    Args:
        config (Config): resolved configuration.
        dataset (Dataset): the training dataset; its number of items and, where it has them, its
            ``targets_per_batch`` and ``tokens_per_batch`` are read.

    Attributes:
        approximates (bool): the model can do without all items in a step, see ``catalogue``.
    """

    approximates: bool = False

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.hidden_size: int = config["hidden_size"]
        self.layer_norm_eps: float = config["layer_norm_eps"]
        self.initializer_range: float = config["initializer_range"]
        self.loss_memory_mb: float = config["loss_memory_mb"]
        # Per-token losses are sums over this constant, so that every target of an epoch weighs the
        # same whichever batch of similar lengths it falls in.
        self.targets_per_batch: float | None = getattr(dataset, "targets_per_batch", None)
        self.tokens_per_batch: float | None = getattr(dataset, "tokens_per_batch", None)
        self.last_target_only: bool = config["train_sampling"] == "prefix_last"
        self.sr_loss: str = config["sr_loss"]
        self.mask_pad_in_softmax: bool = config["mask_pad_in_softmax"]
        self.dropout_prob: float = config["hidden_dropout_prob"]
        self.n_negatives: int = config["n_negatives"]
        self.negatives_per: str = config["negatives_per"]
        self.negative_correction: bool = config["negative_correction"]
        self.gbce_t: float = config["gbce_t"]
        self.n_candidates: int = config["n_candidates"]
        self.approximate: bool = config["catalogue"] == "approximate"
        if self.approximates and not self.approximate and self.targets_per_batch is not None:
            name_catalogue(self.n_items)
        self.negatives = NegativeSampler(
            "log_uniform" if self.approximate else config["negative_distribution"],
            _item_counts(dataset, self.n_items),
            self.n_items,
        )

        n_tokens = self.n_items + self.n_extra_tokens
        self.item_embedding = nn.Embedding(
            n_tokens, self.hidden_size, padding_idx=0, sparse=self.approximate
        )
        self.position_embedding = nn.Embedding(self.max_seq_length, self.hidden_size)
        self.trm_encoder = self.build_transformer(config, config["n_layers"], config["n_heads"])
        self.LayerNorm: nn.Module = nn.LayerNorm(self.hidden_size, eps=self.layer_norm_eps)
        self.dropout = nn.Dropout(self.dropout_prob)
        self.apply(self.init_weights)
        self.repeat_bias = (
            nn.Parameter(torch.zeros(())) if config["repeat_bias"] == "learned" else None
        )

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse sizes that no encoder can have.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        if config["loss_type"] != "CE":
            raise UserError(
                f"loss_type={config['loss_type']!r} must be CE; sr_loss chooses the loss",
                keys=("loss_type",),
            )
        require_choice(config, OPTIONS)
        if config["repeat_bias"] == "learned" and config["sr_loss"] != "CE":
            raise UserError(
                f"repeat_bias=learned needs sr_loss=CE, is {config['sr_loss']}",
                keys=("repeat_bias", "sr_loss"),
            )
        require(config, RANGES)
        require_multiple(config, "hidden_size", "n_heads")
        check_catalogue(config)

    @staticmethod
    def expected_per_batch(
        config: Any, dataset: Any, per_row: Callable[[Tensor], Tensor]
    ) -> float | None:
        """How many tokens of a full training batch are chosen; None for a data set without rows.

        Args:
            config (Config): says how large a batch is.
            dataset (Dataset): the training dataset.
            per_row (Callable): row lengths -> tokens expected to be chosen of each row, [n] -> [n].
        """
        rows = getattr(dataset, "inter_feat", None)
        if rows is None:
            return None
        chosen = per_row(rows[dataset.item_list_length_field].double()).mean().item()
        return max(min(config["train_batch_size"], len(rows)) * chosen, 1.0)

    @staticmethod
    def build_transformer(config: Any, n_layers: int, n_heads: int) -> Any:
        """A Transformer of the configured width, inner size, dropout and activation."""
        return PackedTransformer(
            n_layers=n_layers,
            n_heads=n_heads,
            hidden_size=config["hidden_size"],
            inner_size=config["inner_size"],
            hidden_dropout_prob=config["hidden_dropout_prob"],
            attn_dropout_prob=config["attn_dropout_prob"],
            hidden_act=config["hidden_act"],
            layer_norm_eps=config["layer_norm_eps"],
        )

    def init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range) for linear layers and embeddings, as RecBole's SASRec."""
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()

    def training_plan(self) -> list[Phase]:
        """One phase; the rows of an approximate catalogue have an optimiser of their own."""
        if not self.approximate:
            return super().training_plan()
        whole = Update(
            "",
            list(self.parameters()),
            self.calculate_loss,
            by_rows=list(self.item_embedding.parameters()),
        )
        return [Phase("train", self.epochs, updates=(whole,))]

    @property
    def item_table(self) -> Tensor:
        """Embeddings of padding and all items, without extra tokens, [n_items, H]."""
        weight = self.item_embedding.weight
        return weight[: self.n_items] if self.n_extra_tokens else weight

    def encode(self, item_seq: Tensor, layout: TokenLayout, last_only: bool = False) -> Tensor:
        """Hidden states H of the tokens, or h = H[item_seq_len - 1] of each row (Eq. 1).

        Args:
            item_seq (LongTensor): items, right-padded with 0, [B, L].
            layout (TokenLayout): layout of ``item_seq``.
            last_only (bool): only the state of each row's newest item.

        Returns:
            Tensor: [n, H], or [B, H] with ``last_only``.
        """
        hidden = self.item_embedding(layout.pack(item_seq))
        hidden = hidden + self.position_embedding(layout.position)
        hidden = self.dropout(self.LayerNorm(hidden))
        return self.trm_encoder(hidden, layout, causal=True, last_only=last_only)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """State of each sequence, [B, L], [B] -> [B, H]; lengths on the host make nobody wait."""
        layout = TokenLayout(item_seq_len, item_seq.shape[1], device=item_seq.device)
        return self.encode(item_seq, layout, last_only=True)

    def labels(self, item_seq: Tensor, layout: TokenLayout, pos_items: Tensor) -> Tensor:
        """Next item of every token, [n]: s[i + 1], and the target at the newest position.

        That of padding is padding, and of a row's last cell its first item.

        Args:
            item_seq (LongTensor): items, [B, L].
            layout (TokenLayout): layout of ``item_seq``.
            pos_items (LongTensor): target of each row, [B].

        Returns:
            LongTensor: labels of the packed tokens, [n].
        """
        label = layout.pack(item_seq.roll(-1, 1))
        label[layout.last] = pos_items
        return label

    # ------------------------------------------------------------------ next-item loss, Eq. 2-3

    def calculate_loss(self, interaction: Interaction) -> NamedTuple:
        """Next-item loss over the expected number of targets in a batch; models add their own."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        hidden = self.encode(item_seq, layout, last_only=self.last_target_only)
        return NextItemLoss(self.recommendation_loss(hidden, layout, interaction))

    def recommendation_loss(
        self, hidden: Tensor, layout: TokenLayout, interaction: Interaction
    ) -> Tensor:
        """L_sr over the expected number of targets in a batch.

        Args:
            hidden (Tensor): states of all tokens [n, H], or of the newest ones [B, H] when only the
                last target counts (``train_sampling: prefix_last``).
            layout (TokenLayout): layout of the batch.
            interaction (Interaction): the batch. Positions whose next item is a pseudo-item, or
                the first real one after those, are no targets.

        Returns:
            Tensor: scalar.
        """
        label, token = interaction[self.POS_ITEM_ID], layout.host_last
        if not self.last_target_only:
            label = self.labels(interaction[self.ITEM_SEQ], layout, label)
            token = torch.arange(len(label))
            if PSEUDO_LENGTH in interaction:
                token = layout.host_tokens_from(on_host(interaction, PSEUDO_LENGTH))
                real = to_device(token, label.device)
                hidden, label = hidden[real], label[real]
        table = self.item_table
        if self.approximate:
            among = self.catalogue_sample(label)
            total = estimated_softmax_loss(hidden, table, label, among, self.loss_memory_mb)
        elif self.sr_loss == "BCE":
            items, targets = (on_host(interaction, c) for c in (self.ITEM_SEQ, self.POS_ITEM_ID))
            negative = unseen_items(items, targets, layout.host_row[token], self.n_items)
            negative = to_device(negative, label.device)
            total = sampled_bce_loss(hidden, table, label, negative)
        elif self.sr_loss in ("gBCE", "sampled_softmax"):
            total = self.sampled_loss(hidden, label)
        else:  # Code, and RecBole's SASRec: the padding row is a class of the softmax
            first = int(self.mask_pad_in_softmax)
            repeats = None
            if self.repeat_bias is not None:
                repeats = repeats_in(
                    on_host(interaction, self.ITEM_SEQ),
                    layout.host_row[token],
                    layout.host_position[token],
                    first,
                    _BIAS_STEP * self.repeat_bias,
                )
            total = full_softmax_loss(
                hidden, table[first:], label - first, self.loss_memory_mb, repeats
            )
        return total / (self.targets_per_batch or len(label))

    def catalogue_sample(self, given: Tensor) -> Candidates:
        """What stands for all items in an approximate catalogue: the given ones, and drawn ones.

        Args:
            given (LongTensor): items in 1..V, [m].
        """
        return draw_candidates(self.negatives, given, self.n_candidates)

    def sampled_loss(self, hidden: Tensor, label: Tensor) -> Tensor:
        """Next-item loss over ``n_negatives`` sampled items, a sum over tokens.

        Paper (gSASRec, eSASRec): negatives of each token (``negatives_per: token``). Here: shared
        by the batch, which costs one product instead of look-ups. A negative that is the token's
        target does not count.

        Args:
            hidden (Tensor): states, [n, H].
            label (LongTensor): their next items, [n].

        Returns:
            Tensor: scalar.
        """
        shape = (
            (len(label), self.n_negatives) if self.negatives_per == "token" else (self.n_negatives,)
        )
        negative, table = self.negatives.draw(*shape, device=label.device), self.item_table
        right = (hidden * table[label]).sum(-1)
        wrong = negative_logits(hidden, table, label, negative, self.loss_memory_mb)
        if self.sr_loss == "gBCE":
            return gbce_loss(right, wrong, gbce_beta(self.n_negatives, self.n_items, self.gbce_t))
        offset: Tensor | float = 0.0
        if self.negative_correction:
            offset = self.negatives.log_probability(negative) + math.log(self.n_negatives)
        return sampled_softmax_loss(right, wrong, offset)

    # ------------------------------------------------------------------ scoring

    def predict(self, interaction: Interaction) -> Tensor:
        """Score of each row's target item, [B]."""
        state = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        target = interaction[self.ITEM_ID]
        scores = (state * self.item_embedding(target)).sum(-1)
        if self.repeat_bias is None:
            return scores
        repeated = (interaction[self.ITEM_SEQ] == target.unsqueeze(1)).any(1)
        return scores + _BIAS_STEP * self.repeat_bias * repeated

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores h . E_j, with a repeat bias + b for items of the history, [B, n_items] (Eq. 2)."""
        item_seq = interaction[self.ITEM_SEQ]
        scores = self.forward(item_seq, interaction[self.ITEM_SEQ_LEN]) @ self.item_table.t()
        if self.repeat_bias is None:
            return scores
        return scores.scatter(
            1, item_seq, scores.gather(1, item_seq) + _BIAS_STEP * self.repeat_bias
        )


def _item_counts(dataset: Any, n_items: int) -> Tensor | None:
    """Training targets of each item, [n_items]; None for a data set without rows."""
    items = getattr(dataset, "train_items", None)
    return None if items is None else torch.bincount(items, minlength=n_items)
