"""DreamRec: the embedding of the next item is generated, and real items are ranked against it.

Paper: "Generate What You Prefer", NeurIPS 2023, arXiv 2310.20453. Its released code carries no
licence; it was read and run for comparison, and nothing of it is here.

    symbol     here                  shape     meaning
    s          item_seq              [B, L]    history, right-padded with 0
    E          item_embedding        [N, H]    item table; row 0 is padding, items are 1..V = N - 1
    h          guide(...)            [n, W]    guidance: the encoder's state of a history
    h_0        null_guidance         [W]       learned guidance that stands for no history
    e, x_t     process.q_sample      [n, H]    embedding of the next item, clean and noised
    f(x, h, t) denoiser              [n, H]    estimate of e
    w          guidance              scalar    strength of the guidance
    x_0        generate(...)         [B, H]    the generated "oracle" item

n is the number of training targets of the batch: its rows, or all real positions
(``train_sampling``). W is the width of encoder and denoiser: H in the paper and by default; with
``width`` it is a number of its own, and item vectors are projected to it before they enter either.
With ``history_items: own`` the encoder reads histories in trained vectors of width W instead.
The paper's steps 0..T - 1 are 1..T here; 0 is the clean end.

The method. A Transformer block turns the history into the guidance h. In training (Algorithm 1) the
next item's embedding is noised to a random step t, and f must restore it given h; with probability
p_uncond, h_0 stands in for h. There is no softmax and no negative item. To recommend (Algorithm 2),
x_T ~ N(0, I) is denoised for T steps with the guided estimate (1 + w) f(x, h, t) - w f(x, h_0, t),
and items are ranked by their distance to the result. Every published command uses an f that
is affine in x and h (``denoiser: linear``). The chain is then linear and Gaussian, x_0 given h is
N(K h~ + k, S) with h~ = (1 + w) h - w h_0, and is drawn from that distribution without a chain.

Differences, tagged where they are made: Paper / Code / Here.
    * evaluation: Code keeps dropout on and draws from the training's generator. Here: eval mode,
      and Gaussian numbers that belong to the user and ``sampling_seed``.
    * ranking: Code ranks by inner product. Here: `score: l2`, the paper's "closest".
    * masks: Code tests whether vectors sum to 0, which also wipes out some real positions. Here:
      boolean.
    * rows with an empty history, and a score for the padding row: Code has both. Here: neither.
    * denoiser, init and schedule constants are the released ones; ``linear`` betas are not rescaled
      with T, so that short chains start from noise that training never saw; a warning says so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.diffusion import samplers, schedules
from recbole_simdiff.diffusion.affine import ChainDistribution, affine_chain
from recbole_simdiff.diffusion.denoisers import timestep_embedding
from recbole_simdiff.diffusion.process import ForwardProcess
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.base import SequentialModel
from recbole_simdiff.modules.batch import PSEUDO_LENGTH
from recbole_simdiff.modules.host import to_device
from recbole_simdiff.modules.losses import full_softmax_loss
from recbole_simdiff.modules.rules import (
    at_least,
    count_or_none,
    folder_or_none,
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
    TokenLayout,
    layout_of,
    on_host,
)

SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "exp": lambda n_steps: schedules.exponential_betas(n_steps, 0.1, 10.0),
    "linear": lambda n_steps: schedules.linear_betas(n_steps, 1e-4, 0.02),
    "cosine": lambda n_steps: schedules.cosine_betas(n_steps, 1e-4, 0.9999),
    "sqrt": schedules.sqrt_betas,
}
OPTIONS = {
    "encoder": ("official_block", "recbole"),
    "history_items": ("shared", "own"),
    "ce_steps": ("all", "last"),
    "beta_schedule": tuple(SCHEDULES),
    "denoiser": ("linear", "mlp2"),
    "sampler": ("auto", "closed_form", "ddpm", "ddim"),
    "score": ("ip", "cos", "l2"),
}

RANGES = {
    "hidden_size": at_least(1),
    "width": count_or_none,
    "item_table": folder_or_none,
    "n_layers": at_least(1),
    "n_heads": at_least(1),
    "inner_size": at_least(1),
    "diffusion_steps": at_least(1),
    "sample_steps": at_least(1),
    "n_samples": at_least(1),
    "sampling_seed": at_least(0),
    "sampling_seeds": at_least(1),
    "guidance": at_least(0),
    "ce_weight": at_least(0),
    "initializer_range": positive,
    "loss_memory_mb": positive,
    "hidden_dropout_prob": ratio_below_1,
    "attn_dropout_prob": ratio_below_1,
    "p_uncond": ratio,
}


class DreamRecLoss(NamedTuple):
    """Algorithm 1's squared error and, with ``ce_weight``, a cross-entropy; already weighted."""

    diffusion: Tensor
    rec: Tensor


