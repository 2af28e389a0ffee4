"""Random views of sequences: crop, mask and reorder (CL4SRec). B batch, L padded length.

Input is right-padded with 0 and is never written to. Random numbers come from torch's global
generator and do not depend on how far the batch is padded. Counts are floor(ratio * n) of a row's
real length n, in integers: 0.7 * 90 is 62.99999999999999.
"""

from collections.abc import Callable

import torch
from torch import Tensor

View = tuple[Tensor, Tensor]


def crop(item_seq: Tensor, item_seq_len: Tensor, keep: float) -> View:
    """One contiguous slice of each row, moved to the front; every start is equally likely.

    Args:
        item_seq (LongTensor): items, [B, L].
        item_seq_len (LongTensor): real lengths n, >= 1, [B].
        keep (float): share of the row that stays, in [0, 1]; at least one item does.

    Returns:
        tuple: the slices, [B, L], and their lengths max(1, floor(keep * n)), [B].
    """
    kept = _floor(item_seq_len, keep).clamp(min=1)
    start = _below(item_seq_len - kept + 1)
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    index = (start.unsqueeze(1) + place).clamp(max=item_seq.shape[1] - 1)
    return item_seq.gather(1, index).masked_fill(place >= kept.unsqueeze(1), 0), kept


def mask(item_seq: Tensor, item_seq_len: Tensor, ratio: float, token: int) -> View:
    """Each row with a uniformly drawn subset of floor(ratio * n) items replaced by ``token``.

    Args:
        item_seq (LongTensor): items, [B, L].
        item_seq_len (LongTensor): real lengths n, >= 1, [B].
        ratio (float): share of the items that is replaced, in [0, 1].
        token (int): id written in their place.

    Returns:
        tuple: the masked rows, [B, L], and their unchanged lengths, [B].
    """
    noise, _ = _token_noise(item_seq, item_seq_len)
    # The places of a row in order of their noise are a uniform permutation, padding at its end.
    chosen = noise.argsort(1) < _floor(item_seq_len, ratio).unsqueeze(1)
    return item_seq.masked_fill(chosen, token), item_seq_len


def reorder(item_seq: Tensor, item_seq_len: Tensor, ratio: float) -> View:
    """Each row with one contiguous window of floor(ratio * n) items uniformly permuted.

    Args:
        item_seq (LongTensor): items, [B, L].
        item_seq_len (LongTensor): real lengths n, >= 1, [B].
        ratio (float): share of the row in the window, in [0, 1]; all its starts are equally likely.

    Returns:
        tuple: the reordered rows, [B, L], and their unchanged lengths, [B].
    """
    size = _floor(item_seq_len, ratio)
    start = _below(item_seq_len - size + 1).unsqueeze(1)
    size = size.unsqueeze(1)
    noise, place = _token_noise(item_seq, item_seq_len)
    inside = (place >= start) & (place < start + size)
    # Keys of the window stay in [start, start + size): it is permuted, all else keeps its place.
    key = torch.where(inside, start + size * noise, place)
    return item_seq.gather(1, key.argsort(dim=1, stable=True)), item_seq_len


def two_views(
    item_seq: Tensor,
    item_seq_len: Tensor,
    crop_keep: float,
    mask_ratio: float,
    reorder_ratio: float,
    mask_token: int,
    replacement: bool = False,
) -> tuple[View, View]:
    """Two independent views of each row, by operators drawn for each row.

    Args:
        item_seq (LongTensor): items, [B, L].
        item_seq_len (LongTensor): real lengths, >= 1, [B]. Rows of one item stay as they are.
        crop_keep (float): see ``crop``.
        mask_ratio (float): see ``mask``.
        reorder_ratio (float): see ``reorder``.
        mask_token (int): id that ``mask`` writes.
        replacement (bool): draw the two operators independently; otherwise each ordered pair of
            different ones is equally likely.

    Returns:
        tuple: the views, each (items [B, L], lengths [B]).
    """
    operators: tuple[Callable[[Tensor, Tensor], View], ...] = (
        lambda seq, length: crop(seq, length, crop_keep),
        lambda seq, length: mask(seq, length, mask_ratio, mask_token),
        lambda seq, length: reorder(seq, length, reorder_ratio),
    )
    n = len(operators)
    first = torch.randint(n, item_seq_len.shape, device=item_seq.device)
    step = torch.randint(0 if replacement else 1, n, item_seq_len.shape, device=item_seq.device)

    def apply(choice: Tensor) -> View:
        view, view_len = item_seq.clone(), item_seq_len.clone()
        for number, operator in enumerate(operators):
            rows = ((choice == number) & (item_seq_len > 1)).nonzero().squeeze(1)
            view[rows], view_len[rows] = operator(item_seq[rows], item_seq_len[rows])
        return view, view_len

    return apply(first), apply((first + step) % n)


def _floor(length: Tensor, ratio: float) -> Tensor:
    """floor(ratio * length), exact for ratios of up to six digits."""
    return length * round(ratio * 1e6) // 1_000_000


def _below(bound: Tensor) -> Tensor:
    """A uniform integer in [0, bound) for each bound."""
    return (torch.rand(bound.shape, dtype=torch.float64, device=bound.device) * bound).long()


def _token_noise(item_seq: Tensor, item_seq_len: Tensor) -> View:
    """Uniform [0, 1) at every real token and 1 on padding, [B, L]; and the positions, [L]."""
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    real = place < item_seq_len.unsqueeze(1)
    noise = torch.ones(item_seq.shape, dtype=torch.float64, device=item_seq.device)
    noise[real] = torch.rand(int(real.sum()), dtype=torch.float64, device=item_seq.device)
    return noise, place
