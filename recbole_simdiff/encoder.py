"""The SASRec encoder that the models stand on: item table, positions, causal Transformer, scoring.

With no auxiliary loss an ``EncoderRecommender`` is RecBole's SASRec: same modules, same names, same
initial weights from the same seed, same scores.
"""

from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn

from recbole_simdiff.errors import UserError
from recbole_simdiff.transformer import PackedTransformer, TokenLayout


class EncoderRecommender(SequentialRecommender):
    """SASRec's encoder and scoring (SimDiffRec Sec. 3.2, Eq. 1-2).

    Args:
        config (Config): resolved configuration.
        dataset (Dataset): the training dataset; its number of items and, where it has one, its
            ``targets_per_batch`` are read.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.hidden_size: int = config["hidden_size"]
        self.layer_norm_eps: float = config["layer_norm_eps"]
        self.initializer_range: float = config["initializer_range"]
        self.loss_memory_mb: float = config["loss_memory_mb"]
        # Per-token losses are sums over this constant, so that every target of an epoch weighs the
        # same whichever batch of similar lengths it falls in.
        self.targets_per_batch: float | None = getattr(dataset, "targets_per_batch", None)
        self.dropout_prob: float = config["hidden_dropout_prob"]

        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(self.max_seq_length, self.hidden_size)
        self.trm_encoder = self.transformer(config, config["n_layers"], config["n_heads"])
        self.LayerNorm = nn.LayerNorm(self.hidden_size, eps=self.layer_norm_eps)
        self.dropout = nn.Dropout(self.dropout_prob)
        self.apply(self.init_weights)

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse sizes that no encoder can have.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        for key in ("n_layers", "n_heads", "hidden_size", "inner_size"):
            if not config[key] >= 1:
                raise UserError(f"{key}={config[key]} must be at least 1")
        if config["hidden_size"] % config["n_heads"]:
            raise UserError(
                f"hidden_size={config['hidden_size']} must be a multiple of "
                f"n_heads={config['n_heads']}"
            )
        for key in ("hidden_dropout_prob", "attn_dropout_prob"):
            if not 0 <= config[key] < 1:
                raise UserError(f"{key}={config[key]} must lie in [0, 1)")
        if not config["loss_memory_mb"] > 0:
            raise UserError(f"loss_memory_mb={config['loss_memory_mb']} must be positive")

    @staticmethod
    def transformer(config: Any, n_layers: int, n_heads: int) -> PackedTransformer:
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
        """State of each sequence, [B, L], [B] -> [B, H]."""
        layout = TokenLayout(item_seq_len, item_seq.shape[1])
        return self.encode(item_seq, layout, last_only=True)

    def labels(self, item_seq: Tensor, layout: TokenLayout, pos_items: Tensor) -> Tensor:
        """Next item of every real position, [n]: s[i + 1], and the target at the newest position.

        Args:
            item_seq (LongTensor): items, [B, L].
            layout (TokenLayout): layout of ``item_seq``.
            pos_items (LongTensor): target of each row, [B].

        Returns:
            LongTensor: labels of the packed tokens, all >= 1, [n].
        """
        label = torch.roll(layout.pack(item_seq), -1)
        label[layout.last] = pos_items
        return label

    def predict(self, interaction: Interaction) -> Tensor:
        """Score of each row's target item, [B]."""
        state = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return (state * self.item_embedding(interaction[self.ITEM_ID])).sum(-1)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores h . E_j of all items, [B, n_items] (Eq. 2)."""
        state = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return state @ self.item_embedding.weight.t()
