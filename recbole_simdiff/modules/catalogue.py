"""Large catalogues: a sample that stands for all items in training, and how many rows are scored.

Shapes: n tokens, N items with padding, V = N - 1, H hidden size, C candidates.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff.distributed import world_size
from recbole_simdiff.errors import UserError
from recbole_simdiff.log import logger
from recbole_simdiff.modules.losses import full_softmax_loss
from recbole_simdiff.modules.negatives import NegativeSampler

SCORES_MB: float = 512  # of the scores of all items for the rows that are ranked together, float32

CATALOGUES = ("exact", "approximate")

# What ``catalogue: approximate`` does not go with: key -> the value that it must have, and why.
_EXACT_ONLY = {
    "sr_loss": ("CE", "it estimates the full softmax; the other losses have samples of their own"),
    "repeat_bias": ("none", "the bias changes scores of items that are not drawn"),
    "learner": ("adam", "it has an optimiser for rows"),
    "weight_decay": (0.0, "rows that a batch does not use stay as they are"),
    "clip_grad_norm": (None, "gradients of the item table are sparse"),
    "item_vectors": (None, "gradients of the item table are sparse"),
}

# From this many items on, the log of a training names ``catalogue: approximate``.
LARGE_CATALOGUE = 200_000


class Candidates(NamedTuple):
    """Items that stand for all items 1..V: some that were given, and others drawn.

    The sum of e^(s_j - offset_j) over the candidates is an unbiased estimate of the sum of e^(s_j)
    over all items, whatever the scores s. Given items count as they are. A drawn item counts
    1 / (K q) for each time it was drawn, in K draws of probability q, unless it was given, too.

    Attributes:
        items (LongTensor): ids in ascending order; an item may occur several times, [C].
        offset (Tensor): taken off an item's score, infinite for what does not count, [C].
        repeated (BoolTensor): the item stands further ahead, too, [C].
    """

    items: Tensor
    offset: Tensor
    repeated: Tensor

    def place(self, given: Tensor) -> Tensor:
        """Where each of the given items stands, of their shape."""
        return torch.searchsorted(self.items, given)


def draw_candidates(sampler: NegativeSampler, given: Tensor, n: int) -> Candidates:
    """The given items and n drawn ones; all items once if there are at most n.

    No shape depends on the values of a tensor.

    Args:
        sampler (NegativeSampler): draws the others.
        given (LongTensor): items in 1..V, some of them equal, [m].
        n (int): number of draws.

    Returns:
        Candidates: C = m + n, or V if V <= n.
    """
    device = given.device
    if sampler.n_items - 1 <= n:
        items = torch.arange(1, sampler.n_items, device=device)
        return Candidates(items, torch.zeros(len(items), device=device), items == 0)
    items, order = torch.cat([given, sampler.draw(n, device=device)]).sort(stable=True)
    repeated = torch.cat([items.new_zeros(1, dtype=torch.bool), items[1:] == items[:-1]])
    was_given = (order < len(given))[torch.searchsorted(items, items)]
    of_given = torch.where(repeated, torch.inf, 0.0)
    of_drawn = sampler.log_probability(items) + math.log(n)
    return Candidates(items, torch.where(was_given, of_given, of_drawn), repeated)


def estimated_softmax_loss(
    query: Tensor, table: Tensor, target: Tensor, among: Candidates, memory_mb: float
) -> Tensor:
    """Softmax loss whose sum over all items 1..V is estimated, a sum over tokens.

    The padding row is no class of it. The gradient of the table is sparse.

    Args:
        query (Tensor): [n, H].
        table (Tensor): item embeddings, [N, H].
        target (LongTensor): the right items, all of them given to ``among``, [n].
        among (Candidates): what the sum is estimated from.
        memory_mb (float): budget for one block of logits, in MiB.

    Returns:
        Tensor: scalar.
    """
    rows, place = F.embedding(among.items, table, sparse=True), among.place(target)
    return full_softmax_loss(query, rows, place, memory_mb, offset=among.offset)


def check_catalogue(config: Any) -> None:
    """Refuse what an approximate catalogue does not go with.

    Args:
        config (Config): of a model around the encoder.

    Raises:
        UserError: naming the key, its value and what is needed.
    """
    if config["catalogue"] == "exact":
        return
    if not config.model_class.approximates:
        raise UserError(
            f"catalogue=approximate: model={config.model_class.__name__} compares with all items; "
            "SASRecCE and SimDiffRec can do without",
            keys=("catalogue",),
        )
    if world_size() > 1:
        raise UserError(
            "catalogue=approximate trains in one process, because gradients of the item table are "
            "sparse. Give --nproc=1, or catalogue=exact",
            keys=("catalogue",),
        )
    for key, (needed, why) in _EXACT_ONLY.items():
        if config[key] != needed:
            raise UserError(
                f"catalogue=approximate needs {key}={needed}, is {config[key]}: {why}",
                keys=("catalogue", key),
            )


def rows_at_once(rows: int, n_items: int) -> int:
    """How many rows are scored together: fewer where their scores would exceed ``SCORES_MB``.

    Args:
        rows (int): at most so many, the setting ``eval_batch_size``.
        n_items (int): number of ids N, padding included.
    """
    return max(1, min(rows, int(SCORES_MB * 2**20 / (4 * n_items))))


def name_catalogue(n_items: int) -> None:
    """Name the approximate catalogue in the log of a large exact one.

    Args:
        n_items (int): number of ids N, padding included.
    """
    if n_items > LARGE_CATALOGUE:
        logger.info(
            f"{n_items - 1:,} items: each step compares with all of them. With "
            "catalogue=approximate it compares with a sample and is many times faster"
        )