class GuidanceBlock(nn.Module):
    """The released encoder: one Transformer block, similar to that of the original SASRec.

    Queries are normalised, keys and values are not, the residual is the normalised query, and the
    scale is sqrt(H) for any number of heads.

    Args:
        hidden_size (int): H.
        n_heads (int): attention heads.
        hidden_dropout_prob (float): dropout after the feed-forward layer.
        attn_dropout_prob (float): dropout of the attention weights.
        layer_norm_eps (float): epsilon of the four normalisations.
    """

    def __init__(
        self,
        hidden_size: int,
        n_heads: int,
        hidden_dropout_prob: float,
        attn_dropout_prob: float,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.n_heads, self.attn_dropout_prob = n_heads, attn_dropout_prob
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.inner, self.outer = (nn.Linear(hidden_size, hidden_size) for _ in range(2))
        self.norm_query, self.norm_attention, self.norm_forward, self.norm_out = (
            nn.LayerNorm(hidden_size, eps=layer_norm_eps) for _ in range(4)
        )
        self.dropout = nn.Dropout(hidden_dropout_prob)

    def forward(
        self, hidden: Tensor, layout: TokenLayout, causal: bool = True, last_only: bool = False
    ) -> Tensor:
        """States of all tokens, or of each row's newest token only.

        Args:
            hidden (Tensor): embedded tokens, [n, H].
            layout (TokenLayout): where the n tokens sit.
            causal (bool): must be True; ``PackedTransformer`` has the same parameters.
            last_only (bool): only the newest token of each row.

        Returns:
            Tensor: [n, H], or [B, H] with ``last_only``.
        """
        assert causal
        normed = self.norm_query(hidden[layout.last] if last_only else hidden)
        # Code: a query or key whose entries sum to exactly 0 is masked, which a normalised real one
        # may do. Here: padding is masked, by the layout.
        query = normed.unsqueeze(1) if last_only else layout.unpack(normed)
        query = self._heads(self.query(query))
        key, value = (
            self._heads(layout.unpack(linear(hidden))) for linear in (self.key, self.value)
        )
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=layout.keys[:, None, None, :] if last_only else None,
            dropout_p=self.attn_dropout_prob if self.training else 0.0,
            is_causal=not last_only,
            scale=hidden.shape[1] ** -0.5,
        )
        context = context.transpose(1, 2).flatten(2)  # [B, L, H] or [B, 1, H]
        context = context.squeeze(1) if last_only else layout.pack(context)
        hidden = self.norm_attention(context + normed)
        forward = self.dropout(self.outer(F.relu(self.inner(hidden))))
        out: Tensor = self.norm_out(self.norm_forward(forward + hidden))
        return out

    def _heads(self, padded: Tensor) -> Tensor:
        """[B, L, H] -> [B, heads, L, H / heads]."""
        return padded.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


class Denoiser(nn.Module):
    """f(x, h, t) = layers([x, h, q(t)]), one affine map or two layers with GELU between them.

    Args:
        hidden_size (int): H, of item vectors.
        linear (bool): one affine map (``linear``) instead of two layers (``mlp2``).
        width (int | None): W, of guidance, time features and hidden layers; x is projected to it.
            By default H, without a projection.
    """

    def __init__(self, hidden_size: int, linear: bool, width: int | None = None) -> None:
        super().__init__()
        self.project = input_projection(hidden_size, width)
        self.width = width = width or hidden_size
        self.time_mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )
        self.layers: nn.Module = (
            nn.Linear(3 * width, hidden_size)
            if linear
            else nn.Sequential(
                nn.Linear(3 * width, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, hidden_size),
            )
        )

    def time(self, t: Tensor) -> Tensor:
        """q(t), features of the steps 1..T, [n] -> [n, W]."""
        wave = timestep_embedding(t - 1, self.width, endpoint=True)
        out: Tensor = self.time_mlp(wave.to(next(self.parameters()).dtype))
        return out

    def forward(self, x: Tensor, h: Tensor, time: Tensor) -> Tensor:
        """Estimate of the clean embedding [n, H] from x [n, H], guidance and time [n, W]."""
        out: Tensor = self.layers(torch.cat([self.project(x), h, time], -1))
        return out


