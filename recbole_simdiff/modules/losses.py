"""Losses as pure functions of tensors. Shapes: n tokens, N items, H hidden size, B batch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff.distributed import over_global_batch
from recbole_simdiff.modules.host import to_device

SIMILARITIES = ("cosine", "dot")

_BYTES_PER_LOGIT = 4
_GROUP = 64  # columns, see ``largest``


def rows_per_block(table: Tensor, memory_mb: float) -> int:
    """Rows of float32 logits that fit into ``memory_mb`` MiB, but no fewer than H.

    With fewer than H rows a block costs more in reading the table than in arithmetic; with H it
    takes as much memory as one copy of the table.

    Args:
        table (Tensor): item embeddings, [N, H].
        memory_mb (float): budget for one block of logits, in MiB.

    Returns:
        int: rows per block.
    """
    n_items, hidden_size = table.shape
    return max(hidden_size, int(memory_mb * 2**20) // (_BYTES_PER_LOGIT * n_items))


def logit_blocks(hidden: Tensor, table: Tensor, memory_mb: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``hidden @ table.T`` block by block in one reused buffer; not differentiable.

    Args:
        hidden (Tensor): queries, [n, H].
        table (Tensor): item embeddings, [N, H].
        memory_mb (float): budget for one block, in MiB.

    Yields:
        tuple: the rows of the block, and its logits as float32, [rows, N]. The logits are valid
        until the next block is asked for and may be overwritten.
    """
    rows = min(rows_per_block(table, memory_mb), hidden.shape[0])
    table_t = table.detach().t()
    hidden = hidden.detach().to(table.dtype)
    buffer = table.new_empty(rows, table.shape[0])
    for start in range(0, hidden.shape[0], max(rows, 1)):
        part = slice(start, min(start + rows, hidden.shape[0]))
        logits = buffer[: part.stop - part.start]
        torch.mm(hidden[part], table_t, out=logits)
        yield part, logits


