"""DiffuASR: diffusion augmentation for sequential recommendation (the generator).

Paper: Liu et al., CIKM 2023, arXiv 2309.12858. Released code consulted: liuqidong07/DiffuASR.

    symbol     here                  shape      meaning
    S_aug      target                [B, M]     the first M items of a long training sequence
    S_raw      condition             [B, L]     the items that follow, right-padded with 0
    E          table / scale         [N, d]     item embeddings; row 0 is padding, items 1..N - 1
    x_0        table[target]         [B, M, d]  clean embeddings
    x_t        process.q_sample      [B, M, d]  x_t = signal_t x_0 + noise_t eps
    c          condition_vector      [B, d]     mean embedding of S_raw
    eps_theta  network (SU-Net)      [B, M, d]  predicted noise
    gamma      strength              scalar     strength of the guidance
    p_phi      guide                 [B]        a recommender trained on the raw training sequences

The method. A user's history is extended at its beginning by M pseudo-items that could have come
before the first recorded one. A diffusion model learns this from the users whose sequences are long
enough to be cut in two: it noises the embeddings of the first M items and predicts the noise from
what follows them. For any user, M embeddings are then sampled given the whole training sequence and
read as the nearest items. Guidance ties them to that sequence: classifier-free, by extrapolating
from a prediction without condition; or by a classifier, the recommender's gradient of the
probability that the first real item comes next.

Differences, tagged where they are made: Paper / Code / Here.
    * condition: the mean as in the paper; Code sums.
    * classifier guidance: sign and scale of the paper; Code repels, at the first step's scale.
    * classifier-free training drops conditions at random; Code fits the guided prediction.
    * embeddings: the recommender's, frozen, at unit scale; Code trains random ones by the noise
      loss, which is lowest when all items coincide.
    * as many channels as items, at least: Code's 8 for M = 10 confine the predicted noise to 512 of
      640 dimensions, and the samples keep the noise of the others, magnified.
    * conditions hold training items only; Code's hold validation and, for most users, test items.
The released behaviour, without that last point, is `preset: official`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.diffusion import samplers, schedules
from recbole_simdiff.diffusion.process import ForwardProcess
from recbole_simdiff.errors import UserError
from recbole_simdiff.log import logger
from recbole_simdiff.models.diffuasr.guide import KINDS, Guide
from recbole_simdiff.models.diffuasr.sunet import SUNet
from recbole_simdiff.modules.host import to_device
from recbole_simdiff.modules.losses import logit_blocks
from recbole_simdiff.modules.rules import (
    at_least,
    folder,
    folder_or_none,
    positive,
    ratio_below_1,
    require,
    require_at_most,
    require_choice,
    whole_numbers,
)

MIN_CONDITION = 3  # items that must follow a training target [Code]

ROWS = 256  # users denoised at once; more is slower, for activations leave the processor's cache


OPTIONS = {
    "augmenter": ("diffuasr", "random", "random_seq"),
    "pseudo_mix": ("both", "replace"),
    "diffuasr_embeddings": ("pretrained_frozen", "pretrained_trainable", "scratch_trainable"),
    "diffuasr_scale": ("unit_std", "none"),
    "diffuasr_condition": ("mean", "sum"),
    "diffuasr_guidance": ("none", "classifier", "classifier_free"),
    "diffuasr_cf_training": ("dropout", "combined"),
    "diffuasr_cg_log_prob": KINDS,
    "diffuasr_cg_label": ("item", "seq"),
    "diffuasr_cg_scale": ("per_step", "const_first"),
    "diffuasr_cg_sign": ("paper", "flipped"),
    "diffuasr_schedule": ("linear", "quad", "sigmoid", "cosine"),
    "diffuasr_windows": ("first", "all"),
    "diffuasr_monitor": ("heldout", "train_loss"),
}

RANGES = {
    "n_pseudo": at_least(1),
    "diffuasr_strength": at_least(0),
    "diffuasr_diffusion_steps": at_least(2),
    "diffuasr_sample_steps": at_least(1),
    "diffuasr_epochs": at_least(1),
    "diffuasr_patience": at_least(1),
    "diffuasr_batch_size": at_least(1),
    "sunet_base_channels": at_least(1),
    "sunet_res_blocks": at_least(1),
    "sunet_groups": at_least(1),
    "diffuasr_p_uncond": ratio_below_1,
    "diffuasr_ema_decay": ratio_below_1,
    "sunet_dropout": ratio_below_1,
    "diffuasr_learning_rate": positive,
    "augmentation_cache": folder,
    "baseline_checkpoint": folder_or_none,
}

# Of the generator alone: random items are drawn without it.
NETWORK_RANGES = {
    "sunet_attn_resolutions": whole_numbers(empty=True),
    "sunet_channel_mult": whole_numbers(1),
}

# Settings that shape the generator and what it generates.
GENERATION_KEYS: tuple[str, ...] = (
    "n_pseudo",
    "MAX_ITEM_LIST_LENGTH",
    "diffuasr_embeddings",
    "diffuasr_scale",
    "diffuasr_condition",
    "diffuasr_guidance",
    "diffuasr_strength",
    "diffuasr_p_uncond",
    "diffuasr_cf_training",
    "diffuasr_cg_log_prob",
    "diffuasr_cg_label",
    "diffuasr_cg_scale",
    "diffuasr_cg_sign",
    "diffuasr_guide_in_training",
    "diffuasr_diffusion_steps",
    "diffuasr_schedule",
    "diffuasr_sample_steps",
    "diffuasr_windows",
    "diffuasr_epochs",
    "diffuasr_patience",
    "diffuasr_batch_size",
    "diffuasr_learning_rate",
    "diffuasr_monitor",
    "diffuasr_ema_decay",
    "sunet_base_channels",
    "sunet_channel_mult",
    "sunet_res_blocks",
    "sunet_groups",
    "sunet_attn_resolutions",
    "sunet_dropout",
)

# Those among them that are read when items are generated and, without guidance in training, then
# only.
SAMPLING_KEYS: tuple[str, ...] = (
    "diffuasr_strength",
    "diffuasr_cg_log_prob",
    "diffuasr_cg_label",
    "diffuasr_cg_scale",
    "diffuasr_cg_sign",
    "diffuasr_sample_steps",
)


def check_config(config: Any) -> None:
    """Refuse impossible settings before any data is read.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    require_choice(config, OPTIONS)
    require(config, RANGES)
    if config["augmenter"] != "diffuasr":
        return
    require(config, NETWORK_RANGES)
    require_at_most(config, "diffuasr_sample_steps", "diffuasr_diffusion_steps")
    steps = config["diffuasr_diffusion_steps"]
    largest = float(noise_schedule(config["diffuasr_schedule"], steps).max())
    if not largest < 1:
        raise UserError(
            f"diffuasr_diffusion_steps={steps} is too few for diffuasr_schedule="
            f"{config['diffuasr_schedule']}: its largest beta, {largest:g}, must be below 1",
            keys=("diffuasr_diffusion_steps", "diffuasr_schedule"),
        )
    multipliers = config["sunet_channel_mult"]
    for multiplier in {1, *multipliers}:
        channels = config["sunet_base_channels"] * multiplier
        if channels % config["sunet_groups"]:
            raise UserError(
                f"sunet_groups={config['sunet_groups']} must divide the channels of every level: "
                f"sunet_base_channels={config['sunet_base_channels']} times {multiplier} is "
                f"{channels}",
                keys=("sunet_groups", "sunet_base_channels"),
            )
    check_width(item_width(config), len(multipliers))
    if config["diffuasr_guidance"] == "classifier":
        if config["diffuasr_embeddings"] == "scratch_trainable":
            raise UserError(
                "diffuasr_guidance=classifier needs embeddings that the recommender knows: "
                "diffuasr_embeddings must be pretrained_frozen or pretrained_trainable",
                keys=("diffuasr_guidance",),
            )
        if config["n_pseudo"] >= config["MAX_ITEM_LIST_LENGTH"]:
            raise UserError(
                f"n_pseudo={config['n_pseudo']} must be smaller than MAX_ITEM_LIST_LENGTH="
                f"{config['MAX_ITEM_LIST_LENGTH']}: with diffuasr_guidance=classifier the "
                "recommender reads the pseudo-items as one history",
                keys=("n_pseudo", "MAX_ITEM_LIST_LENGTH", "diffuasr_guidance"),
            )


