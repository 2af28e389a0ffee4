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

from recbole_simdiff.modules.encoder import EncoderRecommender


class SASRecCE(EncoderRecommender):
    """The encoder that the models of this package stand on, with nothing added.

    Args:
        config (Config): resolved configuration, explained in properties/model/SASRecCE.yaml.
        dataset (Dataset): the training dataset.
    """

    data_parallel = True
    approximates = True
