"""CaDiRec: context-aware diffusion-based contrastive learning for sequential recommendation.

Paper: Cui et al., CIKM 2024, arXiv 2405.09369; its first version is DiffCLRec. The paper's body was
not at hand: the steps follow its abstract and the released code, and equations have no numbers.
Released code consulted: ziqiangcui/CaDiRec at 870f0dd.

    symbol     here                  shape     meaning
    s          item_seq              [B, L]    history, right-padded with 0
    E          item_embedding        [N, H]    item table; row 0 is padding, items are 1..V = N - 1
    H(s), h    encode(...)           [n, H], [B, H]  encoder states; state of the newest item
    a          Noised.token, .cell   [m]       positions to be noised and replaced
    x_0        clean                 [n, H]    embeddings of the items, [m, H] of them noised
    x_t        process.q_sample      [m, H]    signal_t x_0 + noise_t eps, at noised positions
    f(x_t, t)  denoise               [n, H]    estimate of x_0
    x_hat      estimate, generate    [m, H]    estimate of x_0 at noised positions
    s', s''    make_views            [2B, L]   views: noised positions replaced

n is the number of real tokens of the rows with a noised position, m that of noised positions;
vocabulary products are formed for those m only.

The method. In each view of a sequence some positions are chosen at random. Their embeddings are
noised; the others stay as context. A bidirectional Transformer learns to restore them from the
items before and after, read as items by the tied table. For the views, the chosen positions start
from pure noise and are restored by the reverse process with the context held fixed; each is then
replaced by one of the items that the restored embedding ranks best. NT-Xent pulls the two views of
a sequence together and away from those of other sequences. The next-item, contrastive and diffusion
losses are trained jointly; only the encoder is used at inference.

Differences, tagged where they are made: Paper / Code / Here.
    * positions: Code has one Bernoulli mask for both views, empty for most short histories.
    * replacements: Code has no reverse process and reuses the training prediction.
    * the context is clean: Code adds noise of scale noise_1 to it.
    * denoiser: Code has DeBERTa with the encoder's dropout at its input.
    * candidates: Code has padding and a mask id among them.
    * diffusion loss: every noised position of an epoch weighs the same. Code is a mean over the
      batch's rows, in which rows without a noised position count as 0.
    * squared error: the paper's framework has it, Code gives it weight 0.
    * steps: Code counts them from 0 to T - 1; here they are 1..T.
The released behaviour is `preset: official`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.func import functional_call

from recbole_simdiff.diffusion import samplers, schedules
from recbole_simdiff.diffusion.denoisers import DenoiserInput
from recbole_simdiff.diffusion.process import ForwardProcess
from recbole_simdiff.distributed import local_fraction
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.host import to_device
from recbole_simdiff.modules.losses import (
    SIMILARITIES,
    full_softmax_loss,
    largest,
    logit_blocks,
    nt_xent,
)
from recbole_simdiff.modules.rules import (
    at_least,
    positive,
    ratio,
    ratio_below_1,
    require,
    require_at_most,
    require_choice,
    require_multiple,
)
from recbole_simdiff.modules.transformer import (
    PackedTransformer,
    RelativeTransformer,
    TokenLayout,
    layout_of,
)

OPTIONS = {
    "nll_reduction": ("token", "sequence"),
    "aug_mask": ("independent_min1", "shared"),
    "denoiser_items": ("shared", "separate"),
    "denoiser_pos": ("absolute", "relative"),
    "cl_similarity": SIMILARITIES,
}

RANGES = {
    "cl_weight": at_least(0),
    "diff_weight": at_least(0),
    "diff_nll_weight": at_least(0),
    "diff_mse_weight": at_least(0),
    "diffusion_steps": at_least(2),
    "reverse_steps": at_least(0),
    "denoiser_layers": at_least(1),
    "denoiser_heads": at_least(1),
    "denoiser_inner": at_least(1),
    "cand_topk": at_least(1),
    "aug_ratio": ratio,
    "denoiser_dropout": ratio_below_1,
    "tau": positive,
}


class CaDiRecLoss(NamedTuple):
    """L = L_sr + cl_weight L_cl + diff_weight L_d; the terms are already weighted."""

    rec: Tensor
    contrastive: Tensor
    diffusion: Tensor


class Noised(NamedTuple):
    """The positions to be noised, and the rows that have any.

    Rows are those of the sequences or, with two masks, of the first views and then the second.
    """

    items: Tensor  # [n], items of the rows with a noised position
    layout: TokenLayout  # where those n tokens sit
    host_token: Tensor  # [m], which of the n are noised, on the host
    token: Tensor  # [m], the same on the device
    cell: Tensor  # [m], where those are in all rows: row * L + position
    n_rows: int  # number of all rows, B or 2B


class Views(NamedTuple):
    """Both views of a batch, and what is logged about them."""

    items: Tensor  # [2B, L], first views, then second
    monitor: dict[str, Tensor]


class CaDiRec(EncoderRecommender):
    """SASRec encoder, context-conditioned denoiser and contrastive views, trained together.

    Args:
        config (Config): resolved configuration, explained in properties/model/CaDiRec.yaml.
        dataset (Dataset): the training dataset.
    """

    data_parallel = True

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.cl_weight: float = config["cl_weight"]
        self.diff_weight: float = config["diff_weight"]
        self.diff_nll_weight: float = config["diff_nll_weight"]
        self.diff_mse_weight: float = config["diff_mse_weight"]
        self.nll_reduction: str = config["nll_reduction"]
        self.aug_ratio: float = config["aug_ratio"]
        # Paper: a subset for each view. Code: one mask for both views and the loss, empty for 62 %
        # of Beauty's users at ratio 0.1. Here: a mask a view, one position at least; a switch.
        self.aug_mask: str = config["aug_mask"]
        self.n_masks = 1 if self.aug_mask == "shared" else 2
        self.x0_noise: bool = config["x0_noise"]
        self.x0_noise_context: bool = config["x0_noise_context"]
        self.reverse_steps: int = config["reverse_steps"]
        self.noised_per_batch = self.expected_per_batch(config, dataset, self._expected_noised)
        self.cand_topk: int = config["cand_topk"]
        self.cl_similarity: str = config["cl_similarity"]
        self.tau: float = config["tau"]
        self.cl_detach_items: bool = config["cl_detach_items"]
        if self.cand_topk > self.n_items - 1:
            raise UserError(
                f"cand_topk={self.cand_topk} must not exceed the number of items, "
                f"{self.n_items - 1}",
                keys=("cand_topk",),
            )

        n_steps = config["diffusion_steps"]
        betas = schedules.sqrt_betas(n_steps)
        self.process = ForwardProcess(*schedules.variance_preserving(betas))
        # Code: the input dropout is the encoder's own module. Here: the denoiser's.
        self.denoiser = DenoiserInput(
            self.hidden_size,
            self.max_seq_length,
            n_steps,
            config["denoiser_dropout"],
            1e-5,
            "sinusoidal",
            absolute_positions=config["denoiser_pos"] == "absolute",
        )
        self.denoiser_encoder = self._denoiser_encoder(config)
        # Paper, Code: one item table for both models. Here: a switch.
        self.denoiser_items = (
            nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
            if config["denoiser_items"] == "separate"
            else None
        )
        for module in (self.denoiser, self.denoiser_encoder, self.denoiser_items):
            if module is not None:
                module.apply(self.init_weights)
        self._monitored: dict[str, Tensor] = {}

    def _expected_noised(self, length: Tensor) -> Tensor:
        """Positions of the diffusion loss in rows of these lengths, [n] -> [n]."""
        chosen = self.aug_ratio * length
        if self.aug_mask == "independent_min1":
            chosen = chosen + (1 - self.aug_ratio) ** length
        return chosen * (self.n_masks if self.reverse_steps == 0 else 1)

    def _denoiser_encoder(self, config: Any) -> nn.Module:
        sizes = {
            "n_layers": config["denoiser_layers"],
            "n_heads": config["denoiser_heads"],
            "hidden_size": self.hidden_size,
            "inner_size": config["denoiser_inner"],
            "hidden_dropout_prob": config["denoiser_dropout"],
            "attn_dropout_prob": config["denoiser_dropout"],
            "hidden_act": config["hidden_act"],
            "layer_norm_eps": self.layer_norm_eps,
        }
        # Code: DeBERTa, whose position terms depend on the content, too. Here: absolute positions,
        # or a bias for each head and distance.
        if config["denoiser_pos"] == "relative":
            return RelativeTransformer(self.max_seq_length, **sizes)
        return PackedTransformer(**sizes)

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before any data is read.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        EncoderRecommender.check_config(config)
        require_choice(config, OPTIONS)
        require(config, RANGES)
        require_at_most(config, "reverse_steps", "diffusion_steps")
        require_multiple(config, "hidden_size", "denoiser_heads")
        if config["x0_noise_context"] and not config["x0_noise"]:
            raise UserError(
                "x0_noise_context=True has no effect with x0_noise=False",
                keys=("x0_noise_context", "x0_noise"),
            )

    # ------------------------------------------------------------------ total loss

    def calculate_loss(self, interaction: Interaction) -> CaDiRecLoss:
        """The three weighted terms of the total loss; a term of weight 0 is not computed."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        hidden = self.encode(item_seq, layout, last_only=self.last_target_only)
        rec = self.recommendation_loss(hidden, layout, interaction)

        contrastive = diffusion = rec.new_zeros(())
        self._monitored = {}
        # Code: the views are made from the prediction that is being trained, at its positions.
        one_shot = self.reverse_steps == 0
        if self.diff_weight > 0 or (self.cl_weight > 0 and one_shot):
            noised = self.choose_positions(item_seq, layout, self.n_masks if one_shot else 1)
            with torch.set_grad_enabled(self.diff_weight > 0):
                x_0 = self.clean(noised)
                x_hat = self.estimate(x_0, noised)
            if self.diff_weight > 0:
                diffusion = self.diff_weight * self.diffusion_loss(x_hat, x_0, noised)
        if self.cl_weight > 0:
            if not one_shot:
                noised = self.choose_positions(item_seq, layout, self.n_masks)
                x_hat = self.generate(noised)
            views = self.make_views(item_seq, x_hat.detach(), noised)
            contrastive = self.cl_weight * self.contrastive_loss(views.items, layout.host_lengths)
            self._monitored = views.monitor
        return CaDiRecLoss(rec, contrastive, diffusion)

    def monitored(self) -> dict[str, Tensor]:
        """What the last views are like; empty without a contrast."""
        return self._monitored

    @torch.no_grad()
    def augmented_views(self, interaction: Interaction) -> dict[str, Tensor]:
        """The views of a batch by name, [B, L] each, for analysis."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        noised = self.choose_positions(item_seq, layout, self.n_masks)
        one_shot = self.reverse_steps == 0
        x_hat = self.estimate(self.clean(noised), noised) if one_shot else self.generate(noised)
        first, second = self.make_views(item_seq, x_hat, noised).items.chunk(2)
        return {"first view": first, "second view": second}

    # ------------------------------------------------------------------ positions and noise

    def choose_positions(self, item_seq: Tensor, layout: TokenLayout, n_masks: int) -> Noised:
        """Draw the positions to be noised, each with probability aug_ratio.

        How many there are depends on what is drawn, so that is drawn on the host.

        Args:
            item_seq (LongTensor): items, [B, L].
            layout (TokenLayout): layout of ``item_seq``.
            n_masks (int): independent draws for each row.

        Returns:
            Noised: the positions.
        """
        score = torch.rand(n_masks, len(layout.host_row))
        chosen = score < self.aug_ratio
        if self.aug_mask == "independent_min1":
            minimum = score.new_full((n_masks, layout.batch), torch.inf)
            minimum = minimum.scatter_reduce(1, layout.host_row.expand_as(score), score, "amin")
            chosen |= score == minimum[:, layout.host_row]
        number = torch.arange(n_masks).unsqueeze(1)
        row = layout.host_row + number * layout.batch  # [n_masks, tokens]
        n_rows = n_masks * layout.batch
        has_any = torch.zeros(n_rows, dtype=torch.bool)
        has_any[row[chosen]] = True
        kept = has_any[row]
        device = item_seq.device
        of_kept = to_device(layout.host_index.expand_as(row)[kept], device)
        host_token = chosen[kept].nonzero().squeeze(1)
        return Noised(
            items=item_seq.flatten()[of_kept],
            layout=TokenLayout(
                layout.host_lengths.repeat(n_masks)[has_any], layout.length, device=device
            ),
            host_token=host_token,
            token=to_device(host_token, device),
            cell=to_device((layout.host_index + number * item_seq.numel())[chosen], device),
            n_rows=n_rows,
        )

    @property
    def diffusion_table(self) -> Tensor:
        """The table that the diffusion model embeds and rounds with, [N, H]."""
        return (self.denoiser_items or self.item_embedding).weight

    def clean(self, noised: Noised) -> Tensor:
        """x_0 = E[s] + noise_1 eps, without the noise in the context, [n, H]."""
        x_0 = self.diffusion_table[noised.items]
        if not self.x0_noise:
            return x_0
        scale = self.process.noise[1].to(x_0.dtype)
        # Code: noise in the context, too. Here: a switch.
        if self.x0_noise_context:
            return x_0 + scale * torch.randn_like(x_0)
        eps = torch.randn(len(noised.token), self.hidden_size, device=x_0.device)
        return x_0.index_add(0, noised.token, scale * eps)

    # ------------------------------------------------------------------ diffusion loss

    def denoise(self, x_0: Tensor, x_t: Tensor, t: Tensor, noised: Noised) -> Tensor:
        """f(x_t, t) given the context, an estimate of x_0 at the noised positions.

        Args:
            x_0 (Tensor): clean embeddings, read at the other positions only, [n, H].
            x_t (Tensor): noised embeddings, [m, H].
            t (LongTensor): step of each row, in 1..T, [rows]; or one for all, [1].
            noised (Noised): the positions.

        Returns:
            Tensor: [m, H].
        """
        x = x_0.index_copy(0, noised.token, x_t.to(x_0.dtype))
        # Code counts steps from 0, and its network sees that count.
        out: Tensor = self.denoiser(x, t - 1, noised.layout, self.denoiser_encoder, noised.token)
        return out

    def estimate(self, x_0: Tensor, noised: Noised) -> Tensor:
        """Noise the chosen positions, one step t a row, and estimate them, [n, H] -> [m, H]."""
        layout, token = noised.layout, noised.token
        t = torch.randint(1, self.process.n_steps + 1, (layout.batch,), device=x_0.device)
        eps = torch.randn(len(token), self.hidden_size, device=x_0.device)
        x_t = self.process.q_sample(x_0[token], t[layout.row[token]], eps)
        return self.denoise(x_0, x_t, t, noised)

    def diffusion_loss(self, x_hat: Tensor, x_0: Tensor, noised: Noised) -> Tensor:
        """L_d = nll + mse at the noised positions; 0 if there are none.

        Args:
            x_hat (Tensor): estimates at the noised positions, [m, H].
            x_0 (Tensor): clean embeddings, [n, H].
            noised (Noised): the positions.

        Returns:
            Tensor: scalar.
        """
        loss = x_hat.new_zeros(())
        by_token, by_row = local_fraction(len(x_hat)), local_fraction(noised.n_rows)
        if len(x_hat) == 0:
            return loss
        # Code: means over the batch. Here: sums over what a batch is expected to have, so that each
        # position of an epoch weighs the same.
        expected = self.noised_per_batch if self.nll_reduction == "token" else None
        if self.diff_mse_weight > 0:
            error = (x_0[noised.token] - x_hat).float()
            total = error.pow(2).mean(1).sum()
            mean = total / expected if expected else by_token * total / len(x_hat)
            loss = loss + self.diff_mse_weight * mean
        if self.diff_nll_weight > 0:
            part = by_row if self.nll_reduction == "sequence" else 1.0
            loss = loss + self.diff_nll_weight * part * self.rounding_loss(x_hat, noised)
        return loss

    def rounding_loss(self, x_hat: Tensor, noised: Noised) -> Tensor:
        """-log softmax(x_hat . E)_s over items 1..V, averaged as ``nll_reduction`` says.

        Args:
            x_hat (Tensor): estimates at the noised positions, [m, H].
            noised (Noised): the positions.

        Returns:
            Tensor: scalar.
        """
        table = self.diffusion_table[1:]
        label = noised.items[noised.token] - 1
        if self.nll_reduction == "token":
            total = full_softmax_loss(x_hat, table, label, self.loss_memory_mb)
            return total / (self.noised_per_batch or len(label))
        # Code: a mean over all rows of the mean of each row.
        row = noised.layout.host_row[noised.host_token]
        count = torch.bincount(row)[row]
        total = x_hat.new_zeros(())
        for number in count.unique():
            same = to_device((count == number).nonzero().squeeze(1), x_hat.device)
            part = full_softmax_loss(x_hat[same], table, label[same], self.loss_memory_mb)
            total = total + part / (number + 1e-5)
        return total / noised.n_rows

    # ------------------------------------------------------------------ views

    @torch.no_grad()
    def generate(self, noised: Noised) -> Tensor:
        """Restore the chosen positions from pure noise, the context held fixed, [m, H]."""
        x_0 = self.clean(noised)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return self.denoise(x_0, x_t, t[:1], noised)

        # Paper: number of steps not at hand. Code: no reverse process. Here: a strided DDIM.
        start = torch.full((), self.process.n_steps, device=x_0.device)
        times = samplers.trailing(start, self.reverse_steps)
        x_t = torch.randn(len(noised.token), self.hidden_size, device=x_0.device)
        with self._without_dropout():
            return samplers.ddim(denoise, x_t, self.process, times)

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Denoiser in eval mode; back in the model's own mode afterwards."""
        for module in (self.denoiser, self.denoiser_encoder):
            module.eval()
        try:
            yield
        finally:
            for module in (self.denoiser, self.denoiser_encoder):
                module.train(self.training)

    @torch.no_grad()
    def make_views(self, item_seq: Tensor, x_hat: Tensor, noised: Noised) -> Views:
        """Replace each noised position by an item drawn from its best candidates.

        Args:
            item_seq (LongTensor): items, [B, L].
            x_hat (Tensor): estimates at the noised positions, [m, H].
            noised (Noised): the positions.

        Returns:
            Views: both views, padding and other positions as in ``item_seq``.
        """
        original = noised.items[noised.token]
        candidates, rank = self.candidates(x_hat, original)  # [m, K], [m]
        # With a shared mask both views draw for each position, independently.
        n_draws = 2 * len(item_seq) // noised.n_rows
        draw = torch.randint(self.cand_topk, (len(original), n_draws), device=item_seq.device)
        new = candidates.gather(1, draw).t()  # [n_draws, m]
        offset = torch.arange(n_draws, device=item_seq.device).unsqueeze(1) * item_seq.numel()
        flat = item_seq.repeat(2, 1).flatten()
        flat[(noised.cell + offset).flatten()] = new.flatten()
        views = flat.view(2 * len(item_seq), -1)
        changed = views != item_seq.repeat(2, 1)
        return Views(
            views,
            {
                "changed": changed.sum() / (2 * (item_seq > 0).sum()),
                "untouched_views": 1 - changed.any(1).float().mean(),
                "restored": (rank == 0).sum() / max(len(rank), 1),
                "in_candidates": (rank < self.cand_topk).sum() / max(len(rank), 1),
                "item_norm": self.diffusion_table[1:].norm(dim=1).mean(),
            },
        )

    def candidates(self, x_hat: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
        """The cand_topk items of 1..V with the largest x_hat . E_j, and the original item's rank.

        Args:
            x_hat (Tensor): estimates at the noised positions, [m, H].
            original (LongTensor): their items, [m].

        Returns:
            tuple: ids, best first, [m, cand_topk], and the number of items that x_hat ranks above
            the original one, [m].
        """
        # Code: padding and a mask id are candidates. Here: items only.
        best = original.new_empty(len(original), self.cand_topk)
        rank = torch.empty_like(original)
        table = self.diffusion_table[1:]
        with torch.autocast(x_hat.device.type, enabled=False):
            for part, logits in logit_blocks(x_hat, table, self.loss_memory_mb):
                item = original[part].unsqueeze(1) - 1
                rank[part] = (logits > logits.gather(1, item)).sum(1)
                best[part] = largest(logits, self.cand_topk)[1] + 1
        return best, rank

    # ------------------------------------------------------------------ contrast

    def contrastive_loss(self, views: Tensor, item_seq_len: Tensor) -> Tensor:
        """NT-Xent of the two views' states; the sequence itself is no anchor.

        Args:
            views (LongTensor): first views, then second, [2B, L].
            item_seq_len (LongTensor): lengths of the sequences, on the host, [B].

        Returns:
            Tensor: scalar, mean over the 2B views.
        """
        # Code: the views are embedded with a copy of the item table, which gets no gradient.
        table = self.item_embedding.weight
        weights = {"item_embedding.weight": table.detach() if self.cl_detach_items else table}
        state = functional_call(self, weights, (views, item_seq_len.repeat(2)))
        first, second = state.chunk(2)
        return nt_xent(first, second, self.tau, self.cl_similarity)


class DiffCLRec(CaDiRec):
    """CaDiRec with the settings of its first release (arXiv 2405.09369v1); the same method."""