def largest(scores: Tensor, k: int, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """What ``scores.topk(k)`` returns, in less time where rows are long.

    The columns are cut into groups. The k largest scores are in the k groups with the largest
    maxima, so that only those are ranked.

    Args:
        scores (Tensor): [n, N].
        k (int): at most N.
        ordered (bool): largest first; otherwise in any order.

    Returns:
        tuple: values and their columns, both [n, k]; among equal scores any.
    """
    n, width = scores.shape
    groups = width // _GROUP
    if groups < 4 * k:
        return scores.topk(k, sorted=ordered)
    grouped = scores[:, : groups * _GROUP].unflatten(1, (groups, _GROUP))
    group = grouped.amax(2).topk(k, sorted=False).indices  # [n, k]
    ranked = grouped[torch.arange(n, device=scores.device).unsqueeze(1), group].flatten(1)
    rest = scores[:, groups * _GROUP :]
    values, place = torch.cat([ranked, rest], 1).topk(k, sorted=ordered)
    group = torch.cat([group, group.new_full((n, 1), groups)], 1)  # the rest is the last group
    return values, group.gather(1, place // _GROUP) * _GROUP + place % _GROUP


class Repeats(NamedTuple):
    """What is added to the logits of items that a token has in its history.

    Attributes:
        bias (Tensor): the number, scalar.
        token (LongTensor): token of each pair, in ascending order, [m].
        item (LongTensor): row of the table of each pair; no pair occurs twice, [m].
        before (LongTensor): number of pairs of all tokens before each one, on the host, [n + 1].
    """

    bias: Tensor
    token: Tensor
    item: Tensor
    before: Tensor


def repeats_in(
    item_seq: Tensor, row: Tensor, position: Tensor, first: int, bias: Tensor
) -> Repeats:
    """The distinct items that each token has in its history, at most L pairs a token.

    Their number depends on the items, so all tensors but the bias belong on the host.

    Args:
        item_seq (LongTensor): items, [B, L].
        row (LongTensor): row of each token, [n].
        position (LongTensor): place of each token within its row, [n].
        first (int): id of the first row of the table.
        bias (Tensor): what is added to their logits, scalar.
    """
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    earlier = (item_seq.unsqueeze(2) == item_seq.unsqueeze(1)).tril(-1).any(2)  # [B, L]
    pairs = ~earlier[row] & (place <= position.unsqueeze(1))  # [n, L]
    token, column = pairs.nonzero(as_tuple=True)
    item = item_seq[row[token], column] - first
    before = F.pad(pairs.sum(1).cumsum(0), (1, 0))
    return Repeats(bias, to_device(token, bias.device), to_device(item, bias.device), before)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of softmax cross-entropies whose logits never exist all at once.

    Value and both gradients are formed block by block in the forward pass: with p = softmax(h E^T),
    d/dh = p E - E[y] and d/dE = p^T h - onehot(y)^T h. A bias b of some logits has the gradient
    sum of their p - number of targets among them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        target: Tensor,
        memory_mb: float,
        low: bool,
        bias: Tensor,
        token: Tensor,
        item: Tensor,
        before: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        dtype = torch.bfloat16 if low else table.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            h, e = hidden.to(dtype), table.to(dtype)
            total = table.new_zeros(())
            grad_hidden = torch.empty_like(h, dtype=table.dtype)
            grad_table = torch.zeros_like(table)
            grad_bias = torch.zeros_like(bias)
            for part, logits in _blocks(h, e, memory_mb):
                y = target[part, None]
                if offset is not None:
                    logits.sub_(offset)
                if before is not None:
                    here = slice(*before[[part.start, part.start + len(logits)]].tolist())
                    row, column = token[here] - part.start, item[here]
                    logits[row, column] += bias
                top = logits.amax(1, keepdim=True)
                of_target = logits.gather(1, y)
                weights = logits.sub_(top).exp_()
                norm = weights.sum(1, keepdim=True)
                total += (top + norm.log() - of_target).sum()
                scale = norm.reciprocal_()
                if before is not None:
                    grad_bias += (weights[row, column] * scale[row, 0]).sum()
                    grad_bias -= (column == y[row, 0]).sum()
                p = weights.to(dtype)
                grad_hidden[part] = (p @ e) * scale
                scaled = (h[part] * scale).to(dtype)
                if low:
                    grad_table += p.t() @ scaled
                else:
                    grad_table.addmm_(p.t(), scaled)
            grad_hidden -= table[target]
            grad_table.index_add_(0, target, hidden.to(table.dtype), alpha=-1.0)
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_table, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_table, grad_bias = ctx.saved_tensors
        of_bias = grad_bias * grads[0]
        return grad_hidden * grads[0], grad_table * grads[0], *[None] * 3, of_bias, *[None] * 4


def _blocks(h: Tensor, e: Tensor, memory_mb: float) -> Iterator[tuple[slice, Tensor]]:
    """As ``logit_blocks``, with float32 logits also when the product runs in bfloat16."""
    if h.dtype != torch.bfloat16:
        yield from logit_blocks(h, e, memory_mb)
        return
    rows = rows_per_block(e, memory_mb)
    for start in range(0, h.shape[0], rows):
        part = slice(start, start + rows)
        yield part, (h[part] @ e.t()).float()


def full_softmax_loss(
    hidden: Tensor,
    table: Tensor,
    target: Tensor,
    memory_mb: float = 16.0,
    repeats: Repeats | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ table.T - offset)[target], exact, in blocks.

    Gradients with respect to ``hidden`` and ``table`` are exact. Memory grows with n + N, not with
    their product. Under autocast the products run in bfloat16 and the softmax in float32.

    Args:
        hidden (Tensor): queries, [n, H].
        table (Tensor): item embeddings, [N, H].
        target (LongTensor): ids of the right items, rows of the table, [n].
        memory_mb (float): budget for one block of logits, in MiB.
        repeats (Repeats | None): a learned bias of some logits.
        offset (Tensor | None): taken off each logit; infinite for rows that do not count, [N].

    Returns:
        Tensor: scalar, the sum; 0 for n = 0.
    """
    low = torch.is_autocast_enabled(hidden.device.type)
    pairs = repeats or (table.new_zeros(()), target[:0], target[:0], None)
    total: Tensor = _LinearCrossEntropy.apply(hidden, table, target, memory_mb, low, *pairs, offset)
    return total


def sampled_bce_loss(hidden: Tensor, table: Tensor, target: Tensor, negative: Tensor) -> Tensor:
    """Sum over tokens of -log s(h.e_target) - log(1 - s(h.e_negative)); SimDiffRec Eq. 3.

    Args:
        hidden (Tensor): queries, [n, H].
        table (Tensor): item embeddings, [N, H].
        target (LongTensor): ids of the right items, [n].
        negative (LongTensor): ids of the sampled wrong items, [n].

    Returns:
        Tensor: scalar, the sum.
    """
    right = (hidden * table[target]).sum(-1)
    wrong = (hidden * table[negative]).sum(-1)
    return F.softplus(-right).sum() + F.softplus(wrong).sum()


@over_global_batch
def info_nce(
    anchor: Tensor,
    positive: Tensor,
    temperature: float,
    negative: Tensor | None = None,
    similarity: str = "cosine",
) -> Tensor:
    """InfoNCE of each anchor against all positives and, if given, all extra negatives.

    Row b of ``positive`` is the positive of row b of ``anchor``; the other rows, and every row of
    ``negative``, are its negatives (SimDiffRec Eq. 17).

    Args:
        anchor (Tensor): [B, H].
        positive (Tensor): [B, H].
        temperature (float): tau > 0.
        negative (Tensor | None): extra negatives, [M, H].
        similarity (str): ``cosine``, or ``dot`` for unnormalised vectors.

    Returns:
        Tensor: scalar, mean over the B anchors.

    Raises:
        ValueError: if the shapes differ, the temperature is not positive or the similarity is
            neither of the two.
    """
    _check_contrast(anchor, positive, temperature, similarity)
    keys = positive if negative is None else torch.cat([positive, negative])
    with torch.autocast(anchor.device.type, enabled=False):
        logits = _vectors(anchor, similarity) @ _vectors(keys, similarity).t() / temperature
    return F.cross_entropy(logits, torch.arange(len(anchor), device=anchor.device))


@over_global_batch
def state_info_nce(
    anchor: Tensor,
    positive: Tensor,
    temperature: float,
    similarity: str,
    user: Tensor,
    target: Tensor,
    weight: Tensor,
    negative: Tensor | None = None,
    same_target: bool = False,
) -> Tensor:
    """InfoNCE of states of many positions, several of which may belong to one user.

    State m of ``positive`` is the positive of state m of ``anchor``, state m of ``negative`` a
    negative of that anchor alone. The other states of ``positive`` are negatives, except those of
    the same user and those with the same next item. The latter, of other users, can be further
    positives: then the loss is the mean over all positives, each against all positives and
    negatives of the anchor (SupCon, Khosla et al. 2020, Eq. 2).

    Args:
        anchor (Tensor): [M, H].
        positive (Tensor): [M, H].
        temperature (float): tau > 0.
        similarity (str): ``cosine``, or ``dot`` for unnormalised vectors.
        user (LongTensor): user of each state, [M].
        target (LongTensor): next item of each state, [M].
        weight (Tensor): what each anchor counts, [M].
        negative (Tensor | None): a hard negative of each anchor, [M, H].
        same_target (bool): states of other users with the same next item are positives.

    Returns:
        Tensor: scalar, the weighted sum over the M anchors.

    Raises:
        ValueError: if the shapes differ, the temperature is not positive or the similarity is
            neither of the two.
    """
    _check_contrast(anchor, positive, temperature, similarity)
    anchor, positive = _vectors(anchor, similarity), _vectors(positive, similarity)
    with torch.autocast(anchor.device.type, enabled=False):
        logits = anchor @ positive.t() / temperature  # [M, M]
    same_state = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
    other_user = user.unsqueeze(1) != user
    equal_target = target.unsqueeze(1) == target
    is_positive = same_state
    if same_target:
        is_positive = same_state | (equal_target & other_user)
    logits = logits.masked_fill(~(is_positive | (other_user & ~equal_target)), -torch.inf)
    total = logits.logsumexp(1)
    if negative is not None:
        hard = (anchor * _vectors(negative, similarity)).sum(1) / temperature
        total = torch.logaddexp(total, hard)
    of_positives = logits.masked_fill(~is_positive, 0.0).sum(1) / is_positive.sum(1)
    return (weight * (total - of_positives)).sum()


def _check_contrast(first: Tensor, second: Tensor, temperature: float, similarity: str) -> None:
    if first.shape != second.shape:
        raise ValueError(f"the two sides {tuple(first.shape)} and {tuple(second.shape)} must match")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity={similarity!r} is not one of {', '.join(SIMILARITIES)}")


def _vectors(rows: Tensor, similarity: str) -> Tensor:
    """What is multiplied: float32 rows, of length 1 for ``cosine``, [n, H]."""
    return F.normalize(rows.float(), dim=-1) if similarity == "cosine" else rows.float()


@over_global_batch
def nt_xent(
    first: Tensor,
    second: Tensor,
    temperature: float,
    similarity: str,
    group: Tensor | None = None,
) -> Tensor:
    """NT-Xent of two views: each of the 2B rows against all others (SimCLR Eq. 1).

    Row b of one view is the positive of row b of the other; the remaining 2B - 2 rows of both views
    are negatives. A row is never compared with itself.

    Args:
        first (Tensor): one view of each row, [B, H].
        second (Tensor): the other view, [B, H].
        temperature (float): tau > 0.
        similarity (str): ``cosine``, or ``dot`` for unnormalised vectors.
        group (LongTensor | None): rows of one group are no negatives of each other, [B].

    Returns:
        Tensor: scalar, mean over the 2B rows; 0 for B = 1, or a single group.

    Raises:
        ValueError: if the shapes differ, the temperature is not positive or the similarity is
            neither of the two.
    """
    _check_contrast(first, second, temperature, similarity)
    with torch.autocast(first.device.type, enabled=False):
        z = _vectors(torch.cat([first, second]), similarity)
        logits = z @ z.t() / temperature
    rows = torch.arange(len(z), device=z.device)
    partner = rows.roll(len(first))
    logits = logits.fill_diagonal_(-torch.inf)
    if group is not None:
        group = group.repeat(2)
        same = (group == group.unsqueeze(1)) & (rows != partner.unsqueeze(1))
        logits = logits.masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, partner)
