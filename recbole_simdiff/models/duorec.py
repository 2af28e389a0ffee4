"""DuoRec: contrastive learning for representation degeneration in sequential recommendation.

Paper: Qiu et al., WSDM 2022, arXiv 2110.05730. Equations have no numbers here.
Released code consulted: RuihongQiu/DuoRec at 73eff25.

    symbol     here                   shape     meaning
    s, t       item_seq, pos_items    [B, L], [B]  history, right-padded with 0; its next item
    E          item_embedding         [N, H]    item table; row 0 is padding, items are 1..V = N - 1
    h          state                  [B, H]    encoder state of the newest item of s
    h'         unsupervised_view      [B, H]    the same, under another dropout mask
    h_s'       supervised_view        [B, H]    state of another training row with the same target
    lambda     unsupervised_weight, supervised_weight
    tau        tau                    scalar    temperature

The method. Trained on next items alone, item embeddings collapse into a narrow cone. DuoRec adds a
contrastive loss whose views corrupt no input. The unsupervised view of a row is the row itself,
encoded again under another dropout mask. The supervised view is another training row with the same
target, drawn uniformly each time. NT-Xent pulls those two views together and away from the 2B - 2
views of the other rows (`contrast: us_x`); the state h that predicts the next item is not
contrasted. The gradient flows into all three passes. At inference the model is SASRec.

Differences, tagged where they are made: Paper / Code / Here.
    * `contrast` also offers the other pairs of Code: `un` (h, h'), `su` (h, h_s'), `us` both.
    * same-target rows: Code reads them from a file made beforehand. Here: an index in memory.
    * rows of an augmenter: views are made of real items, so a row with pseudo-items in front
      and the same row without them count as one, and are never views of each other.
    * other rows with the same target stay negatives, as in the paper and Code.
    * batches hold rows of similar length (see BucketLoader), so the negatives do, too; the
      supervised views are of any length.
The released settings are `preset: official`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.batch import PSEUDO_LENGTH, ROW_NUMBER, ROW_START
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.host import to_device
from recbole_simdiff.modules.losses import SIMILARITIES, nt_xent
from recbole_simdiff.modules.rules import at_least, positive, require, require_choice
from recbole_simdiff.modules.transformer import layout_of, on_host

OPTIONS = {"contrast": ("us_x", "us", "su", "un"), "cl_similarity": SIMILARITIES}

RANGES = {"unsupervised_weight": at_least(0), "supervised_weight": at_least(0), "tau": positive}


class DuoRecLoss(NamedTuple):
    """L = L_rec + the weighted contrastive loss."""

    rec: Tensor
    contrastive: Tensor


class SameTargetIndex:
    """For each training row, uniform draws among the other training rows with its target.

    All of it stays on the host, since how long rows are depends on what is drawn. Rows are grouped
    by target: those of target t are ``order[start[t]:start[t] + count[t]]``, and ``rank`` is the
    place of each row within its group.

    Rows with the same real items (``pseudo_mix: both`` of an augmenter makes such twins) are one:
    only ``original``, the first of them, is in a group and is drawn.

    Args:
        dataset (FlatDataset): the training part, one target a row.

    Raises:
        UserError: if the rows are ready-made sequences.
    """

    def __init__(self, dataset: Any) -> None:
        if not dataset.list_fields:
            raise UserError(
                "DuoRec draws rows with the same target from a data set with one interaction a "
                "line; with the ready-made prefixes of benchmark_filename use contrast=un",
                keys=("contrast",),
            )
        rows = dataset.inter_feat
        length = rows[dataset.item_list_length_field]
        if PSEUDO_LENGTH in rows.interaction:  # a view is made of real items
            length = length - rows[PSEUDO_LENGTH]
        target = rows[dataset.iid_field]
        newest = (rows[ROW_START] + length).numpy()  # a place in the flat array that twins share
        _, first, of_row = np.unique(newest, return_index=True, return_inverse=True)
        original = torch.from_numpy(first)[of_row]
        order = torch.from_numpy(np.sort(first))
        order = order[target[order].argsort(stable=True)]
        count = target[order].bincount(minlength=dataset.item_num)
        start = count.cumsum(0) - count
        rank = torch.zeros_like(target)
        rank[order] = torch.arange(len(order)) - start[target[order]]
        self.items = dataset.flat[dataset.iid_field]  # [actions]
        self.row_start, self.row_length = rows[ROW_START], length  # [rows]
        self.target, self.original, self.rank = target, original, rank  # [rows]
        self.order = order  # [originals]
        self.start, self.count = start, count  # [n_items]

    def draw(self, row: Tensor) -> Tensor:
        """Another row with the same target for each row, [B] -> [B]; itself if there is none.

        Rows come as their originals.
        """
        row = self.original[row]
        target = self.target[row]
        count = self.count[target]
        u = torch.rand(len(row), dtype=torch.float64)
        # Going on 1 + floor(u (count - 1)) places round the circle never comes back to the row,
        # unless it is alone.
        place = (self.rank[row] + 1 + (u * (count - 1)).long()) % count
        return self.order[self.start[target] + place]

    def sequences(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """The rows as a right-padded batch no longer than its longest row, [B, L], and lengths."""
        length = self.row_length[row]
        place = torch.arange(int(length.max()))
        inside = place < length.unsqueeze(1)
        index = torch.where(inside, self.row_start[row].unsqueeze(1) + place, 0)
        return self.items[index].masked_fill(~inside, 0), length


class DuoRec(EncoderRecommender):
    """SASRec encoder trained to predict the next item and to match rows with the same target.

    Args:
        config (Config): resolved configuration, explained in properties/model/DuoRec.yaml.
        dataset (Dataset): the training dataset. Built from a data set without rows, as for
            serving, the model has no index and cannot be trained.
    """

    data_parallel = True

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.contrast: str = config["contrast"]
        self.unsupervised_weight: float = config["unsupervised_weight"]
        self.supervised_weight: float = config["supervised_weight"]
        self.tau: float = config["tau"]
        self.cl_similarity: str = config["cl_similarity"]
        self.same_target: SameTargetIndex | None = None
        if self.contrast != "un" and hasattr(dataset, "inter_feat"):
            self.same_target = SameTargetIndex(dataset)

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before anything is loaded.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        EncoderRecommender.check_config(config)
        require_choice(config, OPTIONS)
        require(config, RANGES)
        if config["contrast"] != "un" and config["train_sampling"] == "user_all":
            raise UserError(
                f"contrast={config['contrast']} compares rows by their one target, so "
                "train_sampling=user_all, a target at every position, must be prefix_last or "
                "prefix_all; contrast=un can be trained on either",
                keys=("contrast", "train_sampling"),
            )

    def calculate_loss(self, interaction: Interaction) -> DuoRecLoss:
        """The next-item loss and the weighted contrastive loss."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        hidden = self.encode(item_seq, layout, last_only=self.last_target_only)
        rec = self.recommendation_loss(hidden, layout, interaction)
        state = hidden if self.last_target_only else hidden[layout.last]
        return DuoRecLoss(rec, self.contrastive_loss(state, interaction))

    def contrastive_loss(self, state: Tensor, interaction: Interaction) -> Tensor:
        """The weighted NT-Xent losses of ``contrast``; a loss of weight 0 is not computed.

        Args:
            state (Tensor): h, [B, H].
            interaction (Interaction): the batch.

        Returns:
            Tensor: scalar.
        """
        loss = state.new_zeros(())
        # Paper: h' against h_s'. Code: all four, us_x in its configuration. Here: likewise.
        if self.contrast == "us_x" and self.supervised_weight > 0:
            view = self.unsupervised_view(interaction)
            loss = self.supervised_weight * self.matching(view, self.supervised_view(interaction))
        if self.contrast in ("un", "us") and self.unsupervised_weight > 0:
            view = self.unsupervised_view(interaction)
            loss = self.unsupervised_weight * self.matching(state, view)
        if self.contrast in ("su", "us") and self.supervised_weight > 0:
            view = self.supervised_view(interaction)
            loss = loss + self.supervised_weight * self.matching(state, view)
        return loss

    def matching(self, first: Tensor, second: Tensor) -> Tensor:
        """NT-Xent of two views [B, H] at the model's temperature and similarity."""
        return nt_xent(first, second, self.tau, self.cl_similarity)

    def unsupervised_view(self, interaction: Interaction) -> Tensor:
        """h': the batch encoded once more, under another dropout mask, [B, H]."""
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        return self.encode(interaction[self.ITEM_SEQ], layout, last_only=True)

    def supervised_view(self, interaction: Interaction) -> Tensor:
        """h_s': another training row with each row's target, encoded, [B, H]."""
        index = self.same_target
        assert index is not None, "a model built without training rows is for serving"
        row = index.draw(on_host(interaction, ROW_NUMBER))
        device = self.item_embedding.weight.device
        # They are of any length: the shorter half apart, so that it is not padded to the longest.
        order = index.row_length[row].argsort()
        halves = [index.sequences(half) for half in row[order].chunk(2)]
        state = torch.cat([self(to_device(items, device), length) for items, length in halves])
        return state[to_device(order.argsort(), device)]
