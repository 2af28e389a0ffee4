"""ECL-SR: equivariant contrastive learning for sequential recommendation.

Paper: Zhou et al., RecSys 2023, arXiv 2211.05290. Only its abstract was at hand: the steps follow
it and the released code, and equations have no numbers. Released code consulted: Tokkiu/ECL.

    symbol     here                shape     meaning
    x          item_seq            [B, L]    history, right-padded with 0
    E          item_embedding      [N+1, H]  item table; row 0 is padding, row N the mask token
    H, h       encode(...)         [n, H]    causal states of all tokens; of the newest one of a row
    G          generate            [m, H]    bidirectional states of the generator at masked tokens
    x'         replaced            [n]       items, with the generator's guesses at masked tokens
    r          replaced != items   [n]       what the discriminator has to tell
    D, u       discriminate, detector  [n, H]  discriminator states; read-out of r
    rho, k     mask_ratio, last_k  scalars   share of items masked; states in the mean of a row

n is the number of real tokens of the batch, m that of the masked ones.

The method. Mild changes must not alter what a sequence stands for: two passes of the encoder under
different dropout give two means over the last k states, and InfoNCE makes them agree. Invasive
changes must be noticed: a masked-item generator guesses some hidden items, and a discriminator that
knows the original sequence's representation tells for each position whether its item was replaced.
The guesses pass no gradient; the generator learns from its own masked-item loss. All share the item
table, and the discriminator is the encoder itself. The total is the next-item loss plus the three
weighted ones. At inference the model is SASRec.

Differences, tagged where they are made: Paper / Code / Here.
    * condition: the paper speaks of the sequence's representation; Code adds the state of each
      position, which has seen the item in question.
    * rows: every prefix with the target at its end, as Code does for one data set; for the others
      it has one row a user (`train_sampling: user_all` with `older_windows: 0`, or 11), and padding
      counts in the mean there: `pad_in_loss`.
    * stages: two are meant by Code and cannot run as released; default one.
    * generator loss: over all masked tokens, each of the same weight in every batch; guesses are
      never padding.
    * means over the last k states take real tokens only.
    * positions count from the oldest item; `align: left` from the newest, as left padding does.
The released behaviour is `preset: official`.
"""

from typing import Any, NamedTuple

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.host import to_device
from recbole_simdiff.modules.losses import full_softmax_loss, info_nce, logit_blocks
from recbole_simdiff.modules.plan import Phase
from recbole_simdiff.modules.rules import among, at_least, positive, ratio, require, require_choice
from recbole_simdiff.modules.transformer import (
    Batch,
    PackedTransformer,
    TokenLayout,
    layout_of,
    on_host,
)

OPTIONS = {
    "align": ("right", "left"),
    "masking": ("probability", "count"),
    "condition": ("sequence", "position", "concatenate"),
}

RANGES = {
    "tau": positive,
    "cl_weight": at_least(0),
    "disc_weight": at_least(0),
    "gen_weight": at_least(0),
    "last_k": at_least(1),
    "mask_ratio": ratio,
    "stages": among(1, 2),
}
# What the released loss over padding belongs to.
PAD_IN_LOSS = {
    "train_sampling": "user_all",
    "align": "left",
    "sr_loss": "CE",
    "mask_pad_in_softmax": False,
}
ALL_TERMS, WITHOUT_DISCRIMINATOR = "all_terms", "without_discriminator"  # names of the phases


class ECLSRLoss(NamedTuple):
    """L = L_rec + cl_weight L_con + disc_weight L_disc + gen_weight L_gen; weighted terms."""

    rec: Tensor
    contrastive: Tensor
    discriminator: Tensor
    generator: Tensor


class Tower(nn.Module):
    """A Transformer with positions and input normalisation of its own, named as the encoder's."""

    def __init__(self, model: EncoderRecommender, trm_encoder: PackedTransformer) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(model.max_seq_length, model.hidden_size)
        self.LayerNorm = nn.LayerNorm(model.hidden_size, eps=model.layer_norm_eps)
        self.dropout = nn.Dropout(model.dropout_prob)
        self.trm_encoder = trm_encoder
        self.apply(model.init_weights)


