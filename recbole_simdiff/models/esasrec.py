"""eSASRec: SASRec's objective with LiGR layers and sampled softmax.

Paper: "eSASRec: Enhancing Transformer-based Recommendations in a Modular Fashion", RecSys 2025,
arXiv 2508.06450. Released code consulted: blondered/transformer_benchmark and RecTools.

    symbol  here             shape     meaning
    s       item_seq         [B, L]    history, right-padded with 0
    E       item_embedding   [N, H]    item table; row 0 is padding, items are 1..V = N - 1
    H(s)    encode(...)      [n, H]    states of the n real tokens

The method. Positions are counted from the newest item. The embeddings pass through LiGR layers
(gated pre-norm attention and SwiGLU); the state of each position is trained to give the next item
against sampled items, by a softmax; items are ranked by their inner product with the newest state.

Differences, tagged where they are made: Paper / Code / Here.
    * Code counts a negative that is the target, too; here it does not count.
    * Code takes Adam with betas 0.9 and 0.98; here RecBole's Adam, 0.9 and 0.999.
"""

from typing import Any

from torch import Tensor, nn

from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.ligr import LiGRTransformer
from recbole_simdiff.modules.transformer import TokenLayout


class ESASRec(EncoderRecommender):
    """SASRec's rows, loss and scores around LiGR layers.

    Args:
        config (Config): resolved configuration, explained in properties/model/ESASRec.yaml.
        dataset (Dataset): the training dataset.
    """

    data_parallel = True

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.LayerNorm = nn.Identity()  # Code: none before the layers, nor after them

    @staticmethod
    def build_transformer(config: Any, n_layers: int, n_heads: int) -> Any:
        """LiGR layers of the configured sizes."""
        names = ("hidden_size", "inner_size", "hidden_dropout_prob", "attn_dropout_prob")
        sizes = {name: config[name] for name in (*names, "layer_norm_eps")}
        return LiGRTransformer(n_layers, n_heads=n_heads, **sizes)

    def init_weights(self, module: nn.Module) -> None:
        """Code: Xavier's normal numbers for all matrices; the rest as torch makes it."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.xavier_normal_(module.weight)

    def encode(self, item_seq: Tensor, layout: TokenLayout, last_only: bool = False) -> Tensor:
        """Hidden states of the tokens, [n, H], or of each row's newest one, [B, H]."""
        age = layout.lengths[layout.row] - 1 - layout.position
        hidden = self.item_embedding(layout.pack(item_seq)) + self.position_embedding(age)
        return self.trm_encoder(self.dropout(hidden), layout, causal=True, last_only=last_only)
