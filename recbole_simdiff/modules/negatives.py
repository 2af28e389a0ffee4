"""Sampled negatives, and the next-item losses over them. Shapes: n tokens, N items, K negatives."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

DISTRIBUTIONS = ("uniform", "log_uniform")


class NegativeSampler:
    """Draws items 1..V, V = N - 1, with replacement.

    ``uniform`` gives every item the same probability. ``log_uniform`` gives the item of popularity
    rank r = 0, 1, ... the probability log((r + 2) / (r + 1)) / log(V + 1), close to Zipf's law.

    Args:
        distribution (str): one of ``DISTRIBUTIONS``.
        counts (Tensor | None): training interactions of each item, [N]; with None, as in a model
            that only scores, ids stand in for ranks.
        n_items (int): number of ids N, padding included.
    """

    def __init__(self, distribution: str, counts: Tensor | None, n_items: int) -> None:
        self.distribution, self.n_items = distribution, n_items
        counts = torch.zeros(n_items) if counts is None else counts
        self._order = counts[1:].argsort(descending=True, stable=True) + 1  # rank -> id
        rank = torch.empty_like(self._order)
        rank[self._order - 1] = torch.arange(n_items - 1)
        self._rank = torch.cat([rank.new_zeros(1), rank])  # id -> rank

    def draw(self, *shape: int, device: torch.device) -> Tensor:
        """Items of the given shape."""
        if self.distribution == "uniform":
            return torch.randint(1, self.n_items, shape, device=device)
        uniform = torch.rand(shape, device=device, dtype=torch.float64)
        rank = (uniform * math.log(self.n_items)).exp().long() - 1
        self._order = self._order.to(device)
        return self._order[rank.clamp(max=self.n_items - 2)]

    def log_probability(self, items: Tensor) -> Tensor:
        """Logarithm of the probability that one draw is this item, of the items' shape."""
        if self.distribution == "uniform":
            return torch.full(items.shape, -math.log(self.n_items - 1), device=items.device)
        self._rank = self._rank.to(items.device)
        rank = self._rank[items].double()
        return (torch.log1p(1 / (rank + 1)).log() - math.log(math.log(self.n_items))).float()


def unseen_items(item_seq: Tensor, pos_items: Tensor, row: Tensor, n_items: int) -> Tensor:
    """Uniform items of 1..V outside the row's history and target (SimDiffRec Eq. 3).

    There must be one: ``create_loaders`` refuses training rows that hold all items. How often is
    drawn depends on what is drawn, so all tensors belong on the host.

    Args:
        item_seq (LongTensor): items, [B, L].
        pos_items (LongTensor): target of each row, [B].
        row (LongTensor): row of each token, [n].
        n_items (int): number of ids N, padding included.

    Returns:
        LongTensor: [n].
    """
    seen = torch.cat([item_seq, pos_items.unsqueeze(1)], 1)[row]
    negative = torch.randint(1, n_items, (len(seen),), device=seen.device)
    while True:
        clash = (seen == negative.unsqueeze(1)).any(1).nonzero().squeeze(1)
        if len(clash) == 0:
            return negative
        negative[clash] = torch.randint(1, n_items, (len(clash),), device=seen.device)


def negative_logits(
    hidden: Tensor, table: Tensor, target: Tensor, negative: Tensor, memory_mb: float
) -> Tensor:
    """Scores of the negatives, -inf where a negative is the target, [n, K].

    Negatives of each token are looked up in blocks, which the backward pass looks up again, so that
    no tensor of shape [n, K, H] exists.

    Args:
        hidden (Tensor): queries, [n, H].
        table (Tensor): item embeddings, [N, H].
        target (LongTensor): ids of the right items, [n].
        negative (LongTensor): ids, shared by all tokens [K], or of each token [n, K].
        memory_mb (float): budget for the embeddings of one block, in MiB.
    """
    if negative.dim() == 1:
        logits = hidden @ table[negative].t()
    else:
        size = max(1, int(memory_mb * 2**20) // (4 * negative.shape[1] * table.shape[1]))
        blocks = zip(hidden.split(size), negative.split(size), strict=True)
        parts = [checkpoint(_products, h, table, ids, use_reentrant=False) for h, ids in blocks]
        logits = torch.cat(parts) if parts else hidden.new_zeros(negative.shape)
    return logits.float().masked_fill(negative == target.unsqueeze(1), -torch.inf)


def _products(hidden: Tensor, table: Tensor, negative: Tensor) -> Tensor:
    return torch.bmm(table[negative], hidden.unsqueeze(2)).squeeze(2)


def sampled_softmax_loss(positive: Tensor, negative: Tensor, offset: Tensor | float) -> Tensor:
    """Sum over tokens of -log(e^s / (e^s + sum_k e^(s_k - offset_k))).

    With offset_k = log(K q_k), for K draws of probability q_k, the sum is an unbiased estimate of
    that of all items but the target, and the loss that of the full softmax in the limit.

    Args:
        positive (Tensor): score s of each target, [n].
        negative (Tensor): scores s_k, -inf for those that do not count, [n, K].
        offset (Tensor | float): taken off these scores, broadcast to [n, K].

    Returns:
        Tensor: scalar, the sum.
    """
    others = (negative - offset).logsumexp(1)
    return (torch.logaddexp(positive.float(), others) - positive).sum()


def gbce_loss(positive: Tensor, negative: Tensor, beta: float) -> Tensor:
    """Sum over tokens of -(beta log s(s_+) + sum_k log s(-s_k)) / (K + 1); gSASRec, Eq. 7.

    Paper: arXiv 2308.07192.

    Args:
        positive (Tensor): score of each target, [n].
        negative (Tensor): scores of the negatives, -inf for those that do not count, [n, K].
        beta (float): see ``gbce_beta``.

    Returns:
        Tensor: scalar, the sum.
    """
    wrong = F.softplus(negative).sum()  # softplus(-inf) = 0
    return (beta * F.softplus(-positive).sum() + wrong) / (negative.shape[1] + 1)


def gbce_beta(n_negatives: int, n_items: int, t: float) -> float:
    """Power of the positives' probability: beta = a (t (1 - 1/a) + 1/a), gSASRec Eq. 10.

    a = K / (V - 1) is the sampling rate. t = 0 is binary cross-entropy; with t = 1 the optimal
    sigmoid of a score is the item's probability, whatever the number of negatives.

    Args:
        n_negatives (int): K.
        n_items (int): number of ids, padding included, V + 1.
        t (float): calibration, in [0, 1].
    """
    rate = n_negatives / (n_items - 2)
    return rate * (t * (1 - 1 / rate) + 1 / rate)