def item_width(config: Any) -> int:
    """d: the width of the backbone's item table, by its settings."""
    width: int = config["embedding_size"] or config["hidden_size"]
    return width


def check_width(width: int, levels: int) -> None:
    """Refuse embeddings that are no pictures the SU-Net can halve ``levels - 1`` times.

    Raises:
        UserError: naming the nearest widths that are.
    """
    unit = 2 ** (levels - 1)
    side = math.isqrt(width)
    if side**2 == width and side % unit == 0 and side > 0:
        return
    below = side // unit * unit
    near = [str(s**2) for s in (below, below + unit) if s > 0]
    raise UserError(
        f"item embeddings of width {width} (hidden_size, or embedding_size) make no square picture "
        f"that can be halved {levels - 1} times (sunet_channel_mult has {levels} levels); the "
        f"nearest widths are {' and '.join(near)}"
    )


def noise_schedule(name: str, n_steps: int) -> Tensor:
    """beta_1..beta_T; end points are those of T = 1000, scaled to the same total noise, [T]."""
    scale = 1000 / n_steps
    if name == "cosine":
        return schedules.cosine_betas(n_steps, 1e-4, 0.9999)
    betas: dict[str, Callable[[int, float, float], Tensor]] = {
        "linear": schedules.linear_betas,
        "quad": schedules.quadratic_betas,
        "sigmoid": schedules.sigmoid_betas,
    }
    return betas[name](n_steps, 1e-4 * scale, 0.02 * scale)


