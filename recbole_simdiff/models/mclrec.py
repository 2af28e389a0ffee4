"""MCLRec: meta-optimized contrastive learning for sequential recommendation.

Paper: Qin et al., SIGIR 2023, arXiv 2304.07763. Released code consulted: the authors' repository on
the DuoRec fork of RecBole. Equations have no numbers here.

    symbol      here                   shape    meaning
    s           item_seq               [B, L]   history, right-padded with 0
    E           item_embedding         [N+1, H] item table; row 0 is padding, row N the mask token
    theta       encoder_parameters     list     E, positions, Transformer
    phi_1, _2   extractors             modules  two perceptrons H -> H/2 -> H/4 -> H
    s1, s2      views                  [2B, L]  random views: crop, mask, reorder
    h1, h2      encode_views           [B, H]   their states
    z1, z2      extractors             [B, H]   learned views of h1 and h2, of length 1
    R           regularizer            scalar   keeps learned views from becoming trivial
    lambda, beta  cl_weight, meta_weight        weights of the two contrastive losses

The method. Two random views of each sequence are encoded (as CL4SRec), and two extractors map their
states to learned views. NT-Xent contrasts h1 with h2, and each learned view with the other view's
state and with the other learned view; R counteracts what becomes too easy: it pulls pairs that are
more alike than the hardest wrong pair down to it, or lifts wrong pairs towards the right ones. Each
batch takes two steps. First the encoder moves on all losses, the extractors being constants. Then
the moved encoder reads the same views again, and the extractors move on the losses of the learned
views, the encoder being constant. No gradient passes through a step. At inference the model is
SASRec.

Differences, tagged where they are made: Paper / Code / Here.
    * steps: Code moves the encoder a second time, after the extractors.
    * R: Code has a threshold a row and three pairs instead of one threshold and (z1, z2).
    * contrast: the paper sums the losses of both directions; Code and all published weights belong
      to their mean.
    * mask: Code writes the padding id, which hides the position from attention; here a mask token
      or, with `mask_id: pad`, as Code.
    * extractors are part of the model and of its checkpoints; Code keeps them in the trainer.
    * the second step encodes without gradient and without the loss of h1 and h2: same gradients.
The released behaviour is `preset: official`.
"""

from typing import Any, NamedTuple

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.distributed import over_global_batch
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.augmentations import View, two_views
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.losses import SIMILARITIES, nt_xent
from recbole_simdiff.modules.plan import Phase, Update
from recbole_simdiff.modules.rules import among, at_least, positive, ratio, require, require_choice
from recbole_simdiff.modules.transformer import TokenLayout, layout_of, on_host

OPTIONS = {
    "regularizer": ("batch", "row"),
    "cl_similarity": SIMILARITIES,
    "mask_id": ("new", "pad"),
}

RANGES = {
    "cl_weight": at_least(0),
    "meta_weight": at_least(0),
    "regularizer_weight": at_least(0),
    "hidden_size": at_least(4),
    "crop_ratio": ratio,
    "mask_ratio": ratio,
    "reorder_ratio": ratio,
    "tau": positive,
    "encoder_steps": among(1, 2),
}


class MCLRecLoss(NamedTuple):
    """L = L_rec + cl_weight L_cl1 + meta_weight (L_cl2 + regularizer_weight R), weighted terms."""

    rec: Tensor
    contrastive: Tensor
    learned: Tensor
    regularizer: Tensor


class ExtractorLoss(NamedTuple):
    """L_cl2 and the weighted R."""

    learned: Tensor
    regularizer: Tensor