def input_projection(hidden_size: int, width: int | None) -> nn.Module:
    """Item vectors to the network's width, [n, H] -> [n, W]; N(0, 1) vectors keep their variance.

    Args:
        hidden_size (int): H.
        width (int | None): W; None for H, without a projection.
    """
    if width is None:
        return nn.Identity()
    projection = nn.Linear(hidden_size, width, bias=False)
    nn.init.normal_(projection.weight, std=hidden_size**-0.5)
    return projection


class DreamRec(SequentialModel):
    """History encoder and denoiser of the next item's embedding, trained together.

    Args:
        config (Config): resolved configuration, explained in properties/model/DreamRec.yaml.
        dataset (Dataset): the training dataset; its number of items and, where it has one, its
            ``targets_per_batch`` are read.
    """

    input_type = InputType.POINTWISE
    data_parallel = True
    evaluation_keys = (
        "guidance",
        "sampler",
        "sample_steps",
        "sample_noise",
        "n_samples",
        "sampling_seed",
        "sampling_seeds",
        "score",
    )

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.hidden_size: int = config["hidden_size"]
        self.width: int = config["width"] or self.hidden_size
        self.p_uncond: float = config["p_uncond"]
        self.target_detach: bool = config["target_detach"]
        self.ce_weight: float = config["ce_weight"]
        self.ce_steps: str = config["ce_steps"]
        self.loss_memory_mb: float = config["loss_memory_mb"]
        self.guidance: float = config["guidance"]
        self.sampler: str = config["sampler"]
        self.sample_steps: int = config["sample_steps"]
        self.sample_noise: bool = config["sample_noise"]
        self.n_samples: int = config["n_samples"]
        self.sampling_seed: int = config["sampling_seed"]
        self.score: str = config["score"]
        self.last_target_only: bool = config["train_sampling"] == "prefix_last"
        self.targets_per_batch: float | None = getattr(dataset, "targets_per_batch", None)
        if self.sampler == "auto":
            self.sampler = "closed_form" if config["denoiser"] == "linear" else "ddpm"

        # Clean embeddings must have the scale of the noise: N(0, 1), PyTorch's default for tables.
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
        # The embeddings of another run are put in before training begins, see ``runs.item_table``.
        self.frozen: bool = config["freeze_items"] or config["item_table"] is not None
        self.item_embedding.weight.requires_grad_(not self.frozen)
        # An encoder of frozen vectors learns little of what follows which item; its own ones adapt.
        self.own_history_items: bool = config["history_items"] == "own"
        if self.own_history_items:
            self.history_embedding = nn.Embedding(self.n_items, self.width, padding_idx=0)
        else:
            self.item_projection = input_projection(self.hidden_size, config["width"])
        self.position_embedding = nn.Embedding(self.max_seq_length, self.width)
        for table in self.children():  # the embeddings
            if isinstance(table, nn.Embedding):
                table.weight.data.mul_(config["initializer_range"])
        self.null_guidance = nn.Parameter(torch.randn(self.width))
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.input_norm, self.encoder = self.build_encoder(config)
        self.denoiser = Denoiser(
            self.hidden_size, linear=config["denoiser"] == "linear", width=config["width"]
        )
        betas = SCHEDULES[config["beta_schedule"]](config["diffusion_steps"])
        self.process = ForwardProcess(*schedules.variance_preserving(betas))
        last_signal = self.process.signal[-1].item()
        if last_signal > 0.1:
            self.logger.warning(
                f"beta_schedule={config['beta_schedule']} with diffusion_steps="
                f"{config['diffusion_steps']} leaves {last_signal:.2f} of the signal at its last "
                "step, but sampling starts from pure noise"
            )
        self._chain: tuple[Tensor, ChainDistribution] | None = None
        self._monitored: dict[str, Tensor] = {}

    def build_encoder(self, config: Any) -> tuple[nn.Module, nn.Module]:
        """The normalisation of the encoder's input, and the encoder."""
        if config["encoder"] == "official_block":
            return nn.Identity(), GuidanceBlock(
                self.width,
                config["n_heads"],
                config["hidden_dropout_prob"],
                config["attn_dropout_prob"],
                config["layer_norm_eps"],
            )
        transformer = PackedTransformer(
            n_layers=config["n_layers"],
            n_heads=config["n_heads"],
            hidden_size=self.width,
            inner_size=config["inner_size"],
            hidden_dropout_prob=config["hidden_dropout_prob"],
            attn_dropout_prob=config["attn_dropout_prob"],
            hidden_act=config["hidden_act"],
            layer_norm_eps=config["layer_norm_eps"],
        )
        return nn.LayerNorm(self.width, eps=config["layer_norm_eps"]), transformer

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before any data is read.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        require_choice(config, OPTIONS)
        require(config, RANGES)
        require_multiple(config, "hidden_size" if config["width"] is None else "width", "n_heads")
        if config["encoder"] == "official_block" and config["n_layers"] != 1:
            raise UserError(
                f"n_layers={config['n_layers']} must be 1 with encoder=official_block, which is "
                "one block; encoder=recbole can have more",
                keys=("n_layers", "encoder"),
            )
        if config["guidance"] > 0 and config["p_uncond"] == 0:
            raise UserError(
                f"guidance={config['guidance']} must be 0 with p_uncond=0, which never trains the "
                "null guidance",
                keys=("guidance", "p_uncond"),
            )
        if config["sampler"] == "closed_form" and config["denoiser"] != "linear":
            raise UserError(
                f"sampler=closed_form must go with denoiser=linear; the chain of "
                f"denoiser={config['denoiser']} has no closed form",
                keys=("sampler", "denoiser"),
            )
        if config["sampler"] == "ddim":
            require_at_most(config, "sample_steps", "diffusion_steps")

    # ------------------------------------------------------------------ training, Algorithm 1

    def calculate_loss(self, interaction: Interaction) -> DreamRecLoss:
        """|f(x_t, h, t) - e|^2 for one step t a target, over the expected targets of a batch."""
        h, host_target = self.guided_targets(interaction)
        target = to_device(host_target, h.device)
        e = self.item_embedding(target)
        # Code: the target is trained, too, so equal or vanishing embeddings have no loss at all.
        # Here: the same, with two switches; the monitors show whether the table collapses.
        # With target_detach the gradient of the histories still moves the same rows.
        e = e.detach() if self.target_detach else e
        t = torch.randint(1, self.process.n_steps + 1, target.shape, device=e.device)
        x_t = self.process.q_sample(e, t, torch.randn_like(e))
        h = self.replace_by_null(h)
        estimate = self.denoiser(x_t, h, self.denoiser.time(t))
        expected = self.targets_per_batch or len(target)
        diffusion = (estimate - e).float().pow(2).mean(-1).sum() / expected
        rec = diffusion.new_zeros(())
        if self.ce_weight > 0:
            if self.ce_steps == "last":  # where x_t does not tell the target
                last = torch.full_like(t, self.process.n_steps)
                estimate = self.denoiser(torch.randn_like(e), h, self.denoiser.time(last))
            table = self.item_embedding.weight[1:]
            rec = full_softmax_loss(estimate, table, target - 1, self.loss_memory_mb)
            rec = self.ce_weight * rec / expected
        self._monitored = {} if self.frozen else self.collapse(host_target)
        return DreamRecLoss(diffusion, rec)

    def guided_targets(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        """Guidance [n, W] and, on the host, next item [n] of each row or of each real position.

        Positions whose next item is a pseudo-item, or the first real one after those, are no
        targets.
        """
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        h = self.guide(interaction[self.ITEM_SEQ], layout, last_only=self.last_target_only)
        pos_items = on_host(interaction, self.POS_ITEM_ID)
        if self.last_target_only:
            return h, pos_items
        target = layout.host_pack(on_host(interaction, self.ITEM_SEQ)).roll(-1)
        target[layout.host_last] = pos_items
        if PSEUDO_LENGTH in interaction:
            real = layout.host_tokens_from(on_host(interaction, PSEUDO_LENGTH))
            h, target = h[to_device(real, h.device)], target[real]
        return h, target

    def guide(self, item_seq: Tensor, layout: TokenLayout, last_only: bool) -> Tensor:
        """Guidance h of every prefix [n, W], or of the whole history only [B, W]."""
        hidden = self.history_vectors(layout.pack(item_seq))
        hidden = hidden + self.position_embedding(layout.position)
        hidden = self.dropout(self.input_norm(hidden))
        h: Tensor = self.encoder(hidden, layout, causal=True, last_only=last_only)
        return h

    def history_vectors(self, items: Tensor) -> Tensor:
        """What the encoder sees of the items of a history, [n] -> [n, W]."""
        if self.own_history_items:
            out: Tensor = self.history_embedding(items)
            return out
        out = self.item_projection(self.item_embedding(items))
        return out

    def replace_by_null(self, h: Tensor) -> Tensor:
        """h_0 instead of h, for whole rows, with probability p_uncond, [n, W]."""
        if self.p_uncond == 0:
            return h
        null = torch.rand(len(h), 1, device=h.device) < self.p_uncond
        return torch.where(null, self.null_guidance, h)

    @torch.no_grad()
    def collapse(self, target: Tensor) -> dict[str, Tensor]:
        """Measures of collapse of the embeddings of the batch's distinct targets.

        Args:
            target (LongTensor): targets, on the host, since it counts the distinct ones, [n].

        Returns:
            dict: mean norm; mean cosine of two items; and effective rank (participation ratio
            tr(G)^2 / tr(G^2) of G = sum of u u^T over unit vectors u), between 1 and H.
        """
        distinct = to_device(target.unique(), self.item_embedding.weight.device)
        e = self.item_embedding(distinct).float()
        unit = F.normalize(e, dim=-1)
        n = len(unit)
        pairs = unit.sum(0).pow(2).sum() - n  # sum of the cosines of all ordered pairs
        return {
            "item_norm": e.norm(dim=-1).mean(),
            "item_cosine": pairs / max(n * (n - 1), 1),
            "item_rank": n**2 / (unit.t() @ unit).pow(2).sum(),
        }

    def monitored(self) -> dict[str, Tensor]:
        """The measures of ``collapse`` on the last batch; none for a frozen table."""
        return self._monitored

    # ------------------------------------------------------------------ generation, Algorithm 2

    def reseed_sampling(self, seed: int) -> bool:
        """Set the seed; scores depend on it unless ``sample_noise`` is off."""
        self.sampling_seed = seed
        return self.sample_noise

    @torch.no_grad()
    def generate(self, interaction: Interaction) -> Tensor:
        """Mean of ``n_samples`` generated embeddings x_0 of each row, [B, H]."""
        item_seq = interaction[self.ITEM_SEQ]
        layout = layout_of(interaction, self.ITEM_SEQ, self.ITEM_SEQ_LEN)
        h = self.guide(item_seq, layout, last_only=True)
        has_users = self.USER_ID in interaction
        draw = self.gaussian(interaction[self.USER_ID] if has_users else None)
        return torch.stack([self.sample(h, draw) for _ in range(self.n_samples)]).mean(0)

    def gaussian(self, users: Tensor | None) -> Callable[[Tensor], Tensor]:
        """A replacement for ``torch.randn_like``, one stream of numbers a user.

        A stream depends on ``sampling_seed`` and the user only, and not on batches and their order.
        Without users (a history alone), or without ``sample_noise``, all numbers are 0, their mean.

        Args:
            users (LongTensor | None): user of each row, [B].

        Returns:
            Callable: tensor of B rows -> numbers of its shape; the next ones at each call.
        """
        if users is None or not self.sample_noise:
            return torch.zeros_like
        streams = [
            np.random.Generator(np.random.Philox(key=[self.sampling_seed, user]))
            for user in users.tolist()
        ]

        def draw(like: Tensor) -> Tensor:
            rows = [s.standard_normal(like.shape[1:], dtype=np.float32) for s in streams]
            return torch.from_numpy(np.stack(rows)).to(like)

        return draw

    def sample(self, h: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """One x_0 for each guidance, by the configured sampler, [B, W] -> [B, H]."""
        if self.sampler == "closed_form":
            return self.sample_closed_form(h, draw)
        n_steps = self.process.n_steps
        x_start = draw(self.empty_items(h))
        time = self.denoiser.time(torch.arange(1, n_steps + 1, device=h.device))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.guided_estimate(x, h, time[t - 1])

        if self.sampler == "ddim":
            times = samplers.trailing(torch.tensor(n_steps), self.sample_steps)
            return samplers.ddim(denoise, x_start, self.process, times)
        times = torch.arange(n_steps, -1, -1)
        return samplers.ancestral(denoise, x_start, self.process, times, draw)

    def guided_estimate(self, x: Tensor, h: Tensor, time: Tensor) -> Tensor:
        """(1 + w) f(x, h, t) - w f(x, h_0, t); without guidance, f(x, h, t) alone, [n, H]."""
        conditional: Tensor = self.denoiser(x, h, time)
        if self.guidance == 0:
            return conditional
        null = self.denoiser(x, self.null_guidance.expand_as(h), time)
        return samplers.classifier_free(conditional, null, self.guidance)

    # ------------------------------------------------------------------ closed form of the chain

    def sample_closed_form(self, h: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """x_0 as the chain distributes it, from one Gaussian vector a row, [B, W] -> [B, H]."""
        chain = self.chain_distribution()
        if self.guidance > 0:
            h = samplers.classifier_free(h, self.null_guidance, self.guidance)
        noise = draw(self.empty_items(h)) @ chain.root.to(h)
        return noise + h @ chain.gain.t().to(h) + chain.offset.to(h)

    def chain_distribution(self) -> ChainDistribution:
        """Distribution of the T-step chain; computed again only after the denoiser has changed."""
        weights = torch.cat([p.detach().flatten() for p in self.denoiser.parameters()])
        if self._chain is None or not torch.equal(self._chain[0], weights):
            self._chain = weights, self._compose_steps()
        return self._chain[1]

    def empty_items(self, h: Tensor) -> Tensor:
        """An uninitialised item vector for each guidance, [B, W] -> [B, H]."""
        return h.new_empty(len(h), self.hidden_size)

    @torch.no_grad()
    def _compose_steps(self) -> ChainDistribution:
        """Compose all steps x <- c_0 (A x + B h~ + g(t)) + c_t x + sigma z of the chain."""
        layer: Any = self.denoiser.layers
        a, b, c = layer.weight.double().split(self.width, dim=1)
        steps = torch.arange(1, self.process.n_steps + 1, device=a.device)
        g = self.denoiser.time(steps).double() @ c.t() + layer.bias.double()  # [T, H]
        project = None
        if isinstance(self.denoiser.project, nn.Linear):
            project = self.denoiser.project.weight.double()
        return affine_chain(self.process, a, project, b, g)

    # ------------------------------------------------------------------ ranking

    def predict(self, interaction: Interaction) -> Tensor:
        """Score of each row's target item, [B]."""
        query, table, offset = self.ranking(self.generate(interaction))
        item = interaction[self.ITEM_ID]
        return (query * table[item]).sum(-1) + offset[item]

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items, [B, n_items]."""
        query, table, offset = self.ranking(self.generate(interaction))
        return torch.addmm(offset, query, table.t())

    def ranking(self, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H], table [N, H] and offset [N]: a score is query . table[i] + offset[i].

        Paper: the items closest to x_0. Code: the largest inner product. Here: ``score``.
        """
        table = self.item_embedding.weight
        offset = torch.zeros_like(table[:, 0])
        if self.score == "cos":
            return F.normalize(x_0, dim=-1), F.normalize(table, dim=-1), offset
        if self.score == "l2":  # -|x - e|^2 / 2, without |x|^2, which all items share
            offset = -0.5 * table.pow(2).sum(-1)
        return x_0, table, offset