def training_pairs(
    items: Tensor, ends: Tensor, n_pseudo: int, max_length: int, windows: str
) -> tuple[Tensor, Tensor]:
    """Targets and conditions from the training sequences that are long enough.

    Args:
        items (LongTensor): training items, user after user, in time order, [n].
        ends (LongTensor): exclusive cumulative ends of the users, [n_users].
        n_pseudo (int): M.
        max_length (int): L; of longer conditions the newest items are kept.
        windows (str): ``first``: the first M items of each user; ``all``: every M consecutive items
            that at least 3 others follow.

    Returns:
        tuple: target [P, M] and condition [P, L], right-padded with 0.
    """
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    n_windows = (ends - starts - n_pseudo - MIN_CONDITION + 1).clamp(min=0)
    if windows == "first":
        n_windows = n_windows.clamp(max=1)
    user = torch.repeat_interleave(torch.arange(len(ends)), n_windows)
    before = n_windows.cumsum(0) - n_windows
    begin = starts[user] + torch.arange(len(user)) - before[user]
    target = items[begin.unsqueeze(1) + torch.arange(n_pseudo)]
    end = ends[user]
    newest = torch.maximum(begin + n_pseudo, end - max_length)
    place = newest.unsqueeze(1) + torch.arange(max_length)
    inside = place < end.unsqueeze(1)
    return target, items[place.clamp(max=max(len(items) - 1, 0))] * inside


