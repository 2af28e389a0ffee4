"""SimDiffRec: similarity-guided diffusion for contrastive sequential recommendation.

Paper: arXiv 2507.11866 (v1). Released code consulted: zingyon/SimDiffRec at eb6784b.

    symbol     here                  shape     meaning
    s          item_seq              [B, L]    history, right-padded with 0
    E          item_embedding        [N, H]    item table; row 0 is padding, items are 1..V = N - 1
    H(s), h    encode(...)           [n, H], [B, H]  encoder states; state of the newest item
    noise      similarity_noise      [n, H]    mean of the k_noise nearest items' embeddings
    z_t        process.q_sample      [n, H]    z_t = A_t E[s] + C_t noise
    f(z_t, t)  denoise               [n, H]    estimate of z_0
    c          choices               [n]       largest rounding probability of a token
    g          rounding_query        scalar    scale of the rounding logits g f(z_t, t) . E_j
    s+, s-     positive, negative    [B, L]    views: confident positions overwritten

n is the number of real tokens of the batch; nothing is computed on padding.

The method. An item's noise is the mean of its nearest neighbours in the current table (Eq. 6-7). A
sequence's embeddings are blended with it (Eq. 8-9) and a bidirectional Transformer learns to
restore them (Eq. 10, 13), read as items by the tied table (Eq. 12). To make views, the fully noised
sequence is restored (Eq. 11); the positions whose rounding is most confident (Eq. 14-16) are
overwritten with the first choice (s+) and with the k_sample-th choice (s-). InfoNCE pulls h(s) to
h(s+) and away from h(s-) and from the other rows' views (Eq. 17). The total is Eq. 18. Only the
encoder is used at inference.

Differences, tagged where they are made: Paper / Code / Here.
    * rounding probability in Eq. 13: on f(z_t, t); the literal z_0 gives the denoiser no gradient.
    * Eq. 13 sums over t: the mean, estimated with one t a sequence (Code draws the same).
    * Eq. 3 is BCE: default CE as in Code; `sr_loss: BCE` is the paper's text.
    * values of A_t, C_t, T-step sampler, tau, number of positions: not in the paper, see the yaml.
    * Eq. 17 contrasts the newest state of a row: `contrast_at: every` contrasts all of them.
    * Here only, off by default: a weight of the contrast that balances gradients (`cl_balance`), a
      dropout of its own for the contrast (`cl_dropout`), sampled positive views (`pos_sample`).
The released behaviour is `preset: official`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.diffusion import samplers, schedules
from recbole_simdiff.diffusion.denoisers import TIME_EMBEDDINGS, DenoiserInput
from recbole_simdiff.diffusion.process import ForwardProcess
from recbole_simdiff.distributed import all_reduce_sum, local_fraction, world_size
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.batch import PSEUDO_LENGTH
from recbole_simdiff.modules.catalogue import Candidates, estimated_softmax_loss
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.host import to_device
from recbole_simdiff.modules.losses import (
    SIMILARITIES,
    full_softmax_loss,
    info_nce,
    largest,
    logit_blocks,
    state_info_nce,
)
from recbole_simdiff.modules.rules import (
    Rule,
    at_least,
    positive,
    ratio_above_0,
    ratio_below_1_or_none,
    require,
    require_at_most,
    require_choice,
    require_multiple,
)
from recbole_simdiff.modules.transformer import TokenLayout, layout_of, on_host

OPTIONS = {
    "forward_coef": tuple(schedules.FAMILIES),
    "noise_source": ("similarity", "gaussian"),
    "noise_refresh": ("batch", "epoch"),
    "time_embedding": TIME_EMBEDDINGS,
    "rounding": ("tied", "scaled"),
    "confidence_t": ("T", "train_t"),
    "reverse_clamp": ("nearest", "none"),
    "aug_count": ("ratio_of_length", "fixed"),
    "aug_position": ("confidence", "random"),
    "aug_items": ("denoiser", "random"),
    "cl_negatives": ("pos_and_hard", "pos_only"),
    "cl_similarity": SIMILARITIES,
    "cl_positives": ("view", "same_target"),
    "contrast_at": ("newest", "every"),
}

RANGES = {
    "k_noise": at_least(1),
    "k_sample": at_least(1),
    "pos_sample": Rule(lambda k: k == 0 or at_least(2).holds(k), "be 0, or at least 2"),
    "diffusion_steps": at_least(2),
    "reverse_steps": at_least(1),
    "contrast_states": at_least(2),
    "denoiser_layers": at_least(1),
    "denoiser_heads": at_least(1),
    "cl_weight": at_least(0),
    "diff_weight": at_least(0),
    "diff_mse_weight": at_least(0),
    "diff_round_weight": at_least(0),
    "cl_warmup_epochs": at_least(0),
    "cl_balance": at_least(0),
    "cl_dropout": ratio_below_1_or_none,
    "aug_ratio": ratio_above_0,
    "tau": positive,
    "initializer_range": positive,
}

DRAWS_PER_RANK = 16  # of an approximate catalogue, so that enough different items are drawn

BALANCE_DECAY = 0.99  # of the running means of cl_balance, per batch


class SimDiffRecLoss(NamedTuple):
    """L = L_sr + cl_weight L_cl + diff_weight L_d (Eq. 18); the terms are already weighted."""

    rec: Tensor
    contrastive: Tensor
    diffusion: Tensor


class Views(NamedTuple):
    """Positive and hard-negative view of a batch, and what is logged about them.

    Lengths are on the host, unless padding may have been replaced: ``aug_count: fixed``.
    """

    positive: Tensor  # [B, L]
    positive_len: Tensor  # [B]
    negative: Tensor  # [B, L]
    negative_len: Tensor  # [B]
    monitor: dict[str, Tensor]


class Choices(NamedTuple):
    """What estimates round to: the best items of each, best first, from one product with all."""

    confidence: Tensor  # [n], probability of the best item
    logits: Tensor  # [n, depth]
    items: Tensor  # [n, depth], in 1..V

    def of(self, token: Tensor) -> "Choices":
        """Those of some tokens, [m]."""
        return Choices(*(values[token] for values in self))


class SimDiffRec(EncoderRecommender):
    """SASRec encoder, similarity-noise denoiser and contrastive views, trained together.

    Args:
        config (Config): resolved configuration, explained in properties/model/SimDiffRec.yaml.
        dataset (Dataset): the training dataset.
    """

    data_parallel = True
    approximates = True
    run_tensors = frozenset({"gradient_norms", "neighbours", "neighbours_epoch"})
    gradient_norms: Tensor  # of cl_balance: running means for L_sr and L_cl, [2]
    neighbours: Tensor  # of noise_refresh: epoch: ids of the k_noise nearest items, [N, k_noise]
    neighbours_epoch: Tensor  # the epoch at whose start they were found, -1 for none, scalar

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.cl_weight: float = config["cl_weight"]
        self.diff_weight: float = config["diff_weight"]
        self.cl_warmup_epochs: int = config["cl_warmup_epochs"]
        self.cl_balance: float = config["cl_balance"]
        self.cl_dropout: float | None = config["cl_dropout"]
        self.k_noise: int = config["k_noise"]
        self.noise_source: str = config["noise_source"]
        self.noise_refresh: str = config["noise_refresh"]
        self.noise_detach: bool = config["noise_detach"]
        self.diff_mse_weight: float = config["diff_mse_weight"]
        self.diff_round_weight: float = config["diff_round_weight"]
        self.mse_detach_target: bool = config["mse_detach_target"]
        self.round_detach_table: bool = config["round_detach_table"]
        self.pad_in_diffusion_loss: bool = config["pad_in_diffusion_loss"]
        self.share_denoiser_encoder: bool = config["share_denoiser_encoder"]
        self.confidence_t: str = config["confidence_t"]
        self.reverse_steps: int = config["reverse_steps"]
        self.reverse_clamp: str = config["reverse_clamp"]
        self.aug_ratio: float = config["aug_ratio"]
        self.aug_count: str = config["aug_count"]
        self.aug_position: str = config["aug_position"]
        self.aug_items: str = config["aug_items"]
        self.aug_dropout: bool = config["aug_dropout"]
        self.k_sample: int = config["k_sample"]
        self.pos_sample: int = config["pos_sample"]
        self.pos_exclude_original: bool = config["pos_exclude_original"]
        self.neg_exclude_original: bool = config["neg_exclude_original"]
        self.cl_negatives: str = config["cl_negatives"]
        self.cl_similarity: str = config["cl_similarity"]
        self.cl_positives: str = config["cl_positives"]
        self.contrast_at: str = config["contrast_at"]
        self.contrast_states: int = config["contrast_states"]
        self.tau: float = config["tau"]
        self._check_against_items()

        self._build_denoiser(config)
        if self.cl_balance > 0:  # part of checkpoints, so that a resumed run goes on exactly
            self.register_buffer("gradient_norms", torch.zeros(2))
        if self.noise_refresh == "epoch":  # likewise
            ids = torch.zeros(self.n_items, self.k_noise, dtype=torch.int32)
            self.register_buffer("neighbours", ids)
            self.register_buffer("neighbours_epoch", torch.tensor(-1))
        self.epoch = 0
        self._has_neighbours = False  # as long as no epoch has begun
        self._monitored: dict[str, Tensor] = {}

    def _build_denoiser(self, config: Any) -> None:
        """Forward process, denoiser and the scale of its estimates."""
        betas = schedules.linear_betas(
            config["diffusion_steps"], config["beta_start"], config["beta_end"]
        )
        self.process = ForwardProcess(*schedules.FAMILIES[config["forward_coef"]](betas))
        self.denoiser = DenoiserInput(
            self.hidden_size,
            self.max_seq_length,
            config["diffusion_steps"],
            self.dropout_prob,
            self.layer_norm_eps,
            config["time_embedding"],
        )
        # Paper (Sec. 5.1.4): a 1-layer Transformer of its own. Code: the encoder's. Here: a switch.
        self.denoiser_encoder = (
            None
            if self.share_denoiser_encoder
            else self.build_transformer(config, config["denoiser_layers"], config["denoiser_heads"])
        )
        self.denoiser.apply(self.init_weights)
        if self.denoiser_encoder is not None:
            self.denoiser_encoder.apply(self.init_weights)
        # The Transformer ends in a LayerNorm, so its output is long and the items are short. The
        # estimate is the output times 1 / g, of the items' length at first. The squared error alone
        # teaches it; the rounding loss does not depend on it.
        self.estimate_scale = (
            nn.Parameter(
                torch.tensor(self.initializer_range), requires_grad=self.diff_mse_weight > 0
            )
            if config["rounding"] == "scaled"
            else None
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
        require_multiple(config, "hidden_size", "denoiser_heads")
        require_at_most(config, "reverse_steps", "diffusion_steps")
        if (
            config["diff_weight"] > 0
            and config["diff_mse_weight"] == config["diff_round_weight"] == 0
        ):
            raise UserError(
                f"diff_weight={config['diff_weight']} weighs nothing: diff_mse_weight=0 and "
                "diff_round_weight=0. To train without the diffusion loss, give diff_weight=0",
                keys=("diff_weight", "diff_mse_weight", "diff_round_weight"),
            )
        if not 0 < config["beta_start"] <= config["beta_end"] < 1:
            raise UserError(
                f"beta_start={config['beta_start']} and beta_end={config['beta_end']} must satisfy "
                "0 < beta_start <= beta_end < 1",
                keys=("beta_start", "beta_end"),
            )
        if config["noise_refresh"] == "epoch" and (
            config["noise_source"] == "gaussian" or config["catalogue"] == "approximate"
        ):
            raise UserError(
                f"noise_refresh=epoch keeps the neighbours of all items, which "
                f"noise_source={config['noise_source']} with catalogue={config['catalogue']} does "
                "not look for; give noise_refresh=batch",
                keys=("noise_refresh", "noise_source", "catalogue"),
            )
        SimDiffRec._check_views(config)
        SimDiffRec._check_contrast(config)
        if config["catalogue"] == "approximate":
            SimDiffRec._check_candidates(config)

    @staticmethod
    def _check_candidates(config: Any) -> None:
        """Refuse an approximate catalogue that is too small, or of the released code."""
        if config["pad_in_diffusion_loss"]:
            raise UserError(
                "catalogue=approximate needs pad_in_diffusion_loss=False: padding is no item",
                keys=("catalogue", "pad_in_diffusion_loss"),
            )
        deepest = max(config[key] for key in ("k_noise", "k_sample", "pos_sample"))
        if config["n_candidates"] < DRAWS_PER_RANK * deepest:
            raise UserError(
                f"n_candidates={config['n_candidates']} must be at least {DRAWS_PER_RANK} times "
                f"the largest of k_noise, k_sample and pos_sample, {deepest}: the nearest items "
                "are looked for among those that are drawn, some of them several times",
                keys=("n_candidates", "k_noise", "k_sample", "pos_sample"),
            )

    @staticmethod
    def _check_views(config: Any) -> None:
        """Refuse settings of the views that contradict each other."""
        if config["aug_count"] == "fixed" and not config["pad_in_diffusion_loss"]:
            raise UserError(
                "aug_count=fixed is the released behaviour, which replaces padding cells too; it "
                "needs pad_in_diffusion_loss=True (or take preset=official)",
                keys=("aug_count", "pad_in_diffusion_loss", "preset"),
            )
        ranked = ("pos_sample", "pos_exclude_original", "neg_exclude_original")
        if config["aug_items"] == "random" and any(config[key] for key in ranked):
            raise UserError(
                f"{', '.join(ranked)} rank the denoiser's choices; with aug_items=random there is "
                "nothing to rank",
                keys=("aug_items",),
            )
        hard = config["cl_negatives"] == "pos_and_hard"
        if hard and config["k_sample"] <= config["pos_sample"]:
            raise UserError(
                f"k_sample={config['k_sample']} must be larger than "
                f"pos_sample={config['pos_sample']}, so that the hard negative is not among the "
                "items that the positive view is drawn from",
                keys=("k_sample", "pos_sample"),
            )
        without = config["pos_exclude_original"] and not config["neg_exclude_original"]
        if hard and without and config["k_sample"] == 2:
            raise UserError(
                "pos_exclude_original=True with neg_exclude_original=False and k_sample=2 makes "
                "the hard negative of the positive view: where the original item is the denoiser's "
                "first choice, its second goes into both. Give neg_exclude_original=True, or a "
                "larger k_sample",
                keys=("k_sample", "pos_exclude_original", "neg_exclude_original"),
            )

    @staticmethod
    def _check_contrast(config: Any) -> None:
        """Refuse settings of the contrast that contradict each other."""
        if config["cl_balance"] > 0 and config["cl_weight"] == 0:
            raise UserError(
                f"cl_balance={config['cl_balance']} weighs a contrast that cl_weight=0 leaves out; "
                "with cl_balance any cl_weight above 0 will do, its value is not used",
                keys=("cl_balance", "cl_weight"),
            )
        if config["contrast_at"] == "every" and (
            config["train_sampling"] != "user_all" or config["aug_count"] == "fixed"
        ):
            raise UserError(
                f"contrast_at=every needs train_sampling=user_all, is {config['train_sampling']}, "
                f"and aug_count=ratio_of_length, is {config['aug_count']}",
                keys=("contrast_at", "train_sampling", "aug_count"),
            )
        if config["cl_positives"] == "same_target" and config["contrast_at"] != "every":
            raise UserError(
                "cl_positives=same_target needs contrast_at=every: the newest states alone are "
                "contrasted view by view",
                keys=("cl_positives", "contrast_at"),
            )

    def _check_against_items(self) -> None:
        n_candidates = self.n_items - 2  # neither padding nor the item itself
        if self.k_noise > n_candidates:
            raise UserError(
                f"k_noise={self.k_noise} must be smaller than the number of items: the data set "
                f"has {self.n_items - 1}, which leaves {n_candidates} neighbours for each",
                keys=("k_noise",),
            )
        n_ranked = self.n_items - 1 - self.neg_exclude_original
        if self.k_sample > n_ranked:
            less = ", one less with neg_exclude_original" if self.neg_exclude_original else ""
            raise UserError(
                f"k_sample={self.k_sample} must not exceed the number of items, "
                f"{self.n_items - 1}{less}",
                keys=("k_sample",),
            )
        if self.pos_sample > self.n_items - 1:
            raise UserError(
                f"pos_sample={self.pos_sample} must not exceed the number of items, "
                f"{self.n_items - 1}",
                keys=("pos_sample",),
            )

    # ------------------------------------------------------------------ total loss, Eq. 18

    def calculate_loss(self, interaction: Interaction) -> SimDiffRecLoss:
        """The three weighted terms of Eq. 18; a term of weight 0 is not computed."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        hidden = self.encode(item_seq, layout, last_only=self.last_target_only)
        rec = self.recommendation_loss(hidden, layout, interaction)

        contrastive = diffusion = rec.new_zeros(())
        warmup = min(1.0, self.epoch / self.cl_warmup_epochs) if self.cl_warmup_epochs else 1.0
        cl_weight = self.cl_weight * warmup
        self._monitored = {"item_norm": self._item_norm(layout.pack(item_seq))}
        if self.diff_weight > 0 or cl_weight > 0:
            item_seq, tokens = self._tokens(item_seq, layout)
            items = tokens.pack(item_seq)
            among = self.catalogue_sample(items) if self.approximate else None
            noise = self.noise(items, among, tokens.host_pack(on_host(interaction, self.ITEM_SEQ)))
            t = torch.randint(1, self.process.n_steps + 1, (tokens.batch,), device=item_seq.device)
            if self.diff_weight > 0:
                diffusion = self.diff_weight * self.diffusion_loss(items, noise, t, tokens, among)
            if cl_weight > 0:
                views = self.make_views(item_seq, noise.detach(), t, tokens, among)
                self._monitored |= views.monitor
                with self._contrast_dropout():
                    anchor = self.anchor(hidden, layout, interaction)
                    if self.contrast_at == "every":
                        contrast = self.contrast_every_state(anchor, layout, interaction, views)
                    else:
                        contrast = self.contrastive_loss(anchor, views)
                if self.cl_balance > 0:
                    weight = warmup * self.balanced_weight(rec, hidden, contrast, anchor)
                    self._monitored["cl_weight"] = weight
                    contrastive = weight * contrast
                else:
                    contrastive = cl_weight * contrast
        return SimDiffRecLoss(rec, contrastive, diffusion)

    def begin_epoch(self, phase: str, epoch: int) -> None:
        """The weight of the contrast grows; neighbours may be found anew, once an epoch."""
        self.epoch = epoch
        if self.noise_refresh == "epoch" and self.neighbours_epoch.item() != epoch:
            table = self.item_embedding.weight
            items = torch.arange(self.n_items, device=table.device)
            self.neighbours.copy_(self.nearest_items(items))
            self.neighbours_epoch.fill_(epoch)
        self._has_neighbours = self.noise_refresh == "epoch"

    def monitored(self) -> dict[str, Tensor]:
        """Mean length of the items and, with a contrast, what the last views are like."""
        return self._monitored

    @torch.no_grad()
    def augmented_views(self, interaction: Interaction) -> dict[str, Tensor]:
        """The views of a batch by name, [B, L] each, for analysis."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        item_seq, tokens = self._tokens(item_seq, layout)
        items = tokens.pack(item_seq)
        among = self.catalogue_sample(items) if self.approximate else None
        t = torch.randint(1, self.process.n_steps + 1, (tokens.batch,), device=item_seq.device)
        views = self.make_views(item_seq, self.noise(items, among), t, tokens, among)
        return {"positive": views.positive, "hard negative": views.negative}

    def _item_norm(self, items: Tensor) -> Tensor:
        """Mean length of all items, or of those of the batch in an approximate catalogue, scalar.

        Args:
            items (LongTensor): items of the batch, [n].
        """
        table = self.item_embedding.weight.detach()
        rows = F.embedding(items, table) if self.approximate else table[1:]
        return rows.norm(dim=1).mean()

    def _tokens(self, item_seq: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        """Items and tokens that the diffusion model works on: the real ones."""
        if self.pad_in_diffusion_loss:  # Code
            return with_padding(item_seq, layout, self.max_seq_length)
        return item_seq, layout

    # ------------------------------------------------------------------ noise, Eq. 6-7

    def noise(
        self, items: Tensor, among: Candidates | None = None, known: Tensor | None = None
    ) -> Tensor:
        """Noise vector of every token, [n] -> [n, H]; the same for equal items, unless Gaussian.

        Args:
            items (LongTensor): item of each token, [n].
            among (Candidates | None): where neighbours are looked for; None for all items.
            known (LongTensor | None): the items on the host; without them they are read from the
                device, [n].
        """
        if self.noise_source == "gaussian":  # ablation "w/o k_noise" (Table 3)
            return torch.randn(len(items), self.hidden_size, device=items.device)
        # Code lets the gradient flow into the neighbours' rows. Here: detached, with a switch.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.noise_detach):
            return self.similarity_noise(items.cpu() if known is None else known, among)

    def similarity_noise(self, items: Tensor, among: Candidates | None = None) -> Tensor:
        """Mean embedding of each item's k_noise nearest items (Eq. 6-7), [n] -> [n, H].

        Paper, Code: nearest now. Here, with ``noise_refresh: epoch``: nearest when the epoch began;
        their embeddings are those of now.

        Args:
            items (LongTensor): item of each token, on the host, where equal ones are found, [n].
            among (Candidates | None): where neighbours are looked for; None for all items.
        """
        table = self.item_embedding.weight
        distinct, where = torch.unique(items, return_inverse=True)
        distinct = to_device(distinct, table.device)
        if self.training and self._has_neighbours:
            neighbours = self.neighbours[distinct].long()
        else:
            neighbours = self.nearest_items(distinct, among)
        noise = F.embedding_bag(neighbours, table, mode="mean", sparse=self.approximate)
        return noise[to_device(where, table.device)]

    @torch.no_grad()
    def nearest_items(self, items: Tensor, among: Candidates | None = None) -> Tensor:
        """Ids of the k_noise items with the largest dot product (Eq. 6), [U] -> [U, k_noise].

        Neither the item itself nor padding is a candidate (Code: padding is).
        """
        table = self.item_embedding.weight.float()
        rows = table if among is None else F.embedding(among.items, table)
        neighbours = items.new_empty(len(items), self.k_noise)
        with torch.autocast(items.device.type, enabled=False):
            for part, score in logit_blocks(table[items], rows, self.loss_memory_mb):
                own = items[part].unsqueeze(1)
                if among is None:
                    score[:, 0] = -torch.inf
                    score.scatter_(1, own, -torch.inf)
                else:
                    score.masked_fill_(among.repeated | (among.items == own), -torch.inf)
                nearest = largest(score, self.k_noise, ordered=False)[1]
                neighbours[part] = nearest if among is None else among.items[nearest]
        return neighbours

    # ------------------------------------------------------------------ diffusion, Eq. 8-13

    def denoise(self, z_t: Tensor, t: Tensor, layout: TokenLayout) -> Tensor:
        """f(z_t, t), an estimate of z_0 (Eq. 10). z_t [n, H], t [B] -> [n, H]."""
        transformer = self.denoiser_encoder or self.trm_encoder
        out: Tensor = self.denoiser(z_t, t, layout, transformer)
        return out if self.estimate_scale is None else out * self.estimate_scale

    def rounding_query(self, z_hat: Tensor) -> Tensor:
        """g z_hat, whose products with the items are the logits of Eq. 12, [n, H].

        Paper ("trainable rounding"): the softmax of Eq. 12 has weights of its own or the table's.
        Code, and ``rounding: tied``: the table's, g = 1. ``scaled``: a learned g, so that squared
        error and rounding do not ask for different lengths of the estimate.
        """
        return z_hat if self.estimate_scale is None else z_hat / self.estimate_scale

    def diffusion_loss(
        self,
        items: Tensor,
        noise: Tensor,
        t: Tensor,
        layout: TokenLayout,
        among: Candidates | None = None,
    ) -> Tensor:
        """L_d = mse + rounding (Eq. 13), for one step t a sequence.

        Args:
            items (LongTensor): item of each token, [n].
            noise (Tensor): noise of each token, [n, H].
            t (LongTensor): step of each row, in 1..T, [B].
            layout (TokenLayout): where the n tokens sit.
            among (Candidates | None): what the rounding is estimated from; None for all items.

        Returns:
            Tensor: scalar, a sum over tokens divided by the expected number of tokens in a batch.
        """
        z_0 = self.item_embedding(items)
        z_hat = self.denoise(self.process.q_sample(z_0, t[layout.row], noise), t, layout)
        target = z_0.detach() if self.mse_detach_target else z_0
        loss = z_0.new_zeros(())
        if self.diff_mse_weight > 0:
            loss = loss + self.diff_mse_weight * (target - z_hat).float().pow(2).mean(-1).sum()
        if self.diff_round_weight > 0:
            # Paper: -log p(s | z_0), which does not depend on f when z_0 is exact.
            # Code: -log p(s | f(z_t, t)), averaged over padding too. Here: on f, real tokens only.
            total = self.rounding_loss(self.rounding_query(z_hat), items, among)
            loss = loss + self.diff_round_weight * total
        if self.pad_in_diffusion_loss:
            return local_fraction(len(items)) * loss / len(items)
        return loss / (self.tokens_per_batch or len(items))

    def rounding_loss(self, query: Tensor, items: Tensor, among: Candidates | None) -> Tensor:
        """-log of the probability that estimates round to their items (Eq. 12), a sum over tokens.

        Args:
            query (Tensor): see ``rounding_query``, [n, H].
            items (LongTensor): item of each token, [n].
            among (Candidates | None): what it is estimated from; None for all items.
        """
        table = self.item_embedding.weight
        table = table.detach() if self.round_detach_table else table
        if among is not None:
            return estimated_softmax_loss(query, table, items, among, self.loss_memory_mb)
        first = 0 if self.pad_in_diffusion_loss else 1  # of the classes
        return full_softmax_loss(query, table[first:], items - first, self.loss_memory_mb)

    # ------------------------------------------------------------------ views, Eq. 11, 14-16

    @torch.no_grad()
    def make_views(
        self,
        item_seq: Tensor,
        noise: Tensor,
        t: Tensor,
        layout: TokenLayout,
        among: Candidates | None = None,
    ) -> Views:
        """Restore the fully noised sequence; overwrite its confident positions.

        Args:
            item_seq (LongTensor): items, [B, L].
            noise (Tensor): noise of each token, [n, H].
            t (LongTensor): training step of each row, used only with ``confidence_t: train_t``.
            layout (TokenLayout): where the n tokens sit.
            among (Candidates | None): what estimates are rounded to; None for all items.

        Returns:
            Views: positive and hard-negative view, their lengths, and what is logged: how often
            the first choice of the denoiser is the original item (``restored``; of the selected
            positions, ``restored_selected``), collision rates, and the mean confidence.
        """
        # Paper (Sec. 4.3): from the fully noised sequence. Code: from z_t at the training step.
        start = t if self.confidence_t == "train_t" else torch.full_like(t, self.process.n_steps)
        with self._denoiser_mode(self.aug_dropout):
            z_hat = self.restore(layout.pack(item_seq), noise, start, layout, among)
        choices = self.choices(z_hat, self.rank_depth, among)
        confidence = choices.confidence
        score = torch.rand_like(confidence) if self.aug_position == "random" else confidence
        token = self.select_positions(score, layout)
        original = layout.pack(item_seq)[token]
        positive, negative = self.replacements(choices.of(token), original)

        restored = (choices.items[:, 0] == layout.pack(item_seq)).float()
        monitor = {
            "restored": layout.of_real(restored).mean(),
            "restored_selected": restored[token].mean(),
            "positive_is_original": (positive == original).float().mean(),
            "negative_is_original": (negative == original).float().mean(),
            "confidence": layout.of_real(confidence).mean(),
        }
        positive, negative = (
            overwritten(item_seq, layout, token, new) for new in (positive, negative)
        )
        if self.aug_count == "fixed":  # Code: padding may have become items
            views = (*refilled(positive, item_seq, layout), *refilled(negative, item_seq, layout))
            return Views(*views, monitor)
        return Views(positive, layout.host_lengths, negative, layout.host_lengths, monitor)

    def restore(
        self,
        items: Tensor,
        noise: Tensor,
        start: Tensor,
        layout: TokenLayout,
        among: Candidates | None = None,
    ) -> Tensor:
        """Noise the items up to step ``start`` and run the reverse process (Eq. 11).

        Args:
            items (LongTensor): item of each token, [n].
            noise (Tensor): noise of each token, [n, H].
            start (LongTensor): step of each row, in 1..T, [B].
            layout (TokenLayout): where the n tokens sit.
            among (Candidates | None): what estimates inside a chain are rounded to.

        Returns:
            Tensor: estimate of the items' embeddings, [n, H].
        """
        first = layout.last - layout.lengths + 1

        def denoise(z_t: Tensor, token_t: Tensor) -> Tensor:
            return self.denoise(z_t, token_t[first], layout)

        token_start = start[layout.row]
        z_t = self.process.q_sample(self.item_embedding(items), token_start, noise)
        times = samplers.trailing(token_start, self.reverse_steps)
        nearest = partial(self.nearest_embedding, among=among)
        clamp = nearest if self.reverse_clamp == "nearest" else None
        return samplers.ddim(denoise, z_t, self.process, times, clamp)

    def nearest_embedding(self, z_hat: Tensor, among: Candidates | None = None) -> Tensor:
        """Embedding of the item that each estimate rounds to, [n, H] -> [n, H]."""
        items = self.choices(z_hat, 1, among).items.squeeze(1)
        return self.item_embedding(items).to(z_hat.dtype)

    def _rounding_table(self, among: Candidates | None) -> Tensor:
        """Embeddings of the items that an estimate may round to, [V, H] or [C, H]."""
        table = self.item_embedding.weight.detach()
        return table[1:] if among is None else F.embedding(among.items, table)

    @staticmethod
    def _rounded(row: Tensor, among: Candidates | None) -> Tensor:
        """Items of rows of ``_rounding_table``."""
        return row + 1 if among is None else among.items[row]

    def choices(self, z_hat: Tensor, depth: int, among: Candidates | None = None) -> Choices:
        """The best items, and c = max_j softmax(g z_hat . E_j)_j over real items (Eq. 14-15).

        Args:
            z_hat (Tensor): estimates, [n, H].
            depth (int): number of items for each; no more than there are.
            among (Candidates | None): the items j, and what the sum of the softmax is estimated
                from; None for all items.

        Returns:
            Choices: of each estimate, ranked as the rounding loss does.
        """
        n, table = len(z_hat), self._rounding_table(among)
        depth = min(depth, len(table))
        c = torch.empty(n, device=z_hat.device)
        best = table.new_empty(n, depth)
        item = torch.empty(n, depth, dtype=torch.long, device=z_hat.device)
        query = self.rounding_query(z_hat)
        with torch.autocast(z_hat.device.type, enabled=False):
            for part, logits in logit_blocks(query, table, self.loss_memory_mb):
                ranked = logits
                if among is not None:
                    ranked = logits.masked_fill(among.repeated, -torch.inf)
                best[part], row = largest(ranked, depth)
                item[part] = self._rounded(row, among)
                logits.sub_(best[part, :1])
                if among is not None:
                    logits.sub_(among.offset)
                c[part] = logits.exp_().sum(1).reciprocal_()
        # An estimated sum may be less than its largest term.
        return Choices(c.clamp_(max=1.0), best, item)

    @property
    def rank_depth(self) -> int:
        """How many choices of the denoiser its views need."""
        return 1 if self.aug_items == "random" else max(self.k_sample + 1, self.pos_sample)

    def select_positions(self, score: Tensor, layout: TokenLayout) -> Tensor:
        """The K_b best tokens of each row (Eq. 16), as packed indices in ascending order, [m].

        Paper: k is not given. Here: K_b = clamp(floor(aug_ratio * length), 1, length), so padding
        is never chosen. Code (``aug_count: fixed``): int(aug_ratio * L) cells of every row, padding
        included, with confidence 0.

        Args:
            score (Tensor): score of each token, [n].
            layout (TokenLayout): where the n tokens sit.

        Returns:
            LongTensor: [m].
        """
        padding = -torch.inf
        count = (self.aug_ratio * layout.host_lengths.double() + 1e-9).floor().long().clamp(min=1)
        if self.aug_count == "fixed":  # Code
            padding = 0.0
            count = torch.full_like(count, max(1, int(self.aug_ratio * self.max_seq_length)))
        total = int(torch.minimum(count, layout.host_packed).sum())
        count = to_device(count, score.device)
        padded = layout.unpack(score, fill=-torch.inf).masked_fill(~layout.keys, padding)
        order = padded.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(layout.length, device=order.device).expand_as(order)
        )
        chosen = layout.pack(rank < count.unsqueeze(1))
        return torch.nonzero_static(chosen, size=total).squeeze(1)

    def replacements(self, choices: Choices, original: Tensor) -> tuple[Tensor, Tensor]:
        """First and k_sample-th choice of the denoiser for each selected token (Sec. 4.4).

        Here: with ``pos_sample`` k the positive one is drawn from the first k choices.

        Args:
            choices (Choices): of the selected tokens, ``rank_depth`` each.
            original (LongTensor): their items, [m].

        Returns:
            tuple: ids for the positive and for the hard-negative view, both in 1..V, [m].
        """
        if self.aug_items == "random":  # Code
            first_id = 0 if self.aug_count == "fixed" else 1
            return random_items(original, first_id, self.n_items, self.k_sample > 1)
        item, ranked = original.unsqueeze(1), choices.items
        if self.pos_sample:
            positive = self._draw(choices.logits, ranked, item)
        else:
            positive = self._rank(ranked, item, 1, self.pos_exclude_original)
        return positive, self._rank(ranked, item, self.k_sample, self.neg_exclude_original)

    def _draw(self, logits: Tensor, ranked: Tensor, original: Tensor) -> Tensor:
        """One of the pos_sample best items, by their probability (Eq. 12) among themselves.

        With ``pos_exclude_original`` the original item is none of them.
        """
        logits = logits[:, : self.pos_sample]
        ranked = ranked[:, : self.pos_sample]
        if self.pos_exclude_original:
            logits = logits.masked_fill(ranked == original, -torch.inf)
        # What multinomial(1) does, but for checks that the host would wait for.
        probability = logits.softmax(1)
        drawn = (probability / torch.empty_like(probability).exponential_()).argmax(1, keepdim=True)
        return ranked.gather(1, drawn).squeeze(1)

    @staticmethod
    def _rank(ranked: Tensor, original: Tensor, rank: int, exclude: bool) -> Tensor:
        """The rank-th column of ``ranked``, not counting the original item if ``exclude``."""
        if not exclude:
            return ranked[:, rank - 1]
        above = (ranked[:, :rank] == original).any(1)  # it is among the first ``rank``
        pick = torch.where(above, rank, rank - 1).clamp(max=ranked.shape[1] - 1)
        return ranked.gather(1, pick.unsqueeze(1)).squeeze(1)

    @contextmanager
    def _denoiser_mode(self, dropout: bool) -> Iterator[None]:
        """Denoiser in train mode if ``dropout`` else in eval mode; restored afterwards."""
        modules: list[nn.Module] = [self.denoiser, self.denoiser_encoder or self.trm_encoder]
        before = [module.training for module in modules]
        for module in modules:
            module.train(dropout)
        try:
            yield
        finally:
            for module, training in zip(modules, before, strict=True):
                module.train(training)

    # ------------------------------------------------------------------ contrast, Eq. 17

    def anchor(self, hidden: Tensor, layout: TokenLayout, interaction: Interaction) -> Tensor:
        """States of the sequences that the views are contrasted with.

        Paper, Code: those that predict the next item. Here, with ``cl_dropout``: those of another
        pass with the views' dropout.

        Args:
            hidden (Tensor): states of the next-item loss, [n, H] or [B, H].
            layout (TokenLayout): layout of the batch.
            interaction (Interaction): the batch.

        Returns:
            Tensor: h(s), [B, H], or with ``contrast_at: every`` H(s), [n, H].
        """
        newest = self.contrast_at == "newest"
        if self.cl_dropout is not None:
            return self.encode(interaction[self.ITEM_SEQ], layout, last_only=newest)
        return hidden[layout.last] if newest and not self.last_target_only else hidden

    @contextmanager
    def _contrast_dropout(self) -> Iterator[None]:
        """The encoder's dropout is ``cl_dropout``, if that is given; restored afterwards."""
        if self.cl_dropout is None:
            yield
            return
        modules = [self.dropout, *self.trm_encoder.modules()]
        dropouts = [module for module in modules if isinstance(module, nn.Dropout)]
        before = [module.p for module in dropouts]
        for module in dropouts:
            module.p = self.cl_dropout
        try:
            yield
        finally:
            for module, p in zip(dropouts, before, strict=True):
                module.p = p

    def balanced_weight(
        self, rec: Tensor, hidden: Tensor, contrast: Tensor, anchor: Tensor
    ) -> Tensor:
        """rho times the gradient norm of L_sr at the states over that of L_cl, in running means.

        The means start at 0, which their ratio does not see. The norms are those of the gradients
        at the states of the whole batch, so that several processes compute the same weight.

        Args:
            rec (Tensor): L_sr, scalar.
            hidden (Tensor): states that it was computed from, [n, H] or [B, H].
            contrast (Tensor): L_cl without weight, scalar.
            anchor (Tensor): H(s) or h(s) that it was computed from, [n, H] or [B, H].

        Returns:
            Tensor: scalar, without gradient; 0 as long as the contrast has had no gradient.
        """
        if torch.is_grad_enabled():
            squares = [
                torch.autograd.grad(loss, states, retain_graph=True)[0].float().pow(2).sum()
                for loss, states in ((rec, hidden), (contrast, anchor))
            ]
            norms = all_reduce_sum(torch.stack(squares)).sqrt()
            self.gradient_norms.lerp_(norms, 1 - BALANCE_DECAY)
        of_rec, of_contrast = self.gradient_norms
        return torch.where(of_contrast > 0, self.cl_balance * of_rec / of_contrast, 0.0)

    def contrastive_loss(self, state: Tensor, views: Views) -> Tensor:
        """InfoNCE of h(s) against h(s+), the other rows' views and h(s-) (Eq. 17).

        Args:
            state (Tensor): h(s), [B, H].
            views (Views): s+ and s-.

        Returns:
            Tensor: scalar, mean over the batch.
        """
        if self.cl_negatives == "pos_only":  # ablation "w/o k_sample" (Table 3)
            positive = self(views.positive, views.positive_len)
            return info_nce(state, positive, self.tau, similarity=self.cl_similarity)
        both = self(
            torch.cat([views.positive, views.negative]),
            torch.cat([views.positive_len, views.negative_len]),
        )
        positive, negative = both.chunk(2)
        return info_nce(state, positive, self.tau, negative, self.cl_similarity)

    def contrast_every_state(
        self, hidden: Tensor, layout: TokenLayout, interaction: Interaction, views: Views
    ) -> Tensor:
        """Eq. 17 at every position: H(s)_i against H(s+)_i, the states of other users, and H(s-)_i.

        Paper, Code: the newest state of a row. Here: the encoder is causal, so that the state of
        position i is h of the first i items, and one pass contrasts all prefixes of a row. Of more
        than ``contrast_states`` states so many are drawn.

        Args:
            hidden (Tensor): H(s) of all tokens, [n, H].
            layout (TokenLayout): layout of the batch, and of its views.
            interaction (Interaction): the batch.
            views (Views): s+ and s-.

        Returns:
            Tensor: scalar, a sum over states divided by the expected number of targets in a batch,
            as the next-item loss.
        """
        state = torch.arange(len(hidden), device=hidden.device)
        if PSEUDO_LENGTH in interaction:  # states within pseudo-items have no target
            with_target = layout.host_tokens_from(on_host(interaction, PSEUDO_LENGTH))
            state = to_device(with_target, hidden.device)
        n_states = len(state)
        limit = max(1, self.contrast_states // world_size())  # of this process
        if n_states > limit:
            drawn = torch.randperm(n_states, device=state.device)[:limit]
            state = state[drawn]
        # With pad_in_diffusion_loss views have more padding than the batch.
        positive = self.encode(views.positive[:, : layout.length], layout)[state]
        negative = None
        if self.cl_negatives == "pos_and_hard":
            negative = self.encode(views.negative[:, : layout.length], layout)[state]
        target = self.labels(interaction[self.ITEM_SEQ], layout, interaction[self.POS_ITEM_ID])
        expected = self.targets_per_batch or n_states
        return state_info_nce(
            hidden[state],
            positive,
            self.tau,
            self.cl_similarity,
            user=interaction[self.USER_ID][layout.row][state],
            target=target[state],
            weight=hidden.new_full((len(state),), n_states / len(state) / expected),
            negative=negative,
            same_target=self.cl_positives == "same_target",
        )


def overwritten(item_seq: Tensor, layout: TokenLayout, token: Tensor, new: Tensor) -> Tensor:
    """A copy of ``item_seq`` with other items at the selected tokens.

    Args:
        item_seq (LongTensor): items, [B, L].
        layout (TokenLayout): where its tokens sit.
        token (LongTensor): the selected tokens, packed indices, [m].
        new (LongTensor): their items, [m].

    Returns:
        LongTensor: [B, L].
    """
    flat = item_seq.flatten().index_copy(0, layout.index[token], new)
    return flat.view_as(item_seq)


# ---------------------------------------------------------------------- the released code only
# What `pad_in_diffusion_loss`, `aug_count: fixed` and `aug_items: random` of `preset: official`
# need. No other setting calls what follows.


def with_padding(
    item_seq: Tensor, layout: TokenLayout, max_length: int
) -> tuple[Tensor, TokenLayout]:
    """The batch padded to the maximum length, with its padding cells among the tokens.

    Args:
        item_seq (LongTensor): items, [B, L].
        layout (TokenLayout): where its tokens sit.
        max_length (int): longest row of the data set.

    Returns:
        tuple: items, [B, max_length], and the layout of all its cells.
    """
    item_seq = F.pad(item_seq, (0, max_length - item_seq.shape[1]))
    return item_seq, TokenLayout(layout.host_lengths, max_length, True, device=item_seq.device)


def random_items(
    original: Tensor, first_id: int, n_items: int, different: bool
) -> tuple[Tensor, Tensor]:
    """Uniform ids for both views: Code overwrites the logits with uniform numbers.

    Args:
        original (LongTensor): items of the selected tokens, [m].
        first_id (int): smallest id; 0 if padding may replace an item.
        n_items (int): number of ids, padding included.
        different (bool): the second id of a token is never its first one.

    Returns:
        tuple: ids for the positive and for the hard-negative view, [m].
    """
    n_ids = n_items - first_id
    first = torch.randint(n_ids, original.shape, device=original.device)
    step = torch.randint(1, n_ids, original.shape, device=original.device)
    second = (first + step) % n_ids if different else first
    return first + first_id, second + first_id


def refilled(view: Tensor, item_seq: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """A view whose replaced padding cells stand *before* its history.

    Code pads on the left, so an overwritten padding cell lengthens the sequence at its old end, and
    a replacement by id 0 leaves a hole. Both are kept; holes are closed.

    Args:
        view (LongTensor): items and replaced padding cells, [B, L].
        item_seq (LongTensor): the sequences, which empty views become again, [B, L].
        layout (TokenLayout): lengths of the sequences.

    Returns:
        tuple: the right-padded view, [B, L], and its lengths, [B].
    """
    place = torch.arange(layout.length, device=view.device)
    left_padded = view.gather(1, (place + layout.lengths.unsqueeze(1)) % layout.length)
    order = (left_padded == 0).int().argsort(dim=1, stable=True)
    length = (left_padded != 0).sum(1)
    empty = length == 0
    closed = torch.where(empty.unsqueeze(1), item_seq, left_padded.gather(1, order))
    return closed, torch.where(empty, layout.lengths, length)
