"""CL4SRec: contrastive learning for sequential recommendation.

Paper: Xie et al., ICDE 2022, arXiv 2010.14395. No code was released; "Code" below is what
RecBole-DA and RuihongQiu/DuoRec (at 73eff25) share as CL4SRec. Equations have no numbers here.

    symbol       here                  shape     meaning
    s            item_seq              [B, L]    history, right-padded with 0
    E            item_embedding        [N+1, H]  item table; row 0 is padding, items are 1..N-1
    [mask]       mask_token = N        scalar    row N of the table, never scored
    H(s), h      encode(...)           [n, H], [B, H]  encoder states; state of the newest item
    a_i, a_j     two_views             [2B, L]   two random views of each row
    z_i, z_j     contrastive_loss      [B, H]    their states h(a_i(s)), h(a_j(s))
    eta          crop_ratio            scalar    share of a row that crop keeps
    gamma, beta  mask_ratio, reorder_ratio       share that is masked; share in the permuted window
    lambda, tau  cl_weight, tau        scalar    weight and temperature of the contrastive loss

The method. SASRec's encoder reads a sequence and its newest state predicts the next item. Besides,
each sequence of the batch is corrupted twice, by operators drawn at random: crop keeps one
contiguous slice, mask writes a mask token over some items, reorder permutes one contiguous window.
The same encoder reads both views, with no projection head on top. NT-Xent pulls the two states of a
sequence together and away from the 2B - 2 states of the other sequences in the batch. The loss is
the next-item loss plus lambda times the contrastive one. At inference the model is SASRec.

Differences, tagged where they are made: Paper / Code / Here.
    * next-item loss: softmax over all items, not over sampled ones; `sr_loss: BCE` samples.
    * rows: every prefix with the target at its end; `train_sampling: user_all` is one row a user
      with a target at every position, as in the paper.
    * operators: two different ones a row; `operators: independent` lets them coincide.
    * short rows: floor(gamma n) and floor(beta n) leave the shortest ones as they are, as in Code.
    * views are copies: Code corrupts the batch, and with it the stored training set, in place.
    * other rows of the same user stay negatives, as in Code, which has one row a prefix, too;
      in the paper a user has one row. `fn_mask` takes them out.
    * batches hold rows of similar length (see BucketLoader), so the negatives do, too.
"""

from typing import Any, NamedTuple

from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_simdiff.modules.augmentations import two_views
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.losses import SIMILARITIES, nt_xent
from recbole_simdiff.modules.rules import at_least, positive, ratio, require, require_choice
from recbole_simdiff.modules.transformer import layout_of, on_host

OPTIONS = {
    "operators": ("distinct", "independent"),
    "cl_similarity": SIMILARITIES,
    "fn_mask": ("none", "user", "target"),
}

RANGES = {
    "cl_weight": at_least(0),
    "crop_ratio": ratio,
    "mask_ratio": ratio,
    "reorder_ratio": ratio,
    "tau": positive,
}


class CL4SRecLoss(NamedTuple):
    """L = L_rec + cl_weight L_cl; the terms are already weighted."""

    rec: Tensor
    contrastive: Tensor


class CL4SRec(EncoderRecommender):
    """SASRec encoder trained to predict the next item and to tell corrupted sequences apart.

    Args:
        config (Config): resolved configuration, explained in properties/model/CL4SRec.yaml.
        dataset (Dataset): the training dataset.
    """

    n_extra_tokens = 1  # the mask token
    data_parallel = True

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.cl_weight: float = config["cl_weight"]
        self.tau: float = config["tau"]
        self.cl_similarity: str = config["cl_similarity"]
        self.group_field: str | None = {
            "none": None,
            "user": self.USER_ID,
            "target": self.POS_ITEM_ID,
        }[config["fn_mask"]]
        self.operators: str = config["operators"]
        self.crop_ratio: float = config["crop_ratio"]
        self.mask_ratio: float = config["mask_ratio"]
        self.reorder_ratio: float = config["reorder_ratio"]
        self.mask_token: int = self.n_items

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before anything is loaded.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        EncoderRecommender.check_config(config)
        require_choice(config, OPTIONS)
        require(config, RANGES)

    def calculate_loss(self, interaction: Interaction) -> CL4SRecLoss:
        """The next-item loss and the weighted contrastive loss, which is skipped at weight 0."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        hidden = self.encode(item_seq, layout, last_only=self.last_target_only)
        # Paper: log-softmax over the next item and sampled ones, at every position of one row a
        # user. Code, Here: over all items, at the end of every prefix; `train_sampling` decides.
        rec = self.recommendation_loss(hidden, layout, interaction)
        contrastive = rec.new_zeros(())
        if self.cl_weight > 0:
            contrastive = self.cl_weight * self.contrastive_loss(interaction)
        return CL4SRecLoss(rec, contrastive)

    def contrastive_loss(self, interaction: Interaction) -> Tensor:
        """NT-Xent of the states of two random views of each row, mean over the 2B views."""
        # Paper: both operators come from one set, whether different is not said. Code: different.
        # Here: different, with a switch.
        items, lengths = two_views(
            interaction[self.ITEM_SEQ],
            on_host(interaction, self.ITEM_SEQ_LEN),
            self.crop_ratio,
            self.mask_ratio,
            self.reorder_ratio,
            self.mask_token,
            replacement=self.operators == "independent",
        )
        z_i, z_j = self(items, lengths).chunk(2)
        group = None if self.group_field is None else interaction[self.group_field]
        return nt_xent(z_i, z_j, self.tau, self.cl_similarity, group)
