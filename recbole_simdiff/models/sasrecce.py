"""SASRecCE: SASRec's encoder with the full-softmax loss, the baseline of every model here.

Paper: "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781, with the loss that
RecBole gives its SASRec.

    symbol  here             shape     meaning
    s       item_seq         [B, L]    history, right-padded with 0
    E       item_embedding   [N, H]    item table; row 0 is padding, items are 1..V = N - 1
    H(s)    encode(...)      [n, H]    states of the n real tokens

The method. A causal Transformer reads the history; the state of each position is trained to give
the next item, by a softmax over all items; items are ranked by their inner product with the newest
state.

Differences, tagged where they are made: Paper / Code / Here.
    * loss. Paper: binary cross-entropy with one negative a position (`sr_loss: BCE`). RecBole, and
      here: the full softmax, which ranks far better.
    * rows. RecBole: a row a prefix, one target each (`train_sampling: prefix_last`). Here: a row a
      user, a target at every position: the same targets at a fifth of the cost.
"""

from typing import NamedTuple

from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.transformer import TokenLayout


class SASRecCELoss(NamedTuple):
    """The next-item loss, by its name."""

    rec: Tensor


class SASRecCE(EncoderRecommender):
    """The encoder that the models of this package stand on, with nothing added."""

    data_parallel = True

    def calculate_loss(self, interaction: Interaction) -> SASRecCELoss:
        """Cross-entropy of the next items over the expected number of targets in a batch."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = TokenLayout(interaction[self.ITEM_SEQ_LEN], item_seq.shape[1])
        hidden = self.encode(item_seq, layout, last_only=self.last_target_only)
        return SASRecCELoss(self.recommendation_loss(hidden, layout, interaction))