def antithetic_steps(n: int, n_steps: int, generator: torch.Generator | None = None) -> Tensor:
    """n steps, each uniform in 1..T; the second half mirrors the first, so their mean varies less.

    Args:
        n (int): how many.
        n_steps (int): T.
        generator (torch.Generator | None): a CPU generator; None is the global one.

    Returns:
        LongTensor: [n].
    """
    half = torch.randint(1, n_steps + 1, (n // 2 + 1,), generator=generator)
    return torch.cat([half, n_steps + 1 - half])[:n]


def build_network(config: Any, width: int) -> SUNet:
    """The noise predictor, with a warning where it cannot span the noise.

    Args:
        config (Config): resolved configuration.
        width (int): d, of the item embeddings.

    Raises:
        UserError: if embeddings of this width make no picture.
    """
    check_width(width, len(config["sunet_channel_mult"]))
    if config["sunet_base_channels"] < config["n_pseudo"]:
        logger.warning(
            f"sunet_base_channels={config['sunet_base_channels']} is smaller than n_pseudo="
            f"{config['n_pseudo']}: predictions cannot span the noise, and generated items are "
            "close to random"
        )
    return SUNet(
        n_items=config["n_pseudo"],
        width=width,
        base=config["sunet_base_channels"],
        multipliers=config["sunet_channel_mult"],
        n_blocks=config["sunet_res_blocks"],
        groups=config["sunet_groups"],
        attention_at=config["sunet_attn_resolutions"],
        dropout_prob=config["sunet_dropout"],
    )


class DiffuASR(nn.Module):
    """Noise predictor, its training loss, and guided generation of pseudo-items.

    Args:
        config (Config): resolved configuration, explained in properties/model/DiffuASR.yaml.
        n_items (int): rows of the item table, padding included.
        guide (Guide | None): the recommender trained on raw data; it is needed for pretrained
            embeddings and for classifier guidance.
        known (LongTensor | None): ids that may be generated; all without it.

    Raises:
        UserError: if the guide is missing, or its table or scores cannot be used.
    """

    scale: Tensor
    unknown: Tensor

    def __init__(
        self, config: Any, n_items: int, guide: Guide | None, known: Tensor | None = None
    ) -> None:
        super().__init__()
        self.n_items, self.guide = n_items, guide
        self.n_pseudo: int = config["n_pseudo"]
        self.condition_mode: str = config["diffuasr_condition"]
        self.loss_memory_mb: float = config["loss_memory_mb"]
        self.guidance: str = config["diffuasr_guidance"]
        self.strength: float = config["diffuasr_strength"]
        self.p_uncond: float = config["diffuasr_p_uncond"]
        self.cf_training: str = config["diffuasr_cf_training"]
        self.cg_log_prob: str = config["diffuasr_cg_log_prob"]
        self.cg_label: str = config["diffuasr_cg_label"]
        self.cg_scale: str = config["diffuasr_cg_scale"]
        self.cg_sign: str = config["diffuasr_cg_sign"]
        self.guide_in_training: bool = config["diffuasr_guide_in_training"]
        n_steps: int = config["diffuasr_diffusion_steps"]
        betas = noise_schedule(config["diffuasr_schedule"], n_steps)
        self.process = ForwardProcess(*schedules.variance_preserving(betas))
        self.times = samplers.leading(n_steps, config["diffuasr_sample_steps"])
        # Here: an item that occurs in validation or test alone must not be generated.
        unknown = torch.ones(n_items, dtype=torch.bool)
        unknown[torch.arange(1, n_items) if known is None else known] = False
        self.register_buffer("unknown", unknown.nonzero().squeeze(1), persistent=False)
        self._set_table(config)
        width = self.table.shape[1]
        unconditional = self.guidance == "classifier_free"
        self.null = nn.Parameter(torch.zeros(width), requires_grad=unconditional)
        self.network = build_network(config, width)

    def _set_table(self, config: Any) -> None:
        """Embeddings of the items, learnt or not, and the scale that they were divided by."""
        source: str = config["diffuasr_embeddings"]
        table = self._initial_table(source, item_width(config))
        spread = table[1:].std()
        unit = config["diffuasr_scale"] == "unit_std" and source != "scratch_trainable"
        self.register_buffer("scale", spread if unit else torch.ones_like(spread))
        table = table / self.scale
        table[0] = 0
        if source == "pretrained_frozen":
            self.register_buffer("table", table)
        else:
            self.table = nn.Parameter(table)

    def _initial_table(self, source: str, width: int) -> Tensor:
        if self.guide is None:
            if source != "scratch_trainable" or self.guidance == "classifier":
                raise UserError(
                    f"diffuasr_embeddings={source} with diffuasr_guidance={self.guidance} needs a "
                    "recommender trained on the raw data; diffuasr_embeddings=scratch_trainable "
                    "without the classifier does not",
                    keys=("diffuasr_embeddings", "diffuasr_guidance"),
                )
            return torch.randn(self.n_items, width)
        if self.guidance == "classifier":
            self.guide.check(self.n_pseudo)
        # Code: random embeddings, trained by the noise loss. Here: the recommender's.
        if source == "scratch_trainable":
            return torch.randn(self.n_items, width)
        table = self.guide.table()
        if len(table) != self.n_items:
            raise UserError(
                f"the recommender knows {len(table) - 1} items, the data set {self.n_items - 1}"
            )
        return table

    # ------------------------------------------------------------------ training

    def loss(self, target: Tensor, condition: Tensor) -> Tensor:
        """Mean squared error of the predicted noise, at a random step a pair.

        Args:
            target (LongTensor): the items that come first, [B, M].
            condition (LongTensor): items that follow, right-padded with 0, [B, L].

        Returns:
            Tensor: scalar.
        """
        t = to_device(antithetic_steps(len(target), self.process.n_steps), target.device)
        x_0 = F.embedding(target, self.table)
        eps = torch.randn_like(x_0)
        c = self.condition_vector(condition)
        if self._drops_conditions():
            dropped = torch.rand(len(c), 1, device=c.device) < self.p_uncond
            c = torch.where(dropped, self.null, c)
        return self._errors(x_0, t, eps, c, condition).mean()

    @torch.no_grad()
    def fixed_noise_loss(self, target: Tensor, condition: Tensor, seed: int) -> float:
        """The training loss with the same steps and noise at every call, without dropout.

        Args:
            target (LongTensor): held-out targets, [P, M].
            condition (LongTensor): their conditions, [P, L].
            seed (int): of a generator of its own.

        Returns:
            float: mean over the pairs.
        """
        generator = torch.Generator().manual_seed(seed)
        t = antithetic_steps(len(target), self.process.n_steps, generator)
        total = 0.0
        with self._evaluating():
            for part in torch.arange(len(target)).split(ROWS):
                x_0 = F.embedding(target[part], self.table)
                eps = torch.randn(x_0.shape, generator=generator).to(x_0)
                c = self.condition_vector(condition[part])
                errors = self._errors(x_0, t[part].to(x_0.device), eps, c, condition[part])
                total += float(errors.mean((1, 2)).sum())
        return total / max(len(target), 1)

    def _drops_conditions(self) -> bool:
        # Paper: conditions are dropped at random. Code: never; both branches fit one prediction.
        standard = self.guidance == "classifier_free" and self.cf_training == "dropout"
        return standard and self.p_uncond > 0

    def _errors(self, x_0: Tensor, t: Tensor, eps: Tensor, c: Tensor, condition: Tensor) -> Tensor:
        """Squared errors of the prediction that is trained, [B, M, d]."""
        x_t = self.process.q_sample(x_0, t, eps)
        # Code: the guided prediction is fitted, so that the network learns to cancel the guidance.
        # Here: the plain one, unless asked for.
        combined = self.guidance == "classifier_free" and self.cf_training == "combined"
        if combined or (self.guidance == "classifier" and self.guide_in_training):
            label = condition if self.cg_label == "seq" else condition[:, 0]
            return (self.guided_noise(x_t, t, c, label) - eps).square()
        return (self.network(x_t, t, c) - eps).square()

    def condition_vector(self, condition: Tensor) -> Tensor:
        """c: mean (or sum) of the embeddings of the items, [B, L] -> [B, d]."""
        return F.embedding_bag(condition, self.table, mode=self.condition_mode, padding_idx=0)

    # ------------------------------------------------------------------ guidance

    def guided_noise(self, x_t: Tensor, t: Tensor, c: Tensor, label: Tensor) -> Tensor:
        """Predicted noise, with the configured guidance; strength 0 evaluates none.

        Args:
            x_t (Tensor): noised embeddings, [B, M, d].
            t (LongTensor): steps in 1..T, [B].
            c (Tensor): condition vectors, [B, d].
            label (LongTensor): what the classifier should expect next, [B] or [B, L].

        Returns:
            Tensor: [B, M, d].
        """
        if self.guidance == "none" or self.strength == 0:
            return self.network(x_t, t, c)
        if self.guidance == "classifier_free":
            both = self.network(
                torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([c, self.null.expand_as(c)])
            )
            conditional, unconditional = both.chunk(2)
            return samplers.classifier_free(conditional, unconditional, self.strength)
        # Paper: eps - gamma sqrt(1 - abar_t) grad log p. Code: plus, and the noise of step 1.
        at = torch.ones_like(t) if self.cg_scale == "const_first" else t
        sign = -1.0 if self.cg_sign == "paper" else 1.0
        weight = self.process.at(self.process.noise, at, x_t)
        step = sign * self.strength * weight * self.classifier_gradient(x_t, label)
        return self.network(x_t, t, c) + step

    def classifier_gradient(self, x_t: Tensor, label: Tensor) -> Tensor:
        """Gradient of log p_phi(label | x_t) with respect to x_t, [B, M, d]."""
        assert self.guide is not None
        with torch.enable_grad():
            x = (x_t.detach() * self.scale).requires_grad_()
            log_p = self.guide.log_prob(x, label, self.cg_log_prob)
            (gradient,) = torch.autograd.grad(log_p.sum(), x)
        return gradient * self.scale

    # ------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(self, condition: Tensor, users: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Pseudo-items of users.

        A user's noise depends on ``seed`` and the user's number only.

        Args:
            condition (LongTensor): the users' newest training items, right-padded, [U, L].
            users (LongTensor): numbers of the users, [U].
            labels (LongTensor): their first training items, [U].
            seed (int): of the noise.

        Returns:
            LongTensor: ids in 1..n_items - 1, in time order, [U, M].
        """
        label = condition if self.cg_label == "seq" else labels
        pseudo = torch.empty(len(users), self.n_pseudo, dtype=torch.long)
        with self._evaluating():
            for part in torch.arange(len(users)).split(ROWS):
                c = self.condition_vector(condition[part].to(self.null.device))
                noise = self._noise_of(users[part], seed)
                x = self.sample(c, label[part].to(c.device), noise)
                pseudo[part] = self.nearest_items(x).cpu()
        return pseudo

    def sample(self, c: Tensor, label: Tensor, noise: Tensor) -> Tensor:
        """The reverse process, from noise to embeddings.

        Args:
            c (Tensor): condition vectors, [B, d].
            label (LongTensor): what the classifier should expect next, [B] or [B, L].
            noise (Tensor): standard Gaussian noise, [B, M, d].

        Returns:
            Tensor: estimate of x_0, [B, M, d].
        """

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return self.process.x_0_from(x_t, t, self.guided_noise(x_t, t, c, label))

        # The chain starts at its first step, which lies below T, from pure noise all the same.
        return samplers.ddim(denoise, noise, self.process, self.times)

    def _noise_of(self, users: Tensor, seed: int) -> Tensor:
        """Noise of each user from a generator of their own, [U, M, d]."""
        shape = self.n_pseudo, len(self.null)
        generators = [np.random.default_rng([seed, user]) for user in users.tolist()]
        rows = [generator.standard_normal(shape, np.float32) for generator in generators]
        return torch.from_numpy(np.stack(rows)).to(self.null)

    def nearest_items(self, x: Tensor) -> Tensor:
        """The item of largest cosine to each vector; of equals, the lowest id.

        Args:
            x (Tensor): embeddings, [B, M, d].

        Returns:
            LongTensor: ids in 1..n_items - 1, [B, M].
        """
        table = F.normalize(self.table.detach(), dim=1)
        nearest = torch.empty(len(x) * self.n_pseudo, dtype=torch.long, device=x.device)
        for part, score in logit_blocks(x.flatten(0, 1), table, self.loss_memory_mb):
            score[:, self.unknown] = -torch.inf
            nearest[part] = score.argmax(1)
        return nearest.view(len(x), self.n_pseudo)

    # ------------------------------------------------------------------ reports

    @torch.no_grad()
    def mean_cosine(self) -> float:
        """Mean cosine of two different items: 1 when the embeddings have collapsed."""
        unit = F.normalize(self.table[1:].double(), dim=1)
        n = len(unit)
        return float((unit.sum(0).square().sum() - n) / (n * (n - 1)))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was)