class ECLSR(EncoderRecommender):
    """SASRec encoder, masked-item generator and conditional discriminator, trained together.

    Args:
        config (Config): resolved configuration, explained in properties/model/ECLSR.yaml.
        dataset (Dataset): the training dataset.
    """

    n_extra_tokens = 1  # the mask token
    data_parallel = True

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.stages: int = config["stages"]
        self.cl_weight: float = config["cl_weight"]
        self.disc_weight: float = config["disc_weight"]
        self.gen_weight: float = config["gen_weight"]
        self.tau: float = config["tau"]
        self.last_k: int = config["last_k"]
        self.masking: str = config["masking"]
        self.mask_ratio: float = config["mask_ratio"]
        self.condition: str = config["condition"]
        self.disc_bidirectional: bool = config["disc_bidirectional"]
        self.align: str = config["align"]
        self.pad_in_loss: bool = config["pad_in_loss"]
        if self.pad_in_loss and self.targets_per_batch is not None:
            rows = min(config["train_batch_size"], len(dataset))
            self.targets_per_batch = rows * self.max_seq_length
        self.mask_token: int = self.n_items

        def tower() -> Tower:
            return Tower(
                self, self.build_transformer(config, config["n_layers"], config["n_heads"])
            )

        self.generator = tower()
        self.discriminator = None if config["share_discriminator"] else tower()
        self.detector = nn.Linear(self.hidden_size, 1, bias=False)
        self.combine = (
            nn.Linear(2 * self.hidden_size, self.hidden_size, bias=False)
            if self.condition == "concatenate"
            else None
        )
        for module in (self.detector, self.combine):
            if module is not None:
                module.apply(self.init_weights)
        # So that all masked tokens weigh the same; the cap is not counted.
        self.masked_per_batch = self.expected_per_batch(config, dataset, self._expected_masked)
        self.phase = ALL_TERMS
        self._monitored: dict[str, Tensor] = {}

    def _expected_masked(self, length: Tensor) -> Tensor:
        if self.masking == "count":
            return torch.minimum((self.mask_ratio * length + 1 + 1e-9).floor(), length - 1)
        return self.mask_ratio * length + (1 - self.mask_ratio) ** length

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before any data is read.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        EncoderRecommender.check_config(config)
        require_choice(config, OPTIONS)
        require(config, RANGES)
        wrong = [f"{k}={config[k]}" for k, needed in PAD_IN_LOSS.items() if config[k] != needed]
        if config["pad_in_loss"] and wrong:
            needs = ", ".join(f"{key}={value}" for key, value in PAD_IN_LOSS.items())
            raise UserError(
                f"pad_in_loss=True, the released loss of left-padded rows with a target at every "
                f"position, needs {needs}; got {', '.join(wrong)}",
                keys=("pad_in_loss", *PAD_IN_LOSS),
            )

    def training_plan(self) -> list[Phase]:
        """One phase or, with two stages, a second one that refines the best of the first."""
        first = Phase(ALL_TERMS, self.epochs)
        # Paper: not at hand. Code: two stages, but the switch between them fails. Here: an option.
        if self.stages == 1:
            return [first]
        return [first, Phase(WITHOUT_DISCRIMINATOR, self.epochs, refine=True)]

    def begin_epoch(self, phase: str, epoch: int) -> None:
        """The second phase has no terms of generator and discriminator."""
        self.phase = phase

    # ------------------------------------------------------------------ total loss

    def calculate_loss(self, interaction: Interaction) -> ECLSRLoss:
        """The four weighted terms; a term of weight 0 is not computed."""
        if self.pad_in_loss:
            interaction = self.padded(interaction)
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        n_passes = 2 if self.cl_weight > 0 else 1
        lengths, device = layout.host_lengths, item_seq.device
        passes = TokenLayout(
            lengths.repeat(n_passes), layout.length, self.pad_in_loss, device=device
        )
        hidden, *again = self.encode(item_seq.repeat(n_passes, 1), passes).chunk(n_passes)

        # Code: padding, too, is to predict what comes next. Here: real items only, with a switch.
        cells = layout
        if self.pad_in_loss:
            cells = TokenLayout(lengths, layout.length, with_padding=True, device=device)
        state = hidden[layout.last] if self.last_target_only else hidden
        rec = self.recommendation_loss(state, cells, interaction)
        if self.pad_in_loss:
            hidden, *again = (states[layout.index] for states in (hidden, *again))
        contrastive = discriminator = generator = rec.new_zeros(())
        self._monitored = {}
        if self.cl_weight > 0:
            contrastive = self.cl_weight * self.contrastive_loss(hidden, again[0], layout)
        if self.phase == ALL_TERMS and (self.disc_weight > 0 or self.gen_weight > 0):
            items = layout.pack(item_seq)
            discriminator, generator = self.replacement_losses(items, hidden, layout)
        return ECLSRLoss(rec, contrastive, discriminator, generator)

    def padded(self, interaction: Interaction) -> Interaction:
        """The batch with its items padded to the maximum length, [B, L]."""
        there = interaction.interaction
        host = {column: on_host(interaction, column) for column in there}
        missing = self.max_seq_length - there[self.ITEM_SEQ].shape[1]
        there, host = (
            {**columns, self.ITEM_SEQ: F.pad(columns[self.ITEM_SEQ], (0, missing))}
            for columns in (there, host)
        )
        return Batch(there, host)

    def replacement_losses(
        self, items: Tensor, hidden: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """The weighted losses of discriminator and generator, for freshly drawn masks.

        Args:
            items (LongTensor): items of all tokens, [n].
            hidden (Tensor): encoder states of all tokens, [n, H].
            layout (TokenLayout): where the n tokens sit.

        Returns:
            tuple: two scalars; a loss of weight 0 is not computed.
        """
        discriminator = generator = hidden.new_zeros(())
        masked = self.choose_positions(layout)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gen_weight > 0):
            states = self.generate(items, masked, layout)
        if self.gen_weight > 0:
            generator = self.gen_weight * self.generator_loss(states, items[masked])
        if self.disc_weight > 0:
            guesses = self.guesses(states)
            replaced = items.index_copy(0, masked, guesses)
            logit = self.discriminate(replaced, hidden, layout)
            discriminator = self.disc_weight * self.discriminator_loss(logit, replaced != items)
            self._monitored = {
                "guessed": (guesses == items[masked]).sum() / max(len(masked), 1),
                "noticed": ((logit > 0) == (replaced != items)).float().mean(),
            }
        return discriminator, generator

    def monitored(self) -> dict[str, Tensor]:
        """How often the last batch's guesses were right, and noticed where they were not."""
        return self._monitored

    @torch.no_grad()
    def augmented_views(self, interaction: Interaction) -> dict[str, Tensor]:
        """The generator's sequence of each row, [B, L], for analysis."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        items, masked = layout.pack(item_seq), self.choose_positions(layout)
        guesses = self.guesses(self.generate(items, masked, layout))
        return {"generated": layout.unpack(items.index_copy(0, masked, guesses))}

    # ------------------------------------------------------------------ Transformers

    def position(self, layout: TokenLayout) -> Tensor:
        """Row of the position table for each token, [n]."""
        if self.align == "right":
            return layout.position
        # Padding comes before the oldest item then.
        return (layout.position - layout.lengths[layout.row]) % self.max_seq_length

    def run(
        self, tower: Any, vectors: Tensor, layout: TokenLayout, causal: bool, **which: Any
    ) -> Tensor:
        """States of a Transformer over input vectors, to which it adds its positions.

        Args:
            tower (Tower | ECLSR): generator, discriminator, or the encoder, which is ``self``.
            vectors (Tensor): [n, H].
            layout (TokenLayout): where the n tokens sit.
            causal (bool): whether a token sees older ones only.
            which (Any): tokens to return, see ``PackedTransformer``.

        Returns:
            Tensor: [n, H], or those asked for.
        """
        hidden = vectors + tower.position_embedding(self.position(layout))
        hidden = tower.dropout(tower.LayerNorm(hidden))
        states: Tensor = tower.trm_encoder(hidden, layout, causal=causal, **which)
        return states

    def encode(self, item_seq: Tensor, layout: TokenLayout, last_only: bool = False) -> Tensor:
        """As the base class, with this model's positions: [n, H], or [B, H] with ``last_only``."""
        vectors = self.item_embedding(layout.pack(item_seq))
        return self.run(self, vectors, layout, causal=True, last_only=last_only)

    # ------------------------------------------------------------------ invariance

    def contrastive_loss(self, hidden: Tensor, again: Tensor, layout: TokenLayout) -> Tensor:
        """InfoNCE of the means of two dropout passes, from the first to the second.

        Args:
            hidden (Tensor): states of the first pass, [n, H].
            again (Tensor): states of the second pass, [n, H].
            layout (TokenLayout): where the n tokens sit.

        Returns:
            Tensor: scalar, mean over the batch.
        """
        return info_nce(self.recent_mean(hidden, layout), self.recent_mean(again, layout), self.tau)

    def recent_mean(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        """Mean of the newest min(last_k, length) states of each row, [n, H] -> [B, H]."""
        recent = layout.host_tokens_from(layout.host_lengths - self.last_k)
        recent = to_device(recent, hidden.device)
        total = hidden.new_zeros(layout.batch, self.hidden_size)
        total = total.index_add(0, layout.row[recent], hidden[recent])
        return total / layout.lengths.clamp(max=self.last_k).unsqueeze(1)

    # ------------------------------------------------------------------ generator

    def choose_positions(self, layout: TokenLayout) -> Tensor:
        """The tokens to mask, as packed indices in ascending order, [m].

        ``count``: min(floor(rho n + 1), n - 1) tokens of a row of length n, drawn among all but the
        oldest. ``probability``: each with probability rho, from the oldest on, until a row has at
        least rho L + 1; the newest one where that leaves none. They are drawn on the host, as their
        number depends on what is drawn.
        """
        here, n_tokens = TokenLayout(layout.host_lengths, layout.length), len(layout.host_row)
        if self.masking == "count":
            noise = torch.rand(n_tokens, dtype=torch.float64)
            noise = noise.masked_fill(here.position == 0, torch.inf)
            rank = here.unpack(noise, fill=torch.inf).argsort(1).argsort(1)
            count = (self.mask_ratio * here.lengths.double() + 1 + 1e-9).floor().long()
            count = torch.minimum(count, here.lengths - 1)
            chosen = rank < count.unsqueeze(1)
        else:
            drawn = here.unpack((torch.rand(n_tokens) < self.mask_ratio).long())
            maximum = -int(-(self.mask_ratio * self.max_seq_length + 1 - 1e-9) // 1)  # rounded up
            chosen = (drawn > 0) & (drawn.cumsum(1) <= maximum)
            rows = (~chosen.any(1)).nonzero().squeeze(1)
            chosen[rows, here.lengths[rows] - 1] = True
        return to_device(here.pack(chosen).nonzero().squeeze(1), layout.row.device)

    def generate(self, items: Tensor, masked: Tensor, layout: TokenLayout) -> Tensor:
        """States of the generator at the masked tokens.

        Args:
            items (LongTensor): items of all tokens, [n].
            masked (LongTensor): which of them are hidden, [m].
            layout (TokenLayout): where the n tokens sit.

        Returns:
            Tensor: [m, H].
        """
        vectors = self.item_embedding(items.index_fill(0, masked, self.mask_token))
        return self.run(self.generator, vectors, layout, causal=False, tokens=masked)

    def generator_loss(self, states: Tensor, original: Tensor) -> Tensor:
        """Cross-entropy of the masked items, over those expected in a batch: [m, H], [m]."""
        # Code: at most floor(rho L) tokens a row count. Here: all.
        table = self.item_table
        if self.mask_pad_in_softmax:
            table, original = table[1:], original - 1
        total = full_softmax_loss(states, table, original, self.loss_memory_mb)
        return total / (self.masked_per_batch or max(len(original), 1))

    @torch.no_grad()
    def guesses(self, states: Tensor) -> Tensor:
        """The likeliest item of each masked token, in 1..V, [m, H] -> [m]."""
        chosen = torch.empty(len(states), dtype=torch.long, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            # Code: padding may be chosen. Here: items only.
            blocks = logit_blocks(states.float(), self.item_table[1:], self.loss_memory_mb)
            for part, logits in blocks:
                chosen[part] = logits.argmax(1) + 1
        return chosen

    # ------------------------------------------------------------------ equivariance

    def discriminate(self, replaced: Tensor, hidden: Tensor, layout: TokenLayout) -> Tensor:
        """Logit of "this item was replaced" for each token, given the original sequence.

        Args:
            replaced (LongTensor): items with guesses among them, [n].
            hidden (Tensor): encoder states of the original sequences, with gradient, [n, H].
            layout (TokenLayout): where the n tokens sit.

        Returns:
            Tensor: [n].
        """
        items = self.item_embedding(replaced)
        # Paper: given the sequence's representation. Code, all scripts: given the state of each
        # position. Here: a switch.
        condition = hidden if self.condition == "position" else hidden[layout.last][layout.row]
        if self.combine is None:
            vectors = items + condition
        else:
            vectors = self.combine(torch.cat([condition, items], 1))
        tower = self.discriminator or self
        states = self.run(tower, vectors, layout, causal=not self.disc_bidirectional)
        logit: Tensor = self.detector(states).squeeze(1)
        return logit

    def discriminator_loss(self, logit: Tensor, is_replaced: Tensor) -> Tensor:
        """Binary cross-entropy over all tokens, over their expected number in a batch.

        Args:
            logit (Tensor): of each token, [n].
            is_replaced (BoolTensor): r, false where the generator guessed right, [n].

        Returns:
            Tensor: scalar.
        """
        loss = F.binary_cross_entropy_with_logits(
            logit.float(), is_replaced.float(), reduction="sum"
        )
        return loss / (self.tokens_per_batch or len(logit))
