"""Random views of sequences: crop, mask and reorder (CL4SRec). B batch, L padded length.

Input is right-padded with 0 and is never written to. An operator is a function of rows and noise;
the noise comes from torch's global generator and, on the CPU, does not depend on how far the batch
is padded. Nothing here waits for the device: which operator is drawn for a row, and so how long the
view is, is known on the host. Counts are floor(ratio * n) of a row's real length n, in integers:
0.7 * 90 is 62.99999999999999.
"""

import torch
from torch import Tensor

from recbole_simdiff.modules.host import to_device

View = tuple[Tensor, Tensor]


def uniform_noise(item_seq: Tensor) -> Tensor:
    """What an operator draws: a uniform [0, 1) number a row and one a position, [B, 1 + L].

    Args:
        item_seq (LongTensor): items, [B, L].
    """
    rows, length = item_seq.shape
    # Position by position, so that the numbers of the padding are drawn last.
    return torch.rand(1 + length, rows, dtype=torch.float64, device=item_seq.device).t()


def crop(item_seq: Tensor, item_seq_len: Tensor, noise: Tensor, keep: float) -> View:
    """One contiguous slice of each row, moved to the front; every start is equally likely.

    Args:
        item_seq (LongTensor): items, [B, L].
        item_seq_len (LongTensor): real lengths n, >= 1, [B].
        noise (Tensor): of ``uniform_noise``.
        keep (float): share of the row that stays, in [0, 1]; at least one item does.

    Returns:
        tuple: the slices, [B, L], and their lengths max(1, floor(keep * n)), [B].
    """
    kept = _kept(item_seq_len, keep)
    start = _below(item_seq_len - kept + 1, noise)
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    index = (start.unsqueeze(1) + place).clamp(max=item_seq.shape[1] - 1)
    return item_seq.gather(1, index).masked_fill(place >= kept.unsqueeze(1), 0), kept


def mask(item_seq: Tensor, item_seq_len: Tensor, noise: Tensor, ratio: float, token: int) -> View:
    """Each row with a uniformly drawn subset of floor(ratio * n) items replaced by ``token``.

    Args:
        item_seq (LongTensor): items, [B, L].
        item_seq_len (LongTensor): real lengths n, >= 1, [B].
        noise (Tensor): of ``uniform_noise``.
        ratio (float): share of the items that is replaced, in [0, 1].
        token (int): id written in their place.

    Returns:
        tuple: the masked rows, [B, L], and their unchanged lengths, [B].
    """
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    noise = noise[:, 1:].masked_fill(place >= item_seq_len.unsqueeze(1), 1.0)
    count = _floor(item_seq_len, ratio)
    # The places of a row in order of their noise are a uniform permutation, padding at its end.
    return item_seq.masked_fill(noise.argsort(1) < count.unsqueeze(1), token), item_seq_len


def reorder(item_seq: Tensor, item_seq_len: Tensor, noise: Tensor, ratio: float) -> View:
    """Each row with one contiguous window of floor(ratio * n) items uniformly permuted.

    Args:
        item_seq (LongTensor): items, [B, L].
        item_seq_len (LongTensor): real lengths n, >= 1, [B].
        noise (Tensor): of ``uniform_noise``.
        ratio (float): share of the row in the window, in [0, 1]; all its starts are equally likely.

    Returns:
        tuple: the reordered rows, [B, L], and their unchanged lengths, [B].
    """
    size = _floor(item_seq_len, ratio)
    start = _below(item_seq_len - size + 1, noise).unsqueeze(1)
    size = size.unsqueeze(1)
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    inside = (place >= start) & (place < start + size)
    # Keys of the window stay in [start, start + size): it is permuted, all else keeps its place.
    key = torch.where(inside, start + size * noise[:, 1:], place)
    return item_seq.gather(1, key.argsort(dim=1, stable=True)), item_seq_len


def two_views(
    item_seq: Tensor,
    item_seq_len: Tensor,
    crop_keep: float,
    mask_ratio: float,
    reorder_ratio: float,
    mask_token: int,
    replacement: bool = False,
) -> View:
    """Two independent views of each row, by operators drawn for each row.

    Args:
        item_seq (LongTensor): items, [B, L].
        item_seq_len (LongTensor): real lengths, >= 1, on the host, [B]. Rows of one item stay as
            they are.
        crop_keep (float): see ``crop``.
        mask_ratio (float): see ``mask``.
        reorder_ratio (float): see ``reorder``.
        mask_token (int): id that ``mask`` writes.
        replacement (bool): draw the two operators independently; otherwise each ordered pair of
            different ones is equally likely.

    Returns:
        tuple: items [2B, L] and, on the host, lengths [2B]; one view of each row, then the other of
            each.
    """
    first = torch.randint(3, item_seq_len.shape)
    step = torch.randint(0 if replacement else 1, 3, item_seq_len.shape)
    choice = torch.cat([first, (first + step) % 3]).masked_fill(item_seq_len.repeat(2) < 2, 3)
    lengths = item_seq_len.repeat(2)
    lengths = torch.where(choice == 0, _kept(lengths, crop_keep), lengths)

    seq, length = item_seq.repeat(2, 1), to_device(item_seq_len, item_seq.device).repeat(2)
    noise = uniform_noise(seq)  # a view is made by one operator, so they may share it
    candidates = torch.stack(
        [
            crop(seq, length, noise, crop_keep)[0],
            mask(seq, length, noise, mask_ratio, mask_token)[0],
            reorder(seq, length, noise, reorder_ratio)[0],
            seq,
        ]
    )
    row = torch.arange(len(seq), device=seq.device)
    return candidates[to_device(choice, seq.device), row], lengths


def _kept(length: Tensor, keep: float) -> Tensor:
    """How many items ``crop`` leaves of rows of these lengths."""
    return _floor(length, keep).clamp(min=1)


def _floor(length: Tensor, ratio: float) -> Tensor:
    """floor(ratio * length), exact for ratios of up to six digits."""
    return length * round(ratio * 1e6) // 1_000_000


def _below(bound: Tensor, noise: Tensor) -> Tensor:
    """A uniform integer in [0, bound) for each row, [B]."""
    return (noise[:, 0] * bound).long()