class MCLRec(EncoderRecommender):
    """SASRec encoder and two view extractors, which are trained in turn.

    Args:
        config (Config): resolved configuration, explained in properties/model/MCLRec.yaml.
        dataset (Dataset): the training dataset.
    """

    n_extra_tokens = 1  # the mask token
    data_parallel = True

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.cl_weight: float = config["cl_weight"]
        self.meta_weight: float = config["meta_weight"]
        self.regularizer_weight: float = config["regularizer_weight"]
        self.regularizer: str = config["regularizer"]
        self.joint: bool = config["joint"]
        self.encoder_steps: int = config["encoder_steps"]
        self.tau: float = config["tau"]
        self.cl_similarity: str = config["cl_similarity"]
        self.crop_ratio: float = config["crop_ratio"]
        self.mask_ratio: float = config["mask_ratio"]
        self.reorder_ratio: float = config["reorder_ratio"]
        # Code: padding masks. Here: a token of its own, as in CL4SRec, or padding.
        self.mask_token: int = self.n_items if config["mask_id"] == "new" else 0
        # Initial weights are torch's own, as in Code, not those of ``init_weights``.
        self.extractors = nn.ModuleList([self._extractor(), self._extractor()])
        self.views: View | None = None  # of the batch that is being trained on

    def _extractor(self) -> nn.Module:
        size = self.hidden_size
        return nn.Sequential(
            nn.Linear(size, size // 2),
            nn.GELU(),
            nn.Linear(size // 2, size // 4),
            nn.GELU(),
            nn.Linear(size // 4, size),
        )

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before any data is read.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        EncoderRecommender.check_config(config)
        require_choice(config, OPTIONS)
        require(config, RANGES)
        if config["mask_id"] == "pad" and config["mask_ratio"] == 1:
            raise UserError(
                "mask_ratio=1 hides whole rows; with mask_id=pad it must be below 1",
                keys=("mask_ratio", "mask_id"),
            )
        if config["joint"] and config["encoder_steps"] == 2:
            raise UserError(
                "joint=True makes one step a batch; it needs encoder_steps=1",
                keys=("joint", "encoder_steps"),
            )

    # ------------------------------------------------------------------ two steps a batch

    def training_plan(self) -> list[Phase]:
        """The encoder's step and then the extractors', each with an optimiser of its own."""
        if self.joint or (self.meta_weight == 0 and self.encoder_steps == 1):
            return [Phase("train", self.epochs)]
        first = Update("encoder", self.encoder_parameters, self.calculate_loss)
        updates: tuple[Update, ...] = (first,)
        if self.meta_weight > 0:
            extractors = list(self.extractors.parameters())
            updates += (Update("extractor", extractors, self.extractor_loss),)
        # Paper: on to the next batch. Code: the encoder moves again. Here: a switch.
        again = (first._replace(loss=self.encoder_loss),) if self.encoder_steps == 2 else ()
        return [Phase("train", self.epochs, updates=updates + again)]

    @property
    def encoder_parameters(self) -> list[nn.Parameter]:
        """theta: all parameters but the extractors'."""
        return [p for name, p in self.named_parameters() if not name.startswith("extractors.")]

    def calculate_loss(self, interaction: Interaction) -> MCLRecLoss:
        """Draw the random views of the batch, which serve for all its steps; ``encoder_loss``."""
        self.views = None
        if self.cl_weight > 0 or self.meta_weight > 0:
            self.views = self.draw_views(interaction)
        return self.encoder_loss(interaction)

    def encoder_loss(self, interaction: Interaction) -> MCLRecLoss:
        """The total loss, on the views drawn last; a term of weight 0 is not computed."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        hidden = self.encode(item_seq, layout, last_only=self.last_target_only)
        rec = self.recommendation_loss(hidden, layout, interaction)
        contrastive = learned = regularizer = rec.new_zeros(())
        if self.views is not None:
            h1, h2 = self.encode_views(self.views)
            if self.cl_weight > 0:
                contrastive = self.cl_weight * nt_xent(h1, h2, self.tau, self.cl_similarity)
            if self.meta_weight > 0:
                learned, regularizer = self.learned_loss(h1, h2, self.regularizer_weight)
        weight = self.meta_weight
        return MCLRecLoss(rec, contrastive, weight * learned, weight * regularizer)

    def extractor_loss(self, interaction: Interaction) -> ExtractorLoss:
        """L_cl2 and R on the views that the encoder's step was made with."""
        assert self.views is not None
        with torch.no_grad():
            h1, h2 = self.encode_views(self.views)
        # Paper: L_cl2 + gamma R with gamma = 0.1 beta. Code: 0.1 R, beta being left out of this
        # step altogether. Here: with each R its weight.
        scale = self.meta_weight if self.regularizer == "batch" else 1.0
        return self.learned_loss(h1, h2, scale * self.regularizer_weight)

    # ------------------------------------------------------------------ views

    def draw_views(self, interaction: Interaction) -> View:
        """Two random views of each row by different operators: items [2B, L], lengths [2B]."""
        return two_views(
            interaction[self.ITEM_SEQ],
            on_host(interaction, self.ITEM_SEQ_LEN),
            self.crop_ratio,
            self.mask_ratio,
            self.reorder_ratio,
            self.mask_token,
        )

    def encode_views(self, views: View) -> tuple[Tensor, Tensor]:
        """States h1 and h2 of the two views, each [B, H]."""
        items, lengths = views
        # Items masked by padding keep their place, but nothing attends to them.
        keys = items > 0 if self.mask_token == 0 else None
        layout = TokenLayout(lengths, items.shape[1], keys=keys, device=items.device)
        h1, h2 = self.encode(items, layout, last_only=True).chunk(2)
        return h1, h2

    def extract(self, h1: Tensor, h2: Tensor) -> tuple[Tensor, Tensor]:
        """Learned views z1 and z2, rows of length 1; two times [B, H]."""
        z1, z2 = (
            F.normalize(extractor(h).float(), dim=-1)
            for extractor, h in zip(self.extractors, (h1, h2), strict=True)
        )
        return z1, z2

    # ------------------------------------------------------------------ losses of learned views

    def learned_loss(self, h1: Tensor, h2: Tensor, regularizer_weight: float) -> ExtractorLoss:
        """L_cl2 over the three pairs with a learned view, and the weighted R.

        Args:
            h1 (Tensor): states of the first views, [B, H].
            h2 (Tensor): states of the second views, [B, H].
            regularizer_weight (float): of R.

        Returns:
            ExtractorLoss: two scalars.
        """
        z1, z2 = self.extract(h1, h2)
        pairs = [(h1, z2), (h2, z1), (z1, z2)]
        # Paper: the sum of both directions. Code, Here: their mean; temperature 1, whatever tau is.
        learned = torch.stack([nt_xent(a, b, 1.0, "dot") for a, b in pairs]).sum()
        regularizer = learned.new_zeros(())
        if regularizer_weight > 0:
            # Paper: one threshold for the batch, on (z1, z2). Code: one a row, on all three pairs,
            # divided by the temperature of L_cl1. Here: a switch; never divided.
            by_row = self.regularizer == "row"
            chosen = pairs if by_row else pairs[-1:]
            total = torch.stack([regularizer_of(a, b, by_row) for a, b in chosen]).sum()
            regularizer = regularizer_weight * total
        return ExtractorLoss(learned, regularizer)


@over_global_batch
def regularizer_of(first: Tensor, second: Tensor, by_row: bool) -> Tensor:
    """R = mean [s+ - low]_+ + mean [high - s-]_+ of one pair of views.

    s+ are the dot products of the two views of a sequence, s- all others but of a row with itself;
    low and high are the smaller and the larger one of min s+ and max s-.

    Args:
        first (Tensor): one view of each sequence, [B, H].
        second (Tensor): the other view, [B, H].
        by_row (bool): min and max over each of the 2B rows; otherwise over all of them.

    Returns:
        Tensor: scalar, >= 0; 0 for B = 1, where there is no s-.
    """
    size = len(first)
    if size == 1:
        return first.new_zeros(())
    with torch.autocast(first.device.type, enabled=False):
        views = torch.cat([first, second]).float()
        similarity = views @ views.t()  # [2B, 2B]
    rows = torch.arange(2 * size, device=views.device)
    partner = rows.roll(size)
    right = similarity[rows, partner]  # [2B]
    not_wrong = torch.zeros_like(similarity, dtype=torch.bool)
    not_wrong[rows, rows] = not_wrong[rows, partner] = True
    easiest, hardest = right, similarity.masked_fill(not_wrong, -torch.inf).amax(1)
    if not by_row:
        easiest, hardest = easiest.amin(), hardest.amax()
    low, high = torch.minimum(easiest, hardest), torch.maximum(easiest, hardest)
    lifted = F.relu(high.unsqueeze(-1) - similarity).masked_fill(not_wrong, 0.0).sum()
    return F.relu(right - low).mean() + lifted / (2 * size * (2 * size - 2))
